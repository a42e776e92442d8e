# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Finds and reads the files of an adapter without PEFT.

Names and numbers are those of PEFT and of `peft_e2vpt`, whose import would take seconds. A test compares them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


METHOD = "E2VPT"
FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
METADATA_KEY = "e2vpt"


def find_file(where: str, name: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The path of a file of an adapter; a file on the Hub is downloaded.

    Raises:
        ValueError: there is no such file, or the Hub cannot be reached.
    """
    adapter = f"{where}/{subfolder}" if subfolder else where
    missing = f"There is no adapter at {adapter}: no {name} was found."
    if Path(where).is_dir():
        path = Path(where, subfolder or "", name)
        if not path.exists():
            raise ValueError(missing)
        return path
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


def read_config(where: str, revision: str | None = None, subfolder: str | None = None) -> dict[str, Any]:
    """What `adapter_config.json` says.

    Raises:
        ValueError: there is no adapter, it is not one of E2VPT, or its format is newer than this package.
    """
    path = find_file(where, CONFIG_NAME, revision, subfolder)
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    method, format_version = config.get("peft_type"), config.get("format_version", 1)
    if method != METHOD:
        name = f"{where}/{subfolder}" if subfolder else where
        raise ValueError(f"The adapter at {name} is one of {method}, not of {METHOD}: load it with PEFT alone.")
    if format_version > FORMAT_VERSION:
        raise ValueError(
            f"The adapter has format_version={format_version}, and this version of peft_e2vpt reads up to "
            f"{FORMAT_VERSION}: pip install -U peft_e2vpt."
        )
    return config
