"""ACER against hand numbers, and that it learns. Resume, errors and exports are in test_contract.py."""
from dataclasses import replace

import pytest
import torch
from torch import nn

import envs
import runtime
from algos import acer
from tests.test_classic import numbers
from tests.test_ppo import Bandit

# A segment of three steps with three actions. Observations are the numbers of states; no step is taken from the fourth.
LOGITS = [[.2, .4, -.4], [-.35, .25, .65], [.5, -.2, .1]]
Q = [[.5, 1, -.2], [.3, .1, .8], [-.4, .6, .2]]
MU = [[.6, .03, .37], [.3, .3, .4], [.05, .5, .45]]
AVERAGE = [[.5, .3, .2], [.2, .5, .3], [.3, .3, .4]]
ARGS = acer.Args(entropy_coef=0.0)
LAST = torch.tensor([[0.0, 0.0, 0.7]], dtype=torch.float64)  # next_value, without a cut


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


class Table(nn.Module):
    """Logits and Q of each state, in place of the script's Agent."""

    def __init__(self, logits, q):
        super().__init__()
        self.logits, self.q = nn.Parameter(double(logits)), nn.Parameter(double(q))

    def forward(self, obs):
        log_probs, q = torch.log_softmax(self.logits[obs], -1), self.q[obs]
        return acer.Output(log_probs, q, (log_probs.exp() * q).sum(-1))


def segment(terminated=(0, 0, 0), truncated=(0, 0, 0), mu=MU):
    states = torch.tensor([[0, 1, 2]])
    return acer.Batch(states, torch.tensor([[1, 2, 0]]), double([mu]), double([[1, 0, -1]]),
                      torch.tensor([terminated]).bool(), torch.tensor([truncated]).bool(), states + 1)


def tables():
    return Table(LOGITS, Q), Table(double(AVERAGE).log().tolist(), Q)


def returns(batch, next_value):
    """Retrace returns of the segment, with its values and ratios."""
    output = tables()[0](batch.obs[0])
    ratio = (output.log_probs.exp() / double(MU)).gather(1, batch.action.T).T
    q = output.q.gather(1, batch.action.T).T
    return numbers(acer.retrace(batch, q, output.value.unsqueeze(0), next_value, ratio, 0.99))


@pytest.fixture
def exact(monkeypatch):
    """The hand numbers have no epsilon."""
    monkeypatch.setattr(acer, "EPS", 0.0)


def test_retrace():
    agent, _ = tables()
    probs, value = agent(torch.arange(3)).log_probs.exp(), agent(torch.arange(3)).value
    assert numbers(value) == pytest.approx([.5817746, .4795388, .0147746], abs=1e-7)
    assert numbers((probs / double(MU)).gather(1, torch.tensor([[1], [2], [0]]))) == pytest.approx(
        [14.6968499, 1.2265728, 9.2297525], abs=1e-6)
    assert returns(segment(), LAST) == pytest.approx([.7883734, .1066969, -.307], abs=1e-7)


def test_episodes_that_end_inside_a_segment():
    """Nothing flows back over an end. After a time limit the value of the state that followed counts, also at the last
    step, and where a step terminates at its limit, nothing does."""
    later = [.1066969, -.307]
    assert returns(segment(terminated=(1, 0, 0)), LAST) == pytest.approx([1, *later], abs=1e-7)
    cut = double([[.25, 0, .7]])
    assert returns(segment(truncated=(1, 0, 0)), cut) == pytest.approx([1.2475, *later], abs=1e-7)
    assert returns(segment(terminated=(1, 0, 0), truncated=(1, 0, 0)), cut) == pytest.approx([1, *later], abs=1e-7)
    assert returns(segment(truncated=(0, 0, 1)), LAST) == returns(segment(), LAST)
    assert returns(segment(terminated=(0, 0, 1)), LAST)[2] == -1


def test_values_after_cuts():
    """Of final observations, and only where they count."""
    agent = Table([[0, 0]] * 4, [[0, 0], [1, 3], [2, 6], [5, 9]])
    assert numbers(acer.next_values(agent, segment())) == [0, 0, 7]
    assert numbers(acer.next_values(agent, segment(truncated=(1, 0, 0)))) == [2, 0, 7]


def test_actor_and_critic_losses(exact):
    agent, average = tables()
    output, action = agent(torch.arange(3)), segment().action.unsqueeze(2)
    probs = output.log_probs.exp().unsqueeze(0)
    weights = acer.actor_weights(action, probs, probs / double([MU]), output.q.unsqueeze(0),
                                 output.value.view(1, 3, 1), double([[[.7883734], [.1066969], [-.307]]]), 10.0)
    terms = -weights[0] * output.log_probs
    assert numbers(terms[1:].sum(1)) == pytest.approx([-.3256408, -2.2966238], abs=1e-6)
    assert terms[0, 1].item() == pytest.approx(1.6918881 + .0482594, abs=1e-6)  # cut at 10, and what makes up for it
    assert weights[0, 0, [0, 2]].tolist() == [0, 0]
    loss, scalars = acer.acer_loss(agent, average, segment(), LAST, replace(ARGS, delta=1e9))
    assert scalars["policy_loss"].item() == pytest.approx(-.2940390, abs=1e-6)
    assert scalars["value_loss"].item() == pytest.approx((.0223929 + .2403346 + .0043245) / 3, abs=1e-6)
    assert scalars["actor_ratio"].item() == pytest.approx((10 + 1.2265728 + 9.2297525) / 3, abs=1e-6)
    assert scalars["retrace_ratio"] == 1 and scalars["bound_fraction"] == 0
    by_logits, by_q = torch.autograd.grad(loss, [agent.logits, agent.q])
    assert numbers(by_logits) == pytest.approx(
        [.2556863, -.3960099, .1403236, -.0275141, -.0501340, .0776481, .5331093, -.2268687, -.3062407], abs=1e-6)
    assert numbers(by_q) == pytest.approx([0, .0352711, 0, 0, 0, .1155505, -.0155, 0, 0], abs=1e-6)


GRADIENT = [[0, 0, -.9321050], [-6.4354923, 0, 0]]  # of steps 1 and 2, in probabilities


@pytest.mark.parametrize("delta, expected", [
    (0.1, [[.1330754, .1825834, -.8586714], [-5.7384372, 1.4036965, 1.3865119]]),
    (1.0, [GRADIENT[0], [-5.8920664, 1.0943253, 1.0809282]])])
def test_trust_region(exact, delta, expected):
    probs = torch.softmax(double(LOGITS), 1)[1:].unsqueeze(0)
    z, bound = acer.trust_region(double([GRADIENT]), probs, double([AVERAGE[1:]]), delta)
    assert numbers(z) == pytest.approx([x for row in expected for x in row], abs=1e-6)
    assert bound.flatten().tolist() == [delta == 0.1, True]
    k = -double(AVERAGE[1:]) / probs[0]
    assert numbers((k * z[0]).sum(1)[bound[0, :, 0]]) == pytest.approx([delta] * int(bound.sum()))


@pytest.mark.parametrize("delta, bound, expected", [
    (0.1, 2 / 3, [.0848851, .1709529, -.2558381, -1.7724869, .7565573, 1.0159296]),
    (1.0, 1 / 3, [.0825424, .1504020, -.2329444, -1.7343231, .7398178, .9945053])])
def test_the_projected_gradient_goes_through_the_softmax(exact, delta, bound, expected):
    """At the logits, of a mean over three steps, it is p (z - p.z). The first step is never bound."""
    agent, average = tables()
    loss, scalars = acer.acer_loss(agent, average, segment(), LAST, replace(ARGS, delta=delta, value_coef=0.0))
    by_logits, = torch.autograd.grad(loss, [agent.logits])
    assert numbers(-3 * by_logits[1:]) == pytest.approx(expected, abs=1e-6)
    assert numbers(by_logits[0]) == pytest.approx([.2556863, -.3960099, .1403236], abs=1e-6)
    assert scalars["bound_fraction"].item() == pytest.approx(bound)


def test_entropy_bonus(exact):
    """It does reach the weights, though it is taken in probabilities."""
    agent, average = tables()
    losses = [acer.acer_loss(agent, average, segment(), LAST, replace(ARGS, delta=1e9, entropy_coef=c))[0]
              for c in (0.0, 0.1)]
    without, with_bonus = (torch.autograd.grad(loss, agent.logits)[0] for loss in losses)
    log_probs = torch.log_softmax(agent.logits, 1)
    bonus, = torch.autograd.grad(0.1 * (log_probs.exp() * log_probs).sum(1).mean(), agent.logits)
    assert torch.allclose(with_bonus - without, bonus)


@pytest.mark.parametrize("logits", [LOGITS, [[200, 0, 0], [0, 0, 200], [0, 200, 0]]])
@pytest.mark.parametrize("mu", [MU, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]])
def test_policies_that_are_sure_of_an_action(logits, mu):
    """Of today, of the past, and of both, which agree or not: nothing becomes infinite."""
    agent, average = Table(logits, Q), Table(logits, Q)
    loss, scalars = acer.acer_loss(agent, average, segment(mu=mu), LAST, acer.Args())
    loss.backward()
    for x in (loss, *scalars.values(), agent.logits.grad, agent.q.grad):
        assert x.isfinite().all()


def test_a_rollout_is_on_policy():
    """Ratios are 1 right after it. Steps and their next observations belong together, also where episodes end."""
    torch.manual_seed(0)
    args, vec = acer.Args(num_envs=3, num_steps=60), envs.make_vec("CartPole-v1", 3)
    obs = torch.from_numpy(vec.reset(1))
    agent = acer.Agent((4,), 2)
    loop = {"obs": obs, "open_return": torch.zeros(3, dtype=torch.float64)}
    rollout = acer.collect(agent, vec, lambda obs: obs, loop, runtime.Means(), args)
    assert rollout.obs.shape == (3, 60, 4) and torch.equal(rollout.obs[:, 0], obs) and rollout.terminated.any()
    goes_on = ~(rollout.terminated | rollout.truncated)[:, :-1]
    assert torch.equal((rollout.next_obs[:, :-1] == rollout.obs[:, 1:]).all(2), goes_on)
    with torch.no_grad():
        probs = acer.forward(agent, rollout.obs).log_probs.exp()
    assert torch.allclose(probs / rollout.probs, torch.ones(()), atol=1e-5)
    assert probs.std() < 0.01  # nearly uniform at the start
    scalars = acer.acer_loss(agent, agent, rollout, acer.next_values(agent, rollout), args)[1]
    assert scalars["actor_ratio"].item() == pytest.approx(1, abs=1e-5)


def test_buffer():
    """Each environment draws from its own past; the oldest rollout goes."""
    torch.manual_seed(0)
    buffer = acer.SegmentBuffer(3)
    for rollout in range(5):  # observations: 10 rollout + environment
        obs = (10 * rollout + torch.arange(4)).unsqueeze(1).expand(4, 2)
        buffer.add(acer.Batch(*[obs] * 7))
    draws = torch.stack([buffer.draw().obs[:, 0] for _ in range(100)])
    assert torch.equal(draws % 10, torch.arange(4).expand(100, 4))
    assert (draws // 10).unique().tolist() == [2, 3, 4]
    assert (draws // 10 != draws[:, :1] // 10).any()  # not of one time
    again = acer.SegmentBuffer(3)
    again.load_state_dict(runtime.to_plain(buffer.state_dict()))
    assert len(again.rollouts) == 3
    for ours, theirs in zip(again.rollouts, buffer.rollouts):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def parts(args):
    torch.manual_seed(0)
    agent, average = acer.Agent((1,), 4), acer.Agent((1,), 4).requires_grad_(False)
    average.load_state_dict(agent.state_dict())
    return agent, average, acer.RMSprop(agent.parameters(), args)


def play(agent, task, obs, args):
    loop = {"obs": obs, "open_return": torch.zeros(4, dtype=torch.float64)}
    rollout = acer.collect(agent, task, lambda obs: obs, loop, runtime.Means(), args)
    return rollout, loop["obs"]


def test_the_average_policy_follows():
    args, task = acer.Args(), Bandit()
    agent, average, optimizer = parts(args)
    before = numbers(*agent.parameters())
    rollout, _ = play(agent, task, torch.from_numpy(task.state), args)
    acer.update(agent, average, optimizer, acer.acer_loss, rollout, args)
    after = numbers(*agent.parameters())
    assert before != after
    assert numbers(*average.parameters()) == pytest.approx([0.99 * old + 0.01 * new for old, new in zip(before, after)],
                                                           abs=1e-6)


def test_it_learns_from_what_another_policy_did():
    """A nearly uniform one has filled the buffer, and nothing more is played. Observations name the right action."""
    args, task = acer.Args(num_steps=8, learning_rate=1e-2), Bandit()
    agent, average, optimizer = parts(args)
    buffer, obs = acer.SegmentBuffer(40), torch.from_numpy(task.state)
    for _ in range(40):
        rollout, obs = play(agent, task, obs, args)
        buffer.add(rollout)
    for _ in range(600):
        acer.update(agent, average, optimizer, acer.acer_loss, buffer.draw(), args)
    with torch.no_grad():
        p = agent(torch.tensor([[0.0], [1.0]])).log_probs.exp()
    assert p[0, 0] > 0.9 and p[1, 1] > 0.9


@pytest.mark.slow
def test_it_balances_a_pole(tmp_path):
    args = acer.Args(seed=2, total_timesteps=30_000, learning_rate=4e-3, replay_starts=200, eval_every=0,
                     device="cpu", run_dir=str(tmp_path / "run"))
    assert acer.main(args)["return_mean"] >= 150  # 57 before, and 77 without replay
