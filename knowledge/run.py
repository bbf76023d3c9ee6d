"""A trained agent as an external policy: `run:RUN_DIR`, or its inner policy alone: `inner:RUN_DIR`.

A run folder of any algorithm has `policy.pt2`, what the trained agent does, its own knowledge included. A method that
learns a policy of its own beside its knowledge writes that one as `inner.pt2`; a method without such a thing writes
`policy.pt2` alone, and `inner:` means that. Both are played without the script that made them.
"""
import json
from pathlib import Path
from typing import Sequence

import torch

import pt2
from knowledge.registry import KnowledgeError, Obs, Policy, copy_of

FUSING = {"ppo_kian", "sac_handover", "sac_kian"}  # scripts that write inner.pt2


def file_of(kind: str, folder: Path) -> Path:
    """The file that `run:<folder>` or `inner:<folder>` stands for. It need not be there."""
    inner = folder / "inner.pt2"
    if kind == "inner" and (inner.is_file() or _config(folder).get("algo") in FUSING):
        return inner
    return folder / "policy.pt2"


def load(kind: str, folder: Path, action_dim: int, example: Obs, lowest: float) -> dict[str, Policy]:
    """The agent trained in `folder`, {run.<folder name>: policy}, or {inner.<folder name>: its inner policy}.

    `kind` is "run" or "inner". It returns actions (B, action_dim), or where `lowest` is 0 the probabilities of discrete
    actions as advice, softer than the ones of a rule. `example` are observations as it will meet them.
    Raises KnowledgeError if there is no such agent, or none that can act here.
    """
    file = file_of(kind, folder)
    if not folder.is_dir():
        raise KnowledgeError(f"run {folder} is not there; check the path, or put it back where it was")
    if not file.is_file():
        raise KnowledgeError(f"run {folder} has no {file.name}; {_remedy(folder)}")
    try:
        program = pt2.read(file)
    except (pt2.BadArchive, OSError) as error:
        raise KnowledgeError(f"{file} is damaged or no policy ({error}); name another run") from error

    def inputs(obs: Obs) -> list[torch.Tensor]:
        """The observations that the program takes, in its order. Raises KnowledgeError for others than the run's."""
        obs = obs if isinstance(obs, dict) else {"observation": obs}
        names = [name or "observation" for name in program.entries]
        if absent := [name for name in names if name not in obs]:
            raise KnowledgeError(f"run {folder} needs {', '.join(absent)}, not observed here; name another")
        for name, size, dtype in zip(names, program.sizes, program.dtypes):
            x = obs[name]
            if tuple(x.shape[1:]) != size or x.is_floating_point() != dtype.is_floating_point:
                raise KnowledgeError(f"run {folder} was trained{_where(folder)} on an {name} of "
                                     f"{_numbers(size, dtype)}, and here it has {_numbers(x.shape[1:], x.dtype)}; "
                                     "name another")
        return [obs[name].to(dtype) for name, dtype in zip(names, program.dtypes)]

    def act(obs: Obs) -> torch.Tensor:
        """Actions (B, d), or log-probabilities (B, A), in the type of the observations."""
        floats = [x for x in (obs.values() if isinstance(obs, dict) else [obs]) if x.is_floating_point()]
        return program(inputs(obs)).to(floats[0].dtype if floats else torch.float32)

    def advise(obs: Obs) -> torch.Tensor:
        """Probabilities (B, A)."""
        return act(obs).exp().clamp(max=1)  # where the agent is certain, 1 and a rounding error

    inputs(example)
    try:
        total = act(copy_of(example)).exp().sum(-1)
    except Exception as error:  # weights that do not fit the graph: any kind
        raise KnowledgeError(f"{file} is damaged ({type(error).__name__}); name another run") from error
    discrete = program.width > 1 and torch.allclose(total, torch.ones_like(total), atol=1e-3)  # log-probabilities
    if discrete != (lowest == 0) or program.width != action_dim:
        has, needs = ("discrete" if x else "continuous" for x in (discrete, lowest == 0))
        raise KnowledgeError(f"run {folder} was trained{_where(folder)} on {program.width} {has} actions, and here are "
                             f"{action_dim} {needs} ones; name another")
    return {f"{kind}.{folder.resolve().name}": advise if discrete else act}


def _remedy(folder: Path) -> str:
    """What to do about a folder that has no policy.pt2, or no inner.pt2 where there should be one."""
    if (folder / "policy.pt2").is_file():
        return f"its own policy was not exported; --resume tries again, run:{folder} is the whole agent"
    if (folder / "inner.pt2").is_file():
        return f"its knowledge could not be exported; inner:{folder} is its own policy alone"
    if (folder / "checkpoint.pt").is_file():
        return "it is not finished, or older than these files; go on with it by --resume"
    return "name the folder of a finished run"


def _where(folder: Path) -> str:
    """" in <environment>", as the run's config.json has it."""
    env_id = _config(folder).get("env_id")
    return f" in {env_id}" if env_id else ""


def _config(folder: Path) -> dict:
    """The run's config.json; empty where it has none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _numbers(size: Sequence[int], dtype: torch.dtype) -> str:
    return f"{' x '.join(map(str, size))} {str(dtype).removeprefix('torch.')} numbers"
