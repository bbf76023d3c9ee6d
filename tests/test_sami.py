"""TESAC, CCM, SaTESAC, SaCCM: values by hand, the update beside plain autograd, what is drawn, runs that go on."""
import csv
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import envs
import runtime
from algos import ccm, saccm, satesac, tesac
from benchmarks import sami_probe
from benchmarks.sami_direct import Direct, Encoder
from buffers import Batch, TrajectoryBuffer, Windows
from envs import splits

CHEETAH = "CrippledHalfCheetah-dyn-v0"
SCRIPTS = {"tesac": tesac, "ccm": ccm, "satesac": satesac, "saccm": saccm}
CONTRASTED = {name: SCRIPTS[name] for name in ("ccm", "satesac", "saccm")}


# ---- contrast: hand numbers


def test_sigmoid_nce(monkeypatch):
    """All pairs; the off-diagonal ones of the first case are at ln 2 each."""
    one = torch.eye(2)
    assert satesac.sigmoid_nce(one, one, -one).item() == pytest.approx(0.693193, abs=1e-6)
    assert satesac.sigmoid_nce(one, one, one).item() == pytest.approx(5.693193, abs=1e-6)
    zero = torch.zeros(3, 2)
    assert satesac.sigmoid_nce(zero, zero, zero).item() == pytest.approx(2 * math.log(2))
    query, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    negative = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert satesac.sigmoid_nce(query, positive, negative).item() == pytest.approx(0.349072, abs=1e-6)
    monkeypatch.setattr(satesac, "TEMPERATURE", 1)
    assert satesac.sigmoid_nce(query, positive, negative).item() == pytest.approx(0.940692, abs=1e-6)


def test_softmax_nce_is_bounded_by_log_k():
    query, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    negative = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # logits 6, 0, -10
    loss = satesac.softmax_nce(query, positive, negative).item()
    assert loss == pytest.approx(0.00247577, abs=1e-7) and math.log(3) - loss == pytest.approx(1.0961365, abs=1e-6)
    loss = satesac.softmax_nce(query, query, negative[:1].expand(3, 2)).item()  # logits 10, 0, 0, 0
    assert math.log(4) - loss == pytest.approx(1.386158, abs=1e-6)
    zero = torch.zeros(4, 2)
    assert math.log(4) - satesac.softmax_nce(zero, zero, zero[:3]).item() == pytest.approx(0, abs=1e-6)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        query, keys = (F.normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (8, 23))
        assert satesac.softmax_nce(query, keys[:8], keys[8:]).item() >= 0  # the estimate is log 16 minus this


@pytest.mark.parametrize("kappa, gap, weight", [(0.1, 2, 0.2), (0.1, 20, 1), (0.1, -3, 0), (0.01, 1, 0.01)])
def test_return_gap_weight(kappa, gap, weight):
    rewards = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0]) - gap
    assert satesac.return_gap_weight(*rewards, kappa).item() == pytest.approx(weight)


def test_softmax_compares_with_another_trajectory():
    """Rows are grouped by trajectory, contrast_steps of each: the positive key is another trajectory's."""
    args = satesac.Args(estimator="softmax", contrast_steps=2, bilinear=False, contrast_trajectories=4)
    query = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    keys = torch.cat([query, -query])
    alike = satesac.contrastive_loss({}, query, torch.cat([query.roll(2, 0), -query]), args)
    other = satesac.contrastive_loss({}, query, keys, args)
    assert alike.item() < 1e-3 < 0.5 < other.item()


# ---- encoder


def test_encoder_is_an_lstm_of_the_papers_size():
    """For each environment, with the bilinear matrix: the parameters of the paper's code."""
    for width, count in ((24, 78634), (36, 84778), (49, 91434), (14, 73514), (23, 78122), (62, 98090), (29, 81194)):
        assert sum(p.numel() for p in tesac.init_encoder(width, 128, 6).values()) + 36 == count
    torch.manual_seed(0)
    params, windows = tesac.init_encoder(5, 7, 3), torch.cat([torch.randn(9, 4, 5), torch.ones(9, 4, 1)], 2)
    assert torch.allclose(tesac.encode(params, windows), Encoder(params)(windows), atol=1e-6)


def test_rows_before_an_episode_count_for_nothing():
    """Zeros ahead, whatever normalising made of them, leave the context as it is; the first observation does not."""
    torch.manual_seed(0)
    params = tesac.init_encoder(5, 7, 3)
    short = torch.cat([torch.randn(4, 2, 5), torch.ones(4, 2, 1)], 2)
    ahead = torch.cat([torch.randn(3, 2, 5), torch.zeros(3, 2, 1)], 2)
    context = tesac.encode(params, short)
    assert torch.allclose(context, tesac.encode(params, torch.cat([ahead, short])), atol=1e-6)
    unseen = short.clone()
    unseen[0, :, -1] = 0
    assert (context - tesac.encode(params, unseen)).abs().max() > 1e-3
    unseen[-1, :, -1] = 0
    assert (tesac.encode(params, unseen) == 0).all()


# ---- update


def batch_of(seed, b=6, f=3, d=2, window=4, contrasted=8):
    """Windows that begin at different steps, as episodes do."""
    generator = torch.Generator().manual_seed(seed)

    def rows(n):
        present = (torch.arange(window + 1).unsqueeze(1) >= torch.arange(n) % window).float().unsqueeze(2)
        return torch.cat([torch.randn(window + 1, n, f + d, generator=generator) * present, present], 2)

    both = rows(b)
    batch = Batch(both[:-1], torch.rand(b, d, generator=generator) * 2 - 1, torch.randn(b, 1, generator=generator),
                  (torch.arange(b) % 3 == 0).float().unsqueeze(1), both[1:])
    noise = torch.randn(2, b, d, generator=generator)
    return batch, satesac.Contrast(rows(contrasted)[1:], torch.tensor(0.3)), *noise


def small(script, **changes):
    args = script.Args(hidden="8x2", encoder_hidden=5, context_dim=3, **changes)
    if script is not tesac:
        args = replace(args, contrast_trajectories=4, contrast_steps=2)
    torch.manual_seed(3)
    return args, script.make_agent(args, 3, 2, 3, torch.device("cpu"))


@torch.no_grad()
def test_update_is_plain_autograds():
    args, agent = small(satesac)
    direct = Direct(agent, args)
    for seed in range(3):
        batch, contrast, noise, next_noise = batch_of(seed)
        satesac.update(agent, batch, contrast, noise, next_noise, args)
        with torch.enable_grad():
            direct.update(batch, contrast, noise, next_noise)
    pairs = [(agent["critic"], Encoder(agent["critic"]), direct.encoder),
             (agent["target"], Encoder(agent["target"]), direct.target_encoder)]
    for _, ours, theirs in pairs:
        assert all(torch.allclose(p, q, atol=2e-6) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert torch.allclose(agent["critic"]["bilinear"], direct.matrix, atol=2e-6)
    assert torch.allclose(agent["temperature"]["log_alpha"], direct.log_alpha, atol=2e-6)
    for k in (0, 1):
        assert torch.allclose(agent["critic"]["q.0.weight"][k], direct.critics[k][0].weight.T, atol=2e-6)
        assert torch.allclose(agent["target"]["q.2.weight"][k], direct.targets[k][4].weight.T, atol=2e-6)
    assert torch.allclose(agent["actor"]["actor.1.weight"], direct.actor[2].weight.T, atol=2e-6)


@torch.no_grad()
def test_without_weight_it_is_tesac():
    """The contrast alone makes the difference, and only to the encoder's gradient."""
    agents = []
    for script, weight in ((tesac, 0.0), (satesac, 0.0), (satesac, 0.5), (ccm, 0.5)):
        args, agent = small(script)
        batch, contrast, *noise = batch_of(1)
        if script is tesac:
            script.update(agent, batch, *noise, args)
        else:
            script.update(agent, batch, contrast._replace(weight=torch.tensor(weight)), *noise, args)
        agents.append(agent)
    plain, unweighted, weighted, others = agents
    assert all(torch.allclose(plain["critic"][k], unweighted["critic"][k], atol=1e-7) for k in plain["critic"])
    assert all(torch.equal(weighted["critic"][k], others["critic"][k]) for k in weighted["critic"])
    moved = {k for k in plain["critic"] if not torch.allclose(plain["critic"][k], weighted["critic"][k], atol=1e-7)}
    assert moved == {k for k in plain["critic"] if k.startswith("encoder")}


def test_a_wrong_context_is_that_of_another_joint():
    """Half of the list away, in all families that cripple in training: no task keeps what is crippled."""
    for name in ("CrippledHalfCheetah", "CrippledAnt"):
        crippled = [task["crippled"] for task in envs.all_tasks(f"{name}-dyn-v0", "train")]
        half = len(crippled) // 2
        assert all(a != b for a, b in zip(crippled, crippled[-half:] + crippled[:-half]))


@torch.no_grad()
def test_who_trains_the_encoder():
    """The critics do; the actor, whose noise differs here, does not; the momentum encoder only follows."""
    args, agent = small(tesac)
    before = {group: {k: p.clone() for k, p in agent[group].items()} for group in ("critic", "actor", "target")}
    other = small(tesac)[1]
    batch, _, noise, next_noise = batch_of(2)
    tesac.update(agent, batch, noise, next_noise, args)
    tesac.update(other, batch, noise + 1, next_noise, args)
    assert all(torch.equal(agent["critic"][k], other["critic"][k]) for k in agent["critic"])
    assert not torch.equal(agent["actor"]["actor.0.weight"], other["actor"]["actor.0.weight"])
    for k in agent["critic"]:
        assert not torch.equal(agent["critic"][k], before["critic"][k])
        wanted = before["target"][k] + args.tau * (agent["critic"][k] - before["target"][k])
        assert torch.allclose(agent["target"][k], wanted, atol=1e-7)
    assert torch.tensor(1.0).lerp(torch.tensor(3.0), 0.05).item() == pytest.approx(1.10)


# ---- episodes, windows and what is drawn from them


def filled(rewards, tasks, num_envs, capacity=1000, **kwargs):
    """A buffer with an episode of 4 steps per entry: row t of episode e is [100 e + t, 1], its action e + t / 10."""
    buffer = TrajectoryBuffer(capacity, 4, 3, num_envs, 2, 1, **kwargs)
    for first in range(0, len(rewards), num_envs):
        episodes = np.arange(first, first + num_envs)
        for t in range(4):
            row, final = (torch.tensor([[100.0 * e + k, 1.0] for e in episodes.tolist()]) for k in (t, t + 1))
            action = torch.tensor([[e + t / 10] for e in episodes.tolist()])
            ended = np.full(num_envs, t == 3)
            buffer.add(row, action, np.array(rewards)[episodes], np.zeros(num_envs, bool), ended, final,
                       np.array(tasks)[episodes])
    return buffer


def test_windows_of_episodes():
    """Each step is drawn with its own past, zeros before the start, its own end, and no row of another episode."""
    buffer, seen = filled([1.0, 2.0], [0, 1], 2), set()
    assert buffer.transitions == 8 and buffer.mean_reward.tolist() == [1, 2]
    torch.manual_seed(0)
    batch = buffer.sample(400)
    for i in range(400):
        episode = round(batch.reward[i, 0].item()) - 1
        t = round(10 * (batch.action[i, 0].item() - episode))
        seen.add((episode, t))
        rows = [[0.0, 0.0] if k < 0 else [100.0 * episode + k, 1.0] for k in range(t - 2, t + 2)]
        assert batch.obs[:, i].tolist() == rows[:3] and batch.next_obs[:, i].tolist() == rows[1:]
    assert seen == {(e, t) for e in (0, 1) for t in range(4)} and (batch.terminated == 0).all()


def test_episodes_that_end_early():
    """With ends at 2 and 3 of 4 steps: their last steps are drawn and are terminal, none after them is."""
    buffer = TrajectoryBuffer(100, 4, 3, 1, 2, 1)
    for episode, length in enumerate((2, 3)):
        for t in range(length):
            row, final = (torch.tensor([[100.0 * episode + k, 1.0]]) for k in (t, t + 1))
            buffer.add(row, torch.tensor([[float(t)]]), np.array([1.0 + episode]), np.array([t == length - 1]),
                       np.array([False]), final, np.array([episode]))
    batch = buffer.sample(300)
    drawn = {(r, a, e) for r, a, e in zip(*(x[:, 0].tolist() for x in (batch.reward, batch.action, batch.terminated)))}
    assert drawn == {(1, 0, 0), (1, 1, 1), (2, 0, 0), (2, 1, 0), (2, 2, 1)}
    assert buffer.length.tolist() == [2, 3] and buffer.mean_reward.tolist() == [1, 2] and buffer.task.tolist() == [0, 1]
    assert filled([1.0], [0], 1).sample(100).terminated.sum() == 0  # a time limit bootstraps
    limits = filled([1.0], [0], 1, bootstrap=False).sample(100)
    assert torch.equal(limits.terminated, (limits.action > 0.25).float())


def test_the_last_episodes_are_kept():
    buffer = filled([float(e) for e in range(10)], [0, 1] * 5, 2, capacity=24)  # six episodes
    assert sorted(buffer.mean_reward.tolist()) == [4, 5, 6, 7, 8, 9]
    assert buffer.mean_reward[buffer.latest(1, 2)].tolist() == [7, 9]
    assert buffer.mean_reward[buffer.latest(0, 99)].tolist() == [4, 6, 8]
    copy = TrajectoryBuffer(24, 4, 3, 2, 2, 1)
    copy.load_state_dict(buffer.state_dict())
    torch.manual_seed(1)
    drawn = buffer.sample(20)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(drawn, copy.sample(20)))


def test_a_ring_of_another_size_begins_with_the_oldest():
    """A ring that is full of short episodes goes on in a larger one, in a smaller one, and in one as large."""
    def play(buffer, episodes):
        for episode in episodes:
            for t in range(2):
                row, final = (torch.tensor([[100.0 * episode + k, 1.0]]) for k in (t, t + 1))
                buffer.add(row, torch.zeros(1, 1), np.array([float(episode)]), np.array([t == 1]), np.array([False]),
                           final, np.array([0]))
        return buffer.mean_reward.tolist()

    full = TrajectoryBuffer(12, 4, 3, 1, 2, 1)
    assert play(full, range(5)) == [3, 4, 2]
    for room, kept, later in ((6, [2, 3, 4], [2, 3, 4, 5]), (2, [3, 4], [5, 4]), (3, [3, 4, 2], [3, 4, 5])):
        buffer = TrajectoryBuffer(4 * room, 4, 3, 1, 2, 1)
        buffer.load_state_dict(full.state_dict())
        assert buffer.mean_reward.tolist() == kept and buffer.transitions == 2 * len(kept)
        assert buffer.kept["rows"][:len(kept), 2, 0].tolist() == [100 * episode for episode in kept]
        assert buffer.mean_reward[buffer.latest(0, 2)].tolist() == [3, 4]
        if room == 3:
            assert buffer.stored == 5 and all(torch.equal(part, full.kept[name]) for name, part in buffer.kept.items())
        assert play(buffer, [5]) == later and buffer.mean_reward[buffer.latest(0, 2)].tolist() == [4, 5]
    few = TrajectoryBuffer(12, 4, 3, 1, 2, 1)
    play(few, range(2))
    for room in (6, 1):  # not full: as it is, and the last where there is room for one
        buffer = TrajectoryBuffer(4 * room, 4, 3, 1, 2, 1)
        buffer.load_state_dict(few.state_dict())
        assert buffer.mean_reward.tolist() == [0, 1][-room:] and play(buffer, [2]) == [0, 1, 2][-room:]


def test_what_a_policy_remembers():
    windows, yes, no = Windows(3, 2, 1), torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    windows.push(torch.tensor([[1.0], [5.0]]), yes)
    windows.push(torch.tensor([[2.0], [6.0]]), no)
    rows = windows.push(torch.tensor([[3.0], [7.0]]), torch.tensor([False, True]))
    assert rows[:, 0, 0].tolist() == [1, 2, 3] and rows[:, 1, 0].tolist() == [0, 0, 7]
    args = tesac.Args()
    row = tesac.make_row(torch.ones(2, 3), torch.full((2, 1), 0.5), torch.tensor([True, False]), None, args)
    assert row.tolist() == [[1, 1, 1, 0, 1], [1, 1, 1, 0.5, 1]]
    hidden = tesac.make_windows(replace(args, official=True), 2, 5)
    assert hidden.push(row, torch.tensor([True, False]))[-1, :, -1].tolist() == [0, 1]
    assert tesac.make_windows(args, 2, 5).push(row, yes)[-1, :, -1].tolist() == [1, 1]
    task = np.ones((2, 2), np.float32)
    assert tesac.make_row(torch.zeros(2, 3), None, yes, task, replace(args, context="oracle")).shape == (2, 5)
    assert tesac.make_row(torch.zeros(2, 3), None, yes, task, replace(args, context="none")).shape == (2, 3)


def test_a_policy_sees_the_windows_that_it_is_trained_on():
    """Pushed step by step over the ends of episodes, or read from the buffer later: the same rows, the same context."""
    torch.manual_seed(0)
    args = tesac.Args()
    windows, buffer = tesac.make_windows(args, 2, 6), TrajectoryBuffer(1000, 12, args.window, 2, 6, 2)
    params, pushed = tesac.init_encoder(5, 7, 3), [[[]], [[]]]  # pushed[environment][episode]
    lengths, age, began = np.array([12, 5]), np.zeros(2, int), torch.ones(2, dtype=torch.bool)
    row = tesac.make_row(torch.randn(2, 3), torch.zeros(2, 2), began, None, args)
    while buffer.stored < 6:
        seen, action = windows.push(row, began), torch.rand(2, 2)
        for i in (0, 1):
            pushed[i][-1].append(seen[:, i].clone())  # the next push clears rows in place
        age += 1
        ended = age == lengths
        final_row = tesac.make_row(torch.randn(2, 3), action, torch.zeros(2, dtype=torch.bool), None, args)
        buffer.add(row, action, np.zeros(2), ended, np.zeros(2, bool), final_row, np.arange(2))
        began = torch.from_numpy(ended)
        row = torch.where(began[:, None], tesac.make_row(torch.randn(2, 3), action, began, None, args), final_row)
        for i in np.flatnonzero(ended):
            pushed[i].append([])
        age[ended] = 0
    assert sorted(buffer.length.tolist()) == [5, 5, 5, 5, 12, 12]
    found = [0, 0]
    for episode, (task, length) in enumerate(zip(buffer.task.tolist(), buffer.length.tolist())):
        then = torch.stack(pushed[task][found[task]], 1)  # (W, n, width)
        found[task] += 1
        assert torch.equal(buffer.windows(torch.full((length,), episode), torch.arange(length)), then)
        for t in range(length):  # and as one long sequence, as far as a window reaches
            rows = buffer.kept["rows"][episode][args.window - 1:][max(t + 1 - args.window, 0):t + 1].unsqueeze(1)
            assert torch.allclose(tesac.encode(params, then[:, t:t + 1]), tesac.encode(params, rows), atol=1e-6)


def test_how_many_are_negative():
    counts = [satesac.negatives(satesac.Args(contrast_trajectories=n)) for n in (2, 3, 16, 256)]
    assert counts == [1, 1, 8, 128]


def test_what_is_drawn():
    """CCM: one task against another. SaTESAC: one task, the better half. SaCCM: one task, all better than the worst of
    all; nothing where all are alike."""
    generator = np.random.default_rng(0)
    buffer = filled(generator.normal(size=48).tolist(), list(range(3)) * 16, 3)
    args = satesac.Args()
    positive_tasks, negative_tasks = set(), set()

    def drawn(script):
        episodes, weight = script.draw_trajectories(buffer, args)
        assert len(episodes) == 16
        halves = episodes.split(8)
        return (*(set(buffer.task[half].tolist()) for half in halves), *(buffer.mean_reward[half] for half in halves),
                weight.item())

    for seed in range(30):
        torch.manual_seed(seed)
        (one,), (another,), *_, weight = drawn(ccm)
        assert one != another and weight == pytest.approx(0.1)
        (one,), (another,), good, poor, weight = drawn(satesac)
        assert one == another and good.min() >= poor.max()
        assert weight == pytest.approx(0.1 * (good.mean() - poor.mean()).item())
        (one,), some, good, poor, weight = drawn(saccm)
        assert good.min() > poor.max() and weight == pytest.approx(0.1 * (good.mean() - poor.mean()).item())
        positive_tasks.add(one)
        negative_tasks |= some
    assert positive_tasks == negative_tasks == {0, 1, 2}

    for script in CONTRASTED.values():  # softmax compares neighbours: of any ranks, of the same draw
        sorted_draws = 0
        for seed in range(30):
            torch.manual_seed(seed)
            ordered, weight = script.draw_trajectories(buffer, args)
            torch.manual_seed(seed)
            shuffled, same = script.draw_trajectories(buffer, replace(args, estimator="softmax"))
            assert same.item() == pytest.approx(weight.item()) and torch.equal(shuffled[8:], ordered[8:])
            assert torch.equal(shuffled[:8].sort().values, ordered[:8].sort().values)
            sorted_draws += (buffer.mean_reward[shuffled[:8]].diff() <= 0).all().item()
        assert sorted_draws < 3
    alike, one_task = filled([1.0] * 6, [0, 1, 2] * 2, 3), filled([1.0, 2.0], [0, 0], 2)
    for script, buffer in ((saccm, alike), (satesac, alike), (ccm, one_task)):
        contrast = script.contrast_batch(buffer, lambda x: x, 1, args)
        assert contrast.weight == 0 and contrast.windows.shape == (3, 64, 2)


@pytest.mark.parametrize("script", CONTRASTED.values(), ids=CONTRASTED)
def test_windows_that_are_compared(script):
    """Positive ones first, contrast_steps of each trajectory; their weight; and with --official those of the paper's
    code, whose actions are another trajectory's."""
    rewards = [0.0, 4.0, 0.0, 4.0, 0.0, 4.0, 0.0, 4.0]
    buffer = TrajectoryBuffer(1000, 4, 3, 2, 3, 1)  # rows [100 e + t, action before, 1]
    for first in range(0, 8, 2):
        for t in range(4):
            row, final = (torch.tensor([[100.0 * e + k, e + k / 10, 1.0] for e in (first, first + 1)])
                          for k in (t, t + 1))
            buffer.add(row, torch.zeros(2, 1), np.array(rewards[first:first + 2]), np.zeros(2, bool),
                       np.full(2, t == 3), final, np.arange(2))
    args = script.Args(num_envs=2, contrast_trajectories=4, contrast_steps=3, window=3, kappa=0.2)
    torch.manual_seed(6)
    contrast = script.contrast_batch(buffer, lambda x: x, 1, args)
    assert contrast.windows.shape == (3, 12, 3)
    last = contrast.windows[-1]
    episode = (last[:, 0] / 100).floor().long()
    assert (episode.view(4, 3) == episode.view(4, 3)[:, :1]).all()
    assert ((last[:, 0] - 100 * episode) < 4).all()  # the end of an episode is no step
    assert torch.allclose(last[:, 1], episode + (last[:, 0] - 100 * episode) / 10)
    means = [buffer.mean_reward[episode[:6]].mean(), buffer.mean_reward[episode[6:]].mean()]
    if script is ccm:
        assert contrast.weight.item() == pytest.approx(0.2)
    else:
        assert contrast.weight.item() == pytest.approx(min(0.2 * (means[0] - means[1]).item(), 1))
        fixed = script.contrast_batch(buffer, lambda x: x, 1, replace(args, fixed_weight=True))
        assert fixed.weight.item() == pytest.approx(0.2)

    for seed in range(20):
        torch.manual_seed(seed)
        windows = script.contrast_batch(buffer, lambda x: x, 1, replace(args, official=True)).windows
        there, step = windows[-1, :, -1] == 1, windows[-1, :, 0] % 100
        assert torch.equal(there, step < 3)  # of rows 0 to 4: the last action of an episode is chosen on row 3
        embeddings = satesac.encode(satesac.init_encoder(2, 4, 6), windows)
        assert (embeddings[~there] == 0).all() and (embeddings[there] != 0).any(1).all()
        episode, t = (windows[-1, there, 0] / 100).floor(), step[there]
        other = (episode - 2) % 8
        assert torch.allclose(windows[-1, there, 1], other + (t + 1).clamp(max=4) / 10)


# ---- evaluation on splits


def test_evaluation_plays_every_task():
    """From the same start states every time, as often as it is told; a player that knows its task from its context does
    something else with another's."""
    args = SimpleNamespace(env=CHEETAH, seed=1, num_envs=3, eval_episodes=80, video=0, evaluate="", resume="")
    evaluator = envs.SplitEvaluator(args, max_episode_steps=12)

    def player(num, tasks, wrong=False):
        context = torch.from_numpy(tasks)
        context = context.roll(num // 2, 0) if wrong else context

        def act(obs, began):
            return 0.3 * np.sign(context.numpy()[:, 2:] - 0.5), context
        return act

    results = evaluator.play(player)
    assert [results[split]["episodes"] for split in envs.SPLITS] == [30, 24, 24]
    assert all(result["length_mean"] == 12 for result in results.values())
    again = evaluator.play(player)
    assert all(results[split][key] == again[split][key] for split in results for key in ("return_mean", "return_std"))
    assert results["train"]["return_std"] > 0
    assert evaluator.play(player, twice=True)["train"]["episodes"] == 60
    played = evaluator.played["extreme"]
    assert played.task.tolist() == sorted([*range(12)] * 4) and played.context.shape == (48, 8)
    found = evaluator.diagnose(player)
    assert found["probe_r2"] == pytest.approx(1, abs=1e-6) and found["wrong_context"] != results["train"]["return_mean"]
    vec, numbers, last = evaluator.vecs["train"], evaluator.numbers["train"], []
    for seed in (evaluator.seed + 1, evaluator.seed + 2):
        obs, act = vec.reset(seed), player(15, numbers)
        for _ in range(9):
            obs, *_ = vec.step(act(obs, None)[0])
        last.append(envs.flatten(obs).unsqueeze(0))  # what the tenth action is chosen on
        assert torch.equal(splits.play(player(15, numbers), vec, 1, seed).observations, last[-1])
    assert found["probe_r2_observation"] == splits.probe(*last, torch.from_numpy(numbers)) < 1


@pytest.mark.parametrize("num_envs, evaluate, said", [(3, "", 0), (4, "", 1), (6, "", 0), (1, "run", 0)])
def test_buckets_are_trained_alike_or_it_is_said(num_envs, evaluate, said, monkeypatch):
    lines = []
    monkeypatch.setattr(splits, "announce", lines.append)
    envs.SplitEvaluator(SimpleNamespace(env=CHEETAH, seed=1, num_envs=num_envs, eval_episodes=1, evaluate=evaluate,
                                        resume=""))
    assert len(lines) == said


def test_probe_is_fair():
    """What contexts do not know is not explained on other episodes; one of two numbers is half."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(20, 2, generator=generator)
    noise = torch.randn(4, 40, 20, 2, generator=generator)
    assert splits.probe(noise[0], noise[1], numbers) < 0.02
    known = torch.cat([numbers[:, :1].expand(40, 20, 1), noise[2, ..., :1]], 2)
    other = torch.cat([numbers[:, :1].expand(40, 20, 1), noise[3, ..., :1]], 2)
    assert splits.probe(known, other, numbers) == pytest.approx(0.5, abs=0.02)
    constant = torch.cat([numbers, torch.ones(20, 1)], 1)  # what does not vary is left out
    assert splits.probe(known, other, constant) == pytest.approx(0.5, abs=0.02)


def test_planes():
    """PCA keeps the distances of what lies in a plane; t-SNE keeps groups together that are far apart."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator).double())[0]
    flat = torch.randn(30, 2, generator=generator).double() @ rotation[:2]
    plane = splits.principal_components(flat)
    assert torch.allclose(torch.cdist(plane, plane), torch.cdist(flat, flat), atol=1e-6)
    groups = torch.arange(3).repeat_interleave(20)
    plane = splits.tsne(10 * torch.eye(6)[groups] + torch.randn(60, 6, generator=generator))
    distance = torch.cdist(plane, plane)
    same = groups.unsqueeze(0) == groups.unsqueeze(1)
    assert distance[same].max() < distance[~same].min()


# ---- what one observation tells


def keep_replay(folder, tell, episodes=36, num_envs=3):
    """A run folder whose replay has episodes of 10 and 9 steps, played three at a time in buckets 0, 1, 2. The first
    number of an observation tells the bucket or nothing, the second one is noise, and all that is no observation tells
    it: the rest of the row, the action, the reward, the rows after the last step."""
    buffer, generator = TrajectoryBuffer(10 * (episodes - num_envs), 10, 4, num_envs, 3, 1), torch.Generator()
    bucket = torch.arange(num_envs).float()
    for block in range(episodes // num_envs):
        for t in range(10 - block % 2):
            known, noise = (torch.randn(num_envs, generator=generator) for _ in range(2))
            row = torch.stack([bucket + 0.1 * known if tell else known, noise, bucket], 1)
            buffer.add(row, bucket.unsqueeze(1), bucket.numpy(), np.zeros(num_envs, bool),
                       np.full(num_envs, t == 9 - block % 2), 100 + bucket.unsqueeze(1).expand(-1, 3),
                       np.arange(num_envs))
    folder.mkdir()
    torch.save({"buffer": buffer.state_dict(), "normalizer": {"mean": torch.zeros(2)}}, folder / "checkpoint.pt")
    return folder


def test_one_observation_tells_the_task_or_it_does_not(tmp_path, capsys):
    """And what is shuffled is told by neither."""
    sami_probe.main([str(keep_replay(tmp_path / "told", True)), str(keep_replay(tmp_path / "silent", False))])
    (told, told_shuffled, often), (silent, silent_shuffled, _) = (
        [float(cell) for cell in line.split("|")[2:5]] for line in capsys.readouterr().out.splitlines()[2:])
    assert told > 0.99 and often == pytest.approx(1 / 3, abs=1e-3)
    assert max(told_shuffled, silent, silent_shuffled) < 0.6


def test_held_out_episodes_are_whole_and_in_order(tmp_path):
    """The ring begins in its middle; no observation is a row before the first or after the last step."""
    obs, length, bucket, together = sami_probe.replay(keep_replay(tmp_path / "run", True), 30)
    assert obs.shape == (30, 10, 2) and together == 3 and bucket.tolist() == [0, 1, 2] * 10
    assert length.tolist() == [10, 10, 10, 9, 9, 9] * 5
    there = torch.arange(10) < length.unsqueeze(1)
    assert ((obs[..., 0] - bucket.unsqueeze(1)).abs()[there] < 1).all()


@pytest.mark.parametrize("saved, words", [
    (None, "has no checkpoint.pt"), (b"no archive", "is damaged"), ({"buffer": {"rows": 1}}, "keeps no trajectories"),
    ([1], "keeps no trajectories"), (6, "6 episodes are too few")])
def test_what_cannot_be_probed_is_one_line(saved, words, tmp_path, capsys):
    run = tmp_path / "run"
    if isinstance(saved, int):
        keep_replay(run, True, episodes=12, num_envs=6)
    elif saved is not None:
        run.mkdir()
        if isinstance(saved, bytes):
            (run / "checkpoint.pt").write_bytes(saved)
        else:
            torch.save(saved, run / "checkpoint.pt")
    with pytest.raises(sami_probe.UserError, match=words) as error:
        sami_probe.main([str(run)])
    assert "\n" not in str(error.value) and not capsys.readouterr().out


# ---- runs

SMALL = dict(total_timesteps=600, num_envs=6, horizon=20, eval_every=240, eval_episodes=1, checkpoint_every=0,
             hidden="16x2", batch_size=32, encoder_hidden=8, updates_per_step=0.1, compile=False)


def rows_of(folder, name):
    rows = list(csv.DictReader((folder / name).open()))
    return [{k: v for k, v in row.items() if k != "wall_s"} for row in rows]


def test_the_files_of_splits_go_on(tmp_path, monkeypatch):
    """As eval.csv, which tests/test_contract.py looks at: no row is missing or written twice."""
    monkeypatch.setattr(splits, "draw_contexts", lambda *args: None)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tesac.main(tesac.Args(run_dir=str(whole), **SMALL))
    save = runtime.Run.save_if_due

    def save_or_die(run):
        if run.step >= 500:
            raise InterruptedError
        save(run)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(runtime.Run, "save_if_due", save_or_die)
        tesac.main(tesac.Args(run_dir=str(cut), **{**SMALL, "checkpoint_every": 300}))
    tesac.main(tesac.Args(resume=str(cut), run_dir=str(cut), **{**SMALL, "checkpoint_every": 300}))
    for file in ("eval.csv", "eval-moderate.csv", "eval-extreme.csv"):
        assert rows_of(cut, file) == rows_of(whole, file) and len(rows_of(cut, file)) == 4


@pytest.mark.parametrize("name, changes", [
    ("tesac", {"context": "none"}), ("tesac", {"context": "oracle"}), ("satesac", {}),
    ("ccm", {"official": True, "estimator": "softmax"}),
    ("satesac", {"estimator": "softmax", "fixed_weight": True, "bilinear": False})])
def test_every_variant_runs(name, changes, tmp_path, monkeypatch):
    script = SCRIPTS[name]
    monkeypatch.setattr(script, "LOG_EVERY", 60)
    result = script.main(script.Args(run_dir=str(tmp_path / "run"), **{**SMALL, "total_timesteps": 240}, **changes))
    assert result.keys() == set(runtime.EVALUATION) and result["length_mean"] == 20
    assert len((tmp_path / "run" / "tasks.csv").read_text().splitlines()) == 1 + 2 * (15 + 12 + 12)
    assert (tmp_path / "run" / "contexts.png").exists() == (changes.get("context") != "none")
    scalars = {row["name"]: float(row["value"]) for row in rows_of(tmp_path / "run", "scalars.csv")}
    assert ("weight" in scalars) == (name != "tesac") and ("probe_r2" in scalars) == (changes.get("context") != "none")
    assert scalars["probe_r2_observation"] < 1
    assert all(math.isfinite(value) for key, value in scalars.items() if "success" not in key)
    if name != "tesac":
        fixed = name == "ccm" or "fixed_weight" in changes
        assert scalars["weight"] == pytest.approx(0.1) if fixed else 0 <= scalars["weight"] <= 1
    if changes.get("context") == "oracle":
        assert scalars["probe_r2"] == pytest.approx(1, abs=1e-4)


def test_evaluate_prints_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(splits, "record", lambda *args, **task: print("film", args[4].name, task))
    folder = tmp_path / "run"
    saccm.main(saccm.Args(run_dir=str(folder), **{**SMALL, "total_timesteps": 240}))
    (folder / "contexts.png").unlink()
    result = saccm.main(saccm.Args(evaluate=str(folder), run_dir=str(folder), **{**SMALL, "total_timesteps": 240}))
    table = capsys.readouterr().out.splitlines()
    assert table[0] == f"{CHEETAH} after 240 steps, 1 per task, start states of seed 1" and len(table) == 5
    assert [line.split()[0] for line in table[2:]] == ["train", "moderate", "extreme"]
    assert f"{result['return_mean']:.2f}" in table[2] and '"crippled": [' in table[4]
    assert not (folder / "contexts.png").exists()
    args = saccm.Args(evaluate=str(folder), run_dir=str(folder), video=1, **{**SMALL, "total_timesteps": 240})
    saccm.main(args)
    films = [line for line in capsys.readouterr().out.splitlines() if line.startswith("film")]
    assert [film.split()[1] for film in films] == ["train-0", "moderate-0", "extreme-0"]
    assert all("'max_episode_steps': 20" in film and "'crippled': (" in film for film in films)
    assert (folder / "contexts.png").exists()


def test_franka_tasks_are_learned_too(tmp_path, monkeypatch):
    """Goals, episodes that end with success, skills."""
    monkeypatch.setattr(saccm, "LOG_EVERY", 60)
    folder = tmp_path / "run"
    args = saccm.Args(env="FrankaSkill-v0", run_dir=str(folder), **{**SMALL, "horizon": 8, "total_timesteps": 120})
    assert 0 <= saccm.main(args)["success_rate"] <= 1
    scalars = {row["name"]: float(row["value"]) for row in rows_of(folder, "scalars.csv")}
    for part in ("eval", "eval-moderate", "eval-extreme"):
        assert sum(scalars[f"{part}/{skill}"] for skill in ("push", "roll", "pick")) == pytest.approx(1, abs=1e-5)
    assert 0 <= scalars["weight"] <= 1


@pytest.mark.parametrize("args, words", [
    (tesac.Args(env="HalfCheetah-v5"), "HalfCheetah-v5 has no task splits; known are HalfCheetah-dyn-v0"),
    (satesac.Args(contrast_trajectories=1), "--contrast-trajectories must be 2 or more"),
    (ccm.Args(estimator="softmax", contrast_trajectories=2), "softmax needs two positive ones; use 3 or more"),
    (satesac.Args(estimator="softmax", contrast_trajectories=2), "softmax needs two positive ones; use 3 or more"),
    (ccm.Args(kappa=0.0), "--kappa must be greater than 0"), (tesac.Args(window=0), "--window must be greater than 0"),
    (tesac.Args(num_envs=2), f"--num-envs 2: {CHEETAH} has 3 buckets of training tasks; use at least 3"),
    (saccm.Args(env="FrankaSkill-v0", num_envs=5), "FrankaSkill-v0 has 6 buckets of training tasks; use at least 6")])
def test_errors(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = SCRIPTS[type(args).__module__.split(".")[1]]
    with pytest.raises(runtime.UserError, match=words):
        script.main(args)
    assert not any(tmp_path.iterdir())
