# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What methods reach, and with how many parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from .canvas import literal, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_methods(rows: Sequence[dict[str, Any]], *, metric: str = "accuracy") -> Figure:
    """Draws the accuracy of every method, in percent, against its trained parameters, on a logarithmic axis.

    Of a method with several rows, one a seed, the mean is drawn with a bar from the smallest to the largest. The
    legend has the trained parameters, head included, and their percentage of the model.

    Thumbnail: `docs/figures/methods.png`.

    Args:
        rows: one or more for each method, with `method`, `trained` (parameters), `percent` (of the model) and the
            metric (between 0 and 1): `json.load(open("results.json"))["methods"]` of `examples/finetune.py`.
        metric: which column is drawn, for instance `"balanced_accuracy"`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no rows.
        KeyError: a row lacks a column.
    """
    if not rows:
        raise ValueError("There are no rows to draw: pass those of results.json, one or more for each method.")
    figure = new_figure(7.5, 4)
    axes = figure.subplots()
    markers = cycle("osD^vPX*")
    for name in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == name]
        values = [100 * row[metric] for row in of_method]
        trained = sum(row["trained"] for row in of_method) / len(of_method)
        percent = sum(row["percent"] for row in of_method) / len(of_method)
        mean = sum(values) / len(values)
        axes.errorbar(
            [trained],
            [mean],
            [[mean - min(values)], [max(values) - mean]],
            fmt=next(markers),
            markersize=8,
            capsize=4 if len(values) > 1 else 0,
            label=f"{literal(name)}: {trained:,.0f} ({percent:.2f} %)",
        )
    axes.set_xscale("log")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.set(xlabel="trained parameters", ylabel=f"{metric.replace('_', ' ')} (%)")
    axes.legend(title="method: trained parameters", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
