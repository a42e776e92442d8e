# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`PruneRewindCallback`: train, score, prune, rewind and train again inside one `trainer.train()`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.scheduler import AcceleratedScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .arguments import PruningArguments
from .phases import prune_and_rewind
from .preflight import check_run, find_boundary, try_phases
from .report import REPORT_NAME, PruningReport
from .run_state import TARGET_FILE, RunState
from .schedule import TwoPartSchedule


if TYPE_CHECKING:
    from transformers import Trainer


logger = logging.get_logger(__name__)

__all__ = ["TARGET_FILE", "PruneRewindCallback"]


def _running_trainer() -> Trainer:
    """Finds the `Trainer` whose event is being handled: transformers hands callbacks its parts, but not itself."""
    from transformers import Trainer  # brings datasets and pandas, which importing this package does not need

    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            trainer: Trainer = frame.f_locals["self"]
            return trainer
        frame = frame.f_back
    raise RuntimeError("PruneRewindCallback works inside Trainer.train(): pass it as Trainer(callbacks=[...]).")


class PruneRewindCallback(PruningArguments, TrainerCallback, ExportableState):
    """Runs the phases of E2VPT inside one `Trainer.train()`: train, score, prune, rewind, train to the end.

    The first part trains all prompts. Between two optimizer steps the prompts are scored on training data, pruned, and
    rewound together with the head. The second part then has the user's learning rate, weight decay and a complete
    warm-up and decay of its own, with a fresh optimizer state. `load_best_model_at_end` and `EarlyStoppingCallback`
    see the second part only. A run resumed from any checkpoint equals the straight run.

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
            in the output folder and in every later checkpoint, where it also is for a run that is resumed with
            `restore_callback_states_from_checkpoint`, in which the Trainer works with a copy of the callback.

    Raises:
        TypeError: at construction; an amount is neither a ratio nor a number, or `quality` is of a wrong type.
        ValueError: at construction or when training begins; an argument is impossible, the run is too short for two
            parts, the model has no visual prompts or is frozen, a set to score or search on is missing or empty, a
            phase fails on its first batch, or the run shards the model in a way that hides the trained tensors (FSDP1,
            DeepSpeed without ZeRO, an optimizer on a disk).
    """

    report: PruningReport | None = None
    _not_saved: Sequence[str] = ()
    _boundary = 0
    _schedule: TwoPartSchedule | None = None
    _trainer: Trainer | None = None

    @cached_property
    def _run(self) -> RunState:
        return RunState()

    # --------------------------------------------------------------------------------------------- what a resume needs
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback: its arguments and how far the run is."""
        held, left_out = self.exported_arguments()
        return {"args": held, "attributes": {**self._run.exported(), "_not_saved": left_out}}

    def _resume(self, state: TrainerState, output_dir: str) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if not isinstance(saved, dict):
            raise ValueError(
                f"The checkpoint at step {state.global_step} was made without PruneRewindCallback, so its first part "
                "has no start to rewind to: train from the beginning, or resume without the callback."
            )
        self._run.restore(saved["attributes"])
        self.report = None
        if self._run.pruned:
            assert self._run.target_path is not None
            folders = (Path(output_dir), Path(self._run.target_path).parent)
            self.report = PruningReport.load(next((f for f in folders if (f / REPORT_NAME).exists()), output_dir))
        elif self.rewind_to in ("init", "early"):
            self._run.load_target()

    # ------------------------------------------------------------------------------------------------- training begins
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the run has room and means for its phases, and keeps the values to rewind to."""
        trainer = self._trainer = self.trainer or kwargs.get("trainer") or _running_trainer()
        for name in self._not_saved:
            if getattr(self, name, None) is None:
                raise ValueError(
                    f"The checkpoint cannot hold the {name} of PruneRewindCallback: leave "
                    "restore_callback_states_from_checkpoint at False, and the callback that was passed goes on."
                )
        adapter_name, layers = check_run(trainer, self)
        self._boundary = find_boundary(self, args, state, trainer.callback_handler.train_dataloader)
        if state.global_step > 0:
            self._resume(state, args.output_dir)
        if state.global_step == 0 or not self._run.pruned:
            try_phases(trainer, self, adapter_name, layers)
        if state.global_step == 0:
            self._run.begin(trainer, adapter_name)
            self.report = None
        scheduler, made_by_trainer = trainer.lr_scheduler, trainer._created_lr_scheduler
        if isinstance(scheduler, AcceleratedScheduler):  # DeepSpeed steps it, and has the Trainer make it
            scheduler, made_by_trainer = scheduler.scheduler, True
        second_steps = state.max_steps - self._boundary
        self._schedule = TwoPartSchedule(
            scheduler, args, made_by_trainer, self._boundary, second_steps, self._run.second_start
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
        if self.rewind_to == "early" and state.global_step == self.early_steps:
            self._run.keep_target(trainer)
        if state.global_step < self._boundary:
            return
        self.report = prune_and_rewind(trainer, self, self._run, state.global_step)
        self._schedule.restart()
        self._run.pruned, self._run.second_start = True, self._schedule.second_start
        if trainer.is_world_process_zero():
            self.report.save(trainer.args.output_dir)
        trainer.log(self.report.numbers())

    # --------------------------------------------------------------------------------------------------------- the end
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the report beside the adapter of a checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.report is not None and state.is_world_process_zero and folder.is_dir():
            self.report.save(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says so where training ended before the model was pruned."""
        self._trainer = None
        self._run.end()
        if not self._run.pruned:
            logger.warning(f"Training ended at step {state.global_step}, before it was to prune at {self._boundary}.")
