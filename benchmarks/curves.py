"""Evaluation curves: gather them from run folders into benchmarks/results/<algo>/<env>.csv, and draw them from there.

    python benchmarks/curves.py gather runs/sac_kian/FetchPush-v2/*     # adds or replaces the rows of these runs
    python benchmarks/curves.py draw docs/figures/push.png FetchPush-v2 # success of every variant: mean, all seeds
    python benchmarks/curves.py table FetchPush-v2                      # steps and minutes to 0.9, last evaluation

A variant is named by what its settings in `config.json` differ in from the script's present defaults: first the actor,
then the knowledge, then other flags. A peer's `config.json` names its variant, and the algorithm it stands beside.
"""
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ["variant", "seed", "step", "wall_s", "episodes", "return_mean", "return_std", "success_rate", "length_mean",
           "total_timesteps", "commit", "cpu"]
# arguments that name a run, not a variant
RUN = {"env", "seed", "total_timesteps", "device", "compile", "run_dir", "resume", "evaluate", "eval_every",
       "eval_episodes", "checkpoint_every", "video", "track", "save_keys"}


def defaults(algo: str) -> dict:
    """Defaults of `algos/<algo>.py`, read from its source: this folder runs commands and imports nothing of ours."""
    import ast

    tree = ast.parse((RESULTS.parents[1] / "algos" / f"{algo}.py").read_text())
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return {a.target.id: ast.literal_eval(a.value) for a in args.body if isinstance(a, ast.AnnAssign)}


def variant(config: dict) -> str:
    """Name of a run's settings: `kian`, `plain`, `kian fetch.official`, `kian --handicap 0.0`, ..."""
    if "variant" in config:  # a peer names itself
        return config["variant"]
    args, usual = config["args"], defaults(config["algo"])
    words = [args["actor"]] if "actor" in args else [config["algo"]]
    if args.get("knowledge", "auto") != "auto" and words != ["plain"]:
        words.append(args["knowledge"])
    ignored = RUN | {"actor", "knowledge"}
    if words == ["plain"]:  # what follows `actor` in Args is about knowledge
        ignored |= set(list(usual)[list(usual).index("actor"):])
    changed = {k: v for k, v in args.items() if k in usual and k not in ignored and v != usual[k]}
    return " ".join([*words, *(f"--{k.replace('_', '-')} {v}" for k, v in sorted(changed.items()))])


def gather(folders: list[str]) -> None:
    """Add the curves of these run folders to the CSVs; a run that is there already is replaced."""
    for folder in map(Path, folders):
        config = json.loads((folder / "config.json").read_text())
        args = config["args"]
        path = RESULTS / config["algo"] / f"{args['env']}.csv"
        name, seed = variant(config), str(args["seed"])
        rows = [row for row in load(path) if (row["variant"], row["seed"]) != (name, seed)] if path.exists() else []
        facts = {"variant": name, "seed": seed, "total_timesteps": args["total_timesteps"],
                 "commit": config.get("commit"), "cpu": config.get("cpu")}
        rows += [facts | row for row in csv.DictReader((folder / "eval.csv").open())]
        rows.sort(key=lambda row: (row["variant"], int(row["seed"]), int(row["step"])))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"{path.relative_to(RESULTS.parents[1])}: {name}, seed {seed}")


def load(path: Path) -> list[dict[str, str]]:
    """All rows of a results CSV."""
    with path.open() as file:
        return list(csv.DictReader(file))


def curves(env: str, algo: str = "sac_kian") -> dict[str, dict[int, list[tuple[int, float, float]]]]:
    """{variant: {seed: [(step, minutes, success rate)]}} of one environment."""
    found = defaultdict(lambda: defaultdict(list))
    for row in load(RESULTS / algo / f"{env}.csv"):
        point = int(row["step"]), float(row["wall_s"]) / 60, float(row["success_rate"])
        found[row["variant"]][int(row["seed"])].append(point)
    return found


def table(env: str) -> None:
    """Print, per variant: seeds, steps and minutes until success first reached 0.9, the last evaluation."""
    print("| variant | seeds | steps to 0.9 | minutes to 0.9 | last success | at step |\n|---|---|---|---|---|---|")
    for name, seeds in sorted(curves(env).items()):
        first = [next(((p[0], p[1]) for p in points if p[2] >= 0.9), None) for points in seeds.values()]
        steps, minutes = (", ".join("never" if f is None else text(f) for f in first)
                          for text in (lambda f: f"{f[0] / 1000:.0f}k", lambda f: f"{f[1]:.1f}"))
        last = ", ".join(f"{points[-1][2]:.2f}" for points in seeds.values())
        until = ", ".join(f"{points[-1][0] / 1000:.0f}k" for points in seeds.values())
        print(f"| {name} | {len(seeds)} | {steps} | {minutes} | {last} | {until} |")


def draw(target: str, *environments: str) -> None:
    """Success over environment steps, one panel per environment: every seed thin, the mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(environments), figsize=(5.2 * len(environments), 3.6), squeeze=False,
                                  constrained_layout=True)
    for panel, env in zip(panels[0], environments):
        for i, (name, seeds) in enumerate(sorted(curves(env).items())):
            color = plt.get_cmap("tab10")(i % 10)
            for points in seeds.values():
                panel.plot([p[0] / 1000 for p in points], [p[2] for p in points], color=color, alpha=0.35, linewidth=0.8)
            steps = min(([p[0] for p in points] for points in seeds.values()), key=len)
            mean = [sum(points[k][2] for points in seeds.values()) / len(seeds) for k in range(len(steps))]
            panel.plot([step / 1000 for step in steps], mean, color=color, linewidth=2.2, label=f"{name} ({len(seeds)})")
        panel.set(title=env, xlabel="environment steps, thousands", ylabel="success rate", ylim=(-0.02, 1.02))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower right")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    commands = {"gather": lambda *a: gather(list(a)), "draw": draw, "table": table}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
