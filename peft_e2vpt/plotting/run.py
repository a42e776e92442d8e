# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How a training run went, with the phases of `PruneRewindCallback`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..pruning.report import PruningReport
from .canvas import KEY_VALUE, PRUNED, TEST, VISUAL, Label, colours, label_ends, literal, new_figure, quiet, quieten


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MOST_MARKED = 30  # points of a line that get a mark each
REWOUND = {
    "init": "rewound to the start",
    "early": "rewound to an early step",
    "fresh": "rewound to a fresh draw",
    "none": "not rewound",
}


def plot_run(
    log_history: Sequence[dict[str, Any]], report: PruningReport | None = None, *, metric: str = "accuracy"
) -> Figure:
    """Draws loss, a metric and the learning rate of a run over its optimizer steps.

    Losses are means per sample, as the Trainer logs them: over the steps since the last log in training, over the set
    in an evaluation. Panels are there for what the history holds: the metric needs evaluations, for instance
    `eval_strategy="epoch"`. Where a report is given, a line marks the step after which prompts were scored, pruned and
    rewound, and the two parts of the run are named.

    Thumbnail: `docs/figures/e2vpt-pruned-run.png`.

    Args:
        log_history: `trainer.state.log_history`, or that of `TrainerState.load_from_json("trainer_state.json")`.
        report: the pruning of the run, `callback.report` or `PruningReport.load(folder)`.
        metric: name of what `compute_metrics` returns, without the prefix `eval_`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history holds no loss, or the report is not of a run: its model was pruned after training.
    """
    pruned_after = None if report is None else report.step
    if report is not None and pruned_after is None:
        raise ValueError(
            "The report is of a model that was pruned after its training, so no run shows it: leave it out."
        )
    losses = {"training": _series(log_history, "loss")}
    metrics = {}
    sets = {key.removesuffix("_loss"): None for entry in log_history for key in entry if key.endswith("_loss")}
    for name in sets:
        if name != "train":  # the mean over a whole run, logged at its end
            losses[name] = _series(log_history, f"{name}_loss")
            metrics[name] = _series(log_history, f"{name}_{metric}")
    rates = {"learning rate": _series(log_history, "learning_rate")}
    panels = {"loss": losses, metric.replace("_", " "): metrics, "learning rate": rates}
    panels = {title: {name: line for name, line in lines.items() if line} for title, lines in panels.items()}
    drawn = {title: lines for title, lines in panels.items() if lines}
    if "loss" not in drawn:
        raise ValueError("The history holds no loss: pass trainer.state.log_history of a run that logged steps.")
    heights = [1 if title == "learning rate" else 2 for title in drawn]
    figure = new_figure(8, 0.9 + 1.1 * sum(heights))
    all_axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    ends: dict[Axes, list[Label]] = {}
    for axes, (title, lines) in zip(all_axes, drawn.items(), strict=True):
        for name, points in lines.items():
            # a line shows no single point, and few points are worth a mark each
            style = "-" if name in ("training", "learning rate") and len(points) > MOST_MARKED else "o-"
            colour = _colour(name)
            axes.plot(*_with_gap(points, pruned_after), style, markersize=4, label=literal(name), color=colour)
            if title != "learning rate":
                ends.setdefault(axes, []).append(Label(*points[-1], literal(name), colour))
        axes.set_ylabel(title)
        axes.margins(y=0.1)
        quieten(axes)
    last = max(int(entry["step"]) for entry in log_history if "step" in entry)
    all_axes[-1].set(xlabel="optimizer step", xlim=(0, 1.02 * last))
    all_axes[-1].ticklabel_format(axis="y", scilimits=(-2, 3))
    if report is not None and pruned_after is not None:
        _mark_phases(list(all_axes), report, pruned_after, last)
    for axes, labels in ends.items():
        label_ends(axes, labels)
    return figure


def _colour(name: str) -> str:
    of_sets = {"training": quiet(), "learning rate": quiet(), "eval": colours()[VISUAL], "test": colours()[TEST]}
    return of_sets.get(name, colours()[4])


def _series(log_history: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    found = [(int(entry["step"]), float(entry[key])) for entry in log_history if key in entry and "step" in entry]
    return [(step, value) for step, value in found if math.isfinite(value)]


def _with_gap(points: list[tuple[int, float]], pruned_after: int | None) -> tuple[list[float], list[float]]:
    """Steps and values, with nothing between the last of one part of the run and the first of the next."""
    steps, values = [float(step) for step, _ in points], [value for _, value in points]
    if pruned_after is not None:
        first = sum(step <= pruned_after for step in steps)
        if 0 < first < len(steps):
            steps.insert(first, pruned_after)
            values.insert(first, math.nan)
    return steps, values


def _mark_phases(all_axes: list[Axes], report: PruningReport, pruned_after: int, last: int) -> None:
    for axes in all_axes:
        axes.axvspan(0, pruned_after, color=colours()[VISUAL], alpha=0.08, linewidth=0)
        axes.axvspan(pruned_after, last, color=colours()[KEY_VALUE], alpha=0.1, linewidth=0)
        axes.axvline(pruned_after, color=colours()[PRUNED], linestyle="--", linewidth=1)
    top = all_axes[0]
    kept = sum(sum(row) for row in report.token_gates)
    total = sum(len(row) for row in report.token_gates)
    second = f"{kept:.0f} of {total} prompts, {REWOUND[report.rewound_to]}"
    for start, end, text in ((0, pruned_after, "all prompts"), (pruned_after, last, second)):
        place = ((start + end) / 2, 1.02)
        top.annotate(text, place, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9)
    top.set_title(f"Scored and pruned after step {pruned_after}", pad=20)
