"""Crafter-Text: survival in a generated world of 64 x 64 cells (Hafner 2022, arXiv 2109.06780), and captions of it.

The tasks are those of Zhang et al. (2024, arXiv 2407.03964): one achievement each, rewarded once, or all of them. As in
their release there are 20 actions, four of which are the same one (eat, drink, attack, collect), and a hand is stronger
than in the original (`fork_rules`). Departures from the release: success ends an episode as terminated, not truncated,
and equal seeds give equal episodes.

`Crafter-Text-*` observe crafter's picture, `Crafter-Symbols-*` do not, and are faster to step and to learn from: the
cells in view and what the player has are observed by both, and are what a caption says. The crafter package is
optional.
"""
import string

import gymnasium as gym
import numpy as np

from envs.ids import EnvError
from envs.vector import GymVectorEnv

ACTION_WORDS = ("do nothing", "move left", "move right", "move up", "move down", "eat", "drink", "attack", "collect",
                "sleep", "place stone", "place table", "place furnace", "place plant", "make wood pickaxe",
                "make stone pickaxe", "make iron pickaxe", "make wood sword", "make stone sword", "make iron sword")
ORIGINAL = (0, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)  # crafter's actions for these
CELLS = ("nothing", "water", "grass", "stone", "path", "sand", "tree", "lava", "coal", "iron", "diamond", "table",
         "furnace", "player", "cow", "zombie", "skeleton", "arrow", "plant")  # names of the numbers in `view`
ITEMS = ("health", "food", "drink", "energy", "sapling", "wood", "stone", "coal", "iron", "diamond", "wood pickaxe",
         "stone pickaxe", "iron pickaxe", "wood sword", "stone sword", "iron sword")
STATUS = ("facing x", "facing y", *ITEMS, "asleep", "dead")  # names of the numbers in `status`
ACHIEVEMENTS = ("collect_coal", "collect_diamond", "collect_drink", "collect_iron", "collect_sapling", "collect_stone",
                "collect_wood", "defeat_skeleton", "defeat_zombie", "eat_cow", "eat_plant", "make_iron_pickaxe",
                "make_iron_sword", "make_stone_pickaxe", "make_stone_sword", "make_wood_pickaxe", "make_wood_sword",
                "place_furnace", "place_plant", "place_stone", "place_table", "wake_up")
TASKS = {"Reward": ACHIEVEMENTS, "PlaceCraftingTable": ("place_table",), "MakeWoodPickAxe": ("make_wood_pickaxe",),
         "CollectDrink": ("collect_drink",), "EatCow": ("eat_cow",)}
TIME_LIMIT = 10_000
ITEM_START = STATUS.index("sapling")


def is_crafter(env_id: str) -> bool:
    """Whether `env_id` is one of these tasks."""
    return env_id.startswith(("Crafter-Text-", "Crafter-Symbols-"))


def clauses(view: np.ndarray, status: np.ndarray) -> tuple[str, ...]:
    """What the player sees (9, 7) and has (20,), a phrase each: asleep or dead, the nearest cell of every kind in view,
    what is in front, how it feels, what it carries."""
    said = [text for name, text in (("asleep", "You are asleep"), ("dead", "You are dead"))
            if status[STATUS.index(name)]]
    x, y = np.indices(view.shape) - np.array([4, 3])[:, None, None]
    distance = np.abs(x) + np.abs(y)
    for kind in np.unique(view):
        if CELLS[kind] not in ("nothing", "player"):
            near = np.where(view == kind, distance, 99).argmin()  # of several, the first one column by column
            dx, dy = x.flat[near], y.flat[near]
            signs = (("up", dy < 0), ("down", dy > 0), ("left", dx < 0), ("right", dx > 0))
            ways, steps = [way for way, true in signs if true], distance.flat[near]
            said.append(f"You see {CELLS[kind]} at {steps} {'step' if steps == 1 else 'steps'} {'-'.join(ways)}")
    front = view[4 + status[0], 3 + status[1]]
    said.append(f"You face {CELLS[front]}")
    said.append(", ".join(f"{name} {status[2 + k]}/9" for k, name in enumerate(ITEMS[:4])).capitalize())
    held = [f"{count} {name}" for name, count in zip(ITEMS[4:], status[ITEM_START:]) if count]
    return (*said, "You have " + ", ".join(held)) if held else tuple(said)


def caption(view: np.ndarray, status: np.ndarray) -> str:
    """What the player sees (9, 7) and has (20,) as text, the phrases of `clauses` joined by ". "."""
    return ". ".join(clauses(view, status))


class CrafterText(gym.Env):
    """One task. Observations: `view` (9, 7) uint8, `status` (20,) int64, `image` (64, 64, 3) uint8 with `pixels`, and
    `description` with `text`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, task: str, pixels: bool = True, text: bool = True, fork_rules: bool = True,
                 render_mode: str | None = None):
        try:
            from envs.crafter_world import World
        except ImportError as error:
            raise EnvError(f"Crafter-Text needs the crafter package ({error}): pip install crafter==1.8.3") from error
        self.wanted, self.gives_health = TASKS[task], task == "Reward"
        self.pixels, self.text, self.render_mode = pixels, text, render_mode
        self.world = World(seed=0, fork_rules=fork_rules)
        spaces = {"view": gym.spaces.Box(0, len(CELLS) - 1, (9, 7), np.uint8),
                  "status": gym.spaces.Box(-1, 9, (len(STATUS),), np.int64)}
        if pixels:
            spaces["image"] = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        if text:
            spaces["description"] = gym.spaces.Text(4096, charset=string.printable)
        self.observation_space, self.action_space = gym.spaces.Dict(spaces), gym.spaces.Discrete(len(ACTION_WORDS))
        self.reached: set[str] = set()

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.world.restart(int(self.np_random.integers(2 ** 31 - 1)))
        self.reached, self.health = set(), 9
        return self._observe(), self._info()

    def step(self, action: int):
        world = self.world
        world.act(ORIGINAL[action])
        obs, health = self._observe(), world.status()[2]
        new = {name for name in self.wanted if world.achievements[name] and name not in self.reached}
        self.reached |= new
        reward = 1.0 if new else 0.0  # one also for several at once
        if self.gives_health:
            reward += (health - self.health) / 10
        self.health = health
        return obs, reward, len(self.reached) == len(self.wanted) or world.dead, False, self._info()

    def _observe(self) -> dict:
        world = self.world
        obs = {"view": world.view(), "status": np.array([*world.status(), world.dead], np.int64)}
        if self.pixels:
            obs["image"] = self.picture = world.picture()
        else:
            world.skip_picture()
        if self.text:
            obs["description"] = caption(obs["view"], obs["status"])
        return obs

    def _info(self) -> dict:
        return {"success": len(self.reached) / len(self.wanted), **{name: name in self.reached for name in self.wanted}}

    def render(self) -> np.ndarray:
        """The picture that is observed, eight times as large."""
        world, position = self.world._world, None
        if not self.pixels:  # the random numbers of its picture have been drawn: at night the noise is another
            position = world.random.get_state()
            self.picture = self.world.picture()
            world.random.set_state(position)
        return self.picture.repeat(8, 0).repeat(8, 1)

    def snapshot(self) -> dict:
        """What envs.snapshot asks for."""
        return {"world": self.world.snapshot(), "reached": sorted(self.reached), "health": int(self.health)}

    def restore(self, snapshot: dict) -> None:
        """What envs.restore asks for."""
        self.world.restore(snapshot["world"])
        self.reached, self.health = set(snapshot["reached"]), snapshot["health"]


class CrafterVectorEnv(GymVectorEnv):
    """Copies of one task, one after another, without text: whoever reads it asks for it (`envs.captions`)."""

    def __init__(self, env_id: str, num_envs: int, time_feature: bool = True, **kwargs):
        super().__init__(env_id, num_envs, time_feature, **{"text": False, **kwargs})


for _task in TASKS:
    for _kind, _pixels in (("Text", True), ("Symbols", False)):
        gym.register(f"Crafter-{_kind}-{_task}", f"{__name__}:CrafterText", max_episode_steps=TIME_LIMIT,
                     kwargs={"task": _task, "pixels": _pixels})
