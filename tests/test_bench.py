"""The bench engine: idempotent, honest about failures, able to go on after a stop."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks.run
from benchmarks import curves, rules, verdict
from benchmarks.curves import variant
from benchmarks.run import Args, Cell, load_suite

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--knowledge none --num-envs 2 --hidden 8x1 --batch-size 16 --no-compile --eval-every 1000 --eval-episodes 2 "
         "--her-goals 0 --checkpoint-every 500")


def suite(path: Path, *cells: str) -> Path:
    entries = [f'[[cell]]\nalgo = "sac_kian"\nenvs = ["Pendulum-v1"]\nseeds = [1]\nflags = "{FLAGS} {flags}"\n'
               for flags in cells]
    (path / "suite.toml").write_text("\n".join(entries))
    return path / "suite.toml"


def bench(path: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "benchmarks/run.py", "--suite", str(path), "--root", str(path.parent / "runs"), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "2"})  # of the engine, not of its cells


@pytest.mark.slow
def test_runs_once_and_names_failures(tmp_path):
    """Two cells at once, one with a flag that does not exist. Again: only that one is tried."""
    path = suite(tmp_path, "--total-timesteps 400", "--total-timesteps 400 --knowledge no.such.rule")
    plan = bench(path, "--dry-run")
    assert plan.communicate()[0].count("python algos/sac_kian.py --env Pendulum-v1 --seed 1") == 2
    assert plan.returncode == 0 and not (tmp_path / "runs").exists()
    first = bench(path, "--workers", "2")
    output = first.communicate()[0]
    assert first.returncode == 1 and "1 of 2 cells finished, 1 failed" in output and "nothing committed" in output
    assert "knowledge 'no.such.rule' is unknown" in output  # the failed cell's last lines
    config, = (tmp_path / "runs").glob("*/*/*/seed1/config.json")
    assert json.loads(config.read_text())["threads"] == 1
    again = bench(path)
    output = again.communicate()[0]
    assert again.returncode == 1 and output.count("starts ") == 1 and "1 finished already" in output
    kept = config.with_name("algos-sac_kian.py")
    assert kept.read_text() == (ROOT / "algos" / "sac_kian.py").read_text() and "another version" not in output
    kept.write_text("")
    assert "note: 1 finished with another version of their script" in bench(path, "--dry-run").communicate()[0]
    shutil.rmtree(config.parent)
    output = bench(path).communicate()[0]
    assert output.count("starts ") == 2 and "1 of 2 cells finished, 1 failed" in output  # what was deleted runs again


@pytest.mark.slow
def test_a_stopped_suite_goes_on(tmp_path):
    """SIGTERM reaches the cell, which saves; while one engine runs, a second starts nothing; then the cell resumes."""
    path = suite(tmp_path, "--total-timesteps 6000")
    cell, = load_suite(Args(suite=str(path), root=str(tmp_path / "runs")))
    first = bench(path)
    while not (cell.folder / "checkpoint.pt").is_file():
        assert first.poll() is None
        time.sleep(0.05)
    other = bench(path)
    assert "is running already" in other.communicate()[0] and other.returncode == 1  # not all is finished
    first.send_signal(signal.SIGTERM)
    assert "stopped, the same command goes on" in first.communicate()[0] and first.returncode == 128 + signal.SIGTERM
    assert not cell.finished() and not cell.beside(".json").exists()
    second = bench(path)
    assert "resumes" in second.communicate()[0] and second.returncode == 0
    steps = [int(line.split(",")[0]) for line in (cell.folder / "eval.csv").read_text().splitlines()[1:]]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 6000
    assert json.loads(cell.beside(".json").read_text())["returncode"] == 0


FAKE = """
import json, os, signal, sys, time
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder, how = Path(words.get("--resume") or words["--run-dir"]), words.get("--how", "well")
if "--resume" in words:
    json.loads((folder / "config.json").read_text())
if how == "garbled":
    sys.stdout.buffer.write(b"\\xff\\n")
    sys.exit(3)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("hangs", flush=True)
    time.sleep(600)
if how != "nothing":
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"args": {"total_timesteps": 100}}')
    (folder / "eval.csv").write_text("step\\n0\\n100\\n")
"""


def fake_suite(path: Path, **cells: int) -> Path:
    """A suite of a script that writes a run folder in no time, or fails, {how: how many cells}."""
    (path / "algos").mkdir()
    (path / "algos" / "fake.py").write_text(FAKE)
    (path / "suite.toml").write_text("\n".join(
        f'[[cell]]\nalgo = "fake"\nenvs = ["Line-v0"]\nseeds = {[*range(1, count + 1)]}\nflags = "--how {how}"\n'
        for how, count in cells.items()))
    return path / "suite.toml"


def test_bad_cells_stop_no_others(tmp_path, monkeypatch, capsys):
    """Six cells fail in six ways and are named; the other six finish, though files of four are damaged."""
    path = fake_suite(tmp_path, well=6, garbled=1, killed=1, hangs=1, nothing=1, locked=1, resumed=1)
    monkeypatch.setattr(benchmarks.run, "ROOT", tmp_path)
    monkeypatch.setattr(benchmarks.run, "GRACE", 0)
    args = Args(suite=str(path), root=str(tmp_path / "runs"), workers=2, timeout=0.05)
    cells = {(cell.flags[1], cell.seed): cell for cell in load_suite(args)}

    def left_behind(cell: Cell, config: str, curve: str, step: int = 0) -> None:
        cell.folder.mkdir(parents=True)
        (cell.folder / "config.json").write_text(config)
        (cell.folder / "eval.csv").write_text(curve)
        if step:
            torch.save({"step": step}, cell.folder / "checkpoint.pt")
    config, curve = '{"args": {"total_timesteps": 100}}', "step\n0\n100\n"
    left_behind(cells["well", 2], config, "step\n0\n\0\0\n", 50)  # as a power cut leaves it
    left_behind(cells["well", 3], "", curve)
    left_behind(cells["well", 4], config, curve, 50)  # killed between the last row and the last save
    left_behind(cells["well", 5], config, curve, 100)  # the engine was killed
    cells["well", 5].beside(".json").write_text("")
    left_behind(cells["resumed", 1], "", curve, 50)
    cells["locked", 1].beside(".log").mkdir(parents=True)  # an OSError
    assert benchmarks.run.main(args) == 1
    said = capsys.readouterr().out
    assert "12 cells, 1 finished already" in said and said.endswith("6 of 12 cells finished, 6 failed\n")
    assert {how for (how, _), cell in cells.items() if cell.finished()} == {"well"}
    ends = {"garbled": "3", "killed": "-9", "hangs": "-9", "nothing": "0, and left no run", "locked": "1",
            "resumed": "1"}
    for how, code in ends.items():
        assert f"\n{cells[how, 1].name} failed ({code}); {cells[how, 1].beside('.log')} ends:" in said
        assert f"FAILED   {cells[how, 1].name} (" in said
    assert "Is a directory" in said and "\n  \ufffd\n" in said and said.count("resumes ") == 3


def test_a_second_signal_kills_a_cell_that_hangs(tmp_path):
    """But not one that comes at once: under make, a signal to the process group comes twice."""
    path = fake_suite(tmp_path, hangs=2)
    code = (f"import sys; from pathlib import Path; import benchmarks.run as run; run.ROOT = Path({str(tmp_path)!r}); "
            "run.ECHO = 1; "
            f"sys.exit(run.main(run.Args(suite={str(path)!r}, root={str(tmp_path / 'runs')!r})))")
    engine = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not any("\nhangs" in log.read_text() for log in (tmp_path / "runs").rglob("seed1.log")):
        assert engine.poll() is None
        time.sleep(0.02)
    for _ in range(2):
        engine.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    with pytest.raises(subprocess.TimeoutExpired):
        engine.wait(1.5)
    engine.send_signal(signal.SIGTERM)
    assert "0 of 2 cells finished; stopped, the same command goes on" in engine.communicate()[0]
    assert engine.returncode == 128 + signal.SIGTERM


def test_a_folder_is_a_function_of_the_cell():
    cell = Cell("sac_kian", "FetchPush-v2", 1, ("--actor", "plain"), Path("runs"))
    others = [Cell("sac_kian", "FetchPush-v2", 2, ("--actor", "plain"), Path("runs")),
              Cell("sac_kian", "FetchReach-v2", 1, ("--actor", "plain"), Path("runs")),
              Cell("sac_kian", "FetchPush-v2", 1, ("--actor", "kian"), Path("runs")),
              Cell("sac_kian", "FetchPush-v2", 1, ("--hidden", "x" * 80 + "1"), Path("runs")),
              Cell("sac_kian", "FetchPush-v2", 1, ("--hidden", "x" * 80 + "2"), Path("runs"))]
    assert cell.folder == Path("runs/sac_kian/FetchPush-v2/actor-plain-" + cell.folder.parent.name[-8:] + "/seed1")
    assert len({c.folder for c in [cell, *others]}) == 6
    assert replace(cell, env="Line-v0:run:../../x").folder.is_relative_to("runs/sac_kian/Line-v0:run:..-..-x")


@pytest.mark.parametrize("name", [p.stem for p in (ROOT / "benchmarks" / "suites").glob("*.toml")])
def test_shipped_suites_are_valid(name):
    """Every flag of every cell is one that the script has, with a value that it takes."""
    import importlib

    import tyro

    commands = {(cell.algo, cell.env, cell.flags): cell for cell in load_suite(Args(suite=name))}  # one seed of each
    for cell in commands.values():
        tyro.cli(importlib.import_module(f"algos.{cell.algo}").Args, args=cell.fresh)


def test_every_quick_cell_has_a_committed_curve_to_be_compared_with():
    """By the name of its settings, and one that comes as far as the cell does."""
    import importlib
    from dataclasses import asdict

    import tyro

    for cell in load_suite(Args(suite="quick")):
        args = asdict(tyro.cli(importlib.import_module(f"algos.{cell.algo}").Args, args=cell.fresh))
        args = {k: v for k, v in args.items() if v is not None}  # of PRESETS
        config = {"algo": cell.algo, "args": args}
        method, rows = verdict.committed(curves.task_of(args), variant(config), curves.RESULTS)
        assert rows and max(int(row["step"]) for row in rows) >= args["total_timesteps"], cell.name


def test_a_fresh_run_is_judged_by_the_range_of_the_committed_seeds(tmp_path):
    """At the step that it has reached, by the score of the method, returns where nothing else is known."""
    (tmp_path / "results" / "mine").mkdir(parents=True)
    (tmp_path / "paper.toml").write_text('[method.mine]\nscore = "success_rate"\n')
    rows = [("sac", seed, step, score, -9) for seed, step, score in (
        (1, 0, 0), (1, 100, 0.5), (1, 200, 0.9), (2, 100, 0.7), (2, 200, 1), (3, 100, 0.1))] + [
        ("sac --gamma 0.9", 1, 100, "nan", -5.0)]
    (tmp_path / "results" / "mine" / "Pendulum-v1.csv").write_text("\n".join(
        ["variant,seed,step,success_rate,return_mean", *(",".join(map(str, row)) for row in rows)]))

    def judged(step, success, value=-9.0, gamma=0.95):
        (tmp_path / "config.json").write_text(json.dumps({"algo": "sac", "args": {"env": "Pendulum-v1", "seed": 1,
                                                                                  "gamma": gamma}}))
        (tmp_path / "eval.csv").write_text(f"step,success_rate,return_mean\n0,0,0\n{step},{success},{value}\n")
        return verdict.verdict(tmp_path, tmp_path / "results")[2:]
    assert judged(100, 0.6) == ["100", "success 0.6", "0.1 to 0.7 (3 seeds)", "inside"]
    assert judged(150, 0.7)[2:] == ["0.5 to 0.7 (2 seeds)", "inside"]  # of those that came as far
    assert judged(200, 0.8)[2:] == ["0.9 to 1 (2 seeds)", "below"] and judged(100, 0.8)[3] == "above"
    assert judged(300, 1)[2:] == ["", "nothing committed"] == judged(100, 1, gamma=0.5)[2:]
    assert judged(100, "nan", -4, 0.9) == ["100", "return -4", "-5 (one seed)", "above, of one seed"]
    assert verdict.table([tmp_path]).splitlines()[1].startswith("sac --gamma 0.9  Pendulum-v1")
    shutil.copy(tmp_path / "results/mine/Pendulum-v1.csv", tmp_path / "results/mine/FetchPush-v2.csv")
    for env, found in (("FetchPush-v2", "mine"), ("FetchPush-v4", "mine"), ("FetchPush-v5", ""), ("FetchSlide-v4", "")):
        assert verdict.committed(env, "sac", tmp_path / "results")[0] == found  # -v2 is the older name of -v4


def test_a_cross_is_every_combination(tmp_path):
    (tmp_path / "cross.toml").write_text("""[[cell]]
        algo = "ppo"
        envs = ["CartPole-v1"]
        seeds = [1]
        cross = {clip = [0.1, "0.2"], bootstrap = [true, false]}
        flags = "--epochs 2"
        """)
    cells = load_suite(Args(suite=str(tmp_path / "cross.toml")))
    assert [cell.flags for cell in cells] == [
        ("--epochs", "2", "--clip", "0.1", "--bootstrap"), ("--epochs", "2", "--clip", "0.1", "--no-bootstrap"),
        ("--epochs", "2", "--clip", "0.2", "--bootstrap"), ("--epochs", "2", "--clip", "0.2", "--no-bootstrap")]
    assert len({cell.folder for cell in cells}) == 4


def test_errors_are_one_line(tmp_path):
    cell, suites = "[[cell]]\nalgo = 'sac_kian'\n", []
    for i, rest in enumerate(["", "envs = 'FetchPush-v2'\nseeds = [1]\n",
                              "envs = ['x']\nseeds = [1]\nflag = '--seed 2'\n",
                              "envs = ['x']\nseeds = [1]\nflags = ['--seed', '2']\n",
                              "envs = ['x']\nseeds = [1]\ncross = {clip = 1}\n",
                              "envs = ['x']\nseeds = [1]\ncross = {clip = []}\n",
                              "envs = ['x']\nseeds = [1]\nflags = '--clip=1'\ncross = {clip = [1]}\n",
                              "envs = ['x']\nseeds = [1]\nflags = '--num-envs 1'\ncross = {num_envs = [1]}\n",
                              "envs = ['x']\nseeds = [1]\ncross = {seed = [1, 2]}\n",
                              "envs = ['x']\nseeds = [1.0]\n", "envs = ['x']\nseeds = [1]\nflags = '\"'\n"]):
        (tmp_path / f"bad{i}.toml").write_text(cell + rest)
        suites.append((["--suite", str(tmp_path / f"bad{i}.toml")], "is no suite"))
    for flag in ("--gama", "--no-gama", "--gama=1"):
        file = tmp_path / f"bad{len(suites)}.toml"
        file.write_text(f"{cell}envs = ['x']\nseeds = [1]\nflags = '--no-compile --her-goals 0 {flag}'\n")
        suites.append((["--suite", str(file)], f"has no flag {flag}"))
    (tmp_path / "one.toml").write_text("[cell]\nalgo = 'sac_kian'\n")
    suites.append((["--suite", str(tmp_path / "one.toml")], "is no suite"))
    for flags, said in (*suites, (["--suite", "smoek"], "known are"),
                        (["--suite", "smoke", "--algo", "x"], "no cell"), (["--workers", "0"], "at least 1"),
                        (["--gpus", "1"], "needs --backend ray"),
                        (["--backend", "ray", "--gpus", "1.5"], "a share")):
        done = subprocess.run([sys.executable, "benchmarks/run.py", *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_rules_are_measured_before_any_learning(tmp_path):
    """Turns go to the last rule that moves, fingers aside; a repeated measurement replaces its rows."""
    who = rules.contenders(["a", "b", "c"], 4)
    advice = torch.zeros(3, 3, 4)
    advice[0, 1, 2] = advice[1, 0, 0] = advice[1, 2, 1] = 1.0
    advice[:, :, 3] = torch.tensor([0.1, 0.2, 0.3])
    assert who["the last that moves, else the first"](advice)[:, 3].tolist() == pytest.approx([0.2, 0.3, 0.1])
    assert who["b"](advice)[:, 3].tolist() == pytest.approx([0.2] * 3)
    torch.manual_seed(0)
    drawn = who["one drawn per step"](advice[:1].expand(3000, -1, -1))[:, 3]
    assert [(drawn == x).float().mean().item() for x in advice[0, :, 3]] == pytest.approx([1 / 3] * 3, abs=0.03)
    command = [sys.executable, "benchmarks/rules.py", "--env", "FetchReach-v2", "--episodes", "4", "--csv",
               str(tmp_path / "rules.csv")]
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = list(csv.DictReader((tmp_path / "rules.csv").open()))
    assert [(row["who"], row["episodes"]) for row in found] == [("fetch.move_to_goal", "4"), ("uniform actions", "4"),
                                                               ("doing nothing", "4")]
    assert found[0]["success_rate"] == "1" and float(found[1]["return_mean"]) < float(found[0]["return_mean"])
    wrong = subprocess.run([*command[:3], "CartPole-v1"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "no default rules ship for" in wrong.stderr and len(wrong.stderr.splitlines()) == 1
    (tmp_path / "rules.csv").write_text("somebody's\n")
    wrong = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 2 and "rules.csv is not a table of this command" in wrong.stderr
    assert (tmp_path / "rules.csv").read_text() == "somebody's\n"


def test_discrete_rules_are_measured_by_their_advice(tmp_path):
    who = rules.discrete_contenders(["a", "b"])
    advice = torch.tensor([[[1., 0, 0], [1, 1, 0]]])
    expected = {"a": [1, 0, 0], "b": [.5, .5, 0], "mix": [.75, .25, 0], "rule": [.66524, .24473, .09003]}  # of 2, 1, 0
    for name, p in expected.items():
        assert torch.softmax(who[name](advice), -1)[0].tolist() == pytest.approx(p, abs=1e-4)
    assert torch.softmax(who["a"](torch.zeros(1, 2, 3)), -1)[0].tolist() == pytest.approx([1 / 3] * 3)
    torch.manual_seed(0)
    drawn = rules.draw(who["mix"](advice).expand(3000, -1))
    assert (drawn == 0).float().mean().item() == pytest.approx(0.75, abs=0.03)
    command = [sys.executable, "benchmarks/rules.py", "--env", "MiniGrid-Empty-5x5-v0", "--episodes", "2"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["minigrid.go_to_goal", "uniform", "mix", "rule"]
