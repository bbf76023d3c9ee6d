"""External policies: named functions of a batch of observations.

An external policy takes observations, a tensor (B, n) or a dict of tensors. For continuous actions it returns (B, d) in
[-1, 1]. For discrete actions it returns advice (B, A): ones at the actions that it is for, zeros where it has nothing
to say. Tasks with goals give a dict of `observation` (B, n), `achieved_goal` and `desired_goal` (B, 3). `observation`
may end with a time feature, so policies index it from the front. Grid tasks give `image` (B, 7, 7, 3) uint8 and
`direction` (B,).

A run exports its agent together with its external policies if these consist of tensor operations alone: torch.where in
place of `if`, x.shape[0] in place of len(x).
"""

import difflib
import hashlib
import inspect
import json
import sys
import traceback
from pathlib import Path
from types import ModuleType

import torch

from env_id import split_id
from knowledge import fetch, franka, generated, minigrid, qualities, run  # noqa: F401  (a family registers its rules)
from knowledge.keys import NAMES, names_of, take_over
from knowledge.registry import KnowledgeError, Obs, Policy, copy_of, group, groups_for, rule, rules_for

Source = tuple[Path, bytes, Path]  # a file, what a run keeps of it, and where

__all__ = ["KnowledgeError", "Obs", "Policy", "advise", "group", "groups_for", "keep", "load", "rule", "rules_for",
           "take_over"]


def advise(policies: dict[str, Policy], obs: Obs, action_dim: int, lowest: float = -1.0, failed: float = 0.0
           ) -> torch.Tensor:
    """What each of n policies would do, (B, n, action_dim). It depends on the goal: ask again after relabelling. Where
    generated code fails, its action is `failed`.

    Raises KnowledgeError unless every policy returns such a batch of numbers in [lowest, 1]. `load` checks the same at
    the start, but a policy may fail in states that come later.
    """
    if not policies:
        batch = next(iter(obs.values())) if isinstance(obs, dict) else obs
        return torch.zeros(batch.shape[0], 0, action_dim, device=batch.device, dtype=_action_dtype(obs))
    asked = torch.stack([_ask(policy, f"knowledge {name}", action_dim, obs, lowest)
                         for name, policy in policies.items()], 1)
    for i, policy in enumerate(policies.values()):
        if isinstance(policy, generated.Generated) and failed:
            asked[policy.lost, i] = failed
    return asked


def keep(spec: str, names: list[str], folder: Path) -> None:
    """Write into the run folder what `spec` stands for, unless it is there already: the names of the policies, copies
    of Python files, and the hashes of other runs' policies."""
    if not (folder / NAMES).exists():
        (folder / NAMES).write_text(json.dumps({"policies": names}))
    keep_files(spec, folder)


def keep_files(spec: str, folder: Path) -> None:
    """Copy the files behind `spec` into the run folder, unless they are there already."""
    keep_sources(_sources(spec, folder))


def keep_sources(sources: list[Source]) -> None:
    """Write what is kept of these files, unless it is there already."""
    for _, content, kept in sources:
        if not kept.exists():
            kept.write_bytes(content)


def source_of(path: Path, folder: Path) -> Source:
    """A file that the run in `folder` keeps whole. One that ships is called by its place in the repository."""
    shown = path.relative_to(generated.ROOT) if path.is_relative_to(generated.ROOT) else path
    return path, path.read_bytes() if path.is_file() else b"", folder / flat_name(str(shown))


def _sources(spec: str, folder: Path) -> list[Source]:
    """Every file behind `spec`, as the run in `folder` keeps it: that of another run by its hash alone."""
    sources = []
    for kind, _, name in (_meant(item.strip(), _trained_in(folder)).partition(":") for item in spec.split(",")):
        path = run.file_of(kind, Path(name)) if kind in ("run", "inner") else Path(kind)
        kept = folder / flat_name(str(path))
        if kind == "llm":
            sources.append(source_of(generated.file_of(name), folder))
        elif path.suffix in (".py", ".json"):
            sources.append((path, path.read_bytes() if path.is_file() else b"", kept))
        elif path.suffix == ".pt2" and path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest().encode()
            sources.append((path, digest, kept.with_suffix(".sha256")))
    return sources


def flat_name(path: str) -> str:
    """A file name for the copy of `path`. Where two paths could share it, a/b.py and a-b.py, or where it would be too
    long for a file system, a digest of the path is in it."""
    name = path.replace("..", "up").strip("./").replace("/", "-")
    if len(name) > 150 or "-" in path or ".." in path:
        return f"{hashlib.sha256(path.encode()).hexdigest()[:8]}-{name[-100:]}"
    return name


def _meant(item: str, env_id: str) -> str:
    """`item`; for `auto`, where the environment has no default rules, the generated policies that ship for it."""
    if item != "auto" or "auto" in groups_for(env_id) or not generated.shipped_for(env_id):
        return item
    return f"llm:{generated.shipped_for(env_id)}"


def kept_file(item: str, kept_in: str | Path | None) -> Path | None:
    """The copy of the file behind `item` that the run in `kept_in` has, if it has one."""
    copies = [kept for _, _, kept in _sources(item, Path(kept_in)) if kept.is_file()] if kept_in else []
    return copies[0] if copies else None


def check_kept(spec: str, folder: Path) -> None:
    """Compare the files behind `spec` with what the run in `folder` kept. A run goes on with its own copies of Python
    files; a line on stderr says where these differ. Raises KnowledgeError if the policy of another run has changed."""
    check_sources(_sources(spec, folder), folder)


def check_sources(sources: list[Source], folder: Path) -> None:
    """As `check_kept`, for these files."""
    for path, content, kept in dict.fromkeys(sources):
        if kept.exists() and content and kept.read_bytes() != content:
            if kept.suffix == ".sha256":
                raise KnowledgeError(f"knowledge {path} has changed since the run began; delete {kept} to go on with "
                                     "the new one")
            print(f"note: {path} is not what run {folder} began with; its copy {kept} is used", file=sys.stderr)


def load(spec: str, env_id: str, action_dim: int, example: Obs, lowest: float = -1.0, kept_in: str | None = None
         ) -> dict[str, Policy]:
    """The policies that `spec` names, {name: policy}, in the order given.

    `spec` is `none`, `auto` (the default rules of the environment, or else the generated policies that ship for it) or
    a comma-separated list of rules (`fetch.reach_object`), groups of rules (`fetch.official`), Python files (`mine.py`
    for every public function defined there, `mine.py:push` for one), trained agents (`run:<RUN_DIR>`) and their inner
    policies alone (`inner:<RUN_DIR>`), and policies that a language model wrote (`llm:hopper`, `llm:<file>`).
    Each policy is called once, on `example`: a batch of two or more observations like those of the run. It must return
    numbers in [lowest, 1], where `lowest` is -1 for actions and 0 for advice. `kept_in` is the folder of a run that is
    resumed or evaluated. Then Python files are taken from the copies there, other runs must not have changed, and the
    policies are those of the environment that the run was trained in, also where it is evaluated in another one.

    Raises KnowledgeError, whose message is one line, for anything that cannot be used.
    """
    if kept_in:
        check_kept(spec, Path(kept_in))
        _check_stems(spec, Path(kept_in))
        env_id = _trained_in(Path(kept_in)) or env_id
    policies = _load(spec, split_id(env_id)[1], action_dim, example, lowest, kept_in)
    if kept_in:
        _check_names(policies, Path(kept_in))
    elif policies:
        print(f"knowledge: {', '.join(policies)}", file=sys.stderr)
    return policies


def _trained_in(folder: Path) -> str:
    """The environment id of a run; empty where its config.json does not say."""
    try:
        return split_id(json.loads((folder / "config.json").read_text())["args"]["env"])[1]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _check_stems(spec: str, folder: Path) -> None:
    """Raise KnowledgeError, before any file is run, unless each gave policies to the run in `folder`."""
    before = names_of(folder)
    for path in (item.strip().partition(":")[0] for item in spec.split(",")):
        if path.endswith(".py") and not any(name.startswith(f"{Path(path).stem}.") for name in before):
            raise KnowledgeError(f"run {folder} was trained with {', '.join(before[1:]) or 'nothing'}, and nothing of "
                                 f"that is from {path}; restore what it had, or start a new run")


def _check_names(policies: dict[str, Policy], folder: Path) -> None:
    """Raise KnowledgeError unless these are the policies of the run in `folder`, in the same order: its checkpoint
    holds what it learned about them by position."""
    before = names_of(folder)
    if before != ["inner", *policies]:
        raise KnowledgeError(f"run {folder} was trained with {', '.join(before[1:]) or 'nothing'}, and this gives "
                             f"{', '.join(policies) or 'nothing'}; restore what it had, or start a new run")


def _load(spec: str, env_id: str, action_dim: int, example: Obs, lowest: float, kept_in: str | None
          ) -> dict[str, Policy]:
    """As `load`, without the checks of what is kept."""
    policies: dict[str, Policy] = {}
    for item in (_meant(item.strip(), env_id) for item in spec.split(",") if item.strip() != "none"):
        if item.startswith("llm:"):
            name = item.removeprefix("llm:")
            file = kept_file(item, kept_in) or generated.file_of(name)
            found = generated.load(name, file, env_id, action_dim, lowest)
        elif item.startswith(("run:", "inner:")):
            kind, _, folder = item.partition(":")
            found = run.load(kind, Path(folder), action_dim, example, lowest)
        elif item.partition(":")[0].endswith(".py"):
            found = _load_file(item, kept_in)
        else:
            found = _load_rules(item, env_id)
        for name, policy in found.items():
            if name in policies:
                raise KnowledgeError(f"knowledge {name} comes twice in '{spec}'; name each policy once, no two files "
                                     "alike")
            _ask(policy, f"knowledge {name} (from '{item}')", action_dim, example, lowest)
            policies[name] = policy
    return policies


def _load_rules(item: str, env_id: str) -> dict[str, Policy]:
    """One rule, or the rules of one group."""
    rules, groups = rules_for(env_id), groups_for(env_id)
    if item in groups:
        return {name: rules[name] for name in groups[item]}
    if item in rules:
        return {item: rules[item]}
    known = ", ".join([*groups, *rules])
    if item == "auto":  # which nobody has to type
        remedy = f"some of {known}" if known else "a Python file of yours, run:<RUN_DIR>, or none"
        raise KnowledgeError(f"no default rules ship for {env_id}; --knowledge takes {remedy}")
    if not rules:
        remedy = "no rules ship for it; --knowledge takes a Python file of yours, run:<RUN_DIR>, or none"
    elif close := difflib.get_close_matches(item, [*groups, *rules], n=1):
        remedy = f"did you mean {close[0]}?"
    else:
        remedy = f"known are {known}; of a file of yours, name mine.py or mine.py:function"
    raise KnowledgeError(f"knowledge '{item}' is unknown for {env_id}: {remedy}")


def _load_file(item: str, kept_in: str | None) -> dict[str, Policy]:
    """The public functions of a user's file, {<file stem>.<function>: policy}. If the run in `kept_in` has a copy of
    the file, they come from there."""
    path, _, wanted = item.partition(":")
    source = kept_file(path, kept_in) or Path(path)
    if not source.is_file():
        raise KnowledgeError(f"knowledge file {path} does not exist; check the path")
    stem, module = Path(path).stem, run_file(source, Path(path))
    found = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    if not found:
        raise KnowledgeError(f"knowledge file {path} defines no public function; add one, around a model too")
    if wanted and wanted not in found:
        raise KnowledgeError(f"knowledge file {path} defines no public function '{wanted}'; it has {', '.join(found)}")
    return {f"{stem}.{name}": value for name, value in found.items() if wanted in ("", name)}


def run_file(source: Path, path: Path) -> ModuleType:
    """The module that a Python file `source` makes: `path`, or the copy of it that a run has. Raises KnowledgeError."""
    module = ModuleType(f"knowledge.file.{path.stem}")
    module.__file__ = str(path.absolute())  # of the copy, too: a file may read what lies beside it
    sys.modules[module.__name__] = module  # dataclasses look their module up; the prefix keeps `torch.py` harmless
    try:
        exec(compile(source.read_bytes(), source, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise KnowledgeError(f"knowledge file {source} fails to import: {_one_line(error)}; correct it") from error
    return module


def _ask(policy: Policy, what: str, action_dim: int, obs: Obs, lowest: float) -> torch.Tensor:
    """What `policy` would do, (B, action_dim). Raises KnowledgeError if that cannot be used."""
    if torch.compiler.is_exporting():  # a trace has no values to look at
        return policy(copy_of(obs))
    shape, dtype = (len(next(iter(obs.values())) if isinstance(obs, dict) else obs), action_dim), _action_dtype(obs)
    try:
        with torch.no_grad():
            action = policy(copy_of(obs))
    except KnowledgeError:
        raise
    except Exception as error:
        file = getattr(getattr(policy, "__code__", None), "co_filename", None)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f" in line {lines[-1]}" if lines else ""
        given = {name: tuple(x.shape) for name, x in obs.items()} if isinstance(obs, dict) else tuple(obs.shape)
        raise KnowledgeError(f"{what} fails{where} on a batch {given}: {_one_line(error)}; correct it, or if it is no "
                             "policy, start its name with _") from error
    if not isinstance(action, torch.Tensor):
        raise KnowledgeError(f"{what} returns a {type(action).__name__}; return a tensor of shape {shape}")
    if tuple(action.shape) != shape:
        raise KnowledgeError(f"{what} returns shape {tuple(action.shape)}; return {shape}, one action per observation")
    if action.dtype != dtype:
        raise KnowledgeError(f"{what} returns {action.dtype}; return {dtype}")
    if not ((lowest <= action) & (action <= 1)).all():  # NaN is not, either
        if not action.isfinite().all():
            value = action[~action.isfinite()][0].item()
            row = int((~action.isfinite()).any(1).nonzero()[0])
            entries = obs if isinstance(obs, dict) else {"observation": obs}
            seen = {name: [round(y, 3) for y in x[row].tolist()] for name, x in entries.items() if x.dim() == 2}
            raise KnowledgeError(f"{what} returns {value}; return finite numbers, look for a division by zero, here "
                                 f"for {seen or 'an image'}")
        outside = action[(action < lowest) | (action > 1)]
        value = outside[outside.abs().argmax()].item()
        raise KnowledgeError(f"{what} returns {value:.4g}; return numbers in [{lowest:g}, 1], for example with "
                             f".clamp({lowest:g}, 1)")
    return action


def _action_dtype(obs: Obs) -> torch.dtype:
    """That of the observations; float32 where they are all integers, as images are."""
    tensors = obs.values() if isinstance(obs, dict) else [obs]
    return next((x.dtype for x in tensors if x.is_floating_point()), torch.float32)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
