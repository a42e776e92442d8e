# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Preflight: what the phases of a run will need is checked, and tried on one batch, before its first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..evaluation import no_trace
from ..training.trainer_data import (
    PreparedBatches,
    has_share,
    is_stream,
    scoring_batches,
    validation_batches,
    validation_dataset_of,
)
from ..tuner.layer import DATA_PARALLEL, E2VPTLayer
from ..tuner.prompt_layers import active_prompt_layers, visual_prompt_layers
from .arguments import PruningArguments
from .importance import score_prompts, zero_scores
from .phases import choose, search_amounts
from .quality import BatchQuality, ModelQuality
from .rewinding import redraw, rewind, trained_tensors
from .trainer_quality import TrainerMetric, quality_of


if TYPE_CHECKING:
    from transformers import Trainer


def check_run(trainer: Trainer, arguments: PruningArguments) -> tuple[str, list[E2VPTLayer]]:
    """Checks model, sharding and data of a run, without running the model.

    Returns:
        The name of the adapter that is trained, and its prompt layers.

    Raises:
        ValueError: the run cannot be pruned.
    """
    callbacks = trainer.callback_handler.callbacks
    if sum(isinstance(callback, PruningArguments) for callback in callbacks) > 1:
        raise ValueError("The Trainer has more than one PruneRewindCallback: pass one.")
    visual_prompt_layers(trainer.model)
    adapter_name, layers = active_prompt_layers(trainer.model)
    _check_sharding(trainer)
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise ValueError(
            f"The adapter {adapter_name!r} is frozen, so there is nothing to train: load it with is_trainable=True, "
            "as in peft_e2vpt.load(..., is_trainable=True) or PeftModel.from_pretrained(..., is_trainable=True)."
        )
    _check_training_data(trainer, arguments)
    if arguments.searches:
        validation_dataset_of(trainer, arguments.validation_dataset)
    else:
        choose(trainer, arguments, zero_scores(layers, layers[0].e2vpt_config[adapter_name]), adapter_name)
    return adapter_name, layers


def find_boundary(
    arguments: PruningArguments,
    args: TrainingArguments,
    state: TrainerState,
    train_dataloader: Any,
    pruned_at: int | None = None,
) -> int:
    """The optimizer step after which the first part ends, or has ended.

    A run that is resumed may have become longer or shorter. Where it was pruned stays; where it has gone past the step
    at which it would be now, it is pruned before its next step.

    Args:
        arguments: of the callback.
        args: of the Trainer.
        state: how far the run is, and how many steps it will have.
        train_dataloader: the training set in batches.
        pruned_at: the step after which the run was pruned, where it was.

    Raises:
        ValueError: the run has no room for two parts, or fewer steps than lie behind it.
    """
    done, total = int(state.global_step), int(state.max_steps)
    sized = has_length(train_dataloader)
    per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps) if sized else 0
    trains_on = sized and done % per_epoch > 0  # the Trainer ends a run at once at the end of an epoch only
    if done > total or (done == total and (pruned_at is None or trains_on)):
        when = "before" if pruned_at is None else "after"
        raise ValueError(
            f"The checkpoint is at step {done}, {when} pruning, and the run is to have {total} optimizer steps: "
            "nothing is left to train. Raise num_train_epochs or max_steps, or load the adapter of the checkpoint."
        )
    if pruned_at is not None:
        return pruned_at
    steps_per_unit = {"fraction": total, "epochs": per_epoch, "steps": 1}[arguments.unit]
    boundary = round(float(arguments.prune_after * steps_per_unit))
    first = max(1, arguments.early_steps)
    if total <= first:
        raise ValueError(
            f"The run has {total} optimizer steps, and one with pruning needs at least {first + 1}, one in "
            "each part: train longer, or prune a trained adapter with peft-e2vpt prune."
        )
    if not first <= boundary < total:
        raise ValueError(
            f"The run has {total} optimizer steps, and the first part would end after {boundary}: it has to "
            f"end after step {first} to {total - 1}. Train longer or change prune_after."
        )
    return max(boundary, done)


def _check_sharding(trainer: Trainer) -> None:
    state = trainer.accelerator.state
    if trainer.args.n_gpu > 1 and not getattr(trainer, "is_model_parallel", False):
        raise ValueError(DATA_PARALLEL)
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "PruneRewindCallback works under FSDP2, but this run uses FSDP1, which hides single parameters in flat "
            "ones: set version to 2 in fsdp_config."
        )
    if not trainer.is_deepspeed_enabled:
        return
    plugin = state.deepspeed_plugin
    if plugin.zero_stage == 0:
        raise ValueError(
            "PruneRewindCallback works under DeepSpeed's ZeRO, but the DeepSpeed configuration has stage 0: set "
            "zero_optimization.stage to 1, 2 or 3."
        )
    if plugin.get_value("zero_optimization.offload_optimizer.device") == "nvme":
        raise ValueError(
            "PruneRewindCallback clears the state of the optimizer, which cannot be done on a disk: set "
            "zero_optimization.offload_optimizer.device to 'cpu' or 'none', got 'nvme'."
        )


def _check_training_data(trainer: Trainer, arguments: PruningArguments) -> None:
    if arguments.score_dataset is not None:
        if is_stream(arguments.score_dataset):
            raise ValueError(
                "score_dataset is a set with a length and an index, got the stream "
                f"{type(arguments.score_dataset).__name__}."
            )
        return
    dataloader = trainer.callback_handler.train_dataloader
    dataset = trainer.train_dataset if trainer.train_dataset is not None else getattr(dataloader, "dataset", None)
    ends = has_length(dataloader) and (dataset is None or not is_stream(dataset))
    if arguments.max_score_batches is None and not ends and not has_share(dataloader):
        raise ValueError(
            "PruneRewindCallback scores prompts on the training set and needs one with a length and an index, got the "
            f"stream {type(dataset if dataset is not None else dataloader).__name__}: pass another set as "
            "score_dataset, or as max_score_batches how many batches of the stream to score on."
        )


@contextmanager
def _trying(what: str, remedy: str, passing: tuple[type[Exception], ...] = (ValueError, TypeError)) -> Iterator[None]:
    """Says in words what failed on the batch; errors that say so themselves, and a lack of memory, pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (*passing, FloatingPointError)) or should_reduce_batch_size(error):
            raise
        raise ValueError(
            f"PruneRewindCallback tried to {what} on one batch before training, and got {type(error).__name__}: "
            f"{error}. {remedy}"
        ) from error


def _first_batch(trainer: Trainer, batches: PreparedBatches, name: str) -> list[Any]:
    """The first batch of a set, in a list; empty in a process without one.

    Raises:
        ValueError: a transform of the set misses a column that the Trainer has removed.
    """
    with no_trace(trainer.model, batches.dataloader, trainer.args.seed):
        try:
            with _trying(f"read the {name} set", "Look at its transforms and its collate function.", (KeyError,)):
                return list(islice(batches, 1))
        except KeyError as error:
            raise ValueError(
                f"Reading the {name} set failed: missing key {error}. If that is a column that a transform of the set "
                "needs, the Trainer has removed it: pass remove_unused_columns=False to TrainingArguments."
            ) from error


def try_phases(trainer: Trainer, arguments: PruningArguments, adapter_name: str, layers: list[E2VPTLayer]) -> None:
    """Scores, compares and draws on one batch, and leaves no trace of it.

    Raises:
        ValueError: a phase would fail.
        TypeError: a batch is not a dictionary.
        FloatingPointError: a gradient is not finite.
    """
    model: nn.Module = trainer.model
    training = scoring_batches(trainer, arguments.score_dataset)
    batch = _first_batch(trainer, training, "training")
    with _trying("score prompts", "Pass a set that prompts can be scored on as score_dataset."):
        score_prompts(model, batch, adapter_name=adapter_name, loss_fn=trainer.compute_loss, seed=trainer.args.seed)
    if arguments.searches:
        _try_search(trainer, arguments, adapter_name, layers)
    if arguments.rewind_to == "fresh":
        with no_trace(model, ()), torch.no_grad():
            values = trained_tensors(model)
            try:
                redraw(model, adapter_name, trainer.args.seed + 1)
            finally:
                rewind(model, values)


def _try_search(trainer: Trainer, arguments: PruningArguments, adapter_name: str, layers: list[E2VPTLayer]) -> None:
    quality = quality_of(trainer, arguments.quality, arguments.greater_is_better, arguments.validation_dataset)
    if isinstance(quality, ModelQuality):
        _try_model_quality(trainer, quality)
        return
    validation = validation_batches(trainer, arguments.validation_dataset)
    batch = _first_batch(trainer, validation, "evaluation")
    scores = zero_scores(layers, layers[0].e2vpt_config[adapter_name])
    own = isinstance(quality, BatchQuality) and quality.quality is not None
    remedy = "Pass quality, a function of the model's output and a validation batch, or the name of a metric."
    with _trying("compare prunings", remedy, () if own else (ValueError, TypeError)):
        search_amounts(trainer, arguments, scores, adapter_name, batch, quality, most_only=True)


def _try_model_quality(trainer: Trainer, quality: ModelQuality) -> None:
    """Measures the model once: by one batch where the Trainer evaluates, or by all where that is not enough."""
    model, metric = trainer.model, quality.function
    with no_trace(model, (), trainer.args.seed):
        if isinstance(metric, TrainerMetric):
            try:
                metrics = metric.metrics_of_one_batch()
            except Exception as error:  # a metric may need more than a batch, both classes for instance
                if should_reduce_batch_size(error):
                    raise
            else:
                metric.pick(metrics)
                return
        with _trying("measure the quality", "Pass another quality to PruneRewindCallback.", (ValueError,)):
            quality(model)
