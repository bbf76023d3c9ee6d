"""Arguments of a run: reading them from the command line or from an earlier run, and checking them."""
import errno
import json
import math
import os
import re
import shlex
import sys
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Sequence, get_args, get_origin, get_type_hints

import numpy as np
import torch
import tyro

from env_id import split_id
from errors import UserError

NO_MEMORY = ("allocate memory", "out of memory", "Storage size calculation overflowed")  # of torch, CPU and GPU
MAY_BE_ZERO = {"eval_every", "checkpoint_every", "video"}  # 0 switches these off
ROOT = Path(__file__).resolve().parent.parent
OURS = ("envs", "tests")  # packages of environments; runs/ below the same root may hold a stranger's code
MOST_ENVS = 5000  # more would share streams of random numbers with other seeds, or with evaluations
RESUMED = ("total_timesteps", "device")  # what --resume may change
EVALUATED = ("eval_episodes", "video", "device")  # what --evaluate may change


def cli(args_type: type, algo: str, words: Sequence[str] | None = None) -> Any:
    """Arguments from the command line, or from `words`.

    With `--resume RUN` or `--evaluate RUN` the arguments of that run are the defaults, so what is not named stays as it
    was. Raises UserError for both flags at once, for an empty or foreign folder, and for one that would run code which
    is not named on the command line: it may be a stranger's.
    """
    given = [*(sys.argv[1:] if words is None else words)]
    for flag in ("--resume", "--evaluate"):  # of a shell variable that is not set: it would start a new run
        if (flag, "") in zip(given, given[1:]) or f"{flag}=" in given:
            raise UserError(f"{flag} is empty; name the folder of a run")
    asked = tyro.cli(args_type, args=words)
    if asked.resume and asked.evaluate:
        raise UserError("--resume goes on training, --evaluate does not: leave one of them out")
    folder = asked.resume or asked.evaluate
    if not folder:
        return asked
    stored = replace(_stored_args(folder, algo, args_type), resume=asked.resume, evaluate=asked.evaluate)
    if asked.evaluate:
        stored = replace(stored, video=0, device="auto")
    args = tyro.cli(args_type, args=words, default=stored)
    if unnamed := [word for name, value in own_code(args).items() if value != getattr(asked, name)
                   for word in (flag_of(name), value)]:
        raise UserError(f"{folder} brings or names Python code that is not ours; read it, and if you trust it, name it "
                        f"again: {'--resume' if asked.resume else '--evaluate'} {shlex.join([folder, *unnamed])}")
    return args


def own_code(args: Any) -> dict[str, str]:
    """The arguments that run Python code of somebody's own, {field: value}: files that are not sandboxed (`mine.py`,
    not `llm:mine.py`), and modules that register an environment."""
    found = {}
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name == "env":
            module, _, _ = split_id(value)
            files = [ROOT / module.replace(".", "/") / "__init__.py", ROOT / f"{module.replace('.', '/')}.py"]
            ours = module.split(".")[0] in OURS and "/" not in module and any(file.is_file() for file in files)
            if module and not ours:
                found["env"] = value
        elif isinstance(value, str) and any(".py" in item and not item.startswith("llm:") for item in value.split(",")):
            found[field.name] = value
    return {name: value for name, value in found.items() if name not in ("run_dir", "resume", "evaluate")}


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def checked(args: Any, algo: str, ranges: dict[str, tuple[float, float]], anew: Sequence[str] = ()
            ) -> tuple[Any, dict | None]:
    """`args`, and the checkpoint to go on from or to evaluate (None for a new run). Seeds torch and numpy.

    Every number has to be above 0 and finite; `ranges` gives other limits {field: (low, high)}. A run keeps the
    arguments that it was started with. --resume may change total_timesteps and device. --evaluate may change
    eval_episodes, video, device and the fields in `anew`, and in scripts that play episodes the seed of start states.
    Where its --env named the newest of something, `args.env` is then the one that the run had.
    Raises UserError for arguments that cannot work.
    """
    saved = None
    if folder := args.resume or args.evaluate:
        stored, saved = load_run(folder, algo, type(args))
        starts = ("seed",) if hasattr(args, "eval_episodes") else ()  # of the episodes that --evaluate plays
        _check_kept(args, stored, RESUMED if args.resume else (*EVALUATED, *starts, *anew))
        config = _read_config(folder, algo)
        exact = config.get("exact_env")
        if isinstance(exact, str) and args.env == stored.env and split_id(exact)[:2] == split_id(args.env)[:2]:
            args = replace(args, env=exact)
        finished = saved["step"] >= args.total_timesteps and config.get("finished")
        shortened = saved["step"] > args.total_timesteps and args.total_timesteps != stored.total_timesteps
        if args.resume and (finished or shortened):
            raise UserError(f"{folder} is at {saved['step']} steps; give it more --total-timesteps, or --evaluate it")
    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(field.name, value, ranges)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed % 2 ** 32)  # for tasks that draw from it
    return args, saved


def _check_kept(args: Any, stored: Any, free: Sequence[str]) -> None:
    """Raise UserError where an argument is not that of the run, for it would have no effect."""
    for field in fields(args):
        name, value, had = field.name, getattr(args, field.name), getattr(stored, field.name)
        if name in (*free, "resume", "evaluate") or value == had:
            continue
        flag = f"{flag_of(name)} {value}"
        if isinstance(value, bool):
            flag = f"--{'' if value else 'no-'}{name.replace('_', '-')}"
        raise UserError(f"{flag}: a run keeps the arguments that it was started with (here "
                        f"{'without' if had == '' else had}); leave it out, or start a new run")


def _check_number(name: str, value: float, ranges: dict[str, tuple[float, float]]) -> None:
    flag = flag_of(name)
    if isinstance(value, int) and value >= 2 ** 63 and name != "seed":  # torch and numpy count no further
        raise UserError(f"{flag} must be below 2 to the power of 63, not {value}")
    if name == "seed":
        if not 0 <= value < 2 ** 63:
            raise UserError(f"--seed must be 0 or more, and below 2 to the power of 63, not {value}")
    elif name == "num_envs" and value > MOST_ENVS:
        raise UserError(f"--num-envs must be at most {MOST_ENVS}, not {value}")
    elif name in ranges or name in MAY_BE_ZERO:
        low, high = ranges.get(name, (0, math.inf))
        if not low <= value <= high or math.isinf(value):
            limits = f"{low:g} to {high:g}" if high < math.inf else f"{low:g} or more, and finite"
            raise UserError(f"{flag} must be {limits}, not {value}")
    elif not 0 < value < torch.finfo(torch.float32).max:
        raise UserError(f"{flag} must be greater than 0 and finite, not {value}")


def _read_config(folder: str, algo: str) -> dict:
    """config.json of a run of `algo`. Raises UserError if there is none, or it is another algorithm's, or damaged."""
    config = Path(folder, "config.json")
    try:
        found = config.is_file()
    except PermissionError as error:  # to look into the folder
        raise unreadable(config, error) from error
    if not found:
        inside = [path for depth in (1, 2, 3) for path in Path(folder).glob("*/" * depth + "config.json")]
        inside.sort(key=os.path.getmtime)
        remedy = f"the last one in it is {inside[-1].parent}" if inside else f"runs are kept under runs/{algo}"
        raise UserError(f"{folder} is not a run folder: it has no config.json; {remedy}")
    try:
        saved = json.loads(config.read_text())
        made_by, stored = saved["algo"], dict(saved["args"])
    except OSError as error:
        raise unreadable(config, error) from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{config} is damaged ({type(error).__name__}); start the run anew") from error
    if made_by != algo:
        raise UserError(f"{folder} is a run of {made_by}, not of {algo}; use algos/{made_by}.py")
    return saved | {"args": stored}


def _stored_args(folder: str, algo: str, args_type: type) -> Any:
    """The arguments that a run was started with. Raises UserError where this script does not have them."""
    saved = _read_config(folder, algo)
    names = {field.name for field in fields(args_type)}
    if gone := sorted(saved["args"].keys() - names):
        raise UserError(f"{folder} was made with {flag_of(gone[0])}, which algos/{algo}.py does not have; use its own "
                        f"script (commit {saved.get('commit')}, or algos-{algo}.py in it)")
    if new := sorted(names - saved["args"].keys()):
        print(f"note: {folder} is older than {', '.join(new)}: as by default", file=sys.stderr)
    for name, hint in get_type_hints(args_type).items():
        value = saved["args"].get(name, getattr(args_type, name))
        if not _is_of(value, hint):
            raise UserError(f"{folder}/config.json is damaged: {name} cannot be {value!r}; start the run anew")
    return args_type(**saved["args"])


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a flag with this type hint can have this value."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(value, bool):  # to Python a bool is an int, too
        return hint is bool
    if isinstance(value, int) and float in (hint, *get_args(hint)):
        return True
    return isinstance(value, hint)


def load_run(folder: str, algo: str, args_type: type) -> tuple[Any, dict]:
    """(arguments, checkpoint) of a run folder. Raises UserError if it is none, another algorithm's, or damaged, or if
    it cannot be read. What the checkpoint has as `read_ns` tells it from a later one."""
    args, checkpoint = _stored_args(folder, algo, args_type), Path(folder, "checkpoint.pt")
    for path in (*Path(folder).glob("*"), *Path(folder).glob("[!w]*/*")):  # wandb/ has some
        if path.is_symlink():  # what is written to it would be written elsewhere
            raise UserError(f"{path} is a symbolic link; put the file itself there")
    if not checkpoint.is_file():
        raise UserError(f"{folder} has no checkpoint.pt: none was saved yet. If the run is not running any more, start "
                        "a new one")
    try:
        read_ns = checkpoint.stat().st_mtime_ns  # before it is read: it may be replaced meanwhile
        check_archive(checkpoint)
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, zlib, pickle and torch have many names for it
        not_read = isinstance(error, OSError) and error.errno != errno.EINVAL  # that one: of a wrong place in the file
        if not_read or lacks_memory(error):
            raise unreadable(checkpoint, error) from error
        raise UserError(f"{checkpoint} is damaged ({type(error).__name__}); start the run anew") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("step"), int):
        raise UserError(f"{checkpoint} is no checkpoint of a run; start the run anew")
    return args, saved | {"read_ns": read_ns}


def unreadable(path: Path, error: BaseException) -> UserError:
    """The line for a file that may be whole."""
    reason = "there is not enough memory" if lacks_memory(error) else error.strerror or error
    return UserError(f"{path} cannot be read ({reason}); put that right, and try again")


def lacks_memory(error: BaseException) -> bool:
    """Whether Python or torch could not get the memory that it asked for."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(
        words in str(error) for words in NO_MEMORY)


def check_archive(path: Path) -> None:
    """Compare every member of a file that torch saved with its checksum, which torch.load does not: one bit that has
    flipped gives other numbers without a word. Raises zipfile.BadZipFile or OSError."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("a checksum does not fit")


def hidden_layers(text: str) -> list[int]:
    """[256, 256, 256] for "256x3". Raises UserError for anything else than width x depth."""
    if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,2}", text):
        raise UserError(f"--hidden is width x depth, as in 256x3, and at most 999999x999, not {text!r}")
    width, depth = map(int, text.split("x"))
    return [width] * depth
