"""Values of PPO-KIAN against hand numbers, and what must hold for any weights."""
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
import knowledge
from algos import ppo_kian
from algos.ppo_kian import Agent, Args, advantages, attention_scores, rule_log_probs

LN2 = math.log(2)


def fused(query, keys, logits, advice, fusion="mixture"):
    """Weights (n+1,) and probabilities (A,) of one state in float64, through the agent's own forward pass."""
    args, n = Args(fusion=fusion, sharpness=1.0, silent="uniform"), len(advice)
    agent = Agent(args, (1,), len(logits), n).double()
    hidden = torch.zeros(1, ppo_kian.WIDTH).double()
    hidden[0, 0] = 1.0
    agent.encoder = torch.nn.Identity()
    agent.trunk = torch.nn.Identity()
    agent.query = torch.nn.Linear(ppo_kian.WIDTH, len(query)).double()
    agent.keys = torch.nn.Parameter(torch.tensor(keys).double())
    for layer, row in ((agent.query, query), (agent.inner, logits)):  # the state's first feature gives both
        layer.weight.data.zero_()
        layer.weight.data[:, 0], layer.bias.data[:] = torch.tensor(row).double(), 0.0
    with torch.no_grad():
        output = agent(hidden, torch.tensor(advice).double().view(1, n, len(logits)), args)
    weights = output.log_weights.exp() if fusion == "mixture" else torch.softmax(output.scores, 1)
    return weights[0], output.log_probs[0].exp()


KEYS, LOGITS, ADVICE = [[1, 0], [0, 2], [-1, 0]], [0, 0, LN2], [[1, 0, 0], [0, 0, 0]]


def test_attention_and_fusion():
    weights, p = fused([3, 4], KEYS, LOGITS, ADVICE)
    assert weights.tolist() == pytest.approx([.3964, .4842, .1194], abs=1e-4)
    assert p.tolist() == pytest.approx([.6230, .1389, .2380], abs=1e-4) and p.sum() == pytest.approx(1)
    scores, norms = attention_scores(torch.tensor([[3., 4.]]), torch.tensor(KEYS).float())
    assert (scores / norms)[0].tolist() == pytest.approx([.6, .8, -.6]) and norms[0].tolist() == [5, 10, 5]
    rules = rule_log_probs(torch.tensor([ADVICE]).double(), norms[:, 1:].double()).exp()[0]
    assert rules[0].tolist() == pytest.approx([.99991, .0000454, .0000454], abs=1e-5)
    assert rules[1].tolist() == pytest.approx([1 / 3] * 3)


def test_a_draw_is_a_policy_by_weight_and_then_its_action():
    torch.manual_seed(0)
    weights, p = fused([3, 4], KEYS, LOGITS, ADVICE)
    policies = torch.tensor([[.25, .25, .5], [.99991, .0000454, .0000454], [1 / 3] * 3])
    who = torch.multinomial(weights.float(), 200_000, replacement=True)
    staged = torch.bincount(torch.multinomial(policies[who], 1).squeeze(1), minlength=3) / 200_000
    direct = (p.log() + ppo_kian.gumbel((200_000, 3))).argmax(1)
    assert staged.tolist() == pytest.approx(p.tolist(), abs=0.005)
    assert (torch.bincount(direct, minlength=3) / 200_000).tolist() == pytest.approx(p.tolist(), abs=0.005)


def test_without_knowledge_it_is_ppo():
    obs, advice = torch.randn(5, 4), torch.zeros(5, 0, 3)
    losses = []
    for actor in ("kian", "plain"):
        torch.manual_seed(3)
        args = Args(actor=actor)
        agent = Agent(args, (4,), 3, 0)
        batch = {"obs": obs, "advice": advice, "action": torch.tensor([0, 1, 2, 0, 1]), "log_prob": torch.zeros(5) - 1,
                 "advantage": torch.ones(5), "return": torch.ones(5), "value": torch.zeros(5)}
        loss, scalars = ppo_kian.ppo_loss(agent, batch, args)
        loss.backward()
        losses.append([loss.item(), scalars["entropy"].item(), *(p.grad.sum().item() for p in agent.parameters())])
        logits = agent.inner(agent.trunk(agent.encoder(obs)))
        assert torch.allclose(agent(obs, advice, args).log_probs, torch.log_softmax(logits, -1), atol=1e-6)
    assert losses[0] == losses[1]


def test_order_of_policies_does_not_matter():
    _, p = fused([3, 4], KEYS, LOGITS, ADVICE)
    _, swapped = fused([3, 4], [KEYS[0], KEYS[2], KEYS[1]], LOGITS, ADVICE[::-1])
    assert (p - swapped).abs().max() < 1e-15


def test_a_policy_more_takes_from_all_in_proportion():
    before, _ = fused([3, 4], KEYS, LOGITS, ADVICE)
    after, _ = fused([3, 4], [*KEYS, [0, -1]], LOGITS, [*ADVICE, [0, 1, 0]])
    assert after.tolist() == pytest.approx([.3611, .4411, .1088, .0891], abs=1e-4)
    assert after[:3].tolist() == pytest.approx((before * (1 - after[3])).tolist())
    assert float(after[0] / after[1]) == pytest.approx(math.exp(-0.2))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_weights_are_bounded_and_probabilities_sum_to_one(seed, n):
    torch.manual_seed(seed)
    query, keys, advice = torch.randn(4), torch.randn(n + 1, 4), (torch.rand(n, 5) < 0.5).float()
    weights, p = fused(query.tolist(), keys.tolist(), torch.randn(5).tolist(), advice.tolist())
    low, high = 1 / (1 + n * math.e**2), 1 / (1 + n * math.e**-2)
    assert low - 1e-9 <= weights.min() and weights.max() <= high + 1e-9
    assert p.sum() == pytest.approx(1)


def test_logit_fusion():
    _, p = fused([3, 4], KEYS, LOGITS, ADVICE, fusion="logit")
    logits = 3 * torch.tensor(LOGITS).double() + 8 * torch.tensor(ADVICE[0]).double()  # products 3, 8, -3
    assert p.tolist() == pytest.approx(torch.softmax(logits, -1).tolist())


def test_the_actors_that_kian_is_compared_with():
    torch.manual_seed(0)
    obs, advice = torch.randn(1, 4), torch.tensor([[[1., 0, 0], [1, 1, 0]]])

    def agent_and_p(actor):
        agent = Agent(args := Args(actor=actor), (4,), 3, 2)
        with torch.no_grad():
            return agent, agent.encoder(obs), agent(obs, advice, args).log_probs[0].exp()
    assert agent_and_p("rule")[2].tolist() == pytest.approx([.66524, .24473, .09003], abs=1e-4)  # softmax of 2, 1, 0
    assert agent_and_p("mix")[2].tolist() == pytest.approx([.75, .25, 0], abs=1e-4)  # mean of (1, 0, 0), (.5, .5, 0)
    agent, x, p = agent_and_p("kogun")
    told = agent.inner(agent.trunk(torch.cat([x, torch.tensor([[1., 0, 0, 1, 1, 0]])], 1)))
    assert torch.allclose(p, torch.softmax(told, -1)[0])
    agent, x, p = agent_and_p("a2t")
    inner, first, second = torch.softmax(agent.query(x), -1)[0]
    logits = inner * agent.inner(agent.trunk(x))[0] + torch.stack([first + second, second, second * 0])
    assert torch.allclose(p, torch.softmax(logits, -1))


def test_a_silent_rule_steps_back():
    torch.manual_seed(0)
    agent, obs = Agent(Args(), (4,), 3, 2), torch.randn(1, 4)
    output = agent(obs, torch.tensor([[[0., 0, 0], [0, 1, 0]]]), Args())
    weights = output.log_weights[0].exp()
    assert weights[1] == 0 and weights.sum().item() == pytest.approx(1)
    alone = agent(obs, torch.zeros(1, 2, 3), Args())
    assert torch.allclose(alone.log_probs, alone.inner, atol=1e-6)  # all silent: PPO
    scores, norms = attention_scores(agent.query(agent.trunk(agent.encoder(obs))), agent.keys)
    cosines = (scores / norms)[0].tolist()
    assert (weights[2] / weights[0]).item() == pytest.approx(math.exp(cosines[2] - cosines[0]), rel=1e-4)


def test_the_entropy_bonus_does_not_reach_the_rules():
    advice, obs = torch.tensor([[[1., 0, 0]]]), torch.randn(1, 4)
    batch = {"obs": obs, "advice": advice, "action": torch.tensor([0]), "log_prob": torch.zeros(1),
             "advantage": torch.zeros(1), "return": torch.zeros(1), "value": torch.zeros(1)}
    for entropy_of, reaches in (("inner", False), ("fused", True)):
        agent = Agent(args := Args(entropy_of=entropy_of, value_coef=0.0), (4,), 3, 1)
        ppo_kian.ppo_loss(agent, batch, args)[0].backward()
        assert bool(agent.keys.grad.any()) == reaches and agent.inner.weight.grad.any()


def test_advice_may_be_silent_and_certain_without_nan():
    advice = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [1, 1, 0]]])
    assert rule_log_probs(advice, None).exp()[0].tolist() == [pytest.approx(row) for row in (
        [1 / 3] * 3, [1, 0, 0], [.5, .5, 0])]
    args = Args(entropy_fix="off", silent="uniform")
    agent = Agent(args, (4,), 3, 3)
    output = agent(torch.randn(1, 4), advice, args)
    output.log_probs[0, 0].backward()
    assert output.log_probs.exp().sum().item() == pytest.approx(1)
    assert all(p.grad.isfinite().all() for p in agent.parameters() if p.grad is not None)


def test_advantages():
    def column(*values):
        return torch.tensor(values).unsqueeze(1)
    args = column(0., 0., 1.), column(.5, .6, .7), torch.tensor([9.]), column(0., 0., 1.), 0.99, 0.95
    assert advantages(*args).squeeze(1).tolist() == pytest.approx([.446829, .375150, .300000], abs=1e-6)
    going_on = advantages(column(0., 0., 1.), column(.5, .6, .7), torch.tensor([9.]), torch.zeros(3, 1), 0.99, 0.95)
    assert going_on[2].item() == pytest.approx(1 + 0.99 * 9 - 0.7)


def test_losses_clip_by_hand():
    """One state, p = (.5, .5), taken with .25 then: the ratio, 2, is cut to 1.2 for a gain and kept for a loss."""
    agent = Agent(args := Args(entropy_coef=0.1), (1,), 2, 0)
    for p in agent.parameters():
        p.data.zero_()
    batch = {"obs": torch.zeros(2, 1), "advice": torch.zeros(2, 0, 2), "action": torch.tensor([0, 1]),
             "log_prob": torch.tensor([.25, .25]).log(), "advantage": torch.tensor([1., -1.]),
             "return": torch.tensor([1., 1.]), "value": torch.tensor([0.5, 0.5])}  # new value 0, held at 0.3
    loss, scalars = ppo_kian.ppo_loss(agent, batch, args)
    assert scalars["policy_loss"].item() == pytest.approx(-(1.2 - 2) / 2)
    assert scalars["value_loss"].item() == pytest.approx(1.0)  # the worse of 1 and 0.49
    assert loss.item() == pytest.approx(0.4 + 0.5 - 0.1 * LN2) and scalars["clipped"] == 1.0
    assert scalars["entropy"].item() == pytest.approx(LN2)


def test_bc_is_the_divergence_from_all_advice_together():
    agent = Agent(args := Args(actor="plain", bc_coef=1.0, entropy_coef=0.0, value_coef=0.0), (1,), 2, 1)
    for p in agent.parameters():
        p.data.zero_()
    batch = {"obs": torch.zeros(1, 1), "advice": torch.tensor([[[1., 0.]]]), "action": torch.tensor([0]),
             "log_prob": torch.tensor([.5]).log(), "advantage": torch.zeros(1), "return": torch.zeros(1),
             "value": torch.zeros(1)}
    target = torch.softmax(torch.tensor([1., 0.]), -1)
    by_hand = (target * (target / 0.5).log()).sum() / 2  # the mean runs over the two actions as well
    assert ppo_kian.ppo_loss(agent, batch, args)[0].item() == pytest.approx(by_hand.item())


def test_initialisation():
    layer = ppo_kian.linear(10, 5)
    assert layer.weight.norm(dim=1).tolist() == pytest.approx([1] * 5) and not layer.bias.any()
    assert sum(p.numel() for p in ppo_kian.GridEncoder().parameters()) == 10_544


def test_the_encoder_is_three_convolutions():
    torch.manual_seed(0)
    encoder, image = ppo_kian.GridEncoder(), torch.randint(0, 11, (5, 7, 7, 3), dtype=torch.uint8)
    x = image.permute(0, 3, 1, 2).float()
    for i, layer in enumerate(encoder.layers):
        kernel = layer.weight.view(len(layer.weight), 2, 2, -1).permute(0, 3, 1, 2)
        x = torch.nn.functional.conv2d(x, kernel, layer.bias).relu()
        x = torch.nn.functional.max_pool2d(x, 2) if i == 0 else x
    assert torch.allclose(encoder(image), x.flatten(1), atol=1e-4)


@pytest.mark.parametrize("official, terminated, bootstrapped", [(False, False, True), (False, True, False),
                                                                (True, False, False)])
def test_a_cut_episode_counts_with_the_value_of_its_last_state(official, terminated, bootstrapped):
    """Two copies of a task that ends in every step with reward 1 in state 5; the next episode starts in state 0."""
    class Task:
        num_envs, action_space = 2, gym.spaces.Discrete(3)

        def step(self, action):
            final, yes = np.full((2, 1), 5.0, np.float32), np.ones(2, bool)
            return np.zeros((2, 1), np.float32), np.ones(2), yes & terminated, yes, {"final_obs": final}
    args = Args(num_steps=3, official=official)
    torch.manual_seed(0)
    agent, start = Agent(args, (1,), 3, 0), torch.zeros(2, 1)
    tally = {"open": torch.zeros(2, dtype=torch.float64), "returns": []}
    rollout, obs = ppo_kian.collect(agent, Task(), start, lambda x: (x, torch.zeros(len(x), 0, 3)), tally, args)
    with torch.no_grad():
        value, final_value = agent.critic(agent.encoder(torch.tensor([[0.0], [5.0]]))).squeeze(1)
    expected = 1 + bootstrapped * args.gamma * final_value - value
    assert rollout["advantage"].tolist() == pytest.approx([expected.item()] * 6, abs=1e-5)
    assert rollout["return"].tolist() == pytest.approx([(expected + value).item()] * 6, abs=1e-5)
    assert tally["returns"] == [1.0] * 6 and torch.equal(obs, start)


def test_collected_log_probs_are_those_of_the_actions():
    torch.manual_seed(0)
    vec, args = envs.make_vec("MiniGrid-DoorKey-5x5-v0", 3, seed=1), Args(num_steps=5)
    obs = envs.to_tensors(vec.reset(1))
    rules = knowledge.load("auto", "MiniGrid-DoorKey-5x5-v0", 7, obs)
    agent, tally = Agent(args, (7, 7, 3), 7, 3), {"open": torch.zeros(3, dtype=torch.float64), "returns": []}
    rollout, _ = ppo_kian.collect(agent, vec, obs, lambda x: (x["image"], knowledge.advise(rules, x, 7)), tally, args)
    with torch.no_grad():
        output = agent(rollout["obs"], rollout["advice"], args)
        again = knowledge.advise(rules, {"image": rollout["obs"]}, 7)
    assert torch.allclose(output.log_probs.gather(1, rollout["action"].unsqueeze(1)).squeeze(1), rollout["log_prob"])
    assert torch.allclose(output.value, rollout["value"], atol=1e-5) and torch.equal(again, rollout["advice"])
    replay = envs.make_vec("MiniGrid-DoorKey-5x5-v0", 3, seed=1)
    seen = envs.to_tensors(replay.reset(1))["image"]
    for t in range(args.num_steps):  # rows are (step, copy): each has what was seen before its action
        assert torch.equal(rollout["obs"][3 * t:3 * t + 3], seen)
        seen = envs.to_tensors(replay.step(rollout["action"][3 * t:3 * t + 3].numpy())[0])["image"]


class Bandit:
    """Four copies of a task of two steps: reward 1 for the action that the observation, 0 or 1, names."""
    num_envs, action_space = 4, gym.spaces.Discrete(4)

    def __init__(self):
        self.rng, self.t = np.random.default_rng(0), 0
        self.state = self.rng.integers(0, 2, (4, 1)).astype(np.float32)

    def step(self, action):
        reward, self.t = (action == self.state[:, 0]).astype(float), self.t + 1
        self.state = self.rng.integers(0, 2, (4, 1)).astype(np.float32)
        return self.state, reward, np.full(4, self.t % 2 == 0), np.zeros(4, bool), {"final_obs": self.state}


def test_advantages_of_a_rollout_are_by_gamma_and_lambda():
    torch.manual_seed(0)
    args, task = Args(num_steps=2, gamma=0.9, gae_lambda=0.5), Bandit()
    agent, tally = Agent(args, (1,), 4, 0), {"open": torch.zeros(4, dtype=torch.float64), "returns": []}
    first = torch.from_numpy(task.state)
    rollout, _ = ppo_kian.collect(agent, task, first, lambda x: (x, torch.zeros(len(x), 0, 4)), tally, args)
    value, reward = rollout["value"].view(2, 4), (rollout["action"] == rollout["obs"][:, 0]).float().view(2, 4)
    second = reward[1] - value[1]  # the episode ends here
    assert torch.allclose(rollout["advantage"].view(2, 4)[1], second, atol=1e-6)
    expected = reward[0] + 0.9 * value[1] - value[0] + 0.9 * 0.5 * second
    assert torch.allclose(rollout["advantage"].view(2, 4)[0], expected, atol=1e-6)
    unfinished = replace(args, num_steps=1)  # cut in the middle of an episode: the value of the next state counts
    rollout, obs = ppo_kian.collect(agent, Bandit(), first, lambda x: (x, torch.zeros(len(x), 0, 4)), tally, unfinished)
    with torch.no_grad():
        following = agent.critic(agent.encoder(torch.from_numpy(obs.numpy()))).squeeze(1)
    reward = (rollout["action"] == rollout["obs"][:, 0]).float()
    assert torch.allclose(rollout["advantage"], reward + 0.9 * following - rollout["value"], atol=1e-5)


@pytest.mark.parametrize("actor", ["plain", "kian"])
def test_it_learns(actor):
    """With a rule that is right in state 0 and wrong in state 1, attention must leave it there."""
    torch.manual_seed(0)
    args, task = Args(actor=actor, num_steps=32, batch_size=64, entropy_coef=0.0), Bandit()
    agent, tally = Agent(args, (1,), 4, 1), {"open": torch.zeros(4, dtype=torch.float64), "returns": []}
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    obs, rule = torch.from_numpy(task.state), torch.tensor([[1.0, 0, 0, 0]])
    for _ in range(60):
        rollout, obs = ppo_kian.collect(agent, task, obs, lambda x: (x, rule.expand(len(x), 1, 4)), tally, args)
        ppo_kian.update(agent, optimizer, rollout, ppo_kian.ppo_loss, args)
    with torch.no_grad():
        output = agent(torch.tensor([[0.0], [1.0]]), rule.expand(2, 1, 4), args)
    p = output.log_probs.exp()
    bound = 1 / (1 + math.e**-2) if actor == "kian" else 1.0  # what cosines leave to the inner policy
    assert p[0, 0] > 0.9 and p[1, 1] > 0.9 * bound


def test_gradients_are_cut_to_their_length():
    torch.manual_seed(0)
    args = Args(actor="plain", epochs=1, batch_size=8, max_grad_norm=0.01)
    agent = Agent(args, (2,), 3, 0)
    rollout = {"obs": torch.randn(8, 2), "advice": torch.zeros(8, 0, 3), "action": torch.randint(0, 3, (8,)),
               "log_prob": torch.full((8,), -1.0), "advantage": torch.randn(8), "return": torch.randn(8),
               "value": torch.randn(8)}
    before = [p.detach().clone() for p in agent.parameters()]
    optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
    ppo_kian.update(agent, optimizer, rollout, ppo_kian.ppo_loss, args)
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(agent.parameters(), before)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)  # the length that gradients are cut to


def test_normalised_advantages_and_unclipped_values():
    agent = Agent(args := Args(entropy_coef=0.0, normalize_advantage=True, clip_values=False), (1,), 2, 0)
    for p in agent.parameters():
        p.data.zero_()
    batch = {"obs": torch.zeros(2, 1), "advice": torch.zeros(2, 0, 2), "action": torch.tensor([0, 1]),
             "log_prob": torch.tensor([.5, .5]).log(), "advantage": torch.tensor([3., 1.]),
             "return": torch.tensor([1., 1.]), "value": torch.tensor([-5., -5.])}
    scalars = ppo_kian.ppo_loss(agent, batch, args)[1]
    assert scalars["policy_loss"].item() == pytest.approx(0.0, abs=1e-6)  # +1 and -1
    assert scalars["value_loss"].item() == pytest.approx(1.0)  # clipped, it would be (-4.8 - 1)^2


def test_an_empty_observation_is_no_nan():
    agent = Agent(Args(), (2,), 4, 1)
    assert agent(torch.zeros(1, 2), torch.tensor([[[1.0, 0, 0, 0]]]), Args()).log_probs.isfinite().all()
