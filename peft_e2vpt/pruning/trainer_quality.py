# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Measuring pruning candidates as a Trainer measures its model: with its metrics, or by its loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..training.trainer_data import OneBatch, validation_dataloader, validation_dataset_of
from .quality import BatchQuality, Forward, ModelQuality, Quality, run


if TYPE_CHECKING:
    from transformers import Trainer


def forward_of(trainer: Trainer) -> Forward:
    """How a Trainer runs its model on an evaluation batch: by its own loss, where that is not the model's."""
    from transformers import Trainer

    own_loss = getattr(trainer.compute_loss, "__func__", None) is not Trainer.compute_loss
    if not own_loss and trainer.compute_loss_func is None and trainer.label_smoother is None:
        return run

    def forward(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor | None, Any]:
        loss, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True)
        return loss, outputs

    return forward


@contextmanager
def _quiet(trainer: Trainer) -> Iterator[None]:
    """Lets a Trainer evaluate without a word to callbacks, log and trackers."""
    handler, state = trainer.callback_handler, trainer.state
    callbacks, dataloader, history = handler.callbacks, handler.eval_dataloader, list(state.log_history)
    control = copy.copy(trainer.control)
    handler.callbacks = []
    try:
        yield
    finally:
        handler.callbacks, handler.eval_dataloader = callbacks, dataloader
        state.log_history, trainer.control = history, control


class TrainerMetric:
    """A metric of the Trainer's evaluation, such as `"accuracy"`, `"mean_iou"` or `"loss"`, for a `ModelQuality`.

    Every candidate is evaluated by `Trainer.evaluate`: with `compute_metrics`, `preprocess_logits_for_metrics`,
    `label_names` and whatever a subclass overrides, over all predictions and all processes.

    Args:
        trainer: a Trainer that trains.
        name: the metric, with or without `eval_`.
        validation_dataset: the set, by default the Trainer's.
    """

    def __init__(self, trainer: Trainer, name: str, validation_dataset: Any = None) -> None:
        self.trainer, self.validation_dataset = trainer, validation_dataset
        self.name = name if name.startswith("eval_") else f"eval_{name}"

    def __call__(self, model: nn.Module) -> float:
        """The metric of the model as it stands.

        Raises:
            ValueError: the evaluation does not give it.
        """
        data = validation_dataset_of(self.trainer, self.validation_dataset)
        with _quiet(self.trainer):
            return self.pick(self.trainer.evaluate(data) if data is not None else self.trainer.evaluate())

    def metrics_of_one_batch(self) -> dict[str, float]:
        """All that the Trainer measures, on the first batch of the set alone."""
        batch = next(iter(validation_dataloader(self.trainer, self.validation_dataset)))
        with _quiet(self.trainer):
            metrics: dict[str, float] = self.trainer.evaluation_loop(OneBatch(batch), "Trying").metrics
            return metrics

    def pick(self, metrics: dict[str, float]) -> float:
        """The metric among others.

        Raises:
            ValueError: it is not among them.
        """
        if self.name not in metrics:
            raise ValueError(
                f"Pruning candidates are compared by {self.name}, but the Trainer's evaluation gives only "
                f"{', '.join(metrics)}: let compute_metrics return it, or pass another quality to "
                "PruneRewindCallback."
            )
        return float(metrics[self.name])


def quality_of(
    trainer: Trainer,
    quality: str | Quality | ModelQuality | None,
    greater_is_better: bool | None,
    validation_dataset: Any,
) -> BatchQuality | ModelQuality:
    """What a run compares pruning candidates by.

    Args:
        trainer: a Trainer that trains.
        quality: the name of a metric, a function of output and batch, or one of the model. By default
            `metric_for_best_model` where the Trainer has `compute_metrics`, else accuracy or minus the loss.
        greater_is_better: whether a higher number is better; by default as the Trainer has it for its own metric, no
            for a loss, and yes for all else.
        validation_dataset: the set, by default the Trainer's.
    """
    if quality is None and trainer.compute_metrics is not None:
        quality = trainer.args.metric_for_best_model
        if greater_is_better is None and quality is not None:
            greater_is_better = trainer.args.greater_is_better
    if isinstance(quality, ModelQuality):
        return quality if greater_is_better is None else ModelQuality(quality.function, greater_is_better)
    if isinstance(quality, str):
        if greater_is_better is None:
            greater_is_better = not quality.endswith("loss")
        return ModelQuality(TrainerMetric(trainer, quality, validation_dataset), greater_is_better)
    # a quality of the user's sees the output of the model alone, unless only the Trainer knows how to call it
    return BatchQuality(quality, forward_of(trainer), greater_is_better is not False)
