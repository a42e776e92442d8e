# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The files of a saved adapter: found in a folder or on the Hub, and checked before anything is built from them."""

from __future__ import annotations

import json
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
from ..tuner.config import E2VPTConfig


LFS_POINTER = b"version https://git-lfs"


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
        if not path.exists():
            raise ValueError(missing)
        return path
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON, or of its encoding
        raise ValueError(_damaged(path)) from error
    method = content.get("peft_type") if isinstance(content, dict) else None
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
        raise ValueError(_damaged(path)) from error
    return path


def _exists(where: str, name: str, revision: str | None, subfolder: str | None, **download: Any) -> bool:
    try:
        adapter_file(where, name, revision, subfolder, **download)
    except ValueError:
        return False
    return True


def _damaged(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull where it was cloned."
    return f"{path} is damaged or incomplete: copy it again, or download it with force_download=True."
