"""Other people's environments: what they return is checked, and what they fail with is said in one line.

A run that goes on with a NaN, or with the wrong one of two numbers, costs a night and says nothing.
"""
import math
import traceback
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np

from envs.ids import EnvError

NUMBERS = (float, int, bool, np.float64, np.float32)  # rewards that need no second look
ENDS = (bool, np.bool_, int, np.integer)
OURS = ("envs", "gymnasium", "gymnasium_robotics", "minigrid", "minatar", "shimmy", "ale_py")  # packages without a trial
TRIED: set[tuple] = set()  # what was tried in this process
TRIAL = 10  # steps


def make(env_id: str, **kwargs) -> gym.Env:
    """`gym.make` of an id. Somebody else's environment is tried before, in a copy of its own, so that what is wrong
    with it is said before a run begins. Raises EnvError for that."""
    spec = gym.spec(env_id)
    maker = spec.entry_point if isinstance(spec.entry_point, str) else getattr(spec.entry_point, "__module__", "")
    if maker.split(":")[0].split(".")[0] not in OURS or spec.additional_wrappers:
        if (env_id, spec.entry_point) not in TRIED:
            attempt(construct(env_id, **kwargs))
            TRIED.add((env_id, spec.entry_point))
    return construct(env_id, **kwargs)


@contextmanager
def global_draws_kept():
    """Numpy's global generator, which environments may draw from, is afterwards as it was before."""
    drawn = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(drawn)


@global_draws_kept()
def attempt(env: gym.Env) -> None:
    """Play TRIAL steps by random actions, and close it. Raises EnvError for whatever is wrong in them."""
    actions, over = env.action_space, False
    try:
        actions.seed(0)
        obs = reset(env, 0)[0]
        for _ in range(TRIAL):
            check_shapes(env, obs)
            parts = obs if isinstance(obs, dict) else {"": obs}
            check_finite(env, {name: np.asarray(x) for name, x in parts.items() if not isinstance(x, tuple)})
            if over:
                break
            obs, _, terminated, truncated, info = step(env, actions.sample())
            success_of(env, info)
            over = terminated or truncated
    finally:
        env.close()


def construct(env_id: str, **kwargs) -> gym.Env:
    """`gym.make`, with what the environment's own code fails with as EnvError."""
    try:
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
    except (gym.error.Error, ImportError, EnvError):
        raise
    except (Exception, SystemExit) as error:
        if "keyword argument" in str(error):  # of ours: envs.making says it
            raise
        raise failure(env_id, "its making", error) from error
    for name in ("observation_space", "action_space"):
        space = getattr(env, name, None)
        if not isinstance(space, gym.Space):
            raise EnvError(f"{env_id} declares no {name}; give it one of gymnasium.spaces")
        if 0 in (space.shape or ()) or isinstance(space, gym.spaces.Discrete) and space.n == 0:
            raise EnvError(f"{env_id} declares {space} as {name}, which holds nothing; one number at least is needed")
    return env


def reset(env: gym.Env, seed: int | None) -> tuple[Any, dict]:
    """Observation and info of a reset. Raises EnvError for a failure, and for what is not these two."""
    try:
        found = env.reset(seed=seed)
    except (Exception, SystemExit) as error:
        raise failure(env, "reset", error) from error
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
        raise EnvError(f"{env.spec.id}: reset returns {described(found)}, and has to return observation and info, a "
                       "dict, as gymnasium's environments do; an environment of the old gym needs a wrapper")
    return found


def step(env: gym.Env, action: Any) -> tuple[Any, float, bool, bool, dict]:
    """Observation, reward, terminated, truncated and info of a step. Raises EnvError for a failure, for what is not
    these five, and for a reward that is not one finite number."""
    try:
        found = env.step(action)
    except (Exception, SystemExit) as error:
        raise failure(env, "step", error) from error
    if not (isinstance(found, tuple) and len(found) == 5 and isinstance(found[4], dict)):
        raise EnvError(f"{env.spec.id}: step returns {described(found)}, and has to return observation, reward, "
                       "terminated, truncated and info, a dict; an environment of the old gym needs a wrapper")
    reward = found[1]
    plain = type(reward) in NUMBERS or np.ndim(reward) == 0 and np.asarray(reward).dtype.kind in "biuf"
    if not (plain and math.isfinite(reward)):
        raise EnvError(f"{env.spec.id}: step returns the reward {reward!r}, and has to return one finite number")
    if not (isinstance(found[2], ENDS) and isinstance(found[3], ENDS)):
        raise EnvError(f"{env.spec.id}: step returns terminated {found[2]!r} and truncated {found[3]!r}, and has to "
                       "return True or False for each")
    return found


def success_of(env: gym.Env, info: dict) -> float:
    """Success in the info of a step, NaN where it says nothing. Raises EnvError for what is not one number."""
    found = info.get("is_success", info.get("success", np.nan))
    try:
        return float(np.asarray(found, np.float64).reshape(()))
    except (TypeError, ValueError) as error:
        raise EnvError(f"{env.spec.id}: info has {found!r} as success, and has to have True or False") from error


def render(env: gym.Env) -> np.ndarray:
    """A picture (height, width, 3) of `env`. Raises EnvError for a failure, and for what is no picture."""
    try:
        frame = np.asarray(env.render())
    except Exception as error:
        raise failure(env, "render", error) from error
    if frame.ndim not in (2, 3) or frame.dtype.kind not in "buif":  # two: in grey
        raise EnvError(f"{env.spec.id}: render returns no picture, and has to return an array (height, width, 3) of "
                       "bytes")
    return frame


def finite(x: np.ndarray) -> bool:
    """Whether all numbers of an array are finite. They are if the sum of their squares is, which is quick to compute.
    That sum may also be too large for a number; then each of them is looked at."""
    return x.dtype.kind != "f" or math.isfinite(np.vdot(x, x)) or bool(np.isfinite(x).all())


def check_action(action: np.ndarray) -> None:
    """Raise EnvError for actions that are not finite: the environment is not what is wrong then."""
    if not finite(action):
        raise EnvError(f"actions hold {action[~np.isfinite(action)][0]}; give finite numbers. A run that comes to this "
                       "has diverged: lower --learning-rate, and begin anew")


def failure(env: gym.Env | str, what: str, error: BaseException) -> EnvError:
    """The line for an `error` of the environment (or its id): what failed, how, and where."""
    if isinstance(error, EnvError):
        return error
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = (str(error).splitlines() or [""])[0]
    if "expected 5, got 4" in said:  # gymnasium's wrappers unpack steps of the old gym
        said += "; an environment of the old gym needs a wrapper"
    env_id = env if isinstance(env, str) else env.spec.id
    return EnvError(f"{env_id} fails in {what}: {type(error).__name__}: {said} ({place.filename}:{place.lineno})")


def described(found: Any) -> str:
    """What an environment returned, in a few words."""
    return f"{len(found)} values" if isinstance(found, tuple) else f"one {type(found).__name__}"


def check_finite(env: gym.Env, obs: np.ndarray | dict[str, np.ndarray]) -> None:
    """Raise EnvError for an observation with a NaN or an infinite number."""
    if not all(map(finite, obs.values())) if isinstance(obs, dict) else not finite(obs):
        raise EnvError(f"{env.spec.id} observes a number that is not finite; correct the environment, or cut what has "
                       "blown up")


def check_shapes(env: gym.Env, obs: Any) -> None:
    """Raise EnvError for an observation of another shape than its space declares."""
    space = env.observation_space
    parts = [(obs, space, "")]
    if isinstance(space, gym.spaces.Dict):
        if not isinstance(obs, dict) or not space.spaces.keys() <= obs.keys():
            raise EnvError(f"{env.spec.id} declares {', '.join(space.spaces)} and observes {described(obs)}")
        parts = [(obs[name], part, f" {name}") for name, part in space.spaces.items()]
    for found, part, name in parts:
        if isinstance(part, gym.spaces.Box) and np.shape(found) != part.shape:
            raise EnvError(f"{env.spec.id} declares{name} observations of shape {part.shape} and returns one of shape "
                           f"{np.shape(found)}; correct one of the two")
