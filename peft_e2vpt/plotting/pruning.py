# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Which prompts and segments mattered, and which were pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..pruning.report import PruningReport
from .canvas import PRUNED, amounts, colours, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_pruning(report: PruningReport) -> Figure:
    """Draws the importance of every visual prompt, layer by layer, and the segments of it that were kept.

    Left, a square per prompt, darker where its importance is a larger part of its layer's largest; a cross where it
    was pruned. Right, a square per segment of every prompt, filled where it was kept (paper section 3.3).

    Thumbnail: `docs/figures/e2vpt-pruned-pruning.png`.

    Args:
        report: the report of a pruning, `callback.report` or `PruningReport.load(folder)`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    scores = np.asarray(report.token_scores)
    kept = np.asarray(report.token_gates) > 0
    segments = np.asarray(report.segment_gates) > 0
    num_layers, num_prompts, num_segments = segments.shape
    labels = [str(layer) for layer in report.layers] if num_layers > 1 else ["all"]
    figure = new_figure(11, max(2.6, 1.6 + 0.32 * num_layers))
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    share = scores / np.maximum(scores.max(axis=1, keepdims=True), np.finfo(float).tiny)
    image = left.imshow(share, cmap=amounts(), vmin=0, vmax=1, aspect="auto")
    rows, columns = np.nonzero(~kept)
    left.plot(columns, rows, "x", color=colours()[PRUNED], markersize=6, markeredgewidth=1.8, label="pruned")
    left.set(
        title="Importance of visual prompts (x: pruned)", xlabel="prompt", ylabel="layer", yticks=range(num_layers)
    )
    left.set_yticklabels(labels)
    left.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=left, label="share of the layer's largest")
    right.imshow(segments.reshape(num_layers, -1), cmap=amounts(), vmin=0, vmax=1.4, aspect="auto")
    right.set_xticks(np.arange(num_prompts) * num_segments + (num_segments - 1) / 2, range(num_prompts))
    right.set_yticks(range(num_layers), labels)
    for edge in range(1, num_prompts):
        right.axvline(edge * num_segments - 0.5, color=figure.get_facecolor(), linewidth=2)
    right.set(title=f"Segments kept ({int(segments.sum())} of {segments.size})", xlabel="prompt", ylabel="layer")
    figure.suptitle(
        f"Pruned {report.when}: {report.tuned_values_before:,} trained parameters "
        f"({report.tuned_percentage_before:.2f} % of the model) to {report.tuned_values_after:,} "
        f"({report.tuned_percentage_after:.2f} %)"
    )
    return figure
