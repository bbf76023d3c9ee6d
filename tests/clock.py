"""A clock, and what a script with a replay buffer stores of it, worked out by hand."""
import gymnasium as gym
import numpy as np
import torch


class Counted(gym.Env):
    """A clock: every reset and every step counts, and the count is observed, in the second copy with 1000 on top.
    Rewards are ten times the count. By turns three steps to a terminal state and two to a time limit; the second copy
    begins with the latter."""
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)
    received = {}  # in training, {what was observed: the action then}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.training, self.copy, self.count, self.episode = seed < 15_000, seed % 2, -1, seed % 2
        self.count, self.episode, self.steps = self.count + 1, self.episode + 1, 0
        return self.look(), {}

    def look(self):
        return np.array([1000.0 * self.copy + self.count])

    def step(self, action):
        if self.training:
            self.received[self.look().item()] = float(action[0])
        self.count, self.steps = self.count + 1, self.steps + 1
        to_the_end = self.episode % 2 == 1
        return (self.look(), 10.0 * self.count, to_the_end and self.steps == 3, not to_the_end and self.steps == 2, {})


if "Counted-v0" not in gym.registry:
    gym.register("Counted-v0", Counted)

# of the two copies, twelve steps each: observation, reward, terminated, next observation
FIRST = [(0, 10, 0, 1), (1, 20, 0, 2), (2, 30, 1, 3), (4, 50, 0, 5), (5, 60, 0, 6), (7, 80, 0, 8), (8, 90, 0, 9),
         (9, 100, 1, 10), (11, 120, 0, 12), (12, 130, 0, 13), (14, 150, 0, 15), (15, 160, 0, 16)]
SECOND = [(1000, 10, 0, 1001), (1001, 20, 0, 1002), (1003, 40, 0, 1004), (1004, 50, 0, 1005), (1005, 60, 1, 1006),
          (1007, 80, 0, 1008), (1008, 90, 0, 1009), (1010, 110, 0, 1011), (1011, 120, 0, 1012), (1012, 130, 1, 1013),
          (1014, 150, 0, 1015), (1015, 160, 0, 1016)]
BY_HAND = torch.tensor([row for pair in zip(FIRST, SECOND) for row in pair]).float()  # (24, 4), as they are stored
