# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a running `Trainer` knows but tells no callback: itself, and the folders that it writes to and resumes from.

Paths that a checkpoint holds are wrong once its folder has moved, so they are asked for when they are needed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .._compat import running_calls


if TYPE_CHECKING:
    from transformers import Trainer


def trainer_around() -> Trainer | None:
    """The `Trainer` in one of whose calls the program is, `None` where it is in none."""
    module = sys.modules.get("transformers.trainer")  # it brings datasets and pandas: imported by who uses one
    if module is None:
        return None
    for call in running_calls():
        if isinstance(call.f_locals.get("self"), module.Trainer):
            trainer: Trainer = call.f_locals["self"]
            return trainer
    return None


def running_trainer() -> Trainer:
    """Finds the `Trainer` whose event is being handled.

    Raises:
        RuntimeError: there is none.
    """
    trainer = trainer_around()
    if trainer is None:
        raise RuntimeError("A callback of this package works inside a Trainer: pass it as Trainer(callbacks=[...]).")
    return trainer


def output_folder(trainer: Trainer) -> Path:
    """The folder that a training writes to: its own for each trial of a search for hyperparameters."""
    return Path(trainer._get_output_dir(trainer._trial))


def resumed_checkpoint(trainer: Trainer) -> Path:
    """The folder of the checkpoint that a training has begun from.

    Raises:
        RuntimeError: the Trainer was given its state in another way than `resume_from_checkpoint`.
    """
    for call in running_calls():
        folder = call.f_locals.get("resume_from_checkpoint")
        if call.f_locals.get("self") is trainer and isinstance(folder, (str, os.PathLike)):
            return Path(folder)
    raise RuntimeError(
        f"Training begins at step {trainer.state.global_step}, but from no checkpoint that its callbacks can "
        "find: pass its folder to trainer.train(resume_from_checkpoint=...)."
    )


def written_checkpoint() -> Path | None:
    """The folder of the checkpoint that a Trainer is writing, `None` where none is."""
    for call in running_calls():
        if call.f_code.co_name == "_save_checkpoint" and "output_dir" in call.f_locals:
            return Path(call.f_locals["output_dir"])
    return None
