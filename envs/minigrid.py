"""MiniGrid and BabyAI tasks as vector environments.

Observations are {"image": (num_envs, 7, 7, 3) uint8, "direction": (num_envs,) int64}; the text mission is left out.
`image[:, x, y]` is (object, colour, state) of a cell as the agent sees it, the agent at (3, 6) facing smaller y.
`info["success"]` is 1 where a step is rewarded, else 0.
"""
import contextlib
import io

import gymnasium as gym
import numpy as np

from envs.ids import EnvError
from envs.vector import GymVectorEnv


def is_grid(env_id: str) -> bool:
    """Whether `env_id` is a task of the minigrid package."""
    return env_id.startswith(("MiniGrid-", "BabyAI-"))


def observation_space(env: gym.Env) -> gym.spaces.Dict:
    """What these classes observe of `env`."""
    return gym.spaces.Dict({key: env.observation_space[key] for key in ("image", "direction")})


class PlainMiniGridVectorEnv(GymVectorEnv):
    """Any MiniGrid or BabyAI id, one copy after another."""

    def __init__(self, env_id: str, num_envs: int, time_feature: bool = True, **kwargs):
        super().__init__(env_id, num_envs, time_feature, **kwargs)
        pattern = getattr(getattr(self.env.unwrapped, "config", None), "pattern_path", None)
        if pattern and not pattern.exists():
            raise EnvError(f"{env_id} needs {pattern.name}, which the installed minigrid lacks; use another task")
        self.observation_space = observation_space(self.env)
        # They count steps themselves, not in a wrapper. BabyAI's limit is that of a mission, 0 before the first one.
        self.max_episode_steps = self.env.unwrapped.max_steps or None
        self.start: list[dict | None] = [None] * num_envs  # random stream from which the episode was made
        self.actions: list[list[int]] = [[] for _ in range(num_envs)]  # of the episode

    def _reset(self, i: int, seed: int | None) -> None:
        env = self.envs[i].unwrapped
        if seed is not None:
            env.np_random = gym.utils.seeding.np_random(seed)[0]
        self.start[i], self.actions[i] = env.np_random.bit_generator.state, []
        with contextlib.redirect_stdout(io.StringIO()):  # BabyAI prints each mission that it draws and rejects
            obs, _ = self.envs[i].reset()
        self.current[i] = {"image": obs["image"], "direction": obs["direction"]}

    def _step(self, action):
        for actions, a in zip(self.actions, action):
            actions.append(int(a))
        reward, terminated, truncated, _ = super()._step(action)
        self.current = [{"image": obs["image"], "direction": obs["direction"]} for obs in self.current]
        return reward.astype(np.float64), terminated, truncated, (reward > 0).astype(np.float64)

    def _snapshot(self, i: int) -> dict:
        # The state of a task is a web of objects: doors, boxes with contents, a verifier that holds some of them. Tasks
        # are deterministic given their random stream, so its state at the reset and the actions since say the same.
        return {"rng": self.start[i], "actions": np.array(self.actions[i], np.uint8)}

    def _restore(self, i: int, snapshot: dict) -> None:
        self.envs[i].unwrapped.np_random.bit_generator.state = snapshot["rng"]
        self._reset(i, None)
        for action in np.asarray(snapshot["actions"]).tolist():
            obs = self.envs[i].step(action)[0]
            self.actions[i].append(action)
            self.current[i] = {"image": obs["image"], "direction": obs["direction"]}
