import os

import pytest

import envs


def need_renderer() -> None:
    """Skip the test that calls it where nothing can be drawn; continuous integration must be able to."""
    if not envs.find_renderer():
        assert "CI" not in os.environ, "continuous integration installs a renderer (make gl)"
        pytest.skip("neither EGL nor OSMesa works here")
