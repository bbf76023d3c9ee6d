"""Search hyper-parameters of a script with Optuna: make tune ALGO=sac_kian ENV=FetchPush-v2 TRIALS=20

Ranges stand in the script: `TUNE`, below its `Args`. A trial calls `main(args)` and scores the area under its curve of
evaluation returns, so that fast learning counts. Trials are kept in runs/tune/<algo>/<env>/, those with other flags
beside it: the same command goes on. A trial that diverges has failed, and the search goes on, unless no trial before it
came to its end.
Flags that are not listed here go to the script: python benchmarks/tune.py --env FetchPush-v2 --total-timesteps 50000
"""
import csv
import hashlib
import importlib
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import stats
from errors import UserError


@dataclass
class Args:
    """Search hyper-parameters; other flags go to the script."""
    algo: str = "sac_kian"  # script in algos/
    env: str = ""  # environment id; empty: the script's own
    trials: int = 20  # to run now, beside those that are there
    seed: int = 1  # of the sampler; trial k trains with seed `seed + k`
    root: str = "runs/tune"  # above all trials


def sample(trial, ranges: dict) -> dict:
    """One value per range: (low, high) on a log scale, or one of a list."""
    return {name: trial.suggest_categorical(name, r) if isinstance(r, list) else trial.suggest_float(name, *r, log=True)
            for name, r in ranges.items()}


def score(folder: Path) -> float:
    """Mean height of a run's curve of evaluation returns."""
    rows = list(csv.DictReader((folder / "eval.csv").open()))
    return stats.area_under_curve([int(row["step"]) for row in rows], [float(row["return_mean"]) for row in rows])


def as_flags(params: dict) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value:.4g}" for name, value in params.items())


def main(args: Args, flags: list[str]) -> None:
    """Raises ValueError, a one-line message, for a script without ranges or a missing package."""
    try:
        import optuna
    except ImportError as error:
        raise ValueError("tuning needs Optuna: pip install optuna==5.0.0") from error
    if args.trials < 1:
        raise ValueError(f"--trials must be at least 1, not {args.trials}")
    try:
        script = importlib.import_module(f"algos.{args.algo}")
        ranges = script.TUNE
    except (ImportError, AttributeError) as error:
        raise ValueError(f"algos/{args.algo}.py is not there, or has no TUNE ({error})") from error
    base = tyro.cli(script.Args, args=[*(["--env", args.env] if args.env else []), *flags])
    digest = f"-{hashlib.sha256(' '.join(flags).encode()).hexdigest()[:8]}" if flags else ""
    folder = Path(args.root, args.algo, (Path(base.env).stem if Path(base.env).is_file() else base.env) + digest)
    folder.mkdir(parents=True, exist_ok=True)

    def objective(trial) -> float:
        run = folder / f"trial{trial.number}"
        try:
            script.main(replace(base, **sample(trial, ranges), seed=args.seed + trial.number, run_dir=str(run)))
        except UserError as error:  # it diverged; before any has succeeded, it is rather the command that is wrong
            if not study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
                raise
            print(f"trial {trial.number}: {error}", flush=True)
            return math.nan  # of which Optuna makes a failed trial
        return score(run)

    def tell(_study, trial) -> None:
        result = "failed" if trial.value is None else f"mean return {trial.value}"
        print(f"trial {trial.number}: {result}: {as_flags(trial.params)}", flush=True)

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # an error is one line, ours
    study = optuna.create_study(storage=f"sqlite:///{folder / 'study.db'}", study_name=args.algo, load_if_exists=True,
                                direction="maximize")
    study.sampler = optuna.samplers.TPESampler(seed=args.seed + len(study.trials))  # going on is not starting again
    study.optimize(objective, args.trials, callbacks=[tell])
    best = study.best_trial
    print(f"best of {len(study.trials)}: trial {best.number}, mean return {best.value:.2f}: {as_flags(best.params)}")


if __name__ == "__main__":
    parsed, rest = tyro.cli(Args, return_unknown_args=True)
    sys.argv = [f"algos/{parsed.algo}.py", *rest]  # the command that a trial names at its end
    try:
        main(parsed, rest)
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        sys.exit(2)
