# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Figures where a Trainer reports its numbers: TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from .._compat import running_calls
from ..attention_maps import prompt_attention
from ..pruning.report import PruningReport
from .attention import plot_attention_maps, plot_prompt_attention
from .pruning import plot_pruning


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import Trainer


logger = logging.get_logger(__name__)


class FiguresCallback(TrainerCallback):
    """Draws what a few images attend to, at the start and at every evaluation, where the Trainer reports its numbers.

    With `report_to="tensorboard"` or `"wandb"` in `TrainingArguments`, the figures `plot_prompt_attention` and
    `plot_attention_maps` stand beside the losses, a step for each evaluation. The figure of a pruning needs no
    callback: `PruneRewindCallback` reports it. Drawing leaves no trace in the run.

    Example:

        >>> batch = collate([validation[index] for index in range(4)])
        >>> trainer = Trainer(model, args, ..., callbacks=[FiguresCallback(batch)])

    Args:
        inputs: a batch of a few images as the model takes it; with `labels`, the truth is written below each.
        processing_class: the image processor that made the pixels, so that images have their own colours.
        maps: whether to draw attention maps, which need a backbone that sees whole images.

    Raises:
        ImportError: when training begins; matplotlib is not installed.
        ValueError: when training begins; the attention of the model cannot be drawn (`attention_maps`, `rollout`).
    """

    def __init__(self, inputs: dict[str, Any], *, processing_class: Any = None, maps: bool = True) -> None:
        self.inputs = inputs
        self.processing_class = processing_class
        self.maps = maps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws the first figures, so that what cannot be drawn is said before the first step."""
        self._draw(state, kwargs["model"])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws the figures after an evaluation."""
        self._draw(state, kwargs["model"])

    def _draw(self, state: TrainerState, model: Any) -> None:
        figures = {"prompt_attention": plot_prompt_attention(prompt_attention(model, self.inputs))}
        if self.maps:
            figures["attention_maps"] = plot_attention_maps(model, self.inputs, processing_class=self.processing_class)
        if state.is_world_process_zero:
            callers = (call.f_locals.get("self") for call in running_calls())
            handler = next(caller for caller in callers if isinstance(caller, CallbackHandler))
            for name, figure in figures.items():
                report_figure(handler.callbacks, f"figures/{name}", figure, state.global_step)


def report_pruning(trainer: Trainer, report: PruningReport) -> None:
    """Hands the figure of a pruning to what a Trainer reports to, if that shows figures."""
    callbacks = trainer.callback_handler.callbacks
    if not trainer.is_world_process_zero() or not any(takes_figures(callback) for callback in callbacks):
        return
    try:
        figure = plot_pruning(report)
    except ImportError as error:
        logger.warning(f"The figure of the pruning is not reported, only its numbers. {error}")
        return
    report_figure(callbacks, "figures/pruning", figure, trainer.state.global_step)


def report_figure(callbacks: Iterable[TrainerCallback], name: str, figure: Figure, step: int) -> None:
    """Hands a figure to TensorBoard and Weights & Biases, where a Trainer reports to them.

    Args:
        callbacks: those of the Trainer.
        name: what the figure is listed under.
        figure: the figure.
        step: optimizer step at which it was drawn.
    """
    for callback in callbacks:
        if not takes_figures(callback):
            continue
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_image(name, pixels_of(figure), step, dataformats="HWC")
            writer.flush()
        else:
            wandb = import_module("wandb")
            wandb.log({name: wandb.Image(pixels_of(figure)), "train/global_step": step})


def takes_figures(callback: TrainerCallback) -> bool:
    """Whether a callback is one of transformers' for TensorBoard or Weights & Biases, and writes already."""
    from transformers.integrations import TensorBoardCallback, WandbCallback

    if isinstance(callback, TensorBoardCallback):
        return callback.tb_writer is not None
    return isinstance(callback, WandbCallback) and import_module("wandb").run is not None


def pixels_of(figure: Figure) -> np.ndarray:
    """A figure as an image, (height, width, 3) bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
