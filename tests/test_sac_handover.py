"""SAC with a hand-over: when the inner policy may act, what attention and the inner policy are taught until then."""
import numpy as np
import pytest
import torch

from algos import sac, sac_handover
from algos.sac_handover import MASKED, Args, HandOver, Seen, decide, draw_noise, make_agent, update
from buffers import Batch
from networks import mlp
from tests import tasks

CPU = torch.device("cpu")
BOTH = np.array([True, True])


def two_environments():
    """The inner policy always plays alone in the first of them."""
    handover = HandOver(2, 0.5)
    handover.solo = torch.tensor([[True], [False]])
    return handover


def play(handover, solo, agent, uniform=False, ended=BOTH):
    handover.add(np.array([solo, agent]), ended, uniform)
    handover.solo = torch.tensor([[True], [False]])


def test_the_hand_over_compares_returns_and_comes_once():
    """The agent earns 0, the inner policy -10, then 0 as well."""
    handover = two_environments()
    for _ in range(500):
        play(handover, -5.0, -5.0, uniform=True)
    play(handover, -5.0, -5.0, uniform=True, ended=~BOTH)
    play(handover, -5.0, -5.0)  # began with uniform actions and went on with others: counts for nothing
    assert handover.count == 0 and handover.played["uniform"] == [1000, -5000.0] and handover.return_gap == 1.0
    for _ in range(300):
        play(handover, -4.0, 0.0, ended=~BOTH)  # two steps are one episode
        play(handover, -6.0, 0.0)
    assert handover.mean["return_solo"] == -10.0 and handover.mean["return_best"] == 0.0
    assert handover.return_gap == 1.0 and not handover.done  # two standard deviations, of which one is the limit
    while not handover.done:
        before = handover.return_gap
        play(handover, 0.0, 0.0)
    assert handover.return_gap == handover.MARGIN <= before and handover.helped
    for _ in range(100):  # worse again: it stays, and the gap fades with every episode
        play(handover, -10.0, 0.0)
    assert handover.done and handover.return_gap == pytest.approx(0.2 * 0.998 ** 200)


def test_external_policies_that_never_helped_are_dropped(capsys):
    for uniform, learned in ((-9.5, False), (-30.0, True)):
        handover = two_environments()
        play(handover, uniform, uniform, uniform=True)
        for i in range(handover.FIRST):
            play(handover, -10.0 + i % 2, -10.0 + i % 2)
        assert handover.done and not handover.helped and handover.return_gap == 0.0 and handover.learned == learned
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_nothing_is_compared_before_there_are_episodes_of_both_kinds():
    handover = two_environments()
    for i in range(handover.FIRST):
        handover.solo = torch.tensor([[False], [False]])
        handover.add(np.array([-10.0, -10.0]) + i % 2, BOTH, uniform=False)
    assert handover.count > handover.FIRST and not handover.done


def test_luck_is_hardly_ever_help():
    """One episode in twelve starts solved, whoever plays: among thousands the best mean of 50 is far above the rest."""
    torch.manual_seed(0)
    helped = 0
    for _ in range(20):
        handover, episodes = HandOver(32, 0.25), 0
        while not handover.done:
            handover.add(-50.0 * (torch.rand(32) > 1 / 12).numpy(), np.ones(32, bool), uniform=False)
            episodes += 32
        assert episodes <= 1600
        helped += handover.helped
    assert helped <= 2


def test_a_share_of_the_episodes_is_solo_until_the_hand_over():
    torch.manual_seed(0)
    handover = HandOver(4000, 0.25)
    half = np.arange(4000) < 2000
    before = handover.solo.clone()
    handover.add(np.zeros(4000), half, uniform=True)
    assert 0.22 < before.float().mean() < 0.28 and 0.22 < handover.solo[:2000].float().mean() < 0.28
    assert torch.equal(handover.solo[2000:], before[2000:])  # not within an episode
    handover.done = True
    handover.add(np.zeros(4000), ~half, uniform=True)
    assert not handover.solo[2000:].any()


@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_update_is_adam_on_the_stated_losses(mask):
    """Written out, per policy: attention by cross-entropy against softmax(Q / T), the inner policy by SAC and
    imitation, in targets the entropy of the inner policy alone, by its weight."""
    torch.manual_seed(1)
    args = Args(hidden="16x2", batch_size=32, initial_temperature=0.3)
    agent = make_agent(args, 6, 2, 2, CPU)
    agent["actor"] |= {"score_mask": torch.tensor([mask, 0.0, 0.0]), "bc_coef": torch.tensor(0.7),
                       "attention_temperature": torch.tensor(0.2)}
    actor, critic, target = ({name: p.clone().requires_grad_() for name, p in agent[group].items()}
                             for group in ("actor", "critic", "target"))
    obs, next_obs = (Seen(torch.randn(32, 6), torch.rand(32, 2, 2) * 2 - 1) for _ in range(2))
    noise, next_noise = draw_noise(32, 2, 2), draw_noise(32, 2, 2)
    batch = Batch(obs, torch.rand(32, 2), torch.randn(32, 1), torch.rand(32, 1).round(), next_obs)
    with torch.no_grad():
        update(agent, batch, noise, next_noise, args)

    trained = {name: p for name, p in actor.items() if name in agent["moments"]["actor"]["mean"]}
    assert actor.keys() - trained.keys() == {"score_mask", "bc_coef", "attention_temperature"}
    with torch.no_grad():
        then = decide(actor, next_obs, next_noise, args)
        value = mlp(target, "q", torch.cat([next_obs.features, then.action], 1)).amin(0)[:, 0]
        value = value - 0.3 * then.log_weights[:, 0].exp() * then.inner_log_prob
        y = batch.reward[:, 0] + 0.95 * torch.where(batch.terminated[:, 0] == 1, 0.0, value)
    q = mlp(critic, "q", torch.cat([obs.features, batch.action], 1))[..., 0]
    optimiser = torch.optim.Adam(critic.values(), args.learning_rate)
    (0.5 * ((q[0] - y) ** 2).mean() + 0.5 * ((q[1] - y) ** 2).mean()).backward()
    optimiser.step()
    now = decide(actor, obs, noise, args)
    each = [mlp(critic, "q", torch.cat([obs.features, now.actions[:, i]], 1)).amin(0)[:, 0] for i in range(3)]
    worth = (torch.stack(each, 1).detach() / 0.2 - torch.tensor([mask, 0, 0])).softmax(1)
    share = now.log_weights.detach()[:, 1:].softmax(1)
    imitation = sum(share[:, i] * (now.actions[:, 0] - obs.advice[:, i]).square().sum(1) for i in range(2))
    cross_entropy = -(worth * now.log_weights).sum(1)
    optimiser = torch.optim.Adam(trained.values(), args.learning_rate)
    (0.3 * now.inner_log_prob - each[0] + cross_entropy + 0.7 * imitation).mean().backward()
    optimiser.step()
    for group, params in (("critic", critic), ("actor", trained)):
        for name, p in params.items():
            assert torch.allclose(agent[group][name], p, atol=2e-6), (group, name)


def test_attention_learns_among_external_policies_alone_until_the_hand_over():
    """However much more the critics think of the inner policy, its key learns nothing."""
    torch.manual_seed(1)
    args = Args(hidden="16x2")
    agent = make_agent(args, 6, 2, 2, CPU)
    agent["actor"]["score_mask"][0] = MASKED
    critic = {"q.0.weight": torch.zeros(2, 8, 1), "q.0.bias": torch.zeros(2, 1, 1)}
    critic["q.0.weight"][:, 6] = 1000.0  # Q = 1000 a_0
    agent["actor"]["attention_temperature"].fill_(0.1)
    obs = Seen(torch.randn(8, 6), torch.tensor([[-0.5, 0], [-0.9, 0]]).expand(8, 2, 2))
    grads, (loss, _) = torch.func.grad_and_value(sac_handover.actor_loss, has_aux=True)(
        agent["actor"], critic, torch.tensor(0.1), obs, draw_noise(8, 2, 2), args)
    assert loss.isfinite() and (grads["keys"][0] == 0).all() and (grads["keys"][1:] != 0).any(1).all()


def test_dropped_policies_leave_plain_sac():
    """With the mask on their side, inner policy, critics and temperature are updated as those of sac.py."""
    torch.manual_seed(1)
    sizes = dict(hidden="16x2", batch_size=32)
    ours, plain = make_agent(Args(**sizes), 6, 2, 2, CPU), sac.make_agent(sac.Args(**sizes), 6, 2, CPU)
    for group in ("actor", "critic", "target"):
        for name, p in plain[group].items():
            p.copy_(ours[group][name])
    ours["actor"]["score_mask"][0] = -MASKED
    ours["actor"]["attention_temperature"].fill_(0.1)
    (obs, next_obs), (noise, next_noise) = torch.randn(2, 32, 6), (draw_noise(32, 2, 2) for _ in range(2))
    batch = Batch(obs, torch.rand(32, 2), torch.randn(32, 1), torch.rand(32, 1).round(), next_obs)
    seen = batch._replace(obs=Seen(obs, torch.rand(32, 2, 2)), next_obs=Seen(next_obs, torch.rand(32, 2, 2)))
    with torch.no_grad():
        update(ours, seen, noise, next_noise, Args(**sizes))
        sac.update(plain, batch, noise.gaussian, next_noise.gaussian, sac.Args(**sizes))
    for group in ("actor", "critic", "target", "temperature"):
        for name, p in plain[group].items():
            assert torch.allclose(ours[group][name], p, atol=1e-6), name


def test_useless_policies_cost_their_time_alone(tmp_path, monkeypatch):
    """No one is of any help: the agent begins anew, once, and the external policies never act again."""
    monkeypatch.setattr(HandOver, "FIRST", 12)
    monkeypatch.setattr(HandOver, "FEWEST", 1)
    made = []
    monkeypatch.setattr(sac_handover, "make_agent", lambda *sizes: made.append(sizes) or make_agent(*sizes))
    sac_handover.main(Args(env="tests.tasks:Hopeless-v0", num_envs=4, hidden="8x1", batch_size=16, updates_per_step=0.1,
                           compile=False, eval_every=0, eval_episodes=1, checkpoint_every=0, device="cpu",
                           knowledge=tasks.__file__, total_timesteps=600, run_dir=str(tmp_path / "run")))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert [saved["handover"][word] for word in ("done", "helped", "learned")] == [True, False, False]
    assert len(made) == 2 and 0 < saved["agent"]["count"] < 50  # of 55 updates, those since then
    assert saved["agent"]["actor"]["score_mask"].tolist() == [-MASKED, 0, 0]
