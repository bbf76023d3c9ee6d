"""How rare is a success for random play? Shaping can matter where a first reward is rare, so ask before choosing a task.

    python benchmarks/rarity.py --env MiniGrid-UnlockPickup-v0 --episodes 2000
"""
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import tyro

import envs
from errors import UserError


@dataclass
class Args:
    """Success of uniform random actions."""
    env: tuple[str, ...]  # environment ids, with discrete actions
    episodes: int = 400  # of each
    seed: int = 1


def main(args: Args) -> None:
    """Print a row of a table for each environment."""
    print("| environment | success | episodes | steps per episode | steps per success |\n|---|---|---|---|---|")
    for env_id in args.env:
        vec = envs.make_vec(env_id, min(100, args.episodes))
        _, num_actions = envs.discrete_sizes(vec)
        rng = np.random.default_rng(args.seed)
        result = envs.evaluate(lambda obs: rng.integers(num_actions, size=vec.num_envs), vec, args.episodes,
                               10_000 * args.seed)
        rate, length = result["success_rate"], result["length_mean"]
        error = (rate * (1 - rate) / args.episodes) ** 0.5
        often = f"{length / rate:,.0f}" if rate else f"more than {length * args.episodes / 3:,.0f}"  # 95 %: none of 3
        print(f"| {env_id} | {rate:.4f} +- {error:.4f} | {args.episodes} | {length:.0f} | {often} |", flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (UserError, ValueError) as error:
        print(f"rarity: {error}", file=sys.stderr)
        sys.exit(2)
