"""BR-RCRL against hand numbers: Bayes' rule, bins, returns, the search for an action; datasets; and its runs."""
import csv
import json
import math
import sys
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
import knowledge
import runtime
from algos import br_rcrl, ddpg
from algos.br_rcrl import (Args, Batch, bayes_loss, behaviour, decide, draw, draw_search, gaussian_log_prob,
                           joint, joint_loss, make_agent, nce_loss, outcomes, prepare, project, rewards_to_go, search,
                           tail_log_prob, threshold, to_bins, update)
from benchmarks import curves
from benchmarks import offline as making
from buffers import ReplayBuffer
from envs import offline
from errors import UserError
from tests.tasks import dataset

CPU = torch.device("cpu")
SCALE = {"low": torch.tensor(0.0), "high": torch.tensor(10.0), "mean": torch.tensor(0.0), "std": torch.tensor(1.0),
         "query": torch.tensor(1.0)}


def test_bayes_rule():
    """beta = (.5, .3, .2), p(R|a) = (.1, .5, .9): p(R) = .38. Of all actions the loss is -log pi(a|R)."""
    log_beta, log_outcome = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.1, 0.5, 0.9]).log()
    posterior = (log_beta + log_outcome).softmax(0)
    assert posterior.tolist() == pytest.approx([0.131579, 0.394737, 0.473684], abs=1e-6)
    assert (log_beta + log_outcome).logsumexp(0).exp().item() == pytest.approx(0.38, abs=1e-6)
    scores = (log_beta + log_outcome)[torch.tensor([2, 0, 1])].unsqueeze(0)  # the third action was taken
    assert nce_loss(scores).item() == pytest.approx(0.747214, abs=1e-6)
    assert nce_loss(torch.zeros(4, 257)).item() == pytest.approx(5.549076, abs=1e-5)


def test_bins():
    rtg = torch.tensor([-1.0, 0.0, 1.99, 2.0, 9.9, 10.0, 25.0])
    assert to_bins(rtg, 0.0, 10.0, 5).tolist() == [0, 0, 0, 1, 4, 4, 4]
    assert to_bins(rtg - 5, -5.0, 5.0, 5).tolist() == [0, 0, 0, 1, 4, 4, 4]


def test_rewards_to_go():
    both = rewards_to_go(np.array([1.0, 2.0, 3.0, 1.0, 1.0]), np.array([0, 3, 5]), 0.5)
    assert both.tolist() == [2.75, 3.5, 3.0, 1.5, 1.0]  # an episode does not see the next one
    assert rewards_to_go(np.ones(4), np.array([0, 4]), 0.99).tolist() == pytest.approx([3.940399, 2.9701, 1.99, 1])
    assert rewards_to_go(np.full(1000, 4.0), np.array([0, 1000]), 0.99)[0] == pytest.approx(399.98, abs=0.01)


def test_threshold():
    log_prob = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01]], dtype=torch.float64).log()
    found = [threshold(log_prob, c).item() for c in (0.005, 0.045, 0.1, 0.5 - 1e-9, 1)]
    assert found == [4, 3, 2, 1, 0]
    torch.manual_seed(0)
    log_prob = (3 * torch.randn(2000, 80, dtype=torch.float64)).log_softmax(1)
    before = torch.full((2000,), 80)
    for c in (0.02, 0.05, 0.2, 0.7):
        scanned = []
        for row in log_prob.exp():  # from the top, as the definition says
            total, k = 0.0, 79
            while (total := total + row[k].item()) < c and k > 0:
                k -= 1
            scanned.append(k)
        k = threshold(log_prob, c)
        assert k.tolist() == scanned and (k <= before).all()
        before = k
    rounded = (5 * torch.randn(2000, 80)).log_softmax(1)  # of 32 bits, where a sum may reach 1 too early
    assert (threshold(rounded, 1.0) == 0).all()


def test_tail():
    log_prob = torch.randn(7, 20).log_softmax(1)
    tails = torch.stack([tail_log_prob(log_prob, torch.full((7,), k)) for k in range(20)])
    assert tails[0].abs().max() < 1e-6 and (tails.diff(dim=0) <= 1e-6).all()
    assert torch.allclose(tails[5], log_prob[:, 5:].exp().sum(1).log(), atol=1e-6)
    sharp = torch.tensor([[0.0, -200.0, -300.0]]).log_softmax(1)  # a sum of probabilities would be 0
    assert tail_log_prob(sharp, torch.tensor([1])).item() == pytest.approx(-200, abs=1e-3)


def test_gaussian():
    log_prob = gaussian_log_prob(torch.tensor([0.3, 0.1]), torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.5]).log())
    assert log_prob.item() == pytest.approx(-1.509730, abs=1e-6)


@pytest.mark.parametrize("samples, most", [(64, 0.05), (512, 0.005)])
def test_search_finds_the_best_action(samples, most):
    """log beta = -1/2 (a / .8)^2, log P = -1/2 ((a - .6) / .1)^2: the best action is .590769."""
    mean, log_std = torch.zeros(1, 1), torch.full((1, 1), math.log(0.8))
    for seed in range(50):
        noise = draw_search(samples, 1, torch.Generator().manual_seed(seed))
        best = search(lambda a: -0.5 * ((a / 0.8).square() + ((a - 0.6) / 0.1).square()).sum(2), mean, log_std, noise)
        assert best.item() == pytest.approx(0.590769, abs=most)


def test_c_of_one_is_the_mean_of_the_behaviour():
    args = Args(hidden="16x2", bins=20, c=1.0)
    agent = make_agent(args, 3, 2, False, CPU)
    obs = 5 * torch.randn(50, 3)
    noise = draw_search(64, 2, torch.Generator().manual_seed(0))
    action, k = decide(agent["params"], obs, noise, SCALE, args, discrete=False)
    assert k.tolist() == [0] * 50
    assert torch.allclose(action, behaviour(agent["params"], obs)[0].clamp(-1, 1), atol=1e-6)
    other, k = decide(agent["params"], obs, noise, SCALE, replace(args, c=0.05), discrete=False)
    assert (k > 0).all() and not torch.allclose(other, action, atol=1e-2)


def toy(std: float, args: Args, seed: int = 0) -> Batch:
    """s ~ U(-1, 1), a ~ N(0, std^2) clipped, R = 10 exp(-((a - .6 s) / .2)^2)."""
    torch.manual_seed(seed)
    obs, action = 2 * torch.rand(4096, 1) - 1, (std * torch.randn(4096, 1)).clamp(-1, 1)
    rtg = reward_of(obs, action)
    return Batch(obs, action, rtg, to_bins(rtg, 0.0, 10.0, args.bins), rtg, torch.ones(4096), obs)


def reward_of(obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return 10 * torch.exp(-((action - 0.6 * obs) / 0.2).square())[:, 0]


def learn_toy(args: Args, std: float, updates: int) -> dict:
    data = toy(std, args)
    agent = make_agent(args, 1, 1, False, CPU)
    with torch.no_grad():
        for _ in range(updates):
            rows = torch.randint(4096, (args.batch_size,))
            update(agent, Batch(*(x[rows] for x in data)), draw(args, 1), SCALE, args)
    return agent


TOY = Args(hidden="64x2", bins=20, negatives=32, batch_size=128, learning_rate=1e-3, samples=256)


@pytest.mark.slow
def test_the_best_outcomes_are_asked_for_and_reached():
    """c = .05 earns 9.9 where the data earns 2.2 and the behaviour's mean 2.7; c = 1 is that mean."""
    agent = learn_toy(TOY, 0.5, 1500)
    obs, noise = torch.linspace(-1, 1, 200)[:, None], draw_search(256, 1, torch.Generator().manual_seed(0))
    earned, bins = {}, {}
    for c in (0.05, 0.2, 1.0):
        action, k = decide(agent["params"], obs, noise, SCALE, replace(TOY, c=c), discrete=False)
        earned[c], bins[c] = reward_of(obs, action).mean().item(), k.float().mean().item()
    of_mean = reward_of(obs, behaviour(agent["params"], obs)[0]).mean().item()
    assert earned[0.05] > 9 and 5 < earned[0.2] < earned[0.05] and earned[1.0] == pytest.approx(of_mean, abs=0.3)
    assert bins[0.05] > 17.5 and 6 < bins[0.2] < 13 and bins[1.0] == 0


@pytest.mark.slow
def test_nce_correct_narrows_the_behaviour():
    """True deviation .35: without the correction beta is wider, and the actions earn the same."""
    std, earned, obs = {}, {}, torch.linspace(-1, 1, 100)[:, None]
    noise = draw_search(256, 1, torch.Generator().manual_seed(0))
    for correct in (False, True):
        args = replace(TOY, nce_correct=correct, hidden="32x2")
        agent = learn_toy(args, 0.35, 800)
        std[correct] = behaviour(agent["params"], obs)[1].exp().mean().item()
        action, _ = decide(agent["params"], obs, noise, SCALE, args, discrete=False)
        earned[correct] = reward_of(obs, action).mean().item()
    assert std == {True: pytest.approx(0.36, abs=0.02), False: pytest.approx(0.43, abs=0.02)}
    assert earned[True] == pytest.approx(earned[False], abs=0.1)
    torch.manual_seed(0)
    args = replace(TOY, nce_correct=True)
    batch, params = Batch(*(x[:128] for x in toy(0.35, args))), make_agent(args, 1, 1, False, CPU)["params"]
    loss, logged = bayes_loss(params, {}, batch, draw(args, 1), SCALE, args)
    parts = [logged[f"{name}_loss"].item() for name in ("nce", "rtg", "value")]
    assert loss.item() == pytest.approx(sum(parts), abs=1e-5)


def test_candidates_get_the_return_of_the_data():
    """By hand: two candidates of one state, scored one by one."""
    args = replace(TOY, negatives=2, batch_size=1)
    params = make_agent(args, 1, 1, False, CPU)["params"]
    batch = Batch(torch.tensor([[0.3]]), torch.tensor([[0.2]]), torch.tensor([4.0]), torch.tensor([8]), torch.zeros(1),
                  torch.zeros(1), torch.zeros(1, 1))
    draws = torch.tensor([0.5, -0.7]).view(2, 1, 1, 1)
    mean, log_std = behaviour(params, batch.obs)
    actions = [0.2, (mean + 0.5 * log_std.exp()).clamp(-1, 1).item(), -0.7]
    scores = [(gaussian_log_prob(torch.tensor([[a]]), mean, log_std)
               + outcomes(params, batch.obs, torch.tensor([[[a]]]))[:, 0, 8]).item() for a in actions]
    _, logged = bayes_loss(params, {}, batch, draws, SCALE, args)
    expected = math.log(sum(math.exp(score) for score in scores)) - scores[0]
    assert logged["nce_loss"].item() == pytest.approx(expected, abs=1e-5)


def test_projection():
    """Centres 1, 3, 5, 7, 9: .5 + .5 * 5 = 3; .5 + .5 * 7 = 4 is shared; an end is the reward alone; 99 is too much."""
    prob, reward, discount = torch.eye(5)[[2, 3, 2, 4]], [0.5, 0.5, 7.5, 99.0], [0.5, 0.5, 0.0, 0.5]
    moved = project(prob, torch.tensor(reward), torch.tensor(discount), 0.0, 10.0)
    expected = [[0, 1, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 0.75, 0.25], [0, 0, 0, 0, 1]]
    assert torch.allclose(moved, torch.tensor(expected), atol=1e-6)
    mixed = project(torch.rand(50, 5).softmax(1), torch.randn(50), torch.rand(50), 0.0, 10.0)
    assert torch.allclose(mixed.sum(1), torch.ones(50), atol=1e-5)


@pytest.mark.parametrize("method", ["mc", "td"])
def test_discrete_actions(method):
    """One state, three actions played with (.5, .3, .2), of which the third is the best and the first never good."""
    args = Args(hidden="16x1", bins=5, batch_size=256, learning_rate=1e-2, discrete=method, c=0.05)
    torch.manual_seed(0)
    agent = make_agent(args, 1, 3, True, CPU)
    with torch.no_grad():
        for _ in range(200):
            action = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 256, replacement=True)
            rtg = torch.where(torch.rand(256) < torch.tensor([0.1, 0.5, 0.9])[action], 9.0, 1.0)
            obs = torch.zeros(256, 1)
            batch = Batch(obs, action, rtg, to_bins(rtg, 0.0, 10.0, 5), rtg, torch.ones(256), obs)
            update(agent, batch, draw(args, 3), SCALE, args)
        obs = torch.zeros(1, 1)
        log_joint = joint(agent["params"], obs, args)
        (good, k), (everything, no_k) = (decide(agent["params"], obs, None, SCALE, replace(args, c=c), discrete=True)
                                         for c in (0.05, 1.0))
    assert log_joint.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_joint.logsumexp(2).exp()[0].tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.07)  # beta
    assert k.item() == 4 and no_k.item() == 0
    assert good.exp()[0].tolist() == pytest.approx([0.131579, 0.394737, 0.473684], abs=0.07)  # Bayes' rule
    assert everything.exp()[0].tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.07)


def test_discrete_loss_is_the_likelihood_of_action_and_return():
    args = Args(hidden="8x1", bins=5, batch_size=4)
    params = make_agent(args, 2, 3, True, CPU)["params"]
    batch = Batch(torch.randn(4, 2), torch.tensor([0, 2, 1, 2]), torch.zeros(4), torch.tensor([0, 4, 2, 3]),
                  torch.zeros(4), torch.zeros(4), torch.zeros(4, 2))
    loss, _ = joint_loss(params, {}, batch, draw(args, 3), SCALE, args)
    picked = joint(params, batch.obs, args)[torch.arange(4), batch.action, batch.bin]
    assert loss.item() == pytest.approx(-picked.mean().item(), abs=1e-5)


# datasets


def test_normalized_score():
    low, high = -20.272305, 3234.3  # D4RL's hopper
    assert (offline.normalized(high, low, high), offline.normalized(low, low, high)) == (100, 0)


def write_minari(path, lengths, shuffle=False, actions=None):
    """Files as Minari writes them: one more observation than actions."""
    h5py = pytest.importorskip("h5py")
    path.mkdir(parents=True)
    (path / "metadata.json").write_text(json.dumps({
        "dataset_id": "toy/test-v0", "env_spec": json.dumps({"id": "Pendulum-v1", "max_episode_steps": 200}),
        "ref_min_score": -1500.0, "ref_max_score": -150.0}))
    order = np.random.default_rng(0).permutation(len(lengths)) if shuffle else range(len(lengths))
    with h5py.File(path / "main_data.hdf5", "w") as file:
        for i in order:
            n, group = lengths[i], file.create_group(f"episode_{i}")
            group["observations"] = np.full((n + 1, 3), i, np.float32) + np.arange(n + 1)[:, None] / 100
            group["actions"] = np.full((n, 1), 2.0, np.float32) if actions is None else actions[:n]
            group["rewards"] = np.arange(n, dtype=np.float64) + 100 * i
            group["terminations"] = np.zeros(n, bool)
            group["truncations"] = np.arange(n) == n - 1
    return path


def test_minari(tmp_path):
    lengths = [7, 3, 2, 2, 2, 2, 2, 2, 2, 2, 4, 2]
    folder = write_minari(tmp_path / "data", lengths, shuffle=True)
    data = offline.load(str(folder))
    assert np.diff(data.starts).tolist() == lengths  # episode_10 after episode_9
    assert data.rew[:7].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert data.rew[-6:].tolist() == [1000, 1001, 1002, 1003, 1100, 1101]
    assert data.obs[6].tolist() == pytest.approx([0.06] * 3) and data.obs[7].tolist() == pytest.approx([1.0] * 3)
    assert rewards_to_go(data.rew, data.starts, 0.99)[6] == 6 and data.trunc[6] and not data.trunc[5]
    assert (data.meta["env"], data.meta["ref_min"], data.meta["ref_max"]) == ("Pendulum-v1", -1500, -150)
    assert offline.load(str(folder / "main_data.hdf5")).rew.tolist() == data.rew.tolist()
    vec = envs.make_vec("Pendulum-v1", 1, seed=0)
    assert np.allclose(offline.load_for(str(folder), vec).act, 0.999)  # torque 2 is the bound
    best = offline.load_for(str(folder), vec, share=0.25)
    assert sorted({int(row[0]) for row in best.obs}) == [9, 10, 11]


def test_minari_keeps_it_by_its_id(tmp_path, monkeypatch):
    write_minari(tmp_path / "toy" / "test-v0" / "data", [4])
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert offline.load("toy/test-v0").rew.tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="minari download"):
        offline.load("toy/other-v0")


def test_minari_with_goals(tmp_path):
    """Its groups of observations become the state that the scripts see, with what is left of the episode."""
    vec = envs.make_vec("tests.tasks:PointDense-v0", 1)
    obs = {name: np.asarray(x[0]) for name, x in vec.reset(0).items()}
    obs["observation"] = obs["observation"][:-1]  # what is left is appended by our environments
    folder = write_minari(tmp_path / "data", [3])
    import h5py
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        del file["episode_0/observations"]
        del file["episode_0/actions"]
        file["episode_0/actions"] = np.zeros((3, 2), np.float32)
        for i, name in enumerate(obs):
            file[f"episode_0/observations/{name}"] = np.full((4, len(obs[name])), i, np.float32)
    data = offline.load_for(str(folder), vec)
    widths = [len(obs[name]) for name in ("achieved_goal", "desired_goal", "observation")]
    order = np.repeat([list(obs).index(name) for name in ("achieved_goal", "desired_goal", "observation")], widths)
    assert data.obs[:, :-1].tolist() == [order.tolist()] * 3
    assert data.obs[:, -1].tolist() == pytest.approx([1, 1 - 1 / 200, 1 - 2 / 200])


def test_a_nan_leaves_its_episode_out(tmp_path, capsys):
    actions = np.zeros((3, 1), np.float32)
    folder = write_minari(tmp_path / "data", [3, 3], actions=actions)
    import h5py
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        file["episode_0/rewards"][1] = np.nan
    data = offline.load(str(folder))
    assert len(data.rew) == 3 and data.rew[0] == 100 and "1 of 2 episodes" in capsys.readouterr().err


def test_a_grid_is_zeros_and_ones():
    vec = envs.make_vec("MiniGrid-Empty-5x5-v0", 2, seed=0)
    obs = vec.reset(0)
    x = offline.features(envs.to_tensors(obs))
    assert x.shape == (2, 49 * 20 + 4) and x.sum(1).tolist() == [49 * 3 + 1] * 2
    kinds = x[0, :49 * 11].view(7, 7, 11).argmax(2).numpy()
    assert np.array_equal(kinds, obs["image"][0, :, :, 0])


def filled_buffer(num_envs: int, steps: int, capacity: int, horizon: int = 1) -> tuple[ReplayBuffer, list]:
    """A buffer after `steps` of Pendulum, whose episodes have 200 steps, and all (obs, action, reward) in order."""
    vec = envs.make_vec("Pendulum-v1", num_envs)
    obs, buffer, seen = vec.reset(0), ReplayBuffer(capacity, horizon, num_envs, 3, 1), []
    rng = np.random.default_rng(0)
    for _ in range(steps):
        action = rng.uniform(-1, 1, (num_envs, 1)).astype(np.float32)
        next_obs, reward, terminated, truncated, info = vec.step(vec.to_box(action))
        buffer.add(envs.flatten(obs), torch.from_numpy(action), reward, terminated, truncated,
                   envs.flatten(info["final_obs"]))
        seen.append((obs, vec.to_box(action), reward))
        obs = next_obs
    return buffer, seen


@pytest.mark.parametrize("steps, capacity, horizon", [(450, 10_000, 1), (400, 10_000, 1), (450, 1003, 1),
                                                      (450, 10_000, 200)])
def test_a_replay_buffer_gives_its_episodes(steps, capacity, horizon):
    buffer, seen = filled_buffer(3, steps, capacity, horizon)
    vec = envs.make_vec("Pendulum-v1", 1)
    data = offline.from_replay(buffer.state_dict(), 3, 3, 1, vec)
    whole = 3 if capacity == 1003 else 6  # 450 steps hold two episodes each; a ring of 334 steps each one
    assert np.diff(data.starts).tolist() == [200] * whole and data.trunc.sum() == whole and not data.term.any()
    found = {tuple(data.obs[begin].tolist()): begin for begin in data.starts[:-1]}
    for i in range(3):
        for first in (0, 200):
            start = tuple(seen[first][0][i].astype(np.float32).tolist())
            if capacity == 1003 and first == 0:
                assert start not in found
                continue
            begin = found[start]
            for t in (0, 77, 199):
                obs, action, reward = (column[i] for column in seen[first + t])
                assert np.allclose(data.obs[begin + t], obs) and np.allclose(data.act[begin + t], action)
                assert data.rew[begin + t] == pytest.approx(reward, rel=1e-6)


def test_collected_episodes_are_whole_and_equal_for_equal_seeds(tmp_path):
    vec = envs.make_vec("CartPole-v1", 3)
    parts = [offline.collect(lambda obs: (obs[:, 2] > 0).astype(np.int64), vec, 7, seed=5) for _ in range(2)]
    data = parts[0]
    assert len(data.starts) == 8 and (data.term | data.trunc)[data.starts[1:] - 1].all()
    assert (data.term | data.trunc).sum() == 7 and data.returns.tolist() == np.diff(data.starts).tolist()
    assert np.array_equal(data.obs, parts[1].obs)
    both = offline.join(parts, {"env": "CartPole-v1", "ref_min": 20.0})
    offline.save(tmp_path / "both.npz", both)
    again = offline.load(str(tmp_path / "both.npz"))
    assert np.allclose(again.obs, both.obs) and again.starts.tolist() == both.starts.tolist()
    assert again.meta["ref_min"] == 20.0 and again.policy_id.tolist() == [0] * len(data.rew) + [1] * len(data.rew)


@pytest.mark.exports
def test_medium_replay_and_medium_expert_of_a_run(tmp_path, monkeypatch, capsys):
    """From a run of 800 steps of Pendulum, whose episodes have 200: what it plays with noise, all that it saw, and half
    of what it plays with noise and half of what it plays without."""
    folder = tmp_path / "RUN"
    ddpg.main(ddpg.Args(env="Pendulum-v1", total_timesteps=800, num_envs=2, learning_starts=200, hidden="8x1",
                        batch_size=16, compile=False, eval_every=0, eval_episodes=1, run_dir=str(folder)))

    def made(*policies: str, expert: str = "") -> offline.Dataset:
        words = ["--env", "Pendulum-v1", "--out", str(tmp_path / "d.npz"), "--policies", *policies, "--steps", "4000"]
        monkeypatch.setattr(sys, "argv", ["", *words, *(["--expert", expert] if expert else [])])
        making.main()
        return offline.load(str(tmp_path / "d.npz"))

    vec = envs.make_vec("Pendulum-v1", 1)
    plays, = knowledge.load(f"run:{folder}", "Pendulum-v1", 1, envs.example_of(vec, vec.reset(0)), -1.0).values()

    def noise_of(data: offline.Dataset) -> np.ndarray:
        """What was added to the policy's actions, as a share of the bound of 2, where that was not clipped."""
        inside = np.abs(data.act[:, 0]) < 1.99
        return (data.act[:, 0] / 2 - plays(torch.from_numpy(data.obs))[:, 0].numpy())[inside]

    replay = made(f"replay:{folder}", expert="random")
    assert np.diff(replay.starts).tolist() == [200] * 4 and replay.trunc.sum() == 4
    buffer = torch.load(folder / "checkpoint.pt", weights_only=True)["buffer"]["rows"][:800]
    assert sorted(map(tuple, buffer[:, :3].tolist())) == sorted(map(tuple, replay.obs.tolist()))
    assert "ref_max" not in replay.meta and "--expert names a better one" in capsys.readouterr().out  # random's own
    medium = made(f"run:{folder}@0.2")
    assert len(medium.rew) == 4000 and noise_of(medium).std() == pytest.approx(0.2, abs=0.03)
    both = made(f"run:{folder}@0.2", f"run:{folder}", expert=f"run:{folder}")
    assert np.bincount(both.policy_id).tolist() == [2000, 2000] and np.diff(both.starts).tolist() == [200] * 20
    assert both.meta["policies"] == [f"run:{folder}@0.2", f"run:{folder}"] and len(set(both.meta["digests"])) == 1
    exact = np.abs(both.act[2000:, 0] / 2 - plays(torch.from_numpy(both.obs[2000:]))[:, 0].numpy())
    assert exact.max() < 1e-4
    assert both.meta["expert"] == f"run:{folder}"


def test_a_file_that_cannot_be_written_is_said_before_all_is_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "gather", lambda *_: pytest.fail("it collects"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(making.os, "access", lambda path, mode: path != tmp_path / "locked")  # for root all is open
    for out in ("file/x/d.npz", "folder.npz", "locked/x/d.npz"):
        monkeypatch.setattr(sys, "argv", ["", "--env", "Pendulum-v1", "--policies", "random", "--out",
                                          str(tmp_path / out)])
        with pytest.raises(ValueError, match=f"--out {tmp_path / out} cannot be written, because of .*; name a file"):
            making.main()
        assert not (tmp_path / "locked/x").exists()


def test_damaged_and_foreign_datasets_are_one_line(tmp_path):
    vec = envs.make_vec("Pendulum-v1", 1)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.hdf5").write_text("no")
    write_minari(tmp_path / "two" / "expert-v0", [3])
    write_minari(tmp_path / "two" / "random-v0", [3])
    for source, word in (("", "--dataset"), (tmp_path / "none.npz", "not there"),
                         (tmp_path / "two", "several datasets, .*expert-v0.*, .*random-v0"),
                         (tmp_path / "cut.npz", "damaged"),
                         (tmp_path / "other.npz", "damaged"), (tmp_path / "empty", "HDF5"),
                         (tmp_path / "text.hdf5", "OSError")):
        with pytest.raises(UserError, match=word) as error:
            offline.load_for(str(source), vec)
        assert "\n" not in str(error.value)
    folder = write_minari(tmp_path / "data", [5])
    with pytest.raises(UserError, match="--env names"):
        offline.load_for(str(folder), envs.make_vec("CartPole-v1", 1))


@pytest.mark.parametrize("changed, words", [
    (dict(obs=np.zeros(5)), "do not fit"), (dict(obs=np.full((5, 4), np.nan)), "NaN"),
    (dict(meta="null"), "do not fit"), (dict(meta="{"), "JSONDecodeError"),
    (dict(obs=np.full((5, 4), b"x")), "TypeError"), (dict(policy_id=np.zeros(3, int)), "do not fit"),
    (dict(rew=np.zeros((5, 1))), "do not fit"), (dict(act=np.full(5, 0.5)), "float64")])
def test_a_file_that_does_not_fit_is_one_line(changed, words, tmp_path):
    file = tmp_path / "a.npz"
    columns = dict(obs=np.zeros((5, 4)), act=np.zeros(5, int), rew=np.zeros(5), term=np.zeros(5, bool),
                   trunc=np.zeros(5, bool), ep_start=np.array([0, 5]), policy_id=np.zeros(5, int), meta="{}")
    vec = envs.make_vec("CartPole-v1", 1)
    np.savez(file, **columns)
    assert len(offline.load_for(str(file), vec).rew) == 5
    np.savez(file, **columns | changed)
    with pytest.raises(UserError, match=f"^{file}.*{words}") as error:
        offline.load_for(str(file), vec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changed, words", [
    (dict(observations=np.zeros(6)), "do not fit"), (dict(observations={"pos": np.zeros((6, 2))}), "observes pos"),
    (dict(observations=np.full((6, 3), b"x")), "TypeError"), (dict(rewards=np.zeros(4)), "5 actions, 4 rewards"),
    (dict(rewards=np.zeros((5, 1))), "do not fit"), ({"env_spec": "{"}, "metadata.json.*JSONDecodeError"),
    ([1], "metadata.json.*'list' object"),
    (dict(observations=np.zeros((1, 3)), actions=np.zeros((0, 1)), rewards=[], terminations=[], truncations=[]),
     "0 actions.*a step at least")])
def test_a_dataset_of_minari_that_does_not_fit_is_one_line(changed, words, tmp_path):
    folder, vec = write_minari(tmp_path / "data", [5]), envs.make_vec("Pendulum-v1", 1)
    import h5py
    if "env_spec" in changed or isinstance(changed, list):
        (folder / "metadata.json").write_text(json.dumps(changed))
    else:
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            for name, value in changed.items():
                del file[f"episode_0/{name}"]
                for part, x in value.items() if isinstance(value, dict) else [("", value)]:
                    file[f"episode_0/{name}/{part}".rstrip("/")] = x
    with pytest.raises(UserError, match=f"^{folder}.*{words}") as error:
        offline.load_for(str(folder), vec)
    assert "\n" not in str(error.value)


def test_a_number_that_cannot_vary_and_a_reference_that_is_not_known(tmp_path):
    folder = write_minari(tmp_path / "data", [2], actions=np.array([[0.0, 0.5], [2.0, 0.5]], np.float32))
    (folder / "metadata.json").write_text(json.dumps({"ref_min_score": None, "ref_max_score": 3}))
    vec = envs.make_vec("Pendulum-v1", 1)
    vec.action_space = gym.spaces.Box(np.array([-4, 0.5], np.float32), np.array([4, 0.5], np.float32))
    data = offline.load_for(str(folder), vec)
    assert data.act.tolist() == [[0, 0], [0.5, 0]] and "ref_min" not in data.meta and data.meta["ref_max"] == 3
    with pytest.raises(UserError, match="Crafter-Symbols-EatCow.* observes .*view"):
        offline.load_for(str(folder), envs.make_vec("Crafter-Symbols-EatCow", 1))


# runs


SMALL = dict(total_timesteps=40, eval_every=20, eval_episodes=2, checkpoint_every=20, hidden="8x1", bins=8,
             batch_size=16, negatives=4, samples=8, compile=False)


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    vec, rng = envs.make_vec("CartPole-v1", 4), np.random.default_rng(0)
    data = offline.collect(lambda obs: rng.integers(2, size=4), vec, 8, seed=0)
    path = tmp_path_factory.mktemp("data") / "CartPole-v1.npz"
    offline.save(path, data._replace(meta={"env": "CartPole-v1", "ref_min": 20.0, "ref_max": 500.0}))
    return str(path)


@pytest.mark.parametrize("discrete, kwargs", [
    (False, dict(curve=True)), (False, dict(mode="bc", top=0.5)), (False, dict(mode="rcrl")), (True, dict(curve=True)),
    (True, dict(discrete="td")), (True, dict(mode="bc")), (True, dict(mode="rcrl", query=0.5))])
@pytest.mark.exports
def test_every_mode_trains_and_leaves_its_policy(discrete, kwargs, cartpole, tmp_path, monkeypatch):
    monkeypatch.setattr(br_rcrl, "LOG_EVERY", 20)
    env_id = "CartPole-v1" if discrete else "tests.tasks:PointDense-v0"
    args = Args(**{**SMALL, **kwargs, "env": env_id, "dataset": cartpole if discrete else dataset(),
                   "run_dir": str(tmp_path / "run")})
    result = br_rcrl.main(args)
    rows = list(csv.DictReader((tmp_path / "run" / "scalars.csv").open()))
    names = {row["name"] for row in rows}
    assert "eval/normalized" in names and math.isfinite(result["return_mean"])
    asked = {"br": {"asked_bin", "asked_return"}, "rcrl": {"asked_return"}, "bc": set()}[args.mode]
    assert names & {"asked_bin", "asked_return", "clamped"} == asked | (set() if discrete else {"clamped"})
    if args.mode == "rcrl":
        told, = (float(row["value"]) for row in rows if row["name"] == "asked_return" and row["step"] == "40")
        _, scale = prepare(offline.load_for(args.dataset, envs.make_vec(env_id, 1)), args)
        assert told == pytest.approx(scale["quantiles"][round(100 * args.query)].item(), rel=1e-5)
    assert ("return_by_c/0.05" in names) == args.curve
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert curves.variant(config).startswith("br_rcrl --batch-size 16")
    assert curves.task_of(config["args"]) == ("CartPole-v1" if discrete else "tests.tasks:PointDense-v0-point")
    if kwargs.get("curve"):
        score = br_rcrl.main(runtime.cli(Args, "br_rcrl", ["--evaluate", str(tmp_path / "run"), "--c", "1"]))
        assert math.isfinite(score["return_mean"])
    vec = envs.make_vec(env_id, 1)
    obs = envs.example_of(vec, vec.reset(0))
    output = torch.export.load(tmp_path / "run" / "policy.pt2").module()(obs)
    played, = knowledge.load(f"run:{tmp_path / 'run'}", env_id, 2, obs, 0.0 if discrete else -1.0).values()
    assert output.shape == (2, 2)
    assert torch.allclose(played(obs), output.exp() if discrete else output, atol=1e-5)


def test_bad_arguments_are_one_line(tmp_path):
    for kwargs, word in ((dict(dataset=""), "--dataset"), (dict(c=0.0), "--c"), (dict(top=2.0), "--top"),
                         (dict(drop_tail=10_000), "--drop-tail"), (dict(vmin=5.0, vmax=1.0), "no bins")):
        with pytest.raises(UserError, match=word):
            br_rcrl.main(Args(**{**SMALL, "env": "tests.tasks:Point-v0", "dataset": dataset(),
                                 "run_dir": str(tmp_path / "run"), **kwargs}))
        assert not (tmp_path / "run").exists()


def test_prepare_leaves_tails_out():
    data = offline.from_episodes([
        {"obs": np.zeros((5, 1), np.float32), "act": np.zeros((5, 1), np.float32), "rew": np.ones(5, np.float32),
         "term": np.arange(5) == (4 if ends else -1), "trunc": np.arange(5) == (-1 if ends else 4)} for ends in (1, 0)],
        {})
    kept = [prepare(data, replace(TOY, gamma=0.5, **kwargs))[0]["rows"].tolist()
            for kwargs in ({}, {"drop_tail": 2}, {"discrete": "td"})]
    assert kept == [list(range(10)), list(range(8)), list(range(9))]
    mean = prepare(data, replace(TOY, gamma=0.5, drop_tail=2))[1]["mean"].item()
    assert mean == pytest.approx((8.0625 + 1.9375 + 1.875 + 1.75) / 8)  # of what is kept
    columns, scale = prepare(data, replace(TOY, gamma=0.5, vmin=-1.0))
    assert columns["rtg"][:5].tolist() == [1.9375, 1.875, 1.75, 1.5, 1.0] and scale["low"] == -1
    assert scale["high"].item() == pytest.approx(1.9375, abs=1e-3) and math.isnan(scale["ref_min"])
