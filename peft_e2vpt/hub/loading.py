# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`load`: an adapter with its base model and its head, in one call."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from ..tuner.config import E2VPTConfig
from .base_model import (
    built_in_outline,
    check_settings,
    check_size,
    class_of,
    config_class_of,
    is_part_of,
    mismatch,
    settings_for,
)
from .files import checked_tensors, read_config


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
    torch_device: str | torch.device | None = None,
    **settings: Any,
) -> PeftModel:
    """Loads an E2VPT adapter with everything it needs: the base model, a head for its classes, and itself.

    The base model is built as it was when the adapter was saved: its class, `problem_type`, image size and data type
    are in `adapter_config.json`. What the call says comes first.

    ```python
    model = peft_e2vpt.load("me/vit-e2vpt-pets")
    logits = model(pixel_values=pixels).logits
    ```

    Args:
        repo_or_path: a repository of the Hub, or a folder.
        revision: branch, tag or commit of the repository.
        subfolder: where in the repository or folder the adapter lies.
        base_model: name or path of the base model where it is not the one that the adapter names.
        adapter_name: name of the adapter in the model.
        is_trainable: whether it is going to be trained further.
        torch_device: where the model goes; `device_map` among the settings is the other way to say it.
        settings: for the base model's `from_pretrained`, such as `dtype`, `device_map`, `attn_implementation`;
            `token`, `cache_dir`, `local_files_only` and `force_download` hold for the adapter too.

    Returns:
        The adapted model, in eval mode unless `is_trainable`.

    Raises:
        ValueError: there is no adapter, its files are damaged, the Hub is not reached, the adapter is not one of
            E2VPT, its base model is not named, cannot be loaded or has other sizes, or `num_labels`, `id2label` or
            `label2id` contradict it.
    """
    if torch_device is not None and "device_map" in settings:
        raise ValueError("torch_device and device_map both say where the model goes: pass one of them.")
    where = str(repo_or_path)
    download = {name: settings[name] for name in DOWNLOAD_SETTINGS if name in settings}
    config = read_config(where, revision, subfolder, **download)
    path = checked_tensors(where, revision, subfolder, **download)
    _check_labels(where, config, path)
    cls = class_of(where, config)
    name = _name_of_base(where, config, base_model)
    if base_model is None and config.revision is not None:
        settings.setdefault("revision", config.revision)
    of_base = {key: settings[key] for key in (*DOWNLOAD_SETTINGS, "revision") if key in settings}
    settings = _with_labels(where, config, settings)
    safe: dict[str, Any] = {"trust_remote_code": False}  # else transformers asks on the terminal
    if base_model is None:  # a file names it, and cannot have a pickle read
        safe["use_safetensors"] = True
    try:
        stored = _stored_settings(where, config, cls, name, settings, of_base)
        base = _load_base(where, config, cls, name, {**safe, **stored, **settings})
    except OSError as error:
        if "safetensors" in str(error) and base_model is None:
            raise ValueError(
                f"The base model {name!r} of the adapter {where} has no safetensors, and a pickle is not read because "
                f"a file names it: if you trust the model, pass use_safetensors=False, or base_model={name!r}."
            ) from error
        raise ValueError(
            f"The base model {name!r} of the adapter {where} cannot be loaded; if it has moved, pass base_model=..."
        ) from error
    if torch_device is not None:
        base.to(torch_device)
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
        torch_device=None if torch_device is None else str(torch_device),
        **download,
    )


def _load_base(where: str, config: E2VPTConfig, cls: Any, name: str, settings: dict[str, Any]) -> nn.Module:
    """The base model; weights of other sizes than the checkpoint's are allowed where the adapter brings them."""
    if "ignore_mismatched_sizes" in settings or not config.modules_to_save:
        base: nn.Module = cls.from_pretrained(name, **settings)
        return base
    base, info = cls.from_pretrained(name, **settings, ignore_mismatched_sizes=True, output_loading_info=True)
    # buffers of other sizes are computed from the config: class weights of a loss, indices of positions
    parameters = {weight for weight, _ in base.named_parameters() if not is_part_of(weight, config.modules_to_save)}
    different = [entry for entry in info["mismatched_keys"] if entry[0] in parameters]
    if different:
        raise ValueError(mismatch(where, name, *min(different)))
    return base


def _stored_settings(
    where: str, config: E2VPTConfig, cls: Any, name: str, settings: dict[str, Any], download: dict[str, Any]
) -> dict[str, Any]:
    """The settings of the base model that the adapter stores and the call does not give, checked.

    Raises:
        ValueError: they are impossible, or change the shapes of weights that the adapter does not bring.
        OSError: the base model cannot be read.
    """
    theirs = {key: value for key, value in (config.base_model_settings or {}).items() if key not in settings}
    stored = settings_for(where, theirs, cls, name, **download)
    of_shapes = {key: value for key, value in stored.items() if key not in ("dtype", "problem_type")}
    if of_shapes:
        check_settings(where, cls, name, of_shapes, config.modules_to_save or [], **download)
    if config.labels and not config.modules_to_save:  # the head is that of the base model
        original = config_class_of(cls).from_pretrained(name, **download)
        check_size(where, "labels", config.labels, [""] * (getattr(original, "num_labels", None) or 0))
    return stored


def _check_labels(where: str, config: E2VPTConfig, path: Path) -> None:
    """Refuses more classes than the head in an adapter's file has values.

    Raises:
        ValueError: there are more.
    """
    if not config.labels or not config.modules_to_save:
        return
    with safe_open(path, framework="pt") as file:
        slices = [file.get_slice(name) for name in file.keys() if ".e2vpt_" not in name]  # noqa: SIM118
        values = sum(prod(part.get_shape()) for part in slices)
    if len(config.labels) > values:
        raise ValueError(
            f"The adapter {where} has {len(config.labels)} labels, but the {values} values of its head cannot tell so "
            "many classes apart: its adapter_config.json and adapter_model.safetensors do not belong together."
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
    cls = class_of(where, config)
    name = _name_of_base(where, config, base_model)
    settings: dict[str, Any] = {}
    if base_model is None and config.revision is not None:
        settings["revision"] = config.revision
    _check_labels(where, config, checked_tensors(where, revision, subfolder))
    try:
        of_base = config_class_of(cls).from_pretrained(name, **settings)
    except (OSError, ValueError) as error:
        raise ValueError(f"The config of the base model {name!r} cannot be read; name another base model.") from error
    named = _with_labels(where, config, settings)
    settings = {**_stored_settings(where, config, cls, name, named, settings), **named}
    of_base = config_class_of(cls).from_pretrained(name, **settings)
    base = built_in_outline(cls, of_base)
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
    return settings
