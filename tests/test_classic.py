"""The classic methods against hand numbers, and that they learn. Resume, errors and exports are in test_contract.py."""
from dataclasses import replace

import pytest
import torch
from torch import nn

import runtime
from algos import a2c, trpo
from tests.test_ppo import Bandit

# Two states and a policy with three actions that is linear in them.
OBS = torch.tensor([[1.0, -0.5], [0.5, 2.0]], dtype=torch.float64)
ACTION, ADVANTAGE = torch.tensor([2, 0]), torch.tensor([1.5, -0.7], dtype=torch.float64)
WEIGHT, BIAS = [[0.1, -0.2], [0.3, 0.0], [-0.1, 0.4]], [0.0, 0.1, -0.1]


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), dtype=torch.float64)
    layer.weight.data.copy_(torch.tensor(weight, dtype=torch.float64))
    layer.bias.data.copy_(torch.tensor(bias, dtype=torch.float64))
    return layer


def numbers(*tensors: torch.Tensor) -> list[float]:
    return [x for tensor in tensors for x in tensor.detach().flatten().tolist()]


class Linear(nn.Module):
    """Actor and critic of one layer each, in place of a script's Agent."""

    def __init__(self, output: type):
        super().__init__()
        self.output = output
        self.actor, self.critic = linear(WEIGHT, BIAS), linear([[0.2, -0.3]], [0.05])

    def forward(self, obs):
        return self.output(torch.log_softmax(self.actor(obs), -1), self.critic(obs).squeeze(1))


def batch_of(script, agent, target_value):
    with torch.no_grad():
        output = agent(OBS)
    log_prob = output.log_probs.gather(1, ACTION.unsqueeze(1)).squeeze(1)
    return script.Batch(OBS, ACTION, log_prob, output.value, ADVANTAGE, target_value)


def bandit_is_learned(script, args, iterations, learn, agent):
    """Play and learn that often; then the action that each of two states names is likely."""
    task = Bandit()
    loop = {"obs": torch.from_numpy(task.state), "open_return": torch.zeros(4, dtype=torch.float64)}
    for _ in range(iterations):
        learn(script.collect(agent, task, lambda obs: obs, loop, runtime.Means(), args))
    with torch.no_grad():
        p = agent(torch.tensor([[0.0], [1.0]])).log_probs.exp()
    assert p[0, 0] > 0.9 and p[1, 1] > 0.9


# A2C

def test_returns_of_a_few_steps():
    """With gae_lambda 1, advantage + value is the return of the steps that follow: the second step ends an episode."""
    reward, value, ended = (torch.tensor(x, dtype=torch.float64).unsqueeze(1) for x in (
        [1.0, 0.0, -1.0, 2.0], [0.5, 0.4, 0.3, 0.2], [0.0, 1.0, 0.0, 0.0]))
    last_value = torch.tensor([0.1], dtype=torch.float64)
    advantage = a2c.gae(reward, value, last_value, ended, 0.99, a2c.Args().gae_lambda)
    assert numbers(advantage) == pytest.approx([0.5, -0.4, 0.778010, 1.899], abs=1e-6)
    assert numbers(advantage + value) == pytest.approx([1.0, 0.0, 1.078010, 2.099], abs=1e-6)
    advantage = a2c.gae(reward, value, last_value, ended, 0.99, 0.95)
    assert numbers(advantage) == pytest.approx([0.519800, -0.4, 0.684010, 1.899], abs=1e-6)


def test_a2c_loss():
    agent, args = Linear(a2c.Output), a2c.Args()
    batch = batch_of(a2c, agent, torch.tensor([1.0, 0.2], dtype=torch.float64))
    assert numbers(batch.log_prob) == pytest.approx([-1.618925, -1.712067], abs=1e-6)
    loss, scalars = a2c.a2c_loss(agent, batch, args)
    assert loss.item() == pytest.approx(0.800227, abs=1e-6)
    assert [scalars[name].item() for name in ("policy_loss", "value_loss", "entropy")] == pytest.approx(
        [0.614970, 0.391250, 1.036861], abs=1e-6)
    grads = torch.autograd.grad(loss, list(agent.parameters()))
    assert numbers(grads[1]) == pytest.approx([0.557, 0.215936, -0.772935], abs=1e-6)  # of the actor's biases
    assert torch.cat([g.flatten() for g in grads]).norm().item() == pytest.approx(1.696211, abs=1e-6)


@pytest.mark.parametrize("form, actor, critic", [
    ("torch", [.0930057, -.2069946, .2930087, .0069940, -.0930035, .4069425, -.0069957, .0930110, -.0930031],
     [.2069949, -.2930048, .0569962]),
    ("tf", [.0999142, -.2000906, .2999433, .0000821, -.0998575, .4000085, -.0001155, .0999552, -.0998398],
     [.2000959, -.2998963, .0501296])])
def test_the_first_step_of_both_rmsprops(form, actor, critic):
    """The gradient is cut to length 0.5. torch's form then moves every weight by ten learning rates."""
    agent, args = Linear(a2c.Output), a2c.Args(rmsprop=form)
    batch = batch_of(a2c, agent, torch.tensor([1.0, 0.2], dtype=torch.float64))
    a2c.update(agent, a2c.RMSprop(agent.parameters(), args), a2c.a2c_loss, batch, args)
    assert numbers(*agent.actor.parameters()) == pytest.approx(actor, abs=2e-7)
    assert numbers(*agent.critic.parameters()) == pytest.approx(critic, abs=2e-7)


def test_torch_form_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizers = [a2c.RMSprop([ours], a2c.Args(rmsprop="torch")), torch.optim.RMSprop([theirs], 7e-4, 0.99, 1e-5)]
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(5)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_a2c_learns():
    torch.manual_seed(0)
    args = a2c.Args(entropy_coef=0.0, learning_rate=2e-2)
    agent = a2c.Agent((1,), 4)
    optimizer = a2c.RMSprop(agent.parameters(), args)
    bandit_is_learned(a2c, args, 300, lambda rollout: a2c.update(agent, optimizer, a2c.a2c_loss, rollout, args), agent)


# TRPO

THETA = [p for row in WEIGHT for p in row] + BIAS
GRADIENT = [-.4141510, -.4382868, -.2731254, .3955545, .6872764, .0427322, -.5575648, -.2155716, .7731365]


def trpo_parts():
    """Agent, batch, damped Fisher product and gradient at the old policy."""
    agent = Linear(trpo.Output)
    batch, params = batch_of(trpo, agent, torch.zeros(2, dtype=torch.float64)), list(agent.actor.parameters())
    log_probs = agent(OBS).log_probs
    old_objective = trpo.objective(log_probs, batch, ADVANTAGE)
    gradient = trpo.flat(torch.autograd.grad(old_objective, params, retain_graph=True))
    kl = trpo.mean_kl(log_probs.detach(), log_probs)
    kl_gradient = trpo.flat(torch.autograd.grad(kl, params, create_graph=True))
    assert old_objective.item() == pytest.approx(0.4) and kl.item() == 0
    return agent, batch, lambda v, damping=0.1: trpo.fisher_product(kl_gradient, params, v, damping), gradient


def test_fisher_product_is_that_of_the_explicit_matrix():
    agent, _, product, gradient = trpo_parts()
    assert numbers(gradient) == pytest.approx(GRADIENT, abs=1e-6)
    v = torch.arange(1, 10, dtype=torch.float64) / 10
    expected = [-.0656894, -.1267723, -.0081185, -.0647889, .0738079, .1915613, -.1011598, -.0234181, .1245779]
    assert numbers(product(v, 0.0)) == pytest.approx(expected, abs=1e-6)
    assert numbers(product(v)) == pytest.approx([x + 0.01 * (i + 1) for i, x in enumerate(expected)], abs=1e-6)
    inputs = torch.cat([OBS, torch.ones(2, 1, dtype=torch.float64)], 1)
    fisher = torch.zeros(9, 9, dtype=torch.float64)
    for x, p in zip(inputs, agent(OBS).log_probs.exp()):  # mean of J^T (diag p - p p^T) J
        jacobian = torch.cat([torch.block_diag(*[x[:2].unsqueeze(0)] * 3), torch.eye(3, dtype=torch.float64)], 1)
        fisher += jacobian.T @ (p.diag() - p.outer(p)) @ jacobian / 2
    assert torch.allclose(product(v, 0.0), fisher @ v)


@pytest.mark.parametrize("iterations, expected", [
    (1, [-.7584100, -.8026084, -.5001582, .7243554, 1.2585682, .0782530, -1.0210352, -.3947635, 1.4157987]),
    (2, [-.8821728, -.5713310, -.6552162, 1.1543164, 1.5373890, -.5829855, -1.1071544, -.4715033, 1.5786577]),
    (15, [-.9171176, -.3487803, -.7416482, 1.0122924, 1.6587658, -.6635120, -1.0965263, -.5990997, 1.6956260])])
def test_conjugate_gradient(iterations, expected):
    _, _, product, gradient = trpo_parts()
    x = trpo.conjugate_gradient(product, gradient, iterations)
    assert numbers(x) == pytest.approx(expected, abs=1e-5)
    if iterations == 15:
        assert (x @ product(x)).item() == pytest.approx(4.298832, abs=1e-5) and torch.allclose(product(x), gradient)
    assert not trpo.conjugate_gradient(product, 0 * gradient, iterations).any()


def test_a_step_within_the_trust_region():
    agent, batch, _, _ = trpo_parts()
    scalars = trpo.improve_actor(agent, batch, trpo.Args(normalize_advantage=False, cg_iterations=15))
    assert scalars["kl"].item() == pytest.approx(0.007968, abs=1e-6) and scalars["step_share"] == 1
    assert scalars["policy_loss"].item() == pytest.approx(-(0.714169 - 0.4), abs=1e-6)
    assert numbers(*agent.actor.parameters()) == pytest.approx(
        [.0374446, -.2237899, .2494131, .0690471, .0131423, .3547427, -.0747926, .0591362, .0156564], abs=1e-6)
    assert numbers(*agent.critic.parameters()) == pytest.approx([0.2, -0.3, 0.05])


def test_line_search():
    """Without gain all tries fail and the policy stays. A far step is shortened until it keeps the constraint."""
    agent, batch, _, _ = trpo_parts()
    args = trpo.Args(normalize_advantage=False, cg_iterations=15)
    nothing = trpo.improve_actor(agent, batch._replace(advantage=0 * ADVANTAGE), args)
    assert nothing["step_share"] == 0 and nothing["kl"] == 0 and numbers(*agent.actor.parameters()) == THETA
    far = trpo.improve_actor(agent, batch, replace(args, target_kl=1.0))
    assert 0.8 ** 9 <= far["step_share"] <= 0.8 and 0 < far["kl"] < 1
    step = trpo.flat(agent.actor.parameters()).detach() - torch.tensor(THETA, dtype=torch.float64)
    longer = torch.tensor(THETA, dtype=torch.float64) + step / 0.8  # the try before
    before = agent(OBS).log_probs.detach()
    nn.utils.vector_to_parameters(longer, agent.actor.parameters())
    after = agent(OBS).log_probs.detach()
    old = batch_of(trpo, Linear(trpo.Output), None)
    start = Linear(trpo.Output)(OBS).log_probs.detach()
    assert trpo.mean_kl(start, before).item() == pytest.approx(far["kl"].item())
    assert trpo.mean_kl(start, after) >= 1 or trpo.objective(after, old, ADVANTAGE) <= 0.4


def test_trpo_learns():
    torch.manual_seed(0)
    args = trpo.Args(num_steps=32, target_kl=0.05)
    agent = trpo.Agent((1,), 4)
    optimizer = torch.optim.Adam(agent.critic.parameters(), lr=3e-3)

    def learn(rollout):
        trpo.improve_actor(agent, rollout, args)
        for _ in range(5):
            trpo.update(agent, optimizer, trpo.value_loss, rollout)
    bandit_is_learned(trpo, args, 30, learn, agent)
