"""CAMEL-style masks: boxes, maps and schedule against hand numbers; where nothing is masked, TD3 bit for bit."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import knowledge
import runtime
from algos import camel, td3
from buffers import Batch
from envs import Evaluator, flatten, unflatten
from errors import UserError
from tests.tasks import SIGNAL_AT
from tests.test_sandbox import pytestmark as needs_seccomp

ROOT = Path(__file__).resolve().parent.parent
ONE, TWO, WIDE = [[0.9, -0.2, 0.0]], [[0.9, -0.2, 0.0], [0.1, -1.0, 0.4]], [[2.0, -3.0, 0.3]]
NAN = [float("nan")] * 3
YES, FULL = torch.tensor([[True]]), torch.tensor(1.0)
# it fails in one state of forty; elsewhere it goes half of the way to the goal
FAILS = """
import numpy as np

def policy(obs):
    if obs["desired_goal"][0] > 0.95:
        return np.array([1.0])
    return np.clip(2 * (obs["desired_goal"] - obs["achieved_goal"]), -0.5, 0.5)
"""


def box(policies: list[list[float]], half_width: float) -> tuple[torch.Tensor, torch.Tensor]:
    return camel.box_around(torch.tensor([policies]), half_width)


def near(x: torch.Tensor, expected: list[float]) -> bool:
    return torch.allclose(x, torch.tensor(expected), atol=1e-6)


def seen(low: list[float], high: list[float]) -> camel.Seen:
    return camel.Seen(torch.zeros(1, 1), torch.tensor([low]), torch.tensor([high]))


@pytest.mark.parametrize("policies, half_width, low, high, clipped, spread", [
    (ONE, 0.5, [0.4, -0.7, -0.5], [1, 0.3, 0.5], [0.4, -0.7, 0.5], [0.76, -0.65, 0.475]),
    (TWO, 0.25, [-0.15, -1, -0.25], [1, 0.05, 0.65], [0.2, -0.9, 0.65], [0.54, -0.9475, 0.6275]),
    (WIDE, 0.5, [0.5, -1, -0.2], [1, -0.5, 0.8], [0.5, -0.9, 0.8], [0.8, -0.975, 0.775])])
def test_box_and_maps(policies, half_width, low, high, clipped, spread):
    found = box(policies, half_width)
    assert near(found[0], [low]) and near(found[1], [high])
    x, state = torch.tensor([[0.2, -0.9, 0.95]]), camel.Seen(torch.zeros(1, 1), *found)
    assert near(camel.masked(x, state, YES, FULL, camel.Args()), [clipped])
    assert near(camel.masked(x, state, YES, FULL, camel.Args(mask_mode="affine")), [spread])
    assert torch.equal(camel.masked(x, state, ~YES, FULL, camel.Args()), x)
    once = camel.masked(x, state, YES, FULL, camel.Args())
    assert torch.equal(camel.masked(once, state, YES, FULL, camel.Args()), once)


def test_a_policy_that_fails_is_left_out():
    low, high = box([NAN, *ONE], 0.5)
    assert near(low, [[0.4, -0.7, -0.5]]) and near(high, [[1, 0.3, 0.5]])
    assert [x.tolist() for x in box([NAN], 0.5)] == [[[-1.0] * 3], [[1.0] * 3]]  # none left: no box
    none = camel.centers_of({}, torch.zeros(1, 4), 0, 3, camel.Args(knowledge="none"))
    assert [x.tolist() for x in camel.box_around(none, 0.5)] == [[[-1.0] * 3], [[1.0] * 3]]


def test_every_box_holds_its_policies():
    torch.manual_seed(0)
    centers = 2 * torch.randn(1000, 3, 4)
    for half_width in (0.01, 0.25, 1.0):
        low, high = camel.box_around(centers, half_width)
        own = centers.clamp(-1, 1)
        assert (low >= -1).all() and (high <= 1).all() and (high - low >= half_width - 1e-6).all()
        assert ((low[:, None] <= own) & (own <= high[:, None])).all()


def test_shrink_grows_the_box():
    args, (low, high) = camel.Args(mask_mode="shrink"), box(ONE, 0.5)
    grown = camel.grown(low, high, torch.tensor(0.5))
    assert near(grown[0], [[-0.3, -0.85, -0.75]]) and near(grown[1], [[1, 0.65, 0.75]])
    state, x = camel.Seen(torch.zeros(1, 1), low, high), torch.tensor([[-1.0, 1.0, 1.0]])
    assert near(camel.masked(x, state, YES, torch.tensor(0.5), args), [[-0.3, 0.65, 0.75]])
    assert torch.equal(camel.masked(x, state, YES, torch.tensor(0.0), args), x)
    assert camel.draw_masks(1e-9, (2, 1), 0, args).all() and not camel.draw_masks(0.0, (2, 1), 0, args).any()


def test_affine_is_the_box_from_face_to_face():
    args, state = camel.Args(mask_mode="affine"), seen([-0.15, -1.0], [1.0, 0.05])
    for x, expected in ((-1.0, state.low), (1.0, state.high), (0.0, (state.low + state.high) / 2)):
        assert torch.allclose(camel.masked(torch.full((1, 2), x), state, YES, FULL, args), expected, atol=1e-7)
    gradient = torch.func.grad(lambda x: camel.masked(x, state, YES, FULL, args).sum())(torch.tensor([[0.3, -0.8]]))
    assert torch.allclose(gradient, (state.high - state.low) / 2)


def test_epsilon():
    args = camel.Args(mask_steps=200_000)
    found = [camel.epsilon_at(t, 1.0, args) for t in (0, 25_000, 100_000, 199_999, 200_000, 10 ** 6)]
    assert found == pytest.approx([1, 0.875, 0.5, 0.000005, 0, 0], abs=1e-9)
    assert camel.epsilon_at(0, 0.3, args) == 0.3 and camel.epsilon_at(0, 1.0, camel.Args(mask_steps=0)) == 0
    for epsilon in (0.0, 0.2, 0.75, 1.0):
        assert camel.draw_masks(epsilon, (100_000, 1), 7, args).float().mean() == pytest.approx(epsilon, abs=0.01)
    drawn = [camel.draw_masks(0.5, (64, 1), count, camel.Args(seed=seed)) for seed in (1, 2) for count in (7, 8)]
    assert len({tuple(mask[:, 0].tolist()) for mask in drawn}) == 4


class Logged:
    def log(self, scalars: dict[str, float]) -> None:
        self.scalars = scalars


def test_adaptive_takes_a_tenth_off_where_masks_are_no_better():
    loop, run, args = {"cap": 1.0, "gaps": []}, Logged(), camel.Args(mask_mode="adaptive")
    camel.compare(run, loop, 0.8, 5.0, 10.0, args)
    assert loop == {"cap": 1.0, "gaps": [-5.0]} and run.scalars == {"masked_return": 10.0}
    camel.compare(run, loop, 0.8, 15.0, 10.0, args)  # as good on average
    assert loop["cap"] == pytest.approx(0.72) and camel.epsilon_at(0, loop["cap"], args) == pytest.approx(0.72)
    for _ in range(10):
        camel.compare(run, loop, 0.5, 9.0, 10.0, args)
    assert loop["gaps"] == [-1.0] * 10 and loop["cap"] == pytest.approx(0.72)  # worse without them: it stays
    camel.compare(run, other := {"cap": 1.0, "gaps": []}, 0.8, 15.0, 10.0, camel.Args())
    assert other["cap"] == 1.0


# One number of state, two of action: mu(s) = tanh(w s), and critics Q = a_1 that see the action as it is executed.
def agent_of(weights: tuple[float, float]) -> dict:
    actor = {"actor.0.weight": torch.tensor([weights]), "actor.0.bias": torch.zeros(2)}
    critic = {"q.0.weight": torch.tensor([[0.0], [1.0], [0.0]]).repeat(2, 1, 1), "q.0.bias": torch.zeros(2, 1, 1)}
    trained = {"actor": actor, "critic": critic}
    return trained | {"target": {k: x.clone() for k, x in (actor | critic).items()},
                      "moments": {k: camel.adam_state(x) for k, x in trained.items()},
                      "count": {k: torch.zeros(()) for k in trained}}


def test_targets_are_in_the_box_of_the_next_state():
    """Boxes of s and s' have nothing in common. Without a mask the target's action is tanh(2) = .964 + noise, so 1."""
    agent, one = agent_of((2.0, 2.0)), torch.ones(1, 1)
    here, there = seen([0.5, 0.5], [0.9, 0.9]), seen([-0.8, -0.8], [-0.3, -0.3])
    batch = Batch(here._replace(features=one), torch.zeros(1, 2), one, 0 * one, there._replace(features=one))
    noise = torch.full((1, 2), 4.0)
    for mask, q in ((True, -0.3), (False, 1.0)):
        masks = torch.tensor([not mask, mask]).reshape(2, 1, 1)
        with torch.no_grad():
            scalars = camel.update(agent, batch, noise, masks, FULL, False, camel.Args())
        assert scalars["target_q"].item() == pytest.approx(1 + 0.99 * q, abs=1e-3)


def test_an_actor_outside_of_the_box_is_led_back():
    """The critic wants a_1 to grow. Inside the box the actor follows it. Above the box it feels `box_coef` alone, which
    leads down; below it, up; and without a mask it follows the critic again."""
    agent, state = agent_of((1.0, 0.0)), torch.ones(1, 1)

    def slope(low: float, high: float, mask: bool, **flags) -> tuple[float, dict]:
        obs = seen([low, -1.0], [high, 1.0])._replace(features=state)
        grads, (_, logged) = torch.func.grad_and_value(camel.actor_loss, has_aux=True)(
            agent["actor"], agent["critic"], obs, torch.tensor([[mask]]), FULL, camel.Args(**flags))
        return grads["actor.0.weight"][0, 0].item(), logged

    raw = np.tanh(1.0)  # .7616
    rate = 1 - raw ** 2
    assert slope(0.5, 1.0, True)[0] == pytest.approx(-rate, abs=1e-6)
    above, logged = slope(0.0, 0.5, True)
    assert above == pytest.approx(2 * (raw - 0.5) * rate, abs=1e-6)
    assert logged["q"].item() == 0.5 and logged["clipped"].item() == 0.5  # one of two coordinates
    assert logged["outside"].item() == pytest.approx((raw - 0.5) ** 2, abs=1e-6)
    assert slope(0.9, 1.0, True)[0] == pytest.approx(-2 * (0.9 - raw) * rate, abs=1e-6)
    assert slope(0.0, 0.5, True, box_coef=0.0)[0] == 0
    free, logged = slope(0.0, 0.5, False)
    assert free == pytest.approx(-rate, abs=1e-6) and logged["outside"].item() == 0
    pulled = slope(0.5, 1.0, True, center_coef=3.0)[0]
    assert pulled == pytest.approx((-1 + 3 * 2 * (raw - 0.75)) * rate, abs=1e-6)
    assert slope(0.5, 1.0, False, center_coef=3.0)[0] == pytest.approx(-rate, abs=1e-6)  # not masked: not pulled
    assert slope(-1.0, 1.0, True, center_coef=3.0)[0] == pytest.approx(-rate, abs=1e-6)  # no box: no middle
    affine, logged = slope(0.0, 0.5, True, mask_mode="affine", center_coef=3.0)  # the middle is its output 0
    assert affine == pytest.approx((-0.25 + 3 * 2 * (0.25 * raw) * 0.25) * rate, abs=1e-6)
    assert logged["outside"].item() == 0


# ---- through main --------------------------------------------------------------------------------------------------

POINT = dict(env="tests.tasks:Point-v0", num_envs=4, total_timesteps=400, learning_starts=96, hidden="8x1",
             batch_size=16, updates_per_step=0.5, compile=False, eval_every=200, eval_episodes=4, device="cpu")
F = 7  # features of Point: achieved and desired goal, observation, time
RULES = dict(knowledge=str(ROOT / "tests" / "tasks.py") + ":approach")


def trained(script, folder: Path, **flags) -> dict:
    """The checkpoint of a run of `script` on Point, and as `losses` what it logged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "LOG_EVERY", 40)
        script.main(script.Args(**{**POINT, "run_dir": str(folder), **flags}))
    rows = [(row["step"], row["name"], row["value"]) for row in csv.DictReader((folder / "scalars.csv").open())]
    losses = [row for row in rows if row[1] in ("critic_loss", "target_q", "actor_loss", "q")]
    return torch.load(folder / "checkpoint.pt", weights_only=True) | {"losses": losses, "folder": folder}


def flat(tree: dict) -> list[torch.Tensor]:
    return [leaf for x in tree.values() for leaf in (flat(x) if isinstance(x, dict) else [x])]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict:
    return trained(td3, tmp_path_factory.mktemp("td3") / "run")


@pytest.mark.parametrize("flags", [
    dict(mask_steps=0, mask_mode="step"), dict(mask_steps=0, mask_mode="affine"),
    dict(half_width=2.0), dict(half_width=2.0, mask_mode="shrink"), dict(half_width=2.0, mask_mode="affine"),
    dict(half_width=2.0, center="zero"), dict(half_width=2.0, center_coef=1.0), dict(knowledge="none", center_coef=1.0),
    dict(mask_steps=0, center="random")],
    ids=lambda flags: " ".join(map(str, flags.values())))
def test_without_a_mask_it_is_td3_bit_for_bit(flags, plain, tmp_path):
    """152 updates with hindsight: networks, moments and the actions in the buffer are the same bits, losses alike."""
    ours = trained(camel, tmp_path / "run", **(RULES | flags))
    assert ours["agent"]["count"]["critic"] == plain["agent"]["count"]["critic"] == 152
    assert all(torch.equal(a, b) for a, b in zip(flat(ours["agent"]), flat(plain["agent"]), strict=True))
    outcomes = [rows.split([*widths, 4], 1)[-1] for rows, widths in  # action, reward, terminated
                ((ours["buffer"]["rows"][:, :F + 8], [F, 4]), (plain["buffer"]["rows"][:, :F + 4], [F]))]
    assert torch.equal(*outcomes) and sorted(ours["losses"]) == sorted(plain["losses"]) and len(plain["losses"]) > 24


def test_a_thousand_updates_without_a_mask_are_td3_bit_for_bit(tmp_path):
    """Beside the flags above: many updates, in which a difference would grow."""
    many = dict(updates_per_step=3.3, eval_every=0)
    plain = trained(td3, tmp_path / "td3", **many)
    assert plain["agent"]["count"]["critic"] >= 1000
    for flags in (dict(mask_steps=0), dict(half_width=2.0)):
        ours = trained(camel, tmp_path / "-".join(flags), **(RULES | many | flags))
        assert all(torch.equal(a, b) for a, b in zip(flat(ours["agent"]), flat(plain["agent"]), strict=True))
        assert sorted(ours["losses"]) == sorted(plain["losses"])


def test_masks_change_it(plain, tmp_path):
    ours = trained(camel, tmp_path / "run", **RULES)
    assert not torch.equal(flat(ours["agent"])[0], flat(plain["agent"])[0])


@pytest.mark.parametrize("mode", ["episode", "step", "shrink", "affine"])
def test_what_is_masked_is_in_the_box(mode, tmp_path):
    """Epsilon stays at 1 (nearly), so all actions are in their box, also those with a lot of noise; the box is that of
    the policy in each state, and of the state after it. Uniform actions do not pile up on its faces."""
    rows = trained(camel, tmp_path / "run", mask_steps=10 ** 12, mask_mode=mode, exploration_noise=5.0, half_width=0.25,
                   **RULES)["buffer"]["rows"]
    obs, low, high, action, _, next_obs, next_low, next_high = rows.split([F, 2, 2, 2, 2, F, 2, 2], 1)
    assert len(rows) >= 350 and ((low <= action + 1e-6) & (action <= high + 1e-6)).all()
    policies = knowledge.load(RULES["knowledge"], POINT["env"], 2, unflatten(obs[:2], 2))
    for x, found in ((obs, (low, high)), (next_obs, (next_low, next_high))):
        centers = knowledge.advise(policies, unflatten(x, 2), 2)
        assert all(torch.equal(a, b) for a, b in zip(camel.box_around(centers, 0.25), found))
    on_a_face = ((action - low).abs() < 1e-6) | ((action - high).abs() < 1e-6)
    assert not on_a_face[:96].any() and on_a_face[150:].float().mean() > 0.5
    uniform = ((action - low) / (high - low))[:96]
    assert uniform.mean() == pytest.approx(0.5, abs=0.1) and uniform.std() == pytest.approx(12 ** -0.5, abs=0.05)


def test_a_box_that_grows(tmp_path):
    """`shrink`: the smallest box at the start, all of [-1, 1] from the end of the masks on."""
    saved = trained(camel, tmp_path / "run", mask_mode="shrink", mask_steps=200, half_width=0.05, exploration_noise=5.0,
                    learning_starts=400, her_goals=0, **RULES)
    _, low, high, action, _ = saved["buffer"]["rows"].split([F, 2, 2, 2, F + 6], 1)
    epsilon = (1 - torch.arange(0, 400, 4).repeat_interleave(4)[:, None] / 200).clamp(min=0)
    within = (action >= -1 + epsilon * (low + 1) - 1e-6) & (action <= 1 - epsilon * (1 - high) + 1e-6)
    outside = (action < low) | (action > high)
    assert len(action) == 400 and within.all() and not outside[:4].any() and outside[40:].any()


def test_adaptive_masks_fall_faster_where_they_are_no_better(tmp_path):
    """No goal is ever reached, so all returns are equal: each of four evaluations takes a tenth off."""
    saved = trained(camel, tmp_path / "run", env="tests.tasks:Hopeless-v0", mask_mode="adaptive", mask_steps=10 ** 12,
                    eval_every=100, **RULES)
    assert saved["loop"]["cap"] == pytest.approx(0.9 ** 4) and saved["loop"]["gaps"] == [0.0] * 4


def test_evaluations_play_without_masks_and_with_them(tmp_path, monkeypatch):
    played, play = {True: [], False: []}, Evaluator.play

    def watched(self, act, **more):
        def acts(obs):
            action = act(obs)
            played[bool(getattr(act, "keywords", {}))].append((flatten(obs), torch.as_tensor(action) / 0.3))
            return action
        return play(self, acts, **more)
    monkeypatch.setattr(Evaluator, "play", watched)
    trained(camel, tmp_path / "run", mask_steps=10 ** 12, half_width=0.05, **RULES)
    policies = knowledge.load(RULES["knowledge"], POINT["env"], 2, unflatten(played[False][0][0], 2))
    inside = {}
    for mask, seen in played.items():
        obs, action = (torch.cat(parts) for parts in zip(*seen))
        low, high = camel.box_around(knowledge.advise(policies, unflatten(obs, 2), 2), 0.05)
        inside[mask] = ((low <= action + 1e-5) & (action <= high + 1e-5)).all(1)
    assert inside[True].all() and inside[False].float().mean() < 0.5


def test_nobody_is_asked_when_no_mask_can_come_any_more(tmp_path, monkeypatch):
    asked, advise = [], knowledge.advise
    monkeypatch.setattr(knowledge, "advise", lambda policies, obs, *rest, **more: asked.append(
        len(obs["observation"])) or advise(policies, obs, *rest, **more))
    rows = trained(camel, tmp_path / "run", mask_steps=120, eval_every=0, **RULES)["buffer"]["rows"]
    assert 30 < len(asked) <= 30 + 3 * 12 + 4 * 20  # 120 steps of four, the rest of an episode, updates in between
    assert (rows[-100:, F:F + 2] == -1).all() and (rows[-100:, F + 2:F + 4] == 1).all()


def test_whole_episodes_are_masked_or_not(tmp_path):
    saved = trained(camel, tmp_path / "run", mask_steps=800, half_width=0.05, learning_starts=400, **RULES)
    rows = saved["buffer"]["rows"]
    _, low, high, action, _ = rows.split([F, 2, 2, 2, F + 6], 1)
    inside = ((low <= action) & (action <= high)).all(1).reshape(-1, 12)  # episodes are stored one after another
    share = inside.float().mean(1)
    assert ((share == 1) | (share < 0.5)).all() and (share == 1).any() and (share < 0.5).any()


@needs_seccomp
def test_a_generated_policy_resumes_exactly_though_it_fails_in_some_states(tmp_path, capsys):
    (tmp_path / "fails.py").write_text(FAILS)
    flags = dict(knowledge=f"llm:{tmp_path / 'fails.py'}", half_width=0.25)
    uncut = trained(camel, tmp_path / "uncut", **flags)
    assert "fails in some states" in capsys.readouterr().err
    obs, low, high = uncut["buffer"]["rows"][:, :F + 4].split([F, 2, 2], 1)
    lost = obs[:, 2] > 0.95  # of the desired goal
    assert lost.any() and (low[lost] == -1).all() and (high[lost] == 1).all()
    assert ((high - low)[~lost] <= 0.5 + 1e-6).all()

    trained(camel, tmp_path / "cut", **flags, total_timesteps=200)
    (tmp_path / "fails.py").write_text("changed")  # the run has a copy
    args = camel.Args(**{**POINT, **flags, "run_dir": str(tmp_path / "cut"), "resume": str(tmp_path / "cut")})
    camel.main(args)
    resumed = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    for part in ("agent", "buffer", "loop"):
        for a, b in zip(flat(uncut[part]), flat(resumed[part]), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@needs_seccomp
def test_ctrl_c_saves_a_run_with_generated_code(tmp_path):
    """A terminal signals the whole group: the process of the code has to live until the run has saved."""
    (tmp_path / "said.py").write_text("def policy(obs):\n    return [0.5, 0]\n")
    words = ["--env", POINT["env"], "--knowledge", f"llm:{tmp_path / 'said.py'}", "--run-dir", str(tmp_path / "run"),
             *"--total-timesteps 4000 --hidden 8x1 --no-compile --eval-every 0 --eval-episodes 1".split()]
    done = subprocess.run([sys.executable, "algos/camel.py", *words], cwd=ROOT, capture_output=True, text=True,
                          start_new_session=True, env={**os.environ, SIGNAL_AT: "100 SIGINT"})
    assert done.returncode == 130 and done.stderr.splitlines()[-1].startswith("saved; continue with"), done.stderr
    assert (tmp_path / "run" / "checkpoint.pt").is_file()


def test_an_expert_is_a_run(plain, tmp_path, monkeypatch):
    """The box of `expert` is around the agent of a finished run of td3.py; anything else is refused."""
    for known in ("auto", "none", RULES["knowledge"]):
        with pytest.raises(UserError, match="--center expert is a box around a trained agent, not") as error:
            trained(camel, tmp_path / "refused", center="expert", knowledge=known)
        assert "\n" not in str(error.value) and not (tmp_path / "refused").exists()
    expert = f"run:{plain['folder']}"
    rows = [trained(camel, tmp_path / center, center=center, knowledge=expert, half_width=0.1, mask_steps=10 ** 12)[
        "buffer"]["rows"] for center in ("expert", "policy")]
    assert torch.equal(*rows)  # `policy` takes a run as well
    obs, low, high, action, _ = rows[0].split([F, 2, 2, 2, F + 6], 1)
    policies = knowledge.load(expert, POINT["env"], 2, unflatten(obs[:2], 2))
    assert torch.allclose(low, (knowledge.advise(policies, unflatten(obs, 2), 2)[:, 0] - 0.1).clamp(min=-1), atol=1e-6)
    assert ((low <= action + 1e-6) & (action <= high + 1e-6)).all()
    asked = []
    monkeypatch.setattr(knowledge, "load", lambda name, *args, **kwargs: asked.append(name) or {})
    camel.main(runtime.cli(camel.Args, "camel", ["--evaluate", str(tmp_path / "expert")]))
    assert asked == ["none"]  # evaluations have no masks, so the expert may be gone


def test_a_control_needs_no_knowledge_and_says_so(tmp_path):
    saved = trained(camel, tmp_path / "run", center="zero", half_width=0.25, learning_starts=400, mask_steps=10 ** 12,
                    her_goals=0)
    action = saved["buffer"]["rows"][:, F + 4:F + 6]
    assert len(action) == 400 and action.abs().max() <= 0.25
    assert '"knowledge": "none"' in (tmp_path / "run" / "config.json").read_text()
    centers = camel.centers_of({}, torch.randn(4000, 3), 0, 17, camel.Args(center="random"))  # 17: Humanoid
    assert centers.abs().max() <= 1 and centers.mean().abs() < 0.05
    assert centers.std().item() == pytest.approx(3 ** -0.5, abs=0.05)
    assert np.abs(np.corrcoef(centers[:, 0].T) - np.eye(17)).max() < 0.06
