"""A run: its folder, what is due at which step, checkpoints, signals, progress line."""
import errno
import fcntl
import json
import math
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from errors import UserError
from runtime import policy
from runtime.args import flag_of, lacks_memory, own_code
from runtime.files import save, to_plain, write_whole

EVALUATION = ["episodes", "return_mean", "return_std", "success_rate", "length_mean"]
PACKAGES = ["torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minigrid"]
CODE = ["algos", "envs", "knowledge", "llm", "runtime", "buffers.py", "networks.py", "pt2.py", "streamnet.py",
        "env_id.py", "errors.py", "start.py"]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no more can be written: the disk, a quota, a limit of file sizes


@contextmanager
def exit_codes(algo: str):
    """End the program with one line on stderr. The exit code is 2 for a UserError, a path that is too long, a full
    disk, and too little memory. It is 130 for a Ctrl-C that comes before there is a run to save, or for a second one
    while it is being saved."""
    try:
        yield
    except UserError as error:
        print(f"{algo}: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        print(f"{algo}: there is not enough memory; lower what sizes were given, as --hidden, --batch-size, --num-envs",
              file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"{algo}: {str(error.filename)[:60]}... is too long for a path", file=sys.stderr)
            sys.exit(2)
        if error.errno not in FULL:
            raise
        print(f"{algo}: {error.strerror}; make room, and go on with --resume if the run has saved a checkpoint: it is "
              "kept", file=sys.stderr)
        sys.stderr.flush()
        os._exit(2)  # files that are closed now would fail once more, each with a traceback
    except KeyboardInterrupt:
        print(f"{algo}: interrupted", file=sys.stderr)
        sys.exit(130)


class Run:
    """A run: it counts environment steps, writes its folder and obeys signals.

    step: environment steps so far. over: whether all of them are done. folder: the run folder. result: the last
    evaluation of all that counts, with the keys EVALUATION at least.
    """

    def __init__(self, algo: str, args: Any, env_id: str, saved: dict | None, parts: dict[str, Any]):
        """Start a run, or go on from the checkpoint `saved` with the random state that it holds.

        `args` is a dataclass with the run arguments that every script has. `parts` is what checkpoints keep, {name:
        part}. A part is a dict of tensors and numbers, or an object with a state_dict.
        Raises UserError for a folder that is in use or cannot be written."""
        if args.track:  # before anything is created
            try:
                import wandb
            except ImportError as error:
                raise UserError("--track needs Weights & Biases: pip install wandb") from error
        self.args, self.parts = args, parts
        self.step = self.before = saved["step"] if saved else 0  # before: the step before the last `advance`
        self.start_step = self.step  # of this start, perhaps one of several
        name = f"seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        env = Path(args.env).stem if Path(args.env).is_file() else args.env  # a path is no name for a folder
        if ":run:" in env or ".py:" in env:  # nor is one before or behind an id
            env = env.replace("/", "-").strip("-.")
        self.folder = Path(args.resume or args.run_dir or Path("runs", algo, env, name))
        while not (args.resume or args.run_dir) and self.folder.exists():  # two starts within a second
            self.folder = self.folder.with_name(f"{self.folder.name}a")
        self._write_config(algo, env_id, saved)
        self.signal, self.stopped = 0, False  # the signal that came; whether it was obeyed
        heard = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
        self.handlers = {s: signal.signal(s, self._ask) for s in heard}  # nohup ignores SIGHUP, and so do we then
        print(f"run folder: {self.folder}" + (f", from step {self.step} on" if args.resume else ""), file=sys.stderr)
        self.script = Path(getattr(sys.modules["__main__"], "__file__", None) or f"algos/{algo}.py")
        if self.script.stem == algo and self.script.is_file():  # not where something else calls `main`
            self._keep_script()
        if args.track:
            wandb.init(project=algo, name=name, dir=str(self.folder), config=asdict(args), sync_tensorboard=True)
        self.start = time.monotonic() - (saved["wall_s"] if saved else 0.0)
        self.began = time.monotonic()
        self.rows = {}  # of each table, so that a resume can tell whether some are lost
        self.rows_saved = saved.get("rows", {}) if saved else {}
        self.board = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        self.scalars = self._csv("scalars.csv", ["step", "wall_s", "name", "value"])
        self.evals = {"eval": self._csv("eval.csv", ["step", "wall_s", *EVALUATION])}  # and those of parts of the tasks
        rows = (self.folder / "eval.csv").read_text().splitlines()[1:]
        self.result = dict(zip(EVALUATION, map(float, rows[-1].split(",")[2:]))) if rows else {}
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit="step", disable=not sys.stderr.isatty())
        if saved:
            torch.set_rng_state(saved["rng"])
            if "numpy_rng" in saved:  # checkpoints of before have none
                name, keys, *rest = saved["numpy_rng"]
                np.random.set_state((name, np.asarray(keys).astype(np.uint32), *rest))

    def _write_config(self, algo: str, env_id: str, saved: dict | None) -> None:
        args, machine = self.args, describe_machine()
        try:
            if args.resume:  # it may have more steps, other code or another machine by now
                self._lock()
                if (self.folder / "checkpoint.pt").stat().st_mtime_ns != saved["read_ns"]:
                    raise UserError(f"another process has gone on with {self.folder} since its checkpoint was read; "
                                    "give the command again")
                config = json.loads((self.folder / "config.json").read_text())
                config["args"]["total_timesteps"], config["finished"] = args.total_timesteps, False
                config["resumed"] = [*config.get("resumed", []), {"step": self.step, **machine}]
            else:
                if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                    raise UserError(f"{self.folder} is not empty; continue it with --resume, or name another --run-dir")
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock()
                config = {"algo": algo, "args": asdict(args), "env_id": env_id, "finished": False, **machine}
                if exact := getattr(self.parts.get("vec"), "exact_id", ""):  # args.env may name the newest of something
                    config["exact_env"] = exact
            write_whole(self.folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=1)))
        except OSError as error:
            remedy = "make it writable" if args.resume else "name another --run-dir"
            raise UserError(f"{self.folder} cannot be written ({error.strerror}); {remedy}") from error

    def _lock(self) -> None:
        """Hold the folder for as long as this process lives: two that write it would mix their rows. It is a POSIX
        lock, which also works on NFS. On a file system without locks, nothing protects the folder. Raises UserError if
        another process holds it."""
        self.lock = (self.folder / "lock").open("a+")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.lock.seek(0)
            raise UserError(f"{self.folder} is being written by process {self.lock.read().strip()}; wait for it, or "
                            "stop it") from error
        except OSError:  # no locks here
            return
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()} of {platform.node()}\n")
        self.lock.flush()

    def _keep_script(self) -> None:
        """Copy the script into the run folder, because a commit does not show changes that were not committed. At a
        resume say on stderr if the script is not the same any more."""
        kept = self.folder / f"algos-{self.script.name}"  # <name>.py may be the rules
        if not self.args.resume:
            kept.write_bytes(self.script.read_bytes())
        elif kept.is_file() and kept.read_bytes() != self.script.read_bytes():
            print(f"note: {self.script} has changed since this run began, with {kept}", file=sys.stderr)

    def _ask(self, signum: int, _frame) -> None:
        self.signal = signum
        if signum != signal.SIGHUP:
            signal.signal(signum, self.handlers[signum])  # a second one does not wait
            return
        signal.signal(signum, signal.SIG_IGN)  # a shell that ends sends one, and the kernel another
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):  # the terminal is gone, or a `tee` that had it: what is written there would be an error
            with suppress(OSError):  # it was closed before
                if not stat.S_ISREG(os.fstat(output).st_mode):
                    os.dup2(nowhere, output)

    def _csv(self, name: str, columns: list[str]):
        path, old = self.folder / name, []
        if path.exists():  # rows after the checkpoint will be written again; a kill may have cut the last one
            rows = [line.split(",") for line in path.read_text(errors="replace").splitlines()]
            old = [row for row in rows if len(row) == len(columns) and row[0].isdecimal()
                   and int(row[0]) <= self.start_step]
        self.rows[name] = len(old)
        if (lost := self.rows_saved.get(name, 0) - len(old)) > 0:
            print(f"note: {path} lacks {lost} rows that it had at step {self.start_step}; the run goes on without them",
                  file=sys.stderr)
        write_whole(path, lambda p: p.write_text("".join(",".join(row) + "\n" for row in [columns, *old])))
        return path.open("a", newline="", buffering=1)  # line-buffered: a killed run keeps its curve

    @property
    def over(self) -> bool:
        return self.step >= self.args.total_timesteps

    def advance(self, steps: int) -> bool:
        """Count `steps` more environment steps. Returns False, and counts nothing, if the run is over or stopped."""
        if self.over or self.stopped:
            return False
        self.before, self.step = self.step, self.step + steps
        with suppress(OSError):  # a terminal that is closed just now is no reason to lose the run
            self.bar.update(steps)
        return True

    def due(self, every: int) -> bool:
        """Whether the last `advance` passed a multiple of `every` steps. With 0 nothing is ever due."""
        return every > 0 and self.step // every > self.before // every

    def wall_s(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return round(time.monotonic() - self.start, 1)

    def log(self, scalars: dict[str, float | torch.Tensor], names: Sequence[str] = ()) -> None:
        """Append scalars to scalars.csv and TensorBoard.

        An element of a vector `x` is written as `x/<name>`. If a vector has fewer elements than `names`, it gets the
        last names. Raises UserError if a loss is not finite: the last checkpoint is then the last good state."""
        wall_s, flat = self.wall_s(), {}
        for key, value in scalars.items():
            values = torch.as_tensor(value).reshape(-1).tolist()
            if torch.as_tensor(value).dim() == 0:
                flat[key] = values[0]
            else:
                flat |= {f"{key}/{name}": x for name, x in zip(names[-len(values):], values)}
        for name, value in flat.items():
            self.scalars.write(f"{self.step},{wall_s},{name},{value:.6g}\n")
            self.rows["scalars.csv"] += 1
            self.board.add_scalar(name, value, self.step)
            if name.endswith(("loss", "return_mean")) and not math.isfinite(value):
                raise self._diverged(f"{name} is {value}")

    def _diverged(self, what: str) -> UserError:
        kept = f" ({self.folder} keeps its last checkpoint)" if (self.folder / "checkpoint.pt").is_file() else ""
        return UserError(f"the run has diverged: {what} at step {self.step}; lower --learning-rate, and begin "
                         f"anew{kept}")

    def log_evaluation(self, result: dict[str, float], part: str = "") -> None:
        """Append the result of `envs.evaluate` to eval.csv and show it, with the steps per second since this start.
        The result of one `part` of the tasks goes to eval-<part>.csv."""
        name = f"eval-{part}" if part else "eval"
        if name not in self.evals:
            self.evals[name] = self._csv(f"{name}.csv", ["step", "wall_s", *EVALUATION])
        values = ",".join(f"{result[key]:.6g}" for key in EVALUATION)
        self.evals[name].write(f"{self.step},{self.wall_s()},{values}\n")
        self.rows[f"{name}.csv"] += 1
        self.log({f"{name}/{key}": value for key, value in result.items()})
        if not part:
            self.result = result
        success = result["success_rate"]
        line = f"{part} return {result['return_mean']:.2f}".strip()
        line += "" if math.isnan(success) else f", success {success:.2f}"
        speed, steps = "", self.step - self.start_step
        if steps > 0:
            speed = f" ({steps / (time.monotonic() - self.began):.0f} steps/s)"
        with suppress(OSError):  # as above
            self.bar.set_postfix_str(line)
            tqdm.write(f"step {self.step}: {line}{speed}", file=sys.stderr)  # a line that stays, above any bar

    def save_if_due(self) -> None:
        """Write the checkpoint if one is due, if the run is over, or if a signal asks the run to end. Raises UserError
        for an agent with a number that is not finite: the last checkpoint is then the last good state."""
        self.stopped = self.signal != 0
        if self.stopped or self.over or self.due(self.args.checkpoint_every):
            name, keys, *rest = np.random.get_state()  # of numpy's global generator, which some tasks draw from
            checkpoint = {"step": self.step, "wall_s": self.wall_s(), "rng": torch.get_rng_state(),
                          "numpy_rng": [name, keys.astype(np.int64), *rest], "rows": self.rows}
            for name, part in self.parts.items():
                checkpoint[name] = part.state_dict() if hasattr(part, "state_dict") else part
            for x in tree_leaves([checkpoint.get("agent"), checkpoint.get("model")]):  # srl.py has a model
                if isinstance(x, torch.Tensor) and not x.isfinite().all():
                    raise self._diverged("the agent holds a number that is not finite")
            write_whole(self.folder / "checkpoint.pt", lambda path: save(to_plain(checkpoint), path))

    def finish(self, example: Any = None, **functions: Callable) -> None:
        """End the run: close the files, restore the signal handlers and print the command that comes next. A run that
        was stopped before its end exits with 128 + signal.

        At its end each of `functions`, {name: function of observations like `example`}, is first written as <name>.pt2
        (`save_policy`), and config.json says that the run is finished. A kill between the two costs nothing: --resume
        then has no step to make, and writes them."""
        if self.over:
            for name, function in functions.items():
                policy.save_policy(self.folder / f"{name}.pt2", function, example)
            config = json.loads((self.folder / "config.json").read_text()) | {"finished": True}
            write_whole(self.folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=1)))
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        for thing in (self.bar, self.board, self.scalars, *self.evals.values(), self.lock):
            thing.close()
        what, flags = "finished; score and film it", ["--evaluate", str(self.folder), "--video", "2"]
        if not self.over:
            what, flags = "saved; continue", ["--resume", str(self.folder)]
        python = "python" if shutil.which("python") == sys.executable else os.path.relpath(sys.executable)
        for name, value in own_code(self.args).items():  # which `runtime.cli` wants to be named
            flags += [flag_of(name), value]
        print(f"{what} with: {shlex.join([python, os.path.relpath(self.script), *flags])}", file=sys.stderr)
        if not self.over:
            sys.exit(128 + self.signal)


def restore(parts: dict[str, Any], saved: dict | None, only: Sequence[str] | None = None) -> None:
    """Load the checkpoint `saved` into `parts`, in place. With `only`, load these parts alone. Without a checkpoint
    (None) do nothing. Raises UserError if the checkpoint lacks a part, or has one of other sizes."""
    for name in [] if saved is None else only or parts:
        if name not in saved:
            raise UserError(f"the checkpoint has no {name}: another version saved it; go on with that one")
        try:
            _restore(parts[name], saved[name])
        except RuntimeError as error:  # of other sizes
            raise UserError(f"the run was trained on other observations or actions ({name} has other sizes); name an "
                            "environment like its own") from error


def _restore(part: Any, saved: Any) -> None:
    if hasattr(part, "load_state_dict"):
        part.load_state_dict(saved)
        return
    for name, value in saved.items():
        if isinstance(value, dict) and name in part:
            _restore(part[name], value)
        elif isinstance(part.get(name), torch.Tensor):
            if part[name].shape != value.shape:
                raise RuntimeError(f"{name} has another shape")
            part[name].copy_(value)
        else:
            part[name] = value


class Means:
    """Sums scalars on their device; `take` gives the mean of each since the last time."""

    def __init__(self):
        self.totals, self.counts = {}, {}

    def add(self, scalars: dict[str, torch.Tensor]) -> None:
        for name, x in scalars.items():
            if name in self.totals:
                x = self.totals[name].to(x.device) + x  # what a checkpoint brought is on the CPU
            self.totals[name] = x
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, torch.Tensor]:
        means = {name: total / self.counts[name] for name, total in self.totals.items()}
        self.totals, self.counts = {}, {}
        return means

    def state_dict(self) -> dict:
        return {"totals": self.totals, "counts": self.counts}

    def load_state_dict(self, state: dict) -> None:
        self.totals, self.counts = state["totals"], state["counts"]


def describe_machine() -> dict:
    """Commit, package versions and hardware, without which a measured number means little."""
    commit = os.environ.get("RUN_COMMIT")  # where the code runs outside its repository
    if not commit and shutil.which("git"):
        def git(*words: str) -> str:
            root = Path(__file__).parent.parent
            return subprocess.run(["git", *words], capture_output=True, text=True, cwd=root).stdout
        commit = git("describe", "--always").strip()
        if commit and git("status", "--porcelain", "--", *CODE):
            commit += "-dirty"  # by new files, too
    return {"commit": commit or None, "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
            "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}", "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
