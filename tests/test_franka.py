"""The Franka tasks: what is observed, drawn and rewarded, that their physics is true, and that they can be solved.

Two scripts solve them, a grasp and a push, without learning and without knowledge of the simulator.
"""
import math
import socket
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import envs
import knowledge
from algos import sac_kian
from envs import franka
from tests import need_renderer

PUSH, SLIDE = "FrankaPushSparse-v0", "FrankaSlideSparse-v0"
PICK, SKILL = "FrankaPickAndPlaceSparse-v0", "FrankaSkill-v0"


# ---- scripts -------------------------------------------------------------------------------------


def level(v):
    return v * (1, 1, 0)


def row_norm(v):
    return np.linalg.norm(v, axis=-1, keepdims=True)


class Grasp:
    """Come down on the object with open fingers, close them for six steps, lead the object to the goal, or straight up
    to `lift` m."""

    def __init__(self, speed=1.0, lift=None):
        self.speed, self.lift, self.closed, self.down = speed, lift, 0, False

    def __call__(self, obs):
        p, o, g = obs["observation"][:, 0:3], obs["achieved_goal"], obs["desired_goal"]
        g = g if self.lift is None else level(o) + (0, 0, self.lift)
        self.down |= row_norm(level(o - p)) < 0.004
        at_object = self.down & (row_norm(o + (0, 0, 0.004) - p) < 0.006)
        self.closed = np.where((self.closed > 0) | at_object, self.closed + 1, 0)  # (num, 1)
        aim = np.where(self.down, o + (0, 0, 0.004), o + (0, 0, 0.09)) - p
        aim = np.where(self.closed > 0, np.where(self.closed > 6, self.speed * np.clip(g - o, -0.04, 0.04), 0), aim)
        return np.hstack([np.clip(aim / 0.04, -1, 1), np.where(self.closed > 0, -1.0, 1.0)]).astype(np.float32)


class Shove:
    """Stand behind the cube on its line to the goal, push it, steer back onto the line, stand anew when off it."""

    def __call__(self, obs):
        p, o, g = obs["observation"][:, 0:3], obs["achieved_goal"], obs["desired_goal"]
        left = row_norm(level(g - o))
        line = level(g - o) / (left + 1e-9)
        half = 0.02 * np.abs(line).sum(-1, keepdims=True)  # how far a square with edges along x and y reaches back
        stand = o - (half + 0.024) * line
        stand[:, 2] = 0.018
        along = ((o - p) * line).sum(-1, keepdims=True)
        aside = level(o - p) - along * line
        low, there = p[:, 2:] < 0.035, row_norm(level(stand - p)) < 0.015
        ready = low & (row_norm(aside) < 0.022) & (along > 0) & (along < 0.12)
        push = np.clip(left - 0.01, 0, 0.03) * line + aside + (0, 0, 1) * (0.018 - p[:, 2:])
        aim = np.where(there, stand, stand + (0, 0, 0.07)) - p
        aim = np.where(low & ~there, (0, 0, 0.04), aim)  # up first, not through the cube
        aim = np.where(left < 0.02, 0, np.where(ready, push, aim))
        return np.clip(aim / 0.04, -1, 1).astype(np.float32)


def play(script, env_id, num=24, steps=50, options=None):
    """Episodes that do not end early: final distances (num,) m, whether the start was not solved already (num,), final
    heights (num,) m, last info."""
    vec = envs.make_vec(env_id, num, time_feature=False, terminate_on_success=False)
    obs = vec.reset(100, options)
    unsolved = row_norm(obs["achieved_goal"] - obs["desired_goal"])[:, 0] > franka.THRESHOLD
    for _ in range(steps):
        action = script(obs)
        if action.shape[1] < vec.action_space.shape[0]:
            action = np.hstack([action, -np.ones((num, 1), np.float32)])  # fingers shut
        obs, *_, info = vec.step(action)
    final = info["final_obs"]
    distance = row_norm(final["achieved_goal"] - final["desired_goal"])[:, 0]
    return distance, unsolved, final["achieved_goal"][:, 2], info


# ---- the tasks can be solved, and not all can -----------------------------------------------------


@pytest.mark.parametrize("script, env_id", [(Grasp(), PICK), (Shove(), PUSH)])
def test_scripts_hold_the_object_at_the_goal(script, env_id):
    distance, unsolved, _, _ = play(script, env_id)
    assert unsolved.sum() >= 20 and (distance[unsolved] < franka.THRESHOLD).mean() >= 0.9


def test_ten_kilograms_are_lifted_and_thirty_are_not():
    options = {"mass": [5.0, 5.0, 10.0, 10.0, 30.0, 30.0]}
    _, _, height, info = play(Grasp(speed=0.3, lift=0.12), SKILL, 6, options=options)
    assert (height[:4] > 0.1).all() and (height[4:] < 0.021).all()
    assert info["episode_skill"].tolist() == ["pick"] * 4 + ["push"] * 2


def test_skills():
    names = [franka.SKILLS[franka.skill(*state)] for state in (
        (0.05, False, True), (0.05, True, True), (0.05, False, False), (0.02, True, True), (0.018, True, False))]
    assert names == ["pick", "roll", "roll", "push", "down"]
    assert play(Shove(), SKILL, 4, steps=15)[-1]["skill"].tolist() == ["push"] * 4
    assert envs.make(SKILL).reset(seed=0)[1]["skill"] == "push"  # by its height: a cube at rest on the table


@pytest.mark.parametrize("gap, expected", [(0.0005, "pick"), (0.003, "roll")])
def test_what_is_near_the_fingers_is_not_held(gap, expected):
    """The cube in the air between fingers `gap` m from it, one simulated step later."""
    world = franka.World("Skill", 1, frame_skip=5)
    world.reset(0, np.random.default_rng(0))
    data = world.data[0]
    data.qpos[:3] = world.ee_pos[0]
    data.qpos[world.fingers] = 0.02 + gap
    world._refresh(0)
    world.aim(np.zeros((1, 4)))
    world.advance(0)
    assert franka.SKILLS[world.skill[0]] == expected


# ---- physics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", [PUSH, SLIDE, PICK, SKILL])
def test_nothing_moves_without_an_action(env_id):
    vec = envs.make_vec(env_id, 3, seed=0, time_feature=False, terminate_on_success=False)
    world, action = vec.world, np.zeros((3, *vec.action_space.shape))
    places = np.hstack([world.ee_pos, world.object_pos])
    for _ in range(50):
        final = vec.step(action)[-1]["final_obs"]
    assert np.abs(np.hstack([final["observation"][:, :3], final["achieved_goal"]]) - places).max() < 1e-3


def test_gripper_covers_three_quarters_of_an_action():
    vec = envs.make_vec(PICK, 3, seed=0)
    places = [vec.world.ee_pos.copy()]
    for _ in range(5):
        vec.world.aim(np.array([[0, 1, 0, 0], [0, -1, 0, 0], [0, 0.5, 0, 0]]))
        for i in range(3):
            vec.world.advance(i)
        places.append(vec.world.ee_pos.copy())
    steps = np.diff(np.array(places)[..., 1], axis=0)  # (5, 3)
    assert (0.03 < steps[:, 0]).all() and (steps[:, 0] < 0.045).all()
    assert steps[:, 1] == pytest.approx(-steps[:, 0], abs=1e-3)
    assert steps[:, 2] == pytest.approx(steps[:, 0] / 2, abs=2e-3)


@pytest.mark.parametrize("friction, expected", [(0.05, 0.2548), (0.5, 0.0255)])
def test_sliding_stops_where_friction_says(friction, expected):
    world = franka.World("Push", 1)
    world.set_physics({"friction": friction})
    world.reset(0, np.random.default_rng(0))
    start = world.object_pos[0, 1]
    world.data[0].qvel[:2] = 0, 0.5  # m/s, away from the gripper: v^2 / (2 mu g)
    for _ in range(60):
        world.aim(np.zeros((1, 3)))
        world.advance(0)
    assert world.object_pos[0, 1] - start == pytest.approx(expected, abs=0.01 if friction == 0.05 else 0.005)


def test_friction_of_the_skill_task_is_that_of_bullet():
    env = envs.make(SKILL)
    for given, simulated in ((1.0, 0.5), (5.0, 2.5), (30.0, 10.0)):
        env.reset(seed=0, options={"friction": given})
        assert env.unwrapped.world.models[0].geom("table").friction[0] == simulated


def test_random_actions_keep_the_simulator_sound():
    vec = envs.make_vec(PICK, 4, seed=0)
    rng = np.random.default_rng(0)
    for _ in range(50):
        obs, reward, *_ = vec.step(rng.uniform(-1, 1, (4, 4)))
        assert all(np.isfinite(value).all() for value in (reward, *obs.values()))
    assert all(data.warning[i].number == 0 for data in vec.world.data for i in range(len(data.warning)))


# ---- what is observed, drawn and rewarded ---------------------------------------------------------


@pytest.mark.parametrize("env_id", franka.IDS)
def test_gymnasium_finds_nothing_wrong(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*A Box observation space m")  # goals and places have no bounds
        check_env(envs.make(env_id).unwrapped, skip_render_check=True)
    env = envs.make(env_id)
    fingers = env_id.startswith((PICK[:12], SKILL))
    assert env.spec.max_episode_steps == 50
    assert env.action_space.shape == (3 + fingers,)
    assert env.observation_space["observation"].shape == (18 + fingers,)


@pytest.mark.parametrize("name, k, scale", [("Push", 0, 0.05), ("PickAndPlace", 1, 0.05), ("Skill", 1, 1.0)])
def test_observation(name, k, scale):
    world = franka.World(name, 2)
    for i in range(2):
        world.reset(i, np.random.default_rng(i))
    data = world.data[1]
    data.qpos[:7] = 0.5, 0.1, 0.3, math.cos(0.2), 0, 0, math.sin(0.2)  # turned by 0.4 about z
    data.qvel[:6] = 0.1, 0.2, 0.3, 0, 0, 2.0
    data.qpos[world.fingers] = 0.01, 0.02
    data.qvel[6] = 0.5  # rad/s of the joint at the base, whose axis is vertical
    world._refresh(1)
    obs = world.observe()
    x, ee = obs["observation"][1], world.ee_pos[1]
    assert x[:3] == pytest.approx([0.638, 0, 0.2], abs=1e-3)
    assert x[3:6] == pytest.approx([-0.5 * ee[1] * scale, 0.5 * ee[0] * scale, 0], abs=1e-9)
    if k:
        assert x[6] == pytest.approx(0.03)
    assert x[6 + k:9 + k].tolist() == obs["achieved_goal"][1].tolist() == [0.5, 0.1, 0.3]
    assert x[9 + k:12 + k] == pytest.approx([0, 0, 0.4])
    assert x[12 + k:] == pytest.approx(np.array([0.1, 0.2, 0.3, 0, 0, 2.0]) * scale)
    assert obs["desired_goal"][1].tolist() == world.goal[1].tolist() == data.mocap_pos[1].tolist()


def test_reward_is_vectorised():
    goal, away = np.zeros((3, 3)), np.array([[0.049, 0, 0], [0, 0.03, 0.041], [3, 4, 0]])
    assert envs.make(PUSH).unwrapped.compute_reward(away, goal, {}).tolist() == [0, -1, -1]
    assert envs.make(PICK.replace("Sparse", "Dense")).unwrapped.compute_reward(away[2], goal[2], {}) == -5
    assert envs.make(SKILL).unwrapped.compute_reward(away, goal, {})[[0, 2]] == pytest.approx([-0.049, -5])


@pytest.mark.parametrize("name, goal_x, height",
                         [("Push", 0.6, 0.02), ("Slide", 1.0, 0.03), ("PickAndPlace", 0.6, 0.02), ("Skill", 0.6, 0.02)])
def test_places_fill_their_ranges(name, goal_x, height):
    world, rng, objects, goals = franka.World(name, 1), np.random.default_rng(0), [], []
    for _ in range(1000):
        world.reset(0, rng)
        objects.append(world.object_pos[0].copy())
        goals.append(world.goal[0].copy())
    objects, goals = np.array(objects), np.array(goals)
    for places, x in ((objects, 0.6), (goals, goal_x)):
        assert places[:, :2].min(0) == pytest.approx([x - 0.15, -0.15], abs=2e-3) and (places[:, 0] >= x - 0.15).all()
        assert places[:, :2].max(0) == pytest.approx([x + 0.15, 0.15], abs=2e-3) and (places[:, 0] <= x + 0.15).all()
    assert objects[:, 2].tolist() == [height] * 1000
    air = goals[:, 2] > height
    assert 0.65 < air.mean() < 0.75 and 0.21 < goals[:, 2].max() <= 0.22 if name == "PickAndPlace" else not air.any()
    assert abs(np.corrcoef(objects[:, 0], goals[:, 0])[0, 1]) < 0.1


def test_success_ends_an_episode_unless_told_otherwise():
    lengths = []
    for terminate in (True, False):
        env = envs.make(PUSH, terminate_on_success=terminate)
        env.reset(seed=0)
        world = env.unwrapped.world
        world.goal[0] = world.object_pos[0] + (0.03, 0, 0)
        _, reward, terminated, truncated, info = env.step(np.zeros(3))
        assert (reward, truncated, info["is_success"]) == (0.0, False, 1.0)
        lengths.append(terminated)
        vec = envs.make_vec(PUSH, 2, seed=0, terminate_on_success=terminate)
        vec.world.goal[1] = vec.world.object_pos[1] + (0.03, 0, 0)
        _, reward, terminated, truncated, info = vec.step(np.zeros((2, 3)))
        assert reward.tolist() == [-1, 0] and info["success"].tolist() == [0, 1] and not truncated.any()
        assert terminated.tolist() == [False, terminate] and vec.elapsed.tolist() == [1, 1 - terminate]
    assert lengths == [True, False]


# ---- options, seeds, snapshots, the fast class ----------------------------------------------------


def test_options_stay_until_changed():
    env = envs.make(PUSH, mass=2.0)
    assert env.reset(seed=0)[1] == {"is_success": 0.0, "mass": 2.0, "friction": 1.0}
    env.reset(options={"mass": 30, "friction": 0.3})
    assert (info := env.reset()[1])["mass"] == 30 and info["friction"] == 0.3
    model, shared = env.unwrapped.world.models[0], franka.build("Push")
    assert model.body("object").mass[0] == 30 and model.geom("table").friction[0] == 0.3
    assert model.body("object").inertia == pytest.approx(30 * 4 / 6 * 0.02**2)  # m (a^2 + a^2) / 12, a = 2 * 0.02
    assert model.body("object").subtreemass[0] == 30  # what follows from the mass was computed anew
    assert shared.body("object").mass[0] == 1 and envs.make(PUSH).reset(seed=0)[1]["mass"] == 1
    vec = envs.make_vec(PUSH, 2, seed=0, friction=0.5)
    vec.reset(options={"mass": np.array([3.0, 4.0])})
    info = vec.step(np.zeros((2, 3)))[-1]
    assert info["mass"].tolist() == [3, 4] and info["friction"].tolist() == [0.5, 0.5]
    assert envs.make_vec(PUSH, 2, mass=[3.0, 4.0]).world.physics[:, 0].tolist() == [3, 4]
    assert env.reset(options={"mass": np.array(2.0)})[1]["mass"] == 2


@pytest.mark.parametrize("options", [
    {"mass": 0}, {"mass": -1.0}, {"mass": 1e-320}, {"mass": 1e300}, {"mass": math.nan}, {"mass": "heavy"},
    {"mass": True}, {"friction": -0.1}, {"friction": math.inf}, {"friction": None}, {"weight": 1.0}])
def test_nonsense_is_named_in_one_line(options):
    env = envs.make(PUSH)
    env.reset(seed=0)
    (name, value), = options.items()
    for reset in (lambda: env.reset(options=options), lambda: envs.make_vec(PUSH, 2).reset(0, options)):
        with pytest.raises(envs.EnvError, match=name) as error:
            reset()
        assert "\n" not in str(error.value) and (name == "weight" or repr(value) in str(error.value))
    assert env.reset()[1]["mass"] == env.reset()[1]["friction"] == 1


def test_nonsense_arguments():
    for wrong in ({"frame_skip": 7}, {"frame_skip": 0}, {"reward_type": "rich"}, {"mass": -1}):
        with pytest.raises(envs.EnvError, match=str(list(wrong.values())[0])):
            envs.make_vec(PUSH, 1, **wrong)
    with pytest.raises(envs.EnvError, match="copies: 2"):
        envs.make_vec(PUSH, 2).reset(0, {"mass": [1.0, 2.0, 3.0]})
    for kwargs, words in (({"frame_skip": 25.0}, "25.0"), ({"weight": 1.0}, "weight"), ({"goal_range": -1.0}, "-1"),
                          ({"goal_range": 10.1}, "10.1"), ({"goal_range": math.nan}, "nan")):
        for fast in (True, False):
            with pytest.raises(envs.EnvError, match=words) as error:
                envs.make_vec(PUSH, 1, fast=fast, **kwargs)
            assert "\n" not in str(error.value)
    with pytest.raises(envs.EnvError, match="weight"):
        envs.make(PUSH, weight=1.0)
    with pytest.raises(envs.EnvError, match="goal_range"):
        envs.make_vec("FetchPush-v2", 1, goal_range=11.0)
    with pytest.raises(envs.EnvError, match="rgb_array"):
        envs.make(PUSH).unwrapped.render()
    with pytest.raises(envs.EnvError, match="film"), warnings.catch_warnings(action="ignore"):
        envs.make(PUSH, render_mode="film")


def test_options_are_changed_all_or_none():
    vec = envs.make_vec(PUSH, 2, seed=0)
    for options in ({"mass": [3.0, -1.0]}, {"mass": 3.0, "friction": [0.5, math.nan]}, {"mass": 3.0, "weight": 1.0}):
        with pytest.raises(envs.EnvError):
            vec.reset(0, options)
        assert vec.world.physics.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("env_id, wrong", [(PUSH, np.zeros((2, 4))), (PICK, np.zeros((2, 3))), (PICK, np.zeros((1, 4))),
                                           (PUSH, np.full((2, 3), np.nan)), (PUSH, np.full((2, 3), np.inf))])
def test_nonsense_actions(env_id, wrong):
    vec, env = envs.make_vec(env_id, 2, seed=0), envs.make(env_id).unwrapped
    env.reset(seed=0)
    before = vec.world.snapshot(0)["mujoco"]["state"]
    for step in (lambda: vec.step(wrong), lambda: env.step(wrong[0] if len(wrong) == 2 else wrong)):
        with pytest.raises(envs.EnvError, match="actions"):
            step()
    assert np.array_equal(before, vec.world.snapshot(0)["mujoco"]["state"])


@pytest.mark.parametrize("env_id", [PUSH, "FetchPush-v2"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_step_before_the_first_reset_is_refused(env_id, fast):
    vec, other = (envs.make_vec(env_id, 2, seed=seed, fast=fast) for seed in (None, 0))
    action = np.zeros((2, *vec.action_space.shape))
    with pytest.raises(envs.EnvError, match="reset"):
        vec.step(action)
    envs.restore(vec, envs.snapshot(other))  # as good as a reset
    vec.step(action)


def equal(a, b):
    return all(np.array_equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize("env_id", [PUSH, SLIDE, PICK, SKILL])
def test_fast_class_is_the_plain_one_to_the_last_bit(env_id):
    vec = envs.make_vec(env_id, 3, threads=2, time_feature=False)
    plain = [envs.make(env_id) for _ in range(3)]
    options = {"mass": [0.5, 1.0, 5.0], "friction": 0.8}
    obs = vec.reset(7, options)
    theirs = [env.reset(seed=7 + i, options={"mass": options["mass"][i], "friction": 0.8})[0]
              for i, env in enumerate(plain)]
    rng, solved, cut = np.random.default_rng(0), 0, 0
    for step in range(110):  # two time limits
        assert all(equal({k: v[i] for k, v in obs.items()}, theirs[i]) for i in range(3))
        action = rng.uniform(-1.2, 1.2, (3, *vec.action_space.shape)).astype(np.float32)
        if step % 3:  # touch the object
            action[:, :3] = np.clip(20 * (obs["achieved_goal"] - obs["observation"][:, :3]), -1, 1)
        if step == 20:  # a puck that is struck like this never comes to its goal
            for world in (vec.world, plain[0].unwrapped.world):
                world.goal[0] = world.object_pos[0]
        obs, reward, terminated, truncated, info = vec.step(action)
        for i, env in enumerate(plain):
            theirs[i], their_reward, *ends, their_info = env.step(action[i])
            assert equal({k: v[i] for k, v in info["final_obs"].items()}, theirs[i])
            assert (reward[i], terminated[i], truncated[i]) == (their_reward, *ends)
            assert info["success"][i] == their_info.pop("is_success")
            assert {key: info[key][i] for key in their_info} == their_info
            if any(ends):
                theirs[i] = env.reset()[0]
            solved, cut = solved + ends[0], cut + ends[1]
    assert solved and cut


@pytest.mark.parametrize("fast", [True, False])
def test_snapshot_continues_exactly(fast):
    vec, other = (envs.make_vec(SKILL, 2, seed=seed, fast=fast, mass=mass) for seed, mass in ((3, 2.0), (99, 0.5)))
    rng = np.random.default_rng(1)

    def act(obs):  # touch the object
        aim = np.clip(20 * (obs["achieved_goal"] - obs["observation"][:, :3]), -1, 1)
        return np.hstack([aim, rng.uniform(-1, 1, (2, 1))])

    obs = vec.reset(3)
    for _ in range(20):
        obs = vec.step(act(obs))[0]
    other.step(act(obs))
    envs.restore(other, envs.snapshot(vec))
    for _ in range(40):  # passes the time limit
        action = act(obs)
        ours, theirs = vec.step(action), other.step(action)
        obs = ours[0]
        assert equal(obs, theirs[0]) and equal(ours[4]["final_obs"], theirs[4]["final_obs"])
        assert all(np.array_equal(x, y) for x, y in zip(ours[1:4], theirs[1:4]))
        assert all(np.array_equal(ours[4][key], theirs[4][key]) for key in ours[4] if key != "final_obs")


def test_same_seed_and_options_give_the_same_bits():
    def roll():
        vec, rng = envs.make_vec(PICK, 2), np.random.default_rng(0)
        obs = [vec.reset(5, {"mass": 0.7})]
        obs += [vec.step(rng.uniform(-1, 1, (2, 4)))[0] for _ in range(60)]
        return np.array([x["observation"] for x in obs])

    assert np.array_equal(roll(), roll())


def test_goals_can_be_drawn_nearer():
    for fast in (True, False):
        vec = envs.make_vec(SLIDE, 40, seed=0, goal_range=2.0, fast=fast)
        goal = vec.reset(0)["desired_goal"]
        assert 0.02 < np.abs(goal[:, :2] - (1.0, 0)).max() <= 0.03


# ---- files, frames, rules -------------------------------------------------------------------------


def test_the_arm_is_read_where_gymnasium_robotics_keeps_it(monkeypatch):
    folder = franka.assets()
    assert all((folder / name).is_file() for name in ("chain.xml", "assets.xml", "actuator.xml"))
    assert len(list(folder.glob("meshes/*/*.stl"))) == 20
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was used"))
    model = franka.build.__wrapped__("Push")
    assert (model.nq, model.nv, model.nu, model.neq, model.nmesh) == (16, 15, 2, 1, 10)
    for vec in (envs.make_vec(PUSH, 2, seed=0), envs.make_vec(PUSH, 2, seed=0, fast=False)):
        vec.step(np.zeros((2, 3)))
    monkeypatch.setattr(franka.gymnasium_robotics, "__file__", "missing/__init__.py")
    with pytest.raises(envs.EnvError, match="gymnasium-robotics"):
        franka.assets()


def test_what_is_only_looked_at_does_not_change_the_dynamics(monkeypatch):
    models, places = [franka.build("Push"), franka.build("Push", visible=True)], []
    assert models[1].nmesh == 20
    for model in models:
        monkeypatch.setattr(franka, "build", lambda name: model)
        world, rng = franka.World("Push", 1), np.random.default_rng(0)
        world.reset(0, rng)
        for _ in range(40):
            world.aim(np.clip(20 * (world.object_pos - world.ee_pos), -1, 1) + rng.uniform(-0.5, 0.5, (1, 3)))
            world.advance(0)
        places.append(world.data[0].qpos.copy())
    assert np.array_equal(*places) and abs(places[0][3]) < 1  # the object was touched


def test_camera_shows_object_and_goal():
    need_renderer()
    for env_id in (PUSH, SLIDE, PICK):
        env = envs.make(env_id, render_mode="rgb_array")
        env.reset(seed=3)
        world = env.unwrapped.world
        for place in ((-0.15, -0.15), (-0.15, 0.15), (0.15, -0.15), (0.15, 0.15)):  # the corners
            world.data[0].qpos[:2] = 0.6 - place[0], -place[1]
            world.data[0].mocap_pos[1, :2] = world.task.goal_x + place[0], place[1]
            red, green, blue = (env.render()[..., k].astype(int) for k in range(3))
            assert ((red > 90) & (red > 2 * green)).sum() > 40  # the goal
            assert ((blue > 60) & (blue > 2 * red)).sum() > 40  # the object
        env.close()


def situation(p, o, g, width=0.08, velocity=(0.0, 0.0, 0.0), fingers=True):
    """One observation with the time feature, as a batch of one."""
    parts = [p, (0, 0, 0), (width,) if fingers else (), o, (0, 0, 0), velocity, (0, 0, 0), (1,)]
    observation = torch.tensor([[x for part in parts for x in part]], dtype=torch.float64)
    return {"observation": observation, "achieved_goal": torch.tensor([o], dtype=torch.float64),
            "desired_goal": torch.tensor([g], dtype=torch.float64)}


def rules(env_id, d):
    widths = {"observation": 16 + d, "achieved_goal": 3, "desired_goal": 3}
    example = {key: torch.zeros(2, width) for key, width in widths.items()}
    return knowledge.load("auto", env_id, d, example)


def assert_action(rule, obs, expected):
    torch.testing.assert_close(rule(obs), torch.tensor([expected], dtype=torch.float64), atol=1e-4, rtol=0)


def test_hindsight_keeps_episodes_that_end_early(tmp_path):
    """More episodes than would fit at full length, and no step of them is dropped."""
    sac_kian.main(sac_kian.Args(env=PICK, num_envs=8, total_timesteps=4000, hidden="16x1", batch_size=32, compile=False,
                                updates_per_step=0.01, eval_every=0, eval_episodes=8, run_dir=str(tmp_path / "run")))
    buffer = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["buffer"]
    assert (buffer["left"] == 0).sum() > 4000 / 50
    assert len(buffer["left"]) == buffer["stored"] == 4000 - buffer["open_lengths"].sum()


@pytest.mark.parametrize("env_id", [PICK, PICK.replace("Sparse", "Dense"), SKILL])
def test_rules_of_picking(env_id):
    policies = rules(env_id, 4)
    assert list(policies) == ["franka.reach_object", "franka.carry_to_goal"]
    reach, carry = policies.values()
    above = situation(p=(0.6, 0, 0.05), o=(0.6, 0, 0.02), g=(0.7, 0, 0.2))
    assert_action(reach, above, (0, 0, -0.45, 1))
    assert_action(carry, above, (0, 0, 0, 1))
    aside = situation(p=(0.6, 0, 0.02), o=(0.65, 0, 0.02), g=(0.7, 0, 0.2))  # on its way to 2 * 0.05 - 0.02 m above
    assert_action(reach, aside, (0.05 / 0.08, 0, 1, 1))
    held = situation(p=(0.6, 0, 0.02), o=(0.6, 0.01, 0.02), g=(0.6, 0.03, 0.04))
    assert_action(reach, held, (0, 0, 0, -1))
    assert_action(carry, held, (0, 0.3, 0.3, -1))


def test_rules_of_pushing_and_sliding():
    get_behind, push = rules(PUSH, 3).values()
    o, g = (0.6, 0, 0.02), (0.7, 0, 0.02)
    there = situation(p=(0.54, 0, 0.02), o=o, g=g, fingers=False)
    assert_action(get_behind, there, (0, 0, 0))
    assert_action(push, there, (1, 0, 0))
    near = situation(p=(0.565, 0, 0.02), o=o, g=(0.61, 0, 0.02), fingers=False)  # in contact, it pulls back
    assert_action(push, near, (15 * (0.01 - 0.025), 0, 0))
    ahead = situation(p=(0.66, 0, 0.02), o=o, g=g, fingers=False)
    assert_action(push, ahead, (0, 0, 0))
    assert_action(get_behind, ahead, (-0.12 / 0.15, 0, 1))  # over the object, 0.15 m above
    get_behind, strike = rules(SLIDE, 3).values()
    g = (0.9, 0, 0.02)
    there = situation(p=(0.52, 0, 0.02), o=o, g=g, fingers=False)
    assert_action(get_behind, there, (0, 0, 0))
    assert_action(strike, there, (1.3 * math.sqrt(2 * 9.81 * 0.04 * 0.3), 0, 0))
    assert_action(strike, situation(p=(0.52, 0, 0.02), o=o, g=g, velocity=(0.024, 0, 0), fingers=False), (0, 0, 0))
    assert_action(strike, situation(p=(0.52, 0.02, 0.02), o=o, g=g, fingers=False), (0, 0, 0))  # off the line


@pytest.mark.parametrize("env_id, d", [(PUSH, 3), (PICK, 4)])
def test_rules_solve_a_task_in_turns_but_not_alone(env_id, d):
    vec, policies = envs.make_vec(env_id, 20, time_feature=False), rules(env_id, d)
    generator = torch.Generator().manual_seed(0)

    def score(turns):
        def act(obs):
            advice = knowledge.advise(turns, {key: torch.from_numpy(value) for key, value in obs.items()}, d)
            drawn = torch.randint(len(turns), (20,), generator=generator)
            return advice[torch.arange(20), drawn].numpy()
        return envs.evaluate(act, vec, 20, 1000)["success_rate"]

    assert all(score({name: rule}) <= 0.2 for name, rule in policies.items())
    assert score(policies) >= 0.7
