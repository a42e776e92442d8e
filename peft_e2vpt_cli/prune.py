# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt prune`: prunes a trained adapter, without training it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .classifiers import load_classifier
from .messages import with_models
from .options import Adapter, Base, BatchSize, Output, Revision, Subfolder, refuse_taken


if TYPE_CHECKING:
    from peft import PeftModel

    from peft_e2vpt import Gates, ImportanceScores, PromptSummary, PruningSearch
    from peft_e2vpt.images import Images


Amounts = tuple[float | int, float | int]


def prune(
    adapter: Adapter,
    data: Annotated[str, typer.Option(help="Folder with a folder of images per class, or a dataset on the Hub.")],
    output: Output,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help="Prompts to prune in every layer: a ratio (0.5) or a number (3)."),
    ] = None,
    segments: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help="Segments to prune in every prompt that is kept: a ratio or a number."),
    ] = None,
    max_tuned_percentage: Annotated[
        float | None,
        typer.Option(help="Instead of amounts: trained parameters in percent of the model, head included."),
    ] = None,
    min_tokens: Annotated[int, typer.Option(min=1, help="Prompts that stay in every layer at least.")] = 1,
    min_segments: Annotated[int, typer.Option(min=1, help="Segments that stay in every prompt at least.")] = 4,
    revision: Revision = None,
    subfolder: Subfolder = None,
    base: Base = None,
    batch_size: BatchSize = 32,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Images of a split to use, by default all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn from the images.")] = 0,
) -> None:
    """Prune a trained adapter, without training it again.

    Scores prompts and segments on training images. Without amounts and without a budget, all amounts are compared on
    the validation images, or on a fifth of the training images if there are none.
    """
    amounts = _amounts(tokens, segments, max_tuned_percentage)
    with with_models():
        refuse_taken(output)
        trained = _prepare(adapter, data, revision, subfolder, base, batch_size, max_samples, seed)
        measured = _measure(trained)
        bounds = {"min_tokens": min_tokens, "min_segments": min_segments}
        gates, search = _choose(trained, measured.scores, amounts, max_tuned_percentage, bounds)
        pruned = _apply_and_save(trained, measured, gates, search, output, base)
        _show(trained, measured, pruned, search, output)


# ------------------------------------------------------------------------------------------------------------- prepare
@dataclass(frozen=True)
class _Trained:
    """The adapter before it is pruned, with its image processor and the images that it is measured on."""

    model: PeftModel
    processor: Any
    images: Images


def _amounts(tokens: str | None, segments: str | None, max_tuned_percentage: float | None) -> Amounts | None:
    """What `--tokens` and `--segments` ask for, `None` if neither is given."""
    amounts = None if tokens is segments is None else (_amount(tokens or "0"), _amount(segments or "0"))
    if max_tuned_percentage is not None:
        if amounts is not None:
            raise typer.BadParameter("pass either --max-tuned-percentage or --tokens and --segments, not both.")
        if not 0.0 < max_tuned_percentage < 100.0:
            raise typer.BadParameter(f"--max-tuned-percentage lies between 0 and 100, got {max_tuned_percentage}.")
    return amounts


def _amount(text: str) -> float | int:
    try:
        amount = int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a ratio such as 0.5 nor a whole number such as 3.") from error
    if isinstance(amount, float) and not 0.0 <= amount <= 1.0:
        raise typer.BadParameter(f"{text!r} is neither a ratio from 0 to 1 nor a whole number such as 3.")
    return amount


def _prepare(
    adapter: str,
    data: str,
    revision: str | None,
    subfolder: str | None,
    base: str | None,
    batch_size: int,
    max_samples: int | None,
    seed: int,
) -> _Trained:
    from peft_e2vpt.images import load_images

    model, labels, processor = load_classifier(adapter, revision, subfolder, base)
    images = load_images(data, labels, processor, batch_size=batch_size, max_samples=max_samples, seed=seed)
    return _Trained(model, processor, images)


# ------------------------------------------------------------------------------------------------ measure, then choose
@dataclass(frozen=True)
class _Measured:
    """What is known of an adapter before it is pruned."""

    summary: PromptSummary
    accuracy: float
    scores: ImportanceScores


def _measure(trained: _Trained) -> _Measured:
    from peft_e2vpt import score_prompts
    from peft_e2vpt.images import accuracy

    summary = trained.model.prompt_summary()
    before = accuracy(trained.model, trained.images.validation)
    return _Measured(summary, before, score_prompts(trained.model, trained.images.training))


def _choose(
    trained: _Trained,
    scores: ImportanceScores,
    amounts: Amounts | None,
    max_tuned_percentage: float | None,
    bounds: dict[str, Any],
) -> tuple[Gates, PruningSearch | None]:
    """What to keep: by amounts, within a budget, or what is best on the validation images."""
    from peft_e2vpt import search_pruning
    from peft_e2vpt.pruning import ranking

    search = None
    if amounts is not None:
        gates = ranking.prune(scores, *amounts, **bounds)
    elif max_tuned_percentage is not None:
        gates = ranking.prune_to_percentage(trained.model, scores, max_tuned_percentage, **bounds)
    else:
        search = search_pruning(trained.model, scores, trained.images.validation, **bounds)
        gates = search.gates
    return gates & ranking.current_gates(trained.model), search


# --------------------------------------------------------------------------------------------------- apply, then show
@dataclass(frozen=True)
class _Pruned:
    """The adapter as it has been saved."""

    summary: PromptSummary
    accuracy: float


def _apply_and_save(
    trained: _Trained,
    measured: _Measured,
    gates: Gates,
    search: PruningSearch | None,
    output: Path,
    base: str | None,
) -> _Pruned:
    """Prunes, and saves the adapter with its image processor, report and card. The accuracy is that of the files."""
    from peft_e2vpt import PruningReport, apply_gates, load
    from peft_e2vpt.hub.card import write_card
    from peft_e2vpt.hub.companion import facts_of
    from peft_e2vpt.images import accuracy
    from peft_e2vpt.tuner.prompt_layers import visual_prompt_layers

    model, before = trained.model, measured.summary
    apply_gates(model, gates)
    after = model.prompt_summary()
    model.save_pretrained(output)
    trained.processor.save_pretrained(output)
    report = PruningReport.build(
        scores=measured.scores,
        gates=gates,
        search=search,
        step=None,
        rewound_to="none",
        layers=[layer.index for layer in visual_prompt_layers(model)[1]],
        tuned_values_before=before.num_tuned_values,
        tuned_values_after=after.num_tuned_values,
        tuned_percentage_before=before.tuned_percentage,
        tuned_percentage_after=after.tuned_percentage,
    )
    report.save(output)
    found = accuracy(load(output, base_model=base), trained.images.validation)
    write_card(output, facts_of(model, model.peft_config["default"], "default"), metrics={"accuracy": found})
    return _Pruned(after, found)


def _show(trained: _Trained, measured: _Measured, pruned: _Pruned, search: PruningSearch | None, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    if search is not None:
        print(f"{search}\n")
    num_images = len(trained.images.validation.dataset)  # type: ignore[arg-type]
    summaries = (measured.summary, pruned.summary)
    counts = {
        "visual prompts kept": [sum(layer.num_visual_prompts for layer in s.layers) for s in summaries],
        "segments kept": [sum(layer.num_segments for layer in s.layers) for s in summaries],
        "trained parameters, head included": [s.num_tuned_values for s in summaries],
    }
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for name, numbers in counts.items():
        table.add_row(name, *(f"{number:,}" for number in numbers))
    table.add_row("in percent of the model", *(f"{s.tuned_percentage:.3f}" for s in summaries))
    table.add_row(f"accuracy on {num_images:,} images", f"{measured.accuracy:.3f}", f"{pruned.accuracy:.3f}")
    Console(highlight=False).print(table)
    if search is not None:
        print("The amounts were chosen on the same images, so this accuracy is a little too high.")
    print(
        f"Saved in {output}, not trained again. To win accuracy back, prune in a training run and rewind with "
        "peft_e2vpt.PruneRewindCallback."
    )
