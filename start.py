"""What has to be set before numpy and torch are imported. Every script imports this first."""
import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads fight with torch's for the cores
_renderer = os.environ.get("MUJOCO_GL", "").lower().strip()
if _renderer not in ("", "egl", "osmesa", "glfw", "glx", "cgl", "wgl", "disable", "disabled", "off", "false", "0",
                     "enable", "enabled", "on", "true", "1"):  # with another one, mujoco cannot be imported
    print(f"MUJOCO_GL is {_renderer}, which no renderer of MuJoCo is called: egl, osmesa or glfw, or unset it",
          file=sys.stderr)
    sys.exit(2)
_shown = sys.excepthook


def _excepthook(kind, error, trace) -> None:
    """A Ctrl-C in the seconds that torch takes to be imported is one line, as it is later (runtime.exit_codes)."""
    first = error
    while first is not None and not isinstance(first, KeyboardInterrupt):
        first = first.__cause__ or first.__context__  # in the middle of mujoco it becomes an ImportError
    if first is None:
        _shown(kind, error, trace)
    else:
        print("interrupted", file=sys.stderr)


sys.excepthook = _excepthook
