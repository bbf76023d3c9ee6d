"""The classic methods against hand numbers, and that they learn. Resume, errors and exports are in test_contract.py."""
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import envs
import runtime
from algos import a2c, acktr, ars, cma_es, dqn, ppo_continuous, trpo
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

    def __init__(self, script):
        super().__init__()
        self.script = script
        self.actor, self.critic = linear(WEIGHT, BIAS), linear([[0.2, -0.3]], [0.05])

    def policy(self, obs):
        return self.script.Categorical(torch.log_softmax(self.actor(obs), -1))

    def forward(self, obs):
        return self.script.Output(self.policy(obs), self.critic(obs).squeeze(1))


def batch_of(script, agent, target_value):
    with torch.no_grad():
        output = agent(OBS)
    return script.Batch(OBS, ACTION, output.policy.log_prob(ACTION), output.value, ADVANTAGE, target_value)


def bandit_is_learned(script, args, iterations, learn, agent):
    """Play and learn that often; then the action that each of two states names is likely."""
    task = Bandit()
    loop = {"obs": torch.from_numpy(task.state), "open_return": torch.zeros(4, dtype=torch.float64)}
    for _ in range(iterations):
        learn(script.collect(agent, task, lambda obs, count=False: obs, loop, runtime.Means(), args))
    with torch.no_grad():
        p = agent(torch.tensor([[0.0], [1.0]])).policy.log_probs.exp()
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
    agent, args = Linear(a2c), a2c.Args()
    batch = batch_of(a2c, agent, torch.tensor([1.0, 0.2], dtype=torch.float64))
    assert numbers(batch.log_prob) == pytest.approx([-1.618925, -1.712067], abs=1e-6)
    assert numbers(batch.value) == pytest.approx([0.4, -0.45])
    assert numbers(agent.policy(OBS).entropy()) == pytest.approx([1.049611, 1.024111], abs=1e-6)
    passed = []
    hook = agent.actor.register_forward_hook(lambda layer, inputs, output: passed.append(output))
    loss, scalars = a2c.a2c_loss(agent, batch, args)
    hook.remove()
    assert loss.item() == pytest.approx(0.800227, abs=1e-6)
    assert [scalars[name].item() for name in ("policy_loss", "value_loss", "entropy")] == pytest.approx(
        [0.614970, 0.391250, 1.036861], abs=1e-6)
    assert numbers(passed[0]) == pytest.approx([.2, .4, -.4, -.35, .25, .65])
    by_logits, = torch.autograd.grad(loss, passed, retain_graph=True)
    assert numbers(by_logits) == pytest.approx([0.270793, 0.331188, -0.601980, 0.286207, -0.115252, -0.170955], abs=1e-6)
    grads = torch.autograd.grad(loss, list(agent.parameters()))
    assert torch.cat([g.flatten() for g in grads]).norm().item() == pytest.approx(1.696211, abs=1e-6)


@pytest.mark.parametrize("form, actor, critic", [
    ("torch", [.0930057, -.2069946, .2930087, .0069940, -.0930035, .4069425, -.0069957, .0930110, -.0930031],
     [.2069949, -.2930048, .0569962]),
    ("tf", [.0999142, -.2000906, .2999433, .0000821, -.0998575, .4000085, -.0001155, .0999552, -.0998398],
     [.2000959, -.2998963, .0501296])])
def test_the_first_step_of_both_rmsprops(form, actor, critic):
    """The gradient is cut to length 0.5. torch's form then moves every weight by ten learning rates."""
    agent, args = Linear(a2c), a2c.Args(rmsprop=form)
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


# ACKTR

class Layer(nn.Module):
    """An actor of one layer, and values from a parameter that no layer has."""

    def __init__(self):
        super().__init__()
        self.actor = linear([[0.3, -0.2], [0.1, 0.4]], [0.05, -0.1])
        self.value = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, obs):
        return acktr.Output(acktr.Categorical(torch.log_softmax(self.actor(obs), -1)), self.value)


def kfac_batch(advantage=(2.0, -1.0)):
    obs, zeros = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    return acktr.Batch(obs, torch.tensor([0, 1]), zeros, zeros, torch.tensor(advantage, dtype=torch.float64), zeros)


PLAIN = acktr.Args(cold_updates=0, normalize_advantage=False, entropy_coef=0.0, value_coef=0.0)
U = [-.2003018, -.7240916, -.4590922, .2003018, .7240916, .4590922]


def test_kronecker_factors():
    found = acktr.batch_factors(Layer(), kfac_batch(), torch.zeros(2))["actor"]
    assert numbers(found["gradients"]) == pytest.approx([.3308397, -.3308397, -.3308397, .3308397], abs=1e-7)
    assert numbers(found["inputs"]) == pytest.approx([1, .75, 0, .75, 2.125, 1.25, 0, 1.25, 1])
    values = {name: acktr.decomposed(factor)["values"] for name, factor in found.items()}
    assert numbers(values["gradients"]) == pytest.approx([0, .6616793], abs=1e-7)
    assert numbers(values["inputs"]) == pytest.approx([0, 1, 3.125]) and values["inputs"][0] == 0  # not 1e-17
    with pytest.raises(runtime.UserError, match="the run has diverged: a factor is not finite"):
        acktr.decomposed(torch.full((2, 2), torch.nan))


def test_natural_gradient():
    agent, batch = Layer(), kfac_batch()
    loss, _ = acktr.a2c_loss(agent, batch, PLAIN)
    loss.backward()
    gradient = torch.cat([agent.actor.weight.grad, agent.actor.bias.grad.unsqueeze(1)], 1)
    assert numbers(gradient) == pytest.approx([-.4938759, -1.5044799, -.9072584, .4938759, 1.5044799, .9072584],
                                              abs=1e-7)
    found = acktr.batch_factors(agent, batch, torch.zeros(2))["actor"]
    inputs, gradients = (acktr.decomposed(found[kind]) for kind in ("inputs", "gradients"))
    u = acktr.natural_gradient(gradient, inputs, gradients, 0.01)
    assert numbers(u) == pytest.approx(U, abs=1e-7)
    fisher = torch.kron(found["gradients"], found["inputs"]) + 0.01 * torch.eye(6, dtype=torch.float64)
    assert torch.allclose(torch.linalg.solve(fisher, gradient.flatten()), u.flatten())
    assert 0.25 ** 2 * (u * gradient).sum().item() == pytest.approx(.2006026, abs=1e-7)
    assert acktr.step_share([u], [gradient], 0.25, 1e-3).item() == pytest.approx(.0706044, abs=1e-7)
    assert acktr.step_share([u, u], [gradient, gradient], 0.25, 1e-3).item() == pytest.approx(.0706044 / 2 ** .5)
    assert acktr.step_share([u], [gradient], 1e-4, 1e-3) == 1 and acktr.step_share([0 * u], [gradient], 1, 1e-3) == 1


@pytest.mark.parametrize("share, with_bias, weight, bias, nu", [
    (1.0, False, [.2999108, -.1985556, .1000892, .3985556], [.0517966, -.1017966], .0532048),
    (0.01, True, [.3059594, -.1818172, .0940406, .3818172], [.0609706, -.1109706], None)])
def test_steps_of_other_code(share, with_bias, weight, bias, nu):
    """The same functions, with the choices of two other programs: the bias as a layer of its own, whose input is 1; and
    factors that start as identities and get a hundredth of the batch. Without cold updates, once without momentum."""
    agent, batch = Layer(), kfac_batch()
    acktr.a2c_loss(agent, batch, PLAIN)[0].backward()
    found = acktr.batch_factors(agent, batch, torch.zeros(2))["actor"]
    a, s = (torch.eye(len(x), dtype=torch.float64).lerp(x, share) for x in (found["inputs"], found["gradients"]))
    layers = [(a, torch.cat([agent.actor.weight.grad, agent.actor.bias.grad.unsqueeze(1)], 1))]
    if not with_bias:
        layers = [(a[:2, :2], agent.actor.weight.grad), (a[2:, 2:], agent.actor.bias.grad.unsqueeze(1))]
    gradients = [gradient for _, gradient in layers]
    steps = [acktr.natural_gradient(gradient, acktr.decomposed(factor), acktr.decomposed(s), 0.01)
             for factor, gradient in layers]
    found_nu = acktr.step_share(steps, gradients, 0.25, 1e-3)
    if with_bias:
        assert numbers(a) == pytest.approx([1, .0075, 0, .0075, 1.01125, .0125, 0, .0125, 1])
        assert numbers(s) == pytest.approx([.9933084, -.0033084, -.0033084, .9933084], abs=1e-7)
    else:
        assert numbers(*steps) == pytest.approx([.0670339, -1.0859263, -.0670339, 1.0859263, -1.3507314, 1.3507314],
                                                abs=1e-6)
        assert found_nu.item() == pytest.approx(nu, abs=1e-7)
    moved = 0.25 * (1.0 if with_bias else 0.1) * found_nu * torch.cat(steps, 1)
    assert numbers(agent.actor.weight - moved[:, :2]) == pytest.approx(weight, abs=1e-7)
    assert numbers(agent.actor.bias - moved[:, 2]) == pytest.approx(bias, abs=1e-7)


def test_the_first_step_of_acktr():
    agent = Layer()
    kfac = acktr.make_kfac(agent)
    scalars = acktr.update(agent, kfac, acktr.a2c_loss, kfac_batch(), 0.25, PLAIN)
    assert scalars["nu"].item() == pytest.approx(.0706044, abs=1e-7) and kfac["updates"] == 1
    assert numbers(agent.actor.weight, agent.actor.bias) == pytest.approx(
        [.3003536, -.1987219, .0996464, .3987219, .0508103, -.1008103], abs=1e-7)
    assert numbers(kfac["actor"]["momentum"]) == pytest.approx([.0706044 * x for x in U], abs=1e-7)


def rollout_of(f, rows, advantage=None):
    obs, value = torch.randn(rows, f), torch.randn(rows)
    advantage = torch.randn(rows) if advantage is None else advantage
    return acktr.Batch(obs, torch.randint(3, (rows,)), value, value, advantage, value)


def test_factors_are_those_of_the_likelihood():
    """Symmetric and positive. Advantages and targets do not enter. The critic's gradient is twice the noise."""
    torch.manual_seed(0)
    agent, batch, noise = acktr.Agent(4, 3), rollout_of(4, 50), torch.randn(50)
    found = acktr.batch_factors(agent, batch, noise)
    assert found.keys() == {f"{network}.{i}" for network in ("actor", "critic") for i in (0, 2, 4)}
    other = batch._replace(advantage=100 * batch.advantage, target_value=batch.value + 9)
    again = acktr.batch_factors(agent, other, noise)
    for name, pair in found.items():
        for kind, factor in pair.items():
            assert torch.equal(factor, again[name][kind])
            assert torch.allclose(factor, factor.T) and torch.linalg.eigvalsh(factor.double()).min() > -1e-6
        assert pair["inputs"][-1, -1].item() == pytest.approx(1)
    assert found["critic.4"]["gradients"].item() == pytest.approx(4 * noise.square().mean().item(), rel=1e-5)
    torch.testing.assert_close(found["actor.4"]["gradients"].sum(), torch.zeros(()), atol=1e-6, rtol=0)  # softmax
    assert not any(layer._forward_hooks for layer in agent.modules())


def test_running_factors():
    """A mean of all while updates are cold, then a decaying one. Eigenvectors are renewed when that is due."""
    torch.manual_seed(0)
    args, agent = acktr.Args(cold_updates=3, decompose_every=2), acktr.Agent(2, 3)
    kfac, expected, renewed = acktr.make_kfac(agent), 0.0, []
    means = []
    for k in range(7):
        batch = rollout_of(2, 8)
        ones = torch.cat([batch.obs, torch.ones(8, 1)], 1)
        means.append(ones.T @ ones / 8)
        expected = sum(means) / len(means) if k < 3 else 0.99 * expected + 0.01 * means[-1]
        before = kfac["actor.0"]["inputs"]["vectors"].clone()
        acktr.update_factors(agent, kfac, batch, args)
        kfac["updates"] += 1
        assert torch.allclose(kfac["actor.0"]["inputs"]["mean"], expected, atol=1e-5)
        renewed.append(not torch.equal(before, kfac["actor.0"]["inputs"]["vectors"]))
    assert renewed == [False, False, False, True, False, True, False]


def test_the_step_stays_within_the_trust_region():
    """Whatever the advantages are, nu is at most 1 and the squared length of the step at most kl_clip."""
    torch.manual_seed(0)
    args = acktr.Args(cold_updates=1, momentum=0.0, normalize_advantage=False)
    agent = acktr.Agent(4, 3)
    kfac = acktr.make_kfac(agent)
    for scale in (1.0, 1.0, 1e-4, 1e3):  # the first update is a cold one
        batch = rollout_of(4, 50, scale * torch.randn(50))
        batch = batch._replace(value=0 * batch.value, target_value=agent(batch.obs).value.detach())
        before = [p.detach().clone() for p in agent.parameters()]
        nu = acktr.update(agent, kfac, acktr.a2c_loss, batch, 0.25, args)["nu"]
        length = -0.25 * sum((p.grad * (p.detach() - q)).sum() for p, q in zip(agent.parameters(), before))
        assert 0 < nu <= 1 and (nu == 1) == (kfac["updates"] == 1 or scale == 1e-4)
        if kfac["updates"] > 1:  # lr^2 <nu U, nu gradient>
            assert 0 < nu * length <= args.kl_clip * (1 + 1e-3)


@pytest.mark.parametrize("separate", [False, True])
def test_whose_trust_region(separate):
    """An error of the critic shortens the actor's step, unless each has a trust region of its own."""
    moved = []
    for error in (0.0, 30.0):
        torch.manual_seed(0)
        args, agent = acktr.Args(cold_updates=0, separate=separate), acktr.Agent(4, 3)
        batch = rollout_of(4, 50)
        batch = batch._replace(target_value=agent(batch.obs).value.detach() + error)
        before = trpo.flat(agent.actor.parameters()).detach().clone()
        scalars = acktr.update(agent, acktr.make_kfac(agent), acktr.a2c_loss, batch, 0.25, args)
        assert {name for name in scalars if "nu" in name} == ({"nu_actor", "nu_critic"} if separate else {"nu"})
        moved.append((trpo.flat(agent.actor.parameters()) - before).norm().item())
    assert moved[1] == pytest.approx(moved[0]) if separate else moved[1] < 0.1 * moved[0]


def test_acktr_learns():
    torch.manual_seed(0)
    args, agent = acktr.Args(), acktr.Agent(1, 4)
    kfac = acktr.make_kfac(agent)
    bandit_is_learned(acktr, args, 60, lambda rollout: acktr.update(agent, kfac, acktr.a2c_loss, rollout, 0.25, args),
                      agent)


# TRPO

THETA = [p for row in WEIGHT for p in row] + BIAS
GRADIENT = [-.4141510, -.4382868, -.2731254, .3955545, .6872764, .0427322, -.5575648, -.2155716, .7731365]


def trpo_parts():
    """Agent, batch, damped Fisher product and gradient at the old policy."""
    agent = Linear(trpo)
    batch, params = batch_of(trpo, agent, torch.zeros(2, dtype=torch.float64)), list(agent.actor.parameters())
    policy = agent.policy(OBS)
    old_objective = trpo.objective(policy, batch, ADVANTAGE)
    gradient = trpo.flat(torch.autograd.grad(old_objective, params, retain_graph=True))
    kl = trpo.mean_kl(trpo.Categorical(policy.log_probs.detach()), policy)
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
    for x, p in zip(inputs, agent.policy(OBS).log_probs.exp()):  # mean of J^T (diag p - p p^T) J
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
        assert (0.02 / (x @ product(x))).sqrt().item() == pytest.approx(0.0682087, abs=1e-7)  # of the step, for 0.01
    assert not trpo.conjugate_gradient(product, 0 * gradient, iterations).any()


def test_a_step_within_the_trust_region():
    agent, batch, _, _ = trpo_parts()
    scalars = trpo.improve_actor(agent, batch, trpo.Args(normalize_advantage=False, cg_iterations=15))
    assert scalars["kl"].item() == pytest.approx(0.007968, abs=1e-6) and scalars["step_share"] == 1
    reverse = trpo.mean_kl(agent.policy(OBS), Linear(trpo).policy(OBS))  # what sb3-contrib limits
    assert reverse.item() == pytest.approx(0.008299, abs=1e-6)
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
    far = trpo.improve_actor(agent, batch, replace(args, target_kl=0.1, cg_damping=1e-3))
    assert far["step_share"].item() == pytest.approx(0.8) and 0 < far["kl"] < 0.1
    step = trpo.flat(agent.actor.parameters()).detach() - torch.tensor(THETA, dtype=torch.float64)
    longer = torch.tensor(THETA, dtype=torch.float64) + step / 0.8  # the try before
    before = agent.policy(OBS)
    nn.utils.vector_to_parameters(longer, agent.actor.parameters())
    after = agent.policy(OBS)
    old = batch_of(trpo, Linear(trpo), None)
    start = Linear(trpo).policy(OBS)
    assert trpo.mean_kl(start, before).item() == pytest.approx(far["kl"].item())
    assert trpo.mean_kl(start, after) >= 0.1 and trpo.objective(after, old, ADVANTAGE) > 0.4


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


# Continuous actions

GAUSSIAN = torch.tensor([[.1, -.2], [0, .5]], dtype=torch.float64), torch.tensor([-.5, .3], dtype=torch.float64)
DRAWN = torch.tensor([[.3, .4], [-1, .2]], dtype=torch.float64)


def gaussian(script=ppo_continuous):
    mean, log_std = GAUSSIAN
    return script.Gaussian(mean, log_std.expand_as(mean))


def test_gaussian_policies():
    """Their text is the same in all scripts, as test_form.py holds."""
    assert numbers(gaussian().log_prob(DRAWN)) == pytest.approx([-1.791029, -3.021715], abs=1e-6)
    assert numbers(gaussian().entropy()) == pytest.approx([2.637877] * 2, abs=1e-6)
    torch.manual_seed(0)
    draws = torch.stack([gaussian().draw() for _ in range(4000)])
    assert torch.allclose(draws.mean(0), GAUSSIAN[0], atol=0.1)
    assert torch.allclose(draws.std(0), GAUSSIAN[1].exp().expand(2, 2), rtol=0.05)
    policy = trpo.Gaussian(*(torch.tensor([x], dtype=torch.float64) for x in ([.1, -.2], [-.5, .3])))
    other = trpo.Gaussian(*(torch.tensor([x], dtype=torch.float64) for x in ([.2, -.1], [-.4, .2])))
    assert trpo.mean_kl(policy, other).item() == pytest.approx(0.034546, abs=1e-6)
    assert trpo.mean_kl(policy, policy).item() == pytest.approx(0)


@pytest.mark.parametrize("clip_values, value_loss", [(True, 1.845), (False, 1.625)])
def test_ppo_loss_of_a_gaussian_policy(clip_values, value_loss):
    def column(*values):
        return torch.tensor(values, dtype=torch.float64)
    ratio = (gaussian().log_prob(DRAWN) - column(-2.3, -3.9)).exp()
    assert numbers(ratio) == pytest.approx([1.663579, 2.406770], abs=1e-6)
    batch = ppo_continuous.Batch(GAUSSIAN[0], DRAWN, column(-2.3, -3.9), column(.6, .4), column(1.2, -.8),
                                 column(2, -1))
    args = ppo_continuous.Args(normalize_advantage=False, clip_values=clip_values)
    loss, scalars = ppo_continuous.ppo_loss(lambda obs: ppo_continuous.Output(gaussian(), column(1, .5)), batch, args)
    assert scalars["policy_loss"].item() == pytest.approx(0.242708, abs=1e-6)
    assert scalars["approx_kl"].item() == pytest.approx(0.341546, abs=1e-6)
    assert scalars["value_loss"].item() == pytest.approx(value_loss)
    assert loss.item() == pytest.approx(0.242708 + 0.5 * value_loss, abs=1e-6)


def test_scaled_rewards():
    """u is 1, then 0.5 * 1 + 3; the second copy's episode ends at once, so its u is 2, then 4."""
    returns, running = envs.Normalizer(1), torch.zeros(2)
    first = ppo_continuous.scaled(torch.tensor([1., 2.]), torch.tensor([False, True]), running, returns, 0.5)
    assert first.tolist() == pytest.approx([1 / 0.5, 2 / 0.5]) and running.tolist() == [1, 0]
    second = ppo_continuous.scaled(torch.tensor([3., 4.]), torch.tensor([False, False]), running, returns, 0.5)
    deviation = np.std([1, 2, 3.5, 4])
    assert second.tolist() == pytest.approx([3 / deviation, 4 / deviation]) and running.tolist() == [3.5, 4]
    far = ppo_continuous.scaled(torch.tensor([-99., 0.]), torch.tensor([False, False]), running, returns, 0.5)
    assert far.tolist() == pytest.approx([-99 / np.std([1, 2, 3.5, 4, -97.25, 2]), 0])
    assert ppo_continuous.scaled(torch.ones(1), torch.tensor([False]), torch.zeros(1), envs.Normalizer(1), 0.9) == 10


class Steer:
    """Four copies of a task of two steps: of a box of [-2, 2], -2 is best in state 0 and 2 in state 1."""
    num_envs, action_space = 4, gym.spaces.Box(-2, 2, (1,))
    to_box = envs.VectorEnv.to_box

    def __init__(self):
        self.rng, self.t, self.actions = np.random.default_rng(0), 0, []
        self.state = self.rng.integers(0, 2, (4, 1)).astype(np.float32)

    def step(self, action):
        self.actions.append(action)
        reward, self.t = (action * (self.state - 0.5))[:, 0], self.t + 1
        self.state = self.rng.integers(0, 2, (4, 1)).astype(np.float32)
        return self.state, reward, np.full(4, self.t % 2 == 0), np.zeros(4, bool), {"final_obs": self.state}


def play_steer(script, agent, task, loop, args):
    more = [envs.Normalizer(1)] if script is ppo_continuous else []
    return script.collect(agent, task, lambda obs, count=False: obs, *more, loop, runtime.Means(), args)


def new_loop(task):
    return {"obs": torch.from_numpy(task.state), "open_return": torch.zeros(4, dtype=torch.float64),
            "discounted_return": torch.zeros(4)}


def continuous_agent(script):
    torch.manual_seed(0)
    if script is ppo_continuous:
        return script.Agent(1, 1)
    return script.Agent(1 if script is acktr else (1,), 1, False)


@pytest.mark.parametrize("script", [a2c, acktr, ppo_continuous, trpo])
def test_only_the_environment_gets_clipped_actions(script):
    agent, task = continuous_agent(script), Steer()
    rollout = play_steer(script, agent, task, new_loop(task), script.Args(num_steps=50))
    with torch.no_grad():
        policy = agent(rollout.obs).policy
    assert rollout.action.shape == (200, 1) and (rollout.action.abs() > 1).any()
    assert torch.allclose(rollout.log_prob, policy.log_prob(rollout.action), atol=1e-6)
    assert np.allclose(np.concatenate(task.actions), 2 * rollout.action.clamp(-1, 1).numpy())
    assert policy.mean.abs().max() < 0.1 and not policy.log_std.any()


@pytest.mark.parametrize("script, flags, iterations", [
    (a2c, dict(learning_rate=5e-2, num_steps=16, entropy_coef=0.0), 60), (acktr, dict(separate=True), 30),
    (ppo_continuous, dict(num_steps=32), 30), (trpo, dict(num_steps=32, target_kl=0.05), 30)])
def test_continuous_actions_are_learned(script, flags, iterations):
    agent, task, args = continuous_agent(script), Steer(), script.Args(**flags)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)  # of PPO, and of TRPO's critic
    if script is a2c:
        optimizer = a2c.RMSprop(agent.parameters(), args)
    elif script is acktr:
        optimizer = acktr.make_kfac(agent)
    loop = new_loop(task)
    for _ in range(iterations):
        rollout = play_steer(script, agent, task, loop, args)
        if script is a2c:
            a2c.update(agent, optimizer, a2c.a2c_loss, rollout, args)
        elif script is acktr:
            acktr.update(agent, optimizer, acktr.a2c_loss, rollout, args.learning_rate, args)
        elif script is trpo:
            trpo.improve_actor(agent, rollout, args)
            trpo.update(agent, optimizer, trpo.value_loss, rollout)
        else:
            for _ in range(5):
                script.update(agent, optimizer, script.ppo_loss, rollout, args)
    with torch.no_grad():
        mean = agent(torch.tensor([[0.0], [1.0]])).policy.mean
    assert mean[0, 0] < -0.7 and mean[1, 0] > 0.7


def test_fisher_matrix_of_a_gaussian_policy():
    """log_std is one of the actor's parameters. F has J^T J / std^2 of the mean, and 2 for each log_std."""
    agent = continuous_agent(trpo).double()
    obs = torch.randn(6, 1, dtype=torch.float64)
    params = [p for name, p in agent.named_parameters() if not name.startswith("critic.")]
    agent.log_std.data.fill_(-0.7)
    policy = agent.policy(obs)
    kl = trpo.mean_kl(ppo_continuous.tree_map(torch.Tensor.detach, policy), policy)
    kl_gradient = trpo.flat(torch.autograd.grad(kl, params, create_graph=True))
    rows = [trpo.flat(torch.autograd.grad(m, params, retain_graph=True, allow_unused=True, materialize_grads=True))
            for m in policy.mean[:, 0]]
    jacobian = torch.stack(rows)
    where = trpo.flat([torch.full_like(p, p is agent.log_std) for p in params])
    fisher = jacobian.T @ jacobian / 6 / np.exp(-1.4) + 2 * where.diag()
    v = torch.randn(len(where), dtype=torch.float64)
    assert torch.allclose(trpo.fisher_product(kl_gradient, params, v, 0.0), fisher @ v)


def test_factors_of_log_std():
    """A layer of its own, whose only input is the 1 of the bias; S is the mean square of the score z^2 - 1."""
    agent = continuous_agent(acktr)
    obs, action, zeros = torch.randn(40, 1), torch.randn(40, 1), torch.zeros(40)
    found = acktr.batch_factors(agent, acktr.Batch(obs, action, zeros, zeros, zeros, zeros), torch.randn(40))
    z = action - agent(obs).policy.mean.detach()  # log_std is 0
    assert found["actor_log_std"]["inputs"].tolist() == [[0, 0], [0, 1]]
    expected = (z.square() - 1).square().mean().item()
    assert found["actor_log_std"]["gradients"].item() == pytest.approx(expected, rel=1e-5)


# ARS and CMA-ES

def test_candidates_start_alike():
    for env_id in ("CartPole-v1", "FetchReach-v2"):
        vec = envs.make_vec(env_id, 3)
        obs, alone = envs.flatten(vec.reset_alike(7)), envs.flatten(envs.make_vec(env_id, 1).reset(7))
        assert torch.equal(obs, alone.expand(3, -1))
        assert not torch.equal(envs.flatten(vec.reset_alike(8)), obs)


def test_population_is_played_as_each_policy_alone():
    torch.manual_seed(0)
    theta, x = torch.randn(4, ars.num_weights(3, 2, 5)), torch.randn(4, 6, 3)
    together = ars.forward(theta, x, 2, 5)
    for weights, inputs, outputs in zip(theta, x, together):
        first, second = weights[:15].view(3, 5), weights[15:].view(5, 2)
        assert torch.allclose((inputs @ first).tanh() @ second, outputs, atol=1e-6)
    assert torch.allclose(ars.forward(theta[:, :6], x, 2, 0)[1], x[1] @ theta[1, :6].view(3, 2), atol=1e-6)


class Countdown:
    """Three copies: copy i pays 1 + its action, and its episodes have 2 (i + 1) steps; the next one begins at once."""
    num_envs = 3

    def reset_alike(self, seed):
        self.t = np.zeros(3)
        return np.zeros((3, 1), np.float32)

    def step(self, action):
        self.t += 1
        ended = self.t == [2, 4, 6]
        self.t[ended] = 0
        return self.t[:, None].astype(np.float32), 1.0 + action, ended, np.zeros(3, bool), {}


def test_one_episode_of_every_candidate():
    """The last reward counts, rewards after the end do not, and the bonus is taken from each."""
    returns, lengths, seen = ars.play(Countdown(), lambda features: np.array([0.0, 1.0, 2.0]), 1, 0.5)
    assert returns.tolist() == [2 * 0.5, 4 * 1.5, 6 * 2.5] and lengths.tolist() == [2, 4, 6]
    assert sorted(numbers(seen)) == sorted([0, 1, *range(4), *range(6)])


@pytest.mark.parametrize("returns, expected", [
    ([10, 30, 20, 14, 22, 21], [.0012624, .0201982, -.0227230, .0075743, -.0100991, .0201982, .0050496, -.0214606]),
    ([3] * 6, [0] * 8)])
def test_ars_step(returns, expected):
    """Directions 2 and 3 count; the deviation of their four returns is divided by four, not three."""
    delta = torch.tensor([[1, -1, .5, 0, 2, -.5, 1, 0], [0, 1, -1, .5, -.5, 1, 0, -1], [-.5, 0, 1, 1, 0, 0, -2, .5]])
    args = ars.Args(num_envs=6, top=2)
    agent = ars.make_agent(4, 2, args)
    ars.update(agent, delta.double(), torch.tensor(returns, dtype=torch.float64), args)
    assert numbers(agent["theta"]) == pytest.approx(expected, abs=1e-7)


def test_ars_moves_a_hidden_layer():
    """A direction and its opposite are two policies from the start."""
    args = ars.Args(num_envs=2, top=1, hidden=5)
    agent, x = ars.make_agent(3, 2, args), torch.randn(1, 6, 3).double()
    _, candidates = ars.ask(agent, args)
    along, against = ars.forward(candidates, x.expand(2, 6, 3), 2, 5)
    assert not torch.allclose(along, against)


def test_ars_tries_both_ways():
    args = ars.Args(num_envs=6)
    agent = {"theta": torch.arange(4).double()}
    delta, candidates = ars.ask(agent, args)
    assert torch.allclose(candidates[:3], agent["theta"] + 0.05 * delta)
    assert torch.allclose(candidates[:3] + candidates[3:], 2 * agent["theta"].expand(3, 4))
    for wrong in (dict(num_envs=5, top=1), dict(num_envs=6)):  # an odd number; four directions of three
        with pytest.raises(runtime.UserError, match="two environments for each direction"):
            ars.check(ars.Args(**wrong))


Z = torch.tensor([[.5, -1], [-.8, .3], [1.2, .7], [-.1, -.4], [.9, -1.5], [-1.3, 1.1]], dtype=torch.float64)


def test_cma_rates():
    r = cma_es.rates(2, 6, True)
    expected = [.6370426, .2845703, .0783872, -.2863838, -.7649581, -1.1559818]
    assert numbers(r.weights) == pytest.approx(expected, abs=1e-7)
    assert r[1:] == pytest.approx([2.0286115, .4462050, 1.4462050, .6245545, .1548154, .0855928, 1.2533141], abs=1e-7)
    assert numbers(cma_es.rates(2, 6, False).weights[3:]) == [0, 0, 0]


@pytest.mark.parametrize("active, first, mean, path_c, second", [
    (False, [.9165753, -.0499389, -.0499389, .7837277], [.5755160, .4871293], [-.6268962, -.1994318],
     [.7737548, -.0254120, -.0254120, .6156214]),
    (True, [.9133916, -.0586842, -.0586842, .7869114], [.5762439, .4874820], [-.6247388, -.1983865],
     [.7511763, -.0358757, -.0358757, .6355543])])
def test_two_generations(active, first, mean, path_c, second):
    """The best of -|x|^2 is sought from (1, 0.5). Step size and its path do not depend on the covariance."""
    args = cma_es.Args(num_envs=6, active=active)
    agent = cma_es.make_agent(2, args)
    agent["theta"] += torch.tensor([1.0, 0.5])

    def generation():
        x = agent["theta"] + agent["sigma"] * Z @ agent["root"]
        cma_es.update(agent, Z, -x.square().sum(1), args)
        return [numbers(agent[name]) for name in ("theta", "sigma", "path_sigma", "path_c", "covariance")]
    expected = [[.6800028, .5817553], [.4453769], [-.7589963, .1939141], [-.8448556, .2158500], first]
    for found, value in zip(generation(), expected):
        assert found == pytest.approx(value, abs=1e-7)
    for found, value in zip(generation(), [mean, [.3928141], [-.7193837, -.1865271], path_c, second]):
        assert found == pytest.approx(value, abs=1e-7)
    assert torch.allclose(agent["root"] @ agent["root"], agent["covariance"])


def test_cma_finds_the_lowest_point_of_a_long_valley():
    torch.manual_seed(0)
    args, scale = cma_es.Args(num_envs=10, sigma=0.5), torch.tensor([1.0, 10.0, 100.0, 1000.0]).double()
    agent = cma_es.make_agent(4, args)
    for _ in range(200):
        z, x = cma_es.ask(agent, args)
        cma_es.update(agent, z, -((x - 1) * scale).square().sum(1), args)
    assert ((agent["theta"] - 1) * scale).norm() < 1e-6
    with pytest.raises(runtime.UserError, match="lower --hidden"):
        cma_es.make_agent(2001, args)


@pytest.mark.parametrize("script", [ars, cma_es])
def test_they_balance_a_pole(script, tmp_path):
    args = script.Args(total_timesteps=20_000, eval_every=0, eval_episodes=5, run_dir=str(tmp_path / "run"))
    assert script.main(args)["return_mean"] >= 400


@pytest.mark.parametrize("script", [ars, cma_es, acktr])
def test_views_are_refused(script, tmp_path):
    for env_id in ("MiniGrid-Empty-5x5-v0", "MobileRobot-v0:pixels"):
        with pytest.raises(runtime.UserError, match="flat arrays are needed, .* an encoder behind the id, as :pca"):
            script.main(script.Args(env=env_id, run_dir=str(tmp_path / "run")))


# DQN

def test_dueling():
    value, advantage = torch.tensor([[.3], [-1]]), torch.tensor([[1, -2, 4], [.5, .5, -.4]])
    assert numbers(dqn.dueling(value, advantage)) == pytest.approx([.3, -2.7, 3.3, -.7, -.7, -1.6])
    agent, obs = dqn.make_agent(dqn.Args(hidden="8x1"), (2,), 3, torch.device("cpu")), torch.randn(4, 2)
    q = dqn.q_values(agent["online"], obs)
    agent["online"]["advantage.0.bias"] += 5  # the same for all actions: no difference
    assert torch.allclose(dqn.q_values(agent["online"], obs), q, atol=1e-5)
    agent["online"]["value.0.bias"] += 5
    assert torch.allclose(dqn.q_values(agent["online"], obs), q + 5, atol=1e-5)


def test_dqn_targets_and_loss():
    online = torch.tensor([[1., 2, 0], [.5, -1, .4], [0, 3, 1]])
    target = torch.tensor([[.7, .2, 5], [.1, .9, .3], [2, 1, 4]])
    reward, discount = torch.tensor([1, -.5, 2]), torch.tensor([.99, .99 ** 3, 0])
    plain = dqn.target_values(online, target, reward, discount, False)
    double = dqn.target_values(online, target, reward, discount, True)
    assert numbers(plain) == pytest.approx([5.95, .3732691, 2])
    assert numbers(double) == pytest.approx([1.198, -.4029701, 2])
    q = torch.tensor([[.5], [1.2], [1.6]])  # of the one action: the network is the identity of relu, and obs are q
    params = {"trunk.0.weight": torch.eye(1), "trunk.0.bias": torch.zeros(1), "advantage.0.weight": torch.eye(1),
              "advantage.0.bias": torch.zeros(1)}
    batch = dqn.Batch(q, torch.zeros(3, dtype=torch.long), reward, discount, q)
    loss, (error, _) = dqn.critic_loss(params, batch, double, torch.tensor([1, .5, .8]))
    assert loss.item() == pytest.approx(.2863623, abs=1e-6)
    assert numbers(error) == pytest.approx([-.698, 1.6029701, -.4], abs=1e-6)
    terms = [3 * dqn.critic_loss(params, batch, double, weight)[0].item() for weight in torch.eye(3)]
    assert terms == pytest.approx([.2436020, 1.1029701, .08], abs=1e-6)


def test_the_algorithm_of_2015():
    """Its flags leave r + gamma max Q'(s', a), the same weight for all, and uniform draws whatever the errors are."""
    args = dqn.Args(double=False, dueling=False, priority_alpha=0.0, n_step=1, hidden="8x1")
    torch.manual_seed(0)
    agent = dqn.make_agent(args, (2,), 3, torch.device("cpu"))
    assert not any(name.startswith("value") for name in agent["online"])
    agent["target"] = {name: p + 0.3 * torch.randn_like(p) for name, p in agent["target"].items()}
    buffer = dqn.PrioritisedBuffer(4, torch.zeros(2), args.priority_alpha)
    for i in range(4):
        buffer.add(torch.randn(2), i % 3, i - 1.0, 0.0 if i == 3 else 0.99, torch.randn(2))
    buffer.set_errors(np.arange(4), np.array([0.1, 5.0, 1.0, 0.0]))
    index, weight = buffer.draw(np.full(400, 0.5), 0.7)
    assert np.bincount(index).tolist() == [100] * 4 and (weight == 1).all()
    batch = buffer.rows
    with torch.no_grad():
        q = dqn.q_values(agent["online"], batch.obs)[range(4), batch.action]
        error = (q - batch.reward - batch.discount * dqn.q_values(agent["target"], batch.next_obs).amax(1)).abs()
    assert 0 < (error < 1).sum() < 4  # both sides of the kink
    expected = torch.where(error < 1, error ** 2 / 2, error - 0.5).mean()
    scalars, errors = dqn.update(agent, batch, torch.ones(4), args)
    assert scalars["critic_loss"].item() == pytest.approx(expected.item()) and torch.allclose(errors, error)


def pushed(n, ends, rewards):
    """(reward, discount, step of obs, step of next_obs) of all transitions. In `ends`: T terminates, L is a limit."""
    window, found = dqn.NStep(1, n, 0.99), []
    for t, (end, reward) in enumerate(zip(ends, rewards)):
        found += window.push(torch.full((1, 1), t), np.array([1]), np.array([reward]), np.array([end == "T"]),
                             np.array([end == "L"]), torch.full((1, 1), t + 1))
    return [(total, discount, int(obs), int(final)) for obs, _, total, discount, final in found]


def test_n_step_returns():
    (total, discount, *steps), = pushed(3, "...", [1, 0, 2])
    assert total + discount * 4 == pytest.approx(6.841396, abs=1e-6) and steps == [0, 3]
    assert pushed(3, "..", [1, 0]) == []
    assert pushed(3, ".T", [1, 2]) == [(1 + .99 * 2, 0.0, 0, 2), (2, 0.0, 1, 2)]  # fewer steps at the end
    assert pushed(3, ".L.", [1, 2, 9]) == [(1 + .99 * 2, .99 ** 2, 0, 2), (2, .99, 1, 2)]  # nothing crosses it
    assert pushed(1, "..T", [1, 2, 3]) == [(1, .99, 0, 1), (2, .99, 1, 2), (3, 0.0, 2, 3)]


def filled(errors):
    buffer = dqn.PrioritisedBuffer(len(errors), torch.zeros(1), 0.6)
    for i in range(len(errors)):
        buffer.add(torch.tensor([float(i)]), 0, 0.0, 0.0, torch.zeros(1))
    buffer.set_errors(np.arange(len(errors)), np.array(errors))
    return buffer


def test_priorities():
    buffer = filled([.5, 1, 2, .1, 4])
    assert buffer.tree[np.arange(5)] == pytest.approx([.6597547, 1.0000006, 1.5157170, .2511902, 2.2973971], abs=1e-6)
    assert buffer.tree.nodes[1] == pytest.approx(5.7240596, abs=1e-6)
    index, weight = buffer.draw(np.array([.3, .9, .5]), 0.4)
    assert index.tolist() == [0, 4, 4] and weight == pytest.approx([1, .6070977, .6070977], abs=1e-6)
    buffer.add(torch.tensor([9.0]), 0, 0.0, 0.0, torch.zeros(1))  # in place of the oldest, with the largest priority
    assert buffer.rows.obs[0] == 9 and buffer.tree[np.array([0])] == pytest.approx((4 + 1e-6) ** 0.6)
    again = dqn.PrioritisedBuffer(5, torch.zeros(1), 0.6)
    again.load_state_dict(runtime.to_plain(buffer.state_dict()))
    assert (again.tree.nodes == buffer.tree.nodes).all() and again.largest == buffer.largest
    assert torch.equal(again.rows.obs, buffer.rows.obs)


def test_the_newest_transition_is_drawn():
    """Also where it is the only one."""
    assert filled([0.3]).draw(np.array([0.0, 0.999]), 0.4)[0].tolist() == [0, 0]
    index, _ = filled([1, 1, 1]).draw(np.linspace(0, 0.999, 300), 0.4)
    assert np.bincount(index).tolist() == [100, 100, 100]


def test_sum_tree_is_a_prefix_sum():
    rng = np.random.default_rng(0)
    for capacity in (1, 5, 16, 100):
        tree, priority = dqn.SumTree(capacity), rng.random(capacity)
        tree[np.arange(capacity)] = rng.random(capacity)
        tree[rng.permutation(capacity)[:3]] = 7.0
        tree[np.arange(capacity)] = priority
        mass = rng.random(50) * priority.sum()
        assert tree.find(mass).tolist() == np.searchsorted(priority.cumsum(), mass, side="right").tolist()


def test_exploration_ends_where_it_should():
    args = dqn.Args(total_timesteps=1000, epsilon_fraction=0.2, epsilon_end=0.1)
    assert [dqn.epsilon_at(step, 1000, args) for step in (0, 100, 200, 900)] == pytest.approx([1, 0.55, 0.1, 0.1])


class Corridor(gym.Env):
    """Five places in a row; the last one ends the episode with reward 1. Actions: back, on."""
    observation_space, action_space = gym.spaces.Box(0, 1, (5,), np.float32), gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        return np.eye(5, dtype=np.float32)[0], {}

    def step(self, action):
        self.place = max(0, self.place + 2 * int(action) - 1)
        return np.eye(5, dtype=np.float32)[self.place], float(self.place == 4), self.place == 4, False, {}


if "Corridor-v0" not in gym.registry:
    gym.register("Corridor-v0", Corridor, max_episode_steps=30)


@pytest.mark.parametrize("kwargs", [{}, dict(double=False, dueling=False, priority_alpha=0.0, n_step=1)])
@pytest.mark.slow
def test_dqn_finds_the_end_of_a_corridor(kwargs, tmp_path):
    args = dqn.Args(env="Corridor-v0", total_timesteps=2000, num_envs=2, hidden="32x1", learning_rate=3e-3,
                    learning_starts=200, train_every=20, updates=8, target_every=20, epsilon_fraction=0.5,
                    gamma=0.8, compile=False, eval_every=0, eval_episodes=1, run_dir=str(tmp_path / "run"), **kwargs)
    result = dqn.main(args)
    assert result["return_mean"] == 1 and result["length_mean"] == 4


def test_dqn_on_pictures():
    """White is 1 in the first layer, bytes stay bytes, and black and white pictures get the values they are worth."""
    torch.manual_seed(0)
    args = dqn.Args(hidden="16x1", learning_rate=3e-3, dueling=False)
    agent = dqn.make_agent(args, (36, 40, 2), 2, torch.device("cpu"))
    white = torch.full((36, 40, 2), 255, dtype=torch.uint8)
    buffer = dqn.PrioritisedBuffer(2, white, 0.6)
    for obs, worth in ((white, 1.0), (0 * white, -1.0)):
        buffer.add(obs, 1, worth, 0.0, obs)
    batch = buffer.rows
    assert batch.obs.dtype == batch.next_obs.dtype == torch.uint8 and batch.obs.shape == (2, 36, 40, 2)
    weight, bias = agent["online"]["picture.0.weight"], agent["online"]["picture.0.bias"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dqn, "CONVOLUTIONS", dqn.CONVOLUTIONS[:1])
        first = dqn.features(agent["online"], batch.obs).view(2, 32, 8, 9)
    assert torch.allclose(first[0, :, 0, 0], (weight.sum((1, 2, 3)) + bias).relu(), atol=1e-5)
    assert torch.allclose(first[1, :, 7, 8], bias.relu())
    with torch.no_grad():
        for _ in range(60):
            dqn.update(agent, batch, torch.ones(2), args)
    assert dqn.q_values(agent["online"], batch.obs)[:, 1].tolist() == pytest.approx([1, -1], abs=0.1)
