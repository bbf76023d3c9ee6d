"""What every script with a replay buffer stores of a clock, by hand: where episodes end, what the end was, who acted.
test_sac.py has the same of three more scripts, with external policies that act."""
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
from tests.clock import BY_HAND, Counted

RULE = "def low(obs):\n    return 0 * obs - 0.25\n"
UNIFORM = 6  # transitions of uniform actions, by batch_size or learning_starts; then the policy acts
CHOSEN = 0.75  # its action, in all states
SAC, DDPG = dict(batch_size=UNIFORM, random_actions=0.0), dict(learning_starts=UNIFORM, exploration_noise=0.0)
SCRIPTS = {"sac_kogun": SAC, "sac_bc": SAC, "sac_demos": SAC | dict(demos=0), "sac_shaping": SAC,
           "ddpg": DDPG, "td3": DDPG, "camel": DDPG | dict(mask_steps=0), "lesr": DDPG | dict(features="none"),
           "meow": dict(learning_starts=UNIFORM)}
KNOWLEDGE = {"sac_kogun": RULE, "sac_bc": RULE, "sac_demos": RULE, "camel": RULE,
             "sac_shaping": "def potential(history):\n    return history.last(\"observation\")[:, 0]\n"}
OF_SPLITS = {"tesac", "ccm", "satesac", "saccm"}
IN_TEST_SAC = {"sac", "sac_kian", "sac_handover"}


def few(tmp_path, **more) -> dict:
    """Arguments of a run of twelve steps of two clocks, too short for an update."""
    return dict(env="Counted-v0", total_timesteps=24, num_envs=2, hidden="8x1", batch_size=2, compile=False,
                updates_per_step=0.01, eval_every=0, eval_episodes=2, checkpoint_every=0, device="cpu",
                run_dir=str(tmp_path / "run")) | more


def play(name: str, args: dict, monkeypatch) -> dict:
    """The checkpoint of a run of algos/<name>.py whose policy has one action."""
    script = import_module(f"algos.{name}")
    decide = script.decide

    def chosen(*inputs):
        decision = decide(*inputs)
        if isinstance(decision, torch.Tensor):
            return torch.full_like(decision, CHOSEN)
        return decision._replace(action=torch.full_like(decision.action, CHOSEN))
    monkeypatch.setattr(script, "decide", chosen)
    monkeypatch.setattr(Counted, "received", {})
    script.main(script.Args(**args))
    return torch.load(f"{args['run_dir']}/checkpoint.pt", weights_only=True)


def check_actions(obs: torch.Tensor, action: torch.Tensor) -> None:
    """Actions (n,) stored at observations (n,): uniform ones first, then the policy's, all as the clocks got them."""
    received = [Counted.received[count] for count in obs.tolist()]
    assert torch.allclose(torch.tensor(received), 2 * action)  # the box is twice as wide
    assert len(action[:UNIFORM].unique()) == UNIFORM and action.abs().max() <= 1
    assert (action[UNIFORM:] == CHOSEN).all()


def test_no_script_is_left_out():
    found = {path.stem for path in (Path(__file__).parent.parent / "algos").glob("*.py")
             if "\nfrom buffers import" in path.read_text()}
    assert found == {*SCRIPTS, *OF_SPLITS, *IN_TEST_SAC}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_transition_by_hand(name, tmp_path, monkeypatch):
    args = few(tmp_path) | SCRIPTS[name]
    if name in KNOWLEDGE:
        (tmp_path / "known.py").write_text(KNOWLEDGE[name])
        args["knowledge"] = str(tmp_path / "known.py")
    rows = play(name, args, monkeypatch)["buffer"]["rows"]
    f = (rows.shape[1] - 3) // 2  # the observation, beside which camel stores a box
    obs, action, reward, terminated, next_obs = (x[:, 0] for x in rows.split([f, 1, 1, 1, f], 1))
    assert torch.equal(torch.stack([obs, reward, terminated, next_obs], 1), BY_HAND)
    check_actions(obs, action)


class Evaluator:
    """Evaluates nothing: the splits of a clock are not there."""

    def __init__(self, args, **kwargs):
        pass

    def play(self, *args, **kwargs):
        return {"train": {}}

    def log(self, *args):
        pass

    diagnose, keep, film = (lambda *args: {}, ) * 3


@pytest.mark.parametrize("name", sorted(OF_SPLITS))
def test_every_episode_by_hand(name, tmp_path, monkeypatch):
    """The clock has a new task in every episode, and episodes are stored with the task they were played on."""
    def make_vec(env_id, num_envs, threads, **kwargs):
        vec = clocks(env_id, num_envs, threads=threads)
        vec.bucket, step = np.array([0, 100]), vec.step

        def step_and_change(action):
            result = step(action)
            vec.bucket += result[2] | result[3]
            return result
        vec.step, vec.task_features = step_and_change, lambda: vec.bucket[:, None].astype(np.float32)
        return vec

    clocks = envs.make_vec
    monkeypatch.setattr(envs, "make_vec", make_vec)
    monkeypatch.setattr(envs, "horizon_of", lambda *args: 3)
    monkeypatch.setattr(envs, "SplitEvaluator", Evaluator)
    kept = play(name, few(tmp_path, total_timesteps=22, batch_size=5), monkeypatch)["buffer"]["kept"]
    assert kept["length"].tolist() == [2, 3, 2, 3, 2, 3, 2, 3]  # in the order of their ends
    assert kept["task"].tolist() == [100, 0, 1, 101, 102, 2, 3, 103]
    found = {}
    for rows, action, reward, terminated, length, _ in zip(*kept.values()):
        obs = rows[-4:, 0]  # of an episode of at most three steps
        for t in range(length):
            found[obs[t].item()] = torch.stack([obs[t], reward[t], terminated[t], obs[t + 1], action[t, 0]])
    whole = BY_HAND[BY_HAND[:, 0] % 1000 < 14]  # without the episodes that go on
    assert len(found) == len(whole)
    found = torch.stack([found[obs] for obs in whole[:, 0].tolist()])
    assert torch.equal(found[:, :4], whole)
    check_actions(found[:, 0], found[:, 4])
