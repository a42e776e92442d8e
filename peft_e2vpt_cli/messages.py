# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How commands tell what goes wrong: one sentence on stderr instead of a traceback."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from .files import printable


# what an error advises a program to pass, as the command line has it
IN_OPTIONS = {
    "lower num_kv_prompts, min_tokens or min_segments": "lower --min-tokens or --min-segments",
    "pass base_model=...": "pass --base MODEL",
    "pass token=...": "set HF_TOKEN",
    "max_tuned_percentage=": "--max-tuned-percentage ",
}


def as_options(text: str) -> str:
    """A message of the package in the words of the command line."""
    for argument, option in IN_OPTIONS.items():
        text = text.replace(argument, option)
    return text


def print_table(rows: list[list[str]], left: int = 1) -> None:
    """Prints columns that are never cut, so that narrow terminals break lines and other programs can read them.

    Args:
        rows: the cells of each row; the first row holds the titles.
        left: how many columns are aligned to the left; the others, numbers, are to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Prints an error that users can mend as one sentence and exits with code 1; others keep their traceback."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        typer.echo(f"Error: {printable(as_options(' '.join(str(error).split())))}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def with_models() -> Iterator[None]:
    """Runs a command that builds a model: registers E2VPT with PEFT, and prints warnings for users as notes."""
    with errors_in_one_sentence():
        from transformers.utils import logging

        import peft_e2vpt  # noqa: F401

        logging.set_verbosity_error()
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            yield
        for warning in noted:
            if warning.category is UserWarning:
                typer.echo(f"Note: {printable(warning.message)}", err=True)
