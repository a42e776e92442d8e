# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt card`: the model card of a saved adapter, made anew."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from .files import CARD_MARKER, CARD_NAME, find_file
from .messages import errors_in_one_sentence, with_models
from .options import Adapter, Base, Revision, Subfolder


if TYPE_CHECKING:
    from huggingface_hub import ModelCard


def card(
    adapter: Adapter,
    revision: Revision = None,
    subfolder: Subfolder = None,
    base: Base = None,
    write: Annotated[bool, typer.Option("--write", help="Write README.md into the folder of the adapter.")] = False,
) -> None:
    """Print the model card of a saved adapter, or write it anew. Results of an earlier card are kept."""
    if not write and base is None:
        with errors_in_one_sentence():
            stored = _stored_card(adapter, revision, subfolder)
        if stored is not None:
            print(stored)
            return
    with with_models():
        if write and not Path(adapter).is_dir():
            raise ValueError(f"{adapter} is no folder to write a card into; peft_e2vpt.push_to_hub uploads one.")
        if write:
            _earlier_card(Path(adapter, subfolder or "", CARD_NAME), adapter)  # refused before a model is built
        with TemporaryDirectory() as empty:
            folder = Path(adapter, subfolder or "") if write else Path(empty)
            _write_card(adapter, revision, subfolder, base, folder)
            text = f"Wrote {folder / CARD_NAME}." if write else (folder / CARD_NAME).read_text(encoding="utf-8")
        print(text)


def _stored_card(adapter: str, revision: str | None, subfolder: str | None) -> str | None:
    """The card beside an adapter where it is the one that would be made, so that no library for models is imported.

    It is if this package has written it, about as many parameters as the adapter has now, at the place where it lies.
    """
    from .content import inspect_adapter

    if inspect_adapter(adapter, revision=revision, subfolder=subfolder).tuned_percentage is None:
        return None
    path = find_file(adapter, CARD_NAME, revision, subfolder)
    text = path.read_text(encoding="utf-8")
    named = re.search(r'(?:load|from_pretrained)\((?:model, )?"((?:[^"\\]|\\.)*)"', text)
    if CARD_MARKER not in text or named is None:
        return None
    place = json.loads(f'"{named[1]}"')
    is_here = place == adapter or (Path(adapter).is_dir() and Path(place).resolve() == path.resolve().parent)
    return text if is_here else None


def _write_card(adapter: str, revision: str | None, subfolder: str | None, base: str | None, folder: Path) -> None:
    """Writes the card of an adapter into a folder; the files that the card mentions are copied there."""
    from peft_e2vpt.hub.card import PROCESSOR_NAMES, Location, results_in_text, write_card
    from peft_e2vpt.hub.companion import facts_of
    from peft_e2vpt.hub.loading import load_in_outline
    from peft_e2vpt.pruning.report import REPORT_NAME

    model = load_in_outline(adapter, revision=revision, subfolder=subfolder, base_model=base)
    for name in (CARD_NAME, REPORT_NAME, *PROCESSOR_NAMES):
        try:
            path = find_file(adapter, name, revision, subfolder)
        except ValueError:  # an adapter need not have it
            continue
        if path.parent != folder:
            shutil.copy(path, folder / name)
    earlier, results = _earlier_card(folder / CARD_NAME, adapter), {}
    if earlier is not None and not earlier.data.get("eval_results"):
        results = results_in_text(earlier.text)
    write_card(
        folder,
        facts_of(model, model.peft_config["default"], "default"),
        Location(adapter, revision, subfolder),
        metrics=results,
        earlier=None if earlier is None else earlier.data,
    )


def _earlier_card(path: Path, adapter: str) -> ModelCard | None:
    """The card that is to be replaced, `None` if there is none; one that somebody has edited is refused."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    from peft_e2vpt.hub.card import BY_A_TRAINER, is_replaceable

    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    if not is_replaceable(text) and BY_A_TRAINER not in text:
        raise ValueError(
            f"Somebody has edited the card of {adapter}, so it stays: remove {CARD_NAME} to have it made anew."
        )
    try:
        earlier: ModelCard = ModelCard.load(path, ignore_metadata_errors=True)
    except YAMLError as error:
        raise ValueError(f"The metadata at the top of the card of {adapter} are not valid YAML: fix them.") from error
    return earlier
