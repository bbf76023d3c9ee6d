"""SAC + HER and what descends from it: the policy's density, one update written out, every transition by hand."""
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from algos import sac, sac_handover, sac_kian
from buffers import Batch
from networks import mlp
from tests.clock import BY_HAND, Counted

RULES = "def low(obs):\n    return 0 * obs - 0.25\n\n\ndef high(obs):\n    return 0 * obs + 0.75\n"


def make(script: ModuleType, args, f: int, d: int, n: int) -> dict:
    """A fresh agent; n external policies where the method has any."""
    return script.make_agent(args, f, d, *([] if script is sac else [n]), torch.device("cpu"))


def inputs_of(script: ModuleType, batch: int, f: int, d: int, n: int):
    """Normalised observations as the networks see them, and noise."""
    features = torch.randn(batch, f)
    if script is sac:
        return features, sac.draw_noise(batch, d)
    return sac_kian.Seen(features, torch.rand(batch, n, d) * 2 - 1), sac_kian.draw_noise(batch, d, n)


def constant_actor(mean: list[float], log_std: list[float]) -> dict:
    """A policy that is the same in all states, of one number."""
    both = torch.tensor([*mean, *log_std])
    return {"actor.0.weight": torch.zeros(1, len(both)), "actor.0.bias": both}


def test_the_log_probability_is_that_of_a_squashed_gaussian():
    """By hand in four dimensions, against torch.distributions, and as a density: it integrates to one."""
    u, mean = torch.tensor([[0.3, -0.1, 0.2, 0.1]]), torch.tensor([[0.2, -0.1, 0.0, 0.3]])
    actor = constant_actor(mean[0].tolist(), [-1.0] * 4)
    action, log_prob = sac.gaussian_policy(actor, torch.zeros(1, 1), (u - mean) / np.exp(-1))
    assert torch.allclose(action, u.tanh(), atol=1e-6) and log_prob.item() == pytest.approx(0.140119, abs=1e-5)
    reference = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, np.exp(-1)), torch.distributions.TanhTransform())
    assert log_prob.item() == pytest.approx(reference.log_prob(action).sum().item(), abs=1e-4)
    noise = torch.linspace(-7, 7, 20_001).unsqueeze(1)
    action, log_prob = sac.gaussian_policy(constant_actor([0.4], [-0.5]), torch.zeros(20_001, 1), noise)
    assert torch.trapezoid(log_prob.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-3)


def test_log_std_is_bounded():
    for log_std, expected in ((50.0, 2.0), (-50.0, -20.0)):
        noise = torch.full((1, 1), 0.1)
        log_prob = sac.gaussian_policy(constant_actor([0.0], [log_std]), torch.zeros(1, 1), noise)[1]
        action = np.tanh(np.exp(expected) * 0.1)
        by_hand = -0.005 - expected - 0.5 * np.log(2 * np.pi) - np.log(1 - action ** 2 + 1e-6)
        assert log_prob.item() == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.parametrize("script", [sac, sac_kian])
def test_update_is_adam_on_the_stated_losses(script):
    """Two updates against torch.optim.Adam and autograd, written out: the order of the steps, alpha, the targets."""
    torch.manual_seed(1)
    f, d, n, size = 6, 2, 2, 32
    args = script.Args(hidden="16x2", batch_size=size, initial_temperature=0.3)
    agent = make(script, args, f, d, n)
    actor, critic, target, temperature = ({name: p.clone().requires_grad_() for name, p in agent[group].items()}
                                          for group in ("actor", "critic", "target", "temperature"))
    of_critic, of_actor, of_temperature = (torch.optim.Adam(p.values(), args.learning_rate)
                                           for p in (critic, actor, temperature))

    def q_of(params, obs, action):
        features = obs if script is sac else obs.features
        return mlp(params, "q", torch.cat([features, action], 1))[..., 0]  # (2, B)

    for _ in range(2):
        (obs, noise), (next_obs, next_noise) = (inputs_of(script, size, f, d, n) for _ in range(2))
        action, reward, terminated = torch.rand(size, d) * 2 - 1, torch.randn(size, 1), torch.rand(size, 1).round()
        with torch.no_grad():
            logged = script.update(agent, Batch(obs, action, reward, terminated, next_obs), noise, next_noise, args)

        alpha = temperature["log_alpha"].exp().item()
        with torch.no_grad():
            following = script.decide(actor, next_obs, next_noise, args)
            value = q_of(target, next_obs, following.action).amin(0) - alpha * following.log_prob
            y = reward[:, 0] + 0.95 * torch.where(terminated[:, 0] == 1, 0.0, value)
        of_critic.zero_grad()
        first, second = q_of(critic, obs, action)
        loss = 0.5 * ((first - y) ** 2).mean() + 0.5 * ((second - y) ** 2).mean()
        loss.backward()
        of_critic.step()
        assert logged["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
        now = script.decide(actor, obs, noise, args)
        of_actor.zero_grad()
        (alpha * now.log_prob - q_of(critic, obs, now.action).amin(0)).mean().backward()
        of_actor.step()
        of_temperature.zero_grad()
        (-temperature["log_alpha"] * (now.log_prob.detach().mean() - d)).backward()  # target entropy -d
        of_temperature.step()
        with torch.no_grad():
            for name, p in target.items():
                p.copy_(0.95 * p + 0.05 * critic[name])
    for group, params in (("actor", actor), ("critic", critic), ("target", target), ("temperature", temperature)):
        assert agent[group].keys() == params.keys()
        for name, p in params.items():
            assert torch.allclose(agent[group][name], p, atol=5e-6), (group, name)


@pytest.fixture
def played(request, tmp_path, monkeypatch):
    """`script.main` in Counted-v0: (the script, its checkpoint, decisions of every step, inputs of every update)."""
    script, decisions, updates = request.param, [], []
    decide, update = script.decide, script.update
    learning = []

    def noted_decide(actor, obs, noise, args):
        decision = decide(actor, obs, noise, args)
        if len(decision.action) == 2 and not learning:  # not those of evaluations, nor of updates
            decisions.append(decision)
        return decision

    def noted_update(agent, batch, *inputs):
        learning.append(True)
        updates.append(batch)
        scalars = update(agent, batch, *inputs)
        learning.clear()
        return scalars
    monkeypatch.setattr(script, "decide", noted_decide)
    monkeypatch.setattr(script, "update", noted_update)
    monkeypatch.setattr(Counted, "received", {})
    (tmp_path / "rules.py").write_text(RULES)
    given = {} if script is sac else {"knowledge": str(tmp_path / "rules.py"), "cosine_scale": 0.1}  # all act
    if script is sac_handover:
        given["solo_fraction"] = 0.0  # whoever is drawn acts
    args = script.Args(env="Counted-v0", total_timesteps=24, num_envs=2, hidden="8x1", batch_size=6, compile=False,
                       updates_per_step=0.25, random_actions=request.node.callspec.params["random_actions"],
                       eval_every=0, eval_episodes=3, checkpoint_every=0, device="cpu", run_dir=str(tmp_path / "run"),
                       **given)
    script.main(args)
    return script, torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True), decisions, updates


@pytest.mark.parametrize("random_actions", [0.0, 1.0])
@pytest.mark.parametrize("played", [sac, sac_kian, sac_handover], indirect=True)
def test_every_transition_by_hand(played, random_actions):
    script, saved, decisions, updates = played
    obs, action, reward, terminated, next_obs = saved["buffer"]["rows"].T
    assert torch.equal(torch.stack([obs, reward, terminated, next_obs], 1), BY_HAND)
    assert torch.equal(saved["loop"]["obs"], torch.tensor([[16.0], [1017.0]]))  # 1017 belongs to the next episode
    received = [Counted.received[count] for count in obs.tolist()]
    assert torch.allclose(torch.tensor(received), 2 * action)  # the box is twice as wide
    # three steps of two copies fill a batch: then nine decisions, of which random_actions are the inner policy's alone
    assert len(decisions) == 9
    decided, done = torch.cat([decision.action for decision in decisions])[:, 0], action[6:]
    inner = torch.ones(18, dtype=torch.bool)
    if script is not sac:
        who = torch.cat([decision.selected for decision in decisions]).argmax(1)
        inner = who == 0
        assert {0, 1, 2} == set(who.tolist())
        assert torch.allclose(done[~inner], torch.tensor([-0.25, 0.75])[who[~inner] - 1])
    assert torch.equal(done[inner] == decided[inner], torch.full((int(inner.sum()),), random_actions == 0))
    assert torch.equal(done[~inner], decided[~inner]) and (done.abs() <= 1).all()


@pytest.mark.parametrize("random_actions", [0.2])
@pytest.mark.parametrize("played", [sac, sac_kian, sac_handover], indirect=True)
def test_updates_see_normalised_transitions_in_their_number(played, random_actions):
    """Half an update is due at each of nine steps; at the first one, the fifth step, ten observations were seen."""
    script, saved, _, updates = played
    assert len(updates) == saved["agent"]["count"] == 4 and saved["loop"]["updates_owed"] == 0.5
    mean, std = BY_HAND[:10, 0].double().mean(), BY_HAND[:10, 0].double().std(correction=0)
    batch = updates[0]
    obs, next_obs = (x if script is sac else x.features for x in (batch.obs, batch.next_obs))
    seen = torch.cat([obs * std + mean, batch.reward, batch.terminated, next_obs * std + mean], 1).float()  # (6, 4)
    distance = (seen[:, None] - BY_HAND[None, :10]).abs().amax(2)  # (6, 10)
    assert (distance.amin(1) < 0.01).all()


class BitFlip(gym.Env):
    """Four bits; every positive component of the action flips its bit; reach a random pattern within eight steps."""

    bits = gym.spaces.Box(-1, 1, (4,), np.float64)
    observation_space = gym.spaces.Dict(observation=bits, achieved_goal=bits, desired_goal=bits)
    action_space = gym.spaces.Box(-1, 1, (4,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.bits, self.goal = self.np_random.choice([-1.0, 1.0], (2, 4))
        return self.look(), {}

    def look(self):
        return {"observation": self.bits.copy(), "achieved_goal": self.bits.copy(), "desired_goal": self.goal.copy()}

    def compute_reward(self, achieved, desired, info):
        return -(np.abs(achieved - desired).max(-1) > 0.5).astype(np.float32)

    def step(self, action):
        self.bits[action > 0] *= -1
        reward = self.compute_reward(self.bits, self.goal, {})
        return self.look(), float(reward), False, False, {"is_success": float(reward == 0)}


if "BitFlip-v0" not in gym.registry:
    gym.register("BitFlip-v0", BitFlip, max_episode_steps=8)


@pytest.mark.slow
def test_hindsight_learns_where_plain_replay_does_not(tmp_path):
    """With relabelled goals all patterns are reached, without them few."""
    success = {}
    for goals in (4, 0):
        args = sac.Args(env="BitFlip-v0", her_goals=goals, total_timesteps=4_000, num_envs=8, hidden="64x2",
                        batch_size=128, updates_per_step=0.25, gamma=0.9, compile=False, initial_temperature=0.02,
                        eval_every=0, checkpoint_every=0, eval_episodes=32, device="cpu",
                        run_dir=str(tmp_path / str(goals)))
        success[goals] = sac.main(args)["success_rate"]
    assert success[4] >= 0.8 and success[0] <= 0.4, success


@pytest.mark.exports
def test_policy_pt2_plays_as_the_run_was_scored(tmp_path):
    result = sac.main(sac.Args(env="Pendulum-v1", total_timesteps=400, num_envs=4, hidden="8x1", batch_size=32,
                               compile=False, eval_every=0, eval_episodes=2, device="cpu",
                               run_dir=str(tmp_path / "run")))
    program = torch.export.load(tmp_path / "run" / "policy.pt2").module()
    vec = envs.make_vec("Pendulum-v1", 2)
    again = envs.evaluate(lambda obs: vec.to_box(program(envs.to_tensors(obs)).numpy()), vec, 4, 10_000 + 5_000)
    assert again == pytest.approx(result, rel=1e-3, nan_ok=True)


def test_goals_from_a_narrower_range(tmp_path, capsys):
    """A run keeps its range; an evaluation may have another."""
    run = str(tmp_path / "run")
    sac.main(sac.Args(env="FetchReach-v2", goal_range=1.0, total_timesteps=8, num_envs=4, hidden="8x1", compile=False,
                      batch_size=4, eval_every=0, eval_episodes=1, device="cpu", run_dir=run))
    assert "within 0.015 m" in capsys.readouterr().err
    stored = sac.runtime.cli(sac.Args, "sac", ["--evaluate", run, "--goal-range", "5", "--eval-episodes", "1"])
    sac.main(stored)
    assert "within 0.075 m" in capsys.readouterr().err
