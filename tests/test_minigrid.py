"""MiniGrid: batched stepping is minigrid's to the last bit, snapshots continue exactly, rules say what KIAN's say."""
import io

import gymnasium as gym
import numpy as np
import pytest
import torch
from minigrid.core.grid import Grid
from minigrid.core.world_object import Ball, Box, Door, Floor, Goal, Key, Lava
from minigrid.envs import EmptyEnv, UnlockEnv, UnlockPickupEnv
from minigrid.minigrid_env import MiniGridEnv
from minigrid.wrappers import FlatObsWrapper

import envs
import knowledge
from envs.minigrid import MiniGridVectorEnv, PlainMiniGridVectorEnv
from knowledge import KnowledgeError
from runtime import to_plain

pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date")

GRIDS = sorted(name for name in gym.registry if name.startswith(("MiniGrid-", "BabyAI-")))
WITH_AUTO = [name for name in GRIDS if name.startswith("MiniGrid-") and "auto" in knowledge.groups_for(name)]


class Zoo:
    """One small room full of everything: what random actions would hardly ever meet elsewhere."""

    def _gen_grid(self, width, height):
        self.grid = Grid(width, height)
        self.grid.wall_rect(0, 0, width, height)
        self.door, self.obj = Door("red", is_locked=True), Box("red", Key("blue"))
        things = [self.door, self.obj, Key("red"), Key("blue"), Box("blue", Key("red")), Box("grey", Ball("green")),
                  Box("green", Key("red")), Door("red", is_locked=True), Door("blue", is_open=True), Goal(), Lava(),
                  Floor("red")]
        for thing in things:
            self.place_obj(thing)
        MiniGridEnv.place_agent(self)
        self.mission = ""


class ZooPlain(Zoo, EmptyEnv):
    pass


class ZooUnlock(Zoo, UnlockEnv):
    pass


class ZooPickup(Zoo, UnlockPickupEnv):
    pass


class ZooOwnStep(ZooPlain):
    def step(self, action):
        return super().step(2 if action == 6 else action)


for cls in (ZooPlain, ZooUnlock, ZooPickup, ZooOwnStep):
    gym.register(f"MiniGrid-{cls.__name__}-v0", cls)


class Player:
    """Random actions, or advice of random rules: that gets further."""

    def __init__(self, env_id, seed=0):
        self.rng, self.rules = np.random.default_rng(seed), list(knowledge.rules_for(env_id).values())

    def __call__(self, obs):
        image = torch.from_numpy(obs["image"])
        side = (7 - image.shape[1]) // 2
        image = torch.nn.functional.pad(image, (0, 0, 2 * side, 0, side, side))  # what rules read: 7 wide
        advice = torch.stack([rule({"image": image}) for rule in self.rules], 1).numpy()
        n, _, actions = advice.shape
        advice = advice[np.arange(n), self.rng.integers(len(self.rules), size=n)]  # (n, rules, A) -> (n, A)
        likely = self.rng.random((n, actions)) * (1 + 3 * advice)
        if actions == 7:  # hands on whatever is ahead
            likely[:, 3:6] *= 1 + 2 * np.isin(obs["image"][:, obs["image"].shape[1] // 2, -2, :1], [1, 4, 5, 6, 7])
        return likely.argmax(1)


def step_beside_gymnasium(vec, env_id, steps, **kwargs):
    """Compare everything that `vec` returns with `gym.make`; the number of terminated and of truncated episodes."""
    n = vec.num_envs
    plain = [envs.make(env_id, disable_env_checker=True, **kwargs) for _ in range(n)]
    obs, player = vec.reset(7), Player(env_id)
    theirs = [env.reset(seed=7 + i)[0] for i, env in enumerate(plain)]
    ends = np.zeros(2, int)
    for _ in range(steps):
        action = player(obs)
        for i in range(n):
            assert np.array_equal(obs["image"][i], theirs[i]["image"]) and obs["direction"][i] == theirs[i]["direction"]
        obs, reward, terminated, truncated, info = vec.step(action)
        ends += terminated.sum(), truncated.sum()
        for i, env in enumerate(plain):
            theirs[i], *numbers, _ = env.step(action[i])
            assert [reward[i], terminated[i], truncated[i]] == numbers
            assert info["success"][i] == (numbers[0] > 0)
            assert np.array_equal(info["final_obs"]["image"][i], theirs[i]["image"])
            assert info["final_obs"]["direction"][i] == theirs[i]["direction"]
            if numbers[1] or numbers[2]:
                theirs[i] = env.reset()[0]
    return ends


@pytest.mark.parametrize("env_id", WITH_AUTO)
def test_batched_is_minigrid_to_the_last_bit(env_id):
    vec = envs.make_vec(env_id, 2, max_steps=40)  # short, so as to see time-outs and resets
    assert isinstance(vec, MiniGridVectorEnv) and vec.max_episode_steps == 40
    assert step_beside_gymnasium(vec, env_id, 100, max_steps=40).sum() >= 4


@pytest.mark.parametrize("task", ["ZooPlain", "ZooUnlock", "ZooPickup"])  # the first sees through walls
@pytest.mark.parametrize("width", [7, 5])
def test_batched_objects_are_minigrids(task, width):
    env_id = f"MiniGrid-{task}-v0"
    vec = envs.make_vec(env_id, 6, max_steps=60, agent_view_size=width)
    assert isinstance(vec, MiniGridVectorEnv)
    terminated, truncated = step_beside_gymnasium(vec, env_id, 200, max_steps=60, agent_view_size=width)
    assert terminated > 0 and truncated > 0


@pytest.mark.parametrize("env_id", ["MiniGrid-ZooOwnStep-v0", "MiniGrid-PutNear-6x6-N2-v0", "MiniGrid-MemoryS7-v0",
                                    "BabyAI-GoToRedBall-v0", "BabyAI-KeyCorridorS3R1-v0"])
def test_other_tasks_are_stepped_as_they_are(env_id):
    vec = envs.make_vec(env_id, 2, max_steps=40)
    assert isinstance(vec, PlainMiniGridVectorEnv) and vec.max_episode_steps == 40
    assert step_beside_gymnasium(vec, env_id, 70, max_steps=40).sum() >= 2


def test_wrappers_around_a_task_count(monkeypatch):
    """The fast class, which steps the bare task, leaves them out; and what they observe need be no grid."""
    class Cost(gym.RewardWrapper):
        def reward(self, reward):
            return reward - 0.01
    around = {"MiniGrid-ZooCost-v0": Cost, "MiniGrid-ZooFlat-v0": lambda task: FlatObsWrapper(task)}
    for env_id, wrapper in around.items():
        monkeypatch.setitem(gym.registry, env_id, gym.envs.registration.EnvSpec(
            env_id, lambda wrapper=wrapper, **kwargs: wrapper(EmptyEnv(size=5, **kwargs))))
    vec = envs.make_vec("MiniGrid-ZooCost-v0", 2)
    assert step_beside_gymnasium(vec, "MiniGrid-ZooCost-v0", 120).sum() >= 1
    vec.reset(1)
    assert vec.step(np.zeros(2, np.int64))[1].tolist() == [-0.01, -0.01]
    assert len(envs.make_vec("MiniGrid-ZooFlat-v0", 2).reset(1).shape) == 2


@pytest.mark.parametrize("env_id, fast", [
    *((name, True) for name in ("MiniGrid-DoorKey-6x6-v0", "MiniGrid-Dynamic-Obstacles-6x6-v0", "MiniGrid-ZooPickup-v0",
                                "MiniGrid-ZooUnlock-v0")),
    *((name, False) for name in ("MiniGrid-DoorKey-6x6-v0", "MiniGrid-Dynamic-Obstacles-6x6-v0",
                                 "MiniGrid-ObstructedMaze-1Dlhb-v0", "BabyAI-PutNextS5N2Carrying-v0",
                                 "BabyAI-BossLevel-v0"))])
def test_snapshot_continues_exactly(env_id, fast):
    vec, other = envs.make_vec(env_id, 3, seed=3, fast=fast), envs.make_vec(env_id, 3, seed=99, fast=fast)
    assert isinstance(vec, MiniGridVectorEnv) is fast
    obs, player = vec.reset(3), Player(env_id)
    for _ in range(43):
        obs = vec.step(player(obs))[0]
    other.step(player(obs))
    file = io.BytesIO()
    torch.save(to_plain(envs.snapshot(vec)), file)
    file.seek(0)
    envs.restore(other, torch.load(file, weights_only=True))  # plain types: nothing is executed
    assert np.array_equal(vec.elapsed, other.elapsed)
    for _ in range(60):
        action = player(obs)
        (obs, *ours, info), (their_obs, *theirs, their_info) = vec.step(action), other.step(action)
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))
        for a, b in ((obs, their_obs), (info["final_obs"], their_info["final_obs"])):
            assert all(np.array_equal(a[key], b[key]) for key in a)
    again = envs.snapshot(other)["copies"], envs.snapshot(vec)["copies"]
    assert str(again[0]) == str(again[1])


@pytest.mark.parametrize("fast", [True, False])
def test_goal_success_and_final_obs(fast):
    vec = envs.make_vec("MiniGrid-Empty-5x5-v0", 2, seed=0, fast=fast)
    assert vec.max_episode_steps == 100 and not vec.is_goal_env and vec.action_space.n == 7
    assert set(vec.observation_space.spaces) == {"image", "direction"}
    for action in (2, 2, 1, 2):
        obs, reward, terminated, truncated, info = vec.step(np.array([action, 0]))  # the second one turns on the spot
        assert not (terminated | truncated).any() and (reward == 0).all() and (info["success"] == 0).all()
    obs, reward, terminated, truncated, info = vec.step(np.array([2, 0]))
    assert obs["image"].dtype == np.uint8 and obs["image"].shape == (2, 7, 7, 3) and obs["direction"].dtype == np.int64
    assert reward.tolist() == [1 - 0.9 * 5 / 100, 0] and info["success"].tolist() == [1, 0]
    assert terminated.tolist() == [True, False] and not truncated.any()
    assert info["final_obs"]["direction"].tolist() == [1, 3] and obs["direction"].tolist() == [0, 3]
    assert np.array_equal(info["final_obs"]["image"][1], obs["image"][1]) and vec.elapsed.tolist() == [0, 5]
    for _ in range(95):
        _, _, terminated, truncated, _ = vec.step(np.array([0, 0]))
    assert truncated.tolist() == [False, True] and not terminated.any()


def test_evaluate():
    to_goal = iter([2, 2, 1, 2, 2] * 4)
    result = envs.evaluate(lambda obs: np.full(2, next(to_goal)), envs.make_vec("MiniGrid-Empty-5x5-v0", 2), 8, seed=0)
    assert result["success_rate"] == 1 and result["length_mean"] == 5 and result["return_mean"] == pytest.approx(0.955)


def test_film(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    actions, log = iter([2, 2, 1, 2, 2]), []

    def act(obs):
        log.append(([0.7, 0.3], 0))
        return np.array([next(actions)])

    envs.record(act, "MiniGrid-Empty-5x5-v0", 1, 0, tmp_path, ["inner", "minigrid.go_to_goal"], log)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["actions-0.png", "attention-0.png", "episode-0.mp4"]
    vec = envs.make_vec("MiniGrid-Empty-5x5-v0", 1, seed=0, render_mode="rgb_array")  # only plain stepping can render
    assert vec.render().shape == (160, 160, 3)


def test_ids(capsys):
    with pytest.raises(envs.EnvError, match="did you mean MiniGrid-DoorKey-5x5-v0"):
        envs.make_vec("MiniGrid-DorKey-5x5-v0", 1)
    with pytest.raises(envs.EnvError, match="SimpleMaze.png"):  # not in the package
        envs.make_vec("MiniGrid-WFC-MazeSimple-v0", 1)
    envs.ids._announced.clear()
    for _ in range(2):
        assert envs.make_vec("MiniGrid-MultiRoom-N4-S5-v0", 1).max_episode_steps == 6 * 20
    envs.make_vec("BabyAI-PutNextLocal-v0", 16, seed=0)  # draws missions until one is possible
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and "6 rooms" in err and "-v1" in err
    assert envs.make_vec("BabyAI-GoToSeq-v0", 1).max_episode_steps is None  # each mission has its own


def test_discrete_actions_elsewhere():
    vec = envs.make_vec("CartPole-v1", 3, seed=0)
    obs, reward, _, _, info = vec.step(np.array([0, 1, 1]))
    assert obs.shape == (3, 4) and reward.tolist() == [1, 1, 1] and np.isnan(info["success"]).all()
    assert not vec.is_goal_env and envs.make_vec("FetchReach-v2", 1).is_goal_env


# ---- rules ---------------------------------------------------------------------------------------

EXAMPLE = {"image": torch.randint(0, 11, (16, 7, 7, 3), dtype=torch.uint8), "direction": torch.zeros(16).long()}
DOORKEY, ROOMS = "MiniGrid-DoorKey-5x5-v0", "MiniGrid-MultiRoom-N4-S5-v1"


def view(*cells, state=0):
    """One observation with objects (x, y, kind), all in `state`."""
    image = torch.zeros(1, 7, 7, 3, dtype=torch.uint8)
    for x, y, kind in cells:
        image[0, x, y] = torch.tensor([kind, 0, state])
    return {"image": image}


def advice(rule, obs, env_id=DOORKEY):
    return knowledge.rules_for(env_id)[f"minigrid.{rule}"](obs)[0].tolist()


def test_rules_of_the_specification():
    """T14: walls, a door and a key around the agent."""
    obs = view(*((x + 1, 5, kind) for x, kind in enumerate((2, 4, 2, 2, 2))),
               *((x + 1, 6, kind) for x, kind in enumerate((2, 1, 1, 5, 2))), state=2)
    assert advice("get_key", obs) == [0, 1, 0, 0, 0, 0, 0]
    assert advice("open_door", obs) == advice("open_locked_door", obs) == [1, 0, 1, 0, 0, 0, 0]
    assert advice("go_to_goal", obs) == advice("open_unlocked_door", obs) == [0] * 7
    assert advice("avoid_obstacles", obs) == [1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("rule, kind, state, act", [
    ("get_key", 5, 0, 3), ("get_ball", 6, 0, 3), ("open_door", 4, 0, 5), ("open_unlocked_door", 4, 1, 5),
    ("open_one_unlocked_door", 4, 1, 5), ("open_locked_door", 4, 2, 5), ("go_to_goal", 8, 0, 2)])
def test_toward(rule, kind, state, act):
    only = [float(i == act) for i in range(7)]
    assert advice(rule, view((3, 5, kind), state=state)) == only
    assert advice(rule, view((3, 6, kind), state=state)) == [0] * 7  # carried, or under the agent
    assert advice(rule, view((3, 0, kind), state=state)) == [0, 0, 1, 0, 0, 0, 0]
    assert advice(rule, view((6, 6, kind), state=state)) == [0, 1, 0, 0, 0, 0, 0]
    two = view((0, 2, kind), (5, 6, kind), state=state)
    assert advice(rule, two) == ([1, 0, 1, 0, 0, 0, 0] if "one" in rule else [1, 1, 1, 0, 0, 0, 0])
    many = view(*((x, y, kind) for x in range(7) for y in range(7)), state=state)
    if rule == "go_to_goal":
        assert advice(rule, many) == [1, 1, 1, 0, 0, 0, 0]
    elif "one" not in rule:
        assert advice(rule, many) == only  # one straight ahead outvotes all others
    if kind == 4 and rule != "open_door":
        assert advice(rule, view((3, 5, kind), state=0)) == [0] * 7


@pytest.mark.parametrize("rule, kind", [("avoid_obstacles", 2), ("avoid_obstacles", 9), ("avoid_ball", 6)])
def test_avoid(rule, kind):
    assert advice(rule, view()) == advice(rule, view((3, 4, kind), (1, 6, kind))) == [1, 1, 1, 0, 0, 0, 0]
    for cell, turn in (((2, 6), 0), ((4, 6), 1), ((3, 5), 2)):
        assert advice(rule, view((*cell, kind))) == [float(i != turn) for i in range(3)] + [0] * 4


@pytest.mark.parametrize("objects, expected", [
    ((1, 2, 2), [0, 0, 1]),  # ahead is free: straight on, whatever is beside
    ((2, 1, 2), [1, 0, 0]), ((2, 2, 1), [0, 1, 0]), ((9, 3, 4), [1, 0, 0]),  # lava ahead, floor left, door right
    ((2, 1, 1), [1, 1, 0]), ((2, 2, 2), [1, 1, 0])])
def test_explore(objects, expected):
    cells = [(*cell, kind) for cell, kind in zip(((3, 5), (2, 6), (4, 6)), objects)]
    assert advice("explore", view(*cells)) == expected + [0] * 4
    assert advice("explore", view(*cells, (0, 0, 8))) == [0] * 7  # the goal is in view


def test_rules_row_by_row_on_every_id():
    for env_id in GRIDS:
        made_worse = 6 if "DoorKey" in env_id else 0  # knowledge/qualities.py
        assert len(knowledge.rules_for(env_id)) == 10 + made_worse, env_id
    for env_id, actions in ((DOORKEY, 7), ("BabyAI-GoTo-v0", 7), ("MiniGrid-Dynamic-Obstacles-8x8-v0", 3)):
        for name, rule in knowledge.rules_for(env_id).items():
            whole = rule(EXAMPLE)
            assert whole.dtype == torch.float32 and whole.shape == (16, actions)
            assert set(whole.unique().tolist()) <= {0, 1}
            rows = [rule({"image": EXAMPLE["image"][i:i + 1]}) for i in range(16)]
            assert torch.equal(whole, torch.cat(rows)), name
            assert torch.equal(whole, knowledge.rules_for(DOORKEY)[name](EXAMPLE)[:, :actions])


def test_qualities_of_doorkey():
    """Half of the views in which a rule speaks are right; the mirrored rule turns away, and stands still or drops."""
    some = torch.tensor([1, 1, 1, 2, 4, 5, 8], dtype=torch.uint8)  # nothing, walls, doors, keys, goals
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(4000, 7, 7, 3, dtype=torch.uint8)
    image[..., 0] = some[torch.randint(7, (4000, 7, 7), generator=generator)]
    image[:50] = 0
    for name in ("get_key", "open_door", "go_to_goal"):
        right, half, mirrored = (knowledge.rules_for(DOORKEY)[f"minigrid.{name}{suffix}"]({"image": image})
                                 for suffix in ("", "-half", "-mirrored"))
        speaks, same = right.any(1), (half == right).all(1)
        assert same[speaks].float().mean().item() == pytest.approx(0.5, abs=0.12)  # some noise is right by chance
        assert half[~same].sum(1).eq(1).all() and not half[~speaks].any() and not mirrored[~speaks].any()
        assert torch.equal(mirrored[:, [1, 0, 4]], right[:, [0, 1, 3]])
        assert torch.equal(mirrored[:, 6], torch.maximum(right[:, 2], right[:, 5])) and not mirrored[:, [2, 3, 5]].any()


def auto(env_id):
    actions = 3 if "Dynamic" in env_id else 7
    return [name.removeprefix("minigrid.") for name in knowledge.load("auto", env_id, actions, EXAMPLE)]


def test_auto_is_the_table_of_the_paper():
    assert auto("MiniGrid-Empty-Random-5x5-v0") == ["go_to_goal"]
    assert auto("MiniGrid-Unlock-v0") == ["get_key", "open_door"]
    assert auto(DOORKEY) == auto("MiniGrid-DoorKey-16x16-v0") == ["get_key", "open_door", "go_to_goal"]
    assert auto("MiniGrid-Dynamic-Obstacles-Random-6x6-v0") == ["go_to_goal", "avoid_ball"]
    assert auto("MiniGrid-LavaCrossingS9N2-v0") == ["go_to_goal", "avoid_obstacles"]
    assert auto("MiniGrid-KeyCorridorS3R3-v0") == auto("BabyAI-KeyCorridorS3R3-v0") == [
        "open_one_unlocked_door", "open_locked_door", "get_key", "get_ball"]
    assert auto(ROOMS) == auto("MiniGrid-MultiRoom-N4-S5-v0") == ["open_unlocked_door", "go_to_goal", "avoid_obstacles"]
    assert auto("MiniGrid-UnlockPickup-v0") == ["get_key", "open_locked_door"]  # not those of Unlock
    assert list(knowledge.load("minigrid.all", "BabyAI-GoTo-v0", 7, EXAMPLE)) == [
        f"minigrid.{name}" for name in ("get_key", "open_door", "go_to_goal", "avoid_ball", "avoid_obstacles",
                                        "open_unlocked_door")]
    assert knowledge.advise({}, EXAMPLE, 7).dtype == torch.float32


@pytest.mark.parametrize("spec, env_id, parts", [
    ("auto", "BabyAI-GoTo-v0", ("no default rules", "minigrid.all", "minigrid.get_key", "minigrid.avoid_ball")),
    ("minigrid.get_keys", DOORKEY, ("did you mean minigrid.get_key?",)),
    ("minigrid.official", "MiniGrid-LavaGapS5-v0", ("minigrid.official",)),
    ("fetch.v4", DOORKEY, ("fetch.v4", DOORKEY))])
def test_errors(spec, env_id, parts):
    with pytest.raises(KnowledgeError) as caught:
        knowledge.load(spec, env_id, 7, EXAMPLE)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_groups(monkeypatch):
    for table in ("_rules", "_groups", "_families"):
        monkeypatch.setattr(knowledge.registry, table, {})
    for name in ("toy.up", "toy.down"):
        knowledge.rule(name, envs="Toy")(lambda obs: obs)
    knowledge.group("toy", ["toy.down", "toy.up"], "Toy")
    knowledge.group("toy", ["toy.up"], ("ToyHard", "Game"))
    assert knowledge.groups_for("ToyEasy-v0") == {"toy": ["toy.down", "toy.up"]}
    assert knowledge.groups_for("ToyHard-v0") == {"toy": ["toy.up"]}
    with pytest.raises(ValueError, match="twice"):
        knowledge.group("toy", ["toy.up"], "Toy")
