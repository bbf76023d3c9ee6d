"""Thin vector environments: plain arrays in, plain arrays out, autoreset in the same step.

They follow gymnasium's SAME_STEP convention: when an episode ends, `obs` is already the first observation of the next
episode and the true next observation is in `info["final_obs"]`. Here `final_obs` is always a full batch (equal to
`obs` where no episode ended), so that a replay buffer stores it without looking at flags.
"""
import contextlib
import weakref
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Callable

import gymnasium as gym
import mujoco
import numpy as np
import torch

from envs import foreign
from envs.ids import EnvError, announce

Observation = np.ndarray | dict[str, np.ndarray]

STATE = mujoco.mjtState.mjSTATE_INTEGRATION
# mj_step leaves in mjData the kinematics of *before* its last integration, and environments read them: Fetch puts its
# mocap body at xpos, Ant takes its torso's xpos for the position before a step. These arrays make a restore exact.
STALE = ("xpos", "xquat", "xipos", "geom_xpos", "site_xpos", "site_xmat", "cinert", "cvel", "cfrc_ext",
         "qfrc_actuator")
# What holds no state of a task, or is copied apart: spaces, generators, simulators, windows.
STATELESS = ("gymnasium", "gymnasium_robotics", "mujoco", "numpy", "pygame")
# Some resets write into the model: Reacher of dm_control moves its target's geom, Adroit's door its frame.
MODEL = ("actuator_", "body_", "dof_", "eq_", "geom_", "hfield_", "jnt_", "light_", "site_", "tendon_", "wrap_")


def mujoco_snapshot(model: mujoco.MjModel, data: mujoco.MjData) -> dict[str, np.ndarray]:
    """Copy of the simulator's integration state (positions, velocities, warm start, ...) and its stale kinematics."""
    state = np.empty(mujoco.mj_stateSize(model, STATE))
    mujoco.mj_getState(model, data, state, STATE)
    return {"state": state, **{name: getattr(data, name).copy() for name in STALE}}


def mujoco_restore(model: mujoco.MjModel, data: mujoco.MjData, snapshot: dict[str, np.ndarray]) -> None:
    """Inverse of `mujoco_snapshot`: every later mj_step gives the same bits as without the interruption."""
    mujoco.mj_setState(model, data, np.asarray(snapshot["state"]), STATE)
    for name in STALE:
        getattr(data, name)[:] = np.asarray(snapshot[name])


def model_snapshot(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """Copy of what a task may write into its model, meshes and textures aside."""
    fields = {name: getattr(model, name) for name in dir(model) if name.startswith(MODEL)}
    return {name: value.copy() for name, value in fields.items()
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size}


def model_restore(model: mujoco.MjModel, snapshot: dict[str, np.ndarray]) -> None:
    """Inverse of `model_snapshot`; to be followed by `mujoco_restore`."""
    for name, value in snapshot.items():
        getattr(model, name)[:] = np.asarray(value)


class Threads:
    """Up to `count` threads among which `num` simulators are shared; `mj_step` releases Python's lock."""

    def __init__(self, count: int, num: int):
        count = max(1, min(count, num))
        self.shares = [range(num * k // count, num * (k + 1) // count) for k in range(count)]
        self.pool = ThreadPoolExecutor(count - 1) if count > 1 else None

    def each(self, advance: Callable[[int], None]) -> None:
        """Call `advance(i)` for every simulator i."""
        def work(share: range) -> None:
            for i in share:
                advance(i)

        futures = [self.pool.submit(work, share) for share in self.shares[1:]]
        work(self.shares[0])
        for future in futures:
            future.result()

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown()


class VectorEnv:
    """Stepping, autoreset, time limit and time feature for `num_envs` copies of one environment.

    A subclass keeps the current observation of every copy, and says how to reset copy i, how to step all and how to
    observe all. The time feature appends 1 - t/T to "observation" of goal environments (1 after a reset, 0 at the
    end): with a time limit the value of a state depends on the steps left.

    Attributes: num_envs; observation_space, action_space of one copy; max_episode_steps (None without a time limit);
    is_goal_env, whether observations have a desired_goal; elapsed (num_envs,), steps since each reset; env, a gymnasium
    environment of the same id.
    """

    def __init__(self, env: gym.Env, num_envs: int, time_feature: bool):
        self.env, self.num_envs = env, num_envs
        self.max_episode_steps = env.spec.max_episode_steps
        self.action_space, self.observation_space = env.action_space, env.observation_space
        spaces = env.observation_space.spaces if isinstance(env.observation_space, gym.spaces.Dict) else {}
        self.is_goal_env = "desired_goal" in spaces
        part = spaces.get("observation")
        flat = isinstance(part, gym.spaces.Box) and len(part.shape) == 1  # envs.making refuses others
        self.time_feature = time_feature and self.is_goal_env and flat and self.max_episode_steps is not None
        if self.time_feature:
            wider = gym.spaces.Box(-np.inf, np.inf, (part.shape[0] + 1,), np.float64)
            self.observation_space = gym.spaces.Dict({**env.observation_space.spaces, "observation": wider})
        self.elapsed = np.zeros(num_envs, np.int64)
        self.ready = False  # whether there is an episode to step: a simulator would step its raw initial state

    def reset(self, seed: int | None = None) -> Observation:
        """Reset all copies; with a seed, copy i is seeded with `seed + i`, of which it gets the last 32 bits, for
        numpy's old generators take no more. Raises EnvError for an observation that is not finite."""
        self.elapsed[:] = 0
        for i in range(self.num_envs):
            self._reset(i, None if seed is None else (seed + i) % 2 ** 32)
        self.ready = True
        obs = self._observe_with_time()
        foreign.check_finite(self.env, obs)
        return obs

    def reset_alike(self, seed: int) -> Observation:
        """Reset all copies to one start state: each is seeded with `seed`."""
        self.reset(seed)
        for i in range(1, self.num_envs):
            self._reset(i, seed % 2 ** 32)
        return self._observe_with_time()

    def step(self, action: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict]:
        """(num_envs, d) actions, (num_envs,) int discrete ones -> obs, reward, terminated, truncated (num_envs,), info.

        info: `final_obs` (see the module) and `success` (num_envs,), NaN for tasks without a notion of success.
        Raises EnvError before the first `reset`, and for observations that are not finite.
        """
        if not self.ready:
            raise EnvError(f"{self.env.spec.id} is stepped before its first reset; call reset, or give make_vec a seed")
        reward, terminated, truncated, success = self._step(action)
        self.elapsed += 1
        if self.max_episode_steps is not None:
            truncated = truncated | (self.elapsed >= self.max_episode_steps)
        final_obs = self._observe_with_time()
        foreign.check_finite(self.env, final_obs)
        ended = np.flatnonzero(terminated | truncated)
        for i in ended:
            self._reset(i, None)
            self.elapsed[i] = 0
        obs = final_obs
        if len(ended):
            obs = self._observe_with_time()
            foreign.check_finite(self.env, obs)
        return obs, reward, terminated, truncated, {"final_obs": final_obs, "success": success}

    def to_box(self, action: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1] (num_envs, d), as learners have them, in the bounds of the action space."""
        low, high = self.action_space.low, self.action_space.high
        return (action * ((high - low) / 2) + (high + low) / 2).clip(low, high)  # rounding may lead beyond a bound

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray) -> np.ndarray:
        """Reward (B,) of a goal environment for goals (B, g): what hindsight relabelling asks. Raises EnvError where
        the environment does not give one number for each pair."""
        try:
            reward = self.env.unwrapped.compute_reward(achieved_goal, desired_goal, {})
        except Exception as error:
            raise foreign.failure(self.env, "compute_reward for a batch of goals (B, g)", error) from error
        if np.shape(reward) != (len(achieved_goal),):
            raise EnvError(f"{self.env.spec.id}: compute_reward of {len(achieved_goal)} pairs of goals returns shape "
                           f"{np.shape(reward)}; it has to give one number for each: take norms along axis -1")
        return reward

    def snapshot(self) -> dict:
        """Everything a later `restore` needs to continue bit by bit: plain numbers and arrays."""
        return {"elapsed": self.elapsed.copy(), "copies": [self._snapshot(i) for i in range(self.num_envs)]}

    def restore(self, snapshot: dict) -> None:
        """Continue from a `snapshot` of an environment of the same id and the same number of copies."""
        if len(snapshot["copies"]) != self.num_envs:
            raise ValueError(f"snapshot of {len(snapshot['copies'])} copies, environment has {self.num_envs}")
        self.elapsed[:] = np.asarray(snapshot["elapsed"])
        for i, copy in enumerate(snapshot["copies"]):
            self._restore(i, copy)
        self.ready = True

    def state_dict(self) -> dict:
        return self.snapshot()

    def load_state_dict(self, state: dict) -> None:
        self.restore(state)

    def close(self) -> None:
        """Free simulators, windows and threads."""
        self.env.close()

    def _observe_with_time(self) -> Observation:
        obs = self._observe()
        if self.time_feature:
            left = 1.0 - self.elapsed / self.max_episode_steps
            obs["observation"] = np.concatenate([obs["observation"], left[:, None]], axis=1)  # (num_envs, n + 1)
        return obs


def narrow_goals(env: gym.Env, goal_range: float) -> gym.Env:
    """`env` with goals drawn from `goal_range` tenths of its range along x and y (in FetchReach also z); 0: as it is.

    Raises EnvError for a task without such a range, and outside 0 to 10.
    """
    if not 0 <= goal_range <= 10:
        raise EnvError(f"goal_range {goal_range} is not within 0 to 10, the tenths of the range of goals")
    if goal_range:
        if not hasattr(env.unwrapped, "target_range"):
            raise EnvError(f"{env.spec.id} has no range of goals to narrow; leave --goal-range out")
        env.unwrapped.target_range *= goal_range / 10
        announce(f"{env.spec.id} draws its goals within {env.unwrapped.target_range:.4g} m per axis")
    return env


class GymVectorEnv(VectorEnv):
    """Any gymnasium id, one copy after another: the reference for the fast classes, and the way to render.

    With `action_repeat`, an action is taken so often, until the episode ends, and rewards are summed; time limits are
    then in such steps."""

    def __init__(self, env_id: str, num_envs: int, time_feature: bool = True, goal_range: float = 0.0,
                 action_repeat: int = 1, **kwargs):
        self.envs = [narrow_goals(foreign.make(env_id, **kwargs), goal_range)
                     for _ in range(num_envs)]
        super().__init__(self.envs[0], num_envs, time_feature)
        warn_of_statistics(self.env)
        self.current, self.action_repeat = [None] * num_envs, action_repeat
        self.declared = self.env.observation_space  # without what is added here
        self.close_once = weakref.finalize(self, close_all, self.envs)  # at the latest when the program ends
        if self.max_episode_steps is not None:
            self.max_episode_steps = -(-self.max_episode_steps // action_repeat)

    def render(self) -> np.ndarray:
        """Frame (height, width, 3) uint8 of the first copy; needs `render_mode="rgb_array"`."""
        return foreign.render(self.envs[0])

    def close(self) -> None:
        self.close_once()

    def _reset(self, i: int, seed: int | None) -> None:
        self.current[i], _ = foreign.reset(self.envs[i], seed)
        foreign.check_shapes(self.envs[i], self.current[i])

    def _step(self, action):
        foreign.check_action(action)
        steps = [self._play(env, a) for env, a in zip(self.envs, action)]
        self.current = [step[0] for step in steps]
        reward, terminated, truncated = (np.array(column) for column in list(zip(*steps))[1:4])
        success = [foreign.success_of(env, step[4]) for env, step in zip(self.envs, steps)]
        return reward, terminated.astype(bool), truncated.astype(bool), np.array(success)  # ends may be 0 and 1

    def _play(self, env: gym.Env, action) -> tuple:
        obs, total, terminated, truncated, info = foreign.step(env, action)
        for _ in range(self.action_repeat - 1):
            if terminated or truncated:
                break
            obs, reward, terminated, truncated, info = foreign.step(env, action)
            total += reward
        return obs, total, terminated, truncated, info

    def _observe(self) -> Observation:
        try:
            if isinstance(self.current[0], dict):  # a subclass may leave out parts that are declared
                batch = {key: np.stack([obs[key] for obs in self.current]) for key in self.current[0]}
                fits = all(batch[key].shape[1:] == part.shape for key, part in self.declared.spaces.items()
                           if key in batch and isinstance(part, gym.spaces.Box))
            else:
                batch = np.stack(self.current)
                fits = batch.shape[1:] == self.declared.shape
        except (KeyError, TypeError, IndexError, ValueError):  # no arrays, or not of one shape
            fits = False
        if not fits:
            for obs in self.current:
                foreign.check_shapes(self.env, obs)
        return batch

    def _snapshot(self, i: int) -> dict:
        return gym_snapshot(self.envs[i]) | {"current": self.current[i]}

    def _restore(self, i: int, snapshot: dict) -> None:
        self.envs[i].reset(seed=0)  # builds what a first reset builds; all of it is overwritten below
        gym_restore(self.envs[i], snapshot)
        if limit := time_limit(self.envs[i]):
            limit._elapsed_steps = int(self.elapsed[i]) * self.action_repeat
        current = snapshot["current"]
        self.current[i] = ({k: np.asarray(v) for k, v in current.items()} if isinstance(current, dict)
                           else np.asarray(current))


def close_all(envs: list[gym.Env]) -> None:
    for env in envs:
        env.close()


def layers(env: gym.Env) -> list[gym.Env]:
    """The wrappers of `env`, from the outermost on, without the environment inside."""
    found = []
    while env is not env.unwrapped:
        found.append(env)
        env = env.env
    return found


def warn_of_statistics(env: gym.Env) -> None:
    """Say so where a wrapper scales by statistics that it gathers: an evaluation has others than training had."""
    for layer in layers(env):
        if any(isinstance(value, gym.wrappers.utils.RunningMeanStd) for value in vars(layer).values()):
            announce(f"{env.spec.id}: {type(layer).__name__} scales by running statistics, which every copy and every "
                     "evaluation gathers anew, so evaluations see other numbers than training; let the script scale")


def gym_snapshot(env: gym.Env) -> dict:
    """State of any gymnasium environment and its wrappers: plain numbers and arrays."""
    wrappers = [attributes(wrapper) for wrapper in layers(env)]
    env = env.unwrapped
    rng = {"rng": rng_state(env.np_random), "wrappers": wrappers}
    if hasattr(env, "snapshot") and hasattr(env, "restore"):  # ours know what they are made of
        try:
            return rng | {"saved": to_saved(env.snapshot())}
        except TypeError as error:
            announce(f"{env.spec.id}: what its snapshot() returns cannot be saved ({error}), so after a resume its "
                     "episode may not go on as it would have; let it return numbers, texts, arrays, lists and dicts")
    # The simulator aside, a task keeps its state in plain attributes: CartPole's `state`, Reacher's `goal`.
    plain = attributes(env)
    if isinstance(getattr(env, "model", None), mujoco.MjModel):
        rng |= {"model": model_snapshot(env.model), "mujoco": mujoco_snapshot(env.model, env.data)}
    return rng | {"plain": plain}


def attributes(env: gym.Env) -> dict:
    """Those attributes of one layer that can be saved."""
    plain = {}
    for name, value in vars(env).items():
        with contextlib.suppress(TypeError):
            plain[name] = to_saved(value)
    return plain


def rng_state(rng: np.random.Generator | np.random.RandomState) -> dict:
    """State of a generator of numpy, of the new kind or the old."""
    return {"old": random_state(rng)} if isinstance(rng, np.random.RandomState) else rng.bit_generator.state


def set_rng_state(rng: np.random.Generator | np.random.RandomState, state: dict) -> None:
    if "old" in state:
        set_random_state(rng, state["old"])
    else:
        rng.bit_generator.state = state


def random_state(random: np.random.RandomState) -> list:
    """State of numpy's legacy generator as plain numbers and an array."""
    name, keys, *rest = random.get_state()
    return [name, keys.astype(np.int64), *rest]


def set_random_state(random: np.random.RandomState, state: list) -> None:
    name, keys, *rest = state
    random.set_state((name, np.asarray(keys).astype(np.uint32), *rest))


def to_saved(value):
    """A copy of plain data, its types written down, for a checkpoint knows tensors, lists and numbers alone. Raises
    TypeError for anything else."""
    if isinstance(value, (np.random.Generator, np.random.RandomState)):
        return {"rng": rng_state(value)}
    if isinstance(value, gym.wrappers.utils.RunningMeanStd):
        return {"moments": {name: to_saved(x) for name, x in vars(value).items()}}
    if isinstance(value, torch.Tensor):
        return {"tensor": value.detach().clone()}
    if type(value) is deque:
        return {"deque": [value.maxlen, *(to_saved(x) for x in value)]}
    if isinstance(value, (np.ndarray, np.number, np.bool_)) and value.dtype.kind in "biuf":
        return np.array(value) if isinstance(value, np.ndarray) else {"number": np.array(value)}
    if type(value) in (list, tuple, set):
        return {type(value).__name__: [to_saved(x) for x in value]}
    if type(value) is dict and all(isinstance(key, (str, int)) for key in value):
        return {"dict": {key: to_saved(x) for key, x in value.items()}}
    if type(value) in (dict, OrderedDict):  # keys may be places (x, y)
        kind = "pairs" if type(value) is dict else "ordered"
        return {kind: [[to_saved(key), to_saved(x)] for key, x in value.items()]}
    if type(value) in (bool, int, float, str, bytes, type(None)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be saved")


def from_saved(value, old=None):
    """What `to_saved` was given. Generators and statistics in `old`, which stands in its place now, are set and kept:
    others may hold the same ones."""
    if isinstance(value, dict):
        (kind, inside), = value.items()
        if kind == "number":
            return np.asarray(inside)[()]
        if kind == "rng":
            if not isinstance(old, np.random.RandomState if "old" in inside else np.random.Generator):
                old = (np.random.RandomState() if "old" in inside
                       else np.random.Generator(getattr(np.random, inside["bit_generator"])()))
            set_rng_state(old, inside)
            return old
        if kind == "moments":
            moments = old if isinstance(old, gym.wrappers.utils.RunningMeanStd) else gym.wrappers.utils.RunningMeanStd()
            vars(moments).update({key: from_saved(x) for key, x in inside.items()})
            return moments
        if kind == "tensor":
            if isinstance(old, torch.Tensor) and old.shape == inside.shape:  # it keeps its device
                old.data.copy_(inside)
                return old
            return inside.clone()
        if kind == "dict":
            old = old if isinstance(old, dict) else {}
            return {key: from_saved(x, old.get(key)) for key, x in inside.items()}
        if kind in ("pairs", "ordered"):
            return (dict if kind == "pairs" else OrderedDict)((from_saved(key), from_saved(x)) for key, x in inside)
        if kind == "deque":
            return deque(map(from_saved, inside[1:]), inside[0])
        container = {"list": list, "tuple": tuple, "set": set}[kind]
        olds = old if isinstance(old, container) and len(old) == len(inside) else [None] * len(inside)
        return container(map(from_saved, inside, olds))
    if isinstance(value, list):  # of older checkpoints
        return tuple(value)
    return np.asarray(value).copy() if hasattr(value, "shape") else value


def gym_restore(env: gym.Env, snapshot: dict) -> None:
    """Bring `env`, which has been reset once, and its wrappers to the state of a `gym_snapshot`. Says so where one of
    them holds something that could not be saved."""
    lost = [f"{name} (of {type(wrapper).__name__})" for wrapper, plain in zip(layers(env), snapshot.get("wrappers", []))
            for name in set_attributes(wrapper, plain)]
    env = env.unwrapped
    if "own" in snapshot:  # of older checkpoints
        env.restore(snapshot["own"])
    if "saved" in snapshot:
        env.restore(from_saved(snapshot["saved"]))
    if "plain" in snapshot:
        lost += set_attributes(env, snapshot["plain"])
    if lost:
        announce(f"{env.spec.id} keeps {', '.join(lost)}, which cannot be saved; if its episodes depend on that, they "
                 "go on differently; to save it, write the methods snapshot() and restore(snapshot)")
    set_rng_state(env.np_random, snapshot["rng"])
    if "mujoco" in snapshot:
        model_restore(env.model, snapshot.get("model", {}))  # older checkpoints have none
        mujoco_restore(env.model, env.data, snapshot["mujoco"])


def set_attributes(env: gym.Env, plain: dict) -> list[str]:
    """Give one layer the attributes of `attributes`. Returns the names of those that it has, and that are not there."""
    for name, value in plain.items():
        setattr(env, name, from_saved(value, vars(env).get(name)))
    return [name for name, value in vars(env).items() if name not in plain
            and not (callable(value) or isinstance(value, ModuleType) or name == "env")
            and (isinstance(value, (np.ndarray, gym.Env)) or type(value).__module__.split(".")[0] not in STATELESS)]


def time_limit(env: gym.Env) -> gym.wrappers.TimeLimit | None:
    """The wrapper in which gymnasium counts the steps of an episode, if `env` has one."""
    while env is not env.unwrapped:
        if isinstance(env, gym.wrappers.TimeLimit):
            return env
        env = env.env
    return None
