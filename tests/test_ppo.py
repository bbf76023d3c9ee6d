"""PPO and its forks: values against hand numbers, what must hold for any weights, what a rollout stores, and that all
of them learn. Resume, signals, evaluation and errors are in test_contract.py."""
import math
import sys
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
import knowledge
import runtime
from algos import ppo, ppo_a2t, ppo_bc, ppo_kian, ppo_kogun
from benchmarks import zero_shot
from errors import UserError

LN2 = math.log(2)
DOORKEY = "MiniGrid-DoorKey-5x5-v0"
RULES = ["minigrid.get_key", "minigrid.open_door", "minigrid.go_to_goal"]
SCRIPTS = {"ppo": ppo, "ppo_kian": ppo_kian, "ppo_kogun": ppo_kogun, "ppo_a2t": ppo_a2t, "ppo_bc": ppo_bc}


def make_agent(script, width, num_actions, n, args=None):
    """An agent on flat observations with n external policies."""
    agent_args = {ppo: (), ppo_bc: (), ppo_kian: (n, args or ppo_kian.Args())}.get(script, (n,))
    return script.Agent((width,), num_actions, *agent_args)


def make_batch(script, obs, advice=None, **fields):
    """One row per observation; what is not given is 0."""
    zeros = {name: torch.zeros(len(obs)) for name in ppo.Batch._fields}
    seen = obs if script is ppo else script.Seen(obs, torch.zeros(len(obs), 0, 2) if advice is None else advice)
    return script.Batch(**zeros | {"obs": seen, "action": torch.zeros(len(obs), dtype=torch.long)} | fields)


def zero(agent):
    """All weights 0: uniform probabilities, value 0."""
    for p in agent.parameters():
        p.data.zero_()
    return agent


# PPO

def test_advantages_by_hand():
    def column(*values):
        return torch.tensor(values).unsqueeze(1)
    args = column(0., 0., 1.), column(.5, .6, .7), torch.tensor([9.])
    assert ppo.gae(*args, column(0., 0., 1.), 0.99, 0.95).squeeze(1).tolist() == pytest.approx(
        [.446829, .375150, .300000], abs=1e-6)
    going_on = ppo.gae(*args, torch.zeros(3, 1), 0.99, 0.95)
    assert going_on[2].item() == pytest.approx(1 + 0.99 * 9 - 0.7)


def test_clipped_loss_by_hand():
    """p = (.5, .5), taken with .25 then: the ratio, 2, is cut to 1.2 for a gain and kept for a loss."""
    agent, args = zero(make_agent(ppo, 1, 2, 0)), ppo.Args(entropy_coef=0.1)
    batch = make_batch(ppo, torch.zeros(2, 1), action=torch.tensor([0, 1]), log_prob=torch.tensor([.25, .25]).log(),
                       advantage=torch.tensor([1., -1.]), target_value=torch.tensor([1., 1.]),
                       value=torch.tensor([0.5, 0.5]))  # new value 0, held at 0.3
    loss, scalars = ppo.ppo_loss(agent, batch, args)
    assert scalars["policy_loss"].item() == pytest.approx(-(1.2 - 2) / 2)
    assert scalars["value_loss"].item() == pytest.approx(1.0)  # the worse of 1 and 0.49
    assert loss.item() == pytest.approx(0.4 + 0.5 - 0.1 * LN2) and scalars["clip_fraction"] == 1.0
    assert scalars["entropy"].item() == pytest.approx(LN2)
    assert scalars["approx_kl"].item() == pytest.approx(2 - 1 - LN2)


def test_normalised_advantages_and_unclipped_values():
    agent = zero(make_agent(ppo, 1, 2, 0))
    args = ppo.Args(entropy_coef=0.0, normalize_advantage=True, clip_values=False)
    batch = make_batch(ppo, torch.zeros(2, 1), action=torch.tensor([0, 1]), log_prob=torch.tensor([.25, .5]).log(),
                       advantage=torch.tensor([3., 1.]), target_value=torch.tensor([1., 1.]),
                       value=torch.tensor([-5., -5.]))
    scalars = ppo.ppo_loss(agent, batch, args)[1]
    assert scalars["policy_loss"].item() == pytest.approx(-(1.2 - 1) / 2)  # advantages 1 and -1
    assert scalars["value_loss"].item() == pytest.approx(1.0)  # clipped, it would be (-4.8 - 1)^2


def test_gradients_are_cut_to_their_length():
    torch.manual_seed(0)
    agent = make_agent(ppo, 2, 3, 0)
    batch = make_batch(ppo, torch.randn(8, 2), advantage=torch.randn(8), target_value=torch.randn(8))
    before = [p.detach().clone() for p in agent.parameters()]
    ppo.update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), ppo.ppo_loss, batch, ppo.Args(max_grad_norm=0.01))
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(agent.parameters(), before)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_initial_weights_and_encoder():
    torch.manual_seed(0)
    layer = ppo.linear(10, 5)
    assert layer.weight.norm(dim=1).tolist() == pytest.approx([1] * 5) and not layer.bias.any()
    encoder, image = ppo.GridEncoder(), torch.randint(0, 11, (5, 7, 7, 3), dtype=torch.uint8)
    assert sum(p.numel() for p in encoder.parameters()) == 10_544
    x = image.permute(0, 3, 1, 2).float()
    for i, layer in enumerate(encoder.layers):  # three convolutions, the largest of 2x2 after the first
        kernel = layer.weight.view(len(layer.weight), 2, 2, -1).permute(0, 3, 1, 2)
        x = torch.nn.functional.conv2d(x, kernel, layer.bias).relu()
        x = torch.nn.functional.max_pool2d(x, 2) if i == 0 else x
    assert torch.allclose(encoder(image), x.flatten(1), atol=1e-4)


@pytest.mark.parametrize("bootstrap, terminated, counts", [(True, False, True), (True, True, False),
                                                           (False, False, False)])
def test_a_cut_episode_counts_with_the_value_of_its_last_state(bootstrap, terminated, counts):
    """Two copies of a task that ends in every step with reward 1 in state 5; the next episode starts in state 0."""
    class Task:
        num_envs, action_space = 2, gym.spaces.Discrete(3)

        def step(self, action):
            final, yes = np.full((2, 1), 5.0, np.float32), np.ones(2, bool)
            return np.zeros((2, 1), np.float32), np.ones(2), yes & terminated, yes, {"final_obs": final}
    torch.manual_seed(0)
    agent, args, scalars = make_agent(ppo, 1, 3, 0), ppo.Args(num_steps=3, bootstrap=bootstrap), runtime.Means()
    loop = {"obs": torch.zeros(2, 1), "open_return": torch.zeros(2, dtype=torch.float64)}
    rollout = ppo.collect(agent, Task(), lambda obs: obs, loop, scalars, args)
    with torch.no_grad():
        value, final_value = agent(torch.tensor([[0.0], [5.0]])).value
    expected = 1 + counts * args.gamma * final_value - value
    assert rollout.advantage.tolist() == pytest.approx([expected.item()] * 6, abs=1e-5)
    assert rollout.target_value.tolist() == pytest.approx([(expected + value).item()] * 6, abs=1e-5)
    assert scalars.take() == {"return": 1} and torch.equal(loop["obs"], torch.zeros(2, 1))


def test_a_rollout_has_what_was_seen_done_and_advised():
    torch.manual_seed(0)
    vec, args = envs.make_vec(DOORKEY, 3, seed=1), ppo_kian.Args(num_steps=5)
    obs = envs.to_tensors(vec.reset(1))
    external = knowledge.load("auto", DOORKEY, 7, obs, lowest=0.0)
    agent = ppo_kian.Agent((7, 7, 3), 7, 3, args)
    loop = {"obs": obs, "open_return": torch.zeros(3, dtype=torch.float64)}
    rollout = ppo_kian.collect(agent, vec, lambda x: ppo_kian.Seen(x["image"], knowledge.advise(external, x, 7)), loop,
                               runtime.Means(), args)
    with torch.no_grad():
        output = agent(rollout.obs)
    assert torch.allclose(output.log_probs.gather(1, rollout.action.unsqueeze(1)).squeeze(1), rollout.log_prob)
    assert torch.allclose(output.value, rollout.value, atol=1e-5)
    assert torch.equal(knowledge.advise(external, {"image": rollout.obs.view}, 7), rollout.obs.advice)
    replay = envs.make_vec(DOORKEY, 3, seed=1)
    seen = replay.reset(1)["image"]
    for t in range(args.num_steps):  # rows are (step, copy)
        rows = slice(3 * t, 3 * t + 3)
        assert np.array_equal(rollout.obs.view[rows], seen)
        seen = replay.step(rollout.action[rows].numpy())[0]["image"]
    assert np.array_equal(loop["obs"]["image"], seen)


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


def test_advantages_of_a_rollout():
    torch.manual_seed(0)
    args, task = ppo.Args(num_steps=2, gamma=0.9, gae_lambda=0.5), Bandit()
    agent, first = make_agent(ppo, 1, 4, 0), torch.from_numpy(task.state)
    loop = {"obs": first, "open_return": torch.zeros(4, dtype=torch.float64)}
    rollout = ppo.collect(agent, task, lambda obs: obs, loop, runtime.Means(), args)
    value, reward = rollout.value.view(2, 4), (rollout.action == rollout.obs[:, 0]).float().view(2, 4)
    second = reward[1] - value[1]  # the episode ends here
    assert torch.allclose(rollout.advantage.view(2, 4)[1], second, atol=1e-6)
    expected = reward[0] + 0.9 * value[1] - value[0] + 0.9 * 0.5 * second
    assert torch.allclose(rollout.advantage.view(2, 4)[0], expected, atol=1e-6)
    loop["obs"] = first  # stopped in the middle of an episode: the value of the next state counts
    rollout = ppo.collect(agent, Bandit(), lambda obs: obs, loop, runtime.Means(), replace(args, num_steps=1))
    with torch.no_grad():
        following = agent(loop["obs"]).value
    reward = (rollout.action == rollout.obs[:, 0]).float()
    assert torch.allclose(rollout.advantage, reward + 0.9 * following - rollout.value, atol=1e-5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_learns(name):
    """The advice is right in state 0 and wrong in state 1: an agent must not trust it there."""
    script = SCRIPTS[name]
    torch.manual_seed(0)
    args, task = script.Args(num_steps=32, batch_size=64, entropy_coef=0.0), Bandit()
    agent, advice = make_agent(script, 1, 4, 1, args), torch.tensor([[1.0, 0, 0, 0]])
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    loop = {"obs": torch.from_numpy(task.state), "open_return": torch.zeros(4, dtype=torch.float64)}

    def look(obs):
        return obs if script is ppo else script.Seen(obs, advice.expand(len(obs), 1, 4))
    for _ in range(40):
        rollout = script.collect(agent, task, look, loop, runtime.Means(), args)
        for index in torch.randperm(len(rollout.action)).repeat(args.epochs).split(args.batch_size):
            batch = ppo.tree_map(lambda x: x[index], rollout)
            script.update(agent, optimizer, script.ppo_loss, batch, args)
    with torch.no_grad():
        p = agent(look(torch.tensor([[0.0], [1.0]]))).log_probs.exp()
    bound = 1 / (1 + math.e**-2) if script is ppo_kian else 1.0  # what cosines leave to the inner policy
    assert p[0, 0] > 0.9 and p[1, 1] > 0.9 * bound


# KIAN

KEYS, LOGITS, ADVICE = [[1, 0], [0, 2], [-1, 0]], [0, 0, LN2], [[1, 0, 0], [0, 0, 0]]


def fused(query, keys, logits, advice):
    """Weights (n+1,) and probabilities (A,) of one state, in float64; silent policies act at random."""
    query, keys, logits = torch.tensor([query]).double(), torch.tensor(keys).double(), torch.tensor([logits]).double()
    scores, norms = ppo_kian.attention_scores(query, keys)
    joint, weights = ppo_kian.fuse(scores / norms, torch.log_softmax(logits, -1), torch.tensor([advice]).double(),
                                   norms[:, 1:], abstain=False)
    return weights[0], torch.logsumexp(joint, 1)[0].exp()


def test_attention_and_fusion():
    weights, p = fused([3, 4], KEYS, LOGITS, ADVICE)
    assert weights.tolist() == pytest.approx([.3964, .4842, .1194], abs=1e-4)
    assert p.tolist() == pytest.approx([.6230, .1389, .2380], abs=1e-4) and p.sum() == pytest.approx(1)
    scores, norms = ppo_kian.attention_scores(torch.tensor([[3., 4.]]), torch.tensor(KEYS).float())
    assert (scores / norms)[0].tolist() == pytest.approx([.6, .8, -.6]) and norms[0].tolist() == [5, 10, 5]


def test_a_draw_is_a_policy_by_weight_and_then_its_action():
    torch.manual_seed(0)
    weights, p = fused([3, 4], KEYS, LOGITS, ADVICE)
    policies = torch.tensor([[.25, .25, .5], [.99991, .0000454, .0000454], [1 / 3] * 3])
    who = torch.multinomial(weights.float(), 200_000, replacement=True)
    staged = torch.bincount(torch.multinomial(policies[who], 1).squeeze(1), minlength=3) / 200_000
    direct = (p.log() + ppo_kian.gumbel((200_000, 3))).argmax(1)
    assert staged.tolist() == pytest.approx(p.tolist(), abs=0.005)
    assert (torch.bincount(direct, minlength=3) / 200_000).tolist() == pytest.approx(p.tolist(), abs=0.005)


def test_without_external_policies_it_is_ppo():
    torch.manual_seed(0)
    plain, kian = make_agent(ppo, 4, 3, 0), make_agent(ppo_kian, 4, 3, 0)
    kian.load_state_dict(plain.state_dict(), strict=False)
    rows = dict(action=torch.tensor([0, 1, 2, 0, 1]), log_prob=torch.zeros(5) - 1, advantage=torch.ones(5),
                target_value=torch.ones(5))
    obs, losses = torch.randn(5, 4), []
    for script, agent in ((ppo, plain), (ppo_kian, kian)):
        loss, scalars = script.ppo_loss(agent, make_batch(script, obs, torch.zeros(5, 0, 3), **rows), script.Args())
        loss.backward()
        grads = {name: p.grad for name, p in agent.named_parameters()}
        losses.append([loss.item(), scalars["entropy"].item(), *(grads[name].sum().item() for name, _ in
                                                                 plain.named_parameters())])
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


def test_without_advice_a_policy_abstains():
    torch.manual_seed(0)
    agent, obs = make_agent(ppo_kian, 4, 5, 2), torch.randn(1, 4)
    output = agent(ppo_kian.Seen(obs, torch.tensor([[[0., 0, 0, 0, 0], [0, 1, 0, 0, 0]]])))
    weights = output.attention["attention"][0]
    assert weights[1] == 0 and weights.sum().item() == pytest.approx(1)
    scores, norms = agent.attend(agent.trunk(agent.encoder(obs)))
    cosines = (scores / norms)[0].tolist()
    assert (weights[2] / weights[0]).item() == pytest.approx(math.exp(cosines[2] - cosines[0]), rel=1e-4)
    alone = agent(ppo_kian.Seen(obs, torch.zeros(1, 2, 5)))  # all abstain: PPO, and what inner.pt2 has
    assert torch.allclose(alone.log_probs, alone.inner, atol=1e-6)
    assert torch.allclose(agent.inner(obs), alone.inner)


def test_sharpness_makes_advice_certain():
    torch.manual_seed(0)
    obs, advice = torch.randn(1, 4), torch.tensor([[[0., 0, 1, 0, 0]]])
    for sharpness in (1.0, 8.0):
        torch.manual_seed(0)
        agent = make_agent(ppo_kian, 4, 5, 1, ppo_kian.Args(sharpness=sharpness))
        output = agent(ppo_kian.Seen(obs, advice))
        _, norms = agent.attend(agent.trunk(agent.encoder(obs)))
        p = (output.joint[0, 1] - output.attention["attention"][0, 1].log()).exp()
        log_ratio = (p[2] / p[0]).log().item()
        assert log_ratio == pytest.approx(sharpness * norms[0, 1].item(), rel=1e-3)


def test_the_entropy_bonus_does_not_reach_external_policies():
    advice, obs = torch.tensor([[[1., 0, 0, 0]]]), torch.randn(1, 4)
    for entropy_of, reaches in (("inner", False), ("fused", True)):
        args = ppo_kian.Args(entropy_of=entropy_of, value_coef=0.0)
        agent = make_agent(ppo_kian, 4, 4, 1, args)
        ppo_kian.ppo_loss(agent, make_batch(ppo_kian, obs, advice), args)[0].backward()
        assert bool(agent.keys.grad.any()) == reaches and agent.actor.weight.grad.any()


def test_with_three_actions_logits_are_added():
    scores = torch.tensor([[3., 8., -3.]])  # products of E1
    p = ppo_kian.add_logits(scores, torch.tensor([[0., 0, LN2]]), torch.tensor([ADVICE]).float()).exp()[0]
    assert p.tolist() == pytest.approx(torch.softmax(torch.tensor([8., 0, 3 * LN2]), -1).tolist())
    torch.manual_seed(0)
    agent, obs = make_agent(ppo_kian, 4, 3, 2), torch.randn(2, 4)
    output = agent(ppo_kian.Seen(obs, torch.zeros(2, 2, 3)))  # the inner policy keeps the factor of its key
    assert output.joint is None and torch.allclose(output.log_probs, agent.inner(obs), atol=1e-6)
    assert not make_agent(ppo_kian, 4, 4, 2).adds_logits and not make_agent(ppo_kian, 4, 3, 0).adds_logits


def test_a_key_that_is_a_function_of_the_state():
    torch.manual_seed(0)
    agent = make_agent(ppo_kian, 4, 5, 2, ppo_kian.Args(inner_key="head"))
    hidden = torch.randn(3, ppo_kian.WIDTH)
    scores, _ = agent.attend(hidden)
    query = agent.query(hidden)
    assert torch.allclose(scores[:, 0], (query * agent.inner_key(hidden)).sum(1), atol=1e-5)
    assert torch.allclose(scores[:, 1:], query @ agent.keys[1:].T, atol=1e-5)


# the other forks

def test_kogun_reads_advice_and_a2t_adds_it():
    torch.manual_seed(0)
    obs, advice = torch.randn(1, 4), torch.tensor([[[1., 0, 0], [1, 1, 0]]])
    agent = make_agent(ppo_kogun, 4, 3, 2)
    told = agent.actor(agent.trunk(torch.cat([agent.encoder(obs), torch.tensor([[1., 0, 0, 1, 1, 0]])], 1)))
    assert torch.allclose(agent(ppo_kogun.Seen(obs, advice)).log_probs, torch.log_softmax(told, -1))
    agent = make_agent(ppo_a2t, 4, 3, 2)
    x = agent.encoder(obs)
    inner, first, second = torch.softmax(agent.query(x), -1)[0]
    logits = inner * agent.actor(agent.trunk(x))[0] + torch.stack([first + second, second, second * 0])
    assert torch.allclose(agent(ppo_a2t.Seen(obs, advice)).log_probs[0], torch.log_softmax(logits, -1), atol=1e-6)


def test_cloning_is_the_divergence_from_all_advice_together():
    agent, args = zero(make_agent(ppo_bc, 1, 2, 1)), ppo_bc.Args(bc_coef=1.0, entropy_coef=0.0, value_coef=0.0)
    batch = make_batch(ppo_bc, torch.zeros(1, 1), torch.tensor([[[1., 0.]]]), log_prob=torch.tensor([.5]).log())
    target = torch.softmax(torch.tensor([1., 0.]), -1)
    by_hand = (target * (target / 0.5).log()).sum() / 2  # the mean runs over the two actions as well
    assert ppo_bc.ppo_loss(agent, batch, args)[0].item() == pytest.approx(by_hand.item())


# runs

SMALL = dict(env=DOORKEY, num_envs=2, num_steps=32, batch_size=32, total_timesteps=64, eval_every=0, eval_episodes=2)


@pytest.fixture
def short_episodes(monkeypatch):
    """Untrained agents play to the time limit; 30 steps are enough here."""
    init = envs.minigrid.MiniGridVectorEnv.__init__
    monkeypatch.setattr(envs.minigrid.MiniGridVectorEnv, "__init__", lambda self, env_id, num_envs, **kwargs: init(
        self, env_id, num_envs, **{"max_steps": 30} | kwargs))


@pytest.mark.exports
@pytest.mark.parametrize("kwargs", [{}, dict(inner_key="head", sharpness=1.0, silent="uniform", entropy_of="fused"),
                                    dict(env="MiniGrid-Dynamic-Obstacles-5x5-v0")])
def test_a_run_leaves_the_probabilities_of_its_agent(kwargs, tmp_path, short_episodes):
    args = ppo_kian.Args(**SMALL | kwargs, run_dir=str(tmp_path / "run"), video=1)
    ppo_kian.main(args)
    obs = envs.to_tensors(envs.make_vec(args.env, 8).reset(3))
    num_actions = 7 if args.env == DOORKEY else 3
    external = knowledge.load("auto", args.env, num_actions, obs, lowest=0.0)
    agent = ppo_kian.Agent((7, 7, 3), num_actions, len(external), args)
    agent.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"])
    with torch.no_grad():
        p = agent(ppo_kian.Seen(obs["image"], knowledge.advise(external, obs, num_actions))).log_probs.exp()
        inner = agent.inner(obs["image"]).exp()
    for kind, expected in (("run", p), ("inner", inner)):
        left, = knowledge.load(f"{kind}:{tmp_path / 'run'}", args.env, num_actions, obs, lowest=0.0).values()
        assert torch.allclose(left(obs), expected, atol=1e-5)
    assert (tmp_path / "run" / "video" / "episode-0.mp4").stat().st_size > 1000
    assert (tmp_path / "run" / "video" / "attention-0.png").exists() == (args.env == DOORKEY)  # logits are no weights


def test_scalars_name_every_policy(tmp_path, monkeypatch, short_episodes):
    monkeypatch.setattr(ppo_kian, "LOG_EVERY", 64)
    ppo_kian.main(ppo_kian.Args(**SMALL, run_dir=str(tmp_path / "run")))
    rows = [line.split(",") for line in (tmp_path / "run" / "scalars.csv").read_text().splitlines()]
    logged = {name: float(value) for step, _, name, value in rows[1:] if step == "64"}
    assert logged.keys() >= {f"{kind}/{name}" for kind in ("attention", "key_norm") for name in ("inner", *RULES)}
    assert {name for name in logged if name.startswith("sharpness/")} == {f"sharpness/{name}" for name in RULES}
    assert sum(value for name, value in logged.items() if name.startswith("attention/")) == pytest.approx(1, abs=1e-4)
    assert logged.keys() >= {"policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "return"}


def test_elsewhere_a_run_keeps_its_external_policies(tmp_path, capsys, short_episodes):
    folder = str(tmp_path / "run")
    ppo_kian.main(ppo_kian.Args(**SMALL, run_dir=folder))
    for env in ("MiniGrid-DoorKey-8x8-v0", "MiniGrid-Empty-8x8-v0"):  # auto means others there
        ppo_kian.main(runtime.cli(ppo_kian.Args, "ppo_kian", ["--evaluate", folder, "--env", env]))
        assert f"{env} after 64 steps" in capsys.readouterr().out
    obstacles = ["--evaluate", folder, "--env", "MiniGrid-Dynamic-Obstacles-5x5-v0"]  # three actions, not seven
    with pytest.raises(UserError, match="one action per observation"):
        ppo_kian.main(runtime.cli(ppo_kian.Args, "ppo_kian", obstacles))
    plain = str(tmp_path / "plain")
    ppo.main(ppo.Args(**SMALL, run_dir=plain))
    with pytest.raises(UserError, match="other observations or actions"):
        ppo.main(runtime.cli(ppo.Args, "ppo", ["--evaluate", plain, *obstacles[2:]]))


@pytest.mark.exports
def test_a_run_goes_on_in_the_next_task(tmp_path, monkeypatch, short_episodes):
    """Known names keep their keys, the old inner policy becomes an external one, the query comes along."""
    first, started = tmp_path / "first", {}
    ppo_kian.main(ppo_kian.Args(**SMALL, run_dir=str(first)))
    monkeypatch.setattr(ppo_kian, "update", lambda agent, *_: started.update(
        {k: p.clone() for k, p in agent.state_dict().items()}) or {})
    ppo_kian.main(ppo_kian.Args(**SMALL | dict(env="MiniGrid-Unlock-v0"), init_from=str(first),
                                knowledge="minigrid.avoid_ball,minigrid.get_key", run_dir=str(tmp_path / "next")))
    old, keys = torch.load(first / "checkpoint.pt", weights_only=True)["agent"], started["keys"]
    assert len(keys) == 4 and torch.equal(keys[2], old["keys"][1]) and torch.equal(keys[3], old["keys"][0])
    assert not torch.equal(keys[0], old["keys"][0])
    for part in ("encoder", "trunk", "query", "actor"):
        same = all(torch.equal(p, old[k]) for k, p in started.items() if k.startswith(f"{part}."))
        assert same == (part != "actor"), part


@pytest.mark.slow
def test_zero_shot_scores_become_rows(tmp_path, monkeypatch, short_episodes):
    folder = str(tmp_path / "run")
    ppo.main(ppo.Args(**SMALL, run_dir=folder))
    monkeypatch.setattr(zero_shot, "RESULTS", tmp_path)
    test = "--env MiniGrid-Empty-5x5-v0 --eval-episodes 2"
    monkeypatch.setattr(sys, "argv", ["zero_shot.py", folder, "--test", test])
    assert zero_shot.main() == zero_shot.main() == 0  # the second time replaces the row
    row, = zero_shot.load(tmp_path / "zero_shot" / "ppo.csv")
    assert row["test"] == test and row["trained_in"] == DOORKEY and row["step"] == "64" and row["episodes"] == "2"
    assert 0 <= float(row["return_mean"]) <= 1
    monkeypatch.setattr(sys, "argv", ["zero_shot.py", folder, "--test", "--env MiniGrid-Emty-5x5-v0"])
    with pytest.raises(ValueError, match="did you mean"):
        zero_shot.main()
