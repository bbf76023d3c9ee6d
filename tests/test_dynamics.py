"""The task families: physics and rewards by hand numbers, splits as published, fast class equal to gymnasium's way."""
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import envs
from envs import dynamics
from runtime import to_plain
from tests import need_renderer

CHEETAH, ANT, WALKER = "CrippledHalfCheetah-dyn-v0", "Ant-dyn-v0", "CrippledWalker-dyn-v0"
SIZES = {"HalfCheetah": 18, "CrippledHalfCheetah": 18, "Ant": 28, "CrippledAnt": 41, "Hopper": 11, "CrippledHopper": 11,
         "Walker": 17, "CrippledWalker": 17, "SlimHumanoid": 45, "HumanoidStandup": 45}
FRANKA = "FrankaSkill-v0"


@pytest.mark.parametrize("name", SIZES)
def test_fast_is_gymnasium_to_the_last_bit(name):
    env_id = f"{name}-dyn-v0"
    vec = envs.make_vec(env_id, 3, split="extreme", threads=2, max_episode_steps=15)
    plain = [envs.make(env_id, split="extreme", bucket=i, max_episode_steps=15) for i in range(3)]
    obs, theirs = vec.reset(7), [env.reset(seed=7 + i)[0] for i, env in enumerate(plain)]
    rng = np.random.default_rng(0)
    for _ in range(40):  # two autoresets
        assert np.array_equal(obs, theirs) and obs.shape == (3, SIZES[name])
        action = vec.to_box(rng.uniform(-1, 1, (3, *vec.action_space.shape))).astype(np.float32)
        obs, reward, terminated, truncated, info = vec.step(action)
        for i, env in enumerate(plain):
            theirs[i], their_reward, their_terminated, their_truncated, their_info = env.step(action[i])
            assert np.array_equal(info["final_obs"][i], theirs[i])
            assert (reward[i], terminated[i], truncated[i]) == (their_reward, their_terminated, their_truncated)
            assert all(np.array_equal(info[key][i], value) for key, value in their_info.items())
            if their_truncated:
                theirs[i] = env.reset()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # observations have no bounds
        check_env(plain[0].unwrapped, skip_render_check=True)


@pytest.mark.parametrize("env_id", [CHEETAH, WALKER, "Ant-dyn-v0", FRANKA])
def test_snapshot_continues_exactly(env_id, tmp_path):
    """Also an episode whose task differs from that which stood there before, and the draws of those to come."""
    vec, other = (envs.make_vec(env_id, 4, seed=seed, split="extreme", max_episode_steps=20) for seed in (3, 99))
    rng = np.random.default_rng(1)

    def action():
        return rng.uniform(-1, 1, (4, *vec.action_space.shape)).astype(np.float32)

    for _ in range(27):
        vec.step(action())
    other.step(action())
    torch.save(to_plain(envs.snapshot(vec)), tmp_path / "snap.pt")
    envs.restore(other, torch.load(tmp_path / "snap.pt", weights_only=True))
    for _ in range(45):
        a = action()
        ours, theirs = vec.step(a), other.step(a)
        assert np.array_equal(envs.flatten(ours[0]), envs.flatten(theirs[0])) and np.array_equal(ours[1], theirs[1])
        assert all(np.array_equal(ours[4][key], theirs[4][key], equal_nan=key == "success")
                   for key in ours[4] if key != "final_obs")
        assert np.array_equal(vec.task_features(), other.task_features())


def test_named_tasks_stay_over_a_snapshot():
    vec, other = (envs.make_vec(CHEETAH, 2, seed=seed, max_episode_steps=5) for seed in (1, 2))
    vec.reset(3, {"mass": 1.5, "crippled": [0, 5]})
    envs.restore(other, envs.snapshot(vec))
    for _ in range(12):
        info = other.step(np.zeros((2, 6)))[4]
        assert info["mass"].tolist() == [1.5, 1.5] and info["damping"].tolist() == [1, 1]
        assert info["mask"].tolist() == [[0, 1, 1, 1, 1, 0]] * 2 and info["bucket"].tolist() == [-1, -1]


@pytest.mark.parametrize("name, env_id, ctrl_cost", [
    ("HalfCheetah", "HalfCheetah-v5", None), ("Walker", "Walker2d-v5", None), ("CrippledHopper", "Hopper-v5", None),
    ("Hopper", "Hopper-v5", 0.1)])
def test_unscaled_tasks_are_those_of_gymnasium(name, env_id, ctrl_cost):
    """From one state, with one action: the same next state, and the same reward where its alive bonus is paid."""
    ours = envs.make(f"{name}-dyn-v0", mass=1.0)
    kwargs = {"xml_file": "walker2d.xml"} if name == "Walker" else {}
    theirs = gym.make(env_id, **kwargs, **({"ctrl_cost_weight": ctrl_cost} if ctrl_cost else {}),
                      **({} if name == "HalfCheetah" else {"terminate_when_unhealthy": False}))
    ours.reset(seed=1), theirs.reset(seed=1)
    data = ours.unwrapped.world.data[0]
    theirs.unwrapped.set_state(data.qpos, data.qvel)
    for k in range(8):
        action = np.full(theirs.action_space.shape, 0.5 if k % 2 else -0.5)  # float64: theirs adds up in its type
        obs, reward, *_ = ours.step(action)
        their_obs, their_reward, *_ = theirs.step(action)
        assert np.array_equal(data.qpos, theirs.unwrapped.data.qpos) and abs(reward - their_reward) < 1e-9
        assert np.array_equal(obs[1:] if name == "HalfCheetah" else obs, their_obs)
        if name == "HalfCheetah":
            assert obs[0] == pytest.approx(reward + 0.1 * 6 * 0.25)


@pytest.mark.parametrize("name, masses", [("HalfCheetah", (14.0, 28.0)), ("Hopper", (15.82, 31.64)),
                                          ("Walker", (23.677, 47.354)), ("SlimHumanoid", (42.116, 84.232)),
                                          ("CrippledAnt", (0.9109, 1.8218)), ("Ant", (0.9109, 1.0568))])
def test_scales(name, masses):
    """Masses and dampings are scaled from the published ones, however often; inertias are not. Ant's legs are scaled
    apart, its dampings by the published mistake."""
    world = dynamics.World(name, 1)
    base, model = world.base, world.models[0]
    for mass, damping, total in ((2, 1, masses[1]), (2, 2, masses[1]), (1, 2, masses[0]), (1, 1, masses[0])):
        world.apply(0, mass, damping, ())
        assert model.body_mass.sum() == pytest.approx(total, rel=1e-4)
        assert np.array_equal(model.body_inertia, base.body_inertia)
        if name != "Ant":
            assert np.array_equal(model.dof_damping, base.dof_damping * damping)
        elif damping == 2:
            assert model.dof_damping[6:].tolist() == [2, 2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert np.array_equal(model.body_mass, base.body_mass) and np.array_equal(model.dof_damping, base.dof_damping)


def test_scales_change_what_happens():
    """Same seed, same actions: another mass or damping leads elsewhere, the published ones to the same place."""
    ends = []
    for options in ({"mass": 1.0}, {"mass": 2.0}, {"damping": 2.0}, {"mass": 1.0}):
        env = envs.make("HalfCheetah-dyn-v0")
        env.reset(seed=5, options=options)
        rng = np.random.default_rng(2)
        for _ in range(20):
            env.step(rng.uniform(-1, 1, 6))
        ends.append(env.unwrapped.world.data[0].qpos.copy())
    assert np.array_equal(ends[0], ends[3])
    apart = [np.abs(end - ends[0]).max() for end in ends[1:3]]
    assert apart == pytest.approx([0.66, 0.40], abs=0.01)  # 1 s later, in radians or m; measured, no hand number


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("Crippled")])
def test_crippled_actuators_give_no_torque(name):
    """Neither they nor their joints feel anything, the others do; the cost counts what was done, not what was asked. So
    in every episode, and all masses are those of its task."""
    vec = envs.make_vec(f"{name}-dyn-v0", 12, seed=1, split="extreme", max_episode_steps=6)
    rng, world = np.random.default_rng(3), vec.world
    dof, seen = world.base.jnt_dofadr[world.base.actuator_trnid[:, 0]], set()
    for _ in range(20):
        assert (world.mask == 0).any(1).all() and (world.mask == 1).any(1).all()
        masses = np.stack([model.body_mass for model in world.models])
        assert np.allclose(masses, world.mass[:, None] * world.base.body_mass)
        seen.add(world.mass.tobytes())
        action = rng.uniform(0.1, 1, (12, world.base.nu))
        _, reward, _, truncated, _ = vec.step(action)
        if truncated.any():  # the next episodes have begun
            continue
        forces = np.stack([data.actuator_force for data in world.data])
        torques = np.stack([data.qfrc_actuator[dof] for data in world.data])
        assert (forces[world.mask == 0] == 0).all() and (torques[world.mask == 0] == 0).all()
        assert (forces[world.mask == 1] != 0).all()
        spent = world.family.ctrl_cost * (np.square(action) * world.mask).sum(1)
        assert np.allclose(reward, world.speed + world.family.alive - spent)
    assert len(seen) == 4


def test_crippled_limbs_shrink_as_published():
    world = dynamics.World("CrippledWalker", 1)
    base, model = world.base, world.models[0]
    world.apply(0, 1, 1, (3, 4, 5))
    assert np.array_equal(model.geom_size[5:8, :2], base.geom_size[5:8, :2] / 2)
    assert np.array_equal(model.geom_size[:5], base.geom_size[:5]) and np.array_equal(model.geom_pos[:5],
                                                                                      base.geom_pos[:5])
    assert (model.geom_pos[5:8] == base.geom_pos[5]).all()
    assert (model.geom_rgba[5:8] == np.float32(dynamics.RED)).all()
    world.apply(0, 1, 1, (1,))
    assert (model.geom_pos[4] == base.geom_pos[3]).all() and np.array_equal(model.geom_size[5:], base.geom_size[5:])
    ant = dynamics.World("CrippledAnt", 1)
    ant.apply(0, 1, 1, dynamics.LEGS[3])
    assert np.array_equal(ant.models[0].geom_size[12:14, :2], ant.base.geom_size[12:14, :2] / 2)
    assert np.array_equal(ant.models[0].geom_size[:12], ant.base.geom_size[:12])
    actuators = [ant.base.actuator(k).name or ant.base.joint(ant.base.actuator_trnid[k, 0]).name
                 for k in dynamics.LEGS[3]]
    assert actuators == ["hip_4", "ankle_4"]


def test_humanoid_rewards():
    """SlimHumanoid: speed of before the step, and 5 while the torso is between 1 and 2 m. HumanoidStandup: height."""
    slim = envs.make_vec("SlimHumanoid-dyn-v0", 1, seed=1)
    for height, alive in ((0.105, 0), (1.4, 5)):
        slim.world.data[0].qpos[2] = slim.world.qpos[0, 2] = height
        obs = slim._observe()
        assert obs[0, 22] == slim.world.data[0].qvel[0]
        reward = slim.step(np.full((1, 17), 0.2))[1]
        assert reward[0] == pytest.approx(0.25 / 0.015 * obs[0, 22] + alive - 0.1 * 17 * 0.04)
    standup = envs.make_vec("HumanoidStandup-dyn-v0", 1, seed=1)
    reward = standup.step(np.zeros((1, 17)))[1]
    assert reward[0] == pytest.approx(standup.world.data[0].qpos[2] / 0.003 + 1)


def test_splits_are_the_published_ones():
    buckets = {name: [len(family.splits[split]) for split in envs.SPLITS] for name, family in dynamics.FAMILIES.items()}
    assert buckets == {
        "HalfCheetah": [4, 4, 4], "CrippledHalfCheetah": [3, 3, 3], "Ant": [4, 4, 4], "CrippledAnt": [4, 4, 6],
        "Hopper": [4, 4, 4], "CrippledHopper": [2, 2, 3], "Walker": [4, 4, 4], "CrippledWalker": [2, 3, 4],
        "SlimHumanoid": [4, 4, 4], "HumanoidStandup": [4, 4, 4]}
    assert [len(envs.all_tasks("HalfCheetah-dyn-v0", split)) for split in envs.SPLITS] == [25, 16, 16]
    tasks = envs.all_tasks(CHEETAH, "extreme")
    assert len(tasks) == 12 and {task["crippled"] for task in tasks} == {(0, 3), (1, 4), (2, 5)}
    assert {task["mass"] for task in tasks} == {0.2, 0.3, 1.7, 1.8}
    cells = [{(task["mass"], task["friction"]) for task in envs.all_tasks(FRANKA, split)} for split in envs.SPLITS]
    assert [len(cell) for cell in cells] == [6, 6, 8]
    assert len(cells[0] | cells[1] | cells[2]) == 20  # the whole grid of 4 masses and 5 frictions


def test_every_task_is_played():
    """In training all tasks of a bucket come up; with every_task, copy i plays task i for ever."""
    vec, seen = envs.make_vec(CHEETAH, 6, seed=1, split="train", max_episode_steps=1), set()
    for _ in range(60):
        info = vec.step(np.zeros((6, 6)))[4]
        assert info["bucket"].tolist() == [0, 1, 2, 0, 1, 2]
        seen |= {(mass, *mask) for mass, mask in zip(info["mass"].tolist(), info["mask"].tolist())}
    assert len(seen) == 15
    for env_id in (CHEETAH, "Ant-dyn-v0", FRANKA):
        tasks = envs.all_tasks(env_id, "moderate")
        vec = envs.make_vec(env_id, len(tasks), seed=2, split="moderate", every_task=True, max_episode_steps=2)
        for _ in range(4):
            info = vec.step(np.zeros((len(tasks), *vec.action_space.shape)))[4]
            assert vec.num_tasks == len(tasks) and info["bucket"].tolist() == list(range(len(tasks)))
            assert info["mass"].tolist() == [task["mass"] for task in tasks]
            if env_id == FRANKA:
                assert info["friction"].tolist() == [task["friction"] for task in tasks]
            else:
                assert [tuple(np.flatnonzero(m == 0).tolist()) for m in info["mask"]] == [t["crippled"] for t in tasks]


@pytest.mark.parametrize("call, words", [
    (lambda: envs.make_vec(CHEETAH, 2, split="test"), "unknown split 'test'; known are train, moderate, extreme"),
    (lambda: envs.make_vec(FRANKA, 2, split="test"), "unknown split 'test'"),
    (lambda: envs.make_vec("Walker2d-v5", 2, split="train"), "split"),
    (lambda: envs.all_tasks("Walker2d-v5", "train"), "Walker2d-v5 has no task splits; known are HalfCheetah-dyn-v0"),
    (lambda: envs.make(CHEETAH, mass=0), "mass 0 makes no sense"),
    (lambda: envs.make(CHEETAH, damping=float("nan")), "damping nan makes no sense"),
    (lambda: envs.make(CHEETAH, crippled=[6]), "crippled 6 is no actuator; give indices from 0 to 5"),
    (lambda: envs.make(CHEETAH, crippled=3), "crippled 3 is no list"),
    (lambda: envs.make_vec(CHEETAH, 2).reset(1, {"masss": 1}), "unknown option 'masss'"),
    (lambda: envs.make_vec(CHEETAH, 2, seed=1).step(np.full((2, 6), np.nan)), "actions hold nan"),
    (lambda: envs.make_vec(CHEETAH, 2, seed=1).step(np.zeros((2, 5))), "actions have shape"),
    (lambda: envs.make_vec("FetchReach-v2", 2, seed=1).step(np.full((2, 4), np.nan)), "actions hold nan"),
    (lambda: envs.make_vec("FetchReach-v2", 2, seed=1).step(np.zeros((2, 3))), "actions have shape"),
    (lambda: envs.make_vec(f"{FRANKA}:action_repeat=2", 6, split="train"), "takes no action_repeat"),
    (lambda: envs.make_vec(CHEETAH, 2, goal_range=2), "no range of goals"),
    (lambda: envs.make(CHEETAH).unwrapped.render(), "render_mode is None")])
def test_errors_are_one_line(call, words):
    with pytest.raises(envs.EnvError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_film_shows_the_crippled_joint(tmp_path):
    need_renderer()
    import imageio.v2 as imageio
    red = []
    for crippled in ((), (3,), (0, 3)):
        envs.record(lambda obs: np.zeros((1, 6)), CHEETAH, 1, 0, tmp_path, max_episode_steps=3, crippled=crippled)
        frame = imageio.mimread(tmp_path / "episode-0.mp4")[0].astype(int)
        red.append(int((frame[..., 0] > 60 + 1.5 * frame[..., 1:].max(-1)).sum()))
    assert frame.shape == (480, 480, 3) and red[0] < 50 < 500 < red[1] < 1.6 * red[1] < red[2]
