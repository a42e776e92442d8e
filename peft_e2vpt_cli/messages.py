# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How commands tell what goes wrong: one sentence on stderr instead of a traceback."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from .files import printable


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Prints an error that users can mend as one sentence and exits with code 1; others keep their traceback."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        typer.echo(f"Error: {printable(' '.join(str(error).split()))}", err=True)
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
