"""What external policies are worth before any learning: each alone, chance, doing nothing, and simple mixtures.

    python benchmarks/rules.py --env FetchPush-v2                       # the policies that --knowledge auto takes
    python benchmarks/rules.py --env FetchPickAndPlace-v2 --knowledge mine.py,fetch.carry_to_goal
    python benchmarks/rules.py --env MiniGrid-DoorKey-5x5-v0 --episodes 100   # discrete actions, drawn from advice
    python benchmarks/rules.py --env CartPole-v1 --knowledge none             # the random agent

If one of them drawn at random in every step already solves the task, a learned fusion says little about fusion; if
nothing below does more than uniform actions, they will hardly help.
"""
import argparse
import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gymnasium as gym
import torch

import envs
import knowledge

SHARPNESS = 20.0  # of advice on discrete actions: softmax(this times advice)
COLUMNS = ["env", "knowledge", "who", "episodes", "success_rate", "return_mean", "length_mean"]


def discrete_contenders(names: list[str]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Who acts: {name: advice of n external policies (B, n, A) -> log-probabilities of actions (B, A)}.

    `mix` is one of them drawn per step, `rule` the softmax of the sum of all advice. Without advice a policy acts at
    random.
    """
    def alone(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda advice: torch.log_softmax(SHARPNESS * advice[:, i], -1)

    def mix(advice: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(torch.log_softmax(SHARPNESS * advice, -1) - math.log(len(names)), 1)

    mixtures = {"mix": mix, "rule": lambda advice: torch.log_softmax(advice.sum(1), -1)} if names else {}
    return {name: alone(i) for i, name in enumerate(names)} | {
        "uniform actions": lambda advice: torch.zeros_like(advice.sum(1))} | mixtures


def draw(log_probs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B, A) -> actions (B,)."""
    return (log_probs - (-torch.rand(log_probs.shape).clamp(1e-10, 1 - 1e-7).log()).log()).argmax(1)


def contenders(names: list[str], d: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Who acts: {name: advice of n external policies (B, n, d) -> actions (B, d)}."""
    def alone(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda advice: advice[:, i]

    def drawn(advice: torch.Tensor) -> torch.Tensor:
        return advice[torch.arange(len(advice)), torch.randint(len(names), (len(advice),))]

    def in_turns(advice: torch.Tensor) -> torch.Tensor:
        moves = (advice[:, :, :3] != 0).any(-1)  # (B, n); fingers, the fourth number of an arm's action, do not count
        last = torch.where(moves, torch.arange(1, len(names) + 1), 0).argmax(1)  # nobody moves: the first
        return advice[torch.arange(len(advice)), last]

    mixtures = {"one drawn per step": drawn, "the last that moves, else the first": in_turns} if len(names) > 1 else {}
    return {name: alone(i) for i, name in enumerate(names)} | {
        "uniform actions": lambda advice: 2 * torch.rand(len(advice), d) - 1,
        "doing nothing": lambda advice: torch.zeros(len(advice), d)} | mixtures


def rows_of(path: Path) -> list[list[str]]:
    """The rows of an earlier table at `path`, none if there is no file. Raises ValueError if it is no such table."""
    if not path.exists():
        return []
    try:
        header, *rows = csv.reader(path.read_text().splitlines())
    except (OSError, ValueError, csv.Error):
        header, rows = [], []
    if header != COLUMNS:
        raise ValueError(f"{path} is not a table of this command; name another file")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("--knowledge", default="auto", help="as in algos/sac_kian.py and algos/ppo_kian.py")
    parser.add_argument("--episodes", type=int, default=500, help="episodes of each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="file to add the rows to; one that is there already is replaced")
    flags = parser.parse_args()
    if flags.episodes < 1 or flags.seed < 0:
        raise ValueError("--episodes must be at least 1, --seed 0 or more")
    old = rows_of(flags.csv) if flags.csv else []
    vec = envs.make_vec(flags.env, min(32, flags.episodes), threads=torch.get_num_threads())
    discrete = isinstance(vec.action_space, gym.spaces.Discrete)
    if discrete:  # the episodes that the PPO scripts are evaluated on
        vec = envs.make_vec(flags.env, min(100, flags.episodes))
    obs, d = vec.reset(flags.seed), int(vec.action_space.n) if discrete else vec.action_space.shape[0]
    lowest = 0.0 if discrete else -1.0
    external = knowledge.load(flags.knowledge, flags.env, d, envs.example_of(vec, obs), lowest)

    def advise(obs: envs.Observation) -> torch.Tensor:
        goal_dim = obs["desired_goal"].shape[1] if vec.is_goal_env else 0
        read = envs.unflatten(envs.flatten(obs), goal_dim) if goal_dim else envs.to_tensors(obs)
        return knowledge.advise(external, read, d, lowest)

    def player(choose: Callable[[torch.Tensor], torch.Tensor]) -> envs.Act:
        if discrete:
            return lambda obs: draw(choose(advise(obs))).numpy()
        return lambda obs: vec.to_box(choose(advise(obs)).numpy())

    print(f"{envs.resolve(flags.env)}, {flags.episodes} episodes; +- is the standard error")
    rows = {}
    names = list(external)
    for who, choose in (discrete_contenders(names) if discrete else contenders(names, d)).items():
        torch.manual_seed(flags.seed)
        result = envs.evaluate(player(choose), vec, flags.episodes, 10_000 * flags.seed + 5_000)
        row = [flags.env, flags.knowledge, who, str(flags.episodes), *(f"{result[name]:.4g}" for name in COLUMNS[4:])]
        rows[tuple(row[:3])] = row
        p, root = result["success_rate"], flags.episodes ** 0.5
        solved = f"success {p:.3f} +- {(p * (1 - p)) ** 0.5 / root:.3f}, " if p == p else ""  # NaN: no goals
        print(f"{who:40} {solved}return {result['return_mean']:.2f} +- {result['return_std'] / root:.2f}, "
              f"length {result['length_mean']:.1f}", flush=True)
    if flags.csv:
        flags.csv.parent.mkdir(parents=True, exist_ok=True)
        half = flags.csv.with_name(flags.csv.name + ".tmp")  # the old rows stay until all is written
        with half.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [COLUMNS, *({tuple(row[:3]): row for row in old} | rows).values()])
        half.replace(flags.csv)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # of the environment, of the knowledge, of a flag
        print(f"rules: {error}", file=sys.stderr)
        sys.exit(2)
