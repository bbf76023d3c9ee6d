"""Check this machine, one line per thing, and say what to fix: make doctor

Exit status 0: training works; 1: something that training needs is broken. Optional things only warn.
"""
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FAMILIES = {"classic control": "Pendulum-v1", "MuJoCo": "HalfCheetah-v5", "Fetch": "FetchPickAndPlace-v4",
            "Franka": "FrankaPickAndPlaceSparse-v0", "MiniGrid": "MiniGrid-DoorKey-5x5-v0"}


def python() -> str:
    if sys.version_info < (3, 11):
        raise RuntimeError(f"Python {sys.version.split()[0]} is too old; install 3.11 or newer, then: make clean setup")
    return sys.version.split()[0]


def packages() -> str:
    """Installed versions are those that the committed curves were made with."""
    wrong = []
    line = re.compile(r'^([\w-]+)==([\w.]+)(?:; sys_platform == "(\w+)")?', re.M)
    for name, wanted, platform in line.findall((ROOT / "requirements.txt").read_text()):
        if platform not in ("", sys.platform):  # for another system
            continue
        try:
            found = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != wanted:
            wrong.append(f"{name} is {found}, not {wanted}")
    if wrong:
        raise RuntimeError(f"{'; '.join(wrong)}; run: make clean setup")
    return "as in requirements.txt"


def environment(env_id: str) -> Callable[[], str]:
    def check() -> str:
        """One reset and one step."""
        import numpy as np

        import envs

        vec = envs.make_vec(env_id, 2, seed=1)
        obs, reward, *_ = vec.step(np.zeros((2, *vec.action_space.shape), vec.action_space.dtype))
        parts = obs.values() if isinstance(obs, dict) else [obs]
        if not all(np.isfinite(part).all() for part in (reward, *parts)):
            raise RuntimeError(f"{env_id} steps into NaN; reinstall mujoco: make clean setup")
        return f"{env_id} resets and steps"
    return check


def rendering() -> str:
    import envs

    chosen = os.environ.get("MUJOCO_GL")
    unset = f"unset MUJOCO_GL, which is {chosen}, or " if chosen else ""
    fix = f"{unset}as root: apt-get install libegl1 libgl1 libosmesa6"
    if not (name := envs.find_renderer()):
        raise RuntimeError(f"no {chosen or 'EGL or OSMesa'}, so no video; {fix}")
    try:
        env = envs.make("FetchReach-v4", render_mode="rgb_array")
        env.reset(seed=1)
        frame = env.render()
        env.close()
    except Exception as error:  # each renderer has its own
        raise RuntimeError(f"{name} does not render, so no video; {fix}") from error
    if frame.std() == 0:
        raise RuntimeError(f"{name} renders a blank frame; try MUJOCO_GL=osmesa")
    return f"a {frame.shape[1]}x{frame.shape[0]} frame with {name}"


def threads() -> str:
    import torch

    used, cores = torch.get_num_threads(), os.cpu_count()
    if used > cores:
        raise RuntimeError(f"{used} threads on {cores} cores slow each other down; set OMP_NUM_THREADS={cores}")
    return f"{used} of {cores} cores, {torch.backends.cpu.get_cpu_capability()}; one run per core: OMP_NUM_THREADS=1"


def device() -> str:
    import torch

    if torch.cuda.is_available():
        torch.ones(8, device="cuda").sum().item()
        return torch.cuda.get_device_name()
    if shutil.which("nvidia-smi"):
        raise RuntimeError("there is a GPU, but this torch has no CUDA; install the CUDA build of torch 2.13.0")
    return "cpu"


def compiler() -> str:
    """Not only found: it compiles a function."""
    import torch

    if not shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")):  # as torch does
        raise RuntimeError("no C++ compiler, so no compiled updates (slower, same results); apt-get install g++")
    x = torch.linspace(0, 1, 8)
    if not torch.allclose(torch.compile(lambda y: y.sin() + 1)(x), x.sin() + 1):
        raise RuntimeError("a compiled function returns wrong numbers; train with --no-compile")
    return "compiles"


def disk() -> str:
    free = shutil.disk_usage(ROOT).free / 1e9
    with tempfile.NamedTemporaryFile(dir=ROOT):
        pass
    if free < 2:
        raise RuntimeError(f"{free:.1f} GB free under {ROOT}; a run of a million steps keeps up to 0.6 GB")
    return f"{free:.0f} GB free"


REQUIRED = {"Python": python, "packages": packages, **{name: environment(i) for name, i in FAMILIES.items()}}
OPTIONAL = {"rendering": rendering, "compiler": compiler, "device": device, "threads": threads, "disk": disk}


def main() -> int:
    broken = 0
    for name, check in (REQUIRED | OPTIONAL).items():
        try:
            word, said = "ok", check()
        except Exception as error:  # whatever is wrong is what we are here to say
            word = "BROKEN" if name in REQUIRED else "warning"
            said = (str(error) or type(error).__name__).splitlines()[0]
            broken += name in REQUIRED
        print(f"{word:8}{name:17}{said}", flush=True)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
