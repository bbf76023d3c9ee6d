"""Vector environments whose observations are changed on their way: encoded, or stacked with earlier ones."""
import gymnasium as gym
import numpy as np

from envs.encoders import Encoder
from envs.ids import EnvError
from envs.vector import VectorEnv


class WrappedVectorEnv:
    """A `VectorEnv` with other observations. A subclass says what it makes of the first ones and of those of a step,
    and what it keeps. All else is asked of `vec`, the environment inside."""

    def __init__(self, vec: VectorEnv, observation_space: gym.spaces.Box):
        self.vec, self.observation_space = vec, observation_space

    def __getattr__(self, name: str):
        if name == "vec":  # not there yet, and asking it would never end
            raise AttributeError(name)
        return getattr(self.vec, name)

    def reset(self, seed: int | None = None) -> np.ndarray:
        return self._first(self.vec.reset(seed))

    def reset_alike(self, seed: int) -> np.ndarray:
        return self._first(self.vec.reset_alike(seed))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        obs, reward, terminated, truncated, info = self.vec.step(action)
        obs, final_obs = self._next(obs, info["final_obs"], terminated | truncated)
        return obs, reward, terminated, truncated, info | {"final_obs": final_obs}

    def snapshot(self) -> dict:
        return {"inside": self.vec.snapshot(), **self._keep()}

    def restore(self, snapshot: dict) -> None:
        self.vec.restore(snapshot["inside"])
        self._take(snapshot)

    def state_dict(self) -> dict:
        return self.snapshot()

    def load_state_dict(self, state: dict) -> None:
        self.restore(state)

    def _first(self, obs: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _next(self, obs: np.ndarray, final_obs: np.ndarray, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def _keep(self) -> dict:
        raise NotImplementedError

    def _take(self, kept: dict) -> None:
        raise NotImplementedError


class EncodedVectorEnv(WrappedVectorEnv):
    """Codes (num_envs, n) float32 in place of pictures. Checkpoints have the encoder, too.

    exact_id: an id that means the same encoder tomorrow, which a run keeps (runtime/run.py)."""
    exact_id = ""

    def __init__(self, vec: VectorEnv, encoder: Encoder):
        super().__init__(vec, gym.spaces.Box(-np.inf, np.inf, (encoder.size,), np.float32))
        self.encoder = encoder

    def _first(self, obs: np.ndarray) -> np.ndarray:
        return self.encoder(obs)

    def _next(self, obs: np.ndarray, final_obs: np.ndarray, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = self.encoder(np.concatenate([obs, final_obs[ended]]))  # one batch: (num_envs + episodes that ended, n)
        code, final_code = codes[:len(obs)], codes[:len(obs)].copy()
        final_code[ended] = codes[len(obs):]
        return code, final_code

    def _keep(self) -> dict:
        return {"encoder": self.encoder.state_dict()}

    def _take(self, kept: dict) -> None:
        self.encoder.load_state_dict(kept["encoder"])


class FrameStack(WrappedVectorEnv):
    """The last `count` observations of the episode, the newest last: (num_envs, count * n), or pictures with count
    times the channels. There are zeros before the first one."""

    def __init__(self, vec: VectorEnv, count: int):
        space = vec.observation_space
        if not isinstance(space, gym.spaces.Box):
            raise EnvError(f"{vec.env.spec.id} observes {space}; frame_stack needs an array or pictures")
        low, high = (np.concatenate([bound] * count, -1) for bound in (space.low.clip(max=0), space.high.clip(min=0)))
        super().__init__(vec, gym.spaces.Box(low, high, dtype=space.dtype))
        self.width = space.shape[-1]  # of one observation
        self.frames = np.zeros((vec.num_envs, *low.shape), space.dtype)

    def _first(self, obs: np.ndarray) -> np.ndarray:
        self.frames = np.zeros_like(self.frames)
        self.frames[..., -self.width:] = obs
        return self.frames.copy()

    def _next(self, obs: np.ndarray, final_obs: np.ndarray, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        final = np.concatenate([self.frames[..., self.width:], final_obs], -1).astype(self.frames.dtype)
        self.frames = final.copy()
        self.frames[ended] = 0
        self.frames[..., -self.width:] = obs
        return self.frames.copy(), final

    def _keep(self) -> dict:
        return {"frames": self.frames.copy()}

    def _take(self, kept: dict) -> None:
        self.frames = np.asarray(kept["frames"]).copy()
