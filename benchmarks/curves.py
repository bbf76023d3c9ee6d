"""Evaluation curves: gathered from run folders into benchmarks/results/<algo>/<env>.csv, for `make report`.

    python benchmarks/curves.py gather runs/sac_kian/FetchPush-v2     # adds or replaces the rows of all runs in there,
                                                                      # but never a longer run by a shorter one
    python benchmarks/curves.py gather --into stream_barrier RUN...   # several scripts side by side, under this name
    python benchmarks/curves.py gather --unfinished RUN...            # also runs that have not come to their end

A variant is named by its script, and by what its settings in `config.json` differ in from the script's defaults
of today: first the encoder behind the id, then the knowledge, then other flags. A peer's `config.json` names its
variant, and the algorithm that it stands beside.
"""
import argparse
import ast
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ["variant", "seed", "step", "wall_s", "episodes", "return_mean", "return_std", "success_rate", "length_mean",
           "online_return", "total_timesteps", "commit", "cpu"]
# arguments that name a run, not a variant
RUN = {"env", "seed", "total_timesteps", "device", "compile", "run_dir", "resume", "evaluate", "eval_every",
       "eval_episodes", "checkpoint_every", "video", "track"}


def split_view(env: str) -> tuple[str, str]:
    """An id, and what stands behind it, an encoder: `MobileRobot-v0:pca` -> `MobileRobot-v0`, `pca`."""
    match = re.fullmatch(r"(.+?-v\d+):(.+)", env)
    return (match[1], match[2]) if match else (env, "")


def task_of(args: dict) -> str:
    """What a table of runs with these arguments is named by: the environment, or of offline learners the dataset."""
    env, dataset = split_view(args["env"])[0], Path(args.get("dataset") or "").stem
    if not dataset:
        return env
    return dataset if dataset.startswith(env) else f"{env}-{dataset}"


def real_id(env: str) -> str:
    """The id of the task that runs under `env`: older ids of Fetch are -v4 in gymnasium-robotics 1.4.2, with which all
    committed curves were made."""
    return re.sub(r"^(Fetch\w+)-v[0-3]\b", r"\1-v4", env)


def file_of(algo: str, env: str) -> Path:
    """The results of an environment, where they are or would be. The file may bear an older id."""
    name = real_id(env).replace("/", "-")
    there = [path for path in sorted((RESULTS / algo).glob("*.csv")) if real_id(path.stem) == name]
    return there[0] if there else RESULTS / algo / f"{name}.csv"


def arguments(source: ast.Module) -> dict[str, ast.expr]:
    """Arguments of a script, {name: default}, from its source: this folder runs commands and imports nothing of ours."""
    return {field.target.id: field.value for node in source.body
            if isinstance(node, ast.ClassDef) and node.name == "Args"
            for field in node.body if isinstance(field, ast.AnnAssign)}


def defaults(algo: str, env: str = "") -> dict:
    """Defaults of `algos/<algo>.py`, for `env` where the script has PRESETS.

    Raises ValueError, a one-line message, for a default that has to be computed.
    """
    source = ast.parse((RESULTS.parents[1] / "algos" / f"{algo}.py").read_text())
    presets, found = {"": {}}, {}
    for node in source.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PRESETS":
            presets = ast.literal_eval(node.value)
    for name, value in arguments(source).items():
        try:
            found[name] = ast.literal_eval(value)
        except ValueError as error:
            raise ValueError(f"algos/{algo}.py: the default of {name} is computed; write it as it is") from error
    return found | presets[""] | presets.get(split_view(env)[0].rpartition(":")[2].split("-v")[0], {})


def variant(config: dict) -> str:
    """Name of a run's settings: `sac_kian`, `sac_kian fetch.official`, `sac_kian --cosine-scale 0.0`, ..."""
    if "variant" in config:  # a peer names itself
        return config["variant"]
    args, usual = config["args"], defaults(config["algo"], config["args"].get("env", ""))
    words = [word for word in (config["algo"], split_view(args.get("env", ""))[1]) if word]
    if args.get("knowledge") != usual.get("knowledge"):
        words.append(args["knowledge"])
    changed = {k: v for k, v in args.items() if k not in RUN | {"knowledge", "dataset"} and v != usual.get(k)}
    if "init_from" in changed:
        changed["init_from"] = origin(Path(changed["init_from"]))
    return " ".join([*words, *(flag(k.replace("_", "-"), v) for k, v in sorted(changed.items()))])


def origin(folder: Path) -> str:
    """What a run that another one came from is called: by its folder, whose name tells more than its path, or where
    that is the seed's, as in a benchmark, by environment and variant."""
    if folder.name.startswith("seed") and (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        return f"{config['args']['env']}:{variant(config).replace(' ', ',')}"
    return folder.name


def flag(name: str, value: object) -> str:
    return f"--{name} {value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no-{name}"


def add_online_returns(curve: list[dict[str, str]], scalars: Path) -> None:
    """Give evaluations `online_return`: the mean of what was logged as `return` of training since the one before."""
    rows = load(scalars) if scalars.is_file() else []  # a peer has none
    logged = [(int(row["step"]), float(row["value"])) for row in rows if row["name"] == "return"]
    known = next((step for step, value in logged if value == value), 0)  # NaN before: no episode; after: it diverged
    before = 0
    for row in curve:
        found = [value for step, value in logged if before < step <= int(row["step"]) and step >= known]
        row["online_return"] = f"{sum(found) / len(found):.6g}" if found else ""
        before = int(row["step"])


def run_config(folder: Path) -> dict:
    """config.json of a run, ours or a peer's. Raises ValueError, one line, for one that is neither."""
    try:
        config = json.loads((folder / "config.json").read_text())
        known = isinstance(config["algo"], str) and {"env", "seed", "total_timesteps"} <= config["args"].keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise ValueError(f"{folder}/config.json is not that of a run; name folders that hold runs alone")
    return config


def gather(folders: list[str], into: str = "", unfinished: bool = False) -> None:
    """Add the curves of all runs in these folders to the CSVs, of their scripts or of `into`: that of eval.csv to
    <env>.csv, that of eval-extreme.csv, where there is one, to <env>-extreme.csv. A run that is there already is
    replaced, unless it is the longer one. Runs that have not come to their end are skipped, because a table goes no
    further than its shortest run, unless `unfinished` asks for them.

    Raises ValueError, before anything is written, for a folder without runs, for one of smoke runs, for a config.json of
    something else, and for a name that leads elsewhere."""
    if not re.fullmatch(r"[\w-]*", into):
        raise ValueError(f"--into takes a name in benchmarks/results, as stream_barrier, not {into!r}")
    runs = [(folder, sorted(path.parent for path in Path(folder).rglob("config.json"))) for folder in folders]
    for folder, found in runs:
        if not found:
            raise ValueError(f"{folder} holds no run; name a run folder, or one above it")
        if any("smoke" in run.resolve().parts for run in found):
            raise ValueError(f"{folder} holds smoke runs, which are too short for a table")
    touched, seen = {}, {}  # {(file, variant): its rows}, {(file, variant, seed): folder}
    files = [file for _, found in runs for run in found for file in (run / "eval.csv", *sorted(run.glob("eval-*.csv")))]
    configs = {file.parent: run_config(file.parent) for file in files if file.is_file()}
    for file in files:
        folder, part = file.parent, file.stem.removeprefix("eval")  # part of the tasks: "", "-extreme"
        if not file.is_file():
            print(f"skipped, not evaluated yet: {folder}")
            continue
        config = configs[folder]
        args = config["args"]
        env = task_of(args)
        if env.startswith("Fetch") and config.get("env_id", real_id(env)) != real_id(env):
            raise ValueError(f"{folder} ran in {config['env_id']}, and the tables have {real_id(env)}")
        path = file_of(into or config["algo"], f"{env}{part}")
        name, seed = variant(config), str(args["seed"])
        if "variant" not in config and (new := sorted(defaults(config["algo"]).keys() - args.keys())):
            print(f"note: {folder} is older than {', '.join(new)}: named as if by default")
        old = load(path) if path.exists() else []
        rows = [row for row in old if (row["variant"], row["seed"]) != (name, seed)]
        replaced = [row for row in old if (row["variant"], row["seed"]) == (name, seed)]
        facts = {"variant": name, "seed": seed, "total_timesteps": args["total_timesteps"]}
        curve = list(csv.DictReader(file.open()))
        if not curve:
            print(f"skipped, not evaluated yet: {folder}")
            continue
        last, total = int(curve[-1]["step"]), args["total_timesteps"]
        if last < total and not unfinished:
            print(f"skipped, unfinished: {folder} has {last} of {total} steps; finish it with --resume, or take it as it "
                  "is with --unfinished")
            continue
        if (other := seen.get((path, name, seed), folder)) != folder:
            print(f"note: {other} and {folder} have the same settings and seed; the longer counts, or the later")
        seen[path, name, seed] = folder
        if (there := max((int(row["step"]) for row in replaced), default=0)) > last:
            print(f"kept, longer: {name}, seed {seed} of {path.name} has {there} steps, {folder} {last}; to replace "
                  "it, delete its rows")
            continue
        if not part:
            add_online_returns(curve, folder / "scalars.csv")
        for row in curve:  # by the code and on the machine of the last start before it
            start = next((r for r in reversed(config.get("resumed", [])) if r["step"] < int(row["step"])), config)
            rows.append(facts | row | {"commit": start.get("commit"), "cpu": start.get("cpu")})
        rows.sort(key=lambda row: (row["variant"], int(row["seed"]), int(row["step"])))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, COLUMNS, rows)
        print(f"{path.relative_to(RESULTS.parents[1])}: {name}, seed {seed}"
              + (f"; unfinished, {last} of {total} steps" if last < total else "")
              + (f"; replaces a run of {said(replaced, 'commit')}" if replaced else ""))
        touched[path.name, name] = [row for row in rows if row["variant"] == name]
    for (file, name), rows in touched.items():
        for column in ("commit", "total_timesteps"):  # perhaps another method, or epsilon planned over another total
            if "," in (found := said(rows, column)):
                print(f"note: rows of {name} in {file} differ in {column}: {found}")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on another path, and rename that to `path`: the old file stays until the new one is whole."""
    half = path.with_name(f"half-{path.name}")  # with the ending of `path`, which matplotlib looks at
    write(half)
    half.replace(path)


def write_table(path: Path, columns: list[str], rows: Iterable[dict]) -> None:
    """A CSV file, written whole."""
    def write(half: Path) -> None:
        with half.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    write_whole(path, write)


def said(rows: list[dict], column: str) -> str:
    """What a column holds, each value once."""
    return ", ".join(sorted({str(row[column]) for row in rows}))


def load(path: Path) -> list[dict[str, str]]:
    """All rows of a results CSV."""
    with path.open() as file:
        return list(csv.DictReader(file))


@dataclass
class Curve:
    """One seed of one variant in one environment."""
    seed: int
    steps: list[int] = field(default_factory=list)  # environment steps
    minutes: list[float] = field(default_factory=list)  # wall time of training
    scores: list[float] = field(default_factory=list)  # of each evaluation
    commits: set[str] = field(default_factory=set)  # of the code that made it
    cut: bool = False  # whether it has not come to its end


def load_curves(path: Path, score: str) -> dict[str, list[Curve]]:
    """{variant: its seeds} of a results CSV, both in order; `score` is the column that evaluations are judged by.

    Raises ValueError, a one-line message, where that column is not a number.
    """
    found: dict[tuple[str, int], Curve] = {}
    rows = load(path)
    ends = {(row["variant"], row["seed"]): int(row["step"]) for row in rows}
    for row in rows:
        if row.get(score) == "":  # no episode ended
            continue
        curve = found.setdefault((row["variant"], int(row["seed"])), Curve(int(row["seed"])))
        curve.steps.append(int(row["step"]))
        curve.minutes.append(float(row["wall_s"]) / 60)
        curve.scores.append(float(row[score]))
        curve.commits.add(row.get("commit", ""))
        curve.cut = ends[row["variant"], row["seed"]] < int(row.get("total_timesteps") or 0)
    if all(x != x for curve in found.values() for x in curve.scores):  # some are NaN: a run that diverged
        raise ValueError(f"{path.parent.name}/{path.name} has no {score}; name another score in benchmarks/paper.toml")
    return {name: [found[key] for key in sorted(found) if key[0] == name] for name in sorted({n for n, _ in found})}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gather"])
    parser.add_argument("folders", nargs="+", metavar="RUN")
    parser.add_argument("--into", default="", metavar="NAME")
    parser.add_argument("--unfinished", action="store_true")
    flags = parser.parse_args()
    try:
        gather(flags.folders, flags.into, flags.unfinished)
    except (ValueError, OSError) as error:
        print(f"curves: {error}", file=sys.stderr)
        sys.exit(2)
