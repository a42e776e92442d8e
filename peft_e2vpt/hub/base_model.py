# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How the model under an adapter is built again: its class, and what sets it apart from its checkpoint.

A model is seldom used as its checkpoint's `config.json` describes it: it has other classes, another `problem_type`, an
image size or a data type of its own. These differences are written into `adapter_config.json`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..tuner.config import E2VPTConfig, shown


MODELLING = re.compile(r"transformers\.models\.\w+\.modeling_\w+")
DTYPES = ("float64", "float32", "bfloat16", "float16")
MOST_TIMES, MOST_FROM_NOTHING = 64, 4096  # how much larger than the checkpoint's a number may be that a file asks for
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
    name, library = str(config.auto_mapping.get("base_model_class")), str(config.auto_mapping.get("parent_library"))
    cls = None
    if library.split(".")[0] == "transformers":
        cls = getattr(transformers, name, None)
        if cls is None and MODELLING.fullmatch(library) and find_spec(library):  # a tower is not public everywhere
            cls = getattr(import_module(library), name, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel) and getattr(cls, "config_class", None)):
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
        ValueError: a setting is out of all proportion to that of the checkpoint.
        OSError: the checkpoint cannot be read.
    """
    if not stored:
        return {}
    known = _as_dict(config_class_of(cls).from_pretrained(name, **download))
    settings: dict[str, Any] = {}
    unknown = []
    for key, value in stored.items():
        if key == "dtype":
            if value not in DTYPES:
                raise ValueError(
                    f"The adapter {where} has dtype={shown(value)} in its base_model_settings, which is none of "
                    f"{', '.join(DTYPES)}."
                )
            settings[key] = value
        elif key not in known or key in NOT_STORED or key.startswith("_"):
            unknown.append(key)
        else:
            check_size(where, key, value, known[key])
            settings[key] = _merged(known[key], value)
    if unknown:
        warnings.warn(
            f"The adapter {where} has settings of its base model that {config_class_of(cls).__name__} of transformers "
            f"{transformers.__version__} does not know and that are left out: {', '.join(sorted(unknown))}.",
            stacklevel=3,
        )
    return settings


def check_size(where: str, name: str, ours: Any, theirs: Any) -> None:
    """Refuses numbers and lists that would make a model far larger than its checkpoint, before it is built.

    Args:
        where: the adapter, for the message.
        name: of the setting.
        ours: its value in the adapter's file.
        theirs: its value in the config of the checkpoint.

    Raises:
        ValueError: it is out of all proportion.
    """
    if isinstance(ours, dict):
        for key, value in ours.items():
            check_size(where, f"{name}.{key}", value, theirs.get(key) if isinstance(theirs, dict) else None)
        return
    pairs = [(ours, theirs)]
    if isinstance(ours, list):
        known = theirs if isinstance(theirs, list) else []
        pairs = [(len(ours), len(known)), *zip_longest(ours, known[: len(ours)])]
    for value, usual in pairs:
        usual = usual if isinstance(usual, (int, float)) else 0
        if isinstance(value, (int, float)) and abs(value) > max(MOST_TIMES * abs(usual), MOST_FROM_NOTHING):
            raise ValueError(
                f"The adapter_config.json of {where} has {name}={shown(ours)}, and the base model {shown(theirs)}: a "
                "model of such a size is not built because a file says so. If it is right, pass "
                f"{name.split('.')[0]}=... yourself."
            )


def check_settings(
    where: str, cls: Any, name: str, settings: dict[str, Any], heads: list[str], **download: Any
) -> None:
    """Checks that the settings of an adapter leave the weights of its base model the shapes of the checkpoint.

    Both models are built in outline, without memory for their weights.

    Args:
        where: the adapter, for the message.
        cls: the class of the base model.
        name: of its checkpoint.
        settings: those of the adapter, as arguments of `from_pretrained`.
        heads: paths of the modules that the adapter brings.
        download: settings of the download.

    Raises:
        ValueError: a setting is impossible, or weights outside the heads have another shape.
        OSError: the checkpoint cannot be read.
    """
    original = config_class_of(cls).from_pretrained(name, **download)
    try:
        changed = config_class_of(cls).from_pretrained(name, **settings, **download)
        needed, found = _outline(cls, changed), _outline(cls, original)
    except OSError:
        raise
    except Exception as error:  # whatever the class of the config or the model makes of a value
        raise ValueError(
            f"The base_model_settings or labels of the adapter {where} make no {cls.__name__} "
            f"({type(error).__name__}: {error})."
        ) from error
    for weight, shape in sorted(needed.items()):
        if not is_part_of(weight, heads) and found.get(weight, shape) != shape:
            raise ValueError(mismatch(where, name, weight, found[weight], shape))


def built_in_outline(cls: Any, config: PreTrainedConfig) -> Any:
    """A model of a class, without memory for its weights."""
    with torch.device("meta"):
        return cls(config) if issubclass(cls, PreTrainedModel) else cls.from_config(config)


def _outline(cls: Any, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    parameters = built_in_outline(cls, config).named_parameters()
    return {weight: tuple(parameter.shape) for weight, parameter in parameters}


def mismatch(where: str, name: str, weight: str, found: Iterable[int], needed: Iterable[int]) -> str:
    """What is wrong with a weight of a base model."""
    return (
        f"The base model {name!r} does not fit the adapter {where}: its {weight} has shape {tuple(found)}, and "
        f"{tuple(needed)} is needed. Pass the base model that the adapter was trained on as base_model=..."
    )


def is_part_of(weight: str, modules: Iterable[str]) -> bool:
    """Whether a weight belongs to one of several modules."""
    return any(f".{module}." in f".{weight}" for module in modules)


def config_class_of(cls: Any) -> Any:
    """The class of the config of a model's class; transformers' automatic one where the class does not say."""
    return getattr(cls, "config_class", None) or transformers.AutoConfig


def _merged(theirs: Any, ours: Any) -> Any:
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return ours
    allowed = {key: value for key, value in ours.items() if key not in NOT_STORED and not key.startswith("_")}
    return theirs | {key: _merged(theirs.get(key), value) for key, value in allowed.items()}
