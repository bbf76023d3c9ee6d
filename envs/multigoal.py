"""MultiGoal-v0: a point in the plane and four goals, any of which will do (Haarnoja et al., 2017, arXiv 1702.08165).

A policy of one peak walks to one goal. A maximum-entropy policy walks to all four, and its value function has four
attracting regions. The state space has two numbers, so both can be drawn: `draw` does.

    position (x, y) within +-7, starts at N(0, 0.1^2); action (dx, dy) within +-1; next position = position + action
    reward = -30 |action|^2 - |next position - nearest goal|^2, and 10 more within 1 of a goal, which ends the episode
"""
from pathlib import Path
from typing import Callable

import gymnasium as gym
import numpy as np
import torch

ID = "MultiGoal-v0"
NAMES = ["right", "left", "top", "bottom"]  # of the goals
GOALS = np.array([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0], [0.0, -5.0]])
LIMIT, REACHED, BONUS, EFFORT = 7.0, 1.0, 10.0, 30.0
PIXELS = 256  # side of a frame

gym.register(ID, entry_point="envs.multigoal:MultiGoalEnv", max_episode_steps=1000)


class MultiGoalEnv(gym.Env):
    """One point; info["goal"] is the index of the goal that was reached, -1 before."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-LIMIT, LIMIT, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.position = np.zeros(2)
        self.path = [[0.0, 0.0]]  # of this episode, for pictures

    def reset(self, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.position = np.clip(0.1 * self.np_random.standard_normal(2), -LIMIT, LIMIT)
        self.path = [self.position.tolist()]
        return self.position.astype(np.float32), {"goal": -1, "is_success": 0.0}

    def step(self, action):
        action = np.clip(np.asarray(action, np.float64), -1, 1)
        self.position = np.clip(self.position + action, -LIMIT, LIMIT)
        self.path.append(self.position.tolist())
        distances = np.square(GOALS - self.position).sum(1)
        terminated = bool(distances.min() < REACHED ** 2)
        reward = -EFFORT * np.square(action).sum() - distances.min()
        goal = -1
        if terminated:
            reward += BONUS
            goal = int(distances.argmin())
        info = {"goal": goal, "is_success": float(terminated)}
        return self.position.astype(np.float32), float(reward), terminated, False, info

    def render(self) -> np.ndarray:
        """Frame (256, 256, 3) uint8: goals red, the path grey, the point black."""
        frame = np.full((PIXELS, PIXELS, 3), 255, np.uint8)
        x, y = np.meshgrid(*[np.linspace(-LIMIT, LIMIT, PIXELS)] * 2)
        pixels = np.stack([x, y[::-1]], axis=2)  # (256, 256, 2), positions; y grows upwards
        for points, radius, colour in ((GOALS, REACHED, (230, 90, 90)), (self.path, 0.1, (170, 170, 170)),
                                       ([self.position], 0.2, (0, 0, 0))):
            for point in points:
                frame[np.square(pixels - point).sum(2) < radius ** 2] = colour
        return frame


def walk(sample: Callable[[torch.Tensor], torch.Tensor], walkers: int, steps: int, seed: int) -> list[np.ndarray]:
    """Paths (length, 2) of so many points from the start, each until it reaches a goal, for `steps` steps at most.
    `sample` takes positions (walkers, 2) and draws actions."""
    tasks = [MultiGoalEnv() for _ in range(walkers)]
    obs = np.stack([task.reset(seed=seed + i)[0] for i, task in enumerate(tasks)])
    over = np.zeros(walkers, bool)
    for _ in range(steps):
        action = sample(torch.from_numpy(obs)).numpy()
        for i in np.flatnonzero(~over):
            obs[i], _, over[i], _, _ = tasks[i].step(action[i])
        if over.all():
            break
    return [np.array(task.path) for task in tasks]


def draw(value: Callable[[torch.Tensor], torch.Tensor], sample: Callable[[torch.Tensor], torch.Tensor],
         estimate: Callable[[torch.Tensor, int], torch.Tensor], path: Path, seed: int, walkers: int = 40
         ) -> torch.Tensor:
    """Draw into the file `path` the soft value over the plane with paths of the policy, and errors of an estimate.

    value: positions (B, 2) -> (B,). sample: positions -> drawn actions (B, 2). estimate: positions and a number of
    samples -> (B,). Returns how many of the walkers ended at each goal, (4,).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = walk(sample, walkers, 100, seed)
    line = np.linspace(-LIMIT, LIMIT, 141, dtype=np.float32)
    grid = np.stack(np.meshgrid(line, line), axis=2)  # (141, 141, 2)
    values = value(torch.from_numpy(grid.reshape(-1, 2))).numpy().reshape(grid.shape[:2])
    figure, (plane, curve) = plt.subplots(1, 2, figsize=(10.5, 4.6), constrained_layout=True)
    figure.colorbar(plane.contourf(line, line, values, levels=30, cmap="viridis"), label="soft value V(s)")
    for points in paths:
        plane.plot(*points.T, color="white", linewidth=0.7, alpha=0.8)
    plane.scatter(*GOALS.T, color="red", marker="*", s=120, zorder=3)
    plane.set(xlabel="x", ylabel="y", xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")
    counts, positions = [10, 30, 100, 300, 1000, 3000], torch.from_numpy(grid[10::20, 10::20].reshape(-1, 2))
    errors = [(estimate(positions, count) - value(positions)).abs().mean().item() for count in counts]
    curve.loglog(counts, errors, marker="o")
    curve.set(xlabel="uniform actions per state", ylabel="mean error of the estimated V")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    ends = np.stack([points[-1] for points in paths])
    distances = np.linalg.norm(ends[:, None] - GOALS, axis=2)  # (walkers, 4)
    return torch.from_numpy((distances < REACHED).sum(0))
