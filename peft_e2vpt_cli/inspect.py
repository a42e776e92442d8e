# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt inspect`: what is in an adapter, as a table or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .files import CONFIG_NAME, METHOD, adapters_below, printable, read_method
from .messages import errors_in_one_sentence, print_table, with_models
from .options import Adapter, Revision, Subfolder


if TYPE_CHECKING:
    from rich.console import Console

    from .content import AdapterContent, LayerContent


KEPT, PRUNED = "\N{FULL BLOCK}", "\N{MIDDLE DOT}"
SHARES = PRUNED + "".join(chr(ord("\N{LOWER ONE EIGHTH BLOCK}") + eighth) for eighth in range(8))


def inspect(
    adapter: Adapter,
    revision: Revision = None,
    subfolder: Subfolder = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model, of which only the config is read, to compute the tuned percentage."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in an adapter, or which adapters are in the folder of a run.

    Reads files of adapters only, not those of their base model.
    """
    folder = Path(adapter, subfolder or "")
    inside = adapters_below(folder) if folder.is_dir() else []
    if inside and not (folder / CONFIG_NAME).is_file():
        _list_run(adapter, folder, inside, as_json)
        return
    with errors_in_one_sentence():
        from .content import inspect_adapter

        content = inspect_adapter(adapter, revision=revision, subfolder=subfolder)
    percentage, source = content.tuned_percentage, "according to its card"
    if base is not None:
        percentage, source = _percentage_of(adapter, revision, subfolder, base), f"of {base}"
    if as_json:
        print(json.dumps({**content.as_dict(), "tuned_percentage": percentage}, indent=2))
    else:
        _show(adapter, content, percentage, source)
        if inside:
            names = ", ".join(printable(path.relative_to(folder).as_posix()) for path in inside)
            print(f"\nFurther adapters inside: {names}.")


def _list_run(title: str, folder: Path, adapters: list[Path], as_json: bool) -> None:
    """Prints a line for every adapter in a folder; one that is damaged is named and does not hide the others."""
    entries = [{"adapter": path.relative_to(folder).as_posix(), **_entry(path)} for path in adapters]
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    table = [["adapter", "method", "prompts", "segments", "kv prompts", "parameters", "% of the model"]]
    for entry in entries:
        percentage, parameters = entry.get("tuned_percentage"), entry.get("tuned_values")
        cells = [entry["adapter"], entry["method"] or "unknown"]
        cells += [entry.get(name, "") for name in ("visual_prompts", "segments", "kv_prompts")]
        cells += ["" if parameters is None else f"{parameters:,}", "" if percentage is None else f"{percentage:.3f}"]
        table.append([printable(cell) for cell in cells])
    count = f"{len(adapters)} adapters" if len(adapters) > 1 else "1 adapter"
    print(f"{printable(title)}: {count}; peft-e2vpt inspect {Path(title) / 'ADAPTER'} shows one\n")
    print_table(table, left=2)
    for entry in entries:
        if "error" in entry:
            print(f"\n{printable(entry['adapter'])}: {printable(entry['error'])}")


def _entry(folder: Path) -> dict[str, Any]:
    """What the line of an adapter says, summed over its layers; of another method only its name."""
    from .content import inspect_adapter

    method = read_method(folder)
    if method and method != METHOD:
        return {"method": method}
    try:
        content = inspect_adapter(folder)
    except (ValueError, OSError) as error:
        return {"method": method, "error": str(error)}
    return {
        "method": method,
        "base_model": content.config.get("base_model_name_or_path"),
        "labels": content.config.get("labels"),
        "visual_prompts": sum(layer.num_visual_prompts for layer in content.layers),
        "segments": sum(layer.num_segments for layer in content.layers),
        "kv_prompts": sum(layer.num_kv_prompts for layer in content.layers),
        "tuned_values": content.num_tuned_values,
        "tuned_percentage": content.tuned_percentage,
    }


def _percentage_of(adapter: str, revision: str | None, subfolder: str | None, base: str) -> float:
    with with_models():
        from peft_e2vpt.hub.loading import load_in_outline

        model = load_in_outline(adapter, revision=revision, subfolder=subfolder, base_model=base)
        percentage: float = model.prompt_summary().tuned_percentage
    return percentage


def _show(adapter: str, content: AdapterContent, percentage: float | None, source: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(adapter)
    for name, fact in _facts(content, percentage, source).items():
        console.print(f"  {name:<18} {printable(fact)}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("layer", "prompts", "segments", "kv prompts", "parameters"):
        table.add_column(name, justify="right")
    for layer in content.layers:
        numbers = (layer.num_visual_prompts, layer.num_segments, layer.num_kv_prompts, f"{layer.num_values:,}")
        table.add_row(str(layer.index), *map(str, numbers))
    console.print()
    console.print(table)
    _show_map([layer for layer in content.layers if layer.segments_kept], console)


def _facts(content: AdapterContent, percentage: float | None, source: str) -> dict[str, str]:
    def setting(name: str) -> Any:
        return content.config.get(name, "default")

    labels = content.config.get("labels") or []
    share = "the percentage needs --base MODEL" if percentage is None else f"{percentage:.3f} % of the model, {source}"
    return {
        "base model": content.config.get("base_model_name_or_path") or "not named",
        "format": f"version {content.config.get('format_version', 1)}, {content.file_size:,} bytes",
        "prompts": f"{setting('num_visual_prompts')} visual in {setting('num_segments')} segments "
        f"({setting('segment_layout')}), {setting('num_kv_prompts')} key-value, {setting('visual_prompt_mode')}",
        "labels": f"{len(labels)}: {', '.join(labels[:6])}{', ...' if len(labels) > 6 else ''}" if labels else "none",
        "trained parameters": f"prompts {content.num_prompt_values:,} + head {content.num_head_values:,} = "
        f"{content.num_tuned_values:,} ({share})",
    }


def _show_map(layers: list[LayerContent], console: Console) -> None:
    """Draws which segments are kept: a character per segment if the terminal is wide enough, else per prompt."""
    if not layers:
        return
    first = layers[0].segments_kept
    per_segment = 6 + len(first) * (len(first[0]) + 1) <= console.width
    kept, pruned, shares = KEPT, PRUNED, SHARES
    if not console.encoding.startswith("utf"):
        kept, pruned, shares = "#", ".", ".12345678"

    def drawn(prompt: list[bool]) -> str:
        if per_segment:
            return "".join(kept if segment else pruned for segment in prompt) + " "
        return shares[-(-8 * sum(prompt) // len(prompt))]

    unit = f"segment of a prompt, {pruned} if it is pruned"
    if not per_segment:
        unit = f"prompt, the higher the more of its segments are kept, {pruned} if it is pruned"
    console.print(f"\nlayer  a character for every {unit}")
    for layer in layers:
        console.print(f"{layer.index:>5}  {''.join(map(drawn, layer.segments_kept)).rstrip()}")
