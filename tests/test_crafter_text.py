"""Crafter-Text: crafter's worlds and physics step by step, the fork's rules, captions, equal seeds, exact snapshots."""
import io

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from envs.crafter_text import ACTION_WORDS, CELLS, ITEMS, ORIGINAL, STATUS, TASKS, clauses
from runtime import to_plain

crafter = pytest.importorskip("crafter")
from crafter import objects  # noqa: E402

from envs.crafter_world import MATERIALS, ForkPlayer, World  # noqa: E402


class Orderly(crafter.Env):
    """crafter itself, with creatures of a chunk in order of place: as it is, it does not repeat its own episodes."""

    player = objects.Player

    def reset(self):
        original, objects.Player = objects.Player, self.player
        try:
            obs = super().reset()
        finally:
            objects.Player = original
        self._sem_view._obj_ids[self.player] = self._sem_view._obj_ids[objects.Player]
        return obs

    def _balance_object(self, chunk, objs, *args):
        super()._balance_object(chunk, sorted(objs, key=lambda obj: (*obj.pos, type(obj).__name__)), *args)


class OrderlyFork(Orderly):
    player = ForkPlayer


@pytest.mark.parametrize("seed, plain", [(1, Orderly), (2, OrderlyFork)])
def test_world_is_crafters_to_the_last_bit(seed, plain):
    theirs, ours = plain(seed=seed), World(seed, fork_rules=plain is OrderlyFork)
    obs, rng = theirs.reset(), np.random.default_rng(seed)
    ours.restart(seed)
    likely = np.array([1, 4, 4, 4, 4, 12, 0.3, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1])
    darkest = 1
    for step in range(240):  # into the first night, whose pictures have noise; creatures have come and gone
        darkest = min(darkest, ours._world.daylight)
        assert np.array_equal(obs, ours.picture()), step
        action = int(rng.choice(17, p=likely / likely.sum()))
        theirs._player.inventory.update(health=9, wood=5, sapling=2)  # alive, with plants and tables
        ours._player.inventory.update(health=9, wood=5, sapling=2)
        obs, _, _, info = theirs.step(action)
        ours.act(action)
        if step % 3 == 0:
            held = info["inventory"]
            assert [held[name.replace(" ", "_")] for name in ITEMS] == ours.status()[2:18]
            assert info["achievements"] == ours.achievements
            (x, y), padded = info["player_pos"], np.pad(info["semantic"], 5)
            assert np.array_equal(padded[x + 1:x + 10, y + 2:y + 9], ours.view())
    assert ours.achievements["place_plant"] and darkest < 0.1


def bare(x=32, y=32, fork_rules=True):
    """A world without creatures, grass around a player at (x, y) that looks up."""
    world = World(0, fork_rules)
    world.restart(0)
    for obj in world._world.objects:
        if obj is not world._player:
            world._world.remove(obj)
    if (x, y) != tuple(world._player.pos):
        world._world.move(world._player, (x, y))
    world._world._mat_map[max(x - 4, 0):x + 5, max(y - 4, 0):y + 5] = MATERIALS.index("grass")
    world._player.facing = (0, -1)
    return world


def says(world):
    return clauses(world.view(), np.array([*world.status(), world.dead]))


def test_caption_of_a_known_place():
    world = bare()
    for material, place in (("tree", (32, 31)), ("water", (34, 33)), ("stone", (29, 32)), ("table", (28, 29)),
                            ("coal", (36, 35))):
        world._world[place] = material
    world._world.add(objects.Cow(world._world, (33, 34)))
    world._player.inventory.update(wood=3, sapling=1)
    seen = ["water at 3 steps down-right", "grass at 1 step left", "stone at 3 steps left", "tree at 1 step up",
            "coal at 7 steps down-right", "table at 7 steps up-left", "cow at 3 steps down-right"]
    assert says(world) == (*(f"You see {line}" for line in seen), "You face tree",
                           "Health 9/9, food 9/9, drink 9/9, energy 9/9", "You have 1 sapling, 3 wood")
    world._player.sleeping = True
    assert says(world)[0] == "You are asleep"


def test_captions_at_the_edge_of_the_world():
    world = bare(x=2, y=0)
    assert world.view()[:2].max() == 0 and world.view()[:, :3].max() == 0  # beyond the edge
    assert says(world)[:2] == ("You see grass at 1 step left", "You face nothing")
    world.picture()


def hits_until_eaten(fork_rules):
    world = bare(fork_rules=fork_rules)
    cow = objects.Cow(world._world, (32, 31))
    world._world.add(cow)
    for hits in range(1, 6):
        world._player.action = "do"
        world._player.update()
        if world.achievements["eat_cow"]:
            return hits


def drinks_when_full(fork_rules):
    world = bare(fork_rules=fork_rules)
    world._world[(32, 31)] = "water"
    world._player._thirst = 7
    world._player.action = "do"
    world._player.update()
    return world.achievements["collect_drink"], world._player._thirst


def test_rules_of_the_fork():
    assert (hits_until_eaten(False), hits_until_eaten(True)) == (3, 1)
    assert (drinks_when_full(False), drinks_when_full(True)) == ((1, 1), (0, 1))  # the thirst is quenched all the same


def test_actions_and_tasks():
    assert len(ACTION_WORDS) == len(ORIGINAL) == 20 and len(CELLS) == 19 and len(STATUS) == 20
    for name, original in zip(ACTION_WORDS, ORIGINAL):
        theirs = crafter.constants.actions[original]
        assert theirs == "do" if name in ("eat", "drink", "attack", "collect") else theirs.replace(
            "noop", "do nothing").replace("_", " ") == name
    assert [name.replace(" ", "_") for name in ITEMS] == list(crafter.constants.items)
    assert tuple(crafter.constants.achievements) == TASKS["Reward"]
    assert CELLS[1:13] == tuple(crafter.constants.materials)
    assert len([name for name in gym.registry if name.startswith("Crafter-Text-")]) == 5


@pytest.mark.parametrize("task, held, place, actions", [
    ("PlaceCraftingTable", {"wood": 2}, None, ["place table"]),
    ("MakeWoodPickAxe", {"wood": 3}, None, ["place table", "make wood pickaxe"]),
    ("CollectDrink", {"drink": 5}, "water", ["drink"]),
    ("EatCow", {}, "cow", ["eat"])])
def test_a_task_ends_with_its_achievement(task, held, place, actions):
    env = envs.make(f"Crafter-Symbols-{task}")
    obs, info = env.reset(seed=1)
    assert env.observation_space.contains(obs) and info == {"success": 0, TASKS[task][0]: False}
    inner = env.unwrapped
    inner.world = bare()
    inner.world._player.inventory.update(held)
    if place == "water":
        inner.world._world[(32, 31)] = "water"
    elif place == "cow":
        inner.world._world.add(objects.Cow(inner.world._world, (32, 31)))
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(ACTION_WORDS.index(action))
        over = action == actions[-1]
        assert (reward, terminated, truncated, info["success"]) == (float(over), over, False, float(over))


def test_reward_of_the_task_with_all_achievements():
    env = envs.make("Crafter-Text-Reward")
    obs, info = env.reset(seed=1)
    assert env.observation_space.contains(obs) and obs["image"].shape == (64, 64, 3) and len(info) == 23
    world = env.unwrapped.world = bare()
    world._player.inventory.update(wood=2)
    assert env.step(ACTION_WORDS.index("place table"))[1] == 1
    world._player.health = world._player._last_health = 6
    assert env.step(0)[1] == pytest.approx(-0.3)
    world._player.health = 0
    obs, _, terminated, truncated, info = env.step(0)
    assert terminated and not truncated and info["success"] == 1 / 22 and "You are dead" in obs["description"]


def test_equal_seeds_give_equal_episodes_with_and_without_pictures():
    rng = np.random.default_rng(0)
    vecs = [envs.make_vec(f"Crafter-{kind}-Reward", 2) for kind in ("Text", "Text", "Symbols")]
    seen = [vec.reset(4) for vec in vecs]
    assert set(seen[0]) == {"view", "status", "image"} and set(seen[2]) == {"view", "status"}
    for _ in range(220):
        action = rng.integers(20, size=2)
        seen, rewards, *_ = zip(*(vec.step(action) for vec in vecs))
        assert np.array_equal(rewards[0], rewards[1]) and np.array_equal(rewards[0], rewards[2])
        assert np.array_equal(seen[0]["image"], seen[1]["image"])
        assert all(np.array_equal(seen[0][key], seen[2][key]) for key in ("view", "status"))
    assert len(envs.captions(seen[2])) == 2 and len(envs.action_words("Crafter-Text-Reward")) == 20


def test_snapshot_continues_exactly():
    vec, other = (envs.make_vec("Crafter-Text-Reward", 2, seed=s) for s in (3, 99))
    rng, obs = np.random.default_rng(1), None
    for _ in range(60):
        vec.step(rng.integers(20, size=2))
    file = io.BytesIO()
    torch.save(to_plain(envs.snapshot(vec)), file)
    file.seek(0)
    envs.restore(other, torch.load(file, weights_only=True))
    for _ in range(100):
        action = rng.integers(20, size=2)
        (obs, *ours, _), (theirs, *others, _) = vec.step(action), other.step(action)
        assert all(np.array_equal(a, b) for a, b in zip(ours, others))
        assert all(np.array_equal(obs[key], theirs[key]) for key in obs)


def test_film(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    gym.register("Crafter-Symbols-Short", "envs.crafter_text:CrafterText", max_episode_steps=5,
                 kwargs={"task": "EatCow", "pixels": False})
    envs.record(lambda obs: np.zeros(1, int), "Crafter-Symbols-Short", 1, 0, tmp_path)
    assert (tmp_path / "episode-0.mp4").stat().st_size > 1000
