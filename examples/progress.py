# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What `finetune.py` prints: one labelled progress bar per method, and no more of transformers than is news."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from PIL import Image
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging


class MethodProgress(TrainerCallback):
    """A progress bar with a label, and beside it the last loss and validation accuracy.

    Args:
        label: what the bar is called.
        shown: whether there is a bar at all.
    """

    def __init__(self, label: str, shown: bool) -> None:
        self.label = label
        self.numbers: dict[str, str] = {}
        self.bars_of_files = logging.is_progress_bar_enabled()
        # there from the start: fitting the head takes a pass over all images before the first step
        self.bar = tqdm(desc=f"{label}, starting the head", unit="step", dynamic_ncols=True, disable=not shown)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.set_description(self.label, refresh=False)
        self.bar.reset(total=state.max_steps)
        self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)
        self._hide_files(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hide_files(control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bars_of_files:
            logging.enable_progress_bar()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        names = {"loss": "loss", "eval_accuracy": "validation accuracy"}
        self.numbers |= {name: f"{float(logs[key]):.3f}" for key, name in names.items() if key in logs}
        if not self.bar.disable:
            self.bar.set_postfix(self.numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()

    def _hide_files(self, control: Any) -> None:
        """A checkpoint is written next: without a bar for each of its files."""
        if control.should_save:
            logging.disable_progress_bar()


def show_progress(trainer: Trainer, label: str) -> None:
    """Gives a trainer this progress bar in place of its own bar and of the dictionaries that it prints."""
    if logging.get_verbosity() < logging.WARNING:
        return
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    shown = trainer.is_world_process_zero() and not trainer.args.disable_tqdm and sys.stderr.isatty()
    trainer.add_callback(MethodProgress(label, shown))


def be_quiet(verbose: bool) -> None:
    """Lets the libraries log warnings alone, or with `verbose` all that they have to say."""
    if verbose:
        logging.set_verbosity_info()
        return
    logging.set_verbosity_warning()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # what is too large is named as bad
    # PEFT asks transformers for what transformers calls by another name now: nothing that a user could change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\.")


@contextmanager
def quiet_files() -> Iterator[None]:
    """Loads or saves a model without a bar and a table of its weights; what is missing is for the caller to say."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if verbosity < logging.WARNING:
        yield
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def in_one_sentence(verbose: bool) -> Iterator[None]:
    """Ends the program at a mistake of the user with what it says, without a traceback unless `verbose`."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if verbose:
            raise
        sys.exit(f"Error: {str(error).strip()}")
    except KeyboardInterrupt:
        print("\nStopped before anything was trained.", file=sys.stderr)
        sys.exit(130)
