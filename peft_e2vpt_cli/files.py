# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Finds and reads the files of an adapter without PEFT.

Names and numbers are those of PEFT and of `peft_e2vpt`, whose import would take seconds. A test compares them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


METHOD = "E2VPT"
FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
METADATA_KEY = "e2vpt"
CARD_MARKER = "<!-- Written by peft_e2vpt, and anew with every save. Remove this line to keep what you change. -->"
LFS_POINTER = b"version https://git-lfs"


def find_file(where: str, name: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The path of a file of an adapter; a file on the Hub is downloaded.

    Raises:
        ValueError: there is no such file, or the Hub cannot be reached.
    """
    adapter = f"{where}/{subfolder}" if subfolder else where
    missing = f"There is no adapter at {adapter}: no {name} was found."
    if Path(where).is_dir():
        path = Path(where, subfolder or "", name)
        if not path.is_file():
            raise ValueError(missing)
        return path
    if Path(where).is_file():
        raise ValueError(f"There is no adapter at {adapter}, which is a file: pass the folder that it lies in.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(where, name, revision=revision, subfolder=subfolder))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"The adapter {adapter} is neither in a folder here nor in the cache, and the Hub was not reached: check "
            "the path and the network, and whether HF_HUB_OFFLINE is set."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{missing} If the repository is private, log in with hf auth login.") from error
    except (EntryNotFoundError, HFValidationError) as error:
        raise ValueError(missing) from error


def adapters_below(folder: Path) -> list[Path]:
    """The folders with adapters inside a folder, at any depth, as a training run leaves them.

    Hidden folders, and those that may not be read, are passed over.
    """
    return sorted(_with_configs(folder), key=lambda path: _in_order(path.relative_to(folder).as_posix()))


def _with_configs(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if CONFIG_NAME in names and Path(place) != folder:
            yield Path(place)


def _in_order(text: str) -> list[tuple[bool, int, str]]:
    """What sorts names as people do: checkpoint-9 before checkpoint-10."""
    parts = (part for part in re.split(r"(\d+)", text) if part)
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def read_config(where: str, revision: str | None = None, subfolder: str | None = None) -> dict[str, Any]:
    """What `adapter_config.json` says.

    Raises:
        ValueError: there is no adapter, its configuration is damaged, it is not one of E2VPT, or its format is newer
            than this package.
    """
    path = find_file(where, CONFIG_NAME, revision, subfolder)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of the JSON, or of its encoding
        raise ValueError(damaged(path, error)) from error
    if not isinstance(config, dict) or config.get("peft_type") is None:
        raise ValueError(f"{path} is not the configuration of an adapter: it has no peft_type.")
    method, format_version = config["peft_type"], config.get("format_version", 1)
    if method != METHOD:
        name = f"{where}/{subfolder}" if subfolder else where
        raise ValueError(f"The adapter at {name} is one of {method}, not of {METHOD}: load it with PEFT alone.")
    if not isinstance(format_version, int) or format_version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: The adapter has format_version={format_version}, and this version of peft_e2vpt reads up to "
            f"{FORMAT_VERSION}: pip install -U peft_e2vpt."
        )
    labels = config.get("labels")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(name, str) for name in labels)):
        raise ValueError(f"{path}: labels must be None or a list of names.")
    return config


def read_method(folder: Path) -> str:
    """The method of the adapter in a folder as PEFT calls it, empty if its configuration does not say."""
    try:
        method = json.loads(Path(folder, CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError, RecursionError, OSError):
        return ""
    return method if isinstance(method, str) else ""


def damaged(path: Path, error: Exception) -> str:
    """What is wrong with a file that cannot be read."""
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull where it was cloned."
    return f"{path} is damaged: {error}."


def printable(text: object) -> str:
    """A text from a file without what a terminal would take for a command."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))
