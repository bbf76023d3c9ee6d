"""The Ray backend on a real cluster of two nodes on this machine."""
import signal
import time

import pytest
from test_bench import bench, suite

from benchmarks.run import Args, load_suite

pytest.importorskip("ray", reason="pip install ray==2.60.0")
from ray.cluster_utils import Cluster  # noqa: E402

STORE = 100_000_000  # bytes; Ray's default is a share of the machine per node


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    (tmp_path / "node").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "node"))  # where tasks keep their run folders
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # Ray's own sockets need a short path
    monkeypatch.setenv("RAY_worker_niceness", "0")  # on a busy machine tasks would starve
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    yield cluster
    cluster.shutdown()


def test_a_dead_node_costs_nothing(cluster, tmp_path):
    """Three cells on two nodes, one node killed while its cell trains: all finish, each once, results are here."""
    path = suite(tmp_path, *(f"--total-timesteps 1000 --gamma 0.9{i}" for i in range(3)))
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
        assert cell.finished() and steps[0] == 0 and steps[-1] == 1000 and steps == sorted(set(steps))
        assert cell.beside(".log").read_text().count("$ ") == 1  # what came back is of one attempt


def test_a_stopped_cluster_run_goes_on(cluster, tmp_path):
    """SIGTERM at the driver: the cell saves on its node, its checkpoint comes back, the next call resumes it."""
    path = suite(tmp_path, "--total-timesteps 200000")
    cell, = load_suite(Args(suite=str(path), root=str(tmp_path / "runs")))
    flags = ["--backend", "ray", "--ray-address", cluster.address]
    engine = bench(path, *flags)
    while not list((tmp_path / "node").glob("*/run/checkpoint.pt")):
        assert engine.poll() is None
        time.sleep(0.1)
    engine.send_signal(signal.SIGTERM)
    output = engine.communicate()[0]
    assert engine.returncode == 128 + signal.SIGTERM and "the same command goes on" in output, output
    assert (cell.folder / "checkpoint.pt").is_file() and not cell.finished()
    assert "--resume" in bench(path, "--dry-run").communicate()[0]
