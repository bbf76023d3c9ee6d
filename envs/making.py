"""Making environments: one, or a thin vector of many."""
import os
import re
import sys
from contextlib import contextmanager

import gymnasium as gym

import envs.multigoal  # registers MultiGoal-v0
from envs.babyai_text import BabyAITextVectorEnv
from envs.crafter_text import CrafterVectorEnv, is_crafter
from envs.dynamics import IDS as DYNAMICS
from envs.dynamics import DynamicsVectorEnv, FrankaTasksVectorEnv
from envs.fetch import FetchVectorEnv
from envs.franka import IDS as FRANKA
from envs.franka import FrankaVectorEnv
from envs.ids import EnvError, resolve
from envs.minigrid import MiniGridVectorEnv, PlainMiniGridVectorEnv, is_grid
from envs.vector import GymVectorEnv, VectorEnv


@contextmanager
def named(env_id: str):
    """What goes wrong in making `env_id`, missing packages and unknown arguments, as EnvError."""
    try:
        yield
    except (gym.error.Error, ImportError, TypeError) as error:
        if isinstance(error, TypeError) and "keyword argument" not in str(error):
            raise
        raise EnvError(f"{env_id} cannot be made: {str(error).splitlines()[0]}") from error


def make(env_id: str, **kwargs) -> gym.Env:
    """One gymnasium environment, ids resolved as in `resolve`. Raises EnvError for an unknown id, an unknown argument,
    a missing package, or a window where there is no display (MuJoCo would abort the process)."""
    if (kwargs.get("render_mode") == "human" and sys.platform == "linux"
            and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)):
        raise EnvError(f"{env_id}: render_mode='human' opens a window, and there is no display; 'rgb_array' needs none")
    with named(env_id):
        return gym.make(resolve(env_id), **kwargs)


def make_vec(env_id: str, num_envs: int, seed: int | None = None, threads: int = 1, fast: bool = True,
             goal_range: float = 0.0, **kwargs) -> VectorEnv:
    """`num_envs` copies of `env_id`, the fast class where there is one (`fast=False`: never), reset when seeded.

    With `goal_range`, Fetch and Franka draw their goals from so many tenths of their range. Raises EnvError for an
    unknown id, an unknown argument, a missing package, observations or actions that are no flat arrays, and
    `num_envs` < 1.
    """
    if num_envs < 1:
        raise EnvError(f"num_envs must be at least 1, not {num_envs}")
    resolved = resolve(env_id)
    with named(env_id):
        if fast and re.fullmatch(r"Fetch(Reach|Push|Slide|PickAndPlace)(Dense)?-v4", resolved):
            vec = FetchVectorEnv(resolved, num_envs, threads=threads, goal_range=goal_range, **kwargs)
        elif fast and resolved in DYNAMICS:
            vec = DynamicsVectorEnv(resolved, num_envs, threads=threads, goal_range=goal_range, **kwargs)
        elif resolved == "FrankaSkill-v0" and "split" in kwargs:
            vec = FrankaTasksVectorEnv(resolved, num_envs, threads=threads, goal_range=goal_range, **kwargs)
        elif fast and resolved in FRANKA:
            vec = FrankaVectorEnv(resolved, num_envs, threads=threads, goal_range=goal_range, **kwargs)
        elif is_crafter(resolved):
            vec = CrafterVectorEnv(resolved, num_envs, **kwargs)
        elif fast and resolved.startswith("BabyAI-Text-"):
            vec = BabyAITextVectorEnv(resolved, num_envs, **kwargs)
        elif is_grid(resolved):
            probe = gym.make(resolved, disable_env_checker=True, **kwargs) if fast else None
            kind = MiniGridVectorEnv if fast and MiniGridVectorEnv.fits(probe) else PlainMiniGridVectorEnv
            vec = kind(resolved, num_envs, **kwargs)
        else:
            vec = GymVectorEnv(resolved, num_envs, goal_range=goal_range, **kwargs)
            space = vec.observation_space
            goals = ("observation", "achieved_goal", "desired_goal")
            parts, actions = [space.get(name) for name in goals] if vec.is_goal_env else [space], vec.action_space
            if not all(isinstance(part, gym.spaces.Box) and len(part.shape) == 1 for part in parts):
                raise EnvError(f"{env_id} observes {space}; flat arrays are needed (Box of one dimension, or those of "
                               "a goal task): gymnasium.wrappers.FlattenObservation makes one")
            if isinstance(actions, gym.spaces.Box) and not (
                    len(actions.shape) == 1 and actions.dtype.kind == "f" and actions.is_bounded()):
                raise EnvError(f"{env_id} takes {actions} as actions; bounded numbers in one dimension are needed")
    if seed is not None:
        vec.reset(seed)
    return vec
