"""SAC-KIAN against hand numbers: log-probs, selection, gradients, fusion, replay, one update."""
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from algos import sac_kian
from algos.sac_kian import (Args, Noise, ReplayBuffer, attention_scores, decide, draw_noise, gaussian_log_prob,
                            make_agent, select, squash_log_prob, surrogate_log_prob, update)

D = torch.float64
W = torch.tensor([[0.5, -1.0, 2.0]], dtype=D)  # scores of two rules and the inner policy
MEAN, U = torch.tensor([[0.2, -0.1, 0.0, 0.3]], dtype=D), torch.tensor([[0.3, -0.1, 0.2, 0.1]], dtype=D)
LOG_STD = torch.full((1, 4), -1.0, dtype=D)
INNER_LOG_PROB, SURROGATE = 0.140119, 0.182551


def test_external_log_prob_is_a_constant():
    mean = torch.randn(5, 4, dtype=D)
    assert gaussian_log_prob(mean, mean, -1.0) == pytest.approx(4 - 2 * math.log(2 * math.pi), abs=1e-9)
    assert gaussian_log_prob(mean, mean, 0.3)[0].item() == pytest.approx(-4 * 0.3 - 2 * math.log(2 * math.pi), abs=1e-9)


def test_selection_draws_with_the_attention_weights():
    torch.manual_seed(0)
    gumbel = draw_noise(200_000, 2, 1).gumbel
    drawn = select(W.float().expand(200_000, 3), gumbel)
    assert torch.equal(drawn.sum(1), torch.ones(200_000)) and set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.mean(0).tolist() == pytest.approx([0.1753, 0.0391, 0.7856], abs=0.005)
    flattened = select(W.float().softmax(-1).expand(200_000, 3), gumbel).mean(0)  # the mistake this guards against
    assert flattened.tolist() == pytest.approx([0.2693, 0.2350, 0.4957], abs=0.005)


def inner_log_prob():
    return squash_log_prob(gaussian_log_prob(U, MEAN, LOG_STD), torch.tanh(U))


def test_surrogate_log_prob():
    assert inner_log_prob().item() == pytest.approx(INNER_LOG_PROB, abs=1e-5)
    external = torch.full((1, 2), 4 - 2 * math.log(2 * math.pi), dtype=D)
    log_probs = torch.cat([external, inner_log_prob().unsqueeze(1)], 1)
    assert surrogate_log_prob(W.log_softmax(-1), log_probs).item() == pytest.approx(SURROGATE, abs=1e-5)
    order = torch.tensor([2, 1, 0])  # whoever stands first
    turned = surrogate_log_prob(W.log_softmax(-1)[:, order], log_probs[:, order])
    assert turned.item() == pytest.approx(SURROGATE, abs=1e-5)


def test_surrogate_is_stable_in_float32():
    log_weights, log_probs = torch.full((1, 2), math.log(0.5)), torch.tensor([[-200.0, -150.0]])
    assert surrogate_log_prob(log_weights, log_probs).item() == pytest.approx(-18.0, abs=1e-4)
    assert torch.logsumexp(log_weights + log_probs, -1).item() == pytest.approx(-150.6931, abs=1e-3)


@pytest.mark.parametrize("drawn", [0, 1, 2])
def test_gradients_of_the_draw(drawn):
    scores = W.clone().requires_grad_()
    actions = torch.randn(1, 3, 4, dtype=D, generator=torch.Generator().manual_seed(3)).requires_grad_()
    gumbel = torch.zeros(1, 3, dtype=D)
    gumbel[0, drawn] = 10.0
    selected = select(scores, gumbel)
    assert selected.argmax().item() == drawn
    (selected.unsqueeze(-1) * actions).sum().backward()
    for i in range(3):  # only the drawn policy's action is moved by Q
        assert actions.grad[0, i].tolist() == [float(i == drawn)] * 4
    assert scores.grad.sum().item() == pytest.approx(0, abs=1e-12) and (scores.grad.abs() > 0).all()


@pytest.mark.parametrize("actor", ["kian", "a2t"])
def test_naive_mixture_is_a_density_and_the_surrogate_is_not_its_log(actor):
    """The mixture .2 tanh N(.1, e^-.5) + .3 N(.5, e^-1) + ... sampled through `decide`: entropy by Monte Carlo."""
    weights = torch.tensor([0.5, 0.3, 0.2])
    params = {"inner.0.weight": torch.zeros(1, 2), "inner.0.bias": torch.tensor([0.1, -0.5]),
              "query.0.weight": torch.zeros(1, 3), "query.0.bias": weights.log(), "handicap": torch.zeros(3)}
    if actor == "kian":  # keys that score a constant query as these logits
        params["keys"] = torch.eye(3)
    args = Args(actor=actor, entropy_fix="off", cosine_scale=0.0, ext_log_std=-1.0)
    advice = torch.tensor([[[0.5], [-0.4]]]).expand(400_000, 2, 1)
    torch.manual_seed(0)
    decision = decide(params, torch.zeros(400_000, 1), advice, draw_noise(400_000, 2, 1), args)
    assert decision.log_weights[0].exp().tolist() == pytest.approx(weights.tolist(), abs=1e-6)
    inside = decision.action.abs().squeeze(1) < 1  # rules' samples are clipped to the box, where no density lives
    assert -decision.log_prob[inside].mean().item() == pytest.approx(entropy_inside(), abs=0.01)
    if actor == "kian":
        surrogate = decide(params, torch.zeros(400_000, 1), advice, draw_noise(400_000, 2, 1),
                           replace(args, entropy_fix="on", credit="drawn"))
        assert -surrogate.log_prob.mean().item() == pytest.approx(0.1896, abs=0.01)


def mixture(a: torch.Tensor) -> torch.Tensor:
    normal = lambda x, m, s: torch.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))  # noqa: E731
    u = torch.atanh(a.clamp(-1 + 1e-12, 1 - 1e-12))
    inner = torch.where(a.abs() < 1, normal(u, 0.1, math.exp(-0.5)) / (1 - a ** 2).clamp(min=1e-12), 0.0)
    return 0.3 * normal(a, 0.5, math.exp(-1)) + 0.2 * normal(a, -0.4, math.exp(-1)) + 0.5 * inner


def entropy_inside() -> float:
    """E[-log p | |a| < 1] by quadrature; the full entropy is checked on the way."""
    a = torch.linspace(-4, 4, 2_000_001, dtype=D)
    p, da = mixture(a), (a[1] - a[0]).item()
    assert p.sum().item() * da == pytest.approx(1.0, abs=1e-4)
    surprise = -(p * p.clamp(min=1e-300).log())
    assert surprise.sum().item() * da == pytest.approx(0.7469, abs=1e-3)
    inside = a.abs() < 1
    return (surprise[inside].sum() / p[inside].sum()).item()


def test_policies_are_known_by_key_not_by_place():
    """Reordering (key, advice) pairs reorders the weights and leaves the log-prob alone; adding a policy scales the
    other weights by one factor."""
    torch.manual_seed(0)
    args = Args(hidden="16x1")
    actor = make_agent(args, 6, 2, 3)["actor"]
    features, advice, noise = torch.randn(32, 6), torch.rand(32, 3, 2), draw_noise(32, 3, 2)
    order = [0, 3, 1, 2]
    shuffled = decide(actor | {"keys": actor["keys"][order]}, features, advice[:, [2, 0, 1]], noise, args)
    plain = decide(actor, features, advice, noise, args)
    assert torch.allclose(plain.log_weights.exp()[:, order], shuffled.log_weights.exp(), atol=1e-6)
    assert torch.allclose(plain.log_prob, shuffled.log_prob, atol=1e-5)
    fewer = decide(actor | {"keys": actor["keys"][:3], "handicap": torch.zeros(3)}, features, advice[:, :2],
                   Noise(noise.gaussian[:, :3], noise.gumbel[:, :3]), args)
    plain, fewer = plain.log_weights.exp(), fewer.log_weights.exp()
    assert torch.allclose(plain[:, :3], fewer * (1 - plain[:, 3:]), atol=1e-6)


def test_scores():
    query, keys = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    assert attention_scores(query, keys, 0.0).tolist() == [[3.0, 8.0, -3.0]]  # dot products
    assert attention_scores(query, keys, 1.0)[0].tolist() == pytest.approx([0.6, 0.8, -0.6])
    assert attention_scores(query, keys, 3.0)[0].tolist() == pytest.approx([1.8, 2.4, -1.8])


def test_no_knowledge_is_sac():
    """With the same seed, `--knowledge none` and `--actor plain` stay equal to the last bit, and the log-prob is the
    squashed Gaussian's."""
    results = []
    for actor in ("kian", "plain"):
        torch.manual_seed(0)
        args = Args(actor=actor, hidden="32x2", batch_size=64)
        agent = make_agent(args, 6, 2, 0)
        with torch.no_grad():
            for _ in range(5):
                scalars = run_update(agent, args, n=0)
        results.append((agent, scalars))
    (kian, a), (plain, b) = results
    assert all(torch.equal(kian["actor"][k], plain["actor"][k]) for k in plain["actor"])
    assert all(torch.equal(kian["critic"][k], plain["critic"][k]) for k in plain["critic"])
    assert a["entropy"] == b["entropy"]
    features, noise = torch.randn(8, 6), draw_noise(8, 0, 2)
    decision = decide(plain["actor"], features, torch.zeros(8, 0, 2), noise, Args(actor="plain"))
    mean, log_std = sac_kian.mlp(plain["actor"], "inner", features).chunk(2, -1)
    policy = torch.distributions.TransformedDistribution(torch.distributions.Normal(mean, log_std.exp()),
                                                         torch.distributions.TanhTransform())
    assert torch.allclose(decision.log_prob, policy.log_prob(decision.action).sum(-1), atol=1e-3)


def run_update(agent, args, n, f=6, d=2):
    batch = torch.randn(args.batch_size, 2 * f + d + 2)
    batch[:, f + d + 1] = 0
    advice = [torch.rand(args.batch_size, n, d) * 2 - 1 for _ in range(2)]
    return update(agent, batch, torch.zeros(f), torch.ones(f), *advice, draw_noise(args.batch_size, n, d),
                  draw_noise(args.batch_size, n, d), args)


def test_attention_learns_among_rules_alone_until_trust():
    """However much more the critics think of the inner policy (here by some 500), its key learns nothing."""
    torch.manual_seed(1)
    args = Args(hidden="16x2")
    agent = make_agent(args, 6, 2, 2)
    agent["actor"]["handicap"][0] = sac_kian.HELD_BACK
    critic = {"q.0.weight": torch.zeros(2, 8, 1), "q.0.bias": torch.zeros(2, 1, 1)}
    critic["q.0.weight"][:, 6] = 1000.0  # Q = 1000 a_0
    advice = torch.tensor([[-0.5, 0], [-0.9, 0]]).expand(8, 2, 2)
    grads, (loss, _) = torch.func.grad_and_value(sac_kian.actor_loss, has_aux=True)(
        agent["actor"], critic, torch.tensor(0.1), torch.randn(8, 6), advice, draw_noise(8, 2, 2), args)
    assert loss.isfinite() and (grads["keys"][0] == 0).all() and (grads["keys"][1:] != 0).any(1).all()


def test_rules_that_were_of_no_help_leave_plain_sac():
    """With the handicap on their side, KIAN's inner policy, critics and temperature are updated as those of SAC."""
    agents = []
    for actor in ("kian", "plain"):
        torch.manual_seed(1)
        args = Args(hidden="16x2", batch_size=32, actor=actor)
        agent = make_agent(args, 6, 2, 2 * (actor == "kian"))
        if actor == "kian":
            agent["actor"]["handicap"][0] = -sac_kian.HELD_BACK
        torch.manual_seed(2)
        batch, advice = torch.randn(32, 16), torch.rand(32, 2, 2)[:, :2 * (actor == "kian")]
        noise = draw_noise(32, 2, 2)
        if actor == "plain":
            noise = Noise(noise.gaussian[:, :1], noise.gumbel[:, :1])
        with torch.no_grad():
            update(agent, batch, torch.zeros(6), torch.ones(6), advice, advice, noise, noise, args)
        agents.append(agent)
    kian, plain = agents
    for group in ("actor", "critic", "target", "temperature"):
        for name, p in plain[group].items():
            assert torch.allclose(kian[group][name], p, atol=1e-6), name


@pytest.mark.parametrize("credit", ["expected", "drawn"])
def test_update_is_adam_on_the_stated_losses(credit):
    """One update against torch.optim.Adam and autograd, written out: order of steps, alpha, targets."""
    torch.manual_seed(1)
    args = Args(hidden="16x2", batch_size=32, credit=credit)
    agent = make_agent(args, 6, 2, 2)
    agent["actor"]["handicap"][0] = 1.0
    agent["actor"]["imitation"].fill_(0.01)
    clone = lambda group: {k: v.clone().requires_grad_() for k, v in agent[group].items()}  # noqa: E731
    actor, critic, target, temperature = (clone(g) for g in ("actor", "critic", "target", "temperature"))
    batch, (advice, next_advice) = torch.randn(32, 16), torch.rand(2, 32, 2, 2)
    batch[:, 9] = torch.arange(32) % 2  # half terminal
    noise, next_noise = draw_noise(32, 2, 2), draw_noise(32, 2, 2)
    with torch.no_grad():
        update(agent, batch, torch.zeros(6), torch.ones(6), advice, next_advice, noise, next_noise, args)

    trained = {name: p for name, p in actor.items() if name not in ("handicap", "imitation")}
    optimisers = [torch.optim.Adam(p.values(), args.learning_rate) for p in (critic, trained, temperature)]
    features, action, reward, end, following = batch.clamp(-5, 5).split([6, 2, 1, 1, 6], 1)
    action, reward, end = batch[:, 6:8], batch[:, 8], batch[:, 9]
    alpha = temperature["log_alpha"].exp().detach()
    with torch.no_grad():
        then = decide(actor, following, next_advice, next_noise, args)
        next_q = sac_kian.mlp(target, "q", torch.cat([following, then.action], 1)).amin(0).squeeze(1)
        y = reward + args.gamma * (1 - end) * (next_q - alpha * then.log_prob)
    q = sac_kian.mlp(critic, "q", torch.cat([features, action], 1)).squeeze(-1)
    (0.5 * ((q[0] - y) ** 2).mean() + 0.5 * ((q[1] - y) ** 2).mean()).backward()
    optimisers[0].step()
    now = decide(actor, features, advice, noise, args)
    if credit == "drawn":
        log_prob = now.log_prob
        gain = sac_kian.mlp(critic, "q", torch.cat([features, now.action], 1)).amin(0).squeeze(1)
    else:  # weights: all policies' worth and their own entropy; inner policy: SAC in every state
        log_prob = now.inner_log_prob
        each = [sac_kian.mlp(critic, "q", torch.cat([features, now.actions[:, i]], 1)).squeeze(2).amin(0)
                for i in range(3)]
        q = torch.stack(each, 1).detach() / args.attention_temperature - torch.tensor([1.0, 0, 0])
        share = now.log_weights[:, 1:].detach().softmax(1)
        distance = [(now.actions[:, 0] - advice[:, i]).square().sum(1) for i in range(2)]
        imitation = 0.01 * sum(share[:, i] * distance[i] for i in range(2))
        gain = each[0] + (q.softmax(1) * now.log_weights).sum(1) - imitation
        assert torch.allclose(then.log_prob, then.log_weights[:, 0].exp() * then.inner_log_prob)
    loss = (alpha * log_prob - gain).mean()
    optimisers[1].zero_grad()
    loss.backward()
    optimisers[1].step()
    (-temperature["log_alpha"] * (log_prob.detach().mean() - 2)).backward()
    optimisers[2].step()
    for mine, reference in ((agent["critic"], critic), (agent["actor"], trained), (agent["temperature"], temperature)):
        for name in reference:
            assert torch.allclose(mine[name], reference[name], atol=2e-6), name
    for name in target:
        mixed = 0.95 * target[name] + 0.05 * critic[name]
        assert torch.allclose(agent["target"][name], mixed, atol=1e-6)


def test_her_relabels_with_the_future_of_the_same_episode():
    T, episodes = 50, 40
    buffer = ReplayBuffer(T * episodes, T, 2, 4)
    for t in range(T * episodes // 2):
        step = t % T
        ids = torch.tensor([2 * (t // T), 2 * (t // T) + 1])
        rows = torch.stack([torch.tensor([float(i), step, step + 1, 0]) for i in ids])  # episode, t, t + 1
        buffer.add(rows, torch.tensor([step == T - 1] * 2))
    torch.manual_seed(0)
    relabelled = int(0.8 * 2048)
    assert relabelled == 1638
    gaps = []
    for _ in range(320):
        batch, later = buffer.sample(2048, relabelled)
        assert later.shape[0] == relabelled and torch.equal(batch[:relabelled, 0], later[:, 0])  # same episode
        assert batch[:relabelled, 1].max() <= T - 2
        gaps.append(later[:, 1] - batch[:relabelled, 1])
    gaps = torch.cat(gaps)
    assert gaps.min() >= 1
    assert (gaps == 1).float().mean().item() == pytest.approx(0.0914, abs=0.003)  # there, the reward is 0
    assert batch[relabelled:, 1].max() == T - 1  # the others see the last step too


def test_buffer_keeps_the_last_rows_and_episodes_apart():
    """Two environments with episodes of different lengths; the open one is never sampled; the oldest goes first."""
    buffer = ReplayBuffer(12, 4, 2, 1)
    for t in range(10):  # environment 0 ends every 2 steps, environment 1 every 4
        buffer.add(torch.tensor([[100.0 + t], [200.0 + t]]), torch.tensor([t % 2 == 1, t % 4 == 3]))
    assert buffer.stored == 5 * 2 + 2 * 4
    # the last 12 of 18 rows; the two oldest of them are the rest of an episode
    assert buffer.rows.roll(-18 % 12, 0)[:, 0].tolist() == [202, 203, 104, 105, 106, 107, 204, 205, 206, 207, 108, 109]
    assert buffer.left.roll(-18 % 12).tolist() == [1, 0, 1, 0, 1, 0, 3, 2, 1, 0, 1, 0]
    sampled = buffer.sample(500, 0)[0].unique().tolist()
    assert sampled == [*range(104, 110), 202, 203, 204, 205, 206, 207]
    batch, later = buffer.sample(500, 500)
    assert ((later - batch) >= 1).all() and ((later // 100) == (batch // 100)).all()


def test_buffer_draws_transitions_not_episodes():
    """An episode of 50 steps and one of a single step: all 51 are as likely; what has no later row keeps its goal."""
    buffer = ReplayBuffer(200, 50, 1, 1)
    buffer.add(torch.tensor([[-1.0]]), torch.tensor([True]))
    assert buffer.sample(8, 6)[1].shape == (0, 1)
    for t in range(50):
        buffer.add(torch.tensor([[float(t)]]), torch.tensor([t == 49]))
    torch.manual_seed(0)
    batch, later = buffer.sample(100_000, 50_000)
    assert torch.bincount(batch[50_000:, 0].long() + 1, minlength=51).tolist() == pytest.approx([980] * 51, abs=130)
    assert torch.bincount(batch[:50_000, 0].long() + 1, minlength=51).tolist() == pytest.approx(
        [0, *[1020] * 49, 0], abs=130)
    assert (later > batch[:50_000]).all()


@settings(max_examples=40, deadline=None)
@given(strategies.lists(strategies.tuples(strategies.booleans(), strategies.booleans()), min_size=8, max_size=60),
       strategies.integers(4, 30), strategies.integers(0, 64))
def test_buffer_never_mixes_episodes(ends, capacity, relabelled):
    """Any pattern of ends, any capacity: relabelling stays inside an episode and goes forward in time."""
    buffer, episode, t = ReplayBuffer(capacity, 4, 2, 2), [0, 1], [0, 0]
    for pair in ends:
        buffer.add(torch.tensor([[float(episode[i]), float(t[i])] for i in range(2)]), torch.tensor(pair))
        for i in range(2):
            t[i] += 1
            if pair[i] or t[i] == 4:
                episode[i], t[i] = episode[i] + 2, 0
    if buffer.stored:
        batch, later = buffer.sample(64, relabelled)
        relabellable = (buffer.left[:buffer.stored] > 0).float().mean()  # share of the rows
        assert len(later) <= relabelled and (len(later) > 0 or relabelled < 16 or relabellable < 0.5)
        assert torch.equal(batch[:len(later), 0], later[:, 0])
        assert (later[:, 1] > batch[:len(later), 1]).all()
        open_now = torch.tensor([float(e) for e in episode])
        assert not torch.isin(batch[:, 0], open_now).any()


class BitFlip(gym.Env):
    """Six bits; every positive component of the action flips its bit; reach a random pattern within eight steps."""

    N = 6
    observation_space = gym.spaces.Dict({k: gym.spaces.Box(-1, 1, (6,), np.float64) for k in
                                         ("observation", "achieved_goal", "desired_goal")})
    action_space = gym.spaces.Box(-1, 1, (6,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.bits, self.goal = self.np_random.choice([-1.0, 1.0], (2, self.N))
        return self.observe(), {}

    def observe(self):
        return {"observation": self.bits.copy(), "achieved_goal": self.bits.copy(), "desired_goal": self.goal.copy()}

    def compute_reward(self, achieved, desired, info):
        return -(np.abs(achieved - desired).max(-1) > 0.5).astype(np.float32)

    def step(self, action):
        self.bits[action > 0] *= -1
        reward = self.compute_reward(self.bits, self.goal, {})
        return self.observe(), float(reward), False, False, {"is_success": float(reward == 0)}


def test_hindsight_learns_where_plain_replay_does_not(tmp_path):
    """The bit-flip gate: with relabelling nearly all patterns are reached, without it hardly any."""
    if "BitFlip-v0" not in gym.registry:
        gym.register("BitFlip-v0", BitFlip, max_episode_steps=8)
    success = {}
    for goals in (4, 0):
        result = sac_kian.main(Args(env="BitFlip-v0", actor="plain", her_goals=goals, total_timesteps=7_000, num_envs=8,
                                    hidden="64x2", batch_size=128, updates_per_step=0.25, gamma=0.9, compile=False,
                                    initial_temperature=0.02, eval_every=0, checkpoint_every=0, eval_episodes=32,
                                    run_dir=str(tmp_path / str(goals))))
        success[goals] = result["success_rate"]
    assert success[4] >= 0.8 and success[0] <= 0.3, success
