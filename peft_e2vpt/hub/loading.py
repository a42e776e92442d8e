# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`load`: an adapter with its base model and its head, in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

from .._compat import METHOD
from ..tuner.config import E2VPTConfig


# settings of a download, good for the adapter and its base model
DOWNLOAD_SETTINGS = ("token", "cache_dir", "local_files_only", "force_download")


def load(
    repo_or_path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    base_model: str | Path | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **settings: Any,
) -> PeftModel:
    """Loads an E2VPT adapter with everything it needs: the base model, a head for its classes, and itself.

    ```python
    model = peft_e2vpt.load("me/vit-e2vpt-pets")
    classifier = pipeline(
        "image-classification", model=model.get_base_model(), image_processor="me/vit-e2vpt-pets"
    )
    ```

    Args:
        repo_or_path: a repository of the Hub, or a folder.
        revision: branch, tag or commit of the repository.
        subfolder: where in the repository or folder the adapter lies.
        base_model: name or path of the base model where it is not the one that the adapter names.
        adapter_name: name of the adapter in the model.
        is_trainable: whether it is going to be trained further.
        settings: for the base model's `from_pretrained`, such as `dtype`, `device_map`, `attn_implementation`;
            `token`, `cache_dir`, `local_files_only` and `force_download` hold for the adapter too.

    Returns:
        The adapted model, in eval mode unless `is_trainable`.

    Raises:
        ValueError: there is no adapter, the Hub is not reached, the adapter is not one of E2VPT, its base model is not
            named or cannot be loaded, or `num_labels`, `id2label` or `label2id` contradict it.
    """
    where = str(repo_or_path)
    download = {name: settings[name] for name in DOWNLOAD_SETTINGS if name in settings}
    config = read_config(where, revision, subfolder, **download)
    name = _name_of_base(where, config, base_model)
    settings = _with_labels(where, config, settings)
    if base_model is None and config.revision is not None:
        settings.setdefault("revision", config.revision)
    try:
        base: nn.Module = class_of(where, config).from_pretrained(name, **settings)
    except OSError as error:
        raise ValueError(
            f"The base model {name!r} of the adapter {where} cannot be loaded; if it has moved, pass base_model=..."
        ) from error
    if not is_trainable:
        base.eval()
    return PeftModel.from_pretrained(
        base,
        where,
        adapter_name=adapter_name,
        is_trainable=is_trainable,
        config=config,
        revision=revision,
        subfolder=subfolder,
        **download,
    )


def load_in_outline(
    repo_or_path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    base_model: str | Path | None = None,
) -> PeftModel:
    """Loads an adapter onto the shape of its base model, to be counted and described but not run.

    Of the base model only its config is read. Its weights are memory that nobody has written to.

    Args:
        repo_or_path: a repository of the Hub, or a folder.
        revision: branch, tag or commit of the repository.
        subfolder: where in the repository or folder the adapter lies.
        base_model: name or path of the base model where it is not the one that the adapter names.

    Raises:
        ValueError: there is no adapter, it is not one of E2VPT, or the config of its base model cannot be read.
    """
    where = str(repo_or_path)
    config = read_config(where, revision, subfolder)
    name = _name_of_base(where, config, base_model)
    settings = _with_labels(where, config, {})
    settings.pop("ignore_mismatched_sizes", None)
    if base_model is None and config.revision is not None:
        settings["revision"] = config.revision
    try:
        of_base = transformers.AutoConfig.from_pretrained(name, **settings)
    except (OSError, ValueError) as error:
        raise ValueError(f"The config of the base model {name!r} cannot be read; name another base model.") from error
    cls = class_of(where, config)
    with torch.device("meta"):
        base = cls(of_base) if issubclass(cls, transformers.PreTrainedModel) else cls.from_config(of_base)
    base.to_empty(device="cpu")
    return PeftModel.from_pretrained(base, where, config=config, revision=revision, subfolder=subfolder)


def _name_of_base(where: str, config: E2VPTConfig, base_model: str | Path | None) -> str:
    name = str(base_model or config.base_model_name_or_path or "")
    if not name:
        raise ValueError(
            f"The adapter {where} names no base model: pass base_model=..., or build the model and load the adapter "
            "onto it with PeftModel.from_pretrained(model, ...)."
        )
    return name


def adapter_file(
    where: str, name: str, revision: str | None = None, subfolder: str | None = None, **download: Any
) -> Path:
    """The path of a file of an adapter; one on the Hub is downloaded by itself.

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
        ValueError: there is no adapter, or it is not one of E2VPT.
    """
    path = adapter_file(where, CONFIG_NAME, revision, subfolder, **download)
    content = json.loads(path.read_text(encoding="utf-8"))
    method = content.get("peft_type")
    if method != METHOD:
        name = f"{where}/{subfolder}" if subfolder else where
        raise ValueError(f"The adapter at {name} is one of {method}, not of {METHOD}: load it with PEFT alone.")
    config: E2VPTConfig = E2VPTConfig.from_pretrained(str(path.parent))
    return config


def class_of(where: str, config: E2VPTConfig) -> Any:
    """The class of a base model: one of transformers, so that an adapter cannot name other code to import."""
    if config.auto_mapping is None:  # with a task type PEFT writes none
        return transformers.AutoModelForImageClassification
    name = config.auto_mapping["base_model_class"]
    if not hasattr(transformers, name):
        raise ValueError(
            f"The adapter {where} was made for a {name}, which transformers {transformers.__version__} does not have: "
            "build that model and load the adapter onto it with PeftModel.from_pretrained(model, ...)."
        )
    return getattr(transformers, name)


def _with_labels(where: str, config: E2VPTConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the base model with the classes of the adapter."""
    if config.labels is None:
        return settings
    theirs: dict[str, Any] = {
        "num_labels": len(config.labels),
        "id2label": dict(enumerate(config.labels)),
        "label2id": {name: index for index, name in enumerate(config.labels)},
    }
    for name, value in theirs.items():
        if name in settings and settings[name] != value:
            raise ValueError(
                f"{name}={settings[name]!r} contradicts the adapter {where}, which has {len(config.labels)} classes: "
                "leave it out, and change model.config.id2label afterwards to rename classes."
            )
    settings = {**settings, **theirs}
    del settings["num_labels"]  # follows from id2label
    if config.modules_to_save:  # the adapter has the head, whatever the base model's may be
        settings["ignore_mismatched_sizes"] = True
    return settings
