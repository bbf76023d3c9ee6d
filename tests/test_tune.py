"""make tune: what is sampled is what is trained."""
import json
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from algos import sac_kian
from benchmarks import tune
from errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_sampled_values_reach_the_run(tmp_path, capsys):
    """Two trials of seconds each: every value of the study is in the run's config, and trials differ."""
    flags = ["--knowledge", "none", "--her-goals", "0", "--num-envs", "2", "--hidden", "8x1", "--no-compile",
             "--total-timesteps", "1200", "--eval-every", "600", "--eval-episodes", "2"]
    tune.main(tune.Args(env="Pendulum-v1", trials=1, root=str(tmp_path)), flags)
    tune.main(tune.Args(env="Pendulum-v1", trials=1, root=str(tmp_path)), flags)  # goes on
    folder, = (tmp_path / "sac_kian").iterdir()
    assert folder.name.startswith("Pendulum-v1-")  # trials with other flags are not compared with these
    trials = optuna.load_study(study_name="sac_kian", storage=f"sqlite:///{folder / 'study.db'}").trials
    assert [trial.number for trial in trials] == [0, 1] and trials[0].params != trials[1].params
    for trial in trials:
        config = json.loads((folder / f"trial{trial.number}" / "config.json").read_text())["args"]
        assert set(trial.params) == set(sac_kian.TUNE)
        assert {name: config[name] for name in trial.params} == trial.params
        assert trial.value == tune.score(folder / f"trial{trial.number}") < 0
    assert f"best of 2: trial {max(trials, key=lambda t: t.value).number}," in capsys.readouterr().out


def test_a_trial_that_diverges_has_failed(tmp_path, monkeypatch, capsys):
    """The search goes on. But where the first one fails, the command is wrong, and the search ends."""
    def main(args):
        if args.seed == 2:
            raise UserError("the run has diverged")
        Path(args.run_dir).mkdir()
        Path(args.run_dir, "eval.csv").write_text(f"step,return_mean\n0,{args.seed}\n10,{args.seed}\n")
    monkeypatch.setattr(sac_kian, "main", main)
    tune.main(tune.Args(env="Pendulum-v1", trials=3, root=str(tmp_path / "good")), [])
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": --")[0] for line in said] == [
        "trial 0: mean return 1.0", "trial 1: the run has diverged", "trial 1: failed", "trial 2: mean return 3.0",
        "best of 3: trial 2, mean return 3.00"]
    with pytest.raises(UserError, match="the run has diverged"):
        tune.main(tune.Args(env="Pendulum-v1", seed=2, root=str(tmp_path / "bad")), [])


def test_errors_are_one_line(tmp_path):
    for flags, said in ((["--algo", "nope"], "nope.py is not there"), (["--trials", "0"], "at least 1"),
                        (["--env", "Nope-v1"], "unknown environment id 'Nope-v1'")):
        done = subprocess.run([sys.executable, "benchmarks/tune.py", "--root", str(tmp_path), *flags], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
