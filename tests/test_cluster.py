"""The Ray backend on a real cluster of two nodes on this machine."""
import math
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.test_bench import bench, suite

from benchmarks.run import Args, Cell, load_suite

pytest.importorskip("ray", reason="pip install ray==2.60.0")
from ray.cluster_utils import Cluster  # noqa: E402

STORE = 100_000_000  # bytes; Ray's default is a share of the machine per node


def read(path: Path) -> list[str]:
    """Of a process: its arguments, or its environment; nothing once it is gone."""
    try:
        return path.read_text().split("\0")
    except OSError:
        return []


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    (tmp_path / "node").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "node"))  # where tasks keep their run folders
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # Ray's own sockets need a short path
    monkeypatch.setenv("RAY_worker_niceness", "0")  # on a busy machine tasks would starve
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    yield cluster
    cluster.shutdown()


def test_a_driver_killed_while_it_swaps_loses_nothing(tmp_path, monkeypatch):
    from benchmarks import cluster

    cell, back = Cell("sac", "Line-v0", 1, (), tmp_path), tmp_path / "checkpoint.pt"
    cell.folder.mkdir(parents=True)
    (cell.folder / "checkpoint.pt").write_text("old")
    back.write_text("new")
    replace = cluster.os.replace
    for swaps in (0, 1):  # renames that were done before the kill
        left = iter(range(swaps))

        def cut(*paths):
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(*paths)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cluster.os, "replace", cut)
            cluster.unpack(cluster.pack(back), cell.folder)
        cell.claim().close()
        assert (cell.folder / "checkpoint.pt").read_text() == "old"
    cluster.unpack(cluster.pack(back), cell.folder)
    assert (cell.folder / "checkpoint.pt").read_text() == "new" and not cell.beside(".old").exists()


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    from benchmarks import cluster

    engine, asked = object.__new__(cluster.RayEngine), []  # without a cluster
    engine.stop, engine.first = 0, math.inf
    engine.board = SimpleNamespace(stop=SimpleNamespace(remote=lambda: asked.append(signal.SIGTERM)))
    for now, times in ((100.0, 1), (101.9, 1), (102.1, 2)):
        monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: now))
        engine.ask_to_stop(signal.SIGTERM, None)
        assert len(asked) == times and engine.stop == signal.SIGTERM


@pytest.mark.slow
def test_a_dead_node_costs_nothing(cluster, tmp_path):
    """Three cells on two nodes, one node killed while its cell trains: all finish, each once, results are here."""
    path = suite(tmp_path, *(f"--total-timesteps 3000 --gamma 0.9{i}" for i in range(3)))
    node = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    cluster.wait_for_nodes()
    flags = ["--backend", "ray", "--ray-address", cluster.address]
    engine = bench(path, *flags)
    lines = []
    while sum("starts " in line for line in lines) < 2:  # one on each node, the third waits
        lines.append(line := engine.stdout.readline())
        assert line, "".join(lines)
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    output = "".join(lines) + engine.communicate()[0]
    assert engine.returncode == 0 and "3 of 3 cells finished" in output, output
    assert output.count("again ") == 1 and output.count("finished sac_kian") == 3, output
    for cell in load_suite(Args(suite=str(path), root=str(tmp_path / "runs"))):
        steps = [int(line.split(",")[0]) for line in (cell.folder / "eval.csv").read_text().splitlines()[1:]]
        assert cell.finished() and steps[0] == 0 and steps[-1] == 3000 and steps == sorted(set(steps))
        assert cell.beside(".log").read_text().count("$ ") == 1  # what came back is of one attempt


@pytest.mark.slow
def test_shared_gpu_and_a_stop(cluster, tmp_path):
    """Two cells share a GPU (one that Ray is only told of), the third waits though a core is free. SIGTERM at the
    driver: cells save on their node, checkpoints come back, the next call resumes them."""
    path = suite(tmp_path, *(f"--total-timesteps 200000 --gamma 0.9{i}" for i in range(3)))
    flags = ["--backend", "ray", "--ray-address", cluster.address, "--gpus"]
    cluster.add_node(num_cpus=3, num_gpus=1, object_store_memory=STORE)
    cluster.wait_for_nodes()
    greedy = bench(path, *flags, "2")
    output = greedy.communicate()[0]
    assert greedy.returncode == 2 and output.splitlines()[-1].startswith("bench: no node"), output
    engine = bench(path, *flags, "0.5")
    while len(saved := list((tmp_path / "node").glob("*/run/checkpoint.pt"))) < 2:
        assert engine.poll() is None, engine.stdout.read()
        time.sleep(0.1)
    assert len(list((tmp_path / "node").glob("*/run"))) == 2
    running = [p for p in Path("/proc").glob("[0-9]*/cmdline") if any(str(s.parent) in read(p) for s in saved)]
    assert len(running) == 2 and all("CUDA_VISIBLE_DEVICES=0" in read(p.parent / "environ") for p in running)
    engine.send_signal(signal.SIGTERM)
    output = engine.communicate()[0]
    assert engine.returncode == 128 + signal.SIGTERM and "the same command goes on" in output, output
    cells = load_suite(Args(suite=str(path), root=str(tmp_path / "runs")))
    assert sum((cell.folder / "checkpoint.pt").is_file() for cell in cells) == 2
    assert not any(cell.finished() or cell.beside(".json").exists() for cell in cells)
    assert bench(path, "--dry-run").communicate()[0].count("--resume") == 2
