"""LESR by hand: Lipschitz estimates, the shipped pairs at two states, what is refused, and that `none` is TD3."""
import csv
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
import runtime
from algos import lesr, td3
from algos.lesr import Smoothness, lipschitz
from errors import UserError
from knowledge.features import load_features
from knowledge.pairs import PAIRS


def columns(*numbers):
    return torch.tensor(numbers, dtype=torch.float64).T


def test_lipschitz():
    x, reward = columns([0, 1, 3], [3, 0, 1]), torch.tensor([0.0, 2.0, 2.0])
    assert lipschitz(x, reward).tolist() == pytest.approx([1.980198, 0.995025], abs=1e-6)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(lipschitz(x[order], reward[order]), lipschitz(x, reward))  # time does not matter
    assert lipschitz(columns([5, 5]), torch.tensor([0.0, 1.0])).tolist() == pytest.approx([100.0])
    grid = torch.arange(101, dtype=torch.float64)
    assert lipschitz(grid[:, None] / 100, 3 * grid / 100).item() == pytest.approx(1.5, abs=1e-6)
    assert lipschitz(grid[:, None], 3 * grid).item() == pytest.approx(2.970297, abs=1e-6)
    assert lipschitz(columns([5]), torch.tensor([1.0])).tolist() == [0.0]  # an episode of one step


def test_running_mean_of_episodes(tmp_path):
    """Every episode has slope 1 / 1.01: after k of them (1 - .995^k) of it."""
    smoothness = Smoothness(2, 5, 1)
    for _ in range(100):
        for t in range(2):
            x = torch.full((2, 1), float(t))
            smoothness.add(x, x[:, 0].double().numpy(), torch.full((2,), t == 1).numpy())
    assert smoothness.episodes == 200
    assert smoothness.constants.item() == pytest.approx(0.633042 / 1.01, abs=1e-6)
    smoothness.write(tmp_path / "l.csv")
    row, = csv.DictReader((tmp_path / "l.csv").open())
    assert float(row["unbiased"]) == pytest.approx(1 / 1.01, abs=1e-5)


@pytest.mark.parametrize("episodes, share", [(10, 0.048890), (100, 0.394230), (800, 0.981867), (1000, 0.993346)])
def test_running_mean_of_a_constant(episodes, share):
    """Every episode has two steps with one number, whose rewards differ by .01: a slope of 1."""
    smoothness = Smoothness(1, 5, 1)
    for _ in range(episodes):
        for t in range(2):
            smoothness.add(torch.zeros(1, 1), torch.full((1,), t * 0.01).double().numpy(), np.array([t == 1]))
    assert smoothness.constants.item() == pytest.approx(share, abs=1e-6)


# the state 0, .1, .2, ...: the reward there and at zeros; numbers with the features; of the door without its memory
AT = {"HalfCheetah-v4": (1.174197, 0, 22), "Hopper-v4": (1.341025, 0, 18), "Walker2d-v4": (1.845198, 1, 27),
      "Ant-v4": (2.758837, 0, 33), "Swimmer-v4": (0.079, 0, 17), "AntMaze_OpenDense-v4": (-2.460222, 0, 32),
      "AntMaze_MediumDense-v4": (-0.238410, 2.8, 33), "AntMaze_LargeDense-v4": (-3.713377, 1, 32),
      "FetchPushDense-v2": (-3.723781, 0.2146018, 35), "AdroitHandHammer-v1": (-5.453204, 0, 51),
      "AdroitHandDoor-v1": (-5.643751, 0, 43)}
EXTRAS = {"HalfCheetah-v4": [0.8, 0.35, 0.029167, 1.26, 0.751498],
          "Hopper-v4": [0.1, 0.1, 0.1, 0.781025, 0.1, 3.4, 0.5],
          "Walker2d-v4": [0.8, 0.995004, 6.78, 0, 0.117994, *[0.1] * 5]}


def test_every_pair_is_tried():
    assert [env_id[:-1] for env_id in AT] == list(PAIRS)


@pytest.mark.parametrize("env_id", AT)
def test_shipped_pairs_at_the_ramp_and_at_zero(env_id):
    pair, (ramp_reward, zero_reward, width) = PAIRS[env_id[:-1]], AT[env_id]
    s = torch.stack([torch.arange(pair.n) / 10, torch.zeros(pair.n)]).double()
    x = torch.cat([s, pair.extras(s)], 1)
    assert x.shape == (2, width)
    assert pair.reward(x).tolist() == pytest.approx([ramp_reward, zero_reward], abs=2e-6)
    if env_id in EXTRAS:
        assert x[0, pair.n:].tolist() == pytest.approx(EXTRAS[env_id], abs=1e-5)


# The table of the paper's program once more, for one state, without torch: s -> features, and (s, features) -> reward.
def norm(*x):
    return math.sqrt(sum(float(y) ** 2 for y in x))


FORMULAS = {
    "HalfCheetah-v": (lambda s: [s[8], np.mean(s[1:7]), np.var(s[1:7]), sum(s[4:8] ** 2),
                                 s[8] * math.cos(np.mean(s[1:7]))],
                      lambda s, e: e[0] - 0.01 * e[2] - 0.001 * e[3] + 0.5 * e[4]),
    "Hopper-v": (lambda s: [s[2] - s[1], s[3] - s[2], s[4] - s[3], norm(s[5], s[6]), abs(s[1]), sum(abs(s[7:11])),
                            s[5]],
                 lambda s, e: e[3] + 2 * e[6] - e[4] - 0.1 * e[5]),
    "Walker2d-v": (lambda s: [s[8], math.cos(s[1]), sum(s[8:17] ** 2) / 2, s[0], s[8] / (sum(s[8:17] ** 2) / 2 + 1e-6),
                              s[3] - s[2], s[4] - s[3], s[5] - s[4], s[6] - s[5], s[7] - s[6]],
                   lambda s, e: e[0] + e[4] + e[1] - 0.01 * e[2]),
    "Ant-v": (lambda s: [s[13], s[0], np.var(s[1:5]), np.std(s[19:27]), sum(s[5:13] ** 2), min(s[5:13])],
              lambda s, e: 2 * e[0] + 0.1 * e[1] - 0.5 * e[2] - 0.1 * e[3] - 0.01 * e[4] + 0.5 * e[5]),
    "Swimmer-v": (lambda s: [s[3] ** 2, sum(s[5:8] ** 2), *np.cos(s[:3]), *np.sin(s[:3]), s[2] - s[1]],
                  lambda s, e: max(0, e[0] - 0.01 * e[1])),
    "AntMaze_OpenDense-v": (lambda s: [norm(s[0] - s[27], s[27] - s[28]), np.var(s[1:5]), np.std(s[19:27])],
                            lambda s, e: -e[0] + e[1] + e[2]),
    "AntMaze_MediumDense-v": (
        lambda s: [norm(s[0] - s[27], s[1] - s[28]), math.cos(s[3] - math.atan2(s[28] - s[1], s[27] - s[0])),
                   np.std(s[5:13]), np.var(s[19:27])],
        lambda s, e: -0.5 * e[0] + 0.3 * e[1] + 0.2 * e[2] + 0.1 * e[3] + 5 * max(0, 0.5 - e[2])),
    "AntMaze_LargeDense-v": (
        lambda s: [norm(s[27] - s[0], s[28] - s[1]), 1 - sum(abs(s[1:5])), np.var(s[5:13]) + np.var(s[19:27])],
        lambda s, e: -e[0] + e[1] + e[2]),
    "FetchPushDense-v": (
        lambda s: [norm(*s[3:6] - s[25:28]), norm(*s[3:6] - s[:3]),
                   math.acos(np.dot(s[3:6] - s[:3], s[25:28] - s[3:6])
                             / (norm(*s[3:6] - s[:3]) * norm(*s[25:28] - s[3:6]) + 1e-8)),
                   1 / (1 + norm(*s[17:20])), s[20] - s[14], s[21] - s[15], s[22] - s[16]],
        lambda s, e: -e[0] - 0.5 * e[1] - 0.5 * e[2] + e[3] + 0.1 * norm(*e[4:7])),
    "AdroitHandHammer-v": (
        lambda s: [norm(*s[36:39] - s[42:45]), -s[41] / norm(*s[39:42]), np.std(s[4:26]), np.std(s[:4]), -s[29]],
        lambda s, e: (-e[0] + 2 * e[1] + (3 if s[26] < 0.1 else 1.5) * (e[2] + e[3]) + 1.5 * e[4]
                      - max(0, s[45] - 15) ** 2)),
    "AdroitHandDoor-v": (lambda s: [norm(*s[35:38]), *s[35:38] / norm(*s[35:38])], lambda s, e: -e[0] + e[3]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_shipped_pairs_are_the_published_formulas(name):
    """At random states, small and large ones: every branch is taken."""
    pair, (extras, reward) = PAIRS[name], FORMULAS[name]
    s = np.random.default_rng(0).standard_normal((200, pair.n)) * np.linspace(0.1, 20, 200)[:, None]
    x = torch.cat([torch.from_numpy(s), pair.extras(torch.from_numpy(s))], 1)
    expected = np.array([extras(row) for row in s])
    assert np.allclose(x[:, pair.n:].numpy(), expected, rtol=1e-12, atol=1e-12)
    assert np.allclose(pair.reward(x).numpy(), [reward(*both) for both in zip(s, expected)], rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("env_id", AT)
@pytest.mark.exports
def test_auto_finds_the_pair_of_an_environment(env_id, tmp_path):
    """In states as the scripts have them, of which a pair for goals reads a part; a run can leave the policy."""
    vec = envs.make_vec(env_id, 2, seed=1)
    obs = vec.step(vec.to_box(np.full((2, vec.action_space.shape[0]), 0.3)))[0]
    s, pair = envs.flatten(obs), PAIRS[env_id[:-1]]
    features = load_features("auto", envs.resolve(env_id), s)
    x = features.revise(s)
    assert torch.equal(x[:, :s.shape[1]], s)
    theirs = s
    if pair.goal:
        seen = torch.as_tensor(obs["observation"]).float()
        assert seen[:, -1].tolist() == pytest.approx([1 - 1 / vec.max_episode_steps] * 2)  # which they do not have
        theirs = torch.cat([seen[:, :-1], torch.as_tensor(obs["desired_goal"]).float()], 1)
    assert torch.equal(x[:, s.shape[1]:], pair.extras(theirs)) and theirs.shape == (2, pair.n)
    assert torch.equal(features.reward(x), pair.reward(torch.cat([theirs, pair.extras(theirs)], 1)))
    with torch.no_grad():
        assert runtime.save_policy(tmp_path / "policy.pt2", lambda obs: features.revise(envs.flatten(obs))[:, -1:],
                                   envs.example_of(vec, obs))
    vec.close()


def test_a_start_that_is_all_but_still_is_no_reason_to_refuse_a_pair():
    """Walker2d's pair divides the speed by the energy: .005 / .0000125 is far beyond 100."""
    s = torch.zeros(1, 17)
    s[0, 8] = 0.005
    features = load_features("auto", "Walker2d-v4", s)
    assert features.reward(features.revise(s)).item() > 300


@pytest.mark.parametrize("env_id, words", [("AntMaze_OpenDense-v5", "use the -v4 of it"), ("Ant-v5", "use the -v4"),
                                           ("Pendulum-v1", "no features ship for Pendulum-v1")])
def test_tasks_without_a_pair(env_id, words):
    with pytest.raises(UserError, match=words):
        load_features("auto", env_id, torch.zeros(1, 105))


GOOD = "import torch\n\n\ndef revise_state(s):\n    return torch.cat([s, s[:, :1] ** 2], 1)\n\n\n"
REWARD = "def intrinsic_reward(x):\n    return x[:, -1].clamp(max=9)\n"


@pytest.mark.parametrize("source, words", [
    ("x = 1\n", "has to define revise_state and intrinsic_reward"), ("import nothing_there\n", "fail to import"),
    (GOOD + "def intrinsic_reward(x):\n    return x\n", "intrinsic_reward has to return one number for each state"),
    (GOOD.replace("[s, ", "[s + 1, ") + REWARD, "has to begin with the state"),
    (GOOD.replace("** 2", "/ 0") + REWARD, "not finite"),
    (GOOD + "def intrinsic_reward(x):\n    return 1e4 * x[:, 0]\n", "beyond"),
    (GOOD.replace("** 2", "* torch.rand(len(s), 1)") + REWARD, "revise_state has a memory, or draws random numbers"),
    (GOOD + "def intrinsic_reward(x):\n    return torch.rand(len(x))\n", "intrinsic_reward has a memory, or draws"),
    (GOOD + "calls = []\n\n\ndef intrinsic_reward(x):\n    calls.append(1)\n    return 0 * x[:, 0] + len(calls)\n",
     "intrinsic_reward has a memory"),
    (GOOD.replace("s[:, :1]", "s[:, :1].double()") + REWARD, "revise_state returns torch.float64"),
    (GOOD + "def intrinsic_reward(x):\n    x[:, 0].clamp_(0, 0)\n    return x[:, 1]\n",
     "they change what they are given"),
    (GOOD.replace("s[:, :1]", "s[:, 99]") + REWARD, "fail: IndexError")])
def test_pairs_that_cannot_be_used(source, words, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(UserError, match=words) as error:
        load_features(str(file), "Pendulum-v1", torch.zeros(1, 3))
    assert "\n" not in str(error.value)


def test_generated_pairs_run_in_the_sandbox(tmp_path):
    file = tmp_path / "said.py"
    file.write_text("import numpy as np\n\n\ndef revise_state(s):\n    return np.concatenate([s, [np.cos(s[0])]])\n\n\n"
                    "def intrinsic_reward(s):\n    return s[-1] - 0.5\n")
    s = torch.rand(5, 3)
    features = load_features(f"llm:{file}", "Pendulum-v1", s)
    x = features.revise(s)
    assert torch.allclose(x, torch.cat([s, s[:, :1].cos()], 1)) and torch.allclose(features.reward(x), x[:, -1] - 0.5)
    file.with_suffix(".txt").write_text(file.read_text())
    with pytest.raises(UserError, match="said.txt: it does not end in .py; --features llm: takes a .py file"):
        load_features(f"llm:{file.with_suffix('.txt')}", "Pendulum-v1", s)  # of which no run would keep a copy
    with pytest.raises(UserError, match="none.py: there is no such file; --features llm: takes a .py file"):
        load_features(f"llm:{tmp_path / 'none.py'}", "Pendulum-v1", s)
    file.write_text("import os\n\n\ndef revise_state(s):\n    return s\n\n\ndef intrinsic_reward(s):\n    return 0.0\n")
    with pytest.raises(UserError, match="os"):
        load_features(f"llm:{file}", "Pendulum-v1", s)


SMALL = dict(env="Pendulum-v1", total_timesteps=260, learning_starts=200, batch_size=16, hidden="16x1", compile=False,
             eval_every=0, eval_episodes=1, checkpoint_every=0)


def test_none_is_td3_and_the_rest_is_reward_and_inputs(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(GOOD + REWARD)
    td3.main(td3.Args(**SMALL, run_dir=str(tmp_path / "td3")))
    runs = {"none": dict(features="none"), "both": {}, "features": dict(intrinsic_weight=0.0),
            "reward": dict(see_features=False)}
    saved = {}
    for name, flags in runs.items():
        args = dict(features=str(file), intrinsic_weight=0.5) | flags
        lesr.main(lesr.Args(**SMALL, **args, run_dir=str(tmp_path / name)))
        saved[name] = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
    plain = torch.load(tmp_path / "td3" / "checkpoint.pt", weights_only=True)
    for group in ("actor", "critic", "target"):
        for name, p in plain["agent"][group].items():
            assert torch.equal(saved["none"]["agent"][group][name], p), name
    rows = {name: checkpoint["buffer"]["rows"] for name, checkpoint in saved.items()}
    n, d = 3, 1
    assert torch.equal(rows["none"], plain["buffer"]["rows"])
    assert rows["both"].shape[1] == 2 * (n + 1) + d + 2 and rows["reward"].shape[1] == 2 * n + d + 2
    both, features = rows["both"][:100], rows["features"][:100]  # uniform actions, drawn after networks of one size
    assert torch.equal(both[:, :n], features[:, :n]) and torch.allclose(both[:, n], both[:, 0] ** 2)
    intrinsic = 0.5 * both[:, 0] ** 2  # of the state before the action
    assert torch.allclose(both[:, n + 1 + d], features[:, n + 1 + d] + intrinsic, atol=1e-5)
    reward, none = rows["reward"][:100], rows["none"][:100]
    assert torch.equal(reward[:, :n], none[:, :n])
    assert torch.allclose(reward[:, n + d], none[:, n + d] + 0.5 * none[:, 0] ** 2, atol=1e-5)
    assert (tmp_path / "both" / "lipschitz.csv").read_text().count("\n") == 5


def test_none_is_td3_on_goals_with_hindsight_too(tmp_path):
    few = SMALL | dict(env="tests.tasks:Point-v0", her_goals=4)
    td3.main(td3.Args(**few, run_dir=str(tmp_path / "td3")))
    lesr.main(lesr.Args(**few, features="none", run_dir=str(tmp_path / "lesr")))
    theirs, ours = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("td3", "lesr"))
    assert torch.equal(theirs["buffer"]["rows"], ours["buffer"]["rows"])
    for name, p in theirs["agent"]["target"].items():
        assert torch.equal(ours["agent"]["target"][name], p), name
    with pytest.raises(UserError, match="use --her-goals 0"):
        lesr.main(lesr.Args(**few, features="tests/features.py", run_dir=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()


def test_none_is_td3_without_a_time_limit_too(tmp_path):
    """No episode has to be stored whole."""
    gym.register("Endless-v0", Endless)
    few = SMALL | dict(env="Endless-v0", total_timesteps=220)
    td3.main(td3.Args(**few, her_goals=0, run_dir=str(tmp_path / "td3")))
    lesr.main(lesr.Args(**few, features="none", run_dir=str(tmp_path / "lesr")))
    theirs, ours = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("td3", "lesr"))
    assert torch.equal(theirs["buffer"]["rows"], ours["buffer"]["rows"])
    for name, p in theirs["agent"]["target"].items():
        assert torch.equal(ours["agent"]["target"][name], p), name
    del gym.registry["Endless-v0"]


def test_an_episode_without_end_is_measured_in_pieces():
    """Rises of 1 within pieces of two steps; the rise of 9 between two pieces does not count."""
    smoothness = Smoothness(1, 2, 1)
    for t, reward in enumerate([0.0, 1.0, 10.0, 11.0]):
        smoothness.add(torch.full((1, 1), float(t)), np.array([reward]), np.array([False]))
    assert smoothness.episodes == 2 and smoothness.lengths.item() == 0
    assert smoothness.constants.item() == pytest.approx((1 - 0.995 ** 2) / 1.01)


def test_what_a_run_says_of_its_rewards():
    """Two environments, w .5: r 1 and -3, G 4 and -2, then the same with the other sign; the second one ends."""
    scalars, sums, args = runtime.Means(), torch.zeros(2, 2), lesr.Args(intrinsic_weight=0.5)
    lesr.log_rewards(scalars, sums, np.array([1.0, -3.0]), np.array([4.0, -2.0]), np.array([False, False]), args)
    assert {k: x.item() for k, x in scalars.take().items()} == dict(
        reward=-1, intrinsic_reward=1, abs_reward=2, abs_intrinsic_reward=3)
    lesr.log_rewards(scalars, sums, np.array([-1.0, -3.0]), np.array([-4.0, 4.0]), np.array([False, True]), args)
    assert scalars.take()["intrinsic_share"].item() == pytest.approx(1 / 6, abs=1e-5)  # |.5 (-2 + 4)| / |-6|
    assert not sums.any()


@pytest.mark.parametrize("kind", ["", "llm:"])
def test_a_run_keeps_its_features(kind, tmp_path, monkeypatch, capsys):
    """The file changes, then is gone, and the command is given in another folder: evaluation and resume stay."""
    monkeypatch.chdir(tmp_path)
    said = GOOD + REWARD
    if kind:
        said = ("import numpy as np\n\n\ndef revise_state(s):\n    return np.append(s, s[0] ** 2)\n\n\n"
                "def intrinsic_reward(x):\n    return min(x[-1], 9.0)\n")
    for name in ("whole", "cut"):
        (tmp_path / "mine.py").write_text(said)
        lesr.main(lesr.Args(**SMALL | dict(total_timesteps=260 if name == "whole" else 130, features=f"{kind}mine.py"),
                            run_dir=str(tmp_path / name)))
    named = [] if kind else ["--features", "mine.py"]  # code that is not sandboxed is named again
    evaluated = [lesr.main(runtime.cli(lesr.Args, "lesr", ["--evaluate", str(tmp_path / "whole"), *named]))]
    capsys.readouterr()
    (tmp_path / "mine.py").write_text(said.replace("** 2", "* 3"))
    evaluated.append(lesr.main(runtime.cli(lesr.Args, "lesr", ["--evaluate", str(tmp_path / "whole"), *named])))
    assert "mine.py is not what run" in capsys.readouterr().err
    (tmp_path / "mine.py").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluated.append(lesr.main(runtime.cli(lesr.Args, "lesr", ["--evaluate", str(tmp_path / "whole"), *named])))
    assert len({str(result) for result in evaluated}) == 1
    lesr.main(runtime.cli(lesr.Args, "lesr", ["--resume", str(tmp_path / "cut"), "--total-timesteps", "260", *named]))
    saved = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut")]
    assert torch.equal(saved[0]["buffer"]["rows"], saved[1]["buffer"]["rows"])


class Endless(gym.Env):
    """No time limit: episodes end by themselves, after two to five steps."""
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.np_random.integers(2, 6)
        return self.np_random.random(2), {}

    def step(self, action):
        self.left -= 1
        return self.np_random.random(2), float(action[0]), bool(self.left == 0), False, {}


class Ramp(gym.Env):
    """The state 0, .1, .2, ... and the reward 1, for ever; every third episode ends by itself after two steps."""
    observation_space = gym.spaces.Box(-np.inf, np.inf, (17,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    episode = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.arange(17) / 10, {}

    def step(self, action):
        self.t += 1
        return np.arange(17) / 10, 1.0, self.episode % 3 == 0 and self.t == 2, False, {}


def test_what_is_stored_and_how_often_is_updated(tmp_path, monkeypatch):
    """r + w G at the state of the hand number; only an end of the task is stored as one; half as many steps of the
    actor and of the targets."""
    moved, lerp = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: moved.append(args[2]) or lerp(*args))
    gym.register("HalfCheetah-v77", Ramp, max_episode_steps=5)
    lesr.main(lesr.Args(**SMALL | dict(env="HalfCheetah-v77", total_timesteps=300), run_dir=str(tmp_path / "run")))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    f, d = 22, 1
    rows = saved["buffer"]["rows"]
    assert rows.shape == (300, 2 * f + d + 2)
    assert rows[:, f + d].tolist() == pytest.approx([1.02348394] * 300, abs=1e-6)
    terminated = [0] * 5 + [0] * 5 + [0, 1]  # of three episodes
    assert rows[:, f + d + 1].tolist() == (terminated * 25)[:300]
    count = saved["agent"]["count"]
    assert count["critic"] == 100 and count["actor"] == 50 and moved.count(lesr.Args.tau) == 50
    del gym.registry["HalfCheetah-v77"]


def test_a_task_with_goals_goes_on_after_a_cut(tmp_path):
    few = SMALL | dict(env="FetchPushDense-v2", num_envs=2)
    lesr.main(lesr.Args(**few, run_dir=str(tmp_path / "whole")))
    lesr.main(lesr.Args(**few | dict(total_timesteps=130), run_dir=str(tmp_path / "cut")))
    lesr.main(runtime.cli(lesr.Args, "lesr", ["--resume", str(tmp_path / "cut"), "--total-timesteps", "260"]))
    saved = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut")]
    assert torch.equal(saved[0]["buffer"]["rows"], saved[1]["buffer"]["rows"])
    for name, p in saved[0]["agent"]["target"].items():
        assert torch.equal(saved[1]["agent"]["target"][name], p), name


@pytest.mark.exports
def test_a_maze_runs(tmp_path):
    result = lesr.main(lesr.Args(**SMALL | dict(env="AntMaze_OpenDense-v4"), run_dir=str(tmp_path / "run")))
    assert result["success_rate"] == 0 and (tmp_path / "run" / "policy.pt2").is_file()
    assert (tmp_path / "run" / "lipschitz.csv").read_text().count("\n") == 1 + 2 + 2 + 27 + 1 + 3
