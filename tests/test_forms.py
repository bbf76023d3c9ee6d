"""Forms of knowledge: advice as an input, imitation, demonstrations, shaped rewards on SAC; masks on PPO. By hand
numbers, without knowledge to the last bit, and whether each gains from a good rule."""
import csv
from types import ModuleType

import pytest
import torch

import runtime
from algos import ppo, ppo_mask, sac, sac_bc, sac_demos, sac_kogun, sac_shaping
from buffers import Batch, ReplayBuffer
from tests import tasks

SHORT = dict(env="tests.tasks:Point-v0", num_envs=8, hidden="32x2", batch_size=64, updates_per_step=0.25, gamma=0.9,
             initial_temperature=0.05, compile=False, eval_every=0, eval_episodes=32, checkpoint_every=0, device="cpu")
RULE = f"{tasks.__file__}:approach"


def curve(folder, name: str) -> list[dict]:
    """The rows of a CSV of a run, without wall time."""
    return [{k: v for k, v in row.items() if k != "wall_s"} for row in csv.DictReader((folder / name).open())]


def short_run(script, folder, **more):
    """A run of 480 steps that logs at every 96th."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "LOG_EVERY", 96)
        script.main(script.Args(**SHORT, **more, total_timesteps=480, run_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return short_run(sac, tmp_path_factory.mktemp("runs") / "sac")


@pytest.mark.parametrize("script", [sac_kogun, sac_bc, sac_demos, sac_shaping])
def test_without_knowledge_it_is_sac(script, plain, tmp_path):
    ours = short_run(script, tmp_path / "run", knowledge="none")
    assert curve(ours, "eval.csv") == curve(plain, "eval.csv")
    assert all(row in curve(ours, "scalars.csv") for row in curve(plain, "scalars.csv"))


LUCK = dict(her_goals=0, total_timesteps=2000)  # success is rare by chance, and there is no hindsight


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    """Success of SAC without knowledge."""
    return sac.main(sac.Args(**SHORT | LUCK, run_dir=str(tmp_path_factory.mktemp("runs") / "sac")))["success_rate"]


@pytest.mark.parametrize("script, more", [(sac_bc, {"bc_coef": 5.0}), (sac_demos, {"demos": 64}),
                                          (sac_shaping, {"shape_coef": 10.0, "knowledge": "tests/potential.py"})])
@pytest.mark.slow
def test_it_learns_where_nothing_fails(script, more, nothing, tmp_path):
    args = script.Args(**SHORT | LUCK | {"knowledge": RULE} | more, run_dir=str(tmp_path / "run"))
    success = script.main(args)["success_rate"]
    assert nothing <= 0.4 and success >= 0.7, (nothing, success)


@pytest.mark.slow
def test_an_actor_that_reads_advice_learns_sooner(tmp_path):
    """From a reward that is never rare: advice alone finds none."""
    args = SHORT | dict(env="tests.tasks:PointDense-v0", updates_per_step=0.5, her_goals=0, total_timesteps=600)
    success = [sac_kogun.main(sac_kogun.Args(**args, knowledge=name, run_dir=str(tmp_path / str(len(name)))))
               ["success_rate"] for name in ("none", RULE)]
    assert success[1] >= 0.9 and success[0] <= success[1] - 0.15, success


# advice as an input

def test_the_actor_reads_all_advice_and_the_critics_none():
    """Weights that copy the second policy's action into the mean."""
    args, device = sac_kogun.Args(hidden="8x1"), torch.device("cpu")
    agent = sac_kogun.make_agent(args, 3, 2, 2, device)
    assert agent["critic"]["q.0.weight"].shape[-2] == 3 + 2 and agent["actor"]["actor.0.weight"].shape[-2] == 3 + 2 * 2
    weight = torch.zeros(3 + 4, 4)
    weight[5, 0] = weight[6, 1] = 1.0
    seen = sac_kogun.Seen(torch.randn(5, 3), torch.rand(5, 2, 2))
    action = sac_kogun.decide({"actor.0.weight": weight, "actor.0.bias": torch.zeros(4)}, seen, torch.zeros(5, 2),
                              args).action
    assert torch.allclose(action, seen.advice[:, 1].tanh())


# imitation

def linear_critic(weights: list[list[float]]) -> dict:
    """Two critics that are linear in (one feature, two actions)."""
    return {"q.0.weight": torch.tensor(weights).unsqueeze(2), "q.0.bias": torch.zeros(2, 1, 1)}  # (2, 3, 1)


def test_the_best_advice_is_what_the_lower_critic_values_most():
    critic = linear_critic([[0.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    advice = torch.tensor([[[0.5, 0.5], [0.3, -1.0]], [[-0.5, 0.0], [0.4, 0.0]]])  # (2, 2, 2)
    best, value = sac_bc.best_advice(critic, torch.zeros(2, 1), advice)
    assert best.tolist() == [pytest.approx([0.5, 0.5]), pytest.approx([0.4, 0.0])]
    assert value.tolist() == pytest.approx([0.5, 0.4])  # of .5 and 1.5, -.4 of .3; -1 of -.5, .4 of .8


def test_only_better_advice_is_imitated():
    """The actor's action is 0 with value 0. In state 0 the advice is worth 0.6, in state 1 -0.6."""
    critic, args = linear_critic([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), sac_bc.Args(bc_coef=3.0)
    actor = {"actor.0.weight": torch.zeros(1, 4), "actor.0.bias": torch.zeros(4)}
    advice, noise = torch.tensor([[[0.6, 0.8]], [[-0.6, 0.8]]]), torch.zeros(2, 2)
    loss, (decision, q, bc_loss, better) = sac_bc.actor_loss(actor, critic, torch.tensor(0.0), torch.zeros(2, 1),
                                                             advice, noise, args)
    assert better.tolist() == [1, 0] and q.tolist() == [0, 0]
    assert bc_loss.item() == pytest.approx(0.5 * (0.36 + 0.64)) and loss.item() == pytest.approx(3 * 0.5)


# demonstrations

def test_the_first_episodes_are_the_rules(tmp_path, monkeypatch):
    """16 episodes of 8 copies are two rounds of twelve steps: 192 steps that count. Then SAC draws its own."""
    rows, saw = [], []
    add = ReplayBuffer.add
    monkeypatch.setattr(ReplayBuffer, "add", lambda self, *row: (rows.append([row[0].clone(), row[1].clone()]),
                                                                 add(self, *row))[1])
    step = sac_demos.update
    monkeypatch.setattr(sac_demos, "update", lambda *given: (saw.append(len(rows)), step(*given))[1])
    sac_demos.main(sac_demos.Args(**SHORT, knowledge=RULE, demos=16, total_timesteps=480, run_dir=str(tmp_path / "a")))
    is_rule = [torch.allclose(action, (2 * (obs[:, 2:4] - obs[:, :2])).clamp(-0.5, 0.5)) for obs, action in rows]
    assert is_rule == [True] * 24 + [False] * 36 and min(saw) > 24
    assert int(curve(tmp_path / "a", "eval.csv")[-1]["step"]) == 480


def test_a_run_of_demonstrations_alone_says_so(tmp_path, capsys):
    for demos, said in ((16, False), (1000, True)):
        sac_demos.main(sac_demos.Args(**SHORT, knowledge=RULE, demos=demos, total_timesteps=240,
                                      run_dir=str(tmp_path / str(demos))))
        assert ("demonstrations: 16 episodes took all steps, so nothing was learned" in capsys.readouterr().err) == said


def test_every_policy_demonstrates():
    torch.manual_seed(0)
    drawn = sac_demos.demonstrated(torch.tensor([[[1.0], [2.0]]]).expand(1000, 2, 1))
    assert drawn.mean().item() == pytest.approx(1.5, abs=0.05) and set(drawn[:, 0].tolist()) == {1.0, 2.0}


# shaped rewards

ROWS = dict(reward=torch.tensor([[-1.0], [-1.0]]), terminated=torch.tensor([[0.0], [1.0]]))
PHI, NEXT_PHI = torch.tensor([-4.0, -4.0]), torch.tensor([-2.0, -2.0])


def test_shaped_rewards_by_hand():
    """Two units nearer: -1 + 2 (0.5 (-2) + 4) = 5; at the end of the task what follows is worth nothing."""
    args = sac_shaping.Args(gamma=0.5, shape_coef=2.0)
    assert sac_shaping.shaped(phi=PHI, next_phi=NEXT_PHI, args=args, **ROWS).tolist() == [[5.0], [7.0]]


def test_values_move_by_the_potential_and_ranks_stay():
    """If Q' = Q - c phi for what follows, it is so for the target as well, at ends, at time limits and elsewhere: by
    induction it is for all states, whatever the potential."""
    torch.manual_seed(0)
    reward, phi, next_phi, following = torch.randn(4, 64).double()
    terminated = torch.rand(64).round().double()  # a time limit is none of these
    args = sac_shaping.Args(shape_coef=0.7)
    plain = reward + args.gamma * (1 - terminated) * following
    new = sac_shaping.shaped(reward.unsqueeze(1), phi, next_phi, terminated.unsqueeze(1), args)[:, 0]
    moved = new + args.gamma * (1 - terminated) * (following - 0.7 * next_phi)
    assert torch.allclose(moved, plain - 0.7 * phi)


def test_potentials_are_asked_for_the_hindsight_goal(tmp_path, monkeypatch):
    """The reward that is learned from, of every row of a batch, from the goal that it has."""
    seen, update = [], sac_shaping.update
    monkeypatch.setattr(sac_shaping, "update", lambda agent, batch, *rest: (seen.append(batch),
                                                                            update(agent, batch, *rest))[1])
    sac_shaping.main(sac_shaping.Args(**SHORT, normalize=False, knowledge="tests/potential.py", shape_coef=3.0,
                                      total_timesteps=480, run_dir=str(tmp_path / "run")))
    batch = Batch(*(torch.cat(column) for column in zip(*seen)))
    phi, next_phi = (-(x[:, 2:4] - x[:, :2]).norm(dim=1) for x in (batch.obs, batch.next_obs))
    plain = -((batch.next_obs[:, :2] - batch.next_obs[:, 2:4]).abs().amax(1) > 0.15).float()
    assert torch.allclose(batch.reward[:, 0], plain + 3 * (0.9 * next_phi - phi), atol=1e-5)
    assert (plain == 0).float().mean() > 0.3  # hindsight


def test_a_potential_that_cannot_be_used_is_refused(tmp_path):
    for name, said in (("fetch.v5", "is unknown for"), ("tests/nothing.py", "there is no file"),
                       ("fetch.v4", "is unknown for"), ("tests/tasks.py:go_right", "fails on histories")):
        with pytest.raises(runtime.UserError, match=said):
            sac_shaping.main(sac_shaping.Args(**SHORT, knowledge=name, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_potential_that_gives_no_numbers_is_refused_or_counted(tmp_path):
    """None at all would be plain SAC."""
    file = tmp_path / "phi.py"
    file.write_text("def potential(history):\n    return 0 / (0 * history.last('observation')[:, 0])\n")
    with pytest.raises(runtime.UserError, match="gives no number in any of the first 8 states; correct it") as caught:
        short_run(sac_shaping, tmp_path / "none", knowledge=str(file))
    assert "\n" not in str(caught.value) and not (tmp_path / "none").exists()
    file.write_text("def potential(history):\n    return history.last('observation')[:, 0].log()\n")
    rows = curve(short_run(sac_shaping, tmp_path / "half", knowledge=str(file)), "scalars.csv")
    assert max(float(row["value"]) for row in rows if row["name"] == "phi_invalid") > 64


# masks

def agent_of(module: ModuleType):
    torch.manual_seed(0)
    return module.Agent((2,), 3)


def test_what_may_be_drawn():
    advice = torch.tensor([[[1.0, 0, 0], [0, 0, 0.2]], [[0, 0, 0], [0, 0, 0]]])
    assert ppo_mask.mask_of(advice).tolist() == [[1, 0, 1], [1, 1, 1]]
    assert ppo_mask.mask_of(torch.zeros(1, 0, 2)).tolist() == [[1, 1]]
    torch.manual_seed(0)
    ones = torch.randint(2, (64, 3, 7)).float()
    assert torch.equal(ppo_mask.mask_of(ones) == 1, ones.any(1) | ~ones.any(1).any(1, keepdim=True))


def test_another_run_advises_what_it_finds_likely():
    """Its advice is probabilities, all above 0. Each policy is measured by its own highest."""
    advice = torch.tensor([[[0.6, 0.2, 0.2, 0.0]], [[0.4, 0.3, 0.1999, 0.1]], [[0.25, 0.25, 0.25, 0.25]]])
    assert ppo_mask.mask_of(advice).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    both = torch.tensor([[[0.97, 0.01, 0.01, 0.01], [0.05, 0.45, 0.4, 0.1]], [[0.7, 0.1, 0.1, 0.1], [0, 0, 0, 0]]])
    assert ppo_mask.mask_of(both).tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_masked_probabilities_by_hand():
    """p = (.2, .3, .5), allowed are the first two: (.4, .6, 0) of all steps at 1, of half of them at .5."""
    log_probs, mask = torch.tensor([[0.2, 0.3, 0.5]]).log().expand(3, 3), torch.tensor([[1.0, 1, 0]]).expand(3, 3)
    p = ppo_mask.masked(log_probs, mask, torch.tensor([1.0, 0.5, 0.0])).exp()
    assert p[0].tolist() == pytest.approx([0.4, 0.6, 0], abs=1e-6)
    assert p[1].tolist() == pytest.approx([0.3, 0.45, 0.25]) and torch.equal(p[2], log_probs[2].exp())
    assert ppo_mask.masked(log_probs, mask, torch.ones(3)).isfinite().all()


def test_epsilon():
    args = ppo_mask.Args(mask_steps=1000)
    assert [ppo_mask.epsilon_at(step, args) for step in (0, 250, 1000, 2000)] == [1, 0.75, 0, 0]
    assert ppo_mask.epsilon_at(0, ppo_mask.Args(mask_steps=0)) == 0


def test_the_loss_is_that_of_what_acts():
    """At epsilon 0 it is PPO's to the last bit; else the ratio is of the masked policy, and gradients stay finite."""
    plain, ours, obs = agent_of(ppo), agent_of(ppo_mask), torch.randn(4, 2)
    advice, zeros = torch.tensor([[[1.0, 0, 0]]]).expand(4, 1, 3), torch.zeros(4)
    rest = dict(action=torch.tensor([0, 1, 2, 0]), log_prob=zeros - 1, value=zeros, advantage=torch.ones(4),
                target_value=zeros)
    for epsilon in (0.0, 0.5, 1.0):
        seen = ppo_mask.Seen(obs, advice, zeros + epsilon)
        loss, scalars = ppo_mask.ppo_loss(ours, ppo_mask.Batch(obs=seen, **rest), ppo_mask.Args())
        ours.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in ours.parameters())
        if epsilon == 0:
            theirs = ppo.ppo_loss(plain, ppo.Batch(obs=obs, **rest), ppo.Args())
            assert loss == theirs[0] and scalars["entropy"] == theirs[1]["entropy"]
        else:
            acting, output = ours(seen).log_probs.exp(), ours(seen).alone.exp()
            assert torch.allclose(acting[:, 1:], (1 - epsilon) * output[:, 1:], atol=1e-6)
    assert scalars["entropy"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.exports
def test_masks_fade_and_evaluations_have_none(tmp_path, monkeypatch):
    """While all is masked, only what the rule advises is done; the trained policy asks nobody."""
    monkeypatch.setattr(ppo_mask, "LOG_EVERY", 64)
    (tmp_path / "rule.py").write_text("import torch\n\n\ndef left(obs):\n"
                                      "    return torch.tensor([[1.0, 0.0]]).expand(obs.shape[0], 2).clone()\n")
    actions, collect = [], ppo_mask.collect
    monkeypatch.setattr(ppo_mask, "collect", lambda *given: (actions.append(rollout := collect(*given)), rollout)[1])
    ppo_mask.main(ppo_mask.Args(env="CartPole-v1", num_envs=4, num_steps=16, batch_size=32, total_timesteps=256,
                                knowledge=str(tmp_path / "rule.py"), mask_steps=128, eval_every=0, eval_episodes=4,
                                run_dir=str(tmp_path / "run")))
    share = [(rollout.action == 0).float().mean().item() for rollout in actions]
    assert share[0] == 1 and max(share[2:]) < 0.8
    epsilons = [row["value"] for row in curve(tmp_path / "run", "scalars.csv") if row["name"] == "epsilon"]
    assert epsilons == ["1", "0.5", "0", "0"]
    program = torch.export.load(tmp_path / "run" / "policy.pt2").module()
    p = program(torch.zeros(3, 4)).exp()
    assert p.sum(1).tolist() == pytest.approx([1] * 3) and p.min() > 1e-3


@pytest.mark.slow
def test_a_good_mask_is_learned_from_and_a_wrong_one_is_left_behind():
    """Four arms, of which one pays in each of two states. The mask holds one arm. When it has faded, the agent plays
    the arm that pays, whatever the mask was."""
    for advised in ([0, 1], [2, 3]):
        torch.manual_seed(0)
        agent, args = ppo_mask.Agent((2,), 4), ppo_mask.Args(entropy_coef=0.01)
        optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
        for iteration in range(200):
            state = torch.randint(2, (128,))
            advice = torch.nn.functional.one_hot(torch.tensor(advised)[state], 4).float().unsqueeze(1)
            epsilon = torch.full((128,), 0.9 if iteration < 50 else 0.0)
            seen = ppo_mask.Seen(torch.nn.functional.one_hot(state, 2).float(), advice, epsilon)
            with torch.no_grad():
                output = agent(seen)
            action = (output.log_probs + ppo.gumbel((128, 4))).argmax(1)
            reward = (action == state).float()
            batch = ppo_mask.Batch(seen, action, output.log_probs.gather(1, action.unsqueeze(1)).squeeze(1),
                                   output.value, reward - output.value, reward)
            ppo_mask.update(agent, optimizer, ppo_mask.ppo_loss, batch, args)
        with torch.no_grad():
            p = agent(seen._replace(epsilon=torch.zeros(128))).alone.exp()
        assert p[torch.arange(128), state].min() > 0.9, advised
