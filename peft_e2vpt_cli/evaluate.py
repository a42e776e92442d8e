# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt evaluate`: how many images of each class trained adapters get right, in one table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .classifiers import load_classifier
from .files import CONFIG_NAME, METHOD, adapters_below, printable, read_method
from .messages import print_table, with_models
from .options import Adapters, Base, BatchSize, Revision, Subfolder


if TYPE_CHECKING:
    from peft_e2vpt.images import ClassResults, TestImages


def evaluate(
    adapters: Adapters,
    data: Annotated[str, typer.Option(help="Folder with a folder of images per class, or a dataset on the Hub.")],
    split: Annotated[
        str | None, typer.Option(help="train, validation or test; by default test, else validation, else all images.")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    base: Base = None,
    batch_size: BatchSize = 32,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Images to use, by default all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn from the images.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how many images trained adapters classify rightly, of each class and of all."""
    with with_models():
        from peft_e2vpt.images import find_test_images, measure

        images = find_test_images(data, split, max_samples=max_samples, seed=seed)
        results: dict[str, ClassResults] = {}
        percentages: dict[str, float] = {}
        for adapter in _expanded(adapters):
            classifier = load_classifier(adapter, revision, subfolder, base)
            results[adapter] = measure(
                classifier.model, classifier.labels, classifier.processor, images, batch_size=batch_size
            )
            percentages[adapter] = classifier.model.prompt_summary().tuned_percentage
        for note in images.notes:
            typer.echo(f"Note: {printable(note)}", err=True)
        if as_json:
            print(json.dumps([_as_dict(name, found, percentages[name]) for name, found in results.items()], indent=2))
        else:
            _show(images, results, percentages)


def _expanded(adapters: list[str]) -> list[str]:
    """The adapters, and in place of a run's folder those of E2VPT inside; of each the last state, no checkpoints."""
    found: list[str] = []
    for adapter in adapters:
        inside = []
        if Path(adapter).is_dir() and not Path(adapter, CONFIG_NAME).is_file():
            inside = [path for path in adapters_below(Path(adapter)) if not path.name.startswith("checkpoint-")]
        others = {path: method for path in inside if (method := read_method(path)) != METHOD}
        if others and len(others) < len(inside):
            listed = ", ".join(f"{path} ({method})" for path, method in others.items())
            typer.echo(f"Note: Left out, as they are adapters of other methods: {printable(listed)}.", err=True)
            inside = [path for path in inside if path not in others]
        found += [str(path) for path in inside] or [adapter]
    return list(dict.fromkeys(found))


def _as_dict(adapter: str, results: ClassResults, percentage: float) -> dict[str, object]:
    return {
        "adapter": adapter,
        "images": results.num_images,
        "accuracy": results.accuracy,
        "accuracy_error": results.accuracy_error,
        "balanced_accuracy": results.balanced_accuracy,
        "balanced_error": results.balanced_error,
        "tuned_percentage": percentage,
        "classes": {
            name: {"images": count, "right": right}
            for name, count, right in zip(results.classes, results.counts, results.right, strict=True)
        },
    }


def _show(images: TestImages, results: dict[str, ClassResults], percentages: dict[str, float]) -> None:
    """Prints a line for each adapter and, below, one for each class."""
    plus_minus = "\N{PLUS-MINUS SIGN}" if (sys.stdout.encoding or "").lower().startswith("utf") else "+-"
    names = [printable(name) for name in results]
    rows = [
        [
            name,
            f"{found.accuracy:.3f} {plus_minus} {found.accuracy_error:.3f}",
            f"{found.balanced_accuracy:.3f} {plus_minus} {found.balanced_error:.3f}",
            f"{percentage:.3f}",
        ]
        for name, found, percentage in zip(names, results.values(), percentages.values(), strict=True)
    ]
    print(f"{len(images.images):,} images, {printable(images.origin)}\n")
    print_table([["adapter", "accuracy", "balanced", "% of the model"], *rows])
    first = next(iter(results.values()))
    of_classes = zip(first.classes, first.counts, *(found.recalls for found in results.values()), strict=True)
    lines = [
        [printable(label), f"{count:,}", *("" if share is None else f"{share:.3f}" for share in shares)]
        for label, count, *shares in of_classes
    ]
    print()
    print_table([["class", "images", *(names if len(names) > 1 else ["accuracy"])], *lines])
    print(f"\n{plus_minus} is one standard error: about two of three samples of as many images lie within it.")
