# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What methods reach, and with how many parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from .canvas import MARKERS, Label, colours, label_points, literal, new_figure, quiet, quieten


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_methods(rows: Sequence[dict[str, Any]], *, metric: str = "accuracy", num_images: int | None = None) -> Figure:
    """Draws the accuracy of every method, in percent, against its trained parameters, on a logarithmic axis.

    Of a method with several rows, one a seed, the mean is drawn with a bar from the smallest to the largest. With
    `num_images`, a wide grey bar is the standard error of an accuracy on so many images, `sqrt(p (1 - p) / n)`:
    methods whose grey bars overlap cannot be told apart by this test set. Beside its point stand a method's name, its
    trained parameters, head included, and their percentage of the model.

    Thumbnail: `docs/figures/methods.png`.

    Args:
        rows: one or more for each method, with `method`, `trained` (parameters), `percent` (of the model) and the
            metric (between 0 and 1): `json.load(open("results.json"))["methods"]` of `examples/finetune.py`.
        metric: which column is drawn, for instance `"balanced_accuracy"`.
        num_images: how many images the metric, a share of them, was measured on.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no rows.
        KeyError: a row lacks a column.
    """
    if not rows:
        raise ValueError("There are no rows to draw: pass those of results.json, one or more for each method.")
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    markers, of_methods, labels = cycle(MARKERS), cycle(colours()), []
    for name in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == name]
        values = [100 * row[metric] for row in of_method]
        trained = sum(row["trained"] for row in of_method) / len(of_method)
        percent = sum(row["percent"] for row in of_method) / len(of_method)
        mean, colour = sum(values) / len(values), next(of_methods)
        if num_images is not None:
            error = (max(mean * (100 - mean), 0) / num_images) ** 0.5
            axes.errorbar([trained], [mean], [error], fmt="none", ecolor=quiet(), elinewidth=5, alpha=0.35, zorder=1)
        axes.errorbar(
            [trained],
            [mean],
            [[mean - min(values)], [max(values) - mean]],
            fmt=next(markers),
            color=colour,
            markersize=8,
            capsize=4 if len(values) > 1 else 0,
            label=literal(name),
        )
        labels.append(Label(trained, mean, f"{literal(name)}\n{trained:,.0f} ({percent:.2f} %)", colour))
    axes.set_xscale("log")
    axes.margins(0.22, 0.2)
    axes.grid(alpha=0.3)
    quieten(axes)
    axes.set(xlabel="trained parameters (% of the model)", ylabel=f"{metric.replace('_', ' ')} (%)")
    if num_images is not None:
        axes.set_title(f"grey: the standard error on {num_images:,} images", fontsize=9, loc="left")
    label_points(axes, labels)
    return figure
