"""State features with an intrinsic reward, as a language model writes them (LESR): `--features` of algos/lesr.py.

A pair has two functions. `revise_state(s)` takes states (B, n) and returns (B, n + m): the states, unchanged, then m
features. `intrinsic_reward(x)` takes what the first one returned and gives a number per row, (B,).

The pairs that ship are the best ones that Wang et al. found (LESR, ICML 2024, arXiv 2407.13237), written from their
formulas. Their names of features are not always right: what is called energy in HalfCheetah is squared joint angles.
"""
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable, NamedTuple

import numpy as np
import torch

from knowledge.registry import KnowledgeError
from llm.sandbox import Sandbox, SandboxError

LARGEST_REWARD = 100.0  # of the states that a pair is tried on, as in the paper


class Features(NamedTuple):
    """A pair of functions of batches."""
    revise: Callable[[torch.Tensor], torch.Tensor]  # (B, n) -> (B, n + m)
    reward: Callable[[torch.Tensor], torch.Tensor]  # (B, n + m) -> (B,)


def _population_std(x: torch.Tensor) -> torch.Tensor:
    return x.var(1, correction=0).sqrt()


def half_cheetah(s: torch.Tensor) -> torch.Tensor:
    angle = s[:, 1:7].mean(1)
    return torch.stack([s[:, 8], angle, s[:, 1:7].var(1, correction=0), s[:, 4:8].square().sum(1),
                        s[:, 8] * angle.cos()], 1)


def hopper(s: torch.Tensor) -> torch.Tensor:
    speed = (s[:, 5].square() + s[:, 6].square()).sqrt()
    return torch.stack([s[:, 2] - s[:, 1], s[:, 3] - s[:, 2], s[:, 4] - s[:, 3], speed, s[:, 1].abs(),
                        s[:, 7:11].abs().sum(1), s[:, 5]], 1)


def walker(s: torch.Tensor) -> torch.Tensor:
    energy = 0.5 * s[:, 8:17].square().sum(1)
    first = torch.stack([s[:, 8], s[:, 1].cos(), energy, s[:, 0], s[:, 8] / (energy + 1e-6)], 1)
    return torch.cat([first, s[:, 3:8] - s[:, 2:7]], 1)


def ant(s: torch.Tensor) -> torch.Tensor:
    return torch.stack([s[:, 13], s[:, 0], s[:, 1:5].var(1, correction=0), _population_std(s[:, 19:27]),
                        s[:, 5:13].square().sum(1), s[:, 5:13].amin(1)], 1)


def swimmer(s: torch.Tensor) -> torch.Tensor:
    first = torch.stack([s[:, 3].square(), s[:, 5:8].square().sum(1)], 1)
    return torch.cat([first, s[:, 0:3].cos(), s[:, 0:3].sin(), s[:, 2:3] - s[:, 1:2]], 1)


def _weighted(n: int, weights: dict[int, float], positive: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    """The reward sum_i weights[i] e_i of the features e_0, e_1, ... that follow n numbers; `positive`: at least 0."""
    def reward(x: torch.Tensor) -> torch.Tensor:
        total = sum(weight * x[:, n + i] for i, weight in weights.items())
        return total.clamp(min=0) if positive else total
    return reward


# {beginning of the environment id: (numbers in a state, its features, the intrinsic reward)}
PAIRS = {
    "HalfCheetah-v": (17, half_cheetah, _weighted(17, {0: 1, 2: -0.01, 3: -0.001, 4: 0.5})),
    "Hopper-v": (11, hopper, _weighted(11, {3: 1, 6: 2, 4: -1, 5: -0.1})),
    "Walker2d-v": (17, walker, _weighted(17, {0: 1, 4: 1, 1: 1, 2: -0.01})),
    "Ant-v": (27, ant, _weighted(27, {0: 2, 1: 0.1, 2: -0.5, 3: -0.1, 4: -0.01, 5: 0.5})),
    "Swimmer-v": (8, swimmer, _weighted(8, {0: 1, 1: -0.01}, positive=True)),
}


def load_features(spec: str, env_id: str, example: torch.Tensor) -> Features:
    """The pair that `spec` names: `none` (states as they are, reward 0), `auto` (the one that ships for the task),
    `mine.py` with torch functions of batches, or `llm:mine.py` with functions of single states, run in the sandbox.

    `example` (B, n): states to try it on. Raises KnowledgeError, one line, for what cannot be used.
    """
    if spec == "none":
        return Features(lambda s: s, lambda x: torch.zeros(x.shape[0]))
    if spec == "auto":
        features = _shipped(env_id, example.shape[1])
    elif spec.startswith("llm:"):
        features = _generated(Path(spec.removeprefix("llm:")))
    else:
        features = _from_file(Path(spec))
    _try(features, spec, example)
    return features


def _shipped(env_id: str, n: int) -> Features:
    for beginning, (width, extras, reward) in PAIRS.items():
        if env_id.startswith(beginning):
            if n != width:
                raise KnowledgeError(f"features of {env_id} are made for {width} numbers, and it observes {n}; use the "
                                     "-v4 of it")
            return Features(lambda s: torch.cat([s, extras(s)], 1), reward)
    known = ", ".join(beginning.removesuffix("-v") for beginning in PAIRS)
    raise KnowledgeError(f"no features ship for {env_id}; known are {known}; --features takes a file of yours, or none")


def _from_file(path: Path) -> Features:
    if path.suffix != ".py" or not path.is_file():
        raise KnowledgeError(f"features {path}: there is no such Python file; --features takes auto, none, a .py file, "
                             "or llm: and one")
    module = ModuleType(f"knowledge.file.{path.stem}")
    module.__file__ = str(path.absolute())
    sys.modules[module.__name__] = module
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
        return Features(module.revise_state, module.intrinsic_reward)
    except AttributeError as error:
        raise KnowledgeError(f"features {path}: it has to define revise_state and intrinsic_reward") from error
    except (Exception, SystemExit) as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise KnowledgeError(f"features {path} fail to import: {line}; correct it") from error


def _generated(path: Path) -> Features:
    if not path.is_file():
        raise KnowledgeError(f"features llm:{path}: there is no such file; check the path")
    try:
        box = Sandbox(path.read_text(errors="replace"), ["revise_state", "intrinsic_reward"])
    except SandboxError as error:
        raise KnowledgeError(f"features llm:{path}: {error}") from None

    def call(name: str, x: torch.Tensor, shape: tuple | None) -> torch.Tensor:
        if torch.compiler.is_exporting():
            raise KnowledgeError(f"llm:{path} runs in a process of its own, which no file can hold")
        try:
            found = box.call(name, x.cpu().numpy(), shape=shape)
        except SandboxError as error:
            raise KnowledgeError(f"features llm:{path}: {error}") from None
        if not np.isfinite(found).all():
            raise KnowledgeError(f"features llm:{path} fail in {name}: {box.error}; correct it")
        return torch.as_tensor(found).to(x)
    return Features(lambda s: call("revise_state", s, None), lambda x: call("intrinsic_reward", x, ()))


def _try(features: Features, spec: str, example: torch.Tensor) -> None:
    """Raise KnowledgeError unless a pair works on states of the environment, on random ones and on zeros, twice the
    same: a pair with a memory would depend on the order in which it is asked."""
    n = example.shape[1]
    states = torch.cat([example, torch.randn(254, n, generator=torch.Generator().manual_seed(0)), torch.zeros(2, n)])
    try:
        x, again = features.revise(states.clone()), features.revise(states.clone())
        reward = features.reward(x.clone())
    except KnowledgeError:
        raise
    except Exception as error:  # a user's code raises anything
        raise KnowledgeError(f"features {spec} fail: {type(error).__name__}: {str(error).splitlines()[0]}; correct "
                             "them") from error
    for what, wrong in (
            ("revise_state has to return (B, n + m)", x.dim() != 2 or len(x) != len(states) or x.shape[1] < n),
            ("intrinsic_reward has to return (B,)", tuple(reward.shape) != (len(states),)),
            ("revise_state has to begin with the state, unchanged", x.dim() == 2 and not torch.equal(x[:, :n], states)),
            ("they are not finite for random states or zeros", not (x.isfinite().all() and reward.isfinite().all())),
            ("revise_state has a memory: twice the same states gave different features", not torch.equal(x, again)),
            (f"the reward is beyond +-{LARGEST_REWARD:g}", bool((reward.abs() > LARGEST_REWARD).any()))):
        if wrong:
            raise KnowledgeError(f"features {spec}: {what}; correct them")
