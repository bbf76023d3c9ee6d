"""Make an offline dataset from our own runs, for algos/br_rcrl.py.

    python benchmarks/offline.py --env Hopper-v4 --out runs/offline/Hopper-v4-medium.npz --policies run:RUN@0.1
    python benchmarks/offline.py --env Hopper-v4 --out runs/offline/Hopper-v4-replay.npz --policies replay:RUN
    python benchmarks/offline.py --env Hopper-v4 --out runs/offline/Hopper-v4-mixed.npz --policies run:HALF run:BEST

A policy is `random`, `run:RUN` (what a run left as policy.pt2) or any other --knowledge that is one policy, or
`replay:RUN`, the replay buffer of an off-policy run. `@0.1` adds Gaussian noise of this deviation to actions in
[-1, 1], clipped; to discrete ones it is the share of uniform actions. Each policy plays --steps / (number of policies)
steps or a little more, in whole episodes. ref_min is the mean return of `random`, ref_max that of the last policy
without noise (--expert: of another one), over 20 episodes each.
"""
import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gymnasium as gym
import numpy as np
import torch

import envs
import knowledge
from envs import offline

COPIES, REFERENCE_EPISODES = 10, 20


def policy_of(name: str, env_id: str, vec: envs.VectorEnv, generator: torch.Generator) -> Callable:
    """What `name` plays: observations of `vec` -> actions that it takes. Raises ValueError, one line."""
    spec, _, text = name.partition("@")
    try:
        noise = float(text or 0)
    except ValueError as error:
        raise ValueError(f"{name}: what follows @ is the noise, a number") from error
    discrete = not isinstance(vec.action_space, gym.spaces.Box)
    d = int(vec.action_space.n) if discrete else vec.action_space.shape[0]
    if spec == "random":
        known = None
    else:
        example = envs.example_of(vec, vec.reset(0))
        policies = knowledge.load(spec, env_id, d, example, lowest=0.0 if discrete else -1.0)
        if len(policies) != 1:
            raise ValueError(f"{name} is {len(policies)} policies; name one")
        known, = policies.values()

    def act(obs: envs.Observation) -> np.ndarray:
        rows = vec.num_envs
        if discrete:
            uniform = torch.randint(d, (rows,), generator=generator)
            if known is None:
                return uniform.numpy()
            chosen = known(envs.to_tensors(obs)).argmax(1)
            return torch.where(torch.rand(rows, generator=generator) < noise, uniform, chosen).numpy()
        if known is None:
            return vec.to_box(2 * torch.rand(rows, d, generator=generator).numpy() - 1)
        action = known(envs.to_tensors(obs)) + noise * torch.randn(rows, d, generator=generator)
        return vec.to_box(action.clamp(-1, 1).numpy())
    return act


def replay_of(folder: Path, vec: envs.VectorEnv) -> offline.Dataset:
    """What is in the replay buffer of a run. Raises ValueError, one line, where there is none."""
    try:
        args = json.loads((folder / "config.json").read_text())["args"]
        buffer = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["buffer"]
    except Exception as error:  # a foreign or cut file raises anything
        raise ValueError(f"replay:{folder} has no replay buffer ({type(error).__name__}); name an off-policy run that "
                         "has saved a checkpoint") from error
    f, d, _ = envs.continuous_sizes(vec)
    if buffer["rows"].shape[1] != 2 * f + d + 2:
        raise ValueError(f"replay:{folder} was filled in {args['env']}, which has other observations than "
                         f"{vec.env.spec.id}")
    return offline.from_replay(buffer, args["num_envs"], f, d, vec)


def gather(name: str, env_id: str, steps: int, seed: int) -> offline.Dataset:
    """At least `steps` steps of a policy, in whole episodes; all there is of a replay buffer."""
    vec = envs.make_vec(env_id, COPIES, threads=torch.get_num_threads())
    if name.startswith("replay:"):
        return replay_of(Path(name.removeprefix("replay:")), vec)
    act = policy_of(name, env_id, vec, torch.Generator().manual_seed(seed))
    parts, found = [], 0
    while found < steps:
        parts.append(offline.collect(act, vec, COPIES, 10_000 * seed + 100 * len(parts)))
        found += len(parts[-1].rew)
    return offline.join(parts, {})


def reference(name: str, env_id: str, seed: int) -> float:
    """Mean return of a policy."""
    vec = envs.make_vec(env_id, COPIES, threads=torch.get_num_threads())
    act = policy_of(name, env_id, vec, torch.Generator().manual_seed(seed))
    return float(offline.collect(act, vec, REFERENCE_EPISODES, 10_000 * seed + 9_000).returns.mean())


def digest(name: str) -> str:
    """What the file of a policy was, in a few letters; empty where there is none."""
    kind, _, folder = name.partition("@")[0].partition(":")
    file = Path(folder) / {"run": "policy.pt2", "replay": "checkpoint.pt"}.get(kind, "")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("--out", required=True, type=Path, help="the .npz file to write; one that is there is replaced")
    parser.add_argument("--policies", required=True, nargs="+", help="see the top of this file")
    parser.add_argument("--steps", type=int, default=200_000, help="of all policies together")
    parser.add_argument("--expert", default="", help="policy whose mean return counts as 100 (default: the last one)")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    if flags.out.suffix != ".npz" or flags.steps < 1 or not 0 <= flags.seed < 2 ** 31:
        raise ValueError("--out ends with .npz, --steps is 1 or more, --seed 0 or more")
    above = next(folder for folder in flags.out.resolve().parents if folder.exists())
    if flags.out.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):  # before all is collected
        cause = flags.out if flags.out.is_dir() else above
        raise ValueError(f"--out {flags.out} cannot be written, because of {cause}; name a file in a folder that you may "
                         "write to")
    share = -(-flags.steps // len(flags.policies))
    with torch.no_grad():
        parts = [gather(name, flags.env, share, 1000 * flags.seed + i) for i, name in enumerate(flags.policies)]
        expert = (flags.expert or flags.policies[-1]).partition("@")[0].replace("replay:", "run:")
        low, high = (reference(name, flags.env, 1000 * flags.seed + 500) for name in ("random", expert))
    meta = {"env": envs.resolve(flags.env), "policies": flags.policies, "seed": flags.seed, "expert": expert,
            "digests": [digest(name) for name in flags.policies],
            "versions": {name: version(name) for name in ("gymnasium", "mujoco", "numpy", "torch")}}
    if low < high:
        meta |= {"ref_min": low, "ref_max": high}
        scores = f"{low:.1f} counts as 0, {high:.1f} as 100"
    else:
        scores = f"no normalized scores: {expert} returns {high:.1f}, random {low:.1f}; --expert names a better one"
    data = offline.join(parts, meta)
    offline.save(flags.out, data)
    print(f"{flags.out}: {len(data.rew)} steps, {len(data.starts) - 1} episodes, returns {data.returns.min():.1f} to "
          f"{data.returns.max():.1f}, mean {data.returns.mean():.1f}; {scores}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"offline: {error}", file=sys.stderr)
        sys.exit(2)
