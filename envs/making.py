"""Making environments: one, or a thin vector of many."""
import os
import re
import sys
from contextlib import contextmanager

import gymnasium as gym
import numpy as np

import envs.multigoal  # registers MultiGoal-v0
from envs import foreign
from envs.babyai_text import BabyAITextVectorEnv
from envs.crafter_text import CrafterVectorEnv, is_crafter
from envs.dynamics import IDS as DYNAMICS
from envs.dynamics import DynamicsVectorEnv, FrankaTasksVectorEnv
from envs.encoders import COPIES, exact, make_encoder
from envs.fetch import FetchVectorEnv
from envs.franka import IDS as FRANKA
from envs.franka import FrankaVectorEnv
from envs.franka_button import IDS as BUTTON
from envs.franka_button import ButtonVectorEnv
from envs.ids import EnvError, resolve, split_view
from envs.minigrid import MiniGridVectorEnv, PlainMiniGridVectorEnv, is_grid, shows_grid
from envs.mobile import IDS as MOBILE
from envs.mobile import MobileVectorEnv
from envs.vector import GymVectorEnv, VectorEnv
from envs.wrapped import EncodedVectorEnv, FrameStack


@contextmanager
def named(env_id: str):
    """What goes wrong in making `env_id`, missing packages and unknown arguments, as EnvError."""
    try:
        yield
    except (gym.error.Error, ImportError, TypeError) as error:
        if isinstance(error, TypeError) and "keyword argument" not in str(error):
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvError(f"{env_id} cannot be made: {why}") from error


def make(env_id: str, **kwargs) -> gym.Env:
    """One gymnasium environment, ids resolved as in `resolve`. Raises EnvError for an unknown id, an unknown argument,
    a missing package, or a window where there is no display (MuJoCo would abort the process)."""
    if (kwargs.get("render_mode") == "human" and sys.platform == "linux"
            and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)):
        raise EnvError(f"{env_id}: render_mode='human' opens a window, and there is no display; 'rgb_array' needs none")
    with named(env_id):
        return gym.make(resolve(env_id), **kwargs)


def make_vec(env_id: str, num_envs: int, seed: int | None = None, threads: int = 1, fast: bool = True,
             goal_range: float = 0.0, encoder: str = "", frame_stack: int = 1, action_repeat: int = 1, **kwargs
             ) -> VectorEnv:
    """`num_envs` copies of `env_id`, the fast class where there is one (`fast=False`: never), reset when seeded.

    With `goal_range`, Fetch and Franka draw their goals from so many tenths of their range. `encoder` makes numbers of
    pictures (envs/encoders.py). `frame_stack` shows the last observations together, the newest last. `action_repeat`
    takes every action so often, while the episode lasts. All three may also stand behind the id (`split_view`).

    Raises EnvError for an unknown id, an unknown argument, a missing package, observations that are neither flat arrays
    nor pictures, actions that are no flat arrays, and `num_envs` < 1.
    """
    bare_id, said = split_view(env_id)
    view = {"encoder": encoder, "frame_stack": frame_stack, "action_repeat": action_repeat} | said
    for name, number in (("num_envs", num_envs), *list(view.items())[1:]):
        if number < 1:
            raise EnvError(f"{name} must be at least 1, not {number}")
    resolved, encoder = resolve(env_id), view["encoder"]
    if encoder not in ("", "ground_truth") and "pixels" in gym.spec(resolved).kwargs:
        kwargs["pixels"] = True
    vec = make_plain(env_id, resolved, num_envs, threads, fast, goal_range, view["action_repeat"], **kwargs)
    space = vec.observation_space
    if encoder and (encoder == "ground_truth") == is_picture(space):
        raise EnvError(f"{resolved} observes {space}; the encoder ground_truth is for numbers, others are for pictures")
    if encoder not in ("", "ground_truth", "pixels"):
        encoder = exact(encoder, resolved)
        options = {key: value for key, value in kwargs.items() if key != "render_mode"}
        frames = make_plain(env_id, resolved, COPIES, threads, fast, goal_range, 1, **options)
        vec = EncodedVectorEnv(vec, make_encoder(encoder, resolved, frames, repr(sorted(options.items()))))
        frames.close()
        words = [f"{word}={said[word]}" for word in ("frame_stack", "action_repeat") if word in said]
        vec.exact_id = ":".join([bare_id, *words, encoder])
    if view["frame_stack"] > 1:
        vec = FrameStack(vec, view["frame_stack"])
    if seed is not None:
        vec.reset(seed)
    return vec


def make_plain(env_id: str, resolved: str, num_envs: int, threads: int, fast: bool, goal_range: float,
               action_repeat: int, **kwargs) -> VectorEnv:
    """`num_envs` copies that are observed as they are; see `make_vec`."""
    fast = fast and action_repeat == 1
    with named(env_id):
        if action_repeat > 1 and (is_crafter(resolved) or is_grid(resolved) or "split" in kwargs):
            raise EnvError(f"{resolved} takes no action_repeat; leave it out")
        elif fast and re.fullmatch(r"Fetch(Reach|Push|Slide|PickAndPlace)(Dense)?-v4", resolved):
            vec = FetchVectorEnv(resolved, num_envs, threads=threads, goal_range=goal_range, **kwargs)
        elif fast and resolved in DYNAMICS:
            vec = DynamicsVectorEnv(resolved, num_envs, threads=threads, goal_range=goal_range, **kwargs)
        elif resolved == "FrankaSkill-v0" and "split" in kwargs:
            vec = FrankaTasksVectorEnv(resolved, num_envs, threads=threads, goal_range=goal_range, **kwargs)
        elif fast and resolved in FRANKA:
            vec = FrankaVectorEnv(resolved, num_envs, threads=threads, goal_range=goal_range, **kwargs)
        elif fast and resolved in BUTTON:
            vec = ButtonVectorEnv(resolved, num_envs, threads=threads, goal_range=goal_range, **kwargs)
        elif fast and resolved in MOBILE:
            vec = MobileVectorEnv(resolved, num_envs, goal_range=goal_range, **kwargs)
        elif is_crafter(resolved):
            vec = CrafterVectorEnv(resolved, num_envs, **kwargs)
        elif fast and resolved.startswith("BabyAI-Text-"):
            vec = BabyAITextVectorEnv(resolved, num_envs, **kwargs)
        elif is_grid(resolved) and shows_grid(probe := foreign.make(resolved, **kwargs)):
            kind = MiniGridVectorEnv if fast and MiniGridVectorEnv.fits(probe) else PlainMiniGridVectorEnv
            vec = kind(resolved, num_envs, **kwargs)
        else:
            vec = GymVectorEnv(resolved, num_envs, goal_range=goal_range, action_repeat=action_repeat, **kwargs)
            space = vec.observation_space
            goals = ("observation", "achieved_goal", "desired_goal")
            parts, actions = [space.get(name) for name in goals] if vec.is_goal_env else [space], vec.action_space
            if not is_picture(space) and not all(isinstance(part, gym.spaces.Box) and len(part.shape) == 1
                                                 for part in parts):
                raise EnvError(f"{env_id} observes {space}; flat arrays are needed (Box of one dimension, or those of "
                               "a goal task), or pictures (height, width, channels) of uint8: "
                               "gymnasium.wrappers.FlattenObservation makes one")
            if vec.is_goal_env and parts[1].shape != parts[2].shape:
                raise EnvError(f"{env_id} declares achieved goals of shape {parts[1].shape} and desired ones of shape "
                               f"{parts[2].shape}; hindsight puts one in the place of the other: make them alike")
            if isinstance(actions, gym.spaces.Box) and not (
                    len(actions.shape) == 1 and actions.dtype.kind == "f" and actions.is_bounded()):
                raise EnvError(f"{env_id} takes {actions} as actions; bounded numbers in one dimension are needed")
    return vec


def is_picture(space: gym.Space) -> bool:
    """Whether observations are pictures (height, width, channels) of bytes."""
    return isinstance(space, gym.spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8
