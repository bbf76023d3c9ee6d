"""The fast environments are gymnasium's, to the last bit; snapshots continue exactly; evaluation is unbiased."""
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from runtime import to_plain

FETCH = ["FetchReach-v2", "FetchPush-v2", "FetchSlide-v2", "FetchPickAndPlace-v2", "FetchPushDense-v2"]


def equal(a, b):
    if isinstance(a, dict):
        return all(np.array_equal(a[k], b[k]) for k in b)
    return np.array_equal(a, b)


@pytest.mark.parametrize("env_id", FETCH)
def test_fetch_is_gymnasium_to_the_last_bit(env_id):
    vec = envs.make_vec(env_id, 3, threads=2, time_feature=False)
    plain = [envs.make(env_id) for _ in range(3)]
    obs = vec.reset(7)
    theirs = [env.reset(seed=7 + i)[0] for i, env in enumerate(plain)]
    rng = np.random.default_rng(0)
    for step in range(120):  # two autoresets
        for i in range(3):
            assert equal({k: v[i] for k, v in obs.items()}, theirs[i])
        action = rng.uniform(-1.2, 1.2, (3, 4)).astype(np.float32)
        if env_id != "FetchReach-v2" and step % 2:  # touch the object
            action[:, :3] = np.clip(10 * (obs["observation"][:, 3:6] - obs["observation"][:, :3]), -1, 1)
        obs, reward, terminated, truncated, info = vec.step(action)
        for i, env in enumerate(plain):
            theirs[i], their_reward, their_terminated, their_truncated, their_info = env.step(action[i])
            assert equal({k: v[i] for k, v in info["final_obs"].items()}, theirs[i])
            assert (reward[i], terminated[i], truncated[i]) == (their_reward, their_terminated, their_truncated)
            assert info["success"][i] == their_info["is_success"]
            if their_truncated:
                theirs[i] = env.reset()[0]


@pytest.mark.parametrize("env_id, fast", [("FetchPickAndPlace-v2", True), ("FetchReach-v2", True),
                                          *((name, False) for name in (
                                              "FetchPickAndPlace-v2", "FetchReach-v2", "HalfCheetah-v5", "Ant-v5",
                                              "Reacher-v5", "Pendulum-v1", "CartPole-v1"))])
def test_snapshot_continues_exactly(env_id, fast):
    vec, other = envs.make_vec(env_id, 2, seed=3, fast=fast), envs.make_vec(env_id, 2, seed=99, fast=fast)
    rng = np.random.default_rng(1)

    def action():
        space = vec.action_space
        if isinstance(space, gym.spaces.Discrete):
            return rng.integers(space.n, size=2)
        return rng.uniform(space.low, space.high, (2, *space.shape)).astype(np.float32)

    for _ in range(37):
        vec.step(action())
    other.step(action())
    envs.restore(other, envs.snapshot(vec))
    for _ in range(30):  # passes a time limit of Fetch and Reacher
        a = action()
        ours, theirs = vec.step(a), other.step(a)
        assert equal(ours[0], theirs[0]) and equal(ours[4]["final_obs"], theirs[4]["final_obs"])
        assert all(np.array_equal(x, y) for x, y in zip(ours[1:4], theirs[1:4]))


LINE = """
import gymnasium as gym
import numpy as np


class Line(gym.Env):
    observation_space, action_space = gym.spaces.Box(-99, 99, (4,)), gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.path, self.seen, self.visits, self.speed, self.odd = [(0, 1)], {0}, {"here": [1]}, np.float32(0), object()
        return self.look(), {}

    def look(self):
        return np.array([len(self.path), len(self.seen), self.visits["here"][-1], self.speed], np.float32)

    def step(self, action):
        self.path.append((len(self.path), action))
        self.seen.add(int(self.np_random.integers(9)))
        self.visits["here"].append(self.visits["here"][-1] + int(action))
        self.speed = np.float32(self.speed * 0.9 + action)
        return self.look(), 0.0, False, False, {}


gym.register("Line-v0", Line, max_episode_steps=50)
"""


def test_an_environment_of_your_own(tmp_path, monkeypatch, capsys):
    """Named by its file; it goes on with all its plain data, and what cannot be saved is named."""
    (tmp_path / "my_line.py").write_text(LINE)
    (tmp_path / "my_fault.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    first, other = (envs.make_vec("my_line:Line-v0", 2, seed=seed) for seed in (3, 99))
    for k in range(8):
        first.step(np.array([k % 2, 1]))
    torch.save(to_plain(envs.snapshot(first)), tmp_path / "snap.pt")
    envs.restore(other, torch.load(tmp_path / "snap.pt", weights_only=True))
    for k in range(60):  # passes the time limit
        assert np.array_equal(first.step(np.array([1, k % 2]))[0], other.step(np.array([1, k % 2]))[0])
    assert type(other.envs[0].unwrapped.path[0]) is tuple and type(other.envs[0].unwrapped.speed) is np.float32
    assert "Line-v0 keeps odd, which cannot be saved" in capsys.readouterr().err
    envs.record(lambda obs: np.zeros(1, int), "my_line:Line-v0", 1, 0, tmp_path / "video")
    assert "Line-v0 draws no pictures" in capsys.readouterr().err and not (tmp_path / "video").exists()
    for env_id, words in (("my_line:Lin-v0", "did you mean Line-v0"), ("my_fault:Line-v0", "ZeroDivisionError"),
                          ("absent:Line-v0", "absent, which is to register Line-v0, fails to import")):
        with pytest.raises(envs.EnvError, match=words):
            envs.resolve(env_id)


class Shaped(gym.Env):
    """Nothing happens, for ever."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, seed=None, options=None):
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        return np.zeros(self.observation_space.shape, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize("shape, actions, words", [
    ((4, 5), gym.spaces.Box(-1, 1, (2,)), "flat arrays are needed"), ((), gym.spaces.Discrete(2), "flat arrays"),
    ((4,), gym.spaces.Box(-1, 1, (2, 2)), "bounded"), ((4,), gym.spaces.Box(-1, np.inf, (2,)), "bounded"),
    ((4,), gym.spaces.Box(-1, 1, (2,), np.int64), "bounded"), ((4,), gym.spaces.Discrete(2), "has not ended")])
def test_what_cannot_be_learned_is_said(shape, actions, words, monkeypatch):
    space = gym.spaces.Box(-1, 1, shape)
    monkeypatch.setitem(gym.registry, "Shaped-v0", gym.envs.registration.EnvSpec(
        "Shaped-v0", lambda: Shaped(space, actions)))
    monkeypatch.setattr("envs.evaluation.ENDLESS", 50)
    with pytest.raises(envs.EnvError, match=words):
        envs.evaluate(lambda obs: np.zeros(2, int), envs.make_vec("Shaped-v0", 2), 2, seed=0)


def test_ids(capsys):
    assert envs.resolve("FetchPush-v3") == envs.resolve("FetchPush-v1") == "FetchPush-v4"
    assert "FetchPush-v4" in capsys.readouterr().err  # says so
    assert envs.resolve("HalfCheetah-v4") == "HalfCheetah-v4"
    for wrong, right in (("FetchPickAndPlce-v2", "FetchPickAndPlace-v2"), ("HalfCheeta-v5", "HalfCheetah-v5")):
        with pytest.raises(envs.EnvError, match=right):
            envs.make_vec(wrong, 1)
    with pytest.raises(envs.EnvError, match="at least 1"):
        envs.make_vec("FetchPush-v2", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a display")
def test_no_window_without_a_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(envs.EnvError, match="no display"):
        envs.make("FetchPush-v2", render_mode="human")


def test_time_feature_and_autoreset():
    vec = envs.make_vec("FetchReach-v2", 2, seed=0)
    obs = vec.reset(0)
    assert obs["observation"].shape == (2, 11) == (2, *vec.observation_space["observation"].shape)
    for t in range(50):
        assert obs["observation"][:, -1] == pytest.approx(1 - t / 50)
        obs, _, terminated, truncated, info = vec.step(np.zeros((2, 4), np.float32))
    assert truncated.all() and not terminated.any()
    assert (info["final_obs"]["observation"][:, -1] == 0).all() and (obs["observation"][:, -1] == 1).all()
    assert not np.array_equal(info["final_obs"]["desired_goal"], obs["desired_goal"])


def test_actions_reach_the_bounds_of_the_box():
    vec = envs.make_vec("Pendulum-v1", 3)
    assert vec.to_box(np.array([[-1.0], [0.0], [1.0]])).ravel().tolist() == [-2.0, 0.0, 2.0]


def test_normalizer_is_mean_and_std_of_all_it_saw():
    import torch
    data = torch.randn(500, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.0]) + torch.tensor([0.0, 10.0, 3.0])
    normalizer = envs.Normalizer(3)
    for batch in data.split([1, 99, 400]):
        normalizer.add(batch)
    mean, std = normalizer.stats()
    assert torch.allclose(mean, data.mean(0).float(), atol=1e-5)
    assert torch.allclose(std, data.std(0, correction=0).clamp(min=0.01).float(), atol=1e-5)


def test_evaluation_gives_every_copy_the_same_number_of_episodes():
    """Two copies whose episodes last 1 and 3 steps: a first-come rule would count the short one more often."""
    class Uneven:
        num_envs, length, max_episode_steps = 2, [1, 3], 3

        def reset(self, seed):
            self.t = [0, 0]

        def step(self, action):
            self.t = [t + 1 for t in self.t]
            ended = np.array([t == n for t, n in zip(self.t, self.length)])
            self.t = [0 if e else t for t, e in zip(self.t, ended)]
            return None, np.ones(2), ended, np.zeros(2, bool), {"success": np.array([1.0, 0.0])}
    result = envs.evaluate(lambda obs: None, Uneven(), 8, seed=0)
    assert result == {"episodes": 8, "return_mean": 2.0, "return_std": 1.0, "success_rate": 0.5, "length_mean": 2.0}
    assert envs.evaluate(lambda obs: None, Uneven(), 3, seed=0)["length_mean"] == pytest.approx((1 + 1 + 3) / 3)
    with pytest.raises(ValueError):
        envs.evaluate(lambda obs: None, Uneven(), 1, seed=0)
