"""Shaping: invariance and numbers by hand, PPO where it is off, as released where asked, and the three stages."""
import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import envs
import runtime
from algos import bk_code, bk_goal, bk_pref, ppo, ppo_rnd
from errors import UserError
from knowledge import flat_name, label_code, label_goals, label_preferences, train_preferences
from knowledge.dataset import Dataset

GRID = "BabyAI-Text-GoToLocal-RedBall-S20"
SMALL = dict(env=GRID, num_envs=4, num_steps=16, batch_size=32, epochs=1, total_timesteps=512, eval_every=256,
             eval_episodes=4, checkpoint_every=256)


@pytest.fixture(autouse=True)
def short_episodes(monkeypatch):
    """Untrained agents play to the time limit; 25 steps are enough here."""
    make = envs.make_vec

    def make_short(env_id, *args, **kwargs):
        return make(env_id, *args, **kwargs, **({"max_steps": 25} if env_id.startswith("BabyAI") else {}))

    monkeypatch.setattr(envs, "make_vec", make_short)
    monkeypatch.setattr("envs.evaluation.make_vec", make_short)


def column(*numbers):
    return torch.tensor(numbers).unsqueeze(1)


# shaping

def test_gain_telescopes():
    phi = torch.tensor([.2, .5, -.1, .7, .4])
    gained = bk_code.gain(phi[:-1], phi[1:], torch.zeros(4), 0.99)
    discount = 0.99 ** torch.arange(4)
    assert gained.tolist() == pytest.approx([.295, -.599, .793, -.304])
    assert float((discount * gained).sum()) == pytest.approx(.99 ** 4 * .4 - .2) == pytest.approx(.184238404)
    ended = bk_code.gain(phi[:-1], phi[1:], torch.tensor([0., 0., 0., 1.]), 0.99)
    assert float((discount * ended).sum()) == pytest.approx(-.2)


def q_of_a_chain(phi, absorbing_phi):
    """Values of left and right in states 1 to 4 of a chain that ends in 0 (reward .3) and 5 (reward 1), shaped."""
    q = torch.zeros(6, 2)
    for _ in range(200):
        for s in range(1, 5):
            for action, to in enumerate((s - 1, s + 1)):
                ends = torch.tensor(float(to in (0, 5) and not absorbing_phi))
                shaped = bk_code.gain(phi[s], phi[to], ends, 0.9)
                q[s, action] = {0: .3, 5: 1.}.get(to, 0.) + shaped + 0.9 * (0. if to in (0, 5) else q[to].max())
    return q[1:5]


def test_shaping_changes_no_optimal_policy_unless_ends_have_a_potential():
    phi = torch.tensor([2., 1., -3., 4., .5, -5.])
    plain = q_of_a_chain(torch.zeros(6), False)
    assert plain.flatten().tolist() == pytest.approx([.3, .729, .6561, .81, .729, .9, .81, 1])
    shaped = q_of_a_chain(phi, False)
    assert shaped.flatten().tolist() == pytest.approx([-.7, -.271, 3.6561, 3.81, -3.271, -3.1, .31, .5], abs=1e-5)
    assert torch.allclose(shaped, plain - phi[1:5, None], atol=1e-5) and shaped.argmax(1).tolist() == [1] * 4
    assert q_of_a_chain(phi, True).argmax(1).tolist() == [0] * 4  # the trap


def test_shaping_is_another_start_of_the_critic():
    """With V - c phi as the critic of shaped rewards, advantages are those of V and the task's rewards: what shaping
    does, it does until the critic has learned -c phi (Wiewiora 2003)."""
    torch.manual_seed(0)
    phi, value, reward = torch.randn(7, 1), torch.randn(7, 1), torch.randn(6, 1)
    terminated, truncated = column(0., 0., 1., 0., 0., 0.), column(0., 0., 0., 0., 1., 0.)
    ended = terminated + truncated
    after, final_value = torch.randn(2, 6, 1)  # potential and value of the true next observation, where an episode ends
    next_phi = torch.where(ended > 0, after, phi[1:])
    args = bk_code.Args(shape_coef=0.7)
    shaped, _ = bk_code.Shaping(1.0, 1)(reward, phi[:-1], next_phi, terminated, args)
    rest = args.gamma * truncated * final_value
    plain = bk_code.gae(reward + rest, value[:-1], value[-1], ended, args.gamma, args.gae_lambda)
    value = value - 0.7 * phi
    rest = args.gamma * truncated * (final_value - 0.7 * after)
    assert torch.allclose(bk_code.gae(shaped + rest, value[:-1], value[-1], ended, args.gamma, args.gae_lambda), plain,
                          atol=1e-5)


def test_corrected_form_by_hand():
    args = bk_code.Args(shape_coef=1.0)
    learned, added = bk_code.Shaping(1.0, 1)(column(0., 0., 0.), column(1., 2., .5), column(2., 9., 1.5),
                                             column(0., 1., 0.), args)
    assert added.flatten().tolist() == pytest.approx([.98, -2, .985]) and torch.equal(learned, added)
    learned, _ = bk_code.Shaping(2.0, 1)(column(1.), column(1.), column(2.), column(0.), bk_code.Args(
        ext_coef=10., shape_coef=.5))
    assert float(learned) == pytest.approx(10 + .5 * .98 / 2)


def test_released_form_by_hand():
    shaping, args = bk_code.Shaping(1.0, 1), bk_code.Args(shaping="official", shape_coef=1.0, ext_coef=10.0)
    zeros = column(0., 0.)
    learned, added = shaping(column(1., 0.), column(1., 2.), zeros, zeros, args)
    assert shaping.scale == pytest.approx(1.242782, abs=1e-6)
    assert added.flatten().tolist() == pytest.approx([.7966, .788553], abs=1e-5)
    assert learned.flatten().tolist() == pytest.approx([10.7966, .788553], abs=1e-5)
    assert float(shaping.carry) == pytest.approx(1.609293, abs=1e-5)  # already divided
    added = shaping(zeros, column(.5, 1.5), zeros, zeros, args)[1]
    assert shaping.scale == pytest.approx(2.270066, abs=1e-5)
    assert added.flatten().tolist() == pytest.approx([-.490864, .433908], abs=1e-5)


def test_released_form_is_a_step_late():
    shaping, args = bk_code.Shaping(1.0, 1), bk_code.Args(shaping="official", shape_coef=1.0)
    phi = column(.2, .5, -.1, .7)
    added = shaping(torch.zeros(4, 1), phi, torch.zeros(4, 1), torch.zeros(4, 1), args)[1].flatten() * shaping.scale
    assert added.tolist() == pytest.approx([.198, .295, -.599, .793], abs=1e-6)
    assert float((0.99 ** torch.arange(4) * added).sum()) == pytest.approx(.672417207, abs=1e-6)


def test_running_scale_by_hand():
    shaping = bk_code.Shaping(1.0, 2)
    shaping.count_in(torch.tensor([[1., 0.], [0., 2.], [3., 1.]]), 0.99)  # sums [1, 0], [.99, 2], [3.9801, 2.98]
    assert shaping.mean == pytest.approx(1.824986, abs=1e-5) and shaping.var == pytest.approx(1.786306, abs=1e-5)


def test_curiosity_and_its_statistics():
    running = ppo_rnd.Running()
    running.add(torch.tensor([[1., 0.], [.99, 2.], [3.9801, 2.98]]))
    assert running.mean == pytest.approx(1.824986, abs=1e-5) and running.var == pytest.approx(1.786306, abs=1e-5)
    torch.manual_seed(0)
    agent, curious = ppo_rnd.Agent((7, 7, 3), 7), ppo_rnd.Curiosity((7, 7, 3), 2)
    view = torch.randint(0, 8, (40, 7, 7, 3), dtype=torch.uint8)
    curious.seen.add(view.flatten(1))
    z = curious.normalise(view, clip=5)
    assert z.abs().max() <= 5 and abs(float(z.mean())) < 0.1 and float(z.std()) == pytest.approx(1, abs=0.1)
    with torch.no_grad():
        assert torch.allclose(agent.curiosity(z), (agent.target(z) - agent.predictor(z)).square().sum(1) / 2)
    loss = agent.curiosity(z).mean()
    loss.backward()
    assert all(p.grad is None for p in agent.target.parameters())
    pictures = ppo_rnd.Agent((64, 64, 3), 7)
    with torch.no_grad():
        found = pictures.curiosity(torch.randn(40, 64, 64, 3))
    assert found.std() > 0.05 * found.mean()  # it tells pictures apart
    twice = curious.scaled(torch.ones(2, 2), 0.5)  # sums 1, 1 | 1.5, 1.5: of deviation 0.25
    assert twice.flatten().tolist() == pytest.approx([4.0] * 4, rel=1e-3)


@pytest.mark.parametrize("shape, num_actions, count", [((7, 7, 3), 7, 19_384), ((64, 64, 3), 20, 151_221)])
def test_networks_have_the_size_that_the_page_names(shape, num_actions, count):
    assert sum(p.numel() for p in bk_code.Agent(shape, num_actions, False).parameters()) == count


# runs

def rows(folder, name="eval.csv", drop="wall_s"):
    with (folder / name).open() as file:
        return [{k: v for k, v in row.items() if k != drop} for row in csv.DictReader(file)]


def test_rewards_weigh_the_same_without_shaping():
    reward, zeros = torch.tensor([[0., 1.]]), torch.zeros(1, 2)
    for settings in (dict(shaping="none"), dict(shaping="pbrs"), dict(shaping="official")):
        learned, _ = bk_code.Shaping(1.0, 2)(reward, zeros, zeros, zeros, bk_code.Args(ext_coef=10.0, **settings))
        assert learned.tolist() == [[0, 10]], settings


def test_without_shaping_it_is_ppo(tmp_path):
    ppo.main(ppo.Args(**SMALL, normalize_advantage=True, run_dir=str(tmp_path / "ppo")))
    bk_code.main(bk_code.Args(**SMALL, shaping="none", run_dir=str(tmp_path / "none")))
    bk_code.main(bk_code.Args(**SMALL, knowledge="none", run_dir=str(tmp_path / "zero")))
    assert rows(tmp_path / "ppo") == rows(tmp_path / "none") == rows(tmp_path / "zero")
    weights = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["agent"]
               for name in ("ppo", "none", "zero")]
    assert all(torch.equal(weights[0][key], other[key]) for other in weights[1:] for key in weights[0])


def test_released_form_resumes(tmp_path):
    """A scale that wanders is kept; the other settings are in test_contract.py."""
    settings = SMALL | dict(knowledge="near", shaping="official", bootstrap=False, ext_coef=10.0, shape_coef=1.0,
                            critic_sees_phi=True)
    bk_code.main(bk_code.Args(**settings, run_dir=str(tmp_path / "whole")))
    bk_code.main(bk_code.Args(**settings | {"total_timesteps": 256}, run_dir=str(tmp_path / "cut")))
    bk_code.main(bk_code.Args(**settings | {"run_dir": str(tmp_path / "cut")}, resume=str(tmp_path / "cut")))
    assert rows(tmp_path / "whole")[-1] == rows(tmp_path / "cut")[-1]
    saved = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut")]
    assert all(torch.equal(saved[0]["agent"][key], saved[1]["agent"][key]) for key in saved[0]["agent"])
    assert saved[0]["shaping"]["scale"] == saved[1]["shaping"]["scale"] != 1


def test_a_run_keeps_its_potential(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("def potential(history):\n    return history.step.float() / 25\n")
    folder = tmp_path / "run"
    flags = SMALL | {"knowledge": str(mine), "total_timesteps": 256}
    bk_code.main(bk_code.Args(**flags, run_dir=str(folder)))
    kept = folder / flat_name(str(mine))  # as rules are
    assert kept.read_text() == mine.read_text()
    mine.write_text("def potential(history):\n    raise ValueError('changed')\n")
    args = bk_code.Args(**flags | {"run_dir": str(folder), "total_timesteps": 512}, resume=str(folder))
    bk_code.main(args)
    assert f"note: {mine} is not what run {folder} began with; its copy {kept} is used" in capsys.readouterr().err
    with pytest.raises(UserError, match="changed"):
        bk_code.main(bk_code.Args(**flags, run_dir=str(tmp_path / "other")))


def test_what_cannot_be_shaped(tmp_path):
    for flags, message in ((dict(env="CartPole-v1"), "no words"), (dict(knowledge="nothing"), "is unknown"),
                           (dict(env="MobileRobot-v0"), "no words"),
                           (dict(knowledge="goals", horizon=2), "use --horizon 4"),
                           (dict(shape_coef=-1.0), "--shape-coef must be"), (dict(horizon=0), "--horizon must be"),
                           (dict(env="BabyAI-Text-GoToLocal-Pretraining-S20", knowledge="target"), "another target")):
        with pytest.raises(UserError, match=message):
            bk_code.main(bk_code.Args(**SMALL | flags, run_dir=str(tmp_path / "run")))
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no captions"):
        ppo_rnd.main(ppo_rnd.Args(**SMALL | {"env": "CartPole-v1"}, collect=1, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps, total, every, count", [
    (1024, 5_000_000, 20_000, 251), (4096, 2_000_000, 20_000, 101), (1024, 5_000_000, 500_000, 11),
    (4096, 5_000_000, 500_000, 11)])
def test_how_often_a_run_is_evaluated(steps, total, every, count):
    """At the start, past multiples of `every`, at the end. As released, `every` steps or more after the last time: 246,
    99, 11 and 11 times."""
    run, played = SimpleNamespace(step=0), 1
    while run.step < total:
        run.before, run.step = run.step, run.step + steps
        if runtime.Run.due(run, every) or run.step >= total:
            played += 1
    assert played == count


# the stages, one after the other

@pytest.mark.slow
def test_the_three_stages(tmp_path):
    """Collect, label, train: what a user does, in small. 20,000 steps each."""
    small = dict(epochs=1, total_timesteps=20_000, eval_every=0, eval_episodes=5)
    ppo_rnd.main(ppo_rnd.Args(**small, env="BabyAI-Text-GoToLocal-Pretraining-S20", collect=3, ext_coef=0.0,
                              run_dir=str(tmp_path / "rnd")))
    data = str(tmp_path / "rnd" / "dataset")
    assert len(Dataset(data)) == 6
    answers = {"code": "```python\ndef compute_reward(obs, past_obs, past_actions):\n"
                       "    seen = float((obs[0] > 3).sum())\n    return seen, {'seen': seen}\n```",
               "goals": "- go to a ball\n- turn to look for objects"}
    made = {}
    for name, command, flag, count in (("code", label_code, "iterations", 2), ("goals", label_goals, "situations", 10)):
        (tmp_path / f"{name}.md").write_text("\n===\n".join([answers[name]] * count))
        args = command.Args(dataset=data, by_hand=str(tmp_path / f"{name}.md"), out=str(tmp_path / name),
                            recordings=str(tmp_path / f"{name}.jsonl"), **{flag: count})
        made[name] = command.main(args)
        again = command.main(command.Args(dataset=data, out=str(tmp_path / f"{name}-again"),
                                          recordings=str(tmp_path / f"{name}.jsonl")))  # replayed, without answers
        assert again.read_text() == made[name].read_text()
        sources = {json.loads(line)["source"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}
        assert sources == {"handwritten"}
    labels = label_preferences.main(label_preferences.Args(dataset=data, pairs=64, out=str(tmp_path / "labels.jsonl")))
    made["pref"] = train_preferences.main(train_preferences.Args(labels=str(labels), dataset=data, epochs=1))
    for script, knowledge in ((bk_code, f"llm:{made['code']}"), (bk_pref, f"pref:{made['pref']}"),
                              (bk_goal, f"goals:{made['goals']}")):
        folder = tmp_path / script.ALGO
        flags = small | {"knowledge": knowledge, "run_dir": str(folder)}
        result = script.main(script.Args(**flags))
        assert result.keys() == set(runtime.EVALUATION) and np.isfinite(result["return_mean"])
        script.main(script.Args(**flags, evaluate=str(folder)))
        scalars = {row["name"]: float(row["value"]) for row in rows(folder, "scalars.csv")}
        assert {"eval/success_rate", "policy_loss", "value_loss", "phi_invalid"} <= scalars.keys()
        assert np.isfinite(list(scalars.values())).all() and scalars["phi_invalid"] == 0


def test_command_line_of_a_stage(capsys, monkeypatch, tmp_path):
    from llm import client
    monkeypatch.setattr(sys, "argv", ["label_goals", "--env", "CartPole-v1"])
    with pytest.raises(SystemExit) as stopped:
        client.command(label_goals.main, label_goals.Args, label_goals.__doc__)
    assert stopped.value.code == 2 and "no description" in capsys.readouterr().err
