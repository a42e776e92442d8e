# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of images by several models, in the plane of their first two principal components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .canvas import MARKERS, colours, literal, new_figure, quieten


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


NUM_NAMED_CLASSES = 20


def principal_components(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Projects embeddings on the two directions in which they vary most, with scikit-learn.

    Args:
        embeddings: (n, D), n and D of at least 2.

    Returns:
        Coordinates (n, 2) in units of the embeddings, with mean 0, and the shares (2,) of the variance that the two
        have, both in float64. Signs do not depend on the order of the embeddings.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are fewer than two embeddings, or they do not differ.
    """
    try:
        from sklearn.decomposition import PCA
    except ImportError as error:
        raise ImportError("Principal components need scikit-learn: pip install 'peft_e2vpt[plot]'.") from error
    if embeddings.dim() != 2 or min(embeddings.shape) < 2:
        raise ValueError(f"Embeddings are two or more vectors (n, D), got shape {tuple(embeddings.shape)}.")
    if (embeddings == embeddings[0]).all():
        raise ValueError("All embeddings are equal, so there is no direction in which they vary.")
    pca = PCA(2, svd_solver="full")  # the solver that draws nothing at random
    coordinates = pca.fit_transform(embeddings.double().cpu().numpy())
    return torch.from_numpy(coordinates), torch.from_numpy(pca.explained_variance_ratio_)


def plot_embeddings(
    embeddings: Mapping[str, Tensor], labels: Tensor | Sequence[int], label_names: Sequence[str]
) -> Figure:
    """Draws embeddings of the same images by several models: the first two principal components of each.

    Axes are in units of the embeddings, and say how much of the variance they show. The paper compares methods by
    hyperbolic embeddings of class tokens, fitted with UMAP; this figure is linear and shows less of clusters.

    Thumbnail: `docs/figures/embeddings.png`.

    Args:
        embeddings: of every model, by the title of its column, (n, D), for instance from
            `peft_e2vpt.embeddings.class_token_embeddings(model, batch)`.
        labels: (n,), classes of the images.
        label_names: names of the classes; the legend names up to 20. Each has a colour and a marker; no two of 104
            share both.

    Raises:
        ImportError: matplotlib or scikit-learn is not installed.
        ValueError: there is no model, a model has another number of embeddings than there are labels, or as
            `principal_components`.
    """
    classes = torch.as_tensor(labels).cpu()
    if not embeddings:
        raise ValueError("There is nothing to draw: pass the embeddings of one model or more, by title.")
    for title, vectors in embeddings.items():
        if len(vectors) != len(classes):
            raise ValueError(f"{title} has {len(vectors)} embeddings for {len(classes)} labels.")
    figure = new_figure(0.6 + 3.1 * len(embeddings), 3.7)
    panels = figure.subplots(1, len(embeddings), squeeze=False)[0]
    for axes, (title, vectors) in zip(panels, embeddings.items(), strict=True):
        plane, shares = principal_components(vectors)
        _scatter(axes, plane, classes, label_names)
        first, second = (f"{share:.0%}" for share in shares.tolist())
        axes.set(title=literal(title), xlabel=f"component 1 ({first} of variance)", ylabel=f"component 2 ({second})")
        axes.set_aspect("equal", adjustable="datalim")
    if len(label_names) <= NUM_NAMED_CLASSES:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), markerscale=1.6)
    return figure


def _scatter(axes: Axes, points: Tensor, classes: Tensor, label_names: Sequence[str]) -> None:
    of_classes = colours()
    quieten(axes)
    for label in classes.unique().tolist():
        of_class = points[classes == label]
        axes.scatter(
            of_class[:, 0],
            of_class[:, 1],
            s=18,
            alpha=0.75,
            linewidths=0,
            marker=MARKERS[label % len(MARKERS)],
            color=of_classes[label % len(of_classes)],
            label=literal(str(label_names[label])),
        )
