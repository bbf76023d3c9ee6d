"""State features with an intrinsic reward, as a language model writes them (LESR): `--features` of algos/lesr.py.

A pair has two functions. `revise_state(s)` takes states (B, n) and returns (B, n + m): the states, unchanged, then m
features. `intrinsic_reward(x)` takes what the first one returned and gives a number per row, (B,).

On tasks with goals a state is the achieved goal, the desired goal, the observation, and what is left of the episode, 1
to 0. The pairs that ship are in knowledge/pairs.py.

A run keeps a copy of the file that its pair is in, and goes on with that copy.
"""
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable, NamedTuple

import numpy as np
import torch

from knowledge import check_kept, keep_files, kept_file
from knowledge.pairs import PAIRS, Pair
from knowledge.registry import KnowledgeError
from llm.lesr import FUNCTIONS, objection, trial_states
from llm.sandbox import Sandbox, SandboxError


class Features(NamedTuple):
    """A pair of functions of batches."""
    revise: Callable[[torch.Tensor], torch.Tensor]  # (B, n) -> (B, n + m)
    reward: Callable[[torch.Tensor], torch.Tensor]  # (B, n + m) -> (B,)


def load_features(spec: str, env_id: str, example: torch.Tensor, kept_in: str = "") -> Features:
    """The pair that `spec` names: `none` (states as they are, reward 0), `auto` (the one that ships for the task),
    `mine.py` with torch functions of batches, or `llm:mine.py` with functions of single states, run in the sandbox.

    `example` (B, n): states to try it on. `kept_in`: folder of a run that is resumed or evaluated, whose copy of the
    file is used; a line on stderr says where the file differs. Of a new run it says which pair it has. Raises
    KnowledgeError, one line, for what cannot be used.
    """
    if spec == "none":
        return Features(lambda s: s, lambda x: torch.zeros(x.shape[0]))
    if spec == "auto":
        features = _shipped(env_id, example.shape[1])
    else:
        path = Path(spec.removeprefix("llm:"))
        if kept_in:
            check_kept(spec, Path(kept_in))
        file = kept_file(spec, kept_in) or path
        features = _generated(path, file) if spec.startswith("llm:") else _from_file(path, file)
    _try(features, spec, example)
    if not kept_in:
        print(f"features: {spec}, {features.revise(example).shape[1] - example.shape[1]} beside {example.shape[1]} "
              "observed", file=sys.stderr)
    return features


def keep_features(spec: str, folder: Path) -> None:
    """Copy the file that `spec` names into the run folder, unless it is there already."""
    if spec not in ("none", "auto"):
        keep_files(spec, folder)


def _shipped(env_id: str, n: int) -> Features:
    for beginning, pair in PAIRS.items():
        if env_id.startswith(beginning):
            width = pair.n + (pair.goal + 1 if pair.goal else 0)  # the achieved goal, and what is left of the episode
            if n != width:
                raise KnowledgeError(f"features of {env_id} are made for {width} numbers, and it observes {n}; use the "
                                     "-v4 of it")
            return _of_whole_states(pair, n)
    known = ", ".join(beginning.removesuffix("-v") for beginning in PAIRS)
    raise KnowledgeError(f"no features ship for {env_id}; known are {known}; --features takes a file of yours, or none")


def _of_whole_states(pair: Pair, n: int) -> Features:
    """The pair as functions of n numbers, of which it reads those that it is written for."""
    def its_state(s: torch.Tensor) -> torch.Tensor:
        """(B, n) -> (B, pair.n): on tasks with goals the observation, then the desired goal."""
        return torch.cat([s[:, 2 * pair.goal:-1], s[:, pair.goal:2 * pair.goal]], 1) if pair.goal else s

    return Features(lambda s: torch.cat([s, pair.extras(its_state(s))], 1),
                    lambda x: pair.reward(torch.cat([its_state(x[:, :n]), x[:, n:]], 1)))


def _from_file(path: Path, file: Path) -> Features:
    """Of `file`, which is `path` or a copy of it."""
    if path.suffix != ".py" or not file.is_file():
        raise KnowledgeError(f"features {path}: there is no such Python file; --features takes auto, none, a .py file, "
                             "or llm: and one")
    module = ModuleType(f"knowledge.file.{path.stem}")
    module.__file__ = str(path.absolute())  # of the copy, too: a file may read what lies beside it
    sys.modules[module.__name__] = module
    try:
        exec(compile(file.read_bytes(), file, "exec"), vars(module))
        return Features(module.revise_state, module.intrinsic_reward)
    except AttributeError as error:
        raise KnowledgeError(f"features {path}: it has to define revise_state and intrinsic_reward") from error
    except (Exception, SystemExit) as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise KnowledgeError(f"features {path} fail to import: {line}; correct it") from error


def _generated(path: Path, file: Path) -> Features:
    """Of `file`, which is `path` or a copy of it."""
    if not file.is_file() or path.suffix not in (".py", ".json"):  # a run keeps no others
        trouble = "it does not end in .py" if file.is_file() else "there is no such file"
        raise KnowledgeError(f"features llm:{path}: {trouble}; --features llm: takes a .py file")
    try:
        box = Sandbox(file.read_text(errors="replace"), FUNCTIONS)
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
    """Raise KnowledgeError unless a pair works on states of the environment, on random ones and on zeros."""
    states = torch.cat([example, torch.from_numpy(trial_states(example.shape[1])).float()])
    try:
        given = states.clone()
        x, x_again = features.revise(given), features.revise(states.clone())
        given_x = x.clone()
        reward, reward_again = features.reward(given_x), features.reward(x.clone())
        in_place = not (torch.equal(given, states) and torch.equal(given_x.nan_to_num(), x.nan_to_num()))
        made = [made.detach().numpy() for made in (x, x_again, reward, reward_again)]
    except KnowledgeError:
        raise
    except Exception as error:  # a user's code raises anything
        raise KnowledgeError(f"features {spec} fail: {type(error).__name__}: {str(error).splitlines()[0]}; correct "
                             "them") from error
    if in_place:
        wrong = "they change what they are given; work on copies"
    elif x.dtype != states.dtype:
        wrong = f"revise_state returns {x.dtype}, and states are {states.dtype}"
    else:
        wrong = objection(states.numpy(), *made)
    if wrong:
        raise KnowledgeError(f"features {spec}: {wrong}; correct them")
