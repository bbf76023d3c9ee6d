"""Policies that a language model wrote, run in the sandbox: `llm:<name>`, `llm:<file>`.

A name stands for llm/policies/<name>.json, which `python -m llm.write_policies` makes; a file is one of those, or a
Python file with a function `policy(obs) -> action` of one observation: (n,) numbers, or a dict of them. Unlike other
Python files, whatever this one holds, it can only compute.
"""
import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import torch

from knowledge.registry import KnowledgeError, Obs, Policy
from llm.sandbox import Sandbox, SandboxError

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "llm" / "policies"
TASKS = ROOT / "llm" / "prompts" / "tasks"
MOST_FAILED = 0.05  # share of states in which code may fail before it counts as broken
FIRST = 1000  # states that are not held against it


class Generated:
    """One policy: a batch of observations in, actions in [lowest, 1] out, zeros where the code fails.

    lost: (B,) bool, where it failed in the last call."""

    def __init__(self, name: str, source: str, action_dim: int, lowest: float, widths: dict[str, int]):
        """widths: how many numbers of each part of an observation the code was told about, from the first on; what our
        environments append is cut off. Raises SandboxError where the code is refused, or does not load."""
        self.name, self.action_dim, self.lowest, self.widths, self.told = name, action_dim, lowest, widths, False
        self.lost = torch.zeros(0, dtype=torch.bool)
        self.box = Sandbox(source, ["policy"])

    def __call__(self, obs: Obs) -> torch.Tensor:
        """(B, n), or a dict of batches -> (B, d). Raises KnowledgeError where the code hangs, or fails too often."""
        if torch.compiler.is_exporting():
            raise KnowledgeError(f"{self.name} runs in a process of its own, which no file can hold")
        like = next((x for x in (obs.values() if isinstance(obs, dict) else [obs]) if x.is_floating_point()), None)
        if isinstance(obs, dict):
            given = {k: (x[:, :self.widths.get(k)] if x.dim() == 2 else x).cpu().numpy() for k, x in obs.items()}
        else:
            given = obs.cpu().numpy()
        try:
            action = self.box.call("policy", given, shape=(self.action_dim,))
        except SandboxError as error:
            raise KnowledgeError(f"knowledge {self.name}: {error}") from None
        if self.box.error:
            self._tell()
        self.lost = torch.from_numpy(np.isnan(action).any(1))
        action = np.nan_to_num(action).clip(self.lowest, 1)
        return torch.as_tensor(action).to(torch.zeros(0) if like is None else like)

    def _tell(self) -> None:
        """Say once that the code failed. Raises KnowledgeError where it did nothing else, or does so too often."""
        box = self.box
        if box.failed == box.rows:
            raise KnowledgeError(f"knowledge {self.name} fails in every state: {box.error}; correct it, or leave it "
                                 "out")
        if not self.told:
            print(f"note: knowledge {self.name} fails in some states: {box.error}", file=sys.stderr)
            self.told = True
        if box.rows > FIRST and box.failed > MOST_FAILED * box.rows:
            raise KnowledgeError(f"knowledge {self.name} fails in {box.failed} of {box.rows} states, at last with "
                                 f"{box.error}; correct it, or leave it out")


def file_of(name: str) -> Path:
    """The file behind `llm:<name>`."""
    path = Path(name)
    return path if path.suffix in (".json", ".py") else SHIPPED / f"{name}.json"


def shipped_for(env_id: str) -> str:
    """The name of the shipped policies that were written for `env_id`; empty where there are none. Files of other
    models stand beside these, named <task>-<model>, and are used by name alone."""
    for path in sorted(SHIPPED.glob("*.json")):
        try:
            kept = json.loads(path.read_text())
            if kept["task"] == path.stem and env_id.startswith(tuple(kept["envs"])):
                return path.stem
        except (ValueError, TypeError, KeyError):
            continue
    return ""


def load(name: str, file: Path, env_id: str, action_dim: int, lowest: float) -> dict[str, Policy]:
    """The policies in `file`, {<stem>.<number or function>: policy}, for `llm:<name>`. Raises KnowledgeError, one line,
    for what is no such file, was written for another environment, or cannot be run."""
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.json")))
        raise KnowledgeError(f"knowledge llm:{name}: there is no file {file}; known are {known}, or write one: python "
                             f"-m llm.write_policies --env {env_id}")
    stem, codes, widths = file_of(name).stem, {}, {}
    if file.suffix == ".py":
        codes[f"{stem}.policy"] = file.read_text(errors="replace")
    else:
        task, found = _codes(name, file, env_id)
        codes, widths = {f"{stem}.{number}": code for number, code in found.items()}, described(task)
    try:
        return {name: Generated(name, code, action_dim, lowest, widths) for name, code in codes.items()}
    except SandboxError as error:
        raise KnowledgeError(f"knowledge llm:{name}: {error}") from None


def described(task: str) -> dict[str, int]:
    """How many numbers of each part of an observation the description of a task names; empty where it has none."""
    file = TASKS / f"{Path(task).name}.toml"
    parts = tomllib.loads(file.read_text())["observation"] if file.is_file() else {}
    return {name: len(part["rows"]) for name, part in parts.items()}


def _codes(name: str, file: Path, env_id: str) -> tuple[str, dict[int, str]]:
    """The task that a file of write_policies is for, and the code of the policies that it marks as used."""
    try:
        kept = json.loads(file.read_text())
        task = str(kept["task"])
        codes = {entry["sample"]: str(entry["code"]) for entry in kept["policies"] if entry["used"]}
        fits = env_id.startswith(tuple(kept["envs"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise KnowledgeError(f"knowledge llm:{name}: {file} is not a file of llm.write_policies; name one, or a .py "
                             "file with a function policy(obs)") from None
    if not fits:
        raise KnowledgeError(f"knowledge llm:{name} was written for {' and '.join(kept['envs'])}..., not for {env_id}; "
                             f"write another: python -m llm.write_policies --env {env_id}")
    if not codes:
        raise KnowledgeError(f"knowledge llm:{name}: {file} marks no policy as used")
    return task, codes
