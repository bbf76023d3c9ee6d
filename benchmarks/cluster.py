"""Cells as tasks of an existing Ray cluster: python benchmarks/run.py --backend ray --ray-address HOST:PORT

Nodes need the packages of requirements.txt, but neither this repository nor a shared disk: the code travels with the
tasks (files named by flags do not: your rules, `run:` folders), and run folders and logs come back to the driver's
folders when a cell ends. A task whose node dies starts again on another one, from what it was sent. To stop, cells are
asked to save, and their checkpoints come back too: the same command goes on. A second signal, two seconds later or
more, kills them.
"""
import ctypes
import io
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import IO

if __name__ == "__main__":  # it is no command of its own
    sys.exit(__doc__)

import benchmarks.run
from benchmarks.run import ECHO, ROOT, Cell, attend, say

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise ValueError("--backend ray needs Ray: pip install ray==2.60.0") from error

for module in (sys.modules[__name__], benchmarks.run):  # of which nodes have no copy
    ray.cloudpickle.register_pickle_by_value(module)


def pack(*paths: Path) -> bytes:
    """Files and folders that exist, as an archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in filter(Path.exists, paths):
            archive.add(path, path.name, filter=lambda info: None if info.name.endswith("__pycache__") else info)
    return buffer.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Put what `pack` took into `folder`; what was there is replaced once all is unpacked. A kill leaves it in `folder`
    or in `<folder>.old`, where `Cell.claim` finds it."""
    old = folder.with_name(folder.name + ".old")
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(Path(new, "all"), filter="data")
        Path(new, "all").mkdir(exist_ok=True)  # of nothing
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(Path(new, "all"), folder)
    shutil.rmtree(old, ignore_errors=True)


def die_with_parent() -> None:
    """In a child: be killed when the Ray worker is, as by the death of its node's daemon (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Board:
    """Lives beside the driver: tasks say here that they start, and see here how often they were asked to stop."""

    def __init__(self):
        self.starts, self.asked = {}, 0

    def start(self, name: str) -> None:
        self.starts[name] = self.starts.get(name, 0) + 1

    def news(self) -> dict[str, int]:
        return self.starts

    def stop(self) -> None:
        self.asked += 1

    def times_asked(self) -> int:
        return self.asked


def play(cell: str, script: str, fresh: list[str], code: bytes, commit: str, packed: bytes,
         board, timeout: float) -> tuple[int | None, float, bytes, str]:
    """On a node: run `python script`, with the flags `fresh`, or from a packed run folder with a checkpoint.

    Returns exit status (None: not started), seconds, the run folder packed, the log.
    """
    def asked() -> int:
        return ray.get(board.times_asked.remote())

    if asked():
        return None, 0.0, b"", ""
    ray.get(board.start.remote(cell))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as parent:
        root, folder, log = Path(parent, "code"), Path(parent, "run"), Path(parent, "log")
        unpack(code, root)
        unpack(packed, folder)
        resumes = (folder / "checkpoint.pt").is_file()
        where = [*fresh, "--resume" if resumes else "--run-dir", str(folder)]
        command = [sys.executable, script, *where]
        with log.open("w") as file:
            child = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                     env={**os.environ, "OMP_NUM_THREADS": "1", "RUN_COMMIT": commit},
                                     preexec_fn=die_with_parent, start_new_session=True)
            returncode = attend(child, asked, timeout)
        text = f"$ {shlex.join(command)}\n{log.read_text(errors='replace')}"
        return returncode, time.monotonic() - start, pack(*folder.glob("*")), text


class RayEngine:
    """Same interface as the local engine; how many cells run at a time is the cluster's business."""

    def __init__(self, address: str, gpus: float, timeout: float):
        self.stop, self.gpus, self.timeout = 0, gpus, timeout
        self.first = math.inf  # when the first signal came
        address = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdigit():  # Ray would try for many minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address, log_to_driver=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"no Ray cluster at {address} ({str(error).splitlines()[0]}); start one with `ray start "
                             "--head`, or name it with --ray-address") from error
        if not any(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 and node["Resources"].get("GPU", 0) >= gpus
                   for node in ray.nodes()):  # Ray would wait for one for ever
            raise ValueError(f"no node of the cluster has a CPU and {gpus:g} GPUs for a cell: lower --gpus, or start a "
                             "node with `ray start --num-gpus`")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()

    def ask_to_stop(self, signum: int, _frame) -> None:
        now = time.monotonic()
        self.first = min(self.first, now)
        if self.stop and now < self.first + ECHO:
            return
        self.stop = signum
        self.board.stop.remote()

    def run(self, cells: list[Cell]) -> dict[Cell, int | None]:
        """{cell: exit status}, None for cells that were not started."""
        handlers = {s: signal.signal(s, self.ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        outcomes, pending, seen = dict.fromkeys(cells), {}, {}
        task = ray.remote(play).options(num_cpus=1, num_gpus=self.gpus, max_retries=-1)
        rooms = ("algos", "envs", "knowledge", "llm", "runtime", "buffers.py", "networks.py", "pt2.py",
                 "streamnet.py", "env_id.py", "errors.py", "start.py")
        code = ray.put(pack(*(ROOT / name for name in rooms)))

        def git(*words: str) -> str:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        commit = git("describe", "--always") if shutil.which("git") else ""
        if commit and git("status", "--porcelain", "--", *rooms):  # as runtime.describe_machine
            commit += "-dirty"
        for cell in cells:
            try:
                if not (log := cell.claim()):
                    continue
                packed = pack(*cell.folder.glob("*")) if (cell.folder / "checkpoint.pt").is_file() else pack()
            except OSError as error:
                outcomes[cell] = cell.failed(error)
                continue
            pending[task.remote(cell.name, cell.script, cell.fresh, code, commit, packed, self.board,
                                self.timeout)] = cell, log
        while pending:
            done, _ = ray.wait(list(pending), timeout=1)
            for name, starts in ray.get(self.board.news.remote()).items():
                if starts != seen.get(name):
                    say(("starts   " if name not in seen else "again    ") + name)
                    seen[name] = starts
            for reference in done:
                cell, log = pending.pop(reference)
                try:
                    with log:
                        outcomes[cell] = self.bring_back(cell, reference, log)
                except OSError as error:
                    outcomes[cell] = cell.failed(error)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        return outcomes

    def bring_back(self, cell: Cell, reference: ray.ObjectRef, log: IO[str]) -> int | None:
        """Put the run folder and the log of a task that has ended where they belong; returns its exit status. Raises
        OSError where they cannot be written."""
        try:
            returncode, seconds, packed, text = ray.get(reference)
        except ray.exceptions.RayError as error:
            returncode, seconds, packed, text = 1, 0.0, b"", f"{error}\n"
        log.write(text)
        if packed:
            unpack(packed, cell.folder)
        if returncode is not None and not (self.stop and returncode):
            cell.record(returncode, seconds)
        return returncode
