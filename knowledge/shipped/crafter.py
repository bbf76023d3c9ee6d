import numpy as np

# numbers in obs["view"], and places in obs["status"]
WATER, TREE, TABLE, COW, ZOMBIE, SKELETON = 1, 6, 11, 14, 15, 16
HEALTH, FOOD, DRINK, ENERGY, SAPLING, WOOD, STONE, WOOD_PICKAXE = 2, 3, 4, 5, 6, 7, 8, 12


def nearness(view, kind):
    xs, ys = np.nonzero(view == kind)
    return 1.0 / max(np.min(np.abs(xs - 4) + np.abs(ys - 3)), 1) if len(xs) else 0.0


def compute_reward(obs, past_obs, past_actions):
    view, status = obs["view"], obs["status"]
    wood = min(status[WOOD], 5) / 5
    tools = np.minimum(status[WOOD_PICKAXE:18], 1).sum()
    table = 1.0 if (view == TABLE).any() else 0.0
    possessions = wood + 0.5 * table + tools + 0.2 * min(status[SAPLING], 1) + 0.5 * min(status[STONE], 5) / 5

    drink = nearness(view, WATER) * (1 - status[DRINK] / 9) * 2
    food = nearness(view, COW) * (1 - status[FOOD] / 9) * 2
    trees = nearness(view, TREE) * (0.5 if status[WOOD] < 5 else 0.1)
    fed = (status[FOOD] + status[DRINK] + status[ENERGY]) / 27
    danger = -0.3 * max(nearness(view, ZOMBIE), nearness(view, SKELETON)) + 0.5 * (status[HEALTH] / 9 - 1)
    value = possessions + drink + food + trees + fed + danger
    return value, {"possessions": possessions, "drink": drink, "food": food, "trees": trees, "fed": fed, "danger": danger}
