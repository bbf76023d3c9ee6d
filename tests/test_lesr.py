"""LESR by hand: Lipschitz estimates, the shipped pairs at two states, what is refused, and that `none` is TD3."""
import csv

import pytest
import torch

from algos import lesr, td3
from algos.lesr import Smoothness, lipschitz
from errors import UserError
from knowledge.features import PAIRS, load_features


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


RAMP = {"HalfCheetah-v": 1.174197, "Hopper-v": 1.341025, "Walker2d-v": 1.845198, "Ant-v": 2.758837, "Swimmer-v": 0.079}
EXTRAS = {"HalfCheetah-v": [0.8, 0.35, 0.029167, 1.26, 0.751498], "Hopper-v": [0.1, 0.1, 0.1, 0.781025, 0.1, 3.4, 0.5],
          "Walker2d-v": [0.8, 0.995004, 6.78, 0, 0.117994, *[0.1] * 5]}
WIDTH = {"HalfCheetah-v": 22, "Hopper-v": 18, "Walker2d-v": 27, "Ant-v": 33, "Swimmer-v": 17}


@pytest.mark.parametrize("name", PAIRS)
def test_shipped_pairs_at_the_ramp_and_at_zero(name):
    n = PAIRS[name][0]
    ramp = torch.stack([torch.arange(n) / 10, torch.zeros(n)])
    features = load_features("auto", f"{name}4", ramp)
    x = features.revise(ramp)
    assert x.shape == (2, WIDTH[name]) and torch.equal(x[:, :n], ramp)
    assert features.reward(x).tolist() == pytest.approx([RAMP[name], float(name == "Walker2d-v")], abs=1e-5)
    if name in EXTRAS:
        assert x[0, n:].tolist() == pytest.approx(EXTRAS[name], abs=1e-5)


GOOD = "import torch\n\n\ndef revise_state(s):\n    return torch.cat([s, s[:, :1] ** 2], 1)\n\n\n"
REWARD = "def intrinsic_reward(x):\n    return x[:, -1].clamp(max=9)\n"


@pytest.mark.parametrize("source, words", [
    ("x = 1\n", "has to define revise_state and intrinsic_reward"), ("import nothing_there\n", "fail to import"),
    (GOOD + "def intrinsic_reward(x):\n    return x\n", r"intrinsic_reward has to return \(B,\)"),
    (GOOD.replace("[s, ", "[s + 1, ") + REWARD, "has to begin with the state"),
    (GOOD.replace("** 2", "/ 0") + REWARD, "not finite"),
    (GOOD + "def intrinsic_reward(x):\n    return 1e4 * x[:, 0]\n", "beyond"),
    (GOOD.replace("** 2", "* torch.rand(len(s), 1)") + REWARD, "has a memory"),
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
