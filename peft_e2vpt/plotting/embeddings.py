# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of pictures in the plane and in the Poincare disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .canvas import new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


NUM_NAMED_CLASSES = 20


def principal_components(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Projects embeddings on the two directions in which they vary most.

    Args:
        embeddings: (n, D), n of at least 2.

    Returns:
        Coordinates (n, 2) in units of the embeddings, with mean 0, and the shares (2,) of the variance that the two
        have. The largest coordinate of each is positive, so that equal embeddings give equal pictures.

    Raises:
        ValueError: there are fewer than two embeddings, or they do not differ.
    """
    if embeddings.dim() != 2 or min(embeddings.shape) < 2:
        raise ValueError(f"Embeddings are two or more vectors (n, D), got shape {tuple(embeddings.shape)}.")
    centred = embeddings.double() - embeddings.double().mean(0)
    vectors, values, _ = torch.linalg.svd(centred, full_matrices=False)
    variance = values.square()
    if not variance.sum() > 0:
        raise ValueError("All embeddings are equal, so there is no direction in which they vary.")
    coordinates = (vectors * values)[:, :2]
    largest = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True))
    return coordinates * largest.sign(), variance[:2] / variance.sum()


def poincare_disk(vectors: Tensor) -> Tensor:
    """Maps vectors of the tangent plane at the origin into the Poincare disk of curvature -1, by the exponential map.

    `exp_0(v) = tanh(|v|) v / |v|` (Ganea et al., NeurIPS 2018, arXiv 1805.09112, lemma 2): directions stay, and the
    hyperbolic distance to the origin is `2 |v|`.

    Args:
        vectors: (n, 2).

    Returns:
        (n, 2), all of length below 1 (1 where the floating point type cannot tell).
    """
    length = vectors.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
    mapped: Tensor = length.tanh() * vectors / length
    return mapped


def plot_embeddings(
    embeddings: Mapping[str, Tensor], labels: Tensor | Sequence[int], label_names: Sequence[str]
) -> Figure:
    """Draws embeddings of the same pictures by several models, in the plane and in the Poincare disk.

    Above, the first two principal components of each model, in units of its embeddings. Below, the same two as vectors
    of the tangent plane, mapped into the disk by the exponential map at the origin (`poincare_disk`); a standard
    deviation of the first component becomes a hyperbolic distance of 1. Both halves show one projection: the disk
    spreads what is near the mean and gathers at the rim what is far from it, and no hyperbolic embedding was fitted.
    The paper compares methods by hyperbolic pictures of class tokens too, which it obtains in another way.

    Thumbnail: `docs/pictures/embeddings.png`.

    Args:
        embeddings: of every model, by the title of its column, (n, D), for instance from
            `peft_e2vpt.embedding.class_token_embeddings(model, batch)`.
        labels: (n,), classes of the pictures.
        label_names: names of the classes; the legend names up to 20.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no model, a model has another number of embeddings than there are labels, or as
            `principal_components`.
    """
    classes = torch.as_tensor(labels).cpu()
    if not embeddings:
        raise ValueError("There is nothing to draw: pass the embeddings of one model or more, by title.")
    for title, vectors in embeddings.items():
        if len(vectors) != len(classes):
            raise ValueError(f"{title} has {len(vectors)} embeddings for {len(classes)} labels.")
    figure = new_figure(0.6 + 3.1 * len(embeddings), 6.8)
    grid = figure.subplots(2, len(embeddings), squeeze=False)
    for (above, below), (title, vectors) in zip(grid.T, embeddings.items(), strict=True):
        plane, shares = principal_components(vectors.cpu())
        _scatter(above, plane, classes, label_names)
        first, second = (f"{share:.0%}" for share in shares.tolist())
        above.set(title=title, xlabel=f"component 1 ({first} of variance)", ylabel=f"component 2 ({second})")
        above.set_aspect("equal", adjustable="datalim")
        _scatter(below, poincare_disk(plane / (2 * plane[:, 0].std())), classes, label_names)
        _draw_rim(below)
    if len(label_names) <= NUM_NAMED_CLASSES:
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), markerscale=2)
    return figure


def _scatter(axes: Axes, points: Tensor, classes: Tensor, label_names: Sequence[str]) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab10" if len(label_names) <= 10 else "tab20"]
    for label in classes.unique().tolist():
        of_class = points[classes == label]
        axes.scatter(
            of_class[:, 0],
            of_class[:, 1],
            s=14,
            alpha=0.7,
            linewidths=0,
            color=colours(label % colours.N),
            label=label_names[label],
        )


def _draw_rim(axes: Axes) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle((0, 0), 1, fill=False, color="black"))
    axes.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=[], yticks=[], xlabel="Poincare disk")
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
