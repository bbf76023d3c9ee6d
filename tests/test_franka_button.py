"""The button on the table against the numbers of its table in docs/srl.md: geometry, rewards, ends; exact snapshots."""
import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from envs import franka_button
from runtime import to_plain
from tests import need_renderer
from tests.test_mobile import same

X_MINUS, X_PLUS, Y_MINUS, Y_PLUS, DOWN, UP = range(6)


def above(vec, *place):
    """Lead the gripper of the only copy above a place (x, y) m, and wait until it is there."""
    world = vec.world
    for _ in range(30):
        way = np.array(place) - world.ee_pos[0, :2]
        world._lead(0, np.append(np.clip(way, -0.02, 0.02), 0))
        world.advance(0)
    assert np.abs(way).max() < 1e-3
    return vec


def play(vec, steps, seed=0):
    """What random actions give."""
    rng, space, rows = np.random.default_rng(seed), vec.action_space, []
    for _ in range(steps):
        action = (rng.integers(space.n, size=vec.num_envs) if isinstance(space, gym.spaces.Discrete)
                  else rng.uniform(-1.5, 1.5, (vec.num_envs, 3)).astype(np.float32))
        obs, reward, terminated, truncated, info = vec.step(action)
        rows.append((obs, reward, terminated, truncated, info["final_obs"], info["success"]))
    return rows


def test_the_button_is_built_as_its_table_says():
    model = franka_button.build()
    data = envs.make_vec("FrankaButton-v0", 1, seed=1).world.data[0]
    assert model.geom("button").size[:2].tolist() == [0.03, 0.02]  # radius, half of the height
    assert data.geom("button").xpos == pytest.approx([0.6, 0.0, 0.02], abs=1e-4)  # it stands on the table
    table = model.geom("table")
    assert table.pos[2] + table.size[2] == 0
    assert model.joint("button").range.tolist() == [-0.01, 0.0]
    assert sorted(franka_button.IDS) == [f"FrankaButton{words}-v0" for words in (
        "", "Continuous", "RandomTarget", "RandomTargetContinuous")]


def test_a_step_is_two_centimetres():
    for action, axis, sign in ((X_MINUS, 0, -1), (X_PLUS, 0, 1), (Y_MINUS, 1, -1), (Y_PLUS, 1, 1), (DOWN, 2, -1),
                               (UP, 2, -1)):  # up goes down
        vec = envs.make_vec("FrankaButton-v0", 1, seed=1)
        vec.step(np.array([action]))
        before = vec.world.ee_pos[0].copy()
        obs = vec.step(np.array([action]))[0]
        expected = np.zeros(3)
        expected[axis] = 0.02 * sign
        assert vec.world.ee_pos[0] - before == pytest.approx(expected, abs=1.5e-3)
        assert obs[0] == pytest.approx(vec.world.ee_pos[0] - [0.6, 0.0, 0.04], abs=1e-6)
    vec = envs.make_vec("FrankaButton-v0", 1, seed=1, force_down=False)
    before = vec.world.ee_pos[0, 2]
    vec.step(np.array([UP]))
    assert vec.world.ee_pos[0, 2] > before + 0.01
    guide = envs.make_vec("FrankaButtonContinuous-v0", 1, seed=1)
    before = guide.world.data[0].mocap_pos[0].copy()
    guide.step(np.array([[0.5, -3.0, 0.25]], np.float32))  # clipped to -1, and up goes down
    assert guide.world.data[0].mocap_pos[0] - before == pytest.approx([0.01, -0.02, -0.005])


def test_five_pressed_steps_end_in_success():
    vec = above(envs.make_vec("FrankaButton-v0", 1, seed=1), 0.6, 0.0)
    rewards, terminated = [], False
    while not terminated:
        _, reward, ended, _, info = vec.step(np.array([DOWN]))
        rewards.append(reward[0])
        terminated = ended[0]
        assert info["success"][0] == float(terminated)
    assert rewards[-5:] == [1.0] * 5 and not any(rewards[:-5])
    # they need not be in a row, and the button comes back
    vec = above(envs.make_vec("FrankaButton-v0", 1, seed=1, force_down=False), 0.6, 0.0)
    while vec.world.presses[0] < 1:
        vec.step(np.array([DOWN]))
    for _ in range(8):
        vec.step(np.array([UP]))
    assert 1 <= vec.world.presses[0] < 5 and abs(vec.world.sunk[0]) < 1e-3
    while vec.world.presses[0]:  # 0 after the reset
        _, reward, terminated, _, _ = vec.step(np.array([DOWN]))
    assert terminated[0] and reward[0] == 1


def test_a_finger_on_the_table_ends_an_episode():
    vec = above(envs.make_vec("FrankaButton-v0", 1, seed=1), 0.5, 0.0)
    terminated = [False]
    while not terminated[0]:
        obs, reward, terminated, _, info = vec.step(np.array([DOWN]))
    assert reward[0] == -1 and info["success"][0] == 0
    assert info["final_obs"][0, 2] < -0.02  # the tips are 9 mm below the gripper, the top 4 cm above the table
    assert vec.elapsed[0] == 0 and obs[0, 2] > 0


def test_rewards_by_hand():
    world = franka_button.World(6)
    world.top[:] = 0.6, 0.0, 0.04
    world.ee_pos[:] = world.top
    world.sunk[:] = 0.005, 0.0049, 0.0, 0.0, 0.01, 0.01
    world.ee_pos[2:4] += [[0.0, 0.3, 0.3999], [0.0, 0.3, 0.4001]]  # 0.5 m away, less or more
    world.touched[4], world.presses[:] = True, (5, 4, 0, 0, 5, 5)
    assert world.reward().tolist() == [1, 0, 0, -1, -1, 1]
    assert world.terminated().tolist() == [True, False, False, False, True, True]
    assert world.success().tolist() == [True, False, False, False, False, True]


@pytest.mark.parametrize("fast", [True, False])
def test_an_episode_has_200_steps(fast):
    vec = envs.make_vec("FrankaButton-v0", 1, seed=1, fast=fast)
    for k in range(1, 201):
        _, _, terminated, truncated, _ = vec.step(np.array([k % 2]))
        assert not terminated.any() and truncated.tolist() == [k == 200]


def test_starts_and_places():
    vec = envs.make_vec("FrankaButtonRandomTarget-v0", 50, seed=1)
    place = vec.world.top[:, :2] - [0.6, 0.0]
    assert np.abs(place).max() <= 0.15 and np.abs(place).max(0) == pytest.approx([0.15, 0.15], abs=0.02)
    starts = vec.world.ee_pos - vec.world.home
    assert np.abs(starts).max() <= 0.16 and (np.abs(starts).max(0) > 0.05).all()
    assert set(vec.ground_truth()) == {"x", "y", "z", "target_x", "target_y"}
    fixed = envs.make_vec("FrankaButton-v0", 3, seed=1)
    assert fixed.world.top.tolist() == [[0.6, 0.0, 0.04]] * 3 and set(fixed.ground_truth()) == set("xyz")


@pytest.mark.parametrize("env_id", ["FrankaButtonRandomTarget-v0", "FrankaButtonContinuous-v0",
                                    "FrankaButton-v0:pixels"])
def test_many_are_single_ones_bit_by_bit(env_id):
    if "pixels" in env_id:
        need_renderer()
    fast, plain = (envs.make_vec(env_id, 2, seed=7, fast=fast) for fast in (True, False))
    assert type(fast) is not type(plain)
    assert same(play(fast, 50), play(plain, 50))


@pytest.mark.parametrize("env_id", ["FrankaButtonRandomTarget-v0", "FrankaButtonContinuous-v0",
                                    "FrankaButtonRandomTarget-v0:pixels", "FrankaButton-v0:action_repeat=3"])
def test_snapshots_go_on_exactly(env_id, tmp_path):
    if "pixels" in env_id:
        need_renderer()
    first, other, again = (envs.make_vec(env_id, 2, seed=seed) for seed in (3, 99, 3))
    assert same(play(first, 20), play(again, 20))  # the same seed, the same bits
    play(other, 5)
    torch.save(to_plain(envs.snapshot(first)), tmp_path / "snap.pt")
    envs.restore(other, torch.load(tmp_path / "snap.pt", weights_only=True))
    assert same(rows := play(first, 40), play(other, 40)) and any(row[2].any() for row in rows)


def test_pictures_and_codes():
    need_renderer()
    vec = envs.make_vec("FrankaButtonRandomTarget-v0:pixels", 8, seed=1)
    pictures = vec.reset(1)
    assert pictures.shape == (8, 64, 64, 3) and pictures.dtype == np.uint8
    red = (pictures[..., 0] > 120) & (pictures[..., 1:].max(-1) < 60)  # (8, 64, 64)
    assert np.median(red.sum((1, 2))) > 8  # the arm hides some
    seen = red.sum((1, 2)) > 8
    rows, columns = np.mgrid[:64, :64]
    down, right = ((grid * red).sum((1, 2))[seen] / red.sum((1, 2))[seen] for grid in (rows, columns))
    x, y = vec.world.top[seen, :2].T
    assert np.corrcoef(x - y, down)[0, 1] > 0.9 and np.corrcoef(x + y, right)[0, 1] > 0.9
    film = envs.make("FrankaButton-v0", render_mode="rgb_array", width=64, height=64, pixels=True)
    obs, _ = film.reset(seed=1)
    frame = film.render()
    assert (film.step(0)[0] != obs).any() and (film.render() != frame).any()  # two cameras, taken in turns
    film.close()
    codes = envs.make_vec("FrankaButton-v0:pca", 2, seed=1)
    assert codes.observation_space.shape == (32,) and np.isfinite(codes.step(np.array([0, 4]))[0]).all()


@pytest.mark.parametrize("env_id, options, action, message", [
    ("FrankaButton-v0", {}, np.array([6]), "not one of 0 to 5"),
    ("FrankaButtonContinuous-v0", {}, np.zeros((1, 2), np.float32), "shape"),
    ("FrankaButtonContinuous-v0", {}, np.full((1, 3), np.nan, np.float32), "NaN|finite"),
    ("FrankaButton-v0", {"size": 8}, None, "size 8"),
    ("FrankaButton-v0", {"goal_range": 5.0}, None, "no range of goals"),
    ("FrankaButton-v0", {"mass": 5.0}, None, "cannot be made")])
def test_bad_input_is_one_line(env_id, options, action, message):
    with pytest.raises(envs.EnvError, match=message) as error:
        envs.make_vec(env_id, 1, seed=1, **options).step(action)
    assert "\n" not in str(error.value)
