"""One thread: what tests compute is too small for two, which on a busy machine wait for each other. And no exports."""
import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would its children
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes take it over

import pytest

import runtime


@pytest.fixture(autouse=True)
def no_exports(request, monkeypatch):
    """Runs of this process leave no policy.pt2, which takes longer to write than a short run takes; marked tests do."""
    if not request.node.get_closest_marker("exports"):
        monkeypatch.setattr(runtime.policy, "save_policy", lambda *args: False)
