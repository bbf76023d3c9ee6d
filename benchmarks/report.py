"""Tables, figures and one self-contained page, from benchmarks/results/ alone: make report

Rewrites docs/figures/<algo>_curves.svg, whatever stands between `<!-- report: <algo> <env> -->` and `<!-- end -->` in
README.md and docs/, and report.html (not committed): open it in a browser, no server or network needed.
Numbers of the papers come from benchmarks/paper.toml.
"""
import base64
import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import stats
from benchmarks.curves import RESULTS, Curve, load_curves

THRESHOLD = 0.9  # success rate that counts as learned
BUDGETS = (20_000, 50_000, 100_000, 200_000, 400_000)  # environment steps
MARK = re.compile(r"(<!-- report: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.S)


def at(curve: Curve, step: int) -> float:
    """Success at the last evaluation up to `step`; NaN for a curve that ends before."""
    done = [k for k, s in enumerate(curve.steps) if s <= step * 1.01]  # evaluations come up to 31 steps late
    return curve.success[done[-1]] if curve.steps[-1] >= 0.99 * step else float("nan")


def estimate(values: list[float]) -> str:
    """`0.93 [0.88, 0.97]`: mean and 95 % bootstrap interval over seeds; the mean alone of one seed."""
    scores = np.array(values)[:, None]
    low, high = stats.interval(stats.mean, scores)
    return f"{stats.mean(scores):.2f}" + (f" [{low:.2f}, {high:.2f}]" if low == low else "")


def thousands(step: float) -> str:
    return "not reached" if step == float("inf") else f"{step / 1000:.0f}k"


def ends(curves: list[Curve]) -> list[str]:
    """Where these curves end."""
    return [thousands(step) for step in sorted({c.steps[-1] // 1000 * 1000 for c in curves})]


def summarise(variants: dict[str, list[Curve]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table, one row per variant."""
    budgets = [b for b in BUDGETS if any(at(c, b) == at(c, b) for curves in variants.values() for c in curves)]
    head = ["", "seeds", f"steps to {THRESHOLD}, median (each)", "minutes to it, median",
            *(f"success at {b // 1000}k" for b in budgets), "last success", "worst seed", "at step", "code"]
    rows = []
    for name, curves in variants.items():
        first = [stats.first_reach(c.steps, c.success, THRESHOLD) for c in curves]
        minutes = [stats.first_reach(c.minutes, c.success, THRESHOLD) for c in curves]
        budget = [[at(c, b) for c in curves if at(c, b) == at(c, b)] for b in budgets]
        last = [c.success[-1] for c in curves]
        rows.append([name, str(len(curves)), f"{thousands(np.median(first))} ({', '.join(map(thousands, first))})",
                     "not reached" if np.isinf(np.median(minutes)) else f"{np.median(minutes):.1f}",
                     *(estimate(values) if len(values) == len(curves) else "" for values in budget),
                     estimate(last), f"{min(last):.2f}", ", ".join(ends(curves)),
                     ", ".join(sorted({c.commit for c in curves}))])
    return head, rows


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def paper_numbers() -> list[dict]:
    """What the papers give: algo, env, value, source."""
    return tomllib.loads((ROOT / "benchmarks" / "paper.toml").read_text()).get("number", [])


def status(algo: str, environments: dict[str, dict[str, list[Curve]]]) -> tuple[list[str], list[list[str]]]:
    """The reproduction status of one method: ours beside the paper's, per environment."""
    paper = {(n["algo"], n["env"]): n for n in paper_numbers()}
    rows = []
    for env, variants in environments.items():
        for name, curves in variants.items():
            number = paper.get((algo, env), {"value": "none given"})
            rows.append([algo, env, name, estimate([c.success[-1] for c in curves]), str(len(curves)),
                         ", ".join(ends(curves)), number["value"]])
    return ["script", "environment", "variant", "success, last evaluation", "seeds", "steps", "paper"], rows


def draw(algo: str, environments: dict[str, dict[str, list[Curve]]], target: Path) -> None:
    """Success over environment steps, one panel per environment: seeds thin, their mean thick with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "report", "svg.fonttype": "none"})  # the same bytes for the same curves
    figure, panels = plt.subplots(1, len(environments), figsize=(5.2 * len(environments), 3.8), squeeze=False,
                                  constrained_layout=True)
    colors = {name: plt.get_cmap("tab10")(i % 10)
              for i, name in enumerate(sorted({n for variants in environments.values() for n in variants}))}
    for panel, (env, variants) in zip(panels[0], environments.items()):
        for name, curves in variants.items():
            for curve in curves:
                panel.plot(np.array(curve.steps) / 1000, curve.success, color=colors[name], alpha=0.3, linewidth=0.7)
            steps, middle, low, high = band(curves)
            panel.plot(np.array(steps) / 1000, middle, color=colors[name], linewidth=2.2,
                       label=f"{name} ({len(curves)})")
            if len(curves) > 1:
                panel.fill_between(np.array(steps) / 1000, low, high, color=colors[name], alpha=0.15, linewidth=0)
        panel.set(title=env, xlabel="environment steps, thousands", ylabel="success rate", ylim=(-0.02, 1.02))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower right")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def band(curves: list[Curve]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, mean over seeds, and the ends of its 95 % interval (NaN for one seed), as far as every seed goes."""
    steps = min((c.steps for c in curves), key=len)
    if any(c.steps[:len(steps)] != steps for c in curves):
        sys.exit("report: seeds of one variant were evaluated at different steps; gather runs with equal --eval-every")
    values = np.array([c.success[:len(steps)] for c in curves])  # (seeds, steps)
    ends = [stats.interval(stats.mean, column[:, None], repetitions=500) for column in values.T]
    return steps, values.mean(0).tolist(), [e[0] for e in ends], [e[1] for e in ends]


def page(results: dict[str, dict[str, dict[str, list[Curve]]]]) -> str:
    """report.html: the template with all curves, tables and small pictures inside."""
    def clean(values: list[float]) -> list[float | None]:
        return [None if v != v else round(v, 4) for v in values]

    panels = []
    for algo, environments in results.items():
        for env, variants in environments.items():
            series = []
            for name, curves in variants.items():
                steps, middle, low, high = band(curves)
                series.append({"name": name, "steps": steps, "mean": clean(middle), "low": clean(low),
                               "high": clean(high), "seeds": {c.seed: [c.steps, clean(c.success)] for c in curves}})
            head, rows = summarise(variants)
            paper = [n for n in paper_numbers() if (n["algo"], n["env"]) == (algo, env)]
            panels.append({"algo": algo, "env": env, "series": series, "head": head, "rows": rows, "paper": paper})
    pictures = [{"name": p.stem, "type": p.suffix[1:], "data": base64.b64encode(p.read_bytes()).decode()}
                for p in sorted((ROOT / "docs" / "figures").iterdir())
                if p.suffix in (".png", ".gif") and p.stat().st_size < 500_000]
    data = json.dumps({"panels": panels, "pictures": pictures}).replace("</", "<\\/")  # never ends the script element
    return (ROOT / "benchmarks" / "report_template.html").read_text().replace("/*DATA*/null", data)


def main(html: Path = ROOT / "report.html") -> None:
    results = {folder.name: {path.stem: load_curves(path) for path in sorted(folder.glob("*.csv"))}
               for folder in sorted(RESULTS.iterdir()) if (ROOT / "algos" / f"{folder.name}.py").is_file()}
    for algo, environments in results.items():
        draw(algo, environments, ROOT / "docs" / "figures" / f"{algo}_curves.svg")

    def fill(match: re.Match) -> str:
        algo, env = match[2], match[3]
        if algo not in results or env not in (*results[algo], "status"):
            sys.exit(f"report: no results for {algo} {env}, which a page asks for")
        return match[1] + markdown(*(status(algo, results[algo]) if env == "status" else
                                     summarise(results[algo][env]))) + match[4]
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text()
        new = MARK.sub(fill, old)
        if new != old:
            path.write_text(new)
            print(f"rewrote {path.relative_to(ROOT)}")
    html.write_text(page(results))
    print(f"open {html}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
