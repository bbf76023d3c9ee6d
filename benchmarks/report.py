"""Tables, figures and one self-contained page, from benchmarks/results/ alone: make report

Rewrites docs/figures/<algo>_curves.svg, whatever stands between `<!-- report: <algo> <env> -->` and `<!-- end -->` in
README.md and docs/ (for <env> also `all` environments together, `status` or `zero-shot`), and report.html (not
committed): open it in a browser, no server or network needed. How curves are read, and the papers' numbers, are in
benchmarks/paper.toml.
"""
import argparse
import base64
import json
import re
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import stats
from benchmarks.curves import RESULTS, Curve, file_of, load, load_curves, real_id, write_whole

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666"]  # Okabe and Ito: for all eyes
STYLES = {"-": "none", ":": "2 3", "-.": "7 3 2 3"}  # the next one where colours start again; as dashes in the page
MARK = re.compile(r"(<!-- report: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.S)
Variants = dict[str, list[Curve]]  # {variant: its seeds}, of one environment


@dataclass
class Reading:
    """How the curves of a method in an environment are read: benchmarks/paper.toml."""
    score: str = "return_mean"  # column of eval.csv
    threshold: float | None = None  # score that counts as learned
    baseline: str = ""  # variant that others are compared with
    untrained: tuple[str, ...] = ()  # variants that learn nothing: their last evaluation holds for every step
    skip_start: bool = False  # whether the evaluation at step 0 is left out
    paper: str = "none given"  # what the paper gives
    label: str = ""  # of the score; empty: from the column's name
    beside: tuple[str, ...] = ()  # other methods whose curves in the same environments stand in the same tables
    bounds: tuple[float, float] = (-np.inf, np.inf)  # what a score can be, which no interval leaves

    def __post_init__(self):
        if self.score == "success_rate":
            self.bounds = (0.0, 1.0)
        self.label = self.label or self.score.removesuffix("_mean").removesuffix("_rate").replace("_", " ")


def paper() -> dict:
    return tomllib.loads((ROOT / "benchmarks" / "paper.toml").read_text())


def reading(algo: str, env: str = "") -> Reading:
    """How to read `algo` in `env`: by returns where the task knows no success, and nothing else is said."""
    data = paper()
    ours = next((e for e in data["environment"] if (e["algo"], real_id(e["env"])) == (algo, real_id(env))), {})
    known = {**data["method"].get(algo, {}), **ours}
    path = file_of(algo, env)
    if known.get("score") == "success_rate" and not ours and path.is_file():
        if all(row["success_rate"] == "nan" for row in load(path)):
            known = {**known, "score": "return_mean", "threshold": None}
    return Reading(**{key: known[key] for key in known if key not in ("algo", "env")})


def hold(variants: Variants, untrained: tuple[str, ...]) -> None:
    """Draw out what does not learn, in place, over the budget of the others."""
    others = {name: curves for name, curves in variants.items() if name not in untrained}
    for curve in [c for name in untrained if others for c in variants.get(name, [])]:
        curve.steps, curve.minutes, curve.scores = [0, shared_budget(others)], [0.0, 0.0], curve.scores[-1:] * 2


def zero_shot(algo: str) -> tuple[list[str], list[list[str]]]:
    """Trained agents in tasks they have not seen, one row per variant: ours, and the paper's in round brackets."""
    files = [RESULTS / "zero_shot" / f"{name}.csv" for name in (algo, *reading(algo).beside)]
    rows = [row for file in files if file.is_file() for row in load(file)]
    given = {(entry["test"], name): value for entry in paper()["zero_shot"] if entry["algo"] == algo
             for name, value in entry["paper"].items()}
    score, bounds = reading(algo).score, reading(algo).bounds
    tests = sorted({row["test"] for row in rows}, key=lambda test: [  # 8x8 before 16x16
        int(part) if part.isdigit() else part for part in re.split(r"(\d+)", test)])
    table = []
    for name in sorted({row["variant"] for row in rows}):
        cells, seeds = [], set()
        for test in tests:
            own = [row for row in rows if (row["variant"], row["test"]) == (name, test)]
            if len({row["trained_in"] for row in own}) > 1:
                raise ValueError(f"{name} is tested with {test} by agents of several environments; keep one of them")
            seeds |= {len(own)} if own else set()  # not every agent was made for every test
            theirs = f" ({given[test, name]:.2f})" if (test, name) in given else ""
            cells.append((estimate(stats.mean, [float(row[score]) for row in own], bounds) if own else "") + theirs)
        table.append([name, " or ".join(map(str, sorted(seeds))), *cells])
    return ["", "seeds", *(test.removeprefix("--env ") for test in tests)], table


def number(x: float) -> str:
    places = 2 if abs(x) < 10 else 1 if abs(x) < 100 else 0
    return f"{round(float(x), places) + 0.0:.{places}f}"  # never -0.00


def thousands(step: float) -> str:
    return "not reached" if np.isinf(step) else f"{step / 1e6:.3g}M" if step >= 999_500 else f"{step / 1000:.3g}k"


def estimate(statistic: stats.Statistic, scores: list, bounds: tuple[float, float]) -> str:
    """`0.93 [0.88, 0.97]`: a statistic of (runs,) or (runs, tasks), 95 % interval from three runs on. Raises ValueError
    if a score is out of bounds."""
    scores = np.array(scores, float).reshape(len(scores), -1)
    if (scores < bounds[0] - 1e-6).any() or (scores > bounds[1] + 1e-6).any():
        raise ValueError(f"scores of {scores.min():g} to {scores.max():g} are out of the bounds {list(bounds)} that "
                         "benchmarks/paper.toml gives")
    return with_interval(statistic(scores), stats.interval(statistic, scores, bounds))


def above(scores: list, others: list) -> str:
    """`0.93 [0.58, 1.00]`: how likely a run scores more than one of the others."""
    x, y = (np.array(s, float).reshape(len(s), -1) for s in (scores, others))
    return with_interval(stats.probability_of_improvement(x, y), stats.improvement_interval(x, y))


def with_interval(value: float, ends: tuple[float, float]) -> str:
    return number(value) + (f" [{number(ends[0])}, {number(ends[1])}]" if ends[0] == ends[0] else "")


def ends(curves: list[Curve], limit: float = np.inf) -> str:
    """Where these curves end, or are read up to `limit`."""
    return ", ".join(map(thousands, sorted({min(c.steps[-1], limit) // 1000 * 1000 for c in curves})))


def last_scores(curves: list[Curve]) -> tuple[list[float], str]:
    """The last score of each curve, and where that is. If their ends differ by more than 1 %, all are read at the end
    of the shortest one: a mean over several lengths says nothing. One of two evaluations is read at its own end."""
    end = shared_budget({"": curves})
    if all(c.steps[-1] <= 1.01 * end for c in curves):
        return [c.scores[-1] for c in curves], ends(curves)
    return [float(np.interp(end, c.steps, c.scores)) for c in curves], ends(curves, end)


def how_many(curves: list[Curve]) -> str:
    """How many, and how many of them have not come to their end."""
    cut = sum(c.cut for c in curves)
    return f"{len(curves)} ({cut} unfinished)" if cut else str(len(curves))


def shared_budget(variants: Variants) -> int:
    """The step that every curve reaches. Curves of two evaluations do not count: they are too short to be compared."""
    ends = [(c.steps[-1], len(c.steps)) for curves in variants.values() for c in curves]
    return min([end for end, evaluations in ends if evaluations > 2] or [end for end, _ in ends])


def long(curves: list[Curve], budget: int) -> list[Curve]:
    """Those that go on until `budget`, or nearly."""
    return [c for c in curves if c.steps[-1] >= 0.99 * budget]


def smaller_budgets(budget: int) -> list[int]:
    """Round numbers near a tenth and a third: 10k and 50k of 150k."""
    rounds = [m * 10 ** k for k in range(9) for m in (1, 2, 5)]
    return [max(r for r in rounds if r <= max(budget / part, 1)) for part in (10, 3)]


def areas(curves: list[Curve], budget: int) -> list[float]:
    """Mean height of each curve up to `budget`: fast and good learning in one number."""
    return [stats.area_under_curve(c.steps, c.scores, budget) for c in curves]


def summarise(variants: Variants, how: Reading) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table, one row per variant."""
    budget = shared_budget(variants)
    first = max((next(s for s in c.steps if s > 0) for curves in variants.values() for c in curves
                 if len(c.steps) > 2), default=0)  # two: what does not learn
    budgets = [*(b for b in smaller_budgets(budget) if b > 0.9 * first), budget]  # none before all were evaluated
    compared = how.baseline in variants and len(variants) > 1
    uneven = any(abs(min(c.steps[-1] for c in curves) - budget) > 0.01 * budget for curves in variants.values())
    learned = [f"steps to {how.threshold:g}, median (range)", "minutes, median"] if how.threshold is not None else []
    head = ["", "seeds", *learned, *(f"{how.label} at {thousands(b)}" for b in budgets),
            f"mean up to {thousands(budget)}", *([f"P(above {how.baseline})"] if compared else []),
            *(["last (at step)"] if uneven else []), "worst seed", "code"]
    rows = []
    for name, curves in variants.items():
        row = [name, how_many(curves)]
        if learned:
            first = sorted(stats.first_reach(c.steps, c.scores, how.threshold) for c in curves)
            minutes = np.median([stats.first_reach(c.minutes, c.scores, how.threshold) for c in curves])
            low, high = thousands(first[0]), thousands(first[-1])
            row += [thousands(np.median(first)) + (f" ({low} to {high})" if low != high else ""),
                    "" if np.isinf(minutes) else f"{minutes:.1f}"]
        row += [estimate(stats.mean, scores, how.bounds) if (scores := [
            np.interp(b, c.steps, c.scores) for c in long(curves, b)]) else "" for b in budgets]
        (last, where), area = last_scores(curves), areas(long(curves, budget), budget)
        row.append(estimate(stats.mean, area, how.bounds) if area else "")
        if compared:  # how likely a seed's mean up to there is above one of the baseline's
            others = [] if name == how.baseline else areas(long(variants[how.baseline], budget), budget)
            row.append(above(area, others) if area and others else "")
        if uneven:
            row.append(f"{estimate(stats.mean, last, how.bounds)} ({where})")
        rows.append([*row, number(np.min(last)),
                     ", ".join(sorted(set().union(*(c.commits for c in curves))))])
    return head, rows


def across(algo: str, environments: dict[str, Variants]) -> tuple[list[str], list[list[str]]]:
    """Each variant over all environments that have it and the baseline, as far as every curve there goes; every
    environment counts the same, with as many seeds as the one with the fewest."""
    how, rows = reading(algo), []
    for name in sorted({name for variants in environments.values() for name in variants}):
        both = {env: v for env, v in environments.items() if name in v and how.baseline in v
                and all(long(v[who], shared_budget(v)) for who in (name, how.baseline))}
        scores = {who: np.array(list(zip(*(areas(long(v[who], shared_budget(v)), shared_budget(v))
                                           for v in both.values()))))
                  for who in (name, how.baseline)}  # (seeds, environments)
        if both:
            lows, highs = zip(*(reading(algo, env).bounds for env in both))
            bounds = (min(lows), max(highs))
            rows.append([name, str(len(both)), str(len(scores[name])), estimate(stats.mean, scores[name], bounds),
                         estimate(stats.iqm, scores[name], bounds),
                         "" if name == how.baseline else above(scores[name], scores[how.baseline])])
    rows.sort(key=lambda row: -int(row[1]))  # what ran in a few tasks only stands below
    return ["", "environments", "seeds", "mean up to shared budgets", "IQM", f"P(above {how.baseline})"], rows


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def status(algo: str, environments: dict[str, Variants]) -> tuple[list[str], list[list[str]]]:
    """What a method, and those beside it, come to at the end of every environment, beside the paper's numbers."""
    rows = []
    for env, variants in environments.items():
        how = reading(algo, env)
        for name, curves in variants.items():
            seeds, (last, where) = how_many(curves), last_scores(curves)
            if how.threshold is not None:
                learned = sum(max(c.scores) >= how.threshold for c in curves)
                share = "none" if not learned else learned if learned < len(curves) else "all"
                seeds += f", {share} of them reached {how.threshold:g}"
            rows.append([env, name, estimate(stats.mean, last, how.bounds), where, seeds, how.paper])
    score = f"{reading(algo).label}, last evaluation"
    return ["environment", "script, and its flags", score, "steps", "seeds", "published"], rows


def paint(environments: dict[str, Variants]) -> dict[str, tuple[str, str]]:
    """Colour and line style per variant, the same in all environments."""
    names = sorted({name for variants in environments.values() for name in variants})
    styles = list(STYLES)
    return {name: (COLORS[i % len(COLORS)], styles[i // len(COLORS) % len(styles)]) for i, name in enumerate(names)}


def draw(algo: str, environments: dict[str, Variants], target: Path) -> None:
    """Scores over environment steps, one panel per environment: the seeds' mean thick, their interval shaded, the
    baseline dashed. Seeds are thin lines, but not where more than three variants would become a thicket."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "report", "svg.fonttype": "none"})  # the same bytes for the same curves
    colors, columns = paint(environments), 2 if len(environments) == 4 else min(len(environments), 3)
    rows = -(-len(environments) // columns)
    width = int(12 * 5.2 * columns) - 6  # about twelve characters an inch
    labels = {name: textwrap.fill(name, width, break_on_hyphens=False) for name in sorted(colors)}
    beside = min(max(width // (6 + max(map(len, colors))), 1), 6)  # labels of a line
    lines_below = sum(label.count("\n") + 1 for label in labels.values()) / beside
    figure, panels = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.6 * rows + max(0.4, 0.2 * lines_below)),
                                  squeeze=False, layout="constrained")
    for panel in panels.flat[len(environments):]:
        panel.set_axis_off()
    lines = {}
    for panel, (env, variants) in zip(panels.flat, environments.items()):
        how = reading(algo, env)
        for name, curves in variants.items():
            steps, middle, low, high = band(curves, how.bounds)
            color, style = colors[name]
            if len(variants) <= 3 or np.isnan(low).any():
                for curve in curves:
                    panel.plot(np.array(curve.steps) / 1000, curve.scores, color=color, alpha=0.3, linewidth=0.7)
            lines[name], = panel.plot(np.array(steps) / 1000, middle, color=color, linewidth=2.2,
                                      linestyle="--" if name == how.baseline else style)
            panel.fill_between(np.array(steps) / 1000, low, high, color=color, alpha=0.15, linewidth=0)
        panel.set(title=env, xlabel="environment steps, thousands", ylabel=how.label)
        if how.score == "success_rate":
            panel.set_ylim(-0.02, 1.02)
        panel.grid(alpha=0.3)
    figure.legend([lines[name] for name in labels], labels.values(), loc="outside lower center", ncols=beside)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, lambda half: figure.savefig(half, metadata={"Date": None}))
    plt.close(figure)


def band(curves: list[Curve], bounds: tuple[float, float]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, mean over seeds, and the ends of its 95 % interval (NaN below three seeds), as far as every seed goes."""
    steps = min((c.steps for c in curves), key=lambda s: s[-1])
    values = np.array([np.interp(steps, c.steps, c.scores) for c in curves])  # (seeds, steps)
    ends = [stats.interval(stats.mean, column[:, None], bounds) for column in values.T]
    return steps, values.mean(0).tolist(), [e[0] for e in ends], [e[1] for e in ends]


def page(results: dict[str, dict[str, Variants]]) -> str:
    """report.html: the template with all curves, tables and small pictures inside."""
    def clean(values: list[float]) -> list[float | None]:
        return [None if v != v else round(v, 4) for v in values]

    panels = []
    for algo, environments in results.items():
        colors, (head, rows) = paint(environments), across(algo, environments)
        rows = [row for row in rows if int(row[1]) > 1]
        if reading(algo).threshold is not None and len(rows) > 1:  # else scores have no common scale
            panels.append({"algo": algo, "env": "all environments", "series": [], "head": head, "rows": rows})
        for env, variants in environments.items():
            series, how = [], reading(algo, env)
            for name, curves in variants.items():
                steps, middle, low, high = band(curves, how.bounds)
                color, style = colors[name]
                series.append({"name": name, "color": color, "steps": steps, "mean": clean(middle),
                               "low": clean(low), "high": clean(high),
                               "dashes": "7 4" if name == how.baseline else STYLES[style],
                               "seeds": {c.seed: [c.steps, clean(c.scores)] for c in curves}})
            head, rows = summarise(variants, how)
            panels.append({"algo": algo, "env": env, "series": series, "head": head, "rows": rows, "paper": how.paper,
                           "label": how.label, "scale": [0, 1] if how.score == "success_rate" else None})
    pictures = [{"name": p.stem, "type": p.suffix[1:], "data": base64.b64encode(p.read_bytes()).decode()}
                for p in sorted((ROOT / "docs" / "figures").iterdir())
                if p.suffix in (".png", ".gif") and p.stat().st_size < 500_000]
    data = json.dumps({"panels": panels, "pictures": pictures}).replace("</", "<\\/")  # never ends the script element
    return (ROOT / "benchmarks" / "report_template.html").read_text().replace("/*DATA*/null", data)


def all_results() -> dict[str, dict[str, Variants]]:
    """{method: {environment: curves}} of all committed results. Methods that stand beside another one are in its tables,
    too, read by its score."""
    results = {}
    for path in sorted(RESULTS.glob("*/*.csv")):
        algo, env = path.parent.name, real_id(path.stem)
        if (ROOT / "algos" / f"{algo}.py").is_file() or algo in paper()["method"]:  # speed/ has no curves
            how = reading(algo, env)
            results.setdefault(algo, {})[env] = load_curves(path, how.score)
            for curve in [c for curves in results[algo][env].values() for c in curves if how.skip_start]:
                curve.steps, curve.minutes, curve.scores = curve.steps[1:], curve.minutes[1:], curve.scores[1:]
            hold(results[algo][env], how.untrained)
        elif algo not in ("paper", "rules", "speed", "zero_shot"):  # paper: cells of that suite, a page tells of them
            print(f"left out: {path.relative_to(ROOT)}; give benchmarks/paper.toml a [method.{algo}]")
    listed = {(entry["algo"], real_id(entry["env"])) for entry in paper()["environment"]}
    for algo in paper()["method"]:
        for other in reading(algo).beside:
            for env in results.get(other, {}):
                if env in results.get(algo, {}) or (algo, env) in listed:  # also where `algo` itself has no curve yet
                    variants = load_curves(file_of(other, env), reading(algo, env).score)  # all rows by one score
                    results.setdefault(algo, {}).setdefault(env, {}).update(variants)
    return results


def main(html: Path) -> None:
    html.parent.mkdir(parents=True, exist_ok=True)  # where that is impossible, it is said before all is drawn
    results = all_results()
    others = {other for algo in results for other in reading(algo).beside}  # they are shown there
    for algo, environments in results.items():
        if algo in others:
            continue
        known = sorted({name for variants in environments.values() for name in variants})
        if (baseline := reading(algo).baseline) and baseline not in known and len(known) > 1:
            print(f"{algo} is compared with nothing: its baseline (benchmarks/paper.toml) is '{baseline}', its curves "
                  f"are {', '.join(known)}")
        figure = ROOT / "docs" / "figures" / f"{algo}_curves.svg"
        new = not figure.exists()
        draw(algo, environments, figure)
        if new:
            print(f"drew {figure.relative_to(ROOT)}; a table stands where a page has the lines <!-- report: {algo} "
                  f"{next(iter(environments))} --> and <!-- end -->")

    def fill(match: re.Match) -> str:
        algo, what = match[2], real_id(match[3])
        if what == "zero-shot":
            return match[1] + markdown(*zero_shot(algo)) + match[4]
        if algo not in results or what not in (*results[algo], "status", "all"):
            raise ValueError(f"no results for {algo} {what}, which a page asks for")
        return match[1] + markdown(*(
            status(algo, results[algo]) if what == "status" else across(algo, results[algo]) if what == "all" else
            summarise(results[algo][what], reading(algo, what)))) + match[4]
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text()
        new = MARK.sub(fill, old)
        if new != old:
            write_whole(path, lambda half: half.write_text(new))
            print(f"rewrote {path.relative_to(ROOT)}")
    shown = page({algo: results[algo] for algo in results if algo not in others})
    write_whole(html, lambda half: half.write_text(shown))
    print(f"open {html}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("html", type=Path, nargs="?", default=ROOT / "report.html", help="page to write")
    try:
        main(parser.parse_args().html)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        sys.exit(2)
