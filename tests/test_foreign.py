"""Other people's environments: what is wrong with them is one line, and what they keep comes back."""
import sys
from collections import OrderedDict
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers.utils import RunningMeanStd

import envs
from algos import sac, stream_ac
from buffers import ReplayBuffer
from runtime import UserError, to_plain, write_whole

ROW = gym.spaces.Box(-5, 5, (1,), np.float32)


class Walk(gym.Env):
    """A number that actions push and noise shakes."""
    observation_space, action_space = ROW, gym.spaces.Box(np.float32(-1.64), np.float32(0.74), (1,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = float(self.np_random.uniform(-1, 1)), 0
        return self.look(), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.float32))
        self.x = float(np.clip(self.x + 0.1 * action[0] + 0.05 * self.np_random.normal(), -4, 4))
        self.steps += 1
        return self.look(), self.reward(), False, False, {}

    def look(self):
        return np.array([self.x], np.float32)

    def reward(self):
        return -abs(self.x)


class Lag(gym.Wrapper):
    """Takes the action before."""

    def reset(self, **kwargs):
        self.last = np.zeros(1, np.float32)
        return self.env.reset(**kwargs)

    def step(self, action):
        action, self.last = self.last, np.array(action)
        return self.env.step(action)


def variant(**methods):
    return type("Variant", (Walk,), methods)


def own_generator(self, seed=None, options=None):
    if seed is not None:
        self.rng = np.random.default_rng(seed)
    Walk.reset(self, seed=seed)
    self.x = self.rng.uniform(-1, 1)
    return self.look(), {}


def old_generator(self, seed=None, options=None):
    if seed is not None:
        self.np_random = np.random.RandomState(seed)  # takes 32 bits
    self.x, self.steps = self.np_random.uniform(-1, 1), 0
    return self.look(), {}


def kept_inside(self, seed=None, options=None):
    """Generators and statistics in containers, one of them the environment's own."""
    Walk.reset(self, seed=seed)
    if seed is not None:
        self.kept = {"rng": [np.random.default_rng(seed), np.random.RandomState(seed), RunningMeanStd()]}
        self.kept["own"] = (np.random.Generator(np.random.SFC64(seed)), self.np_random)
    *drawn, seen = self.kept["rng"]
    self.x = sum(rng.uniform(-1, 1) for rng in (*drawn, *self.kept["own"])) + float(seen.mean)
    seen.update(np.array([self.x]))
    return self.look(), {}


def lacking(self):
    raise ImportError


def ends_in_nan(self, seed=None, options=None):
    """The observation of the second reset has a NaN."""
    self.resets = getattr(self, "resets", 0) + 1
    obs, info = Walk.reset(self, seed=seed)
    return obs * (np.nan if self.resets == 2 else 1), info


@pytest.fixture
def register(monkeypatch):
    def add(make, **kwargs):
        gym.register("Foreign-v0", make, max_episode_steps=20, **kwargs)
        return "Foreign-v0"
    yield add
    gym.registry.pop("Foreign-v0", None)


@pytest.mark.parametrize("make, words", [
    (variant(reset=lambda self, seed=None, options=None: np.zeros(1, np.float32)), "reset returns one ndarray"),
    (variant(reset=lambda self: (np.zeros(1, np.float32), {})), "fails in reset: TypeError: .*unexpected keyword"),
    (variant(step=lambda self, action: (self.look(), 0.0, False, {})), "got 4.*; an environment of the old gym"),
    (variant(reward=lambda self: np.array([0.0])), r"the reward array\(\[0\.\]\), and has to return one finite number"),
    (variant(step=lambda self, action: (self.look(), 0.0, False, False, {"success": "yes"})), "'yes' as success"),
    (variant(reward=lambda self: float("nan")), "the reward nan"), (variant(reward=lambda self: "1"), "the reward '1'"),
    (variant(look=lambda self: np.array([np.nan], np.float32)), "a number that is not finite"),
    (variant(look=lambda self: np.zeros(2, np.float32)), r"declares observations of shape \(1,\) and .* \(2,\)"),
    (variant(reward=lambda self: [][self.steps]), r"fails in step: IndexError: .* \(.*test_foreign.py:\d+\)$")])
def test_what_an_environment_does_wrong_is_one_line(make, words, register):
    env_id = register(make)
    for play in (lambda: envs.make_vec(env_id, 2, seed=1).step(np.zeros((2, 1), np.float32)),
                 lambda: (env := envs.StreamEnv(env_id), env.reset(seed=1), env.step(np.zeros(1, np.float32)))):
        with pytest.raises(envs.EnvError, match=f"^Foreign-v0.*{words}") as error:
            play()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("make, words", [
    (variant(__init__=lambda self: {}["licence"]), "fails in its making: KeyError: 'licence'"),
    (variant(__init__=lacking), "cannot be made: ImportError"),
    (variant(observation_space=gym.spaces.Tuple((gym.spaces.Discrete(5), ROW)), look=lambda self: (1, np.zeros(1))),
     "observes Tuple.*arrays"),
    (variant(observation_space=None), "declares no observation_space"),
    (variant(observation_space=gym.spaces.Box(-1, 1, (0,)), look=lambda self: np.zeros(0)), "as observation_space, which holds nothing"),
    (variant(step=lambda self, action: sys.exit(0)), "fails in step: SystemExit: 0"),
    (variant(action_space=None), "declares no action_space"),
    (variant(step=lambda self, action: (self.look(), 0.0, None, False, {})), "terminated None and truncated False"),
    (variant(step=lambda self, action: (self.look(), 0.0, False, False, None)), "info, a dict"),
    (variant(reward=lambda self: float("inf")), "the reward inf"),
    (variant(look=lambda self: np.array([np.nan if self.steps else 0], np.float32)), "not finite")])
def test_it_is_tried_before_a_run_begins(make, words, register, tmp_path):
    """Nothing is created, and a good one is none the wiser."""
    env_id = register(make)
    for script in (sac, stream_ac):
        with pytest.raises(envs.EnvError, match=f"^Foreign-v0.*{words}"):
            script.main(script.Args(env=env_id, compile=False, run_dir=str(tmp_path / "run")))
    gym.registry.pop(env_id)
    register(variant(look=lambda self: np.random.uniform(-1, 1, 1).astype(np.float32)))
    np.random.seed(3)
    expected = np.random.uniform()
    np.random.seed(3)
    envs.foreign.make(env_id)
    assert np.random.uniform() == expected
    assert not (tmp_path / "run").exists()


def test_a_reward_for_every_pair_of_goals(monkeypatch):
    vec = envs.make_vec("tests.tasks:Point-v0", 2, seed=1)
    goals = np.zeros((3, 2))
    for wrong, words in ((lambda a, g, info: -1.0, r"of 3 pairs of goals returns shape \(\)"),
                         (lambda a, g, info: a[0][5], "fails in compute_reward for a batch")):
        monkeypatch.setattr(vec.env.unwrapped, "compute_reward", wrong)
        with pytest.raises(envs.EnvError, match=words):
            vec.compute_reward(goals, goals)
        with pytest.raises(envs.EnvError, match=words.replace("3", "2")):  # before a run begins
            ReplayBuffer(100, 10, 2, 6, 2, 2, vec.compute_reward)


@pytest.mark.parametrize("parts, words", [
    ({}, "flat arrays"), ({"observation": gym.spaces.Discrete(5)}, "flat arrays"),
    ({"observation": gym.spaces.MultiDiscrete([5])}, "flat arrays"),
    ({"observation": ROW, "achieved_goal": gym.spaces.Box(-5, 5, (2,))}, r"\(2,\) and desired ones of shape \(1,\)")])
def test_goals_that_cannot_be_learned_are_said(parts, words, register):
    space = gym.spaces.Dict({"achieved_goal": ROW, "desired_goal": ROW} | parts)
    env_id = register(variant(observation_space=space, look=lambda self: space.sample()))
    with pytest.raises(envs.EnvError, match=f"^Foreign-v0.*{words}"):
        envs.make_vec(env_id, 1)


def test_ends_are_true_or_false_and_the_next_start_is_checked(register):
    def step(self, action):
        self.steps += 1
        return self.look(), 0.0, int(self.steps == 3), 0, {"success": np.array([True])}
    vec = envs.make_vec(register(variant(step=step, reset=ends_in_nan)), 2, seed=1)
    _, _, terminated, truncated, info = vec.step(np.zeros((2, 1), np.float32))
    assert (~terminated).all() and (~truncated).all() and info["success"].tolist() == [1, 1]
    vec.step(np.zeros((2, 1), np.float32))
    with pytest.raises(envs.EnvError, match="not finite"):
        vec.step(np.zeros((2, 1), np.float32))


@pytest.mark.parametrize("render, words", [
    (lambda self: None, "no film: Foreign-v0: render returns no picture"),
    (lambda self: 1 / 0, "no film: Foreign-v0 fails in render: ZeroDivisionError"),
    (lambda self: np.zeros((32, 32, 3), np.uint8), "filmed into")])
def test_a_film_that_fails_is_one_line_and_evaluations_draw_nothing(render, words, register, tmp_path, monkeypatch,
                                                                    capsys):
    """Of numpy's global generator, which some tasks draw from, and training goes on with."""
    for module in (envs.evaluation, envs.stream):
        monkeypatch.setattr(module, "can_be_filmed", lambda *args: True)
    env_id = register(variant(
        __init__=lambda self, render_mode=None: setattr(self, "render_mode", render_mode), render=render,
        metadata={"render_modes": ["rgb_array"]}, look=lambda self: np.random.uniform(-1, 1, 1).astype(np.float32)))
    args = SimpleNamespace(env=env_id, eval_episodes=2, evaluate="", seed=1, video=1)
    still = np.zeros((1, 1), np.float32)
    for evaluator, act in ((envs.Evaluator(args), lambda obs: np.resize(still, (len(obs), 1))),
                           (envs.StreamEvaluator(args), lambda obs, state: (still[0], None))):
        np.random.seed(3)
        expected = np.random.uniform()
        np.random.seed(3)
        evaluator.play(act)
        evaluator.film(act, tmp_path)
        assert np.random.uniform() == expected
        said = [line for line in capsys.readouterr().err.splitlines() if "film" in line]
        assert len(said) == 1 and said[0].startswith(words)


def test_actions_at_the_bounds_are_within_them(register):
    vec = envs.make_vec(register(Walk), 2, seed=1)
    vec.step(vec.to_box(np.array([[-1.0], [1.0]], np.float32)))  # or it raises


class Phase(Enum):
    FIRST = 1


def snapshot(self):
    return {"state": (self.x, self.steps, {self.steps}), "row": np.ones(2), "tensor": torch.ones(2),
            "places": {(1, 2): b"wall"}, "order": OrderedDict(a=1)}


def restore(self, kept):
    assert [type(x) for x in kept.values()] == [tuple, np.ndarray, torch.Tensor, dict, OrderedDict]
    assert kept["places"] == {(1, 2): b"wall"}
    self.x, self.steps, steps = kept["state"]
    assert steps == {self.steps}


@pytest.mark.parametrize("make", [
    variant(snapshot=snapshot, restore=restore), variant(reset=own_generator), variant(reset=old_generator),
    variant(reset=kept_inside), variant(snapshot=lambda self, path: 1 / 0),
    lambda: Lag(Walk()), lambda: gym.wrappers.NormalizeObservation(Walk()), lambda: gym.wrappers.TimeLimit(Walk(), 7),
    lambda: gym.wrappers.FlattenObservation(gym.wrappers.FrameStackObservation(Walk(), 4))],
    ids=["own snapshot", "generator", "RandomState", "containers", "another snapshot", "lag", "statistics", "two limits",
         "frames"])
def test_what_an_environment_keeps_comes_back(make, register, tmp_path, capsys):
    """Own generators, and wrappers with a memory."""
    env_id = register(make)
    whole, actions = envs.make_vec(env_id, 2, seed=1), np.random.default_rng(0).uniform(-1, 1, (80, 2, 1))
    for action in actions[:25]:
        whole.step(whole.to_box(action.astype(np.float32)))
    write_whole(tmp_path / "saved.pt", lambda path: torch.save(to_plain(envs.snapshot(whole)), path))
    other = envs.make_vec(env_id, 2, seed=99)
    envs.restore(other, torch.load(tmp_path / "saved.pt", weights_only=True))
    for action in actions[25:]:
        ours, theirs = (vec.step(vec.to_box(action.astype(np.float32))) for vec in (other, whole))
        assert all(np.array_equal(ours[k], theirs[k]) for k in range(4))
    assert "cannot be saved" not in capsys.readouterr().err


def test_a_snapshot_that_no_checkpoint_gives_back_is_said(register, tmp_path, capsys):
    """At the first checkpoint, which can be read all the same."""
    vec = envs.make_vec(register(variant(snapshot=lambda self: {"phase": Phase.FIRST}, restore=restore)), 1, seed=1)
    torch.save(to_plain(envs.snapshot(vec)), tmp_path / "saved.pt")
    assert "its snapshot() returns cannot be saved (Phase cannot be saved)" in capsys.readouterr().err
    other = envs.make_vec("Foreign-v0", 1, seed=2)
    envs.restore(other, torch.load(tmp_path / "saved.pt", weights_only=True))
    assert other.env.unwrapped.x == vec.env.unwrapped.x
    for value in (Phase.FIRST, {"x": [1j]}, np.array([None])):
        with pytest.raises(UserError, match="the run cannot be saved, for it holds a"):
            to_plain(value)


def test_running_statistics_of_a_wrapper_are_named(register, capsys):
    """An evaluation gathers its own, so it sees other numbers than training did."""
    env_id = register(lambda: gym.wrappers.NormalizeObservation(Walk()))
    for make in (lambda: envs.make_vec(env_id, 2), lambda: envs.StreamEnv(env_id)):
        envs.ids._announced.clear()
        make()
        assert f"{env_id}: NormalizeObservation scales by running statistics" in capsys.readouterr().err


def test_an_environment_in_a_file(tmp_path, monkeypatch):
    """Named as a file of rules is, wherever it lies; it finds its neighbours, and gymnasium finds its classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "mine-v2"
    folder.mkdir()
    (folder / "speed_of_track.py").write_text("SPEED = 3.0\n")
    source = """
import gymnasium as gym
import numpy as np
from speed_of_track import SPEED

class Track(gym.Env):
    observation_space = action_space = gym.spaces.Box(-9, 9, (1,), np.float32)
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}
    def step(self, action):
        return np.ones(1, np.float32), SPEED, False, False, {}

gym.register("InFile-v0", "my_track:Track", max_episode_steps=5)
"""
    (folder / "my_track.py").write_text(source)
    Path("errors.py").write_text(source.replace("InFile", "Shadowed"))
    for env_id in ("mine-v2/my_track.py:InFile-v0", f"{folder}/my_track.py:InFile-v0", "InFile-v0"):
        assert envs.make_vec(env_id, 2, seed=1).step(np.zeros((2, 1), np.float32))[1].tolist() == [3, 3]
    assert envs.make_vec("mine-v2/my_track.py:InFile-v0:frame_stack=2", 1, seed=1).observation_space.shape == (2,)
    for env_id, words in (("none/my_track.py:InFile-v0", "does not exist; check the path"),
                          ("mine-v2/my_track.py:Line-v0", "unknown environment id 'Line-v0'"),
                          ("errors.py:Shadowed-v0", "errors.py is not loaded: another module has its name")):
        with pytest.raises(envs.EnvError, match=words):
            envs.make_vec(env_id, 1)
    sac.main(sac.Args(env=f"{folder}/my_track.py:InFile-v0", num_envs=2, hidden="8x1", batch_size=16, compile=False,
                      eval_every=0, eval_episodes=2, total_timesteps=32))
    name = str(folder)[1:].replace("/", "-")
    assert [f.name for f in Path("runs/sac").iterdir()] == [f"{name}-my_track.py:InFile-v0"]


def test_ends_and_seeds(register):
    """Environments are closed once, those that nobody closes as well; a time is a seed; success may be named only where
    there is one."""
    closed = []
    env_id = register(variant(close=lambda self: closed.append(self)))
    for copies, close in ((2, True), (3, False)):
        vec = envs.make_vec(env_id, copies, seed=1_732_000_000 * 10_000)
        if close:
            vec.close()
        del vec
    assert len(closed) == 6  # and the one that was tried before
    gym.registry.pop(env_id)

    def success(self, action):
        return self.look(), 0.0, False, self.steps > 3 or bool(setattr(self, "steps", self.steps + 1)), (
            {"is_success": True} if self.x > 0 else {})
    vec = envs.make_vec(register(variant(step=success)), 4)
    rate = envs.evaluate(lambda obs: np.zeros((4, 1), np.float32), vec, 40, seed=1)["success_rate"]
    assert 0.2 < rate < 0.8
