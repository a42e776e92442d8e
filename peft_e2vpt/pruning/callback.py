# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`PruneRewindCallback`: train, score, prune, rewind and train again inside one `trainer.train()`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from accelerate.scheduler import AcceleratedScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..training.callback import begin_recipes
from ..training.optimizer import warn_of_small_rates
from ..training.running import output_folder, resumed_checkpoint, running_trainer, written_checkpoint
from .arguments import PruningArguments
from .optimizer_start import OptimizerStart, evaluated_values
from .phases import prune_and_rewind
from .preflight import check_run, find_boundary, try_phases
from .report import REPORT_NAME, PruningReport
from .run_state import TARGET_FILE, RunState
from .schedule import TwoPartSchedule


if TYPE_CHECKING:
    from transformers import Trainer


logger = logging.get_logger(__name__)

__all__ = ["TARGET_FILE", "PruneRewindCallback"]


class PruneRewindCallback(PruningArguments, TrainerCallback, ExportableState):
    """Runs the phases of E2VPT inside one `Trainer.train()`: train, score, prune, rewind, train to the end.

    The first part trains all prompts. Between two optimizer steps the prompts are scored on training data, pruned, and
    rewound together with the head. The second part then has the user's learning rate, weight decay and a complete
    warm-up and decay of its own, with a fresh optimizer state. `load_best_model_at_end` and `EarlyStoppingCallback`
    see the second part only. A run resumed from any checkpoint equals the straight run; all that it needs lies in the
    checkpoint. Resumed for more or fewer epochs, it stays pruned if it is, and each part that is still to end has a
    schedule that ends with it.

    Without `prune_tokens`, `prune_segments` and `max_tuned_percentage` the amounts are searched on the Trainer's
    evaluation set. Every phase is tried on one batch before the first step, so that none fails half-way for a reason
    known before. Works on one process or many, under DDP, FSDP2 and DeepSpeed's ZeRO; every process has the same gates
    and values.

    Example:

        >>> callback = PruneRewindCallback(prune_tokens=0.5, prune_segments=0.25)  # or no amounts: search them
        >>> trainer = Trainer(model, args, train_dataset=train, eval_dataset=validation, callbacks=[callback])
        >>> trainer.train()
        >>> callback.report.tuned_percentage_after

    Args:
        prune_after (`float`, *optional*, defaults to 0.5):
            When the first part ends, in `unit`.
        unit (`str`, *optional*, defaults to `"fraction"`):
            `"fraction"` of all optimizer steps, `"epochs"` or `"steps"`.
        prune_tokens (`float` or `int`, *optional*):
            The ratio (float) or number (int) of prompts to prune in every layer.
        prune_segments (`float` or `int`, *optional*):
            The ratio or number of segments to prune in every prompt that stays.
        max_tuned_percentage (`float`, *optional*):
            Budget instead: prune until prompts and head are at most so many percent of the model.
        min_tokens (`int`, *optional*, defaults to 1):
            Prompts that stay in every layer at least.
        min_segments (`int`, *optional*, defaults to 4):
            Segments that stay in every prompt at least.
        rewind_to (`str`, *optional*, defaults to `"init"`):
            `"init"`: the values at the start of training. `"early"`: those after `early_steps` steps. `"fresh"`: a new
            draw. `"none"`: keeps the trained values.
        early_steps (`int`, *optional*, defaults to 0):
            The step to rewind to with `rewind_to="early"`.
        token_ratios (`Sequence[float]`, *optional*, defaults to 0, 0.1, ..., 0.9):
            The ratios of prompts that a search compares.
        segment_ratios (`Sequence[float]`, *optional*, defaults to 0, 0.1, ..., 0.9):
            The ratios of segments that a search compares.
        max_score_batches (`int`, *optional*):
            Training batches per process to score with; by default all.
        validation_dataset (*optional*):
            What prunings are compared on; by default the Trainer's evaluation set.
        quality (`str`, `Callable` or `ModelQuality`, *optional*):
            What prunings are compared by: the name of a metric of the Trainer's evaluation; a function of the model's
            output and a batch, which returns one number per sample or one for the batch; or a `ModelQuality`. By
            default `metric_for_best_model` where the Trainer has `compute_metrics`, else accuracy where every sample
            has a single label, else minus the evaluation loss.
        greater_is_better (`bool`, *optional*):
            Whether a higher quality is better. By default as the Trainer has it for its own metric, no for the name
            of a loss, and yes for all else.
        score_dataset (*optional*):
            What prompts are scored on; by default the training set. A training set that is a stream needs this or
            `max_score_batches`.
        trainer (`Trainer`, *optional*):
            The Trainer, which is found otherwise; may be set as an attribute later.
        tokens (`float` or `int`, *optional*):
            Deprecated, the former name of `prune_tokens`.
        segments (`float` or `int`, *optional*):
            Deprecated, the former name of `prune_segments`.

    Attributes:
        report: the `PruningReport` once the model is pruned, before that `None`. It is saved as `pruning_report.json`
            in the output folder, that of the trial in a search, and in every later checkpoint, where it also is for a
            run that is resumed with `restore_callback_states_from_checkpoint`, in which the Trainer works with a copy
            of the callback.

    Raises:
        TypeError: at construction; an amount is neither a ratio nor a number, or `quality` is of a wrong type.
        ValueError: at construction or when training begins; an argument is impossible, the run is too short for two
            parts, the model has no visual prompts or is frozen, a set to score or search on is missing or empty, a
            phase fails on its first batch, or the run shards the model in a way that hides the trained tensors (FSDP1,
            DeepSpeed without ZeRO, an optimizer on a disk).
    """

    report: PruningReport | None = None
    _not_saved: Mapping[str, bool] = MappingProxyType({})
    _boundary = 0
    _schedule: TwoPartSchedule | None = None
    _trainer: Trainer | None = None

    @cached_property
    def _run(self) -> RunState:
        return RunState()

    # --------------------------------------------------------------------------------------------- what a resume needs
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback: its arguments and how far the run is.

        The Trainer asks for it in the middle of writing a checkpoint, before it uploads the folder, marks it as
        complete or deletes older ones; so this is when the files of the callback are written into the folder.
        """
        folder = written_checkpoint()
        if folder is not None and self._trainer is not None:
            self._run.save(folder, self.report)
        held, attributes, left_out = self.exported_arguments()
        return {"args": held, "attributes": {**attributes, **self._run.exported(), "_not_saved": left_out}}

    def _resume(self, trainer: Trainer) -> None:
        state, folder = trainer.state, resumed_checkpoint(trainer)
        callbacks = state.stateful_callbacks
        kept = {n: s.get("attributes", {}) for n, s in callbacks.items() if isinstance(s, dict)}
        saved = next((name for name, attributes in kept.items() if "_pruned" in attributes), None)
        if saved is None:
            raise ValueError(
                f"The checkpoint at step {state.global_step} was made without PruneRewindCallback, so its first part "
                "has no start to rewind to: train from the beginning, or resume without the callback."
            )
        callbacks[type(self).__name__] = callbacks.pop(saved)  # the Trainer saves by the name of the class
        target_step = {"init": 0, "early": self.early_steps}.get(self.rewind_to)
        if self.rewind_to == "early" and state.global_step <= self.early_steps:
            target_step = None  # still to come
        self._run.resume(kept[saved], folder, trainer, target_step)
        if self._run.pruned:
            folders = (folder, folder.parent)  # older checkpoints have it beside them
            self.report = PruningReport.load(next((f for f in folders if (f / REPORT_NAME).exists()), folder))
            if trainer.is_world_process_zero():
                self.report.save(output_folder(trainer))  # which may be another folder now

    # ------------------------------------------------------------------------------------------------- training begins
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the run has room and means for its phases, and keeps the values to rewind to."""
        trainer = self._trainer = self.trainer or kwargs.get("trainer") or running_trainer()
        older = not isinstance(self._not_saved, Mapping)  # a list, from a checkpoint of an earlier version
        for name, made_from in (dict.fromkeys(self._not_saved, False) if older else self._not_saved).items():
            if made_from or getattr(self, name, None) is None:
                raise ValueError(
                    f"The checkpoint cannot hold the {name} of PruneRewindCallback: leave "
                    "restore_callback_states_from_checkpoint at False, and the callback that was passed goes on."
                )
        begin_recipes(trainer)  # the head's start is part of what is rewound to
        adapter_name, layers = check_run(trainer, self)
        warn_of_small_rates(trainer.model, trainer.optimizer)
        resumed = state.global_step > 0
        self._run.begin(trainer, adapter_name, resumed)
        self.report = None
        if resumed:
            self._resume(trainer)
        elif self.rewind_to == "init":
            self._run.keep_target(trainer)
        train_dataloader = trainer.callback_handler.train_dataloader
        pruned_at = None if self.report is None else self.report.step
        self._boundary = find_boundary(self, args, state, train_dataloader, pruned_at)
        if not self._run.pruned:
            with evaluated_values(trainer):
                try_phases(trainer, self, adapter_name, layers)
        scheduler, made_by_trainer = trainer.lr_scheduler, trainer._created_lr_scheduler
        if isinstance(scheduler, AcceleratedScheduler):  # DeepSpeed steps it, and has the Trainer make it
            scheduler, made_by_trainer = scheduler.scheduler, True
        second_steps = state.max_steps - self._boundary
        self._schedule = TwoPartSchedule(
            scheduler, args, made_by_trainer, self._boundary, second_steps, self._run.second_start, state.global_step
        )

    # ----------------------------------------------------------------------------------------------- between two steps
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prunes and rewinds before the first step of the second part, when the first was evaluated and saved."""
        if self._run.pruned:
            return
        # no evaluation of the first part is the best so far, for the Trainer or for EarlyStoppingCallback
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        trainer = self._trainer
        assert trainer is not None and self._schedule is not None
        if state.global_step == 0:
            self._run.optimizer_start = OptimizerStart.of(trainer)
        if self.rewind_to == "early" and state.global_step == self.early_steps:
            self._run.keep_target(trainer)
        if state.global_step < self._boundary:
            return
        self.report = prune_and_rewind(trainer, self, self._run, state.global_step)
        self._schedule.restart()
        self._run.pruned, self._run.second_start = True, self._schedule.second_start
        if trainer.is_world_process_zero():
            self.report.save(output_folder(trainer))
        trainer.log(self.report.numbers())
        from ..plotting.tracking import report_pruning  # figures stand above the phases that they draw

        report_pruning(trainer, self.report)

    # --------------------------------------------------------------------------------------------------------- the end
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says so where training ended before the model was pruned."""
        self._trainer = None
        self._run.end()
        if not self._run.pruned:
            log = logger.warning if state.trial_params is None else logger.info  # a search ends trials early
            log(f"Training ended at step {state.global_step}, before it was to prune at {self._boundary}.")
