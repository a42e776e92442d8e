# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The command `peft-e2vpt` with its subcommands."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from .card import card
from .convert import convert
from .evaluate import evaluate
from .inspect import inspect
from .prune import prune


app = typer.Typer(
    help="Inspect, evaluate, prune and convert E2VPT adapters, and write their model cards.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (inspect, evaluate, prune, convert, card):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        print(version("peft_e2vpt"))
    except PackageNotFoundError:  # a source tree that is not installed
        from peft_e2vpt import __version__

        print(__version__)
    raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(prog_name: str = "peft-e2vpt") -> None:
    """Runs the command line; ends quietly where the reader of a pipe has gone, as in `peft-e2vpt inspect a | head`."""
    try:
        try:
            app(prog_name=prog_name)
        finally:
            sys.stdout.flush()  # here and not at the end of Python, where the error could not be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
