"""What films draw of actions: the numbers that are drawn, read back from the figure."""
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch

import envs
from algos import a2c, dqn, ppo
from envs import timeline

matplotlib.use("Agg")
FRAMES = [np.full((40, 60, 3), k, np.uint8) for k in range(10)]
QUICK = {"num_envs": 2, "eval_episodes": 2, "eval_every": 0, "checkpoint_every": 0, "video": 1}


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the last figure, in place of a file: without the strip of frames."""
    figures = []
    monkeypatch.setattr(timeline, "save", lambda figure, axes, path: figures.append(figure))

    def axes():
        return figures[-1].axes[1:]
    return axes


def test_probabilities_are_stacked_as_they_are(drawn):
    probabilities = np.stack([np.linspace(0.1, 0.7, 10), np.linspace(0.6, 0.2, 10), np.linspace(0.3, 0.1, 10)], 1)
    said = [timeline.Said(row, None, "") for row in np.log(probabilities).tolist()]
    actions = np.arange(10) % 3
    timeline.draw_actions(FRAMES, actions, said, ["left", "right", "stay"], "x.png", crop=False)
    area, band = drawn()
    upper = np.cumsum(probabilities, 1)
    for k, part in enumerate(area.collections):  # not squashed a second time
        edge = part.get_paths()[0].vertices
        assert edge[:, 1].max() == pytest.approx(upper[:, k].max()) and part.get_label() == ["left", "right", "stay"][k]
    assert area.get_ylabel() == "probability" and area.get_ylim() == (0, 1) and area.get_xlim() == (0, 10)
    colors = np.array(timeline.colors_of(["left", "right", "stay"]))
    assert np.allclose(band.images[0].get_array()[0], colors[actions])


def test_values_are_drawn_below_the_largest(drawn):
    said = [timeline.Said([3.0, 1.0], None, "Q"), timeline.Said([-2.0, 5.0], None, "Q")]
    timeline.draw_actions(FRAMES[:2], np.array([0, 1]), said, ["0", "1"], "x.png", crop=False)
    lines, _ = drawn()
    assert [line.get_ydata().tolist() for line in lines.lines] == [[0.0, -7.0], [-2.0, 0.0]]
    assert lines.get_ylabel() == "Q - max Q"


def test_parts_of_actions_have_a_row_each(drawn):
    said = [timeline.Said([0.1 * k, -0.5], [0.2, 0.3], "") for k in range(10)]
    actions = np.stack([np.linspace(-1, 1, 10), np.zeros(10)], 1)
    timeline.draw_actions(FRAMES, actions, said, [], "x.png", crop=False)
    rows = drawn()
    assert len(rows) == 2
    mean, executed = rows[0].lines[:2]
    assert mean.get_ydata() == pytest.approx(0.1 * np.arange(10))
    assert executed.get_ydata() == pytest.approx(actions[:, 0]) and executed.get_marker() == "."
    band = rows[1].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((-0.8, -0.2))
    timeline.draw_actions(FRAMES, actions, [], [], "x.png", crop=False)  # a policy that says nothing
    assert drawn()[0].lines[0].get_ydata() == pytest.approx(actions[:, 0])


def test_scripts_note_what_their_policies_say(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(envs.evaluation, "draw_actions", lambda *args, **kwargs: calls.append(args))
    args = ppo.Args(env="MobileRobot-v0", total_timesteps=128, num_steps=64, run_dir=str(tmp_path / "ppo"), **QUICK)
    ppo.main(args)
    frames, actions, said, names, path = calls[-1]
    assert len(frames) == len(actions) == len(said) == 251 and names == ["x-", "x+", "y-", "y+"]
    total = np.exp([one.values for one in said]).sum(1)
    assert total == pytest.approx(np.ones(251), abs=1e-5) and path.name == "actions-0.png"
    calls.clear()
    ppo.main(replace(args, evaluate=args.run_dir, video=2))
    assert [call[4].name for call in calls] == ["actions-0.png", "actions-1.png"] and len(calls[1][2]) == 251
    a2c.main(a2c.Args(env="Pendulum-v1", total_timesteps=40, eval_select="sample", run_dir=str(tmp_path / "a2c"),
                      **QUICK))
    _, actions, said, _, _ = calls[-1]
    assert actions.shape == (200, 1) and np.abs(actions).max() <= 1
    assert said[0].std == pytest.approx([1.0], abs=0.01) and said[0].scores == ""
    noise = actions[:, 0] - [one.values[0] for one in said]
    assert 0.3 < np.abs(noise).mean() < 1.2  # what is executed was drawn, and clipped
    dqn.main(dqn.Args(env="CartPole-v1", total_timesteps=40, learning_starts=20, run_dir=str(tmp_path / "dqn"),
                      **QUICK))
    _, actions, said, names, _ = calls[-1]
    assert said[0].scores == "Q" and names == ["0", "1"]
    assert (np.argmax([one.values for one in said], 1) == actions).all()


def test_noting_costs_nothing_unless_filmed():
    evaluator = envs.Evaluator(ppo.Args(env="CartPole-v1", eval_episodes=2, evaluate=""))
    values = torch.zeros(2, 3)
    assert evaluator.noted(values) is values and evaluator.said == []
