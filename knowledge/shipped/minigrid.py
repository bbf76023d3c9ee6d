import numpy as np


def compute_reward(obs, past_obs, past_actions):
    objects = obs[0]
    things = (objects == 5) | (objects == 6) | (objects == 7)
    things[3, 6] = False
    xs, ys = np.nonzero(things)
    near = 1.0 / np.min(np.abs(xs - 3) + np.abs(6 - ys)) if len(xs) else 0.0

    changed = (obs != past_obs[-1]).any()
    moved = 0.2 if changed else 0.0
    wall = -0.3 if objects[3, 5] == 2 else 0.0
    waste = -0.2 if past_actions[-1] >= 3 and not changed else 0.0
    return near + moved + wall + waste, {"near": near, "moved": moved, "wall": wall, "waste": waste}
