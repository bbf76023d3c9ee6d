"""What every script promises about its runs, whatever it learns. A new script is a line in SCRIPTS."""
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import pytest
import torch
from torch.utils._pytree import tree_map

import envs
import knowledge
import runtime
from tests.tasks import SIGNAL_AT, dataset

ROOT = Path(__file__).resolve().parent.parent


class Script(NamedTuple):
    name: str  # of algos/<name>.py
    flags: str  # for a run of a second; STEPS, evaluations and checkpoints are added
    scalars: str  # what scalars.csv has to have; x/ stands for all names that begin so
    refuses: str = ""  # an environment whose actions are of the wrong kind
    leaves: str = "policy.pt2"  # what a finished run leaves for other programs
    played: bool = True  # whether there are episodes; else eval.csv has what the last rows of a series came to
    episodes: int = 4  # of an evaluation with --eval-episodes 4
    sees: tuple[int, ...] = ()  # shape of what policy.pt2 takes, where that is no observation


POINT = "--env tests.tasks:PointDense-v0 --num-envs 4 --hidden 8x1 --batch-size 16"
SEARCH = "--env tests.tasks:PointDense-v0 --num-envs 4"  # of sparse returns many are equal, and then there is no step
DDPG = f"{POINT} --learning-starts 64 --updates-per-step 0.2"
RULES = "--knowledge tests/tasks.py"
PPO = "--num-envs 4 --num-steps 16 --batch-size 32"
GRID = f"--env MiniGrid-DoorKey-5x5-v0 {PPO}"
STREAM = "--hidden 16x1 --no-time-feature"
LOSSES, SAC = "critic_loss actor_loss q", "critic_loss actor_loss q alpha entropy"
OF_PPO, OF_STREAM = "policy_loss value_loss entropy approx_kl", "abs_delta value"
BOTH = "policy.pt2 inner.pt2"
SPLITS = ("--env CrippledHalfCheetah-dyn-v0 --num-envs 6 --horizon 10 --hidden 8x1 --encoder-hidden 8 --batch-size 16 "
          "--updates-per-step 0.2")
OF_SPLITS = f"{SAC} eval-moderate/return_mean eval-extreme/return_mean wrong_context probe_r2 probe_r2_observation"
WINDOWS = dict(refuses="Pendulum-v1", episodes=15, sees=(8, 25))  # a window has 8 rows
TEXT = f"--env BabyAI-Text-GoToLocal-RedBall-S20 {PPO}"
SHAPED = f"{OF_PPO} phi shaping phi_invalid"
SCRIPTS = [
    Script("a2c", "--env CartPole-v1 --num-envs 4", "policy_loss value_loss entropy"),
    Script("acer", "--env CartPole-v1 --num-envs 4 --num-steps 8 --buffer-size 64 --replay-starts 16",
           "policy_loss value_loss entropy bound_fraction actor_ratio retrace_ratio", refuses="Pendulum-v1"),
    Script("acktr", "--env Pendulum-v1 --num-envs 4 --normalize", "policy_loss value_loss entropy nu",
           refuses="MiniGrid-Empty-5x5-v0"),
    Script("ars", f"{SEARCH} --top 2", "step_norm return return_deviation",
           refuses="MiniGrid-Empty-5x5-v0"),
    Script("bk_code", TEXT, SHAPED, refuses="Pendulum-v1"),
    Script("bk_goal", TEXT, SHAPED, refuses="Pendulum-v1"),
    Script("bk_pref", TEXT, SHAPED, refuses="Pendulum-v1"),
    Script("br_rcrl", f"{POINT} --dataset {dataset()} --bins 8 --negatives 4 --samples 8",
           "nce_loss rtg_loss value_loss accuracy asked_return", refuses="CartPole-v1"),
    Script("camel", f"{DDPG} {RULES} --mask-steps 400", f"{LOSSES} epsilon outside clipped masked_return",
           refuses="CartPole-v1"),
    Script("ccm", SPLITS, f"{OF_SPLITS} nce_loss weight", **WINDOWS),
    Script("cma_es", SEARCH, "sigma step_norm return", refuses="MiniGrid-Empty-5x5-v0"),
    Script("ddpg", DDPG, LOSSES, refuses="CartPole-v1"),
    Script("dqn", "--env CartPole-v1 --num-envs 4 --hidden 16x1 --batch-size 16 --learning-starts 64 --train-every 32 "
           "--updates 4", "critic_loss q epsilon", refuses="Pendulum-v1"),
    Script("lesr", f"--env Pendulum-v1 {DDPG.split(' ', 2)[2]} --features tests/features.py", LOSSES,
           refuses="CartPole-v1"),
    Script("meow", f"{DDPG} --shift-hidden 8x1", "critic_loss q target_q grad_norm", refuses="CartPole-v1"),
    Script("ppo", f"--env CartPole-v1 {PPO}", OF_PPO, refuses="Pendulum-v1"),
    Script("ppo_a2t", GRID, OF_PPO, refuses="Pendulum-v1"),
    Script("ppo_bc", GRID, OF_PPO, refuses="Pendulum-v1"),
    Script("ppo_continuous", f"--env Pendulum-v1 {PPO}", OF_PPO, refuses="CartPole-v1"),
    Script("ppo_kian", GRID, f"{OF_PPO} attention/inner key_norm/", refuses="Pendulum-v1", leaves=BOTH),
    Script("ppo_kogun", GRID, OF_PPO, refuses="Pendulum-v1"),
    Script("ppo_mask", f"{GRID} --mask-steps 400", f"{OF_PPO} epsilon", refuses="Pendulum-v1"),
    Script("ppo_pixels", f"--env MobileRobot-v0:pixels {PPO}", OF_PPO, refuses="CartPole-v1"),
    Script("ppo_rnd", f"{TEXT} --collect 2", f"{OF_PPO} predictor_loss curiosity", refuses="Pendulum-v1"),
    Script("sac", POINT, SAC, refuses="CartPole-v1"),
    Script("sac_bc", f"{POINT} {RULES}", f"{SAC} bc_loss imitated", refuses="CartPole-v1"),
    Script("sac_demos", f"{POINT} {RULES} --demos 8", f"{SAC} demos", refuses="CartPole-v1"),
    Script("sac_handover", f"{POINT} {RULES}", f"{SAC} attention/inner selected/tasks.go_right return_gap",
           refuses="CartPole-v1", leaves=BOTH),
    Script("sac_kian", f"{POINT} {RULES}", f"{SAC} attention/inner attention/tasks.approach selected/ key_norm/",
           refuses="CartPole-v1", leaves=BOTH),
    Script("sac_kogun", f"{POINT} {RULES}", SAC, refuses="CartPole-v1"),
    Script("sac_shaping", f"{POINT} --knowledge tests/potential.py", f"{SAC} phi phi_invalid", refuses="CartPole-v1"),
    Script("saccm", SPLITS, f"{OF_SPLITS} nce_loss weight", **WINDOWS),
    Script("satesac", SPLITS, f"{OF_SPLITS} nce_loss weight", **WINDOWS),
    Script("srl", "--env MobileRobot-v0 --losses vae,inverse,forward,reward,priors --frames 200 --episode-steps 10 "
           "--batch-size 16 --code 4", "vae_loss inverse_loss forward_loss reward_loss priors_loss reconstruction "
           "probe_r2/ knn_mse", refuses="Pendulum-v1", leaves="encoder.pt2", played=False),
    Script("stream_ac", f"--env Pendulum-v1 {STREAM}", f"{OF_STREAM} entropy"),
    Script("stream_q", f"--env CartPole-v1 {STREAM}", OF_STREAM, refuses="Pendulum-v1"),
    Script("stream_td", "--env series/transformer --hidden 16x1", OF_STREAM, leaves="", played=False),
    Script("td3", DDPG, LOSSES, refuses="CartPole-v1"),
    Script("tesac", SPLITS, OF_SPLITS, **WINDOWS),
    Script("trpo", f"--env Pendulum-v1 --normalize {PPO}", "policy_loss value_loss entropy kl"),
]
BY_NAME = {script.name: script for script in SCRIPTS}
STEPS = 512
EVERY = ["--eval-every", "256", "--checkpoint-every", "256", "--device", "cpu", "--no-compile"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Where users are."""
    monkeypatch.chdir(ROOT)


def words(script, folder, steps=STEPS):
    played = ["--eval-episodes", "4"] if script.played else []
    return [*script.flags.split(), *EVERY, *played, "--total-timesteps", str(steps), "--run-dir", str(folder)]


def command(script, *words, log_every=96):
    """What `python algos/<name>.py <words>` does, in this process, with scalars at every 96 steps."""
    module, flags = import_module(f"algos.{script.name}"), script.flags.split()
    if {"--resume", "--evaluate"} & {*words}:  # files that run code have to be named again
        words = [*words, *(word for pair in zip(flags, flags[1:]) if pair[1].endswith(".py") for word in pair)]
    with pytest.MonkeyPatch.context() as patch, runtime.exit_codes(module.ALGO):
        patch.setattr(module, "LOG_EVERY", log_every)
        return module.main(runtime.cli(module.Args, module.ALGO, words))


def refused(script, capsys, *words):
    """The line with which `words` end, checked for its form."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command(script, *words)
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert end.value.code == 2 and line.startswith(f"{script.name}: ") and "Traceback" not in out + err
    return line


def rows(path):
    """The rows of a CSV without their wall time."""
    return [{k: v for k, v in row.items() if k != "wall_s"} for row in csv.DictReader(path.open())]


def curves(folder):
    return rows(folder / "eval.csv"), rows(folder / "scalars.csv")


def contents(folder):
    """What is in the files of a folder. Of TensorBoard's only the name counts: the writer of a run that was killed in
    this process lives on, and flushes at some time."""
    return {path.relative_to(folder): b"" if path.name.startswith("events.") else path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    """What `kill -9` leaves of a run: the files as they are."""


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.name)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def uncut(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uncut"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        result = command(script, *words(script, folder))
    return folder, result


def killed(at, script, folder, *more):
    """A run that dies at step `at`, before it could save there."""
    save = runtime.Run.save_if_due
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def save_or_die(run):
        if run.step >= at:
            raise Killed
        save(run)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.chdir(ROOT)
        patch.setattr(runtime.Run, "save_if_due", save_or_die)
        command(script, *words(script, folder), *more)
    for signum, handler in handlers.items():  # which a killed process has not either
        signal.signal(signum, handler)


@pytest.fixture(scope="module")
def cut(script, tmp_path_factory):
    """A run that died later than at its last checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "cut"
    killed(3 * STEPS // 4, script, folder)
    return folder


def test_every_script_has_a_line_here():
    assert [s.name for s in SCRIPTS] == sorted(path.stem for path in (ROOT / "algos").glob("*.py"))


def test_run_folder(script, uncut):
    folder, result = uncut
    evaluations, scalars = curves(folder)
    with (folder / "eval.csv").open() as file:
        assert next(csv.reader(file)) == ["step", "wall_s", *runtime.EVALUATION]
    first, middle, last = evaluations
    assert first["step"] == "0" and STEPS // 2 <= int(middle["step"]) < STEPS <= int(last["step"])
    if script.played:
        assert first["episodes"] == middle["episodes"] == str(script.episodes)
        assert int(last["episodes"]) in (script.episodes, 2 * script.episodes)
    assert float(last["return_mean"]) == pytest.approx(result["return_mean"], rel=1e-5)
    assert result.keys() == set(runtime.EVALUATION)
    names = {row["name"] for row in scalars}
    for expected in (*script.scalars.split(), "eval/return_mean", "eval/length_mean"):
        assert any(name == expected or expected[-1] == "/" and name.startswith(expected) for name in names), expected
    config = json.loads((folder / "config.json").read_text())
    assert config["algo"] == script.name and config["args"]["total_timesteps"] == STEPS and config["versions"]["torch"]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == int(last["step"])
    assert list(folder.glob("events*"))


def test_killed_and_resumed_is_the_uncut_run(script, uncut, cut, tmp_path):
    """Also: the same seed twice is the same run."""
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert max(int(row["step"]) for row in curves(folder)[1]) > saved  # rows that have to go
    command(script, "--resume", str(folder))
    assert curves(folder) == curves(uncut[0])
    assert [again["step"] for again in json.loads((folder / "config.json").read_text())["resumed"]] == [saved]


def test_a_run_that_died_in_its_last_seconds_is_finished_by_resume(script, uncut, tmp_path, monkeypatch, capsys):
    """All steps are made, and its policy is not written."""
    folder, written = tmp_path / "run", []
    shutil.copytree(uncut[0], folder, ignore=shutil.ignore_patterns("*.pt2"))
    config = json.loads((folder / "config.json").read_text())
    assert config["finished"]
    (folder / "config.json").write_text(json.dumps(config | {"finished": False}))
    monkeypatch.setattr(runtime.policy, "save_policy", lambda path, *_: written.append(path.name))
    result = command(script, "--resume", str(folder))
    assert set(written) == set(script.leaves.split()) and curves(folder) == curves(uncut[0])
    assert result == pytest.approx(uncut[1], rel=1e-5, nan_ok=True)
    assert "give it more --total-timesteps" in refused(script, capsys, "--resume", str(folder))


def test_evaluate_plays_the_checkpoint_and_leaves_no_trace(script, cut, capsys):
    before, row = contents(cut), curves(cut)[0][-1]
    result = command(script, "--evaluate", str(cut))
    assert f"after {row['step']} {'steps' if script.played else 'rows'}" in capsys.readouterr().out
    assert {name: float(f"{value:.6g}") for name, value in result.items()} == pytest.approx(
        {name: float(row[name]) for name in runtime.EVALUATION}, nan_ok=True)
    after = contents(cut)
    written = after.pop(Path("evaluation.csv"), b"").decode().splitlines()
    assert after == before and (len(written) > 1 and f",1,{row['step']}," in written[1] or not script.played)


def test_another_seed_is_another_run(script, uncut, tmp_path):
    killed(STEPS // 2, script, tmp_path / "run", "--seed", "2")
    other, ours = curves(tmp_path / "run")[1], curves(uncut[0])[1]
    trained = [row for row in other if row["name"] == script.scalars.split()[0]]
    assert trained and not any(row in ours for row in trained)


def test_the_policy_of_a_finished_run_acts_elsewhere(script, uncut):
    folder = uncut[0]
    assert {path.name for path in folder.glob("*.pt2")} == set(script.leaves.split())
    if "policy.pt2" not in script.leaves:  # what others are: tests/test_srl.py
        return
    env = json.loads((folder / "config.json").read_text())["args"]["env"]
    vec = envs.make_vec(env, 1)
    example, space = envs.example_of(vec, vec.reset(1)), vec.action_space
    if script.sees:
        example = torch.rand(2, *script.sees)
    discrete = isinstance(space, gym.spaces.Discrete)
    width = int(space.n) if discrete else space.shape[0]
    for name in script.leaves.split():
        program = torch.export.load(folder / name).module()
        for size in (1, 3):
            action = program(tree_map(lambda x: x[:1].repeat(size, *[1] * (x.dim() - 1)), example))
            assert action.shape == (size, width) and action.isfinite().all()
            whole = action.exp().sum(1) if discrete else action.abs().amax(1).clamp(min=1)
            assert torch.allclose(whole, torch.ones(size), atol=1e-5)  # probabilities sum to 1; actions are in [-1, 1]
        kind = "inner" if name == "inner.pt2" else "run"
        assert script.sees or knowledge.load(f"{kind}:{folder}", env, width, example, lowest=0.0 if discrete else -1.0)


def test_numbers_that_cannot_work_are_refused(script, tmp_path):
    """NaN, or for whole numbers -1, as any number of the script: a line that names the flag."""
    module = import_module(f"algos.{script.name}")
    args = runtime.cli(module.Args, module.ALGO, words(script, tmp_path / "run"))
    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            wrong = math.nan if isinstance(value, float) else -1
            with pytest.raises(runtime.UserError, match=rf"^--{field.name.replace('_', '-')} must be .*{wrong}$"):
                module.main(replace(args, **{field.name: wrong}))
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_start_creates_nothing(script, uncut, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    new = words(script, tmp_path / "run")
    assert "Nothing-v0" in refused(script, capsys, *new, "--env", "Nothing-v0")
    if script.refuses:
        assert script.refuses in refused(script, capsys, *new, "--env", script.refuses)
    assert "pip install wandb" in refused(script, capsys, *new, "--track")
    assert not (tmp_path / "run").exists()
    before = contents(uncut[0])
    assert "is not empty" in refused(script, capsys, *words(script, uncut[0]))
    assert contents(uncut[0]) == before


def test_a_run_that_cannot_go_on_is_left_as_it_is(script, uncut, cut, tmp_path, capsys):
    def folder(name, checkpoint):
        """A copy of the cut run with another checkpoint.pt."""
        shutil.copytree(cut, tmp_path / name)
        (tmp_path / name / "checkpoint.pt").unlink()
        if checkpoint is not None:
            (tmp_path / name / "checkpoint.pt").write_bytes(checkpoint)
        return tmp_path / name

    def saved(thing):
        torch.save(thing, tmp_path / "saved.pt")
        return (tmp_path / "saved.pt").read_bytes()

    foreign = folder("foreign", None)
    config = json.loads((cut / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"algo": "another"}))
    for source, expected in ((tmp_path / "missing", "no config.json"), (tmp_path, "no config.json"),
                             (foreign, "a run of another"), (folder("early", None), "no checkpoint.pt"),
                             (folder("half", (cut / "checkpoint.pt").read_bytes()[:500]), "damaged"),
                             (folder("text", b"nothing"), "damaged"), (folder("empty", saved({})), "no checkpoint"),
                             (folder("code", saved(Path("x"))), "damaged"),  # would run code when it is read
                             (folder("lacks", saved({"step": 256})), "the checkpoint has no")):
        before = contents(source) if source.is_dir() and source != tmp_path else None
        for flag in ("--resume", "--evaluate"):
            line = refused(script, capsys, flag, str(source))
            assert expected in line and (str(source) in line or expected == "the checkpoint has no")
        if before is not None:
            assert contents(source) == before, source
    assert not (tmp_path / "missing").exists()
    before = contents(uncut[0])
    for flags, expected in ((["--resume", str(cut), "--evaluate", str(cut)], "leave one of them out"),
                             (["--resume", str(cut), "--seed", "7"], "--seed 7: a run keeps"),
                             (["--evaluate", str(cut), "--checkpoint-every", "7"], "--checkpoint-every 7: a run keeps"),
                             (["--resume", str(cut), "--total-timesteps", "1"], "give it more --total-timesteps"),
                             (["--resume", str(uncut[0])], "give it more --total-timesteps")):
        assert expected in refused(script, capsys, *flags)
    assert contents(uncut[0]) == before


# One script stands for all in what is runtime's alone, and in processes of its own.

def test_a_finished_run_can_be_given_more_steps(tmp_path):
    script = BY_NAME["sac"]
    command(script, *words(script, tmp_path / "uncut"))
    command(script, *words(script, tmp_path / "run", 256 + 6))
    last = curves(tmp_path / "run")[0][-1]["step"]
    assert last == "264"  # four at a time
    command(script, "--resume", str(tmp_path / "run"), "--total-timesteps", str(STEPS))
    for found, whole in zip(curves(tmp_path / "run"), curves(tmp_path / "uncut")):
        assert [row for row in found if row["step"] != last] == whole


@pytest.mark.exports
def test_a_ctrl_c_while_the_policy_is_written_waits_for_it(tmp_path, monkeypatch, capsys):
    save = runtime.policy.save_policy

    def interrupted(*given):
        assert not json.loads((tmp_path / "run" / "config.json").read_text())["finished"]
        os.kill(os.getpid(), signal.SIGINT)
        return save(*given)
    monkeypatch.setattr(runtime.policy, "save_policy", interrupted)
    command(BY_NAME["sac"], *words(BY_NAME["sac"], tmp_path / "run", 256))
    assert (tmp_path / "run" / "policy.pt2").is_file() and "finished; score" in capsys.readouterr().err


def test_a_run_loses_nothing_by_signals(tmp_path):
    """It is killed, goes on, is told to end, goes on, is interrupted, goes on, each time but the last in a process."""
    script, folder, program = BY_NAME["sac"], tmp_path / "cut", [sys.executable, "algos/sac.py"]
    flags = words(script, tmp_path / "uncut", 1536)  # scalars are due at 1000
    for at, name, code, more in ((700, "SIGKILL", -9, words(script, folder, 1536)),
                                 (400, "SIGTERM", 143, ["--resume", str(folder)]),
                                 (300, "SIGINT", 130, ["--resume", str(folder)])):
        done = subprocess.run([*program, *more], cwd=ROOT, capture_output=True, text=True,
                              start_new_session=True, env={**os.environ, SIGNAL_AT: f"{at} {name}"})
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        assert code < 0 or f"{program[1]} --resume {folder}" in done.stderr.splitlines()[-1]
    command(script, "--resume", str(folder), log_every=1000)
    command(script, *flags, log_every=1000)
    assert curves(folder) == curves(tmp_path / "uncut")
    resumed = json.loads((folder / "config.json").read_text())["resumed"]
    killed, ended, interrupted = (again["step"] for again in resumed)
    assert killed % 256 == 0 and ended % 256 > 0 and killed < ended < interrupted < 1536


def test_a_wrong_word_on_the_command_line():
    done = subprocess.run([sys.executable, "algos/sac.py", "--env", "FetchPickAndPlce-v2"], cwd=ROOT,
                          capture_output=True, text=True)
    line, = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and line.startswith("sac: ")
    assert "FetchPickAndPlace-v2" in line
