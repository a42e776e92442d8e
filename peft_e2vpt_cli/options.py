# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .files import CONFIG_NAME


Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder, or a repository on the Hub.")]
Adapters = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER...", help="Folders, or repositories on the Hub; or a run."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a forward pass.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
Subfolder = Annotated[str | None, typer.Option(help="Where in the repository or folder the adapter lies.")]
Base = Annotated[str | None, typer.Option(help="The base model, if it is not the one that the adapter names.")]
Output = Annotated[Path, typer.Option(help="Folder for the new adapter.")]


def refuse_taken(output: Path) -> None:
    """Raises ValueError if an adapter would be overwritten."""
    if (output / CONFIG_NAME).exists():
        raise ValueError(f"There is an adapter in {output} already: name another folder for the output.")
