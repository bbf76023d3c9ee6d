"""DDPG and TD3 against hand numbers: targets, losses, delayed steps, noise on the target's action."""
import math

import pytest
import torch

from algos import ddpg, td3
from buffers import Batch

# One number of state and action: mu(s) = tanh(.9 s), Q(s, a) = .4 s + 1.1 a; of the targets mu'(s) = tanh(.8 s) and
# Q'(s, a) = .5 s + a.
OBS, ACTION = torch.tensor([[0.2], [1.5]]), torch.tensor([[0.3], [-0.6]])
REWARD, NEXT, END = torch.tensor([[0.5], [-1.0]]), torch.tensor([[1.0], [-0.5]]), torch.tensor([[0.0], [1.0]])
BATCH = Batch(OBS, ACTION, REWARD, END, NEXT)


def linear(name: str, weights: list[float], stack: int = 0) -> dict[str, torch.Tensor]:
    weight, bias = torch.tensor(weights).unsqueeze(1), torch.zeros(1)
    if stack:
        weight, bias = weight.repeat(stack, 1, 1), torch.zeros(stack, 1, 1)
    return {f"{name}.0.weight": weight, f"{name}.0.bias": bias}


def agent_of(module, stack: int) -> dict:
    trained = {"actor": linear("actor", [0.9]), "critic": linear("q", [0.4, 1.1], stack)}
    moments = {group: module.adam_state(params) for group, params in trained.items()}
    target = linear("actor", [0.8]) | linear("q", [0.5, 1.0], stack)
    return trained | {"target": target, "moments": moments, "count": {group: torch.zeros(()) for group in trained}}


def test_ddpg_losses():
    """y = r + gamma (1 - terminated) Q'(s', mu'(s')): .5 + .99 (.5 + tanh .8) and -1; Q = .41 and -.06."""
    agent, args = agent_of(ddpg, 0), ddpg.Args()
    with torch.no_grad():
        scalars = ddpg.update(agent, BATCH, args)
    y = [0.5 + 0.99 * (0.5 + math.tanh(0.8)), -1.0]
    assert scalars["target_q"].item() == pytest.approx(sum(y) / 2, abs=1e-6)
    assert scalars["critic_loss"].item() == pytest.approx(((0.41 - y[0]) ** 2 + (-0.06 - y[1]) ** 2) / 2, abs=1e-6)
    step = 3e-4  # Adam's first step is the learning rate, against the gradient's sign: Q_0 is too low, Q_1 too high
    weight = agent["critic"]["q.0.weight"].squeeze(1).tolist()
    assert weight == pytest.approx([0.4 - step, 1.1 + step], abs=1e-6)
    bias = agent["critic"]["q.0.bias"].item()
    loss = -sum(weight[0] * s + weight[1] * math.tanh(0.9 * s) + bias for s in (0.2, 1.5)) / 2
    assert scalars["actor_loss"].item() == pytest.approx(loss, abs=1e-6)
    assert agent["actor"]["actor.0.weight"].item() == pytest.approx(0.9 + step, abs=1e-6)  # Q grows with the action
    assert agent["target"]["actor.0.weight"].item() == pytest.approx(0.8 + 0.005 * (0.9 + step - 0.8), abs=1e-6)
    assert agent["target"]["q.0.weight"][1].item() == pytest.approx(1.0 + 0.005 * (weight[1] - 1.0), abs=1e-6)


def test_critics_that_are_not_linear(monkeypatch):
    """With a third input s a, Q = .4 s + 1.1 a - .2 s a and Q' = .5 s + a - .3 s a."""
    monkeypatch.setattr(ddpg, "critic_inputs", lambda obs, action: torch.cat([obs, action, obs * action], 1))
    agent = agent_of(ddpg, 0)
    agent["critic"], target_critic = linear("q", [0.4, 1.1, -0.2]), linear("q", [0.5, 1.0, -0.3])
    agent["target"] |= target_critic
    agent["moments"]["critic"] = ddpg.adam_state(agent["critic"])
    next_action = ddpg.decide(agent["target"], NEXT)
    assert next_action[0].item() == pytest.approx(0.6640368, abs=1e-6)
    next_q = ddpg.mlp(agent["target"], "q", ddpg.critic_inputs(NEXT, next_action))
    assert next_q[0].item() == pytest.approx(0.9648257, abs=1e-6)
    q = ddpg.mlp(agent["critic"], "q", ddpg.critic_inputs(OBS, ACTION))
    assert q.flatten().tolist() == pytest.approx([0.398, 0.12], abs=1e-6)
    loss = ddpg.actor_loss(agent["actor"], agent["critic"], OBS, ddpg.Args())
    assert loss.item() == pytest.approx(-0.784004, abs=1e-6)
    with torch.no_grad():
        scalars = ddpg.update(agent, BATCH, ddpg.Args())
    assert scalars["target_q"].item() == pytest.approx((1.4551775 - 1) / 2, abs=1e-6)
    assert scalars["critic_loss"].item() == pytest.approx(1.186012, abs=1e-6)


def test_td3_target_is_the_lower_critic_at_a_noisy_action():
    """Noise .2 n is cut to +-.5, the action to +-1: n = 4 gives tanh .8 + .5 > 1, so 1."""
    agent, args = agent_of(td3, 2), td3.Args()
    agent["target"]["q.0.weight"][1] += torch.tensor([[0.3], [0.0]])  # the second critic is higher where s' > 0
    with torch.no_grad():
        scalars = td3.update(agent, BATCH, torch.tensor([[4.0], [0.0]]), False, args)
    y = [0.5 + 0.99 * (0.5 + 1.0), -1.0]
    assert scalars["target_q"].item() == pytest.approx(sum(y) / 2, abs=1e-6)
    error = (0.41 - y[0]) ** 2 + (-0.06 - y[1]) ** 2
    assert scalars["critic_loss"].item() == pytest.approx(2 * error / 2, abs=1e-5)  # both critics


def test_td3_actor_and_targets_wait():
    agent, args = agent_of(td3, 2), td3.Args()
    before = {name: p.clone() for name, p in (agent["actor"] | agent["target"]).items()}
    with torch.no_grad():
        td3.update(agent, BATCH, torch.zeros(2, 1), False, args)
        assert all(torch.equal(p, before[name]) for name, p in agent["target"].items())
        assert agent["actor"]["actor.0.weight"].item() == pytest.approx(0.9) and agent["count"]["actor"] == 0
        scalars = td3.update(agent, BATCH, torch.zeros(2, 1), True, args)
    assert agent["count"] == {"critic": 2, "actor": 1} and "actor_loss" in scalars
    assert all(not torch.equal(p, before[name]) for name, p in agent["target"].items() if "weight" in name)


def test_exploration_noise_stays_in_the_box_and_starts_after_uniform_actions(tmp_path):
    """A short run on Pendulum: it learns from `learning_starts` on, and actions are in the box."""
    args = td3.Args(env="Pendulum-v1", total_timesteps=220, learning_starts=200, batch_size=16, hidden="16x1",
                    exploration_noise=5.0, compile=False, eval_every=0, eval_episodes=1, checkpoint_every=0,
                    run_dir=str(tmp_path / "run"))
    td3.main(args)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["agent"]["count"]["critic"] == 20 and saved["agent"]["count"]["actor"] == 10
    actions = saved["buffer"]["rows"][:, 3]
    assert len(actions) == 220 and actions.abs().max() == 1 and (actions[:200].abs() < 1).all()
    assert (actions[200:].abs() == 1).float().mean() > 0.5  # noise of deviation 5, cut


@pytest.mark.parametrize("script", [ddpg, td3])
@pytest.mark.slow
def test_they_go_to_a_goal(script, tmp_path):
    """The reward is minus the distance. Without training the return is -10, and after it -2 with three seeds each."""
    args = script.Args(env="tests.tasks:PointDense-v0", total_timesteps=1500, learning_starts=200, batch_size=64,
                       hidden="32x1", learning_rate=3e-3, gamma=0.8, tau=0.02, her_goals=0, compile=False,
                       eval_every=0, eval_episodes=20, device="cpu", run_dir=str(tmp_path / "run"))
    assert script.main(args)["return_mean"] > -4
