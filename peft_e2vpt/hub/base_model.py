# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How the model under an adapter is built again: its class, and what sets it apart from its checkpoint.

A model is seldom used as its checkpoint's `config.json` describes it: it has other classes, another `problem_type`, an
image size or a data type of its own. These differences are written into `adapter_config.json`.
"""

from __future__ import annotations

import json
import re
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..tuner.config import E2VPTConfig


MODELLING = re.compile(r"transformers\.models\.\w+\.modeling_\w+")
# what a checkpoint says of itself, what `labels` hold, what would choose code, and what only a run needs
NOT_STORED = {
    "architectures",
    "auto_map",
    "custom_pipelines",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "num_labels",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "trust_remote_code",
    "use_cache",
}


def class_mapping(model: nn.Module) -> dict[str, str]:
    """The class of a model as `adapter_config.json` has it in `auto_mapping`."""
    # FSDP2 puts a class of torch's before the model's own
    cls = next((c for c in type(model).__mro__ if not c.__module__.startswith("torch.")), type(model))
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def class_of(where: str, config: E2VPTConfig) -> Any:
    """The class of a base model: one of transformers, so that an adapter cannot name other code to import.

    Raises:
        ValueError: the adapter was made for another class.
    """
    if config.auto_mapping is None:  # earlier versions wrote none where there is a task type
        return transformers.AutoModelForImageClassification
    name, library = config.auto_mapping["base_model_class"], str(config.auto_mapping.get("parent_library"))
    cls = None
    if library.split(".")[0] == "transformers":
        cls = getattr(transformers, name, None)
        if cls is None and MODELLING.fullmatch(library) and find_spec(library):  # a tower is not public everywhere
            cls = getattr(import_module(library), name, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        full_name = f"{library}.{name}" if hasattr(transformers, name) else name
        raise ValueError(
            f"The adapter {where} was made for a {full_name}, which transformers {transformers.__version__} does not "
            "have: build that model and load the adapter onto it with PeftModel.from_pretrained(model, ...)."
        )
    return cls


def settings_of(model: nn.Module, name: str | None, revision: str | None) -> dict[str, Any] | None:
    """What sets a model apart from its checkpoint: `problem_type`, `image_size`, `dtype`, ...

    Args:
        model: the base model.
        name: of its checkpoint, a folder or a repository that is in the cache. Where it cannot be read, nothing is
            known of it and all settings are returned.
        revision: of the repository.

    Returns:
        The settings, nested as in the model's config; `None` for a model without such a config.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    original = _original(type(model.config), name, revision)
    ours = {name: value for name, value in _as_dict(model.config).items() if hasattr(model.config, name)}
    differences = _differences(ours, original)
    dtype = str(model.dtype).removeprefix("torch.")
    if original.get("dtype") != dtype:
        differences["dtype"] = dtype
    return differences


def _original(cls: type[PreTrainedConfig], name: str | None, revision: str | None) -> dict[str, Any]:
    if not name:
        return {}
    try:
        return _as_dict(cls.from_pretrained(name, revision=revision, local_files_only=True))
    except OSError:  # deleted or moved since
        return {}


def _as_dict(config: PreTrainedConfig) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return content


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in ours.items():
        if name in NOT_STORED or name.startswith("_"):
            continue
        if isinstance(value, dict) and isinstance(theirs.get(name), dict):
            value = _differences(value, theirs[name])
            if value:
                found[name] = value
        elif name not in theirs or value != theirs[name]:
            found[name] = value
    return found


def settings_for(where: str, stored: dict[str, Any] | None, cls: Any, name: str, **download: Any) -> dict[str, Any]:
    """The stored settings as arguments of `from_pretrained`.

    Only what the config of the checkpoint has is taken, so that an adapter cannot pass anything else.

    Args:
        where: the adapter, for the warning.
        stored: `E2VPTConfig.base_model_settings`.
        cls: the class of the base model.
        name: of its checkpoint.
        download: settings of the download.

    Raises:
        OSError: the checkpoint cannot be read.
    """
    if not stored:
        return {}
    known = _as_dict(cls.config_class.from_pretrained(name, **download))
    settings: dict[str, Any] = {}
    unknown = []
    for key, value in stored.items():
        if key == "dtype":
            settings[key] = value
        elif key not in known or key in NOT_STORED or key.startswith("_"):
            unknown.append(key)
        else:
            settings[key] = _merged(known[key], value)
    if unknown:
        warnings.warn(
            f"The adapter {where} has settings of its base model that {cls.config_class.__name__} of transformers "
            f"{transformers.__version__} does not know and that are left out: {', '.join(sorted(unknown))}.",
            stacklevel=3,
        )
    return settings


def _merged(theirs: Any, ours: Any) -> Any:
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return ours
    allowed = {key: value for key, value in ours.items() if key not in NOT_STORED and not key.startswith("_")}
    return theirs | {key: _merged(theirs.get(key), value) for key, value in allowed.items()}
