"""What surrounds every run: its folder, checkpoints, signals, progress line, and the machine it runs on.

A run folder holds

    config.json     algorithm, arguments, resolved environment id, commit, versions, hardware; these again per resume
    scalars.csv     step, wall_s, name, value
    eval.csv        step, wall_s, episodes, return_mean, return_std, success_rate, length_mean
    checkpoint.pt   everything `--resume` needs, tensors and plain types only
    algos-<algo>.py the script as it was at the start
    events...       TensorBoard
    video/          episodes, and what else a script draws
"""
import csv
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

EVALUATION = ["episodes", "return_mean", "return_std", "success_rate", "length_mean"]
PACKAGES = ["torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minigrid"]


class ArgError(ValueError):
    """Arguments that cannot work; the message is one line with the value and the remedy."""


@contextmanager
def exit_codes(algo: str, *errors: type[Exception]):
    """End the program with one line on stderr: code 2 for ArgError and these errors, 130 for Ctrl-C where there is no
    run yet that could be saved, or for a second one while it is."""
    try:
        yield
    except (ArgError, *errors) as error:
        print(f"{algo}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{algo}: interrupted", file=sys.stderr)
        sys.exit(130)


class Run:
    """Writes a run folder. `stop` is 0 until SIGINT or SIGTERM asks the run to save and end, then that signal."""

    def __init__(self, algo: str, args: Any, env_id: str, step: int = 0, wall_s: float = 0.0):
        """Start a run of `args` (a dataclass with env, seed, total_timesteps, run_dir, resume, track), or with
        `args.resume` continue at `step` after `wall_s` seconds. Raises ArgError for a folder that is in use."""
        if args.track:  # before anything is created
            try:
                import wandb
            except ImportError as error:
                raise ArgError("--track needs Weights & Biases: pip install wandb") from error
        name = f"seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.resume or args.run_dir or Path("runs", algo, args.env, name))
        while not (args.resume or args.run_dir) and self.folder.exists():  # two starts within a second
            self.folder = self.folder.with_name(f"{self.folder.name}a")
        try:
            if args.resume:  # perhaps with more steps, by other code, elsewhere
                config = json.loads((self.folder / "config.json").read_text())
                config["args"]["total_timesteps"] = args.total_timesteps
                config["resumed"] = [*config.get("resumed", []), {"step": step, **describe_machine()}]
            else:
                if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                    raise ArgError(f"{self.folder} is not empty; continue it with --resume, or name another --run-dir")
                self.folder.mkdir(parents=True, exist_ok=True)
                config = {"algo": algo, "args": asdict(args), "env_id": env_id, **describe_machine()}
            write_whole(self.folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=1)))
        except OSError as error:
            remedy = "make it writable" if args.resume else "name another --run-dir"
            raise ArgError(f"{self.folder} cannot be written ({error.strerror}); {remedy}") from error
        print(f"run folder: {self.folder}" + f", from step {step} on" * bool(args.resume), file=sys.stderr)
        if (script := Path(sys.argv[0])).stem == algo and script.is_file():  # not where something else calls it
            self._keep(script, anew=not args.resume)
        if args.track:
            wandb.init(project=algo, name=name, dir=str(self.folder), config=asdict(args), sync_tensorboard=True)
        self.stop = 0
        self.start = time.monotonic() - wall_s
        self.board = SummaryWriter(str(self.folder), purge_step=step + 1)
        self.scalars = self._csv("scalars.csv", ["step", "wall_s", "name", "value"], step)
        self.evals = self._csv("eval.csv", ["step", "wall_s", *EVALUATION], step)
        self.handlers = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=not sys.stderr.isatty())

    def _keep(self, script: Path, anew: bool) -> None:
        """A copy of the script, for a commit does not tell what it was between two commits; a word where it is another
        by now."""
        kept = self.folder / f"algos-{script.name}"  # <name>.py may be the rules
        if anew:
            kept.write_bytes(script.read_bytes())
        elif kept.is_file() and kept.read_bytes() != script.read_bytes():
            print(f"note: {script} has changed since this run began, with {kept}", file=sys.stderr)

    def _ask(self, signum: int, _frame) -> None:
        self.stop = signum
        signal.signal(signum, self.handlers[signum])  # a second one does not wait

    def _csv(self, name: str, columns: list[str], step: int):
        path, old = self.folder / name, []
        if path.exists():  # rows later than the checkpoint will be made again, a last one may be cut
            with path.open() as file:
                old = [row for row in csv.reader(file) if len(row) == len(columns) and row[0].isdigit()
                       and int(row[0]) <= step]
        write_whole(path, lambda p: p.write_text("".join(",".join(row) + "\n" for row in [columns, *old])))
        return path.open("a", newline="", buffering=1)  # line-buffered: a killed run keeps its curve

    def wall_s(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return round(time.monotonic() - self.start, 1)

    def log(self, step: int, scalars: dict[str, float | torch.Tensor], names: Sequence[str] = ()) -> None:
        """Append scalars to scalars.csv and TensorBoard; elements of a vector `x` as `x/<name>`, of one shorter than
        `names` for the last of these."""
        wall_s, flat = self.wall_s(), {}
        for key, value in scalars.items():
            values = torch.as_tensor(value).reshape(-1).tolist()
            flat |= {key: values[0]} if torch.as_tensor(value).dim() == 0 else {
                f"{key}/{name}": x for name, x in zip(names[-len(values):], values)}
        for name, value in flat.items():
            self.scalars.write(f"{step},{wall_s},{name},{value:.6g}\n")
            self.board.add_scalar(name, value, step)

    def log_evaluation(self, step: int, result: dict[str, float]) -> None:
        """Append what `envs.evaluate` returned to eval.csv, and show it in the progress line."""
        values = ",".join(f"{result[name]:.6g}" for name in EVALUATION)
        self.evals.write(f"{step},{self.wall_s()},{values}\n")
        self.log(step, {f"eval/{name}": value for name, value in result.items()})
        success = result["success_rate"]
        line = f"return {result['return_mean']:.2f}" + (f", success {success:.2f}" if success == success else "")
        self.bar.set_postfix_str(line)
        if self.bar.disable:  # no terminal
            print(f"step {step}: {line}", file=sys.stderr, flush=True)

    def save(self, checkpoint: dict) -> None:
        """Write checkpoint.pt: whole, or not at all."""
        write_whole(self.folder / "checkpoint.pt", lambda path: torch.save(to_plain(checkpoint), path))

    def close(self, unfinished: bool) -> None:
        """Close files, give signals back, say what the run can be used for. A stopped unfinished one exits with
        128 + signal."""
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        for thing in (self.bar, self.board, self.scalars, self.evals):
            thing.close()
        what, flag = ("saved; continue", "--resume") if unfinished else ("finished; score and film it", "--evaluate")
        python = "python" if shutil.which("python") == sys.executable else os.path.relpath(sys.executable)
        command = shlex.join([python, sys.argv[0], flag, str(self.folder), *(["--video", "2"] * (not unfinished))])
        print(f"{what} with: {command}", file=sys.stderr)
        if self.stop and unfinished:
            sys.exit(128 + self.stop)


def load_run(folder: str, algo: str, args_type: type) -> tuple[Any, dict]:
    """(arguments, checkpoint) of a run folder. Raises ArgError if it is none, another algorithm's, or damaged."""
    config, checkpoint = Path(folder, "config.json"), Path(folder, "checkpoint.pt")
    if not config.is_file():
        inside = [path for depth in (1, 2, 3) for path in Path(folder).glob("*/" * depth + "config.json")]
        inside.sort(key=os.path.getmtime)
        remedy = f"the last one in it is {inside[-1].parent}" if inside else f"runs are kept under runs/{algo}"
        raise ArgError(f"{folder} is not a run folder: it has no config.json; {remedy}")
    if not checkpoint.is_file():
        raise ArgError(f"{folder} has no checkpoint.pt: it was cut before its first one; start it anew")
    try:
        saved = json.loads(config.read_text())
        if saved["algo"] == algo:
            names = {field.name for field in fields(args_type)}
            if gone := sorted(saved["args"].keys() - names):
                raise ArgError(f"{folder} was made with --{gone[0].replace('_', '-')}, which algos/{algo}.py does not "
                               f"have; use its own script (commit {saved.get('commit')}, or algos-{algo}.py in it)")
            if new := sorted(names - saved["args"].keys()):
                print(f"note: {folder} is older than {', '.join(new)}: as by default", file=sys.stderr)
            return args_type(**saved["args"]), torch.load(checkpoint, map_location="cpu", weights_only=True)
    except ArgError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ArgError(f"{folder} is damaged or of another version ({type(error).__name__}); start it anew") from error
    raise ArgError(f"{folder} is a run of {saved['algo']}, not of {algo}; use algos/{saved['algo']}.py")


def continued(stored: Any, asked: Any, *anew: str, if_named: Sequence[str] = ()) -> Any:
    """Arguments of a run, with the fields `anew` as asked for now, and `if_named` where they are named: unlike their
    defaults, or on the command line. Raises ArgError if others are named, for they would have no effect."""
    flags = {word.split("=")[0].replace("_", "-").replace("--no-", "--") for word in sys.argv}
    named = {field.name: getattr(asked, field.name) for field in fields(asked)
             if getattr(asked, field.name) != field.default or f"--{field.name.replace('_', '-')}" in flags}
    if asked.resume and asked.evaluate:
        raise ArgError("--resume goes on training, --evaluate does not: leave one of them out")
    for name, value in named.items():
        if name not in (*anew, *if_named) and value != (had := getattr(stored, name)):
            no, value = ("no-" * (not value), "") if isinstance(value, bool) else ("", f" {value}")
            raise ArgError(f"--{no}{name.replace('_', '-')}{value}: a run keeps the arguments that it was started with "
                           f"(here {'without' if had == '' else had}); leave it out, or start a new run")
    return replace(stored, **{name: getattr(asked, name) for name in anew},
                   **{name: named[name] for name in if_named if name in named})


def write_whole(path: Path, write) -> None:
    """Call `write` on a temporary path and rename it to `path`: a reader, or a kill, never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def to_plain(tree: Any) -> Any:
    """Nested dicts and lists with arrays turned to tensors: `torch.load(weights_only=True)` reads these without
    executing code."""
    if isinstance(tree, dict):
        return {key: to_plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [to_plain(value) for value in tree]
    if isinstance(tree, np.generic):
        return tree.item()
    return torch.from_numpy(tree.copy()) if isinstance(tree, np.ndarray) else tree


def describe_machine() -> dict:
    """Commit, package versions and hardware: what a number needs beside it."""
    commit = os.environ.get("RUN_COMMIT")  # where the code runs outside its repository
    if not commit and shutil.which("git"):
        def git(*words: str) -> str:
            return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent).stdout
        commit = git("describe", "--always").strip()
        if commit and git("status", "--porcelain", "--", "algos", "envs", "knowledge", "llm", "runtime.py"):
            commit += "-dirty"  # by new files, too
    return {"commit": commit or None, "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
            "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}", "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def require_positive(args: Any, *names: str) -> None:
    """Raise ArgError unless all these numbers of `args` are above zero and float32 has them, and the seed is one."""
    if not 0 <= args.seed < 2 ** 63:
        raise ArgError(f"--seed must be 0 or more, and below 2 to the power of 63, not {args.seed}")
    for name in names:
        if not 0 < getattr(args, name) < torch.finfo(torch.float32).max:
            raise ArgError(f"--{name.replace('_', '-')} must be greater than 0 and finite, not {getattr(args, name)}")


def require_range(args: Any, low: float, high: float, *names: str) -> None:
    """Raise ArgError unless all these numbers of `args` are finite and within [low, high]."""
    for name in names:
        if not low <= getattr(args, name) <= high or getattr(args, name) == float("inf"):
            limits = f"{low:g} to {high:g}" if high < float("inf") else f"{low:g} or more, and finite"
            raise ArgError(f"--{name.replace('_', '-')} must be {limits}, not {getattr(args, name)}")


def hidden_layers(text: str) -> list[int]:
    """[256, 256, 256] for "256x3". Raises ArgError for anything else than width x depth."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise ArgError(f"--hidden is width x depth, as in 256x3, not {text!r}")
    width, depth = map(int, text.split("x"))
    return [width] * depth


def pick_device(name: str) -> torch.device:
    """"cpu", "cuda", or "auto": a GPU if torch sees one. Raises ArgError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ArgError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has the C++ compiler it needs on a CPU; says so once on stderr where it has not."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what torch takes
    if device.type != "cpu" or shutil.which(compiler):
        return True
    print(f"no C++ compiler ({compiler}): the update is not compiled, training is slower but the same", file=sys.stderr)
    return False


def compile_for(function: Callable, options: dict, *example: Any) -> Callable:
    """`function` as one graph, compiled now, for arguments like `example`: tensors of these shapes and types, all else
    as it is here. That it stays so is not checked at every call, as torch.compile does: for small networks the check
    takes as long as half of their update."""
    graph = torch.compile(function, fullgraph=True, dynamic=False, options=options).aot_compile((example, {}))
    graph.disable_guard_check()
    return graph


@contextmanager
def finishing():
    """Keep Ctrl-C from the processes that are started inside: it goes to all of a terminal's processes, and a compiler
    that dies of it would take the update with it. This process gets it when the block is over."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def use_fast_matmul(device: torch.device) -> bool:
    """Let oneDNN do float32 matrix products where that is faster *and* as accurate; returns whether it is used.

    torch's "medium" precision hands products to oneDNN: on AMD's Zen 5 twice the rate of MKL, on Zen 4 a tenth more,
    still in true float32. On CPUs with AMX the same setting may compute in bfloat16, so the accuracy is tested, not
    assumed. Without AVX-512 it gains nothing.
    """
    torch.set_float32_matmul_precision("highest")
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    a = torch.linspace(-1, 1, 512 * 512).view(512, 512).sin()
    exact = a.double() @ a.double().T
    torch.set_float32_matmul_precision("medium")
    error = ((a @ a.T).double() - exact).abs().max() / exact.abs().max()
    if error > 1e-5:  # bfloat16 is at 4e-3, float32 below 1e-6
        torch.set_float32_matmul_precision("highest")
    return bool(error <= 1e-5)
