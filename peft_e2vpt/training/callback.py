# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`RecipeCallback`: what makes prompts win in few epochs, inside `Trainer.train()`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .head_start import MAX_SAMPLES, HeadStart, fold_heads, standardised_layers, start_heads
from .optimizer import (
    HEAD,
    HEAD_LEARNING_RATE,
    KV_PROMPTS,
    LEARNING_RATE,
    TRAINER_LEARNING_RATE,
    VISUAL_PROMPTS,
    split_groups,
    warn_of_small_rates,
)
from .running import resumed_checkpoint, running_trainer, written_checkpoint
from .standardise import MEAN, SCALE, standardise
from .trainer_data import training_batches


if TYPE_CHECKING:
    from transformers import Trainer


logger = logging.get_logger(__name__)

HEADS_FILE = "_standardised_heads.safetensors"
TENSORS = (MEAN, SCALE, "weight", "bias")
RATES = ("learning_rate", "kv_learning_rate", "head_learning_rate")


class RecipeCallback(TrainerCallback, ExportableState):
    """Starts the head as a linear probe, and gives prompts and head learning rates of their own.

    The rates are set when the Trainer makes its optimizer, whichever its arguments name; the schedule scales all
    alike. When training begins, `start_heads` fits the last layer of the head to the features of the training set, on
    which it then learns standardised. Everything that is saved holds the plain head, and after training so does the
    model. A run resumed from a checkpoint equals the straight run to the bit. `PruneRewindCallback` rewinds the head
    to its start, whichever of the two callbacks comes first.

    One callback serves any number of trainings, also after one that was stopped, and the trials of
    `Trainer.hyperparameter_search`: a rate that a trial draws by the name of an argument of this callback takes its
    place in that trial.

    Works with E2VPT, with other methods of PEFT that train a head (`modules_to_save`) and with plain models.

    Example:

        >>> trainer = Trainer(model, args, train_dataset=train, callbacks=[RecipeCallback()])
        >>> trainer.train()

    Args:
        learning_rate (`float`, *optional*):
            Of prompts. By default `TrainingArguments.learning_rate`, and 6e-3 where that is 5e-5, the Trainer's own
            default. What is neither prompt nor head has that of the `TrainingArguments`.
        kv_learning_rate (`float`, *optional*):
            Of key-value prompts; by default that of the visual ones.
        head_learning_rate (`float`, *optional*, defaults to 3e-4):
            Of the head.
        start_head (`bool`, *optional*, defaults to `True`):
            Whether the head starts as a linear probe on standardised features.
        weight_decay_of_start (`float`, *optional*, defaults to 0.1):
            `weight_decay` of `start_heads`.
        max_samples (`int`, *optional*, defaults to 10,000):
            Images to fit the head to, drawn from the training set.

    Attributes:
        head_start: what `start_heads` has done, `None` before that and in a resumed run.

    Raises:
        ValueError: at construction or in a trial, a rate is not above 0; when training begins, a file of the
            checkpoint is damaged.
        FileNotFoundError: when training begins, the checkpoint to resume from was made without this callback.
    """

    def __init__(
        self,
        learning_rate: float | None = None,
        kv_learning_rate: float | None = None,
        head_learning_rate: float = HEAD_LEARNING_RATE,
        start_head: bool = True,
        weight_decay_of_start: float = 0.1,
        max_samples: int = MAX_SAMPLES,
    ) -> None:
        _check_rates(dict(zip(RATES, (learning_rate, kv_learning_rate, head_learning_rate), strict=True)))
        self.learning_rate = learning_rate
        self.kv_learning_rate = kv_learning_rate
        self.head_learning_rate = head_learning_rate
        self.start_head = start_head
        self.weight_decay_of_start = weight_decay_of_start
        self.max_samples = max_samples
        self.head_start: HeadStart | None = None
        self._trainer: Trainer | None = None
        self._training: TrainerState | None = None  # the training that has begun: every one has a state of its own
        self._model: nn.Module | None = None

    # -------------------------------------------------------------------------------------------------- learning rates
    def rates(self, args: TrainingArguments, trial: Mapping[str, Any] | None = None) -> dict[str, float | None]:
        """The learning rate of every part, `None` for that of the arguments.

        Args:
            args: of the Trainer.
            trial: what a trial of a search has drawn (`TrainerState.trial_params`).

        Raises:
            ValueError: a rate of the trial is not above 0.
        """
        drawn = {name: float(trial[name]) for name in RATES if name in trial} if trial else {}
        _check_rates(drawn)
        prompts, kv_prompts, head = (drawn.get(name, getattr(self, name)) for name in RATES)
        if prompts is None:
            prompts = LEARNING_RATE if args.learning_rate == TRAINER_LEARNING_RATE else args.learning_rate
        return {VISUAL_PROMPTS: prompts, KV_PROMPTS: prompts if kv_prompts is None else kv_prompts, HEAD: head}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Has the Trainer make its optimizer with these rates."""
        trainer: Any = running_trainer()
        make = trainer.create_optimizer

        def create_optimizer(model: nn.Module | None = None) -> Any:
            given = trainer.optimizer is not None
            optimizer = make(model)
            groups = getattr(optimizer, "param_groups", None)
            if not given and groups is not None:
                rates = self.rates(trainer.args, trainer.state.trial_params)
                split = split_groups(trainer.model if model is None else model, list(groups), rates)
                groups.clear()
                for group in split:
                    optimizer.add_param_group(group)
            return optimizer

        trainer.create_optimizer = create_optimizer

    # ----------------------------------------------------------------------------------------------------------- heads
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the head, or takes it up where a checkpoint has left it."""
        self.begin(running_trainer())

    def begin(self, trainer: Trainer) -> None:
        """Does what training begins with, once; a callback that needs the head's start asks for it."""
        if self._training is trainer.state:
            return
        out_of_memory = trainer.args.auto_find_batch_size and self._model is trainer.model
        self._training, self._model, self._trainer = trainer.state, trainer.model, trainer
        if out_of_memory:
            return  # the same model begins anew with smaller batches, and has its start
        groups = getattr(trainer.optimizer, "param_groups", ())
        if groups and not any("part" in group for group in groups):
            logger.warning(
                "The optimizer was made without the learning rates of RecipeCallback, and keeps its own. For the "
                "callback's, pass it as Trainer(callbacks=[...]), or make the optimizer with create_e2vpt_optimizer."
            )
        warn_of_small_rates(trainer.model, trainer.optimizer)
        if not self.start_head:
            return
        if trainer.state.global_step > 0:
            self._resume(trainer, resumed_checkpoint(trainer))
            return
        data = training_batches(trainer, self.max_samples)
        names = trainer.label_names or ["labels"]
        with trainer.accelerator.autocast():
            self.head_start = start_heads(
                trainer.model, data, self.weight_decay_of_start, self.max_samples, names[0], trainer.args.seed
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes the head plain."""
        if self._trainer is not None:
            fold_heads(self._trainer.model)
        self._training = self._model = self._trainer = None

    # ------------------------------------------------------------------------------------------------- in a checkpoint
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback, its arguments; tensors go into the folder that is being written.

        A file of its own, for folding rounds: unfolded again, the head would differ from that of the straight run.
        """
        folder = written_checkpoint()
        if folder is not None and self._trainer is not None and self.start_head:
            layers = standardised_layers(self._trainer.model)
            save_file(
                {
                    f"{path}.{name}": getattr(layer, name).detach().cpu().contiguous()
                    for path, layer in layers.items()
                    for name in TENSORS
                    if getattr(layer, name) is not None
                },
                folder / HEADS_FILE,
            )
        names = (*RATES, "start_head", "weight_decay_of_start", "max_samples")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {}}

    def _resume(self, trainer: Trainer, folder: Path) -> None:
        path = folder / HEADS_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing, which holds the head as it learns: copy the whole folder of the checkpoint. If "
                "it was made without RecipeCallback, resume without it, or with RecipeCallback(start_head=False)."
            )
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path}, which holds the head as it learns, is damaged ({error}): resume from another checkpoint."
            ) from error
        with torch.no_grad():
            for layer_path in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
                layer = trainer.model.get_submodule(layer_path)
                standardise(layer, *(tensors[f"{layer_path}.{name}"] for name in (MEAN, SCALE)))
                for name in ("weight", "bias"):
                    if f"{layer_path}.{name}" in tensors:
                        getattr(layer, name).copy_(tensors[f"{layer_path}.{name}"])


def _check_rates(rates: Mapping[str, float | None]) -> None:
    for name, rate in rates.items():
        if rate is not None and not rate > 0:
            raise ValueError(f"{name} must be above 0, got {rate}.")


def begin_recipes(trainer: Trainer) -> None:
    """Has the `RecipeCallback`s of a Trainer do what training begins with, whatever their place in its list."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RecipeCallback):
            callback.begin(trainer)
