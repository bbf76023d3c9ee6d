"""PPO-KIAN as a user runs it: equal twice, exact after a cut, zero-shot elsewhere, from run to run."""
import json
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
import knowledge
from algos import ppo_kian
from benchmarks import zero_shot
from runtime import ArgError
from tests.test_runs import ROOT, curve, wait_for

DOORKEY = "MiniGrid-DoorKey-5x5-v0"
SMALL = dict(env=DOORKEY, num_envs=4, num_steps=32, batch_size=32, total_timesteps=1280, eval_every=256,
             eval_episodes=4, checkpoint_every=512)
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
RULES = ["minigrid.get_key", "minigrid.open_door", "minigrid.go_to_goal"]


@pytest.fixture(autouse=True)
def short_episodes(monkeypatch):
    """Untrained agents play to the time limit; 30 steps are enough here."""
    make = envs.make_vec
    monkeypatch.setattr(envs, "make_vec", lambda env_id, *args, **kwargs: make(
        env_id, *args, **kwargs, **({"max_steps": 30} if env_id.startswith("MiniGrid") else {})))


def train(folder, **kwargs):
    return ppo_kian.main(ppo_kian.Args(**{**SMALL, "run_dir": str(folder), **kwargs}))


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uncut"
    subprocess.run([sys.executable, "algos/ppo_kian.py", *FLAGS, "--run-dir", str(folder)], cwd=ROOT, check=True)
    return folder


def test_run_folder(uncut):
    evals, scalars = curve(uncut)
    assert [row[0] for row in evals] == ["0", "256", "512", "768", "1024", "1280"]
    train_names = {row[1] for row in scalars}
    assert json.loads((uncut / "config.json").read_text())["args"]["env"] == DOORKEY
    assert torch.load(uncut / "checkpoint.pt", weights_only=True)["policy"]["keys"].keys() == {"inner", *RULES}
    assert {"eval/return_mean", "eval/success_rate"} <= train_names


def test_scalars_name_every_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_kian, "LOG_EVERY", 256)
    train(tmp_path / "run", total_timesteps=512)
    scalars = curve(tmp_path / "run")[1]
    names = {row[1] for row in scalars}
    assert names >= {f"{kind}/{p}" for kind in ("attention", "key_norm") for p in ("inner", *RULES)}
    assert {name for name in names if name.startswith("sharpness/")} == {f"sharpness/{p}" for p in RULES}
    train(tmp_path / "logits", total_timesteps=512, fusion="logit", video=1)  # there, below zero is no small weight
    names = {row[1] for row in curve(tmp_path / "logits")[1]}
    assert "score/inner" in names and not any(name.startswith(("attention/", "sharpness/")) for name in names)
    names = {row[1] for row in scalars}
    assert names >= {"policy_loss", "value_loss", "entropy", "kl", "clipped"}
    weights = [float(value) for step, name, value in scalars if step == "512" and name.startswith("attention/")]
    assert sum(weights) == pytest.approx(1, abs=1e-4)


def test_kill_9_and_resume_equals_uncut(uncut, tmp_path):
    folder = tmp_path / "cut"
    process = subprocess.Popen([sys.executable, "algos/ppo_kian.py", *FLAGS, "--run-dir", str(folder)], cwd=ROOT,
                               stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (folder / "checkpoint.pt").exists(), process)
    process.kill()
    process.communicate()
    subprocess.run([sys.executable, "algos/ppo_kian.py", "--resume", str(folder)], cwd=ROOT, check=True)
    assert curve(folder) == curve(uncut)


def test_a_finished_run_can_be_given_more_steps(tmp_path):
    train(tmp_path / "uncut", total_timesteps=768)
    train(tmp_path / "run", total_timesteps=384)
    ppo_kian.main(ppo_kian.Args(resume=str(tmp_path / "run"), total_timesteps=768))
    for found, whole in zip(curve(tmp_path / "run"), curve(tmp_path / "uncut")):
        assert [row for row in found if row[0] != "384"] == whole


def test_ctrl_c_saves_and_loses_nothing(uncut, tmp_path):
    folder = tmp_path / "cut"
    process = subprocess.Popen([sys.executable, "algos/ppo_kian.py", *FLAGS, "--run-dir", str(folder)], cwd=ROOT,
                               stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (folder / "eval.csv").exists() and len(curve(folder)[0]) >= 2, process)
    process.send_signal(signal.SIGINT)
    message = process.communicate()[1]
    if process.returncode != 0:  # else it was over before the signal came
        assert process.returncode == 130 and f"--resume {folder}" in message
        subprocess.run([sys.executable, "algos/ppo_kian.py", "--resume", str(folder)], cwd=ROOT, check=True)
    assert curve(folder) == curve(uncut)


@pytest.mark.parametrize("kwargs", [
    dict(actor="plain"), dict(actor="kogun"), dict(actor="a2t"), dict(actor="rule"), dict(actor="mix"),
    dict(actor="plain", bc_coef=0.001), dict(knowledge="none"), dict(inner_key="head"), dict(fusion="logit"),
    dict(entropy_fix="off"), dict(compile=True), dict(env="MiniGrid-Dynamic-Obstacles-5x5-v0", official=True),
    dict(env="BabyAI-GoToRedBallGrey-v0", knowledge="minigrid.get_ball"), dict(env="CartPole-v1", knowledge="none")])
def test_every_variant_trains_and_evaluates(kwargs, tmp_path):
    train(tmp_path / "run", **{"total_timesteps": 256, "eval_every": 0, **kwargs})
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    assert all(p.isfinite().all() for p in saved.values())
    assert ppo_kian.main(ppo_kian.Args(evaluate=str(tmp_path / "run"), eval_episodes=2))["episodes"] == 2
    if kwargs.get("actor", "kian") in ("kian", "plain") and kwargs.get("env", "MiniGrid").startswith("MiniGrid"):
        env = kwargs.get("env", DOORKEY)
        for kind in ("run", "inner"):
            train(tmp_path / f"next-{kind}", env=env, total_timesteps=256, eval_every=0,
                  knowledge=f"{kind}:{tmp_path / 'run'}")


def test_untrained_actors_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_kian, "update", lambda *_: pytest.fail("there is nothing to train"))
    train(tmp_path / "run", actor="mix", total_timesteps=512)
    first, *others = [row[1:] for row in curve(tmp_path / "run")[0]]
    assert all(row == first for row in others)


def test_zero_shot_elsewhere(uncut, capsys):
    ppo_kian.main(ppo_kian.Args(evaluate=str(uncut), env="MiniGrid-DoorKey-8x8-v0", eval_episodes=2))
    line = capsys.readouterr().out
    assert line.startswith("MiniGrid-DoorKey-8x8-v0 after 1280 steps in MiniGrid-DoorKey-5x5-v0: ")
    assert "return_mean" in line
    with pytest.raises(ArgError, match="actions"):
        ppo_kian.main(ppo_kian.Args(evaluate=str(uncut), env="MiniGrid-Dynamic-Obstacles-5x5-v0", eval_episodes=2))


def test_zero_shot_scores_become_rows(uncut, tmp_path, monkeypatch):
    monkeypatch.setattr(zero_shot, "RESULTS", tmp_path)
    test = "--env MiniGrid-Empty-5x5-v0 --eval-episodes 2"
    monkeypatch.setattr(sys, "argv", ["zero_shot.py", str(uncut), "--test", test])
    assert zero_shot.main() == zero_shot.main() == 0  # the second time replaces the row
    row, = zero_shot.load(tmp_path / "zero_shot" / "ppo_kian.csv")
    assert row["test"] == test and row["trained_in"] == DOORKEY and row["step"] == "1280" and row["episodes"] == "2"
    assert 0 <= float(row["return_mean"]) <= 1
    monkeypatch.setattr(sys, "argv", ["zero_shot.py", str(uncut), "--test", "--env MiniGrid-Emty-5x5-v0"])
    with pytest.raises(ValueError, match="did you mean"):
        zero_shot.main()


@pytest.mark.parametrize("warm, parts", [("keys", ()), ("keys+query", ("encoder", "trunk", "query")),
                                         ("all", ("encoder", "trunk", "query", "inner"))])
def test_a_run_goes_on_in_the_next_task(uncut, warm, parts, tmp_path, monkeypatch):
    """Known names keep their keys, the old inner policy becomes one of the others, networks come as `warm` says."""
    started = {}
    monkeypatch.setattr(ppo_kian, "update", lambda agent, *_: started.update(
        {k: p.clone() for k, p in agent.state_dict().items()}) or {})
    train(tmp_path / "next", env="MiniGrid-Unlock-v0", knowledge="minigrid.avoid_ball,minigrid.get_key",
          init_from=str(uncut), warm=warm, total_timesteps=128)
    old = torch.load(uncut / "checkpoint.pt", weights_only=True)
    names = list(torch.load(tmp_path / "next" / "checkpoint.pt", weights_only=True)["policy"]["keys"])
    assert names == ["inner", "minigrid.avoid_ball", "minigrid.get_key", "inner.uncut"]
    keys, old_keys = started["keys"], old["policy"]["keys"]
    assert torch.equal(keys[2], old_keys["minigrid.get_key"]) and torch.equal(keys[3], old_keys["inner"])
    assert torch.equal(keys[0], old_keys["inner"]) == (warm == "all")
    for part in ("encoder", "trunk", "query", "inner"):
        same = all(torch.equal(p, old["agent"][k]) for k, p in started.items() if k.startswith(f"{part}."))
        assert same == (part in parts), part
    # what a run did without is remembered by the one that comes after it
    train(tmp_path / "third", knowledge="minigrid.get_ball,minigrid.open_door", init_from=str(tmp_path / "next"),
          warm="keys", total_timesteps=128)
    assert torch.equal(started["keys"][2], old_keys["minigrid.open_door"])


def test_a_frozen_inner_policy_that_has_its_keys_effect_gets_a_fresh_one(tmp_path, monkeypatch):
    train(tmp_path / "logit", fusion="logit", total_timesteps=256)
    started = {}
    monkeypatch.setattr(ppo_kian, "update", lambda agent, *_: started.update(keys=agent.keys.clone()) or {})
    train(tmp_path / "next", fusion="logit", init_from=str(tmp_path / "logit"), total_timesteps=128)
    old = torch.load(tmp_path / "logit" / "checkpoint.pt", weights_only=True)["policy"]["keys"]
    assert torch.equal(started["keys"][1], list(old.values())[1]) and not torch.equal(started["keys"][-1], old["inner"])


class Views(gym.Env):
    """Images that are no views of a grid."""
    observation_space, action_space = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8), gym.spaces.Discrete(3)

    def reset(self, seed=None, options=None):
        return np.zeros((84, 84, 3), np.uint8), {}


if "Views-v0" not in gym.registry:
    gym.register("Views-v0", Views)


@pytest.mark.parametrize("kwargs, words", [
    (dict(env="MiniGrid-DorKey-5x5-v0"), "MiniGrid-DoorKey-5x5-v0"),
    (dict(env="Pendulum-v1", knowledge="none"), "sac_kian"), (dict(env="BabyAI-GoToLocal-v0"), "minigrid.get_key"),
    (dict(knowledge="minigrid.get_ky"), "minigrid.get_key"),
    (dict(knowledge="run:missing"), "missing"), (dict(actor="rule", knowledge="none"), "--actor rule needs"),
    (dict(actor="plain", save_keys="k.json"), "kian"), (dict(init_from="missing"), "missing"),
    (dict(init_from="a", load_keys="b"), "--load-keys"), (dict(sharpness=float("inf")), "--sharpness"),
    (dict(env="FrozenLake-v1", knowledge="none"), "observes"),
    (dict(env="Views-v0", knowledge="none"), "flat arrays are needed"),
    (dict(num_steps=0), "--num-steps"), (dict(epochs=-1), "--epochs"),
    (dict(gamma=1.5), "0 to 1"), (dict(bc_coef=-0.5), "--bc-coef")])
def test_bad_input_is_one_line_and_leaves_nothing(kwargs, words, tmp_path):
    with pytest.raises((ArgError, envs.EnvError, knowledge.KnowledgeError)) as error:
        train(tmp_path / "run", **kwargs)
    message = str(error.value)
    assert words in message and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_film_and_attention_figure(uncut, tmp_path):
    ppo_kian.main(ppo_kian.Args(evaluate=str(uncut), eval_episodes=2, video=1))
    assert (uncut / "video" / "episode-0.mp4").stat().st_size > 1000
    assert (uncut / "video" / "attention-0.png").stat().st_size > 10_000
