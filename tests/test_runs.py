"""Runs as a user makes them: equal twice, exact after a cut, clear about mistakes."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from algos import sac_kian
from runtime import ArgError, exit_codes
import envs
import knowledge
import runtime

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(env="FetchPickAndPlace-v2", num_envs=4, hidden="16x1", batch_size=32, updates_per_step=0.05,
             compile=False, eval_every=400, eval_episodes=4, checkpoint_every=400)
FLAGS = ["--num-envs", "4", "--hidden", "16x1", "--batch-size", "32", "--updates-per-step", "0.05", "--no-compile",
         "--eval-every", "400", "--eval-episodes", "4", "--checkpoint-every", "400"]


def train(folder, **kwargs):
    return sac_kian.main(sac_kian.Args(**{**SMALL, "run_dir": str(folder), **kwargs}))


def rows(path, columns):
    """A CSV's rows without its wall time."""
    return [[row[c] for c in columns] for row in csv.DictReader(Path(path).open())]


def curve(folder):
    evals = rows(folder / "eval.csv", ["step", "episodes", "return_mean", "return_std", "success_rate", "length_mean"])
    return evals, rows(folder / "scalars.csv", ["step", "name", "value"])


def start(folder, *flags):
    command = [sys.executable, "algos/sac_kian.py", "--env", "FetchPickAndPlace-v2", "--run-dir", str(folder), *FLAGS]
    return subprocess.Popen([*command, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uncut"
    result = train(folder, total_timesteps=2000, save_keys=str(folder.parent / "keys.json"))
    return folder, result


def test_useless_rules_cost_their_time_alone(tmp_path, monkeypatch):
    """Advice to stand still earns as little as practice and uniform actions do: the agent begins anew, and the rule
    never acts again."""
    rules = tmp_path / "lazy.py"
    rules.write_text("import torch\n\n\ndef stay(obs):\n    return torch.zeros(len(obs['desired_goal']), 4)\n")
    monkeypatch.setattr(knowledge.Trust, "FEWEST", 1)
    for first, updates in ((12, 100), (1000, 400)):  # 4 episodes are uniform; 12 are compared, or all that there are
        monkeypatch.setattr(knowledge.Trust, "FIRST", first)
        train(tmp_path / str(first), env="FetchSlide-v2", total_timesteps=1000, knowledge=str(rules),
              updates_per_step=0.5)
        saved = torch.load(tmp_path / str(first) / "checkpoint.pt", weights_only=True)
        assert saved["agent"]["count"] == updates and saved["trust"]["trusted"] == (first == 12)
        weight = [float(r["value"]) for r in csv.DictReader((tmp_path / str(first) / "scalars.csv").open())
                  if r["name"] == "attention/inner"]
        assert weight[-1] < 1e-6 if first == 1000 else 0 < weight[-1] < 1  # the mean over the updates since the last
    monkeypatch.setattr(knowledge.Trust, "FIRST", 12)
    for cut in (800, 900):  # trust has been given, the agent is anew from the next step on; and later
        folder = tmp_path / f"cut{cut}"
        train(folder, env="FetchSlide-v2", total_timesteps=cut, knowledge=str(rules), updates_per_step=0.5)
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]["count"] == (300 if cut == 800 else 50)
        sac_kian.main(sac_kian.Args(resume=str(folder), total_timesteps=1000))
        for found, whole in zip(curve(folder), curve(tmp_path / "12")):
            assert [row for row in found if row[0] != str(cut)] == [row for row in whole if row[0] != str(cut)]


def test_run_folder(uncut):
    folder, result = uncut
    evals, scalars = curve(folder)
    assert [row[0] for row in evals] == ["0", "400", "800", "1200", "1600", "2000"]
    assert evals[-1][1] == "8" and float(evals[-1][2]) == pytest.approx(result["return_mean"], rel=1e-5)
    names = {row[1] for row in scalars}
    policies = ["inner", "fetch.reach_object", "fetch.carry_to_goal"]
    assert names >= {f"{kind}/{p}" for kind in ("attention", "selected", "key_norm") for p in policies}
    assert names >= {"critic_loss", "actor_loss", "alpha", "entropy", "inner_log_prob", "query_norm", "q"}
    for step in {row[0] for row in scalars if row[1] == "attention/inner"}:
        weights = [float(r[2]) for r in scalars if r[0] == step and r[1].startswith("attention/")]
        assert sum(weights) == pytest.approx(1, abs=1e-4)
    config = json.loads((folder / "config.json").read_text())
    assert config["algo"] == "sac_kian" and config["env_id"] == "FetchPickAndPlace-v4" and config["versions"]["mujoco"]
    torch.load(folder / "checkpoint.pt", weights_only=True)


def test_same_seed_same_run_other_seed_other_run(uncut, tmp_path):
    train(tmp_path / "again", total_timesteps=2000)
    assert curve(tmp_path / "again") == curve(uncut[0])
    train(tmp_path / "other", total_timesteps=2000, seed=2)
    assert curve(tmp_path / "other")[1] != curve(uncut[0])[1]


def test_kill_9_and_resume_equals_uncut(uncut, tmp_path):
    folder = tmp_path / "cut"
    process = start(folder, "--total-timesteps", "2000")
    wait_for(lambda: (folder / "checkpoint.pt").exists() and len(curve(folder)[0]) >= 3, process)
    process.kill()
    process.wait()
    sac_kian.main(sac_kian.Args(resume=str(folder)))
    assert curve(folder) == curve(uncut[0])


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_say_how_to_resume_and_lose_nothing(signum, code, uncut, tmp_path):
    folder = tmp_path / "cut"
    process = start(folder, "--total-timesteps", "2000", "--checkpoint-every", "0")
    wait_for(lambda: (folder / "eval.csv").exists() and len(curve(folder)[0]) >= 2, process)
    process.send_signal(signum)
    message = process.communicate()[1]
    assert process.returncode == code and f"--resume {folder}" in message
    sac_kian.main(sac_kian.Args(resume=str(folder)))
    evals, scalars = curve(folder)
    assert (evals, scalars) == curve(uncut[0])


def test_a_finished_run_can_be_given_more_steps(uncut, tmp_path):
    train(tmp_path / "run", total_timesteps=1102)  # its last step is the 1104th, its last evaluation there
    sac_kian.main(sac_kian.Args(resume=str(tmp_path / "run"), total_timesteps=2000))
    evals, scalars = curve(tmp_path / "run")
    assert [row for row in evals if row[0] != "1104"] == curve(uncut[0])[0]
    assert [row for row in scalars if row[0] != "1104"] == curve(uncut[0])[1]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["args"]["total_timesteps"] == 2000 and [r["step"] for r in config["resumed"]] == [1104]


@pytest.mark.parametrize("kwargs", [dict(actor="plain"), dict(actor="kogun"), dict(actor="a2t"), dict(knowledge="none"),
                                    dict(knowledge="fetch.official", cosine_scale=0.0, ext_log_std=-1.0, credit="drawn",
                                         initial_temperature=1.0, random_actions=0.0, normalize=False),
                                    dict(inner_key="head", ext_action="sample"), dict(entropy_fix="off"),
                                    dict(her_goals=0), dict(env="FetchReachDense-v2"),
                                    dict(env="Pendulum-v1", knowledge="none"), dict(bf16=True)])
def test_every_variant_trains_evaluates_and_becomes_knowledge(kwargs, tmp_path, monkeypatch):
    monkeypatch.setattr(sac_kian, "LOG_EVERY", 300)
    result = train(tmp_path / "run", **{"total_timesteps": 600, "eval_every": 0, **kwargs})
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    assert all(p.isfinite().all() for group in ("actor", "critic") for p in saved[group].values())
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["args"]  # as asked for, not what that implies
    assert {name: kept[name] for name in ("credit", "entropy_fix", "practice")} == {
        name: kwargs.get(name, getattr(sac_kian.Args(), name)) for name in ("credit", "entropy_fix", "practice")}
    result = sac_kian.main(sac_kian.Args(evaluate=str(tmp_path / "run"), eval_episodes=2))
    assert result["episodes"] == 2
    rows = csv.DictReader((tmp_path / "run" / "scalars.csv").open())
    weights = {row["name"]: float(row["value"]) for row in rows if row["name"].startswith("attention/")}
    assert sum(weights.values()) == pytest.approx(1.0, abs=0.01) and "attention/inner" in weights
    env = kwargs.get("env", SMALL["env"])
    if kwargs.get("ext_action") != "sample":
        train(tmp_path / "next", env=env, total_timesteps=400, eval_every=0, knowledge=f"run:{tmp_path / 'run'}")


def test_keys_are_taken_over_by_name(uncut, tmp_path, capsys):
    keys = json.loads((uncut[0].parent / "keys.json").read_text())["keys"]
    args = sac_kian.Args(hidden="16x1", load_keys=str(uncut[0]), warm="all")
    torch.manual_seed(5)
    actor = sac_kian.make_agent(args, 32, 4, 2)["actor"]
    fresh, names, normalizer = actor["keys"].clone(), ["inner", "new_rule", "fetch.carry_to_goal"], envs.Normalizer(32)
    with torch.no_grad():
        knowledge.take_over(actor, normalizer, names, str(uncut[0]), "keys")
        assert normalizer.count == 0  # keys alone see no inputs
        assert "keys taken over: fetch.carry_to_goal; fresh: inner, new_rule\n" in capsys.readouterr().err
        knowledge.take_over(actor, normalizer, names, str(uncut[0]), "all")
    assert actor["keys"][2].tolist() == pytest.approx(keys["fetch.carry_to_goal"])
    assert torch.equal(actor["keys"][1], fresh[1])  # a new name keeps its fresh key
    checkpoint = torch.load(uncut[0] / "checkpoint.pt", weights_only=True)
    trained = checkpoint["agent"]["actor"]
    assert normalizer.count > 0 and torch.equal(normalizer.mean, checkpoint["normalizer"]["mean"])
    assert torch.equal(actor["inner.0.weight"], trained["inner.0.weight"])
    assert torch.equal(actor["query.2.weight"], trained["query.2.weight"])
    actor["keys"][0] = 7.0
    knowledge.take_over(actor, normalizer, names, str(uncut[0].parent / "keys.json"), "all")
    assert (actor["keys"][0] == 7.0).all()  # a file has no inner policy, whose key it would be
    with pytest.raises(knowledge.KnowledgeError, match="trained with --normalize"):
        knowledge.take_over(actor, envs.Normalizer(32, on=False), names, str(uncut[0]), "all")
    train(tmp_path / "warm", total_timesteps=400, load_keys=str(uncut[0].parent / "keys.json"))


def test_a_run_goes_on_in_the_next_task(uncut, tmp_path, capsys):
    """Push after PickAndPlace: other rules, the old inner policy among them with its old key, and the old query."""
    trusted = tmp_path / "first" / "push"
    shutil.copytree(uncut[0], trusted)
    checkpoint = torch.load(trusted / "checkpoint.pt", weights_only=True)
    assert checkpoint["policy"]["handicap"] > 0  # so short a run holds its inner policy back, whose key learns nothing
    checkpoint["policy"]["handicap"] = 0.0
    torch.save(checkpoint, trusted / "checkpoint.pt")
    train(tmp_path / "held", env="FetchPush-v2", init_from=str(uncut[0]), total_timesteps=400)
    assert "its key learned nothing\nkeys taken over: none" in capsys.readouterr().err
    train(tmp_path / "push", env="FetchPush-v2", init_from=str(trusted), total_timesteps=400)
    assert "keys taken over: inner.push;" in capsys.readouterr().err
    old, new = (torch.load(folder / "checkpoint.pt", weights_only=True)["policy"] for folder in (trusted,
                                                                                                 tmp_path / "push"))
    assert list(new["keys"]) == ["inner", "fetch.get_behind_object", "fetch.push_to_goal", "inner.push"]
    assert torch.allclose(new["keys"]["inner.push"], old["keys"]["inner"], atol=0.05)  # few updates since
    assert torch.allclose(new["query"][0], old["query"][0], atol=0.05)
    assert not torch.allclose(new["inner"][0], old["inner"][0], atol=0.05)
    actor, names = {"keys": torch.zeros(2, 4)}, ["inner", "inner.push"]
    checkpoint = torch.load(tmp_path / "push" / "checkpoint.pt", weights_only=True)
    for handicap, words, key in ((0.0, "not the run of that name", new["keys"]["inner"]),
                                 (1e9, "never acted, its key learned nothing", torch.zeros(4)),
                                 (-1e9, "rules were dropped, the keys learned nothing", torch.zeros(4))):
        checkpoint["policy"]["handicap"] = handicap
        torch.save(checkpoint, tmp_path / "push" / "checkpoint.pt")
        with torch.no_grad():
            actor["keys"].zero_()
        knowledge.take_over(actor, None, names, str(tmp_path / "push"), "keys", cosine=False)
        assert torch.equal(actor["keys"][1], key)
        assert words in (said := capsys.readouterr().err) and "one of the two runs scores by cosine" in said
    with pytest.raises(knowledge.KnowledgeError, match="none of these is here"):
        knowledge.take_over(actor, None, ["inner", "mine"], str(uncut[0].parent / "keys.json"), "keys")


def test_goals_from_a_narrower_range(uncut, tmp_path, capsys):
    train(tmp_path / "near", goal_range=1.0, total_timesteps=400)
    assert "within 0.015 m" in capsys.readouterr().err
    sac_kian.main(sac_kian.Args(evaluate=str(tmp_path / "near"), goal_range=5.0, eval_episodes=2))
    assert "within 0.075 m" in capsys.readouterr().err
    vec = envs.make_vec("FetchPush-v2", 64, goal_range=1.0)
    goal = vec.reset(1)["desired_goal"] - vec.task.initial_gripper_xpos
    assert 0.01 < abs(goal[:, :2]).max() <= 0.015


@pytest.mark.parametrize("kwargs, words", [
    (dict(env="Pendulum-v1", knowledge="none", goal_range=5.0), "--goal-range"),
    (dict(init_from="missing"), "missing"), (dict(env="FetchPickAndPlce-v2"), "FetchPickAndPlace-v2"),
    (dict(env="CartPole-v1", knowledge="none"), "Box"),
    (dict(env="Pendulum-v1", knowledge="auto"), "none"),
    (dict(knowledge="fetch.reach_objct"), "fetch.reach_object"),
    (dict(knowledge="missing.py"), "missing.py"),
    (dict(knowledge="run:missing"), "missing"),
    (dict(num_envs=0), "--num-envs"), (dict(seed=-1), "--seed"), (dict(batch_size=-1), "--batch-size"),
    (dict(learning_rate=0.0), "--learning-rate"),
    (dict(hidden="256"), "--hidden"), (dict(load_keys="missing.json"), "missing.json"),
    (dict(actor="plain", load_keys="missing.json"), "kian"), (dict(knowledge="none", save_keys="k.json"), "kian"),
    (dict(save_keys="/"), "--save-keys / cannot"), (dict(save_keys=f"{__file__}/k.json"), "k.json cannot"),
    (dict(batch_size=400), "first update"), (dict(batch_size=310, num_envs=3), "450 steps"),
    (dict(init_from="a", load_keys="b"), "--load-keys"), (dict(practice=1.0), "--practice"),
    (dict(imitation=-1.0), "--imitation"), (dict(cosine_scale=float("inf")), "--cosine-scale"),
    (dict(her_goals=-1), "--her-goals"), (dict(track=True), "pip install wandb")])
def test_bad_input_is_one_line_and_leaves_nothing(kwargs, words, tmp_path):
    with pytest.raises((ArgError, envs.EnvError, knowledge.KnowledgeError)) as error:
        train(tmp_path / "run", total_timesteps=400, **kwargs)
    message = str(error.value)
    assert words in message and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_bad_folders(uncut, tmp_path, capsys):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text(json.dumps({"algo": "ppo_kian", "args": {}}))
    (tmp_path / "foreign" / "checkpoint.pt").write_bytes(b"")
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "config.json").write_text((uncut[0] / "config.json").read_text())
    (tmp_path / "corrupt" / "checkpoint.pt").write_bytes((uncut[0] / "checkpoint.pt").read_bytes()[:1000])
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text((uncut[0] / "config.json").read_text())
    for name, words in (("missing", "not a run folder"), ("foreign", "ppo_kian"), ("corrupt", "damaged"),
                        ("cut", "cut before")):
        for flag in ("resume", "evaluate"):
            with pytest.raises(ArgError, match=words):
                sac_kian.main(sac_kian.Args(**{flag: str(tmp_path / name)}))
    shutil.copytree(uncut[0], tmp_path / "elsewhere")  # from a machine with a GPU; the device stays unless it is named
    config = json.loads((uncut[0] / "config.json").read_text())
    config["args"]["device"] = "cuda"
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(config))
    if not torch.cuda.is_available():
        with pytest.raises(ArgError, match="--device cuda: torch sees no GPU"):
            sac_kian.main(sac_kian.Args(resume=str(tmp_path / "elsewhere"), total_timesteps=2100))
    with pytest.raises(ArgError, match=f"no config.json; the last one in it is {uncut[0]}"):
        sac_kian.main(sac_kian.Args(resume=str(uncut[0].parent)))
    config["args"] |= {"device": "cpu", "critic_norm": True}
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArgError, match="made with --critic-norm, which algos/sac_kian.py does not have; use its own"):
        sac_kian.main(sac_kian.Args(resume=str(tmp_path / "elsewhere"), total_timesteps=2100))
    del config["args"]["critic_norm"], config["args"]["goal_range"]
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArgError, match="keeps the arguments"):
        sac_kian.main(sac_kian.Args(resume=str(tmp_path / "elsewhere"), gamma=0.5))
    assert capsys.readouterr().err.endswith("is older than goal_range: as by default\n")
    for flag, asked in (("resume", dict(gamma=0.5)), ("evaluate", dict(seed=5)),
                        ("evaluate", dict(env="FetchSlide-v2"))):
        with pytest.raises(ArgError, match="keeps the arguments"):
            sac_kian.main(sac_kian.Args(**{flag: str(uncut[0])}, **asked))
    with pytest.raises(ArgError, match="not empty"):
        train(uncut[0])
    for asked in ({}, dict(total_timesteps=1000)):
        with pytest.raises(ArgError, match="at 2000 steps; give it more"):
            sac_kian.main(sac_kian.Args(resume=str(uncut[0]), **asked))


def test_a_flag_that_repeats_its_default_is_a_named_one(uncut, monkeypatch):
    with pytest.raises(ArgError, match="at 2000 steps"):  # left out
        sac_kian.main(sac_kian.Args(resume=str(uncut[0])))
    monkeypatch.setattr(sys, "argv", ["x", "--resume", str(uncut[0]), "--gamma=0.95", "--hidden", "256x3"])
    with pytest.raises(ArgError, match="--hidden 256x3: a run keeps"):
        sac_kian.main(sac_kian.Args(resume=str(uncut[0])))
    monkeypatch.setattr(sys, "argv", ["x", "--resume", str(uncut[0]), "--total-timesteps", "150000", "--compile"])
    with pytest.raises(ArgError, match="--compile: a run keeps"):  # the total is no mistake
        sac_kian.main(sac_kian.Args(resume=str(uncut[0])))


def test_a_run_says_which_code_made_it(tmp_path, monkeypatch, capsys):
    """A commit alone would not: a fork is in none yet."""
    script = tmp_path / "algos" / "sac_kian.py"
    for words in (["init", "-q"],
                  ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "runtime.py"))
    monkeypatch.delenv("RUN_COMMIT", raising=False)
    (tmp_path / "mine.txt").write_text("no code")
    assert not runtime.describe_machine()["commit"].endswith("dirty")
    script.parent.mkdir()
    script.write_text("first")
    assert runtime.describe_machine()["commit"].endswith("-dirty")
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.chdir(tmp_path)
    Path("sac_kian.py").write_text("def still(obs): return obs['observation'][:, :4] * 0\n")  # rules by the same name
    train(tmp_path / "run", total_timesteps=400, knowledge="sac_kian.py")
    kept = tmp_path / "run" / "algos-sac_kian.py"
    assert kept.read_text() == "first" and "note" not in capsys.readouterr().err
    script.write_text("second")
    sac_kian.main(sac_kian.Args(resume=str(tmp_path / "run"), total_timesteps=600))
    assert kept.read_text() == "first"
    assert f"note: {script} has changed since this run began" in capsys.readouterr().err


def test_command_line_exits_2_with_one_line(tmp_path):
    command = [sys.executable, "algos/sac_kian.py", "--env", "FetchPickAndPlce-v2", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    line, = done.stderr.splitlines()
    assert line.startswith("sac_kian: ") and "FetchPickAndPlace-v2" in line


@pytest.mark.parametrize("error, code, line", [(ArgError("no"), 2, "x: no"), (envs.EnvError("none"), 2, "x: none"),
                                               (KeyboardInterrupt(), 130, "x: interrupted")])
def test_one_line_and_an_exit_code(error, code, line, capsys):
    with pytest.raises(SystemExit) as end, exit_codes("x", envs.EnvError):
        raise error
    assert end.value.code == code and capsys.readouterr().err == line + "\n"


def test_ctrl_c_spares_what_is_started_while_finishing():
    """A terminal's Ctrl-C goes to all its processes: the child lives on, this process hears of it after the block."""
    code = """
import os, signal, subprocess
from runtime import finishing
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
try:
    with finishing():
        child = subprocess.Popen(["sleep", "0.5"])
        os.killpg(0, signal.SIGINT)
        print(child.wait(), flush=True)
    print("not heard")
except KeyboardInterrupt:
    print("heard")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          start_new_session=True)
    assert done.stdout.split() == ["0", "heard"], done.stdout + done.stderr


def test_video_and_attention_figure(uncut, capsys):
    renderer = envs.find_renderer()
    sac_kian.main(sac_kian.Args(evaluate=str(uncut[0]), eval_episodes=2, video=1))
    if not renderer:  # says what to install, and goes on
        assert "apt-get install" in capsys.readouterr().err and not (uncut[0] / "video").exists()
        return
    assert (uncut[0] / "video" / "episode-0.mp4").stat().st_size > 1000
    assert (uncut[0] / "video" / "attention-0.png").stat().st_size > 10_000


def test_compiled_update_is_the_eager_one():
    """1e-5 after 20 updates, from equal weights, batches and noise."""
    agents = []
    for step in (sac_kian.update, torch.compile(sac_kian.update, fullgraph=True, dynamic=False)):
        torch.manual_seed(0)
        args = sac_kian.Args(hidden="32x2", batch_size=64)
        agent = sac_kian.make_agent(args, 31, 4, 2)
        with torch.no_grad():
            for _ in range(20):
                batch = torch.randn(64, 68)
                batch[:, 36] = 0
                inputs = [batch, torch.zeros(31), torch.ones(31), torch.rand(64, 2, 4), torch.rand(64, 2, 4)]
                step(agent, *inputs, sac_kian.draw_noise(64, 2, 4), sac_kian.draw_noise(64, 2, 4), args)
        agents.append(agent)
    for group in ("actor", "critic", "target"):
        for name, eager in agents[0][group].items():
            assert torch.allclose(eager, agents[1][group][name], atol=1e-5), name


def test_evaluation_gives_every_copy_the_same_number_of_episodes():
    """Two copies whose episodes last 1 and 3 steps: a first-come rule would count the short one more often."""
    class Uneven:
        num_envs, length, max_episode_steps = 2, [1, 3], 3

        def reset(self, seed):
            self.t = [0, 0]
            return None

        def step(self, action):
            import numpy as np
            self.t = [t + 1 for t in self.t]
            ended = np.array([t == n for t, n in zip(self.t, self.length)])
            self.t = [0 if e else t for t, e in zip(self.t, ended)]
            return None, np.ones(2), ended, np.zeros(2, bool), {"success": np.array([1.0, 0.0])}
    result = envs.evaluate(lambda obs: None, Uneven(), 8, seed=0)
    assert result == {"episodes": 8, "return_mean": 2.0, "return_std": 1.0, "success_rate": 0.5, "length_mean": 2.0}
    assert envs.evaluate(lambda obs: None, Uneven(), 3, seed=0)["length_mean"] == pytest.approx((1 + 1 + 3) / 3)
    with pytest.raises(ValueError):
        envs.evaluate(lambda obs: None, Uneven(), 1, seed=0)
