"""Stream AC, Q, SARSA, TD: the spec's vectors, the closed form against autograd, invariants, transitions by hand.

What all scripts do (resume, signals, --evaluate, wrong flags) is in test_contract.py.
"""
import csv
import inspect
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies
from torch.utils._pytree import tree_map

import envs
import knowledge
import runtime
import streamnet
from algos import stream_ac, stream_q, stream_td
from algos.stream_ac import Args, obgd
from benchmarks import stream_autograd
from streamnet import (Net, add_sample, backward, deviation, forward, forward_batch, make_net, observe, reward_stats,
                       running_stats, scale_reward, sparse_init, views)
from tests import need_renderer

ROOT = Path(__file__).resolve().parent.parent
AUTOGRAD = {stream_ac: stream_autograd.update_ac, stream_q: stream_autograd.update_q,
            stream_td: stream_autograd.update_td}
GRADS = torch.tensor([[0.1, -0.2], [0.3, 0.4], [-1.0, 2.0], [0.05, 0.0], [-0.3, 0.1]])
DELTAS, CUTS = torch.tensor([0.5, -2.0, 0.25, 1.5, 3.0]), [0.0, 0.0, 1.0, 0.0, 0.0]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def near(x, expected, tolerance=2e-6):
    x, expected = torch.as_tensor(x).double().flatten(), torch.as_tensor(expected).double().flatten()
    assert x.shape == expected.shape and (x - expected).abs().max() <= tolerance, (x, expected)


def learner_of(weights, optimizer="obgd"):
    learner = {"weights": torch.tensor(weights), "trace": torch.zeros(len(weights))}
    if optimizer == "adaptive":
        learner |= {"square": torch.zeros(len(weights)), "count": torch.zeros(1)}
    return learner


@pytest.mark.parametrize("optimizer, kappa, weights", [
    ("obgd", 2.0, [[0.95, -0.9], [1.255412, -0.705412], [1.285664, -0.800160], [1.210664, -0.800160],
                   [1.571930, -0.938895]]),
    ("obgd", 3.0, [[0.95, -0.9], [1.153608, -0.770275], [1.173776, -0.833440], [1.098776, -0.833440],
                   [1.339620, -0.925930]]),
    ("adaptive", 2.0, [[0.875, -0.875], [1.127348, -0.627348], [1.156335, -0.723360], [0.964848, -0.723360],
                       [1.290802, -0.897406]])])
@pytest.mark.parametrize("reference", [False, True])
def test_obgd_vectors(optimizer, kappa, weights, reference):
    learner, args = learner_of([1.0, -1.0], optimizer), Args(optimizer=optimizer)
    traces = [[0.1, -0.2], [0.3792, 0.2416], [0, 0], [0.05, 0], [-0.2604, 0.1]]
    for grad, delta, cut, w, z in zip(GRADS, DELTAS, CUTS, weights, traces):
        if reference:  # a layer of one weight and one bias
            stream_autograd.obgd(learner, Net(((1, 1),), ()), [grad[:1].view(1, 1), grad[1:]], delta.item(),
                                 bool(cut), kappa, args)
        else:
            obgd(learner, grad, delta.view(1), torch.tensor([cut]), kappa, args)
        near(learner["weights"], w)
        near(learner["trace"], z)
    if optimizer == "adaptive":
        near(learner["square"], [0.00122236, 0.00063227], 1e-8)


def test_obgd_two_tensors_share_one_bound():
    grads = [torch.tensor([0.6, -0.4]), torch.tensor([[2.0]])]
    learner = learner_of([1.0, 2.0, 0.5])
    obgd(learner, torch.cat([g.flatten() for g in grads]), torch.tensor([-1.5]), torch.zeros(1), 3.0, Args())
    near(learner["weights"], [1.066667, 1.955556, 0.722222])


@settings(max_examples=40, deadline=None)
@given(strategies.integers(0, 2 ** 31), strategies.floats(-20, 20), strategies.floats(-3, 2),
       strategies.sampled_from([2.0, 3.0]))
def test_obgd_bound(seed, delta, log_scale, kappa):
    """|dw|_1 <= min(1, |delta|) / kappa, with equality where the bound bites; then alpha does not matter."""
    g = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 10 ** log_scale
    moved = []
    for alpha in (1.0, 10.0):
        learner = learner_of([0.0] * 40)
        step, size = obgd(learner, g, torch.tensor([delta]), torch.zeros(1), kappa, Args(learning_rate=alpha))
        moved.append(learner["weights"])
        assert learner["weights"].abs().sum() <= min(1, abs(delta)) / kappa + 1e-6
    if max(abs(delta), 1) * kappa * size >= 1:
        assert moved[0].abs().sum().item() == pytest.approx(min(1, abs(delta)) / kappa, abs=1e-5)
        assert torch.allclose(*moved, atol=1e-6)


def test_obgd_zero_delta_and_cut():
    """delta = 0 moves no weight but the trace goes on; a cut comes after the same update and leaves nothing behind."""
    for cut in (0.0, 1.0):
        learner = learner_of([1.0, -1.0])
        obgd(learner, GRADS[0], torch.zeros(1), torch.zeros(1), 2.0, Args())
        near(learner["weights"], [1, -1], 0)
        near(learner["trace"], GRADS[0], 0)
        obgd(learner, GRADS[1], torch.tensor([-2.0]), torch.tensor([cut]), 2.0, Args())
        near(learner["trace"], [0, 0] if cut else [0.3792, 0.2416])
        moved = learner["weights"].clone() if not cut else moved
        obgd(learner, GRADS[2], torch.zeros(1), torch.zeros(1), 2.0, Args())
    near(learner["weights"], moved, 0)
    near(learner["trace"], GRADS[2], 0)
    plain = learner_of([1.0, -1.0])
    obgd(plain, GRADS[1], torch.tensor([-2.0]), torch.zeros(1), 2.0, Args(optimizer="plain", learning_rate=0.1))
    near(plain["weights"], [1.06, -0.92])


@pytest.mark.parametrize("shape, zeros", [
    ((7, 5), 5), ((7, 17), 16), ((7, 18), 17), ((9, 128), 116), ((3, 1024), 922), ((16, 4, 3, 3), 33),
    ((32, 4, 8, 8), 231), ((64, 32, 4, 4), 461), ((64, 64, 3, 3), 519)])
def test_sparse_init(shape, zeros):
    net = Net((shape, (2, 100)), (0,))
    ((weight, bias), _) = views(sparse_init(net, 0.9), net)
    flat, bound = weight.flatten(1), 1 / math.sqrt(math.prod(shape[1:]))
    assert weight.shape == shape and ((flat == 0).sum(1) == zeros).all() and not bias.any()
    assert flat.abs().max() <= bound
    if shape[1:] == (128,):
        assert (flat != 0).float().unique(dim=0).shape[0] == shape[0]  # every unit loses other weights
        assert flat.abs().max() > 0.8 * bound
        assert (sparse_init(net, 0.0)[:math.prod(shape)] != 0).all()


def test_sparse_init_leaves_a_tenth_of_any_width():
    for n in range(1, 300):
        weights = sparse_init(Net(((3, n), (1, 10)), ()), 0.9)[:3 * n].view(3, n)
        assert ((weights == 0).sum(1) == -(-9 * n // 10)).all()


def test_welford_vectors():
    xs = torch.tensor([[1.0, 10], [2, 10], [4, 13], [3, 9], [-5, 10]]).double()
    stats = running_stats(2)
    out = torch.stack([observe(stats, x, None, 1, True) for x in xs])
    near(out, [(0, 0), (0.707107, 0), (1.091089, 1.154701), (0.387298, -0.866025), (-1.697056, -0.263752)])
    near(stats["mean"], [1, 10.4])
    near(deviation(stats).square(), [12.5, 2.3])
    before = {k: v.clone() for k, v in stats.items()}
    observe(stats, xs[0], None, 1, True, learn=False)
    assert all(torch.equal(before[k], stats[k]) for k in stats)
    samples, stats = torch.randn(50, 3).double() * 100 + 1000, running_stats(3)
    for n, x in enumerate(samples, 1):
        add_sample(stats, x)
        if n >= 2:
            near(deviation(stats), samples[:n].numpy().std(0, ddof=1), 1e-6)


def test_reward_scaler_vectors():
    rewards = [(1, 0), (2, 0), (-1, 0), (5, 1), (1, 0), (0, 0), (3, 0)]
    stats = reward_stats()
    u, var, out = [], [], []
    for r, ended in rewards:
        scaled = scale_reward(stats, torch.tensor([r]).double(), torch.tensor([ended]).double(), 0.99, True)
        assert np.sign(scaled.item()) == np.sign(r)
        u, var, out = u + [stats["return"].item()], var + [deviation(stats).square().item()], out + [scaled.item()]
    near(torch.tensor(u), [1, 2.99, 1.9601, 5, 5.95, 5.8905, 8.831595])
    near(torch.tensor(var), [1, 1.980050, 0.990431, 2.935307, 4.265479, 4.462802, 7.337961])
    near(torch.tensor(out), [1, 1.421320, -1.004819, 2.918390, 0.484190, 0, 1.107474])
    stats = reward_stats()
    for r in [0] * 99 + [1]:
        scaled = scale_reward(stats, torch.tensor([r]).double(), torch.zeros(1).double(), 0.99, True)
    assert scaled.item() == pytest.approx(10, abs=1e-4)


class Toy(gym.Env):
    """The spec's wrapper stack: observations are the Welford rows, reward k at step k, four steps."""
    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64), gym.spaces.Box(-1, 1, (1,))
    ROWS = np.array([[1.0, 10], [2, 10], [4, 13], [3, 9], [-5, 10]])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.k = 0
        return self.ROWS[0], {}

    def step(self, action):
        self.k += 1
        return self.ROWS[self.k], float(self.k), False, False, {}


if "Toy-v0" not in gym.registry:
    gym.register("Toy-v0", Toy, max_episode_steps=4)


def test_stack_of_normaliser_scaler_and_time():
    env, stats, scaler = envs.StreamEnv("Toy-v0"), running_stats(2), reward_stats()

    def look(obs):
        return observe(stats, torch.from_numpy(obs), None, 1, True)
    near(look(env.reset(0)), [0, 0, -0.5])
    expected = [((0.707107, 0, -0.5), 1), ((1.091089, 1.154701, -0.25), 1.421320),
                ((0.387298, -0.866025, 0), 1.201857), ((-1.697056, -0.263752, 0.25), 1.935617)]
    for k, (state, scaled) in enumerate(expected):
        obs, reward, terminated, truncated, over = env.step(np.zeros(1))
        assert (terminated, truncated, over) == (False, k == 3, k == 3)
        near(look(obs), state)
        inputs = torch.tensor([reward]).double(), torch.tensor([truncated]).double()
        near(scale_reward(scaler, *inputs, 0.99, True), [scaled])
    near(look(env.reset()), [0, -0.243975, -0.5])


def test_policy_gradient_vectors():
    def gaussian(mean, q, action, sign):
        return stream_ac.policy_gradient([torch.tensor([mean]), torch.tensor([q])], torch.tensor([action]),
                                         torch.tensor(sign), 0.01)
    for inputs, grads in (((0.2, -0.3, 0.9, 1.0), (-2.277832, -0.464038)),
                          ((0.2, -0.3, 0.9, -1.0), (-2.277832, -0.448685)),
                          ((-1.0, 0.5, -1.2, 1.0), (0.210787, 0.605695))):
        (g_mean, g_q), entropy, _ = gaussian(*inputs)
        near(torch.cat([g_mean, g_q]), grads)
    assert gaussian(0.2, -0.3, 0.9, 1.0)[1].item() == pytest.approx(0.828989, abs=1e-6)
    logits, action = torch.tensor([0.2, -0.4, 0.6]), torch.tensor([0.0, 1, 0])
    for outputs in ([logits], [logits, -logits]):  # an error of zero: no entropy in the gradient
        zero, none = (stream_ac.policy_gradient(outputs, action, torch.tensor(sign), tau)[0]
                      for sign, tau in ((0.0, 0.5), (1.0, 0.0)))
        near(torch.cat(zero), torch.cat(none), 0)
    (g,), entropy, _ = stream_ac.policy_gradient([logits], action, torch.tensor(-1.0), 0.01)
    near(g, [0.329168, -0.818266, 0.489098])
    assert entropy.item() == pytest.approx(1.024111, abs=1e-6)


def test_layer_norm_vectors():
    """One hidden layer that passes (1, 2, 3, 6) on, one head: output and the gradient at the bias."""
    net = Net(((4, 1), (1, 4)), (0,))
    flat = torch.cat([torch.zeros(4), torch.tensor([1.0, 2, 3, 6]), torch.tensor([1.0, -2, 0.5, 3]), torch.zeros(1)])
    (_, ), cache = forward(flat, net, torch.ones(1), True)
    near(cache[-1], [-0.010690, -0.005345, 0, 1.603567])
    near(backward(flat, net, cache, [torch.ones(1)], True)[4:8], [0.292362, -0.067293, -0.397550, 0.172482])


def test_sizes_and_first_values():
    env = envs.StreamEnv("HalfCheetah-v4")
    agent, nets = stream_ac.make_agent(Args(), env)
    assert (len(agent["policy"]["weights"]), len(agent["value"]["weights"])) == (20_492, 19_073)
    outputs = forward(torch.zeros(20_492), nets["policy"], torch.randn(18), True)[0]
    _, entropy, std = stream_ac.policy_gradient(outputs, torch.zeros(6), torch.zeros(1), 0.01)
    assert std.item() == pytest.approx(0.693147, abs=1e-6) and entropy.item() == pytest.approx(6 * 1.052426, abs=1e-5)
    cart = envs.StreamEnv("CartPole-v1")
    agent, nets = stream_q.make_agent(stream_q.Args(), cart)  # five inputs: the first layer starts dead, and learns
    assert forward(agent["value"]["weights"], nets["value"], torch.randn(5), True)[0][0].tolist() == [0, 0]
    assert make_net("atari", (4, 84, 84), [256], [3]).weights[3] == (256, 256)
    assert make_net("minatar", (4, 10, 10), [128], [3]).weights[1] == (128, 1024)


def test_epsilon():
    values = [stream_q.epsilon(t, 0.05 * 500_000, stream_q.Args()) for t in (0, 1, 12_500, 25_000, 500_000)]
    assert values == pytest.approx([1, 0.99996, 0.505, 0.01, 0.01], abs=1e-6)


class Shape:
    """What `make_agent` asks of an environment."""
    def __init__(self, kind, shape, space, frames=1):
        self.kind, self.shape, self.action_space, self.frames = kind, shape, space, frames
        self.size = math.prod(shape) + (kind == "vector")


BOX, FOUR = gym.spaces.Box(-1, 1, (6,)), gym.spaces.Discrete(4)


def random_run(script, env, steps, compiled=False, **kwargs):
    """A script's own `step` on random transitions with random ends; returns the agent afterwards."""
    args = script.Args(**kwargs)
    torch.manual_seed(0)
    learn = script.step
    if script is stream_td:
        agent, nets = script.make_agent(args, 7)
        state = observe(agent["obs"], script.average(agent, torch.randn(7).double(), args), None, 1, args.normalize_obs)
        row = torch.zeros(9).double()
        if compiled:
            learn = runtime.compile_for(script.step, streamnet.COMPILED, agent, nets, state, row, args)
        for _ in range(steps):
            row[:8], row[8] = torch.randn(8), args.gamma
            state, *_ = learn(agent, nets, state, row, args)
        return agent
    agent, nets = script.make_agent(args, env)
    actions = env.action_space.n if env.action_space is FOUR else 6
    state = observe(agent["obs"], torch.randn(env.size).double(), None, env.frames, args.normalize_obs)
    action, row = script.choose(agent, nets, state, torch.zeros(actions), args), torch.zeros(env.size + 3).double()
    if compiled:
        learn = runtime.compile_for(script.step, streamnet.COMPILED, agent, nets, state, action, row,
                                    torch.zeros(actions), env.frames, args)
    for k in range(steps):
        row, noise, ended = torch.randn(env.size + 3).double(), torch.randn(actions), k % 37 == 36
        row[-2:] = torch.tensor([ended, args.gamma * (not ended)])
        if script is stream_q:
            noise = torch.eye(actions)[k % actions] * (k % 3 == 0)
        state, action, *_ = learn(agent, nets, state, action, row, noise, env.frames, args)
    return agent


VECTOR, DISCRETE = Shape("vector", (17,), BOX), Shape("vector", (17,), FOUR)


@pytest.mark.parametrize("script, env, steps, kwargs", [
    (stream_ac, DISCRETE, 100, dict(hidden="48x1")),
    (stream_ac, VECTOR, 100, dict(optimizer="adaptive", entropy_coef=0.1, hidden="32x2")),
    (stream_ac, VECTOR, 100, dict(layer_norm=False, sparsity=0.0, hidden="32x3", optimizer="plain",
                                  learning_rate=1e-4, normalize_obs=False, scale_reward=False)),
    (stream_ac, Shape("minatar", (4, 10, 10), FOUR), 20, dict(hidden="32x1")),
    (stream_q, Shape("atari", (1, 84, 84), FOUR, 4), 3, {}), (stream_q, DISCRETE, 100, dict(sarsa=True)),
    (stream_ac, VECTOR, 1000, dict(hidden="32x2", compile=True)),
    (stream_q, DISCRETE, 300, dict(hidden="32x1")),
    (stream_q, DISCRETE, 100, dict(hidden="32x1", compile=True, sarsa=True, optimizer="adaptive")),
    (stream_td, None, 100, dict(hidden="32x1", obs_trace=0.9))])
def test_closed_form_is_autograd(script, env, steps, kwargs):
    """Weights and traces after many updates on random transitions: those of autograd, within 1e-6 (traces: 1e-4)."""
    fast = random_run(script, env, steps, compiled=kwargs.pop("compile", False), **kwargs)
    with mock.patch.object(script, "update", AUTOGRAD[script]):
        slow = random_run(script, env, steps, **kwargs)
    for name in {"policy", "value"} & set(fast):
        assert fast[name]["weights"].abs().max() < 10  # all of it numbers
        near(fast[name]["weights"], slow[name]["weights"], 1e-6 * max(1.0, slow[name]["weights"].abs().max().item()))
        scale = max(1.0, slow[name]["trace"].abs().max().item())
        near(fast[name]["trace"] / scale, slow[name]["trace"] / scale, 1e-4)
    near(fast["obs"]["square"], slow["obs"]["square"], 1e-6)
    error = (fast["totals"] - slow["totals"]) / slow["totals"].abs().clamp(min=1e-3)
    near(error, torch.zeros(len(script.SCALARS)), 1e-3)


@pytest.mark.parametrize("script, env", [(stream_ac, VECTOR), (stream_q, DISCRETE), (stream_td, None)])
def test_what_is_logged_has_the_right_name(script, env):
    """After one transition: the trace's L1 norm, the step that bound gives, and whether it is below alpha."""
    agent, args = random_run(script, env, 1), script.Args()
    logged = dict(zip(script.SCALARS, agent["totals"].tolist(), strict=True))
    for name in {"policy", "value"} & set(agent):
        kappa = args.kappa_policy if name == "policy" else args.kappa_value
        trace = agent[name]["trace"].abs().sum().item()
        bound = min(args.learning_rate, 1 / (kappa * max(logged["abs_delta"], 1.0) * trace))
        assert logged[f"trace_{name}"] == pytest.approx(trace, rel=1e-5) and trace > 1
        assert logged[f"step_{name}"] == pytest.approx(bound, rel=1e-5)
        assert logged[f"capped_{name}"] == float(bound < args.learning_rate)
    if script is stream_ac:
        assert logged["trace_policy"] != logged["trace_value"] and logged["std"] == pytest.approx(math.log(2), rel=0.2)


def transition(agent, nets, script, env, args, ended=0.0, action=None):
    torch.manual_seed(1)
    state, next_state = torch.randn(2, env.size)
    inputs = (torch.ones(1), torch.tensor([0.99 * (1 - ended)]), torch.tensor([ended]), args)
    if script is stream_q:
        return script.update(agent, nets, state, action, next_state, None, *inputs)
    return script.update(agent, nets, state, torch.randn(6), next_state, *inputs)


def test_trace_is_cut_at_ends_and_after_exploration():
    env, args = DISCRETE, stream_q.Args()
    for sarsa in (False, True):
        args = replace(args, sarsa=sarsa)
        torch.manual_seed(0)
        agent, nets = stream_q.make_agent(args, env)
        torch.manual_seed(1)
        (q,), _ = forward(agent["value"]["weights"], nets["value"], torch.randn(2, 18)[0], True)
        best, other = torch.eye(4)[q.argmax()], torch.eye(4)[q.argmin()]
        for action, ended, kept in ((best, 0.0, True), (other, 0.0, sarsa), (best, 1.0, False)):
            fresh = tree_map(torch.clone, agent)
            transition(fresh, nets, stream_q, env, args, action=action, ended=ended)
            assert bool(fresh["value"]["trace"].any()) == kept
            assert not torch.equal(fresh["value"]["weights"], agent["value"]["weights"])

    fresh, nets = stream_ac.make_agent(Args(), VECTOR)
    transition(fresh, nets, stream_ac, VECTOR, Args())
    assert fresh["policy"]["trace"].any() and fresh["value"]["trace"].any()  # not the end: kept


def test_dead_network_moves_its_bias():
    """All weights zero, target 5, the end: v = 0.5 = delta / (kappa |delta|)."""
    net = Net(((8, 3), (8, 8), (1, 8)), (0, 0))
    flat = torch.zeros(sum(math.prod(s) + s[0] for s in net.weights))
    agent = {"value": {"weights": flat, "trace": torch.zeros_like(flat)}}
    delta, *_ = stream_td.update(agent, {"value": net}, torch.randn(3), torch.randn(3), torch.tensor([5.0]),
                                 torch.zeros(1), stream_td.Args())
    assert delta.item() == 5 and forward(flat, net, torch.randn(3), True)[0][0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("reward", [5.0, -5.0])
def test_entropy_bonus_widens_the_policy_whatever_the_sign_of_delta(reward):
    """At |a - mean| = std the log-probability does not care about std: what is left is the entropy."""
    args, env = Args(entropy_coef=1.0), VECTOR
    torch.manual_seed(0)
    agent, nets = stream_ac.make_agent(args, env)
    state, next_state = torch.randn(2, 18)

    def std():
        return F.softplus(forward(agent["policy"]["weights"], nets["policy"], state, True)[0][1])
    mean = forward(agent["policy"]["weights"], nets["policy"], state, True)[0][0]
    before = std()
    stream_ac.update(agent, nets, state, mean + before, next_state, torch.tensor([reward]), torch.zeros(1),
                     torch.ones(1), args)
    assert std().mean() > before.mean()
    assert not agent["policy"]["trace"].any() and not agent["value"]["trace"].any()


# -- runs

SMALL = dict(eval_every=200, eval_episodes=1, checkpoint_every=200, total_timesteps=600, hidden="16x2", compile=False)


def train(script, folder, **kwargs):
    few = {k: v for k, v in SMALL.items() if k != "eval_episodes" or script is not stream_td}
    return script.main(script.Args(**{**few, "run_dir": str(folder), **kwargs}))


def go_on(script, folder, **kwargs):
    flags = [word for name, value in kwargs.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return script.main(runtime.cli(script.Args, script.ALGO, ["--resume", str(folder), *flags]))


def curve(folder, name="eval.csv"):
    with (Path(folder) / name).open() as file:
        return [{k: v for k, v in row.items() if k != "wall_s"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("script, kwargs", [
    (stream_ac, dict(env="HalfCheetah-v4", max_episode_steps=70)), (stream_td, {}),
    (stream_q, dict(env="Acrobot-v1", sarsa=True, max_episode_steps=70, exploration_fraction=0.5))])
def test_sums_and_episodes_go_on_in_a_resumed_run(script, kwargs, tmp_path, monkeypatch):
    """Given more steps in the middle of an episode, and between two logs: the rows of the run that was never cut."""
    monkeypatch.setattr(script, "LOG_EVERY", 100)
    monkeypatch.setattr(script, "CHECK_EVERY", 5)
    train(script, tmp_path / "uncut", total_timesteps=350, **kwargs)
    if script is stream_q:  # exploration is planned when a run begins, here over 175 steps in both
        kwargs = kwargs | dict(exploration_fraction=0.7)
    train(script, tmp_path / "run", total_timesteps=250, **kwargs)
    go_on(script, tmp_path / "run", total_timesteps=350)
    for name in ("eval.csv", "scalars.csv"):
        assert [row for row in curve(tmp_path / "run", name) if row["step"] != "250"] == curve(tmp_path / "uncut", name)
    if script is not stream_td:  # the paper's protocol: the raw return of every episode, at the step of its end
        rows = curve(tmp_path / "run", "scalars.csv")
        lengths = [float(row["value"]) for row in rows if row["name"] == "length"]
        assert [int(row["step"]) for row in rows if row["name"] == "return"] == np.cumsum(lengths).tolist()


LOOPS = [(stream_ac, {}), (stream_q, {}), (stream_q, dict(sarsa=True))]


def play_script(script, folder, **kwargs):
    """Both episodes of the scripted environment, raw; returns what its instance received."""
    kwargs = dict(total_timesteps=5, time_feature=False, normalize_obs=False, scale_reward=False) | kwargs
    train(script, folder, env="Scripted-v0" if script is stream_ac else "ScriptedDiscrete-v0", **kwargs)
    return Scripted.made[-2].received  # the last one evaluates


@pytest.mark.parametrize("flag, counts", [("auto", 0), ("on", 1)])
@pytest.mark.parametrize("script, kwargs", LOOPS)
def test_transitions_of_two_episodes(script, kwargs, flag, counts, tmp_path, monkeypatch):
    """One terminated, one truncated: time-outs cut traces, and count as terminal unless asked otherwise."""
    seen, decisions, update, names = [], [], script.update, list(inspect.signature(script.update).parameters)

    def recording(*inputs):
        seen.append({name: x.clone() for name, x in zip(names, inputs) if torch.is_tensor(x)})
        return update(*inputs)

    monkeypatch.setattr(script, "update", recording)
    if script is stream_q:
        kwargs = kwargs | dict(exploration_fraction=1000.0)  # nearly all actions are uniform ones
        epsilon = script.epsilon
        monkeypatch.setattr(script, "epsilon", lambda *args: decisions.append(epsilon(*args)) or decisions[-1])
    received = play_script(script, tmp_path / "run", bootstrap_on_truncation=flag, **kwargs)

    def column(name):
        return torch.cat([one[name] for one in seen])
    near(column("state"), [0, 1, 2, 4, 5], 0)
    near(column("next_state"), [1, 2, 3, 5, 6], 0)
    near(column("reward"), [10, 20, 30, 50, 60], 0)
    near(column("ended"), [0, 0, 1, 0, 1], 0)
    near(column("discount"), [0.99, 0.99, 0, 0.99, 0.99 * counts], 1e-7)
    actions = torch.stack([one["action"] for one in seen])
    if script is stream_ac:  # learned from as drawn, clipped on the way to the environment alone
        assert actions.abs().max() > 0.1
        near(np.concatenate(received), actions.clamp(-0.1, 0.1), 0)
    else:
        assert received == actions.argmax(1).tolist()
        shares = [1 - 0.99 * k / 5000 for k in ((1, 2, 3, 4, 5, 6) if "sarsa" in kwargs else (1, 2, 3, 4, 4, 5, 6, 6))]
        assert decisions == pytest.approx(shares, abs=1e-12)  # SARSA does not choose anew after a reset
        for one, later in zip(seen, seen[1:]):
            assert "sarsa" not in kwargs or torch.equal(one["next_action"], later["action"])
    stats = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]["obs"]
    assert stats["count"].item() == 8 and stats["mean"].item() == pytest.approx(3.5)  # observations of resets count


@pytest.mark.parametrize("learning_rate, share", [(3.0, 1.0), (1e-9, 0.0)])
@pytest.mark.parametrize("script, kwargs", LOOPS)
def test_overshoot_is_an_error_that_changed_its_sign(script, kwargs, learning_rate, share, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "CHECK_EVERY", 1)
    monkeypatch.setattr(script, "LOG_EVERY", 5)
    play_script(script, tmp_path / "run", gamma=0.0, optimizer="plain", learning_rate=learning_rate, **kwargs)
    logged = [row["value"] for row in curve(tmp_path / "run", "scalars.csv") if row["name"] == "overshoot"]
    assert list(map(float, logged)) == [share]


@pytest.mark.parametrize("script, kwargs", [*LOOPS, (stream_td, {})])
def test_overshoot_is_about_the_error_that_the_update_has(script, kwargs, tmp_path, monkeypatch):
    learn, names, worth = script.update, list(inspect.signature(script.update).parameters), []

    def comparing(*inputs):
        given = dict(zip(names, inputs, strict=True))
        before = script.td_error(*(given[name] for name in inspect.signature(script.td_error).parameters))
        delta, *rest = learn(*inputs)
        assert delta.item() == pytest.approx(before, rel=1e-5)
        worth.append(abs(before - given["reward"].item()))
        return delta, *rest
    monkeypatch.setattr(script, "update", comparing)
    if script is stream_td:
        train(script, tmp_path / "run", total_timesteps=50)
    else:
        play_script(script, tmp_path / "run", bootstrap_on_truncation="on", **kwargs)
    assert max(worth) > 1e-3  # values took part


@pytest.mark.parametrize("script, kwargs", LOOPS)
def test_a_lost_life_ends_the_return_but_not_the_episode(script, kwargs, tmp_path, monkeypatch):
    """As on Atari, where `step` says terminated, but not over: nothing is reset."""
    seen, update, names = [], script.update, list(inspect.signature(script.update).parameters)
    monkeypatch.setattr(script, "update", lambda *inputs: (seen.append(dict(zip(names, inputs))), update(*inputs))[1])
    step = envs.StreamEnv.step
    monkeypatch.setattr(envs.StreamEnv, "step", lambda *args, **kwargs: (*step(*args, **kwargs)[:4], False))
    monkeypatch.setattr(envs.StreamEvaluator, "play", lambda *args, **kwargs: dict.fromkeys(runtime.EVALUATION, 0.0))
    play_script(script, tmp_path / "run", **kwargs)
    assert [one["state"].item() for one in seen] == [0, 1, 2, 3, 4]
    assert [one["ended"].item() for one in seen] == [0, 0, 1, 0, 0] and seen[2]["discount"].item() == 0


def test_frames_are_stacked_oldest_first():
    stats, last = running_stats(1, 2, 2), None
    for k in range(1, 5):
        last = observe(stats, torch.full((4,), k), last, 3, False, learn=False)
    assert last.shape == (3, 2, 2) and last[:, 0, 0].tolist() == [2, 3, 4]
    assert observe(stats, torch.full((4,), 7), None, 3, False, learn=False)[:, 1, 1].tolist() == [7, 7, 7]


@pytest.mark.parametrize("lead", [1, 3])
def test_series_step_by_hand(lead, tmp_path, monkeypatch):
    """Inputs are unbiased averages, the cumulant is `lead` rows ahead, predictions are in its units."""
    numbers, seen = [0.0, 3, 1, 4, 2, 10, 5, 6], []

    def update(agent, nets, state, next_state, reward, discount, args):
        seen.append((state.item(), next_state.item(), reward.item()))
        return torch.ones(1), torch.full((1,), 2.0), torch.ones(1), torch.ones(1)  # the prediction is 2
    monkeypatch.setattr(stream_td, "update", update)
    (tmp_path / "a.csv").write_text("oil\n" + "".join(f"{x}\n" for x in numbers))
    train(stream_td, tmp_path / "run", env=str(tmp_path / "a.csv"), total_timesteps=2, lead=lead, obs_trace=0.5,
          normalize_obs=False)
    first, second = numbers[lead] / 10, numbers[lead + 1] / 10  # the whole series spans 0 to 10
    spread = math.sqrt((0.99 * first + second - first) ** 2 / 2 + 1e-8)
    near(torch.tensor(seen), [[0, 2, first], [2, (0 + 2 * 3 + 4 * 1) / 7, second / spread]])
    predicted = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["evaluator"]["predicted"]
    near(predicted[:2], [2, 2 * spread])


def test_evaluations_leave_no_trace(tmp_path):
    for name, every in (("a", 200), ("b", 0)):
        train(stream_q, tmp_path / name, env="CartPole-v1", eval_every=every, total_timesteps=400)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["agent"] for name in "ab")
    assert torch.equal(a["value"]["weights"], b["value"]["weights"]) and torch.equal(a["obs"]["mean"], b["obs"]["mean"])


@pytest.mark.parametrize("kind, shape, layer_norm", [("vector", (5,), True), ("vector", (5,), False),
                                                     ("minatar", (4, 10, 10), True)])
def test_a_batch_is_what_one_by_one_is(kind, shape, layer_norm):
    torch.manual_seed(0)
    env = Shape(kind, shape, FOUR)
    inputs = (env.size,) if kind == "vector" else shape
    net, stats = make_net(kind, inputs, [16, 8], [3, 2]), running_stats(*shape)
    flat, obs = sparse_init(net, 0.5), 3 * torch.randn(6, env.size).double() + 1
    for x in obs:
        observe(stats, x, None, 1, True)
    for normalize in (True, False):
        batch = forward_batch(flat, net, stats, obs, 1, normalize, layer_norm)
        for k, x in enumerate(obs):
            one = forward(flat, net, observe(stats, x, None, 1, normalize, learn=False), layer_norm)[0]
            near(torch.cat([out[k] for out in batch]), torch.cat(one), 1e-5)


@pytest.mark.parametrize("script, env_id", [(stream_ac, "NarrowAim-v0"), (stream_ac, "CartPole-v1"),
                                            (stream_q, "CartPole-v1")])
@pytest.mark.exports
def test_policy_is_what_an_evaluation_plays(script, env_id, tmp_path):
    """policy.pt2, played as knowledge: normalised by the run's statistics, the time in it, actions in [-1, 1]."""
    train(script, tmp_path / "run", env=env_id, total_timesteps=300, eval_every=0)
    args, env = script.Args(hidden="16x2"), envs.StreamEnv(env_id)
    agent, nets = script.make_agent(args, env)
    agent = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    torch.manual_seed(0)
    seen = torch.randn(20, env.size)
    box = isinstance(env.action_space, gym.spaces.Box)
    d = 1 if box else 2
    (policy,) = knowledge.load(f"run:{tmp_path / 'run'}", env_id, d, seen[:2], lowest=-1.0 if box else 0.0).values()
    played = policy(seen)
    for x, action in zip(seen, played):
        state = observe(agent["obs"], x.double(), None, 1, True, learn=False)
        best = script.choose(agent, nets, state, torch.zeros(d), args)
        if box:  # from 0 to 0.5
            near(action, best.clamp(0, 0.5) * 4 - 1, 1e-5)
        else:
            assert action.argmax() == best.argmax() and action.sum().item() == pytest.approx(1, abs=1e-5)
            assert script is stream_ac or action.min().item() == pytest.approx(0.005, abs=1e-6)
    assert len(played.unique()) > 1


def test_an_agent_that_sees_frames_leaves_no_policy():
    for script in (stream_ac, stream_q):
        env = Shape("atari", (1, 84, 84), FOUR, 4)
        agent, nets = script.make_agent(script.Args(), env)
        with pytest.raises(ValueError, match="the last 4 frames"):
            script.policy(agent, nets, torch.zeros(2, env.size), env, script.Args())
    env = Shape("vector", (3,), gym.spaces.Box(-np.inf, np.inf, (2,)))
    agent, nets = stream_ac.make_agent(Args(), env)
    with pytest.raises(ValueError, match="no bounds"):
        stream_ac.policy(agent, nets, torch.zeros(2, env.size), env, Args())


@pytest.mark.parametrize("script, env", [(stream_td, "series/transformer"), (stream_ac, "MinAtar/Breakout-v1")])
def test_compiled_run_is_the_plain_run(script, env, tmp_path):
    """Tensors from outside the graph, at the start and at episodes' ends, have the layout that it was compiled for."""
    for name, compiled in (("compiled", True), ("plain", False)):
        train(script, tmp_path / name, env=env, compile=compiled, hidden="16x1", total_timesteps=400)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["agent"]["value"]["weights"]
            for name in ("compiled", "plain"))
    near(a, b, 1e-4)


def test_classic_control_trains_for_10000_steps_and_is_evaluated_by_the_task():
    """As published, good agents should not meet the limit in training; scores are those of CartPole-v1, up to 500."""
    env = envs.StreamEnv("CartPole-v1")
    assert (env.max_episode_steps, env.evaluation_limit) == (10_000, 500)
    assert envs.StreamEnv("CartPole-v1", max_episode_steps=70).max_episode_steps == 70
    assert envs.StreamEnv("HalfCheetah-v4").max_episode_steps == 1000

    def balance(obs, steps):
        assert obs[4] == (-0.5 if not steps else -0.5 + (steps - 1) / 10_000)
        return int(obs[2] + obs[3] + 0.1 * obs[0] + 0.2 * obs[1] > 0), (steps or 0) + 1
    evaluator = envs.StreamEvaluator(stream_q.Args(env="CartPole-v1", eval_episodes=2))
    assert evaluator.play(balance)["length_mean"] == 500


def test_an_evaluation_ends_though_the_task_does_not(monkeypatch):
    """A submarine of Seaquest that stays at the surface never sinks. And any seed will do."""
    pytest.importorskip("minatar")
    monkeypatch.setattr(envs.stream, "CLASSIC_LIMIT", 1500)
    env = envs.StreamEnv("MinAtar/Seaquest-v1")
    assert env.max_episode_steps is None
    evaluator = envs.StreamEvaluator(stream_q.Args(env="MinAtar/Seaquest-v1", eval_episodes=1, seed=20240101))
    assert evaluator.play(lambda obs, state: (0, None))["length_mean"] == 1500


def test_no_compiler_is_said_and_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "/nowhere")
    train(stream_td, tmp_path / "run", compile=True, total_timesteps=300)
    assert "no C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize("low, high, said", [(100, 200, True), (-3, -2.5, True), (0, 10, False), (-2, 2, False)])
def test_a_box_beside_the_gaussian_is_said(low, high, said, capsys):
    env = SimpleNamespace(kind="vector", size=3, shape=(3,), frames=1, action_space=gym.spaces.Box(low, high, (2,)))
    stream_ac.make_agent(stream_ac.Args(), env)
    assert ("RescaleAction" in capsys.readouterr().err) == said


@pytest.mark.parametrize("script, kwargs, words", [
    (stream_q, dict(env="HalfCheetah-v4"), "stream_ac"), (stream_ac, dict(env="FrozenLake-v1"), "Box"),
    (stream_td, dict(env="missing.csv"), "missing.csv"), (stream_td, dict(total_timesteps=10 ** 6), "at most"),
    (stream_td, dict(lead=70_000), "--lead"), (stream_ac, dict(hidden="8x2"), "widen --hidden"),
    (stream_q, dict(sparsity=1.0), "--sparsity 1.0"), (stream_q, dict(env="Images-v0"), "BreakoutNoFrameskip-v4"),
    (stream_q, dict(env="ALE/Pong-v5"), "PongNoFrameskip-v4"), (stream_q, dict(epsilon_end=1.5), "--epsilon-end"),
    (stream_ac, dict(num_envs=2), "--num-envs")])
def test_bad_input_is_one_line_and_leaves_nothing(script, kwargs, words, tmp_path):
    with pytest.raises(runtime.UserError) as error:
        train(script, tmp_path / "run", **kwargs)
    assert words in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("text, words", [
    ("", "no rows"), ("a,b\n", "no rows"), ("a,b\n1,x\n2,3\n", "'x' in line 2, column 'b'"),
    ("a;b\n1,5;2,5\n", "3 columns in line 2, and 1 in"), ("a,date\n1,mon\n", "no number in its last column, 'date'"),
    ("a,b\n,2\n1,3\n", "'' in line 2, column 'a'"),  # a column that begins later is no text
    ("date,a,b\nmon,1,2\ntue,,3\n", "line 3"), ("a,b\n1,2\n\n3,nan\n", "line 4"), ("a,b\n1,2\n3\n", "line 3"),
    ("a,b\n1,2\n2,2\n", "never changes")])
@pytest.mark.filterwarnings("error")
def test_bad_series(text, words, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(envs.EnvError, match=words) as error:
        envs.Series(str(tmp_path / "a.csv"), 1)
    assert "a.csv" in str(error.value)


def test_a_file_by_any_name_is_a_series(tmp_path, monkeypatch, capsys):
    (tmp_path / "A.TXT").write_text("a\n" + "".join(f"{i % 7}\n" for i in range(40)))
    monkeypatch.chdir(tmp_path)
    train(stream_td, "", env=str(tmp_path / "A.TXT"), total_timesteps=30)
    assert list((tmp_path / "runs/stream_td/A").glob("seed1-*/checkpoint.pt"))
    (tmp_path / "b.csv").write_text("date,a,oil\nmon,1,2\ntue,3,5\n")
    assert envs.Series("b.csv", 1).rows.tolist() == [[1, 2], [3, 5]]
    assert "b.csv: a, oil predict oil\n" in capsys.readouterr().err


@pytest.mark.parametrize("env_id", ["CartPole-v1", "HalfCheetah-v4", "MinAtar/SpaceInvaders-v1", "MinAtar/Seaquest-v1",
                                    "dm_control/cheetah-run-v0", "dm_control/reacher-easy-v0", "AdroitHandDoor-v1",
                                    "BreakoutNoFrameskip-v4"])  # Adroit and reacher write into their models
def test_snapshots_continue_to_the_last_bit(env_id, tmp_path):
    for mark, package in (("MinAtar", "minatar"), ("dm_control", "dm_control"), ("NoFrame", "ale_py")):
        if mark in env_id:
            pytest.importorskip(package)
    limit = 400 if "NoFrame" in env_id else 0  # frames, 100 steps: met soon after the restore
    first, second = (envs.StreamEnv(env_id, max_episode_steps=limit) for _ in range(2))
    first.reset(3)
    first.action_space.seed(0)
    for _ in range(137):
        if first.step(first.action_space.sample())[-1]:
            first.reset()
    torch.save(runtime.to_plain(first.state_dict()), tmp_path / "snap.pt")
    second.load_state_dict(torch.load(tmp_path / "snap.pt", weights_only=True))
    for action in [first.action_space.sample() for _ in range(300)]:
        (obs, *rest), (other, *others) = first.step(action), second.step(action)
        assert np.array_equal(obs, other) and rest == others
        if rest[-1]:
            assert np.array_equal(first.reset(), second.reset())


def test_a_frame_without_a_display():
    """dm_control fixes its renderer when it is imported: one that works without a display must be known by then."""
    pytest.importorskip("dm_control")
    need_renderer()
    code = """import envs
env = envs.StreamEnv("dm_control/cheetah-run-v0", render_mode="rgb_array")
env.reset(0)
print(env.env.render().max() > 0)"""
    free = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=free, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_evaluation_fires_after_a_lost_life():
    """Training leaves FIRE to the agent; an evaluated one that never presses it still plays its five lives."""
    pytest.importorskip("ale_py")
    args = stream_q.Args(env="BreakoutNoFrameskip-v4", eval_episodes=1)
    evaluator = envs.StreamEvaluator(args, max_episode_steps=8000)  # frames: 2000 steps
    result, env = evaluator.play(lambda obs, state: (0, None)), evaluator.env
    assert env.lives == 0 and result["length_mean"] < 500, result
    env.reset(0)
    assert not any(env.step(0)[-1] for _ in range(1000)) and env.lives == 4


def test_seeded_episode_of_minatar_has_no_past():
    """The game repeats the last action now and then, at the first step that of the episode before."""
    pytest.importorskip("minatar")
    env = envs.StreamEnv("MinAtar/Breakout-v1")
    env.reset(1)
    env.step(2)
    env.reset(1)
    assert env.env.unwrapped.game.last_action == 0


def test_series_and_its_returns(tmp_path):
    series = envs.Series("series/transformer", 1)
    assert series.rows.shape[1] == 7 and series.target.min() == 0 and series.target.max() == 1
    assert np.array_equal(series.rows, envs.Series("series/transformer", 1).rows)
    true = series.returns(0.99, 2)
    assert true[100] == pytest.approx(sum(0.99 ** k * series.target[102 + k] for k in range(5000)), rel=1e-9)
    rows = "".join(f"2016-07-01 00:{i:02d},{i % 3},{i}\n" for i in range(40))
    (tmp_path / "a.csv").write_text("date,load,oil\n" + rows)
    small = envs.Series(str(tmp_path / "a.csv"), 1)
    assert small.rows.shape == (40, 2) and small.target[39] == 1
    run = str(tmp_path / "run")
    train(stream_td, run, env=str(tmp_path / "a.csv"), total_timesteps=30, eval_every=10)
    first, *scores = [float(row["return_mean"]) ** 2 for row in curve(run)]
    result = stream_td.main(runtime.cli(stream_td.Args, "stream_td", ["--evaluate", run]))  # all rows, as predicted
    assert len(scores) == 3 and result["return_mean"] ** 2 == pytest.approx(np.mean(scores), rel=1e-4)
    (tmp_path / "a.csv").write_text("date,load,oil\n" + rows.replace("2016", "2017").replace(",1,", ",5,"))
    for flags in (["--resume", run, "--total-timesteps", "35"], ["--evaluate", run]):
        with pytest.raises(runtime.UserError, match="a.csv has changed since the run began"):
            stream_td.main(runtime.cli(stream_td.Args, "stream_td", flags))


@pytest.mark.slow
def test_learning_gates(tmp_path):
    """Seconds of CartPole, and of a bandit with one right action: returns rise far above chance."""
    result = train(stream_q, tmp_path / "q", env="CartPole-v1", total_timesteps=10_000, hidden="", eval_every=0,
                   eval_episodes=1, exploration_fraction=0.2)
    assert result["return_mean"] > 80, result
    result = train(stream_ac, tmp_path / "ac", env="Aim-v0", total_timesteps=3000, eval_every=0, eval_episodes=5)
    assert result["return_mean"] > -1, result  # 20 steps of -(a - x)^2; doing nothing earns about -6


class Scripted(gym.Env):
    """Two episodes by turns, three steps to a terminal state and two to a time-out. Observations count all resets and
    steps from 0, rewards are ten times that."""
    observation_space, made = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64), []

    def __init__(self, action_space):
        self.action_space, self.at, self.episode, self.received = action_space, -1, 0, []
        self.made.append(self)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.k, self.episode = self.at + 1, 0, self.episode + 1
        return np.array([self.at], np.float64), {}

    def step(self, action):
        self.received.append(action)
        self.at, self.k = self.at + 1, self.k + 1
        odd = self.episode % 2 == 1
        return np.array([self.at], np.float64), 10.0 * self.at, odd and self.k == 3, not odd and self.k == 2, {}


if "Scripted-v0" not in gym.registry:
    gym.register("Scripted-v0", Scripted, kwargs=dict(action_space=gym.spaces.Box(-0.1, 0.1, (1,))))
    gym.register("ScriptedDiscrete-v0", Scripted, kwargs=dict(action_space=gym.spaces.Discrete(8)))


class Images(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 255, (210, 160, 3), np.uint8), gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros((210, 160, 3), np.uint8), {}

    def step(self, action):
        return np.zeros((210, 160, 3), np.uint8), 0.0, False, False, {}


if "Images-v0" not in gym.registry:
    gym.register("Images-v0", Images)


class Aim(gym.Env):
    """Name the number you see."""
    observation_space = gym.spaces.Box(-1, 1, (12,), np.float64)

    def __init__(self, low=-1.0, high=1.0):
        self.action_space = gym.spaces.Box(low, high, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 12)
        return self.x, {}

    def step(self, action):
        reward = -float((action[0] - self.x[0]) ** 2)
        self.x = self.np_random.uniform(-1, 1, 12)
        return self.x, reward, False, False, {}


if "Aim-v0" not in gym.registry:
    gym.register("Aim-v0", Aim, max_episode_steps=20)
    gym.register("NarrowAim-v0", Aim, max_episode_steps=20, kwargs=dict(low=0.0, high=0.5))
