"""The outer loop of LESR: what is asked, refused, measured and told; killed in the middle; from recordings and from a
server."""
import csv
import json
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

import envs
from errors import UserError
from knowledge.features import load_features
from llm import client, lesr, sandbox
from llm.sandbox import SandboxError
from llm.write_policies import task_for
from tests.test_llm import KEY, server  # noqa: F401  (a fixture)
from tests.test_sandbox import pytestmark  # noqa: F401  (skips where there is no seccomp)

ROOT = Path(__file__).resolve().parent.parent
HOPPER = task_for("Hopper-v4")[1]


def pair(extra="s[5] ** 2", reward="min(s[11], 9.0)", head="", state="s"):
    return (f"I think.\n```python\nimport numpy as np\n{head}\ndef revise_state(s):\n    return np.concatenate("
            f"[{state}, [{extra}]])\n\ndef intrinsic_reward(s):\n    return {reward}\n```\n")


# ---- what can be used --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply, reason", [
    ("I am sorry.", "no fenced Python block"), (pair(head="import os"), "import of os is not allowed"),
    (pair(reward="open('x')"), "open is not allowed"),
    (pair(extra="1 / s[0]"), "revise_state fails in some of 256 random states"),
    (pair(extra="np.log(np.abs(s[0]))"), "not finite"), (pair(reward="s[99]"), "intrinsic_reward fails"),
    (pair(reward="101.0"), r"beyond \+-100"), (pair(reward="s[:2]"), r"returns shape \(2,\)"),
    (pair(state="2 * s"), "has to begin with the state, unchanged"), (pair(extra=""), "at least one feature"),
    (pair(state="s[:3]"), "has to return the 11 numbers of s"),
    (pair(head="seen = []\n", extra="[seen.append(1), len(seen)][1]"), "revise_state has a memory"),
    (pair(head="seen = []\n", reward="[seen.append(1), len(seen) / 99][1]"), "intrinsic_reward has a memory")])
def test_gate_refuses(reply, reason):
    with pytest.raises(SandboxError, match=reason) as error:
        lesr.gate(reply, 11)
    assert "\n" not in str(error.value)


def test_a_state_is_described_as_the_script_has_it():
    """Also on tasks with goals, whose parts the script puts one after another."""
    for env in ("Hopper-v4", "Walker2d-v4", "Ant-v4", "FetchPush-v2"):
        numbers, vec = lesr.numbers_of(task_for(env)[1]), envs.make_vec(env, 1)
        assert len(numbers) == envs.continuous_sizes(vec)[0]
        assert ("infant" in lesr.first_question(env, task_for(env)[1])) == (env == "FetchPush-v2")
    text = [meaning for meaning, _ in numbers]
    assert text[0].startswith("achieved goal: x of the block") and text[3].startswith("desired goal: x")
    assert text[6].startswith("x of the gripper") and "left of the episode" in text[31]
    assert "| 10 | rate of index 4 | rad/s |\n\nSome" in lesr.first_question("Hopper-v4", HOPPER)


# ---- what is measured and told -----------------------------------------------------------------------------------


def test_the_score_is_the_mean_of_ten():
    assert lesr.score_of([100.0 * k for k in range(21)]) == 1550 and lesr.score_of([3.0, 5.0]) == 4


def leave(log: Path, command: list[str], curve: list[float], constants: list[float], success="nan") -> None:
    """What a training leaves: a log that begins with its command, how it ended, a curve and constants."""
    folder = log.with_suffix("")
    folder.mkdir(parents=True)
    log.write_text(f"$ {shlex.join(command)}\nstep 0\n")
    log.with_suffix(".json").write_text('{"returncode": 0, "seconds": 1}')
    rows = [f"{100 * k},1,10,{x},0,{success if success == 'nan' else x},5" for k, x in enumerate(curve)]
    (folder / "eval.csv").write_text(
        "\n".join(["step,wall_s,episodes,return_mean,return_std,success_rate,length_mean", *rows]) + "\n")
    rows = [f"{i},9,{x}" for i, x in enumerate(constants)]
    (folder / "lipschitz.csv").write_text("\n".join(["number,lipschitz,unbiased", *rows]) + "\n")


@pytest.mark.parametrize("success, word", [("nan", "Return"), ("", "Success rate")])
def test_feedback_by_hand(success, word, tmp_path):
    """Two seeds, 2,000 steps, a state of one number and one feature: the untrained agent does not count."""
    file = tmp_path / "candidate-1.py"
    file.write_text("some code\n")
    one, args = lesr.Candidate(1, file, ""), lesr.Args(seeds=2, total_timesteps=2000)
    curves = [[100.0 * k for k in range(21)], [-77.0] + [50.0] * 20]
    for seed, (curve, constants) in enumerate(zip(curves, ([1, 2], [3, 4.5])), 1):
        leave(tmp_path / f"seed{seed}.log", [], curve, constants, success)
    with pytest.raises(UserError, match="is not trained"):
        lesr.read_runs(args, lesr.Candidate(1, file, ""), [tmp_path / "seed1.log"])
    lesr.read_runs(args, one, [tmp_path / "seed1.log", tmp_path / "seed2.log"])
    assert one.score == 800 and one.constants == [2, 3.25]
    text = lesr.feedback_of([one], 1)
    assert f"{word}: 800.00\n" in text and "```python\nsome code\n```" in text
    assert "of the state: s[0] 2.00\n" in text and "of the features: s[1] 3.25\n" in text
    untold = lesr.feedback_of([one], 1, measured=False)
    assert "some code" in untold and not re.search(r"800|2\.00|3\.25", untold)


# ---- the loop, with trainings that cost nothing ------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch):
    """In place of benchmarks/run.py. The returned list has the files that were trained with, each once; an agent's
    return is the last number in its code, and training fails where that is 13."""
    trained = []

    def engine(args, suite, bench):
        for cell in tomllib.loads(suite.read_text())["cell"]:
            words = shlex.split(cell["flags"])
            file = Path(words[words.index("--features") + 1].removeprefix("llm:"))
            log = bench / file.parent.name / file.stem / "seed1.log"
            if file in trained:
                continue
            trained.append(file)
            worth = float(re.findall(r"[\d.]+", file.read_text())[-1])
            leave(log, ["python", *words], [0.0, worth] + [worth] * (args.total_timesteps // 100 - 1), [1.0] * 12)
            if worth == 13:
                log.with_suffix(".json").write_text('{"returncode": 2}')
                (log.with_suffix("") / "eval.csv").unlink()
                log.write_text(log.read_text() + "error: features fail in revise_state\n\n")
    monkeypatch.setattr(lesr, "engine", engine)
    return trained


def flags(server, tmp_path, **changes) -> lesr.Args:  # noqa: F811
    return lesr.Args(**{"mode": "record", "model": "My/Model", "base_url": server.url, "total_timesteps": 1000,
                        "recordings": str(tmp_path / "r.jsonl"), "out": str(tmp_path / "loop")} | changes)


HOSTILE = pair(head="import os\nos.system('touch hacked')")
ANSWERS = [HOSTILE, pair(reward="3.0"), pair(reward="7.0"), "Seven was better.", pair(reward="5.0"),
           pair(reward="6.0")]


def said(server, number: int) -> str:  # noqa: F811
    return server.requests[number]["messages"][-1]["content"]


def test_a_model_is_told_and_asked_again(server, bench, tmp_path, capsys):  # noqa: F811
    server.script = list(ANSWERS)
    out = lesr.run(flags(server, tmp_path))
    assert len(server.requests) == 6 and len(bench) == 4
    assert said(server, 0) == said(server, 2) == lesr.first_question("Hopper-v4", HOPPER)
    assert "import of os is not allowed" in said(server, 1)
    analysis = server.requests[3]["messages"]  # the question, the best answer, what was measured
    assert [m["role"] for m in analysis] == ["user", "assistant", "user"] and analysis[1]["content"] == ANSWERS[2]
    assert "Return: 3.00" in said(server, 3) and "Return: 7.00" in said(server, 3)
    assert "s[10] 1.00" in said(server, 3) and "Write no code" in said(server, 3)
    asked, = server.requests[4]["messages"]  # a conversation of its own
    for text in (said(server, 0), "return 3.0", "return 7.0", "Return: 7.00", "Seven was better."):
        assert text in asked["content"]
    summary = (out / "summary.md").read_text()
    assert "| 1 | 2 | 7.00 | 1 | iteration-1/candidate-2.py, the best |" in summary  # not of the last iteration
    assert "Written by: My/Model." in summary and "Seven was better." in summary
    assert (out / "best.py").read_text() == (out / "iteration-1" / "candidate-2.py").read_text()
    assert "Return: 6.00" in (out / "iteration-2" / "feedback.md").read_text()
    final, = tomllib.loads((out / "final.toml").read_text())["cell"]
    assert final["seeds"] == [1, 2, 3, 4, 5]
    assert re.search(r"loop/best-\w{8}\.py --total-timesteps 1000000", final["flags"])
    kept = json.loads((out / "iteration-1" / "candidate-1.json").read_text())
    assert kept["source"] == "api" and kept["model"] == "My/Model"
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "--features llm:" in capsys.readouterr().out

    again = lesr.run(flags(server, tmp_path, mode="replay", base_url="", out=str(tmp_path / "again")))
    assert len(server.requests) == 6  # the recordings alone give the same loop
    assert (again / "summary.md").read_text() == summary
    server.script += ["Six is not seven.", *ANSWERS[4:]]
    more = lesr.run(flags(server, tmp_path, iterations=3))
    assert len(server.requests) == 9 and said(server, 7).count("Seven was better.") == 1
    assert "| 3 | 2 | 6.00 |" in (more / "summary.md").read_text()
    assert tomllib.loads((more / "final.toml").read_text())["cell"] == [final]  # the best is the same
    server.script += ["Five.", *[pair(reward="8.0")] * 2]
    lesr.run(flags(server, tmp_path, iterations=4))
    assert tomllib.loads((more / "final.toml").read_text())["cell"] != [final]  # so its runs are others


@pytest.mark.parametrize("mode", ["record", "off"])
def test_asking_goes_on_where_it_stopped(server, bench, tmp_path, mode, capsys):  # noqa: F811
    refusal = (404, {}, "no such model today")
    server.script = [ANSWERS[1], refusal, ANSWERS[2], refusal, *ANSWERS[3:5], refusal, ANSWERS[5]]
    for done, count, most in ((0, 2, "at most 49 calls"), (2, 1, "at most 49 calls"), (2, 1, "out")):
        with pytest.raises(UserError, match="no such model today") as error:
            lesr.run(flags(server, tmp_path, mode=mode))
        assert "\n" not in str(error.value) and len(bench) == done
        line = capsys.readouterr().err.splitlines()[0]  # of the pairs that are missing; the third time, of an analysis
        assert line.startswith(f"{count} questions, {count} calls") and most in line
    lesr.run(flags(server, tmp_path, mode=mode))
    assert len(server.requests) == 8 and len(bench) == 4  # every answer was asked for once


def test_recordings_in_the_folder_of_the_loop(server, bench, tmp_path):  # noqa: F811
    """It can be used again after a run without an answer, and after one whose only answer could not be used."""
    refusal = (404, {}, "no such model today")
    server.script = [refusal, ANSWERS[0], refusal, *ANSWERS[1:]]
    args = flags(server, tmp_path, recordings=str(tmp_path / "loop" / "said.jsonl"))
    for left in ([], ["said.jsonl"]):
        with pytest.raises(UserError, match="no such model today"):
            lesr.run(args)
        assert [path.name for path in (tmp_path / "loop").glob("*")] == left
    lesr.run(args)
    assert len(server.requests) == 8 and len(bench) == 4


def test_answers_that_cannot_be_used_are_asked_for_anew_up_to_a_number(server, bench, tmp_path, capsys):  # noqa: F811
    server.script = [HOSTILE] * 3 + ANSWERS[1:3] + ["sorry"] * 99
    with pytest.raises(UserError, match="too few pairs that can be used in 49 answers") as error:
        lesr.run(flags(server, tmp_path, candidates=3))
    assert "\n" not in str(error.value) and len(server.requests) == 49 and bench == []
    sizes = [len(request["messages"]) for request in server.requests[:8]]
    assert sizes == [1, 3, 5, 1, 1, 1, 3, 5]  # two repairs, then from the start
    assert "candidate 1 is asked for anew: My/Model gave no usable answer" in capsys.readouterr().out


def test_a_training_that_fails_is_told(server, bench, tmp_path):  # noqa: F811
    server.script = [pair(reward="13.0"), pair(reward="-4.0"), *ANSWERS[3:]]
    out = lesr.run(flags(server, tmp_path))
    assert "Training failed: error: features fail in revise_state" in said(server, 2)
    assert "of the state: not known" in said(server, 2)
    assert server.requests[2]["messages"][1]["content"] == server.script[1]  # the other one is the best
    assert "| 1 | 1 | failed: error: features fail in revise_state | 0 |" in (out / "summary.md").read_text()


def test_pairs_of_ones_own(bench, tmp_path):
    """No model is asked; the question and the feedback are files to give to one."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for name, worth in (("a", 2.0), ("b", 9.0), ("c", 4.0)):
        (mine / f"{name}.py").write_text(sandbox.code_in(pair(reward=str(worth)), lesr.FUNCTIONS))
    args = lesr.Args(candidates_dir=str(mine), total_timesteps=1000, out=str(tmp_path / "loop"))
    out = lesr.run(args)
    assert (out / "best.py").read_text() == (mine / "b.py").read_text() and len(bench) == 3
    assert "Return: 4.00" in (out / "iteration-1" / "feedback.md").read_text()
    assert (out / "iteration-1" / "question.md").read_text() == lesr.first_question("Hopper-v4", HOPPER)
    assert f"Written by: you ({mine})." in (out / "summary.md").read_text()
    (mine / "c.py").write_text((mine / "b.py").read_text())
    with pytest.raises(UserError, match="has changed since"):
        lesr.run(args)
    (mine / "c.py").write_text("import os\n")
    with pytest.raises(UserError, match="c.py: the reply has no|import of os"):
        lesr.run(args)


@pytest.mark.parametrize("words, reason", [
    (["--env", "Walker2d-v4"], "record it with --mode record --model NAME --base-url URL"),
    (["--candidates", "3"], "not recorded for model handwritten"), (["--env", "Swimmer-v4"], "has no description"),
    (["--env", "Hopper-v4:frame_stack=2"], "leave out what stands behind the id"),
    (["--candidates", "0"], "--candidates is 0"), (["--repairs", "-1"], "--repairs is -1"),
    (["--flags=--run-dir 'x"], "a quote that is not closed"), (["--candidates-dir", "nowhere"], "has no .py file"),
    (["--mode", "record"], "name its model")])
def test_command_fails_in_one_line(words, reason, bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lesr", *words, "--out", str(tmp_path / "loop")])
    with pytest.raises(SystemExit) as ended:
        client.command(lesr.run, lesr.Args, lesr.__doc__)
    line, = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and reason in line
    assert not (tmp_path / "loop").exists() and bench == []


def test_a_folder_keeps_to_its_loop(bench, tmp_path):
    args = dict(iterations=1, total_timesteps=1000, out=str(tmp_path / "loop"))
    lesr.run(lesr.Args(**args))
    with pytest.raises(UserError, match="has a loop with --total-timesteps 1000, not 2000"):
        lesr.run(lesr.Args(**args | dict(total_timesteps=2000)))
    (tmp_path / "loop" / "loop.json").unlink()
    with pytest.raises(UserError, match="is not empty, and no loop"):
        lesr.run(lesr.Args(**args))


# ---- the loop as it is ---------------------------------------------------------------------------------------------


def test_what_ships_was_written_and_read_by_a_person(bench, tmp_path):
    """Two iterations from the recordings, whatever is measured; they hold no number of it."""
    out = lesr.run(lesr.Args(total_timesteps=1000, out=str(tmp_path / "loop")))
    assert len(bench) == 4
    for file in bench:
        about = json.loads(file.with_suffix(".json").read_text())
        assert about["source"] == about["model"] == "handwritten" and about["sha256"] in sandbox.reviewed()
    summary = (out / "summary.md").read_text()
    assert "a person (handwritten recordings); no model was asked" in summary and summary.count("\nReturn: ") == 4
    asked = (out / "iteration-2" / "question.md").read_text()
    assert "No number was at hand" in asked and asked.count("(measured)") == 6 and "Return: " not in asked


@pytest.mark.slow
def test_a_loop_is_stopped_and_goes_on(tmp_path):
    """Two trainings of Hopper from the recordings that ship, without a key; stopped after the first, or in the second.
    """
    few = "--learning-starts 200 --hidden 8x1 --batch-size 16 --no-compile --eval-episodes 1 --checkpoint-every 100"
    command = [sys.executable, "-m", "llm.lesr", "--iterations", "1", "--total-timesteps", "300", "--eval-every", "300",
               f"--flags={few}", "--out", tmp_path / "loop"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "loop").rglob("seed1.json")):
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert "stopped; the same command goes on" in first.communicate()[1] and first.returncode == 128 + signal.SIGTERM
    done, = (tmp_path / "loop").rglob("seed1.json")
    assert not (tmp_path / "loop" / "summary.md").exists()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0 and second.stderr == "" and "2 cells, 1 finished already" in second.stdout
    assert done.with_suffix(".log").read_text().count("$ ") == 1  # what was trained is not trained again
    curves = list((tmp_path / "loop" / "bench").rglob("eval.csv"))
    assert len(curves) == 2
    assert all([row["step"] for row in csv.DictReader(curve.open())] == ["0", "300"] for curve in curves)
    summary = (tmp_path / "loop" / "summary.md").read_text()
    assert len(re.findall(r"^\| 1 \| [12] \| \d+\.\d\d \| 5 \| iteration", summary, re.M)) == 2
    assert len(re.findall(r"^Lipschitz constants, of the features: s\[11\] \d+\.\d\d", summary, re.M)) == 2
    features = load_features(f"llm:{tmp_path / 'loop' / 'best.py'}", "Hopper-v4", torch.zeros(1, 11))
    assert features.revise(torch.zeros(1, 11)).shape == (1, 16)
