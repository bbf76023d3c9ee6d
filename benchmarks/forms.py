"""The figure of docs/forms_of_knowledge.md: what each form of knowledge is worth, where it is right, weak and wrong.

    python benchmarks/forms.py          # benchmarks/results -> docs/figures/forms.svg

Rows are forms, columns qualities. A bar is the mean score up to the end of the budget (the area under the curve), over
seeds, which are dots; the dashed line is the same without knowledge.
"""
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.curves import RESULTS, Curve, file_of, load_curves, write_whole
from benchmarks.report import areas, long

QUALITIES = {"right": "", "weak": "-half", "wrong": "-mirrored"}  # {column: what the knowledge's name ends in}
BETTER, WORSE = "#0072b2", "#d55e00"  # Okabe and Ito: for all eyes
NORMALIZED = " --normalize-advantage"
TD3 = (" --batch-size 512 --exploration-noise 0.2 --gamma 0.95 --hidden 256x3 --learning-rate 0.001 --normalize "
       "--num-envs 32 --tau 0.05 --updates-per-step 0.1")  # the settings of sac.py
TASKS = [  # (environment, budget in steps, score, without knowledge, {form: variant, {} for the knowledge's name})
    ("MiniGrid-DoorKey-8x8-v0", 300_000, "return_mean", "ppo" + NORMALIZED, {
        "who acts (KIAN)": "ppo_kian {}" + NORMALIZED,
        "a mask": "ppo_mask {}" + NORMALIZED,
        "logits (A2T)": "ppo_a2t {}" + NORMALIZED,
        "a shaped reward": "bk_code {}",
        "an input (KoGuN)": "ppo_kogun {}" + NORMALIZED,
        "imitation": "ppo_bc {}" + NORMALIZED}),
    ("FetchPickAndPlace-v4", 150_000, "success_rate", "sac", {
        "who acts (KIAN)": "sac_kian {}",
        "with a hand-over": "sac_handover {}",
        "demonstrations": "sac_demos {}",
        "imitation": "sac_bc {}",
        "an input (KoGuN)": "sac_kogun {}",
        "a shaped reward": "sac_shaping {}",
        "a mask (on TD3)": "camel {}" + TD3})]
KNOWLEDGE = {"MiniGrid-DoorKey-8x8-v0": "minigrid.official", "FetchPickAndPlace-v4": "fetch.v4"}
BASELINES = {"a mask (on TD3)": "td3" + TD3}  # of forms that stand on another algorithm


def all_curves(env: str, score: str) -> dict[str, list[Curve]]:
    """{variant: its seeds} in an environment, of all methods."""
    found = {}
    for method in sorted(RESULTS.iterdir()):
        path = file_of(method.name, env)
        if method.name not in ("rules", "speed", "zero_shot") and path.is_file():
            for name, curves in load_curves(path, score).items():
                if len(curves) > len(found.get(name, [])):  # in two files: the one with more seeds
                    found[name] = curves
    return found


def scores(curves: dict[str, list[Curve]], name: str, budget: int) -> list[float]:
    """Mean height up to the budget, of every seed of a variant that gets there; knowledge that is a script's default
    is not named in its variant."""
    found = curves.get(name) or curves.get(name.replace(" fetch.v4", "", 1) if name.startswith("sac") else "", [])
    return areas(long(found, budget), budget)


def draw(target: Path) -> None:
    """Write the figure: a block of three panels for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "forms", "svg.fonttype": "none"})  # the same bytes for the same curves
    heights = [len(forms) + 1.2 for *_, forms in TASKS]
    figure, panels = plt.subplots(len(TASKS), len(QUALITIES), figsize=(10, 0.42 * sum(heights) + 0.8), sharex=True,
                                  layout="constrained", height_ratios=heights, squeeze=False)
    for (env, budget, score, nothing, forms), line in zip(TASKS, panels):
        curves = all_curves(env, score)
        plain = np.mean(scores(curves, nothing, budget))
        for (quality, ending), panel in zip(QUALITIES.items(), line):
            panel.axvline(plain, color="black", linestyle="--", linewidth=1)
            for row, (form, name) in enumerate(forms.items()):
                seeds = scores(curves, name.format(KNOWLEDGE[env] + ending), budget)
                if not seeds:
                    panel.text(0.02, row, "not run", va="center", fontsize=8, color="#999999")
                    continue
                base = plain
                if form in BASELINES and (other := scores(curves, BASELINES[form], budget)):
                    base = np.mean(other)
                    panel.plot([base, base], [row - 0.4, row + 0.4], color="black", linewidth=1, linestyle="--")
                panel.barh(row, np.mean(seeds), height=0.6, alpha=0.75,
                           color=BETTER if np.mean(seeds) > base else WORSE)
                panel.plot(seeds, [row] * len(seeds), "o", color="black", markersize=3)
            panel.set(title=f"{quality} knowledge", xlim=(-0.03, 1.03), ylim=(len(forms) - 0.4, -0.6))
            panel.set_yticks(range(len(forms)), forms if quality == "right" else [""] * len(forms))
            panel.grid(axis="x", alpha=0.3)
        line[0].set_ylabel(env.removesuffix("-v0").removesuffix("-v4").removeprefix("MiniGrid-"))
        line[1].set_xlabel(f"mean {score.split('_')[0]} up to {budget // 1000}k steps; dashed: without knowledge")
    write_whole(target, lambda half: figure.savefig(half, metadata={"Date": None}))
    plt.close(figure)


if __name__ == "__main__":
    draw(ROOT / "docs" / "figures" / "forms.svg")
    print("drew docs/figures/forms.svg")
