# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How much attention prompts get, and where in an image the rest of it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor

from .._compat import device_and_dtype
from ..attention_maps import KEY_VALUE, KINDS, TOKEN, VISUAL, AttentionMap, PromptAttention, attention_maps
from ..evaluation import no_trace
from . import canvas


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_prompt_attention(attention: PromptAttention) -> Figure:
    """Draws the share of attention that the class token and the patches give to prompts, layer by layer.

    A bar per layer, in percent, mean over heads, queries and samples: visual prompts below, key-value prompts on top
    of them, hatched; the rest, up to 100 %, goes to image tokens. A line marks what all prompts of the layer would get
    together if a query gave every key the same.

    Thumbnail: `docs/figures/e2vpt-prompt_attention.png`.

    Args:
        attention: what `peft_e2vpt.prompt_attention(model, batch)` has measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    parts = {"Class token": attention.class_token, "Patches": attention.patches}
    drawn = {title: shares for title, shares in parts.items() if shares is not None}
    num_layers = len(attention.layers)
    figure = canvas.new_figure(1.2 + len(drawn) * max(3.0, 0.45 * num_layers), 3.6)
    counts = attention.num_keys.double().numpy()
    uniform = 100 * (1 - counts[:, TOKEN] / counts.sum(1))
    places = np.arange(num_layers)
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, (title, shares) in zip(panels, drawn.items(), strict=True):
        percent = 100 * shares.double().mean(1).numpy()
        bottom = np.zeros(num_layers)
        for kind, place, hatch in ((VISUAL, canvas.VISUAL, None), (KEY_VALUE, canvas.KEY_VALUE, "///")):
            if counts[:, kind].any():
                axes.bar(
                    places,
                    percent[:, kind],
                    bottom=bottom,
                    color=canvas.colours()[place],
                    edgecolor=figure.get_facecolor(),
                    linewidth=0,
                    hatch=hatch,
                    label=f"to {KINDS[kind]}",
                )
                bottom = bottom + percent[:, kind]
        axes.hlines(uniform, places - 0.4, places + 0.4, color=canvas.ink(), label="if all keys got the same")
        axes.set(title=title, xlabel="layer")
        canvas.quieten(axes)
        axes.set_xticks(places, [str(layer) for layer in attention.layers])
    panels[0].set(ylabel="attention (%)", ylim=(0, 100))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def rollout(maps: list[AttentionMap]) -> Tensor:
    """Follows attention through all layers: attention rollout (Abnar and Zuidema, ACL 2020, arXiv 2005.00928).

    The product over the layers of `(W + I) / 2`, W the weights between tokens, mean over heads, I the residual
    connection. Attention to prompts is left out, and what is left sums to 1 again: prompts come from no image.

    Args:
        maps: all attentions of a plain vision transformer, from `attention_maps`.

    Returns:
        (B, N, N), how much of each token (last dimension) is in each token of the last layer.

    Raises:
        ValueError: layers differ in their tokens, so that there is no one sequence to follow (windows, pyramids).
    """
    between = [one.between_tokens() for one in maps]
    if len({tuple(weights.shape[::2]) + (weights.shape[-1],) for weights in between}) > 1 or (
        between[0].shape[-1] != between[0].shape[-2]
    ):
        raise ValueError(
            "Attention can be followed through layers that all see the same tokens; here layers see "
            + ", ".join(sorted({f"{weights.shape[-2]} x {weights.shape[-1]}" for weights in between}))
            + f" in {len(between[0])} sequences and more. Windows and pyramids have no map over the whole image."
        )
    total = torch.eye(between[0].shape[-1], dtype=between[0].dtype, device=between[0].device)
    for weights in between:
        total = (weights.mean(1) + torch.eye(len(total[-1])).to(weights)) / 2 @ total
    return total


class _Maps(NamedTuple):
    """Maps over the patches of B images, (B, h, w), with mean 1: attention as a multiple of that to a mean patch."""

    last_layer: np.ndarray
    rollout: np.ndarray
    to_prompts: np.ndarray  # (B,), share of the attention of the last layer that goes to prompts


def _maps(maps: list[AttentionMap], height: int, width: int) -> _Maps:
    prefix, last = maps[-1].num_prefix_tokens, maps[-1]
    through = rollout(maps)
    num_patches = through.shape[-1] - prefix
    rows = round((num_patches * height / width) ** 0.5)
    if not rows or num_patches % rows:
        raise ValueError(f"{num_patches} patches do not fill an image of {height} x {width} pixels.")

    def over_image(weights: Tensor) -> np.ndarray:
        of_query = (weights[:, 0] if prefix else weights.mean(1))[:, prefix:]
        of_query = of_query / of_query.mean(-1, keepdim=True)
        grid: np.ndarray = of_query.unflatten(-1, (rows, -1)).float().cpu().numpy()
        return grid

    given = last.weights[..., last.kinds != TOKEN].sum(-1).mean(1)
    to_prompts = (given[:, 0] if prefix else given.mean(1)).float().cpu().numpy()
    return _Maps(over_image(last.between_tokens().mean(1)), over_image(through), to_prompts)


def plot_attention_maps(
    model: PeftModel,
    inputs: dict[str, Any],
    *,
    processing_class: Any = None,
    answers: bool = True,
    num_prefix_tokens: int | None = None,
) -> Figure:
    """Draws where in images the attention of the class token goes, with prompts and without.

    A row per image: the image; the attention of the class token in the last layer and its rollout through all
    layers (`rollout`), each without the adapter and with it. Colours say how much more, or less, a patch gets than it
    would if all patches got the same, on a logarithmic scale, mean over heads: where nothing lies over the image,
    attention is uniform. The 2 % of the patches that are farthest from it have the colours of the ends. Attention to
    prompts is left out, and written below. Without a class token it is the mean over the patches.

    Under the image of a classifier with one class an image stand its answer and, where the batch has `labels`, the
    truth.

    Thumbnail: `docs/figures/e2vpt-attention_maps.png`.

    Args:
        model: a PEFT model with E2VPT whose attentions see whole images.
        inputs: a batch of a few images as the model takes it, with `pixel_values` (B, C, H, W).
        processing_class: the image processor that made the pixels, so that images have their own colours; by default
            the darkest value is drawn black and the brightest white.
        answers: whether answers are written; leave them out for images that have none of the classes.
        num_prefix_tokens: class and register tokens before the patches; by default what is known of the backbone.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: as `attention_maps` and `rollout`, or patches do not form a rectangle.
    """
    pixels: Tensor = inputs["pixel_values"]
    num_images, _, height, width = pixels.shape
    with_prompts = _maps(attention_maps(model, inputs, num_prefix_tokens=num_prefix_tokens), height, width)
    with model.disable_adapter():
        without = _maps(attention_maps(model, inputs, num_prefix_tokens=num_prefix_tokens), height, width)
    below = _answers(model, inputs) if answers else [""] * num_images
    rows = 1.95 * height / width + 0.17 * max(text.count("\n") for text in below)
    figure = canvas.new_figure(9.5, 1.5 + rows * num_images)
    places = figure.add_gridspec(num_images + 1, 5, height_ratios=[1] * num_images + [0.06])
    grid = np.array([[figure.add_subplot(places[row, column]) for column in range(5)] for row in range(num_images)])
    titles = ("image", "last layer\nwithout prompts", "with prompts", "rollout\nwithout prompts", "with prompts")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    images = [_as_colours(image, processing_class) for image in pixels.float().cpu()]
    for index, (image, answer) in enumerate(zip(images, below, strict=True)):
        grid[index, 0].imshow(image, extent=(0, width, height, 0))
        grid[index, 0].set_xlabel(answer, fontsize=9)
        grid[index, 2].set_xlabel(f"{100 * with_prompts.to_prompts[index]:.0f} % to prompts", fontsize=9)
    pairs = ((without.last_layer, with_prompts.last_layer), (without.rollout, with_prompts.rollout))
    for pair, columns in zip(pairs, ((1, 2), (3, 4)), strict=True):
        farthest = _farthest(np.stack(pair))
        for column, maps in zip(columns, pair, strict=True):
            for index, (image, weights) in enumerate(zip(images, maps, strict=True)):
                drawn = _overlay(grid[index, column], image, weights, farthest)
        scale = figure.add_subplot(places[-1, columns[0] : columns[1] + 1])
        bar = figure.colorbar(drawn, cax=scale, orientation="horizontal", extend="both")
        bar.set_label("attention, times uniform")
        ticks = [1 / farthest, farthest**-0.5, 1.0, farthest**0.5, farthest]
        bar.set_ticks(ticks, labels=[_times(tick) for tick in ticks])
        bar.minorticks_off()
    return figure


def _times(factor: float) -> str:
    return f"{factor:.2g}" if factor >= 1 else f"1/{1 / factor:.2g}"


def _farthest(weights: np.ndarray) -> float:
    """The factor at the ends of the scale: a power of two, between 2 and 1,024."""
    logarithms = np.abs(np.log2(np.maximum(weights, 2.0**-10)))
    return float(2 ** np.clip(np.ceil(np.quantile(logarithms, 0.98)), 1, 10))


@torch.no_grad()
def _answers(model: PeftModel, inputs: dict[str, Any]) -> list[str]:
    """What a classifier says to each image, and the truth where the batch has it; for other models, nothing."""
    unknown = [""] * len(inputs["pixel_values"])
    config = getattr(model.get_base_model(), "config", None)
    names, problem = getattr(config, "id2label", None), getattr(config, "problem_type", None)
    if not names or problem not in (None, "single_label_classification"):
        return unknown
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with no_trace(model, ()):
        logits = getattr(model(**send_to_device(given, device_and_dtype(model)[0])), "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not 2 <= logits.shape[-1] <= len(names):
        return unknown
    shares, best = logits.float().softmax(-1).max(-1)
    said = [
        f"says {canvas.literal(str(names[index]))} ({share:.0%})"
        for share, index in zip(shares.tolist(), best.tolist(), strict=True)
    ]
    truth = inputs.get("labels")
    if not isinstance(truth, Tensor) or truth.shape != best.shape:
        return said
    marks = [
        "\N{CHECK MARK}" if one == other else "\N{BALLOT X}"
        for one, other in zip(best.tolist(), truth.tolist(), strict=True)
    ]
    return [
        f"{words} {mark}\nis {canvas.literal(str(names.get(index, index)))}"
        for words, mark, index in zip(said, marks, truth.tolist(), strict=True)
    ]


def _as_colours(image: Tensor, processing_class: Any) -> np.ndarray:
    """Pixels (C, H, W) as colours (H, W, 3) between 0 and 1, without the normalisation of an image processor."""
    image = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    if processing_class is None:
        spread = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)
    else:
        spread = image
        if getattr(processing_class, "do_normalize", True):
            mean, std = (torch.tensor(getattr(processing_class, name)) for name in ("image_mean", "image_std"))
            spread = image * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    colours: np.ndarray = spread.clamp(0, 1).permute(1, 2, 0).numpy()
    return colours


def _overlay(axes: Axes, image: np.ndarray, weights: np.ndarray, farthest: float) -> Any:
    """Lays attention over an image: orange where there is more than uniform, blue where there is less."""
    from matplotlib.colors import LogNorm

    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    axes.imshow(image, extent=extent)
    norm = LogNorm(1 / farthest, farthest, clip=True)  # no attention at all has no logarithm
    return axes.imshow(weights, cmap=_diverging(), norm=norm, extent=extent)


def _diverging() -> Any:
    """From blue over nothing at all to orange."""
    from matplotlib.colors import ListedColormap, to_rgb

    strength = np.linspace(-1, 1, 257)
    less, more = to_rgb("#053a8c"), to_rgb("#ff7a00")
    table = [(*(more if value > 0 else less), 0.85 * abs(value) ** 0.8) for value in strength]
    return ListedColormap(table, "attention")
