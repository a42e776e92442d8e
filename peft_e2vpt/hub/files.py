# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The files of a saved adapter: found in a folder or on the Hub, and checked before anything is built from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .._compat import METHOD
from ..tuner.config import E2VPTConfig, damaged, read_settings


def adapter_file(
    where: str, name: str, revision: str | None = None, subfolder: str | None = None, **download: Any
) -> Path:
    """The path of a file of an adapter; one on the Hub is downloaded.

    Args:
        where: a repository of the Hub, or a folder.
        name: of the file.
        revision: branch, tag or commit of the repository.
        subfolder: where in the repository or folder the adapter lies.
        download: settings of the download.

    Raises:
        ValueError: there is no such file, or the Hub is not reached.
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
    try:
        return Path(hf_hub_download(where, name, revision=revision, subfolder=subfolder, **download))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"The adapter {adapter} is neither in a folder here nor in the cache, and the Hub was not reached: check "
            "the path and the network, and whether HF_HUB_OFFLINE is set."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{missing} If the repository is private, log in with hf auth login, or pass token=..."
        ) from error
    except (EntryNotFoundError, HFValidationError) as error:
        raise ValueError(missing) from error


def read_config(where: str, revision: str | None = None, subfolder: str | None = None, **download: Any) -> E2VPTConfig:
    """The configuration of an adapter; the arguments are those of `adapter_file`.

    Raises:
        ValueError: there is no adapter, its configuration is damaged, or it is not one of E2VPT.
    """
    path = adapter_file(where, CONFIG_NAME, revision, subfolder, **download)
    method = read_settings(path).get("peft_type")
    if method is None:
        raise ValueError(f"{path} is not the configuration of an adapter: it has no peft_type.")
    if method != METHOD:
        name = f"{where}/{subfolder}" if subfolder else where
        raise ValueError(f"The adapter at {name} is one of {method}, not of {METHOD}: load it with PEFT alone.")
    config: E2VPTConfig = E2VPTConfig.from_pretrained(str(path.parent))
    return config


def checked_tensors(where: str, revision: str | None = None, subfolder: str | None = None, **download: Any) -> Path:
    """The path of an adapter's tensors, of which the header can be read; the arguments are those of `adapter_file`.

    Raises:
        ValueError: there is no such file, only a pickle, or it is damaged.
    """
    try:
        path = adapter_file(where, SAFETENSORS_WEIGHTS_NAME, revision, subfolder, **download)
    except ValueError as error:
        if not _exists(where, WEIGHTS_NAME, revision, subfolder, **download):
            raise
        name = f"{where}/{subfolder}" if subfolder else where
        raise ValueError(
            f"The adapter at {name} has its tensors in {WEIGHTS_NAME}, a pickle, which can run code when it is read. "
            f"If you trust it, write it anew: safetensors.torch.save_file(torch.load({WEIGHTS_NAME!r}, "
            f"weights_only=True), {SAFETENSORS_WEIGHTS_NAME!r})."
        ) from error
    try:
        with safe_open(path, framework="pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise ValueError(damaged(path)) from error
    return path


def _exists(where: str, name: str, revision: str | None, subfolder: str | None, **download: Any) -> bool:
    try:
        adapter_file(where, name, revision, subfolder, **download)
    except ValueError:
        return False
    return True
