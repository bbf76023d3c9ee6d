"""The replay buffer against hand-made episodes: what is kept, what is drawn, which goals hindsight gives."""
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from buffers import Batch, ReplayBuffer, relabel


def add(buffer, names, ended, truncated=None):
    """One step of every environment; its observation is a name."""
    obs = torch.tensor(names, dtype=torch.float32).unsqueeze(1)  # (num_envs, 1)
    terminated, truncated = np.array(ended), np.zeros(len(names), bool) if truncated is None else np.array(truncated)
    buffer.add(obs, -obs, 10.0 * np.array(names), terminated, truncated, obs + 0.5)


def test_a_row_is_the_transition():
    """Two environments: a terminal state is stored as one, a time limit is not; both complete their episode."""
    buffer = ReplayBuffer(8, 1, 2, f=2, d=1)
    buffer.add(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[0.1], [0.2]]), np.array([5.0, 6]),
               np.array([True, False]), np.array([False, True]), torch.tensor([[7.0, 8], [9, 10]]))
    assert buffer.stored == 2
    assert torch.allclose(buffer.rows[:2], torch.tensor([[1, 2, 0.1, 5, 1, 7, 8], [3, 4, 0.2, 6, 0, 9, 10]]))
    batch = buffer.sample(64)
    first = batch.obs[:, 0] == 1
    assert [tuple(x.shape) for x in batch] == [(64, 2), (64, 1), (64, 1), (64, 1), (64, 2)]
    one, other = ([1, 2], [0.1], [5], [1], [7, 8]), ([3, 4], [0.2], [6], [0], [9, 10])
    for column, of_first, of_second in zip(batch, one, other):
        expected = torch.where(first.unsqueeze(1), torch.tensor(of_first), torch.tensor(of_second))
        assert torch.allclose(column, expected.float())
    assert 0 < first.sum() < 64


def test_the_last_rows_are_kept_and_open_episodes_wait():
    """Episodes of two and of four steps, room for twelve rows: the oldest go first."""
    buffer = ReplayBuffer(12, 4, 2, f=1, d=1)
    for t in range(10):
        truncated = [False, t % 4 == 3]
        add(buffer, [100 + t, 200 + t], [t % 2 == 1, False], truncated)
    assert buffer.stored == 5 * 2 + 2 * 4
    # the last 12 of 18 rows; the two oldest are the rest of an episode
    assert buffer.rows.roll(-18 % 12, 0)[:, 0].tolist() == [202, 203, 104, 105, 106, 107, 204, 205, 206, 207, 108, 109]
    assert buffer.left.roll(-18 % 12).tolist() == [1, 0, 1, 0, 1, 0, 3, 2, 1, 0, 1, 0]
    assert buffer.rows.roll(-18 % 12, 0)[:, 3].tolist() == [0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1]  # no time limit
    drawn = buffer.sample(500).obs.unique().tolist()
    assert drawn == [*range(104, 110), 202, 203, 204, 205, 206, 207]
    batch, later = buffer.draw(500, 500)
    first = batch.obs[:len(later.obs)]
    assert (later.obs > first).all() and (later.obs // 100 == first // 100).all()


def test_transitions_are_drawn_evenly_and_goals_from_all_that_follows():
    """An episode of 50 steps and one of a single step: 51 rows, as likely each; a last step keeps its goal."""
    buffer = ReplayBuffer(200, 50, 1, f=1, d=1)
    add(buffer, [-1], [True])
    assert buffer.draw(8, 6)[1].obs.shape == (0, 1)
    for t in range(50):
        add(buffer, [t], [t == 49])
    torch.manual_seed(0)
    batch, later = buffer.draw(100_000, 50_000)
    relabelled, others = batch.obs[:50_000, 0].long(), batch.obs[50_000:, 0].long()
    assert torch.bincount(others + 1, minlength=51).tolist() == pytest.approx([980] * 51, abs=130)
    assert torch.bincount(relabelled + 1, minlength=51).tolist() == pytest.approx([0, *[1020] * 49, 0], abs=130)
    gap = later.obs[:, 0].long() - relabelled
    assert gap.min() == 1 and gap.max() == 49
    # a row with k rows after it takes the next one with probability 1/k: (1/49) sum over k = 1..49
    assert (gap == 1).float().mean().item() == pytest.approx(0.0914, abs=0.004)


def test_relabelled_transitions_get_the_goal_and_its_reward():
    """Features are achieved | desired | observation. Of three rows the first two are relabelled."""
    obs = torch.tensor([[0.0, 9, 1], [1, 9, 1], [2, 9, 1]])
    following = torch.tensor([[1.0, 9, 2], [5, 9, 2], [3, 9, 2]])
    batch = Batch(obs, torch.zeros(3, 1), torch.full((3, 1), -7.0), torch.tensor([[0.0], [1], [0]]), following)
    later = Batch(torch.tensor([[1.0, 9, 0], [4, 9, 0]]), *[torch.zeros(2, 1)] * 4)

    def compute_reward(achieved, desired):
        return -(achieved[:, 0] != desired[:, 0]).astype(np.float32)
    relabel(batch, later, 1, compute_reward)
    assert batch.obs.tolist() == [[0, 1, 1], [1, 4, 1], [2, 9, 1]]
    assert batch.next_obs.tolist() == [[1, 1, 2], [5, 4, 2], [3, 9, 2]]
    assert batch.reward[:, 0].tolist() == [0, -1, -7]  # reached; not; as it was
    assert batch.terminated[:, 0].tolist() == [0, 1, 0]


def test_drawing_changes_no_row():
    buffer = ReplayBuffer(40, 4, 1, f=3, d=1, g=1, compute_reward=lambda achieved, desired: achieved[:, 0] * 0 - 5)
    for t in range(8):
        obs = torch.tensor([[t, 50.0, 1]])
        buffer.add(obs, torch.zeros(1, 1), np.zeros(1), np.array([t % 4 == 3]), np.array([False]), obs + 1)
    before = buffer.rows.clone()
    batch = buffer.sample(32, relabelled=20)
    assert (batch.reward == -5).sum() == 20 and (batch.obs[:20, 1] != 50).all() and (batch.obs[20:, 1] == 50).all()
    assert torch.equal(buffer.rows, before)


@settings(max_examples=40, deadline=None)
@given(strategies.lists(strategies.tuples(strategies.booleans(), strategies.booleans()), min_size=8, max_size=60),
       strategies.integers(4, 30), strategies.integers(0, 64))
def test_episodes_are_never_mixed(ends, capacity, relabelled):
    """Any pattern of ends, any capacity: hindsight stays inside an episode and goes forward in time."""
    buffer, episode, t = ReplayBuffer(capacity, 4, 2, f=2, d=1), [0, 1], [0, 0]
    for pair in ends:
        obs = torch.tensor([[episode[i], t[i]] for i in range(2)]).float()
        buffer.add(obs, torch.zeros(2, 1), np.zeros(2), np.array(pair), np.zeros(2, bool), obs)
        for i in range(2):
            t[i] += 1
            if pair[i] or t[i] == 4:
                episode[i], t[i] = episode[i] + 2, 0
    if buffer.stored:
        batch, later = buffer.draw(64, relabelled)
        first = batch.obs[:len(later.obs)]
        relabellable = (buffer.left[:buffer.stored] > 0).float().mean()  # share of the rows
        assert len(first) <= relabelled and (len(first) > 0 or relabelled < 16 or relabellable < 0.5)
        assert torch.equal(first[:, 0], later.obs[:, 0]) and (later.obs[:, 1] > first[:, 1]).all()
        assert not torch.isin(batch.obs[:, 0], torch.tensor(episode).float()).any()  # the open ones


def test_a_saved_buffer_goes_on_as_the_other():
    buffers = [ReplayBuffer(12, 4, 2, f=1, d=1) for _ in range(2)]
    for t in range(23):
        if t == 9:
            buffers[1].load_state_dict(deepcopy(buffers[0].state_dict()))
        for buffer in buffers[:1 if t < 9 else 2]:
            add(buffer, [100 + t, 200 + t], [t % 2 == 1, t % 3 == 2])
    for name, value in buffers[0].state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(buffers[1].state_dict()[name])), name
