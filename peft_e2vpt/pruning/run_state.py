# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a pruned run keeps from its start to its end, and over a resume: `RunState`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .optimizer_start import OptimizerStart, evaluated_values
from .ranking import Gates, apply_gates, current_gates
from .report import REPORT_NAME, PruningReport
from .rewinding import check_rewindable, rewind, trained_tensors


if TYPE_CHECKING:
    from transformers import Trainer


TARGET_FILE = "_rewind_target.safetensors"
OPTIMIZER_FILE = "_rewind_optimizer.pt"


class RunState:
    """How far a run is, and what it may return to. All of it lies in every checkpoint.

    Attributes:
        pruned: whether its second part has begun.
        second_start: the scheduler's step at which it has.
        target: the values to rewind to, where the run rewinds to values of its own.
        target_step: the optimizer step after which they were taken.
        optimizer_start: what the optimizer held before the first step.
    """

    def __init__(self) -> None:
        self.pruned = False
        self.second_start: int | None = None
        self.target: dict[str, Tensor] = {}
        self.target_step: int | None = None
        self.optimizer_start: OptimizerStart | None = None
        self._attempt: Any = None
        self._attempt_values: dict[str, Tensor] = {}
        self._attempt_gates: Gates | None = None

    def begin(self, trainer: Trainer, adapter_name: str, resumed: bool) -> None:
        """Begins a run or goes on with one; the same anew where the Trainer has run out of memory."""
        model = trainer.model
        if trainer.args.auto_find_batch_size and self._attempt is model:
            assert self._attempt_gates is not None
            apply_gates(model, self._attempt_gates, adapter_name)
            rewind(model, self._attempt_values)
            if self.optimizer_start is not None and not resumed:  # else the checkpoint's was loaded again
                self.optimizer_start.restore(trainer)
        self.pruned, self.second_start = False, None
        self.target, self.target_step, self.optimizer_start = {}, None, None
        self._attempt = model
        if trainer.args.auto_find_batch_size:
            self._attempt_gates, self._attempt_values = current_gates(model, adapter_name), trained_tensors(model)

    def keep_target(self, trainer: Trainer) -> None:
        """Notes the values of this moment as those to rewind to."""
        with evaluated_values(trainer):
            self.target = trained_tensors(trainer.model)
        self.target_step = trainer.state.global_step

    def end(self) -> None:
        """Lets go of model and values."""
        self._attempt = self._attempt_gates = self.optimizer_start = None
        self.target, self._attempt_values = {}, {}

    # ------------------------------------------------------------------------------------------------- in a checkpoint
    def exported(self) -> dict[str, Any]:
        """What a checkpoint keeps by name, besides its files."""
        return {"_pruned": self.pruned, "_second_start": self.second_start, "_target_step": self.target_step}

    def save(self, folder: Path, report: PruningReport | None) -> None:
        """Writes what a resume needs into the folder of a checkpoint, and removes what another run has left there."""
        for name in (TARGET_FILE, OPTIMIZER_FILE, REPORT_NAME):
            (folder / name).unlink(missing_ok=True)
        if self.pruned:
            assert report is not None
            report.save(folder)
            return
        if self.target:
            save_file({name: t.contiguous().cpu() for name, t in self.target.items()}, folder / TARGET_FILE)
        if self.optimizer_start is not None:
            self.optimizer_start.save(folder / OPTIMIZER_FILE)

    def resume(self, exported: dict[str, Any], folder: Path, trainer: Trainer, target_step: int | None) -> None:
        """Goes on from the checkpoint in a folder.

        Args:
            exported: what the checkpoint has kept by name.
            folder: of the checkpoint.
            trainer: the Trainer that resumes.
            target_step: the step whose values the run will rewind to, `None` if they are no concern of the checkpoint.

        Raises:
            FileNotFoundError: the checkpoint misses a file.
            ValueError: a file is damaged, or the values are of another step or another model.
        """
        self.pruned, self.second_start = exported["_pruned"], exported["_second_start"]
        if self.pruned:
            return
        old = "_target_path" in exported  # written when the values lay in the output folder, and the optimizer nowhere
        if not old:
            path = folder / OPTIMIZER_FILE
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing, which holds what the optimizer started with: copy the whole folder of the "
                    "checkpoint, or resume from another checkpoint."
                )
            self.optimizer_start = OptimizerStart.load(path)
        if target_step is None:
            return
        self.target_step = target_step if old else exported["_target_step"]
        if self.target_step != target_step:
            kept = "none" if self.target_step is None else f"those after step {self.target_step}"
            raise ValueError(
                f"The run is to rewind to its values after step {target_step}, but of the values to rewind to, "
                f"{folder} holds {kept}: pass the same rewind_to and early_steps as at the start of the run."
            )
        path = folder / TARGET_FILE
        if old:  # beside the checkpoint, if they have moved together
            path = next((p for p in (folder.parent / TARGET_FILE, Path(exported["_target_path"])) if p.exists()), path)
        self.target = _load_target(path)
        check_rewindable(trainer.model, self.target)


def _load_target(path: Path) -> dict[str, Tensor]:
    remedy = "copy the whole folder of the checkpoint, resume from another checkpoint, or pass rewind_to='fresh'"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, which holds the values to rewind to: {remedy}.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}, which holds the values to rewind to, is damaged ({error}): {remedy}.") from error
