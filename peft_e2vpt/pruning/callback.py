# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`PruneRewindCallback`: train, score, prune, rewind and train again inside one `trainer.train()`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..evaluation import no_trace
from ..tuner.prompt_layers import visual_prompt_layers
from .importance import ImportanceScores, score_prompts, zero_scores
from .ranking import (
    MIN_SEGMENTS,
    MIN_TOKENS,
    Gates,
    apply_gates,
    check_ratio,
    current_gates,
    prune,
    prune_to_percentage,
)
from .report import REPORT_NAME, PruningReport
from .rewinding import redraw, rewind, trained_tensors
from .schedule import TwoPartSchedule
from .search import RATIOS, PruningSearch, labels_of, search_pruning


if TYPE_CHECKING:
    from transformers import Trainer


logger = logging.get_logger(__name__)

UNITS = ("fraction", "epochs", "steps")
TARGETS = ("init", "early", "fresh", "none")
TARGET_FILE = "_rewind_target.safetensors"  # Trainer.push_to_hub leaves names with a leading underscore out


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


class _Prepared(DataLoader[Any]):
    """Batches as the Trainer gives them to the model: on its device, and under DeepSpeed in its type."""

    def __init__(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare = trainer._prepare_inputs

    def __iter__(self) -> Any:
        return map(self._prepare, super().__iter__())


def _is_stream(dataset: Any) -> bool:
    """Whether a data set has no length or cannot be read at an index."""
    return isinstance(dataset, torch.utils.data.IterableDataset) or not has_length(dataset)


def _first_sample(dataset: Any, name: str) -> Any:
    """Sample 0 of a set as the Trainer prepares it.

    Raises:
        ValueError: a transform of it misses a column that the Trainer has removed.
    """
    try:
        return dataset[0]
    except KeyError as error:
        raise ValueError(
            f"Reading sample 0 of the {name} set failed for want of {error}. If that is a column that a transform of "
            "the set needs, the Trainer has removed it: pass remove_unused_columns=False to TrainingArguments."
        ) from error


class PruneRewindCallback(TrainerCallback, ExportableState):
    """Runs the phases of E2VPT inside one `Trainer.train()`: train, score, prune, rewind, train to the end.

    The first part trains all prompts. Between two optimizer steps the prompts are scored on training data, pruned, and
    rewound together with the head. The second part then has the user's learning rate, weight decay and a complete
    warm-up and decay of its own, with a fresh optimizer state. `load_best_model_at_end` and `EarlyStoppingCallback`
    see the second part only. A run resumed from any checkpoint equals the straight run.

    Without `tokens`, `segments` and `max_tuned_percentage` the amounts are searched on the Trainer's evaluation set.
    Works on one process or many, under DDP, FSDP2 and DeepSpeed's ZeRO; every process has the same gates and values.

    Args:
        prune_after (`float`, *optional*, defaults to 0.5):
            When the first part ends, in `unit`.
        unit (`str`, *optional*, defaults to `"fraction"`):
            `"fraction"` of all optimizer steps, `"epochs"` or `"steps"`.
        tokens (`float` or `int`, *optional*):
            The ratio (float) or number (int) of prompts to prune in every layer.
        segments (`float` or `int`, *optional*):
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

    Attributes:
        report: the `PruningReport` once the model is pruned, before that `None`. It is saved as `pruning_report.json`
            in the output folder and in every later checkpoint, where it also is for a run that is resumed with
            `restore_callback_states_from_checkpoint`, in which the Trainer works with a copy of the callback.

    Raises:
        ValueError: at construction or when training begins; an argument is impossible, the run is too short for two
            parts, the model has no visual prompts or is frozen, a set to search on is missing, empty or without
            labels, a transform misses a column that the Trainer has removed, or the run shards the model in a way that
            hides the trained tensors (FSDP1, DeepSpeed without ZeRO, an optimizer on a disk).
    """

    def __init__(
        self,
        prune_after: float = 0.5,
        unit: str = "fraction",
        tokens: float | int | None = None,
        segments: float | int | None = None,
        max_tuned_percentage: float | None = None,
        min_tokens: int = MIN_TOKENS,
        min_segments: int = MIN_SEGMENTS,
        rewind_to: str = "init",
        early_steps: int = 0,
        token_ratios: Sequence[float] = RATIOS,
        segment_ratios: Sequence[float] = RATIOS,
        max_score_batches: int | None = None,
        validation_dataset: Any = None,
    ) -> None:
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}.")
        if rewind_to not in TARGETS:
            raise ValueError(f"rewind_to must be one of {', '.join(TARGETS)}, got {rewind_to!r}.")
        if unit == "fraction" and not 0.0 < prune_after < 1.0:
            raise ValueError(f"prune_after as a fraction of the run lies between 0 and 1, got {prune_after}.")
        if (rewind_to == "early") != (early_steps > 0):
            raise ValueError(f"rewind_to='early' and early_steps go together, got {rewind_to!r} and {early_steps}.")
        if max_tuned_percentage is not None and not 0.0 < max_tuned_percentage < 100.0:
            raise ValueError(f"max_tuned_percentage lies between 0 and 100, got {max_tuned_percentage}.")
        if max_tuned_percentage is not None and (tokens is not None or segments is not None):
            raise ValueError("Pass either a budget, max_tuned_percentage, or amounts, tokens and segments, not both.")
        for ratio in (*token_ratios, *segment_ratios, *(a for a in (tokens, segments) if isinstance(a, float))):
            check_ratio(ratio)
        self.prune_after = prune_after
        self.unit = unit
        self.tokens = tokens
        self.segments = segments
        self.max_tuned_percentage = max_tuned_percentage
        self.min_tokens = min_tokens
        self.min_segments = min_segments
        self.rewind_to = rewind_to
        self.early_steps = early_steps
        self.token_ratios = tuple(float(ratio) for ratio in token_ratios)
        self.segment_ratios = tuple(float(ratio) for ratio in segment_ratios)
        self.max_score_batches = max_score_batches
        self.validation_dataset = validation_dataset
        self.report: PruningReport | None = None
        self._initial: dict[str, Tensor] = {}
        self._initial_gates: Gates | None = None
        self._target: dict[str, Tensor] = {}
        self._target_path: str | None = None
        self._had_validation_dataset = validation_dataset is not None
        self._pruned = False
        self._second_start: int | None = None
        self._attempt: Any = None
        self._boundary = 0
        self._schedule: TwoPartSchedule | None = None
        self._trainer: Trainer | None = None

    @property
    def searches(self) -> bool:
        """Whether the amounts to prune are searched on validation data."""
        return self.tokens is None and self.segments is None and self.max_tuned_percentage is None

    # --------------------------------------------------------------------------------------------- what a resume needs
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback: its arguments and how far the run is."""
        names = inspect.signature(type(self)).parameters
        return {
            "args": {name: getattr(self, name) for name in names if name != "validation_dataset"},
            "attributes": {
                "_pruned": self._pruned,
                "_second_start": self._second_start,
                "_target_path": self._target_path,
                "_had_validation_dataset": self._had_validation_dataset,
            },
        }

    def _resume(self, state: TrainerState, output_dir: str) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if not isinstance(saved, dict):
            raise ValueError(
                f"The checkpoint at step {state.global_step} was made without PruneRewindCallback, so its first part "
                "has no start to rewind to: train from the beginning, or resume without the callback."
            )
        for name, value in saved["attributes"].items():
            setattr(self, name, value)
        self.report = None
        if self._pruned:
            assert self._target_path is not None
            folders = (Path(output_dir), Path(self._target_path).parent)
            self.report = PruningReport.load(next((f for f in folders if (f / REPORT_NAME).exists()), output_dir))
        elif self.rewind_to in ("init", "early"):
            if self._target_path is None or not Path(self._target_path).exists():
                raise FileNotFoundError(
                    f"The values to rewind to are not at {self._target_path}, where the run saved them: keep the "
                    "output folder of the run that is resumed."
                )
            self._target = load_file(self._target_path)

    # ------------------------------------------------------------------------------------------------- training begins
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the run has room for its phases, and keeps the values to rewind to."""
        trainer = self._trainer = _running_trainer()
        model = trainer.model
        if sum(isinstance(callback, PruneRewindCallback) for callback in trainer.callback_handler.callbacks) > 1:
            raise ValueError("The Trainer has more than one PruneRewindCallback: pass one.")
        adapter_name, layers = visual_prompt_layers(model)
        self._check_sharding(trainer)
        self._check_trainable(model, adapter_name)
        self._check_sets(trainer)
        self._check_samples(trainer)
        self._boundary = self._find_boundary(args, state, kwargs["train_dataloader"])
        self._check_amounts(trainer, adapter_name)
        if state.global_step == 0:
            self._start(trainer, adapter_name)
        else:
            self._resume(state, args.output_dir)
        scheduler, made_by_trainer = trainer.lr_scheduler, trainer._created_lr_scheduler
        if isinstance(scheduler, AcceleratedScheduler):  # DeepSpeed steps it, and has the Trainer make it
            scheduler, made_by_trainer = scheduler.scheduler, True
        self._schedule = TwoPartSchedule(
            scheduler,
            args,
            made_by_trainer,
            self._boundary,
            state.max_steps - self._boundary,
            self._second_start,
        )

    def _find_boundary(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
        """The optimizer step after which the first part ends."""
        per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps) if has_length(dataloader) else 0
        steps_per_unit = {"fraction": state.max_steps, "epochs": per_epoch, "steps": 1}[self.unit]
        boundary = round(float(self.prune_after * steps_per_unit))
        first = max(1, self.early_steps)
        if not first <= boundary < state.max_steps:
            raise ValueError(
                f"The run has {state.max_steps} optimizer steps, and the first part would end after {boundary}: it "
                f"has to end after step {first} to {state.max_steps - 1}. Train longer or change prune_after."
            )
        return boundary

    @staticmethod
    def _check_trainable(model: nn.Module, adapter_name: str) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"The adapter {adapter_name!r} is frozen, so there is nothing to train: load it with "
                "is_trainable=True, as in peft_e2vpt.load(..., is_trainable=True) or PeftModel.from_pretrained(..., "
                "is_trainable=True)."
            )

    @staticmethod
    def _check_sharding(trainer: Trainer) -> None:
        state = trainer.accelerator.state
        if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 1:
            raise ValueError(
                "PruneRewindCallback works under FSDP2, but this run uses FSDP1, which hides single parameters in "
                "flat ones: set version to 2 in fsdp_config."
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

    def _check_sets(self, trainer: Trainer) -> None:
        if _is_stream(trainer.train_dataset):
            raise ValueError(
                "PruneRewindCallback scores prompts on the training set and needs one with a length and an index, got "
                f"the stream {type(trainer.train_dataset).__name__}."
            )
        if not self.searches:
            return
        if self._had_validation_dataset and self.validation_dataset is None:
            raise ValueError(
                "The checkpoint cannot hold the validation_dataset of PruneRewindCallback: leave "
                "restore_callback_states_from_checkpoint at False, and the callback that was passed goes on."
            )
        data = self._validation_data(trainer)
        if data is not None and _is_stream(data):
            raise ValueError(
                "PruneRewindCallback compares prunings on a set with a length and an index, got the stream "
                f"{type(data).__name__}: pass another as validation_dataset."
            )
        if data is None or not len(data):
            found = "there is none" if data is None else "it is empty"
            raise ValueError(
                f"PruneRewindCallback compares prunings on an evaluation set, but {found}: pass eval_dataset to the "
                "Trainer or validation_dataset to the callback, or say what to prune (tokens, segments or "
                "max_tuned_percentage)."
            )

    def _check_samples(self, trainer: Trainer) -> None:
        """Reads what would otherwise fail in the first batch, or only after the first part."""
        with no_trace(trainer.model, []):
            training_data = trainer.callback_handler.train_dataloader.dataset
            if training_data is not trainer.train_dataset:  # the Trainer has removed columns
                _first_sample(training_data, "training")
            if self.searches:
                data = trainer.get_eval_dataloader(self._validation_data(trainer)).dataset
                collate = trainer.callback_handler.train_dataloader.collate_fn
                labels_of(collate([_first_sample(data, "evaluation")]))

    def _check_amounts(self, trainer: Trainer, adapter_name: str) -> None:
        """Finds out before the first part whether the amounts to prune are possible."""
        if not self.searches:
            _, layers = visual_prompt_layers(trainer.model, adapter_name)
            self._choose(trainer, zero_scores(layers, layers[0].e2vpt_config[adapter_name]), adapter_name)

    def _validation_data(self, trainer: Trainer) -> Any:
        data = self.validation_dataset if self.validation_dataset is not None else trainer.eval_dataset
        if isinstance(data, dict):
            raise ValueError(
                f"The Trainer has several evaluation sets, {', '.join(data)}: pass the one to compare prunings on as "
                "validation_dataset."
            )
        return data

    def _start(self, trainer: Trainer, adapter_name: str) -> None:
        if trainer.args.auto_find_batch_size and self._attempt is trainer.model:  # again, after running out of memory
            assert self._initial_gates is not None
            apply_gates(trainer.model, self._initial_gates, adapter_name)
            rewind(trainer.model, self._initial)
            trainer.optimizer.state.clear()
        self._attempt = trainer.model
        self._initial_gates = current_gates(trainer.model, adapter_name)
        self._pruned, self._second_start, self.report = False, None, None
        self._keep_target(trainer)
        self._initial = self._target

    def _keep_target(self, trainer: Trainer) -> None:
        self._target = trained_tensors(trainer.model)
        path = Path(trainer.args.output_dir) / TARGET_FILE
        self._target_path = str(path)
        if trainer.is_world_process_zero():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous().cpu() for name, tensor in self._target.items()}, path)

    # ----------------------------------------------------------------------------------------------- between two steps
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prunes and rewinds before the first step of the second part, when the first was evaluated and saved."""
        if self._pruned:
            return
        # no evaluation of the first part is the best so far, for the Trainer or for EarlyStoppingCallback
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        assert self._trainer is not None
        if self.rewind_to == "early" and state.global_step == self.early_steps:
            self._keep_target(self._trainer)
        if state.global_step >= self._boundary:
            self._prune_and_rewind(self._trainer, state)

    def _prune_and_rewind(self, trainer: Trainer, state: TrainerState) -> None:
        model = trainer.model
        adapter_name, layers = visual_prompt_layers(model)
        before = model.prompt_summary(adapter_name)
        training_data = trainer.callback_handler.train_dataloader.dataset
        scores = score_prompts(
            model,
            self._loader(trainer, training_data, trainer._train_batch_size),
            adapter_name=adapter_name,
            loss_fn=trainer.compute_loss,
            max_batches=self.max_score_batches,
            seed=trainer.args.seed,
        )
        gates, search = self._choose(trainer, scores, adapter_name)
        gates = gates & current_gates(model, adapter_name)  # what an earlier run has pruned stays pruned
        apply_gates(model, gates, adapter_name)
        self._rewind(trainer, adapter_name)
        assert self._schedule is not None
        self._schedule.restart()
        self._second_start = self._schedule.second_start
        self._pruned = True
        after = model.prompt_summary(adapter_name)
        self.report = PruningReport.build(
            scores=scores,
            gates=gates,
            search=search,
            step=state.global_step,
            rewound_to=self.rewind_to,
            layers=[layer.index for layer in layers],
            tuned_values_before=before.num_tuned_values,
            tuned_values_after=after.num_tuned_values,
            tuned_percentage_before=before.tuned_percentage,
            tuned_percentage_after=after.tuned_percentage,
        )
        if trainer.is_world_process_zero():
            self.report.save(trainer.args.output_dir)
        trainer.log(self.report.numbers())

    def _choose(
        self, trainer: Trainer, scores: ImportanceScores, adapter_name: str
    ) -> tuple[Gates, PruningSearch | None]:
        bounds: dict[str, Any] = {"min_tokens": self.min_tokens, "min_segments": self.min_segments}
        if self.searches:
            loader = trainer.get_eval_dataloader(self._validation_data(trainer))
            batch_size = trainer.args.per_device_eval_batch_size
            search = search_pruning(
                trainer.model,
                scores,
                self._loader(trainer, loader.dataset, batch_size),
                adapter_name=adapter_name,
                token_ratios=self.token_ratios,
                segment_ratios=self.segment_ratios,
                max_rows=max(64, batch_size),
                seed=trainer.args.seed,
                **bounds,
            )
            return search.gates, search
        if self.max_tuned_percentage is None:
            return prune(scores, self.tokens or 0.0, self.segments or 0.0, **bounds), None
        return prune_to_percentage(trainer.model, scores, self.max_tuned_percentage, adapter_name, **bounds), None

    def _rewind(self, trainer: Trainer, adapter_name: str) -> None:
        if self.rewind_to == "fresh":
            redraw(trainer.model, adapter_name, trainer.args.seed + 1)
        elif self.rewind_to != "none":
            rewind(trainer.model, self._target)
        trainer.optimizer.state.clear()

    @staticmethod
    def _loader(trainer: Trainer, dataset: Any, batch_size: int) -> DataLoader[Any]:
        """Batches of this process's share of a data set, in order and without padding."""
        args = trainer.args
        share = Subset(dataset, range(args.process_index, len(dataset), args.world_size))
        collate = trainer.callback_handler.train_dataloader.collate_fn
        workers = args.dataloader_num_workers
        return _Prepared(trainer, share, batch_size=batch_size, collate_fn=collate, num_workers=workers)

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
        self._attempt = self._trainer = self._initial_gates = None
        self._target, self._initial = {}, {}
        if not self._pruned:
            logger.warning(f"Training ended at step {state.global_step}, before it was to prune at {self._boundary}.")
