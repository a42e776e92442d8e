# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt convert`: an adapter from a checkpoint of the authors' released code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .messages import with_models
from .options import Output, refuse_taken


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT.pth", help="A checkpoint of the authors' released code.")
    ],
    base: Annotated[str, typer.Option(help="The backbone it was trained on: a folder, or a model on the Hub.")],
    output: Output,
) -> None:
    """Convert a checkpoint of the authors' released code into an adapter with the same logits."""
    with with_models():
        from transformers import AutoModelForImageClassification

        from peft_e2vpt.hub.conversion import read_checkpoint

        refuse_taken(output)
        released = read_checkpoint(checkpoint)
        model = AutoModelForImageClassification.from_pretrained(
            base, num_labels=released.num_labels, ignore_mismatched_sizes=True
        )
        adapted = released.adapt(model)
        adapted.save_pretrained(output)
        print(adapted.prompt_summary())
        print(f"Saved in {output}.")
