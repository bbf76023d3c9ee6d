"""Environment ids: old ones become today's, unknown ones get a hint."""
import contextlib
import difflib
import importlib
import io
import os
import re
import sys
from pathlib import Path
import warnings

import gymnasium as gym

from env_id import split_id
from errors import UserError

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # minigrid imports pygame, which greets on stdout
with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice about hand environments at every import
    import gymnasium_robotics
    import minigrid

gym.register_envs(gymnasium_robotics)
gym.register_envs(minigrid)
warnings.filterwarnings("ignore", r".*MiniGrid-\S+ is out of date")  # `resolve` says it in one plain line
_announced: set[str] = set()


class EnvError(UserError):
    """An environment that cannot be had as asked; the message is one line that names the remedy."""


def split_view(env_id: str) -> tuple[str, dict]:
    """An id without what stands behind it, and that: how observations are shown, arguments of `make_vec`.

    `MobileRobot-v0:pca:frame_stack=2` -> `MobileRobot-v0`, {"encoder": "pca", "frame_stack": 2}. An encoder
    `run:RUN_DIR` is the last word. Raises EnvError for words that make no sense.
    """
    if env_id.endswith(":"):
        raise EnvError(f"{env_id!r} ends in a colon; leave it out, or say how it is observed, as in {env_id}pca")
    module, task, rest = split_id(env_id)
    bare_id, view = f"{module}:{task}" if module else task, {}
    while rest:
        word, _, rest = (rest, "", "") if rest.startswith("run:") else rest.partition(":")
        key, equals, value = word.partition("=")
        key, value = (key, value) if equals and not word.startswith("run:") else ("encoder", word)
        if key != "encoder":
            if key not in ("frame_stack", "action_repeat") or not re.fullmatch(r"[1-9]\d{0,3}", value):
                raise EnvError(f"{word!r} behind {bare_id} makes no sense; known are an encoder, frame_stack=4 and "
                               "action_repeat=2")
            value = int(value)
        if key in view:
            raise EnvError(f"{env_id} has two of {key}; leave one out")
        view[key] = value
    return bare_id, view


def resolve(env_id: str) -> str:
    """The registered id behind `env_id`; old versions (FetchPush-v2) become today's (-v4), which stderr is told once.

    MiniGrid ids stay as they are. Prints one line on stderr if a -v0 task differs from its name or its paper.
    `my_file:Line-v0` imports my_file.py, of this folder or installed, which registers Line-v0, and
    `dir/my_file.py:Line-v0` imports that file. An encoder behind the id (`split_view`) is left out.

    Raises EnvError, with the nearest known ids, for an unknown one, and for a file that cannot be imported.
    """
    split_view(env_id)  # refuses words that make no sense
    module, env_id, _ = split_id(env_id)
    if module:
        is_file = module.endswith(".py")
        if is_file and not Path(module).is_file():
            raise EnvError(f"{module}, which is to register {env_id}, does not exist; check the path")
        folder = str(Path(module).resolve().parent) if is_file else os.getcwd()
        sys.path += [folder] * (folder not in sys.path)
        try:
            importlib.import_module(Path(module).stem if is_file else module)
        except Exception as error:  # a user's file raises anything
            if meant := [known for known in gym.registry if known.partition("-v")[0] == module]:
                raise EnvError(f"{module}:{env_id} lacks a version; did you mean {meant[-1]}:{env_id}?") from error
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            raise EnvError(f"{module}, which is to register {env_id}, fails to import: {line}") from error
    base, _, version = env_id.partition("-v")
    installed = sorted((int(m[1]), known) for known in gym.registry
                       if (m := re.fullmatch(re.escape(base) + r"-v(\d+)", known)))
    fetch = base.startswith("Fetch")
    if env_id in gym.registry and not (fetch and version == "1"):  # Fetch v1 needs the retired mujoco-py
        if env_id == "MiniGrid-MultiRoom-N4-S5-v0":
            announce(f"{env_id} has 6 rooms in the installed minigrid; {base}-v1 has the 4 of its name")
        elif env_id.startswith("MiniGrid-") and installed and env_id != installed[-1][1]:
            announce(f"{env_id} has a corrected version, {installed[-1][1]}")
        return env_id
    if installed and fetch and not (version.isdigit() and int(version) > installed[-1][0]):
        current = installed[-1][1]
        announce(f"{env_id} is {current} in the installed gymnasium-robotics: dynamics and start states "
                 f"differ from published {env_id} numbers")
        return current
    known = [name for name in gym.registry if not re.fullmatch(r"Fetch\w+-v\d+", name)]
    tasks = ("Reach", "Push", "Slide", "PickAndPlace")
    known += [f"Fetch{task}{dense}-v2" for dense in ("", "Dense") for task in tasks]
    names = difflib.get_close_matches(env_id, known, n=2)
    hint = f"; did you mean {' or '.join(names)}?" if names else ""
    meant = Path(module if module.endswith(".py") else f"{module}.py")
    found = getattr(sys.modules.get(meant.stem), "__file__", None)
    if module and found and meant.is_file() and Path(found).resolve() != meant.resolve():
        raise EnvError(f"{meant} is not loaded: another module has its name ({found}); rename it")
    yours = "" if module or names else "; one of yours is my_file.py:My-v0, where my_file.py registers it"
    raise EnvError(f"unknown environment id {env_id!r}{hint}{yours}")


def announce(line: str) -> None:
    """Tell stderr a line, once."""
    if line not in _announced:
        print(line, file=sys.stderr)
        _announced.add(line)
