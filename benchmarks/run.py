"""Run the cells of a suite that are not finished yet, several at a time: make bench SUITE=quick WORKERS=2

A suite (benchmarks/suites/<name>.toml) lists algorithms, environments, seeds and flags; a cell is one command of it.
With `cross = {gamma = [0.98, 0.99], clip = [0.1, 0.2]}` there is a cell for each combination of these flags.
Its folder is a function of these four alone, so a suite can be run again at any time: finished cells are skipped, the
others go on from their last checkpoint, or from the start. Beside a run folder `seed<k>/` stand `seed<k>.log`, what
the command printed, and `seed<k>.json`, how it ended. Ctrl-C or SIGTERM stops every cell with a checkpoint; a second
one, two seconds later or more, kills them. Cells that fail, in whatever way, are named at the end, and the others run
on. A table then compares what is finished with the committed results (benchmarks/verdict.py).
"""
import ast
import csv
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Callable, Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import verdict
from benchmarks.curves import arguments


GRACE = 60  # seconds that a cell has to save, once its time is over
ECHO = 2.0  # seconds after the first signal in which others count as the same: make passes on what its group gets


def say(line: str) -> None:
    """Print a line, whole though threads do the same."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Cell:
    """One command of a suite."""
    algo: str
    env: str
    seed: int
    flags: tuple[str, ...]
    root: Path  # above all cells

    @property
    def folder(self) -> Path:
        """Where its run goes: a readable name, and a digest because that one is cut short."""
        text = " ".join(self.flags)
        name = re.sub(r"[^\w.]+", "-", text).strip("-")[:60] or "defaults"
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        paths = ":run:" in self.env or ".py:" in self.env
        env = self.env.replace("/", "-").strip("-.") if paths else self.env  # a path is no folder
        return self.root / self.algo / env / f"{name}-{digest}" / f"seed{self.seed}"

    @property
    def name(self) -> str:
        return " ".join([self.algo, self.env, *self.flags, f"seed {self.seed}"])

    def beside(self, suffix: str) -> Path:
        return self.folder.with_name(self.folder.name + suffix)

    def ended_well(self) -> bool:
        """Whether `record` wrote down that its command did."""
        try:
            return json.loads(self.beside(".json").read_text())["returncode"] == 0
        except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
            return False

    def finished(self) -> bool:
        """Whether its command ended well. If that was not written down, because the engine was killed or a film failed,
        a complete curve and checkpoint will do. A cell with files that cannot be read is not finished."""
        config, curve = self.folder / "config.json", self.folder / "eval.csv"
        if not (config.is_file() and curve.is_file()):  # deleted by hand, to be made again
            return False
        if self.ended_well():
            return True
        try:
            run = json.loads(config.read_text())
            total = run["args"]["total_timesteps"]
            with curve.open() as file:
                steps = [int(row["step"]) for row in csv.DictReader(file)]
            # runs of before do not say whether they are finished
            return run.get("finished", True) and bool(steps) and steps[-1] >= total and self.saved_step() >= total
        except (OSError, ValueError, KeyError, TypeError, csv.Error):
            return False

    def saved_step(self) -> int:
        """The step of its checkpoint; -1 without a sound one."""
        import torch  # slow to import, and seldom needed

        try:
            return torch.load(self.folder / "checkpoint.pt", "cpu", weights_only=True, mmap=True)["step"]
        except Exception:  # a damaged file raises anything
            return -1

    @property
    def script(self) -> str:
        return f"algos/{self.algo}.py"

    def script_has_changed(self) -> bool:
        """Whether its run keeps another version of the script than is here now."""
        kept = self.folder / f"algos-{self.algo}.py"
        return kept.is_file() and kept.read_bytes() != (ROOT / self.script).read_bytes()

    @property
    def fresh(self) -> list[str]:
        """The flags that start it."""
        return ["--env", self.env, "--seed", str(self.seed), *self.flags]

    def command(self) -> list[str]:
        """What starts it, or continues it from its checkpoint, its code named (`runtime.cli`)."""
        if (self.folder / "checkpoint.pt").is_file():
            return [sys.executable, self.script, "--resume", str(self.folder), *self.fresh]
        return [sys.executable, self.script, *self.fresh, "--run-dir", str(self.folder)]

    def claim(self) -> IO[str] | None:
        """Its log, locked for whoever holds it, child processes included; None if it runs already, perhaps as what a
        killed engine left behind, or is finished by now."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        log = self.beside(".log").open("a")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            say(f"is running already: {self.name}")
            return None
        if self.finished():  # another engine was faster
            log.close()
            return None
        self.beside(".json").unlink(missing_ok=True)
        if self.beside(".old").exists() and not self.folder.exists():  # killed while it swapped them (cluster.unpack)
            os.replace(self.beside(".old"), self.folder)
        return log

    def record(self, returncode: int, seconds: float) -> None:
        """Write down how it ended."""
        partial = self.beside(".json.tmp")
        partial.write_text(json.dumps({"returncode": returncode, "seconds": round(seconds)}))
        os.replace(partial, self.beside(".json"))
        say(("finished " if not returncode and self.finished() else "FAILED   ") + f"{self.name} ({seconds:.0f} s)")

    def failed(self, error: Exception) -> int:
        """Exit status of a cell that `error` kept from running, or from being written down: named, and no more."""
        say(f"FAILED   {self.name} ({str(error).splitlines()[0]})")
        return 1

    def last_words(self) -> list[str]:
        """The end of its log; nothing where that cannot be read."""
        try:
            return self.beside(".log").read_text(errors="replace").splitlines()[-5:]
        except OSError:
            return []


@dataclass
class Args:
    """Run what is not finished of a benchmark suite."""
    suite: str = "quick"  # name in benchmarks/suites, or a path to a .toml file
    workers: int = 1  # cells at a time, one thread each; at most the number of cores is sensible
    algo: str = ""  # only the cells of this algorithm
    env: str = ""  # only the cells of this environment
    seeds: int = 0  # only seeds up to this one; 0: all
    root: str = ""  # above all cells' folders; empty: runs/bench, or runs/smoke for the suite of that name
    timeout: float = 0.0  # minutes that a cell may take, then it is asked to save and has failed; 0: no limit
    backend: Literal["local", "ray"] = "local"  # where cells run: here, or as tasks of a Ray cluster (pip install ray)
    ray_address: str = "auto"  # of the cluster; auto: the one that this machine belongs to
    gpus: float = 0.0  # share of a GPU per cell, with --backend ray
    dry_run: bool = False  # print commands, run nothing


def crossed(entry: dict) -> list[tuple[str, ...]]:
    """The flags of an entry's cells, one per combination of what `cross` lists. Raises TypeError or ValueError for what
    is no table of lists, and for flags that are named twice."""
    flags, ways = tuple(shlex.split(entry.get("flags", ""))), []
    for name, values in entry.get("cross", {}).items():
        if type(values) is not list or not values or not {type(x) for x in values} <= {str, int, float, bool}:
            raise TypeError(f"cross: {name} is no list of values")
        name = name.replace("_", "-")
        if name in ("env", "seed", "run-dir", "resume", "evaluate"):  # which the folders of cells are named by
            raise ValueError(f"cross has {name}; cells have envs and seeds of their own")
        if {f"--{name}", f"--no-{name}"} & {word.split("=")[0].replace("_", "-") for word in flags}:
            raise ValueError(f"--{name} stands in flags and in cross")
        ways.append([(f"--{name}" if x else f"--no-{name}",) if isinstance(x, bool) else (f"--{name}", str(x))
                     for x in values])
    return [sum(way, flags) for way in itertools.product(*ways)]


def load_suite(args: Args) -> list[Cell]:
    """The cells that `args` asks for, seed 1 of everything first: an early stop leaves a broad picture.

    Raises ValueError, a one-line message, for a suite that is not there, broken or left with no cell.
    """
    path = Path(args.suite) if args.suite.endswith(".toml") else ROOT / "benchmarks" / "suites" / f"{args.suite}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (ROOT / "benchmarks" / "suites").glob("*.toml")))
        raise ValueError(f"suite {args.suite} is not there; known are {known}")
    try:
        entries = tomllib.loads(path.read_text())["cell"]
        for entry in entries:
            kinds = {"algo": str, "envs": list, "seeds": list, "flags": str, "cross": dict}
            if not isinstance(entry, dict) or any(type(x) is not kinds.get(key) for key, x in entry.items()) or (
                    {type(env) for env in entry["envs"]} != {str} or {type(seed) for seed in entry["seeds"]} != {int}):
                raise TypeError(f"a cell is {entry}")
        cells = [Cell(entry["algo"], env, seed, flags, Path(args.root))
                 for entry in entries for env in entry["envs"] for flags in crossed(entry) for seed in entry["seeds"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no suite ({type(error).__name__}: {error}): give each [[cell]] algo, a text, envs "
                         "and seeds, lists of texts and of whole numbers, and if need be flags, one text, and cross, "
                         "a table of lists") from error
    for algo in dict.fromkeys(cell.algo for cell in cells):
        script = ROOT / "algos" / f"{algo}.py"
        if not script.is_file():
            raise ValueError(f"{path} names {algo}, but there is no algos/{algo}.py")
        known = arguments(ast.parse(script.read_text())).keys()
        for word in (word for cell in cells if cell.algo == algo for word in cell.flags):
            name = word.split("=")[0].removeprefix("--").replace("-", "_")
            if known and word.startswith("--") and not {name, name.removeprefix("no_")} & known:
                raise ValueError(f"{path}: algos/{algo}.py has no flag {word}")
    cells = [c for c in cells if c.algo == (args.algo or c.algo) and c.env == (args.env or c.env)
             and c.seed <= (args.seeds or c.seed)]
    if not cells:
        raise ValueError(f"suite {args.suite} has no cell of algo {args.algo or 'any'}, env {args.env or 'any'}")
    return sorted(set(cells), key=lambda c: (c.seed, cells.index(c)))


def attend(child: subprocess.Popen, asked: Callable[[], int], timeout: float) -> int:
    """Exit status of a cell's command, once it has ended. It is told to save and end where `asked()`, how often the
    engine was asked to stop, is 1, or after `timeout` minutes (0: never). Where that is 2, or GRACE seconds later, it
    is killed with all that it started. It has to be the leader of a session."""
    end, told = time.monotonic() + (60 * timeout or math.inf), False
    while True:
        try:
            return child.wait(0.2)
        except subprocess.TimeoutExpired:
            late, times = time.monotonic() - end, asked()
        if times > 1 or late > GRACE:
            os.killpg(child.pid, signal.SIGKILL)
        elif not told and (times or late > 0):
            child.send_signal(signal.SIGTERM)
            told = True


class Engine:
    """Runs cells as child processes in a few threads. After a signal no new one starts."""

    def __init__(self, workers: int, timeout: float = 0.0):
        self.workers, self.timeout = workers, timeout
        self.stop, self.asked = 0, 0  # the signal that came last; how many came
        self.first = math.inf  # when the first came

    def ask_to_stop(self, signum: int, _frame) -> None:
        now = time.monotonic()
        self.first = min(self.first, now)
        if self.asked and now < self.first + ECHO:
            return
        self.stop, self.asked = signum, self.asked + 1

    def run_cell(self, cell: Cell) -> int | None:
        """Exit status of the cell's command; None if it was not started. An error of files (a full disk, a folder that
        is not ours) is this cell's alone."""
        try:
            return None if self.stop else self._run_cell(cell)
        except OSError as error:
            return cell.failed(error)

    def _run_cell(self, cell: Cell) -> int | None:
        if not (log := cell.claim()):
            return None
        with log:
            command = cell.command()
            if "--resume" not in command and cell.folder.exists():  # cut before its first checkpoint
                shutil.rmtree(cell.folder)
            say(("resumes  " if "--resume" in command else "starts   ") + cell.name)
            start = time.monotonic()
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                     env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
            returncode = attend(child, lambda: self.asked, self.timeout)
        if not (self.stop and returncode):
            cell.record(returncode, time.monotonic() - start)
        return returncode

    def run(self, cells: list[Cell]) -> dict[Cell, int | None]:
        """{cell: exit status}, None for cells that were not started."""
        handlers = {s: signal.signal(s, self.ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        with ThreadPoolExecutor(self.workers) as pool:
            outcomes = dict(zip(cells, pool.map(self.run_cell, cells)))
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        return outcomes


def main(args: Args) -> int:
    """0: all cells are finished; 1: some failed, which the last lines name, or run elsewhere; 128 + signal: stopped."""
    if args.workers < 1:
        raise ValueError(f"--workers must be at least 1, not {args.workers}")
    if not 0 <= args.timeout < math.inf:
        raise ValueError(f"--timeout is 0 or more minutes, not {args.timeout}")
    if args.gpus and args.backend == "local":
        raise ValueError("--gpus needs --backend ray; here, a cell takes the GPU that it finds")
    if args.gpus < 0 or args.gpus > 1 and args.gpus % 1:
        raise ValueError(f"--gpus is a share of one GPU or a whole number, not {args.gpus}")
    args.root = str(Path(args.root or ("runs/smoke" if args.suite == "smoke" else "runs/bench")).resolve())
    cells = load_suite(args)
    todo = [cell for cell in cells if not cell.finished()]
    if changed := [cell.name for cell in cells if cell not in todo and cell.script_has_changed()]:
        say(f"note: {len(changed)} finished with another version of their script than is here now, as {changed[0]}; to "
            "run them again, delete their folders or name another --root")
    if args.dry_run:
        for cell in todo:
            print(shlex.join(["python", *cell.command()[1:]]))
        print(f"{len(todo)} to run, {len(cells) - len(todo)} finished", file=sys.stderr)
        return 0
    say(f"{args.suite}: {len(cells)} cells, {len(cells) - len(todo)} finished already")
    if args.backend == "ray":
        from benchmarks.cluster import RayEngine  # an optional package

        engine = RayEngine(args.ray_address, args.gpus, args.timeout)
    else:
        engine = Engine(args.workers, args.timeout)
    outcomes = engine.run(todo)
    ended_by_us = (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL) if engine.stop else ()
    failed = [cell for cell, returncode in outcomes.items() if returncode is not None
              and returncode not in ended_by_us and (returncode or not cell.finished())]
    for cell in failed:
        how = outcomes[cell] or "0, and left no run"
        print("\n  ".join([f"\n{cell.name} failed ({how}); {cell.beside('.log')} ends:", *cell.last_words()]))
    if finished := [cell.folder for cell in cells if cell.finished()]:
        print(f"\n{verdict.table(finished)}\n(Even a run that is just as good falls outside the "
              "range of n seeds in 2 of n + 1 cases.)")
    done = sum(cell.finished() for cell in cells)
    print(f"\n{done} of {len(cells)} cells finished" + (f", {len(failed)} failed" if failed else "")
          + ("; stopped, the same command goes on" if engine.stop else ""))
    return 128 + engine.stop if engine.stop else int(done < len(cells) or bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
