"""One thread: what tests compute is too small for two, which on a busy machine wait for each other. And no exports."""
import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would its children
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes take it over

import pytest

import runtime


def pytest_collection_modifyitems(config, items):
    """Slow tests run in continuous integration (CI=1), and when they are asked for by name or by `-m slow`."""
    if os.environ.get("CI") or config.option.markexpr or any("::" in arg for arg in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def no_exports(request, monkeypatch):
    """Runs of this process leave no policy.pt2, which takes longer to write than a short run takes; marked tests do."""
    if not request.node.get_closest_marker("exports"):
        monkeypatch.setattr(runtime.policy, "save_policy", lambda *args: False)
