"""Pictures of an episode: frames in a row, and below them, over environment steps, who acts or what a policy says."""
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np


class Said(NamedTuple):
    """What a policy says of one observation."""
    values: list[float]  # log-probabilities of actions, or other numbers of theirs (A,), or a mean action (d,)
    std: list[float] | None  # (d,), of a Gaussian around the mean action
    scores: str  # of numbers of actions that are no log-probabilities, what they are: "Q"


def draw_timeline(frames: Sequence[np.ndarray], weights: Sequence[list[float]], acting: Sequence[int],
                  names: Sequence[str], path: Path, crop: bool, labels: tuple[str, str] = ("attention weight", "acts")
                  ) -> None:
    """Draw who decides when: a strip of the frames, below it the weights (T, n) of `names` stacked to 1, and a band of
    who acts (T,), indices into `names`. `labels` name the two. All share one time axis, in environment steps. `crop`
    shows the middle of each frame, which is larger then: where a robot works, but not all of a grid."""
    figure, (area, band) = begin(frames, [3.2, 0.5], crop)
    area.stackplot(np.arange(len(weights)) + 0.5, np.asarray(weights).T, labels=names, colors=colors_of(names),
                   alpha=0.85)
    area.set(ylim=(0, 1), ylabel=labels[0])
    draw_band(band, acting, names, labels[1])
    save(figure, area, path)


def draw_actions(frames: Sequence[np.ndarray], actions: np.ndarray, said: Sequence[Said], names: Sequence[str],
                 path: Path, crop: bool) -> None:
    """Draw what a policy says and does. Actions are whole numbers (T,), indices into `names`, or vectors (T, d) in
    [-1, 1]; `said` has an entry for each, or none.

    Probabilities are stacked, with a band of the action taken. Other numbers of actions are lines, as the distance from
    the largest. Of vectors, each part has a row: a line of the mean with a band of one deviation, and dots where it was
    executed; without `said`, one line of what was executed."""
    if actions.ndim == 2:
        draw_parts(frames, actions, said, path, crop)
        return
    values = np.array([one.values for one in said])  # (T, A)
    if len(said) and not said[0].scores:
        draw_timeline(frames, np.exp(values), actions, names, path, crop, ("probability", "taken"))
        return
    figure, axes = begin(frames, [3.2, 0.5] if len(said) else [0.5], crop)
    draw_band(axes[-1], actions, names, "taken")
    for k in range(len(names)):
        if len(said):
            axes[0].plot(np.arange(len(actions)) + 0.5, values[:, k] - values.max(1), color=colors_of(names)[k],
                         label=names[k], linewidth=1.2)
            axes[0].set(ylabel=f"{said[0].scores} - max {said[0].scores}")
        else:
            axes[0].fill_between([], [], color=colors_of(names)[k], label=names[k])
    save(figure, axes[0], path)


def draw_parts(frames: Sequence[np.ndarray], actions: np.ndarray, said: Sequence[Said], path: Path, crop: bool) -> None:
    """The parts of actions (T, d), a row each; see `draw_actions`."""
    time, d = np.arange(len(actions)) + 0.5, actions.shape[1]
    figure, rows = begin(frames, [max(0.45, min(1.4, 4 / d))] * d, crop)
    for k, row in enumerate(rows):
        if len(said):
            mean = np.array([one.values[k] for one in said])
            if said[0].std is not None:
                std = np.array([one.std[k] for one in said])
                row.fill_between(time, mean - std, mean + std, color="tab:blue", alpha=0.2, linewidth=0,
                                 label="one deviation")
            row.plot(time, mean, color="tab:blue", linewidth=1.2, label="mean")
            row.plot(time, actions[:, k], ".", color="tab:orange", markersize=3, label="executed")
        else:
            row.plot(time, actions[:, k], color="tab:blue", linewidth=1.2, label="executed")
        for bound in (-1, 1):
            row.axhline(bound, color="grey", linewidth=0.5, linestyle=":")
        row.set(ylabel=f"action {k}" if d < 8 else str(k))
    save(figure, rows[0], path)


def begin(frames: Sequence[np.ndarray], heights: list[float], crop: bool) -> tuple:
    """A figure with a strip of eight frames above axes of such heights, and these axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, shown = len(frames), ((np.arange(8) + 0.5) * len(frames) / 8).astype(int)
    margin, gap = (frames[0].shape[1] // 5, 0) if crop else (0, 0.03)
    tall = 1.26 * frames[0].shape[0] / (frames[0].shape[1] - 2 * margin)  # a strip of frames in their proportions
    figure, (strip, *rows) = plt.subplots(1 + len(heights), 1, figsize=(10, 0.6 + tall + sum(heights)), sharex=True,
                                          height_ratios=[tall, *heights], constrained_layout=True)
    for k, frame in enumerate(frames[i] for i in shown):
        left, right = (k + gap) * steps / 8, (k + 1 - gap) * steps / 8
        strip.imshow(frame[:, margin:frame.shape[1] - margin], extent=(left, right, 0, 1), aspect="auto")
        strip.text((k + 0.06) * steps / 8, 0.05, f"step {shown[k]}", color="white", fontsize=8,
                   bbox={"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 1.5})
    strip.set_axis_off()
    rows[0].set(xlim=(0, steps))
    rows[-1].set(xlabel="environment step")
    return figure, rows


def colors_of(names: Sequence[str]) -> list[tuple]:
    import matplotlib.pyplot as plt

    colors = plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    return [colors[i % len(colors)] for i in range(len(names))]


def draw_band(band, acting: Sequence[int], names: Sequence[str], label: str) -> None:
    """A band in the colours of the ones that act (T,)."""
    colors = np.array(colors_of(names))[np.asarray(acting)]  # (T, 3)
    band.imshow(colors[None], extent=(0, len(acting), 0, 1), aspect="auto", interpolation="nearest")
    band.set(yticks=[], ylabel=label)


def save(figure, axes, path: Path) -> None:
    """Write the figure with a legend beside `axes`, from top to bottom as areas are stacked."""
    import matplotlib.pyplot as plt

    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
