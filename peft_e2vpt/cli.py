# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The command line, `python -m peft_e2vpt`: inspect, prune, convert, card.

Everything but the library for command lines is imported by the command that uses it, so that `--help` is quick.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer


if TYPE_CHECKING:
    from .hub.inspection import AdapterContent, LayerContent
    from .pruning.importance import ImportanceScores
    from .pruning.ranking import Gates
    from .pruning.search import PruningSearch
    from .tuner.summary import PromptSummary


app = typer.Typer(
    help="Adapters of E2VPT: what is in them, pruning, conversion, model cards.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder, or a repository of the Hub.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
Subfolder = Annotated[str | None, typer.Option(help="Where in the repository or folder the adapter lies.")]
Base = Annotated[str | None, typer.Option(help="The base model, where it is not the one that the adapter names.")]
Output = Annotated[Path, typer.Option(help="Folder for the new adapter.")]

ALIVE, PRUNED = "\N{FULL BLOCK}", "\N{MIDDLE DOT}"
SHARES = "\N{MIDDLE DOT}" + "".join(chr(ord("\N{LOWER ONE EIGHTH BLOCK}") + eighth) for eighth in range(8))


@contextmanager
def _command() -> Iterator[None]:
    """Runs a command: registers the method, and says errors and warnings of users in one sentence each."""
    from transformers.utils import logging

    from .registration import register
    from .tuner.config import E2VPTConfig
    from .tuner.model import E2VPTModel

    register(E2VPTConfig, E2VPTModel)
    logging.set_verbosity_error()
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            yield
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error
    for warning in noted:
        if warning.category is UserWarning:
            typer.echo(f"Note: {warning.message}", err=True)


# ------------------------------------------------------------------------------------------------------------- inspect
@app.command()
def inspect(
    adapter: Adapter,
    revision: Revision = None,
    subfolder: Subfolder = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, of which the config alone is read: gives the tuned percentage.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in an adapter. Reads its own files only, not those of its base model."""
    with _command():
        from .hub.inspection import inspect_adapter
        from .hub.loading import load_in_outline

        content = inspect_adapter(adapter, revision=revision, subfolder=subfolder)
        percentage, source = content.tuned_percentage, "as its card says"
        if base is not None:
            model = load_in_outline(adapter, revision=revision, subfolder=subfolder, base_model=base)
            percentage, source = model.prompt_summary().tuned_percentage, f"of {base}"
        if as_json:
            print(json.dumps({**content.as_dict(), "tuned_percentage": percentage}, indent=2))
        else:
            _show(adapter, content, percentage, source)


def _show(adapter: str, content: AdapterContent, percentage: float | None, source: str) -> None:
    from rich.console import Console
    from rich.table import Table

    config = content.config
    prompts = f"{config.num_visual_prompts} visual in {config.num_segments} segments ({config.segment_layout})"
    labels = config.labels or []
    share = "the percentage needs --base MODEL" if percentage is None else f"{percentage:.3f} % of the model, {source}"
    facts = {
        "base model": config.base_model_name_or_path or "not named",
        "format": f"version {config.format_version}, {content.file_size:,} bytes",
        "prompts": f"{prompts}, {config.num_kv_prompts} key-value, {config.visual_prompt_mode}",
        "labels": f"{len(labels)}: {', '.join(labels[:6])}{', ...' if len(labels) > 6 else ''}" if labels else "none",
        "tuned values": f"prompts {content.num_prompt_values:,} + head {content.num_head_values:,} = "
        f"{content.num_tuned_values:,} ({share})",
    }
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(adapter)
    for name, fact in facts.items():
        console.print(f"  {name:<13} {fact}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("layer", "prompts", "segments", "kv prompts", "values"):
        table.add_column(name, justify="right")
    for layer in content.layers:
        numbers = (layer.num_visual_prompts, layer.num_segments, layer.num_kv_prompts, f"{layer.num_values:,}")
        table.add_row(str(layer.index), *map(str, numbers))
    console.print()
    console.print(table)
    _show_map([layer for layer in content.layers if layer.segments_kept], console)


def _show_map(layers: list[LayerContent], console: Any) -> None:
    """Draws which segments are alive: a character per segment where the terminal is wide enough, else per prompt."""
    if not layers:
        return
    kept = layers[0].segments_kept
    per_segment = 6 + len(kept) * (len(kept[0]) + 1) <= console.width
    alive, pruned, shares = ALIVE, PRUNED, SHARES
    if not console.encoding.startswith("utf"):
        alive, pruned, shares = "#", ".", ".12345678"

    def drawn(prompt: list[bool]) -> str:
        if per_segment:
            return "".join(alive if segment else pruned for segment in prompt) + " "
        return shares[-(-8 * sum(prompt) // len(prompt))]

    unit = f"segment of a prompt, {pruned} where it is pruned"
    if not per_segment:
        unit = f"prompt, the higher the more of its segments are alive, {pruned} where it is pruned"
    console.print(f"\nlayer  a character for every {unit}")
    for layer in layers:
        console.print(f"{layer.index:>5}  {''.join(map(drawn, layer.segments_kept)).rstrip()}")


# --------------------------------------------------------------------------------------------------------------- prune
def _amount(text: str) -> float | int:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a ratio such as 0.5 nor a whole number such as 3.") from error


@app.command()
def prune(
    adapter: Adapter,
    data: Annotated[str, typer.Option(help="Folder with a folder of pictures per class, or a data set of the Hub.")],
    output: Output,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help="Prompts to prune in every layer: a ratio (0.5) or number (3)."),
    ] = None,
    segments: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="Segments to prune in every prompt that stays, likewise.")
    ] = None,
    max_tuned_percentage: Annotated[
        float | None, typer.Option(help="Instead of amounts: tuned values in percent of the model, with the head.")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    base: Base = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in a forward pass.")] = 32,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Pictures of a split to use, by default all.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn from the pictures.")] = 0,
) -> None:
    """Prune a trained adapter, without training it again.

    Scores prompts and segments on training pictures. Without amounts and without a budget, all amounts are compared on
    the validation pictures, or on a fifth of the training pictures where there are none.
    """
    amounts = None if tokens is segments is None else (_amount(tokens or "0"), _amount(segments or "0"))
    if max_tuned_percentage is not None:
        if amounts is not None:
            raise typer.BadParameter("pass either --max-tuned-percentage or --tokens and --segments, not both.")
        if not 0.0 < max_tuned_percentage < 100.0:
            raise typer.BadParameter(f"--max-tuned-percentage lies between 0 and 100, got {max_tuned_percentage}.")
    with _command():
        from .hub.card import write_card
        from .hub.companion import facts_of
        from .hub.loading import load
        from .images import accuracy, load_pictures
        from .pruning.importance import score_prompts
        from .pruning.ranking import apply_gates, current_gates
        from .pruning.report import PruningReport

        _refuse_taken(output)
        model = load(adapter, revision=revision, subfolder=subfolder, base_model=base)
        config = model.peft_config["default"]
        processor = _processor_of(adapter, revision, subfolder, base or config.base_model_name_or_path)
        pictures = load_pictures(
            data, config.labels, processor, batch_size=batch_size, max_samples=max_samples, seed=seed
        )
        before, accuracy_before = model.prompt_summary(), accuracy(model, pictures.validation)
        scores = score_prompts(model, pictures.training)
        gates, search = _choose(model, scores, pictures.validation, amounts, max_tuned_percentage)
        gates = gates & current_gates(model)
        apply_gates(model, gates)
        after = model.prompt_summary()

        model.save_pretrained(output)
        processor.save_pretrained(output)
        report = PruningReport.build(
            scores=scores,
            gates=gates,
            search=search,
            step=None,
            rewound_to="none",
            layers=_prompted_layers(model),
            tuned_values_before=before.num_tuned_values,
            tuned_values_after=after.num_tuned_values,
            tuned_percentage_before=before.tuned_percentage,
            tuned_percentage_after=after.tuned_percentage,
        )
        report.save(output)
        saved = load(output, base_model=base)
        accuracy_after = accuracy(saved, pictures.validation)  # of what has been written
        write_card(output, facts_of(model, config, "default"), metrics={"accuracy": accuracy_after})
        if search is not None:
            print(f"{search}\n")
        _show_change(before, after, accuracy_before, accuracy_after, len(pictures.validation.dataset))  # type: ignore[arg-type]
        if search is not None:
            print("The pruning was chosen on the same pictures, so this accuracy is a little too good.")
        print(
            f"Saved in {output}, not trained again. To win accuracy back, prune in a training run and rewind: that is "
            "what peft_e2vpt.PruneRewindCallback does."
        )


def _prompted_layers(model: Any) -> list[int]:
    from .tuner.prompt_layers import visual_prompt_layers

    return [layer.index for layer in visual_prompt_layers(model)[1]]


def _choose(
    model: Any,
    scores: ImportanceScores,
    validation: Any,
    amounts: tuple[float | int, float | int] | None,
    max_tuned_percentage: float | None,
) -> tuple[Gates, PruningSearch | None]:
    from .pruning import ranking as pruning
    from .pruning.search import search_pruning

    if amounts is not None:
        return pruning.prune(scores, *amounts), None
    if max_tuned_percentage is not None:
        return pruning.prune_to_percentage(model, scores, max_tuned_percentage), None
    search = search_pruning(model, scores, validation)
    return search.gates, search


def _processor_of(adapter: str, revision: str | None, subfolder: str | None, base: str | None) -> Any:
    """The image processor beside an adapter, else that of its base model."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(adapter, revision=revision or "main", subfolder=subfolder or "")
    except OSError:
        pass
    try:
        return AutoImageProcessor.from_pretrained(base)
    except OSError as error:
        raise ValueError(
            f"Neither the adapter {adapter} nor its base model {base} has an image processor: save one beside the "
            "adapter with processor.save_pretrained(...)."
        ) from error


def _show_change(
    before: PromptSummary, after: PromptSummary, accuracy_before: float, accuracy_after: float, num_pictures: int
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    counts = {
        "visual prompts alive": [sum(layer.num_visual_prompts for layer in s.layers) for s in (before, after)],
        "segments alive": [sum(layer.num_segments for layer in s.layers) for s in (before, after)],
        "tuned values, with the head": [s.num_tuned_values for s in (before, after)],
    }
    for name, numbers in counts.items():
        table.add_row(name, *(f"{number:,}" for number in numbers))
    table.add_row("in percent of the model", *(f"{s.tuned_percentage:.3f}" for s in (before, after)))
    table.add_row(f"accuracy on {num_pictures:,} pictures", f"{accuracy_before:.3f}", f"{accuracy_after:.3f}")
    Console(highlight=False).print(table)


def _refuse_taken(output: Path) -> None:
    from peft.utils import CONFIG_NAME

    if (output / CONFIG_NAME).exists():
        raise ValueError(f"There is an adapter in {output} already: name another folder for the output.")


# ------------------------------------------------------------------------------------------------------------- convert
@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT.pth", help="A checkpoint of the authors' released code.")
    ],
    base: Annotated[str, typer.Option(help="The backbone that it was trained on: a folder, or a model of the Hub.")],
    output: Output,
) -> None:
    """Convert a checkpoint of the authors' released code into an adapter with the same logits."""
    with _command():
        from transformers import AutoModelForImageClassification

        from .hub.conversion import read_checkpoint

        _refuse_taken(output)
        released = read_checkpoint(checkpoint)
        model = AutoModelForImageClassification.from_pretrained(
            base, num_labels=released.num_labels, ignore_mismatched_sizes=True
        )
        adapted = released.adapt(model)
        adapted.save_pretrained(output)
        print(adapted.prompt_summary())
        print(f"Saved in {output}.")


# ---------------------------------------------------------------------------------------------------------------- card
@app.command()
def card(
    adapter: Adapter,
    revision: Revision = None,
    subfolder: Subfolder = None,
    base: Base = None,
    write: Annotated[bool, typer.Option("--write", help="Write README.md into the folder of the adapter.")] = False,
) -> None:
    """Print the model card of a saved adapter, or write it. Results of an earlier card are kept."""
    with _command():
        from tempfile import TemporaryDirectory

        from .hub.card import CARD_NAME

        if write and not Path(adapter).is_dir():
            raise ValueError(f"{adapter} is no folder to write a card into; peft_e2vpt.push_to_hub uploads one.")
        with TemporaryDirectory() as empty:
            folder = Path(adapter, subfolder or "") if write else Path(empty)
            _write_card(adapter, revision, subfolder, base, folder)
            text = f"Wrote {folder / CARD_NAME}." if write else (folder / CARD_NAME).read_text(encoding="utf-8")
        print(text)


def _write_card(adapter: str, revision: str | None, subfolder: str | None, base: str | None, folder: Path) -> None:
    """Writes the card of an adapter into a folder; what the card tells of other files is brought there."""
    import shutil

    from huggingface_hub import ModelCard
    from yaml import YAMLError

    from .hub.card import (
        BY_A_TRAINER,
        CARD_NAME,
        PROCESSOR_NAMES,
        Location,
        is_replaceable,
        stated_results,
        write_card,
    )
    from .hub.companion import facts_of
    from .hub.loading import adapter_file, load_in_outline
    from .pruning.report import REPORT_NAME

    model = load_in_outline(adapter, revision=revision, subfolder=subfolder, base_model=base)
    config = model.peft_config["default"]
    for name in (CARD_NAME, REPORT_NAME, *PROCESSOR_NAMES):
        try:
            path = adapter_file(adapter, name, revision, subfolder)
        except ValueError:  # an adapter need not have it
            continue
        if path.parent != folder:
            shutil.copy(path, folder / name)
    earlier, results = None, {}
    if (folder / CARD_NAME).exists():
        text = (folder / CARD_NAME).read_text(encoding="utf-8")
        if not is_replaceable(text) and BY_A_TRAINER not in text:
            raise ValueError(
                f"Somebody has edited the card of {adapter}, so it stays: remove {CARD_NAME} to have it made anew."
            )
        try:
            earlier = ModelCard.load(folder / CARD_NAME, ignore_metadata_errors=True)
        except YAMLError as error:
            raise ValueError(f"The metadata at the top of the card of {adapter} are not YAML: mend them.") from error
        results = stated_results(earlier)
    write_card(
        folder,
        facts_of(model, config, "default"),
        Location(adapter, revision, subfolder),
        metrics=results,
        earlier=None if earlier is None else earlier.data,
    )
