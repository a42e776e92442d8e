# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a pruned run keeps from its start to its end, and over a resume: `RunState`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .ranking import Gates, apply_gates, current_gates
from .rewinding import rewind, trained_tensors


if TYPE_CHECKING:
    from transformers import Trainer


TARGET_FILE = "_rewind_target.safetensors"  # Trainer.push_to_hub leaves names with a leading underscore out


class RunState:
    """How far a run is, and the values that it may return to.

    Attributes:
        pruned: whether its second part has begun.
        second_start: the scheduler's step at which it has.
        target: the values to rewind to.
        target_path: the file that holds them for a resume.
    """

    def __init__(self) -> None:
        self.pruned = False
        self.second_start: int | None = None
        self.target: dict[str, Tensor] = {}
        self.target_path: str | None = None
        self._initial: dict[str, Tensor] = {}
        self._initial_gates: Gates | None = None
        self._attempt: Any = None

    def begin(self, trainer: Trainer, adapter_name: str) -> None:
        """Begins a run; the same one anew where the Trainer has run out of memory."""
        model = trainer.model
        if trainer.args.auto_find_batch_size and self._attempt is model:
            assert self._initial_gates is not None
            apply_gates(model, self._initial_gates, adapter_name)
            rewind(model, self._initial)
            trainer.optimizer.state.clear()
        self._attempt = model
        self._initial_gates = current_gates(model, adapter_name)
        self.pruned, self.second_start = False, None
        self.keep_target(trainer)
        self._initial = self.target

    def keep_target(self, trainer: Trainer) -> None:
        """Notes the values of this moment as those to rewind to, and saves them for a resume."""
        self.target = trained_tensors(trainer.model)
        path = Path(trainer.args.output_dir) / TARGET_FILE
        self.target_path = str(path)
        if trainer.is_world_process_zero():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous().cpu() for name, tensor in self.target.items()}, path)

    def load_target(self) -> None:
        """Reads the values to rewind to that the run has saved.

        Raises:
            FileNotFoundError: they are gone.
        """
        if self.target_path is None or not Path(self.target_path).exists():
            raise FileNotFoundError(
                f"The values to rewind to are not at {self.target_path}, where the run saved them: keep the output "
                "folder of the run that is resumed."
            )
        self.target = load_file(self.target_path)

    def end(self) -> None:
        """Lets go of model and values."""
        self._attempt = self._initial_gates = None
        self.target, self._initial = {}, {}

    def exported(self) -> dict[str, Any]:
        """What a checkpoint keeps, by name."""
        return {"_pruned": self.pruned, "_second_start": self.second_start, "_target_path": self.target_path}

    def restore(self, exported: dict[str, Any]) -> None:
        """Goes on from what a checkpoint has kept."""
        self.pruned, self.second_start = exported["_pruned"], exported["_second_start"]
        self.target_path = exported["_target_path"]
