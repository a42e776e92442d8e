# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The tensors of an adapter as they are on disk: pruned values left out, and everything checked on the way back."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Size, Tensor, nn

from .config import E2VPTConfig
from .gates import as_switches, kept_values
from .heads import ClassesOfAdapters, can_resize, named, resize, wrappers
from .prompt_layers import CONTAINER, adapted_model, prompt_layers


class TunerOnDisk(BaseTuner):
    """The part of the tuner that PEFT asks for the tensors of an adapter: when it is saved, and when it is loaded."""

    _show_classes: Callable[[], None]  # of the whole tuner

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: E2VPTConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's tensors; of pruned visual prompts only the kept values, a tensor (values,).

        PEFT asks for them right before it saves `config`, which then tells of the model that it belongs to.
        """
        config.belongs_to(model, adapter_name)
        tensors: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        # not what another method has put into the model under the same name
        tensors = {key: tensor for key, tensor in tensors.items() if ".e2vpt_" in key or ".modules_to_save." in key}
        return without_pruned_values(model, tensors, adapter_name)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if ".e2vpt_" in key:
            return key.removesuffix(f".{adapter_name}")
        return str(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: E2VPTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a file as the model takes them."""
        tuner = getattr(model, "base_model", None)
        try:
            remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
                model, config, adapter_name, state_dict
            )
            fitting = fit_to_model(model, remapped, config, adapter_name)
        except (KeyError, ValueError):
            if config.waits_for_values and isinstance(tuner, TunerOnDisk):
                tuner.delete_adapter(adapter_name)  # it has no values but those it was made with
            raise
        config.waits_for_values = False
        if isinstance(tuner, TunerOnDisk):
            tuner._show_classes()
        return fitting


def without_pruned_values(model: nn.Module, tensors: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Turns every pruned tensor of visual prompts (M, D) into its kept values, a tensor (values,).

    Those that FSDP2 shards (`DTensor`) keep their shape: a sharded checkpoint is read into tensors of the same shape.
    Gates are written as 0 and 1 also where those of an average of models lie between.
    """
    layers = {str(layer.index): layer for layer in prompt_layers(model)}
    for key, tensor in tensors.items():
        if f".e2vpt_visual_prompts.{adapter_name}" in key and not hasattr(tensor, "device_mesh"):
            kept = layers[key.split(".")[-3]].kept(adapter_name)
            if not kept.all():
                tensors[key] = tensor[kept.to(tensor.device)]
        elif "_gates." in key and ".e2vpt_" in key:
            config = layers[key.split(".")[-3]].e2vpt_config[adapter_name]
            tensors[key] = as_switches(tensor, config.pruned_prompts)
    return tensors


def fit_to_model(
    model: nn.Module, tensors: dict[str, Tensor], config: E2VPTConfig, adapter_name: str
) -> dict[str, Tensor]:
    """Checks the tensors of a file against the model and spreads pruned visual prompts to full shape.

    The head of a further adapter takes the number of classes that the file has; the first adapter of a model has
    that of the model.

    Args:
        model: the adapted model.
        tensors: those of the file, by their names in the model.
        config: configuration of the adapter.
        adapter_name: its name in the model.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names it.
    """
    values = model.state_dict()
    _refuse_other_heads(tensors, config.modules_to_save or [])
    gained = _fit_heads(model, tensors, config, adapter_name)
    live = {name: tensor for name, tensor in values.items() if ".e2vpt_" in name and name.endswith(f".{adapter_name}")}
    given = {name: tensor for name, tensor in tensors.items() if ".e2vpt_" in name}
    missing, unknown = sorted(live.keys() - given.keys()), sorted(given.keys() - live.keys())
    if missing or unknown:
        _refuse_names(missing, unknown, adapter_name)
    for name, tensor in given.items():
        if name.endswith(f".e2vpt_visual_prompts.{adapter_name}") and tensor.dim() == 1:
            tensors[name] = _spread(name, tensor, live[name], given, config, adapter_name)
        elif tensor.shape != live[name].shape:
            raise ValueError(
                f"The adapter's tensor {name} has shape {tuple(tensor.shape)}, but the model needs "
                f"{tuple(live[name].shape)}: was it trained on another backbone or with another E2VPTConfig?"
            )
    _note_classes(model, config, adapter_name, gained)
    return tensors


def _head_mismatch(model: nn.Module, name: str, found: Size, needed: Size, config: E2VPTConfig) -> str:
    """What is wrong with a tensor of a head, and which base model it needs.

    Args:
        model: the adapted model.
        name: of the tensor in the adapter's file.
        found: its shape.
        needed: the shape in the model.
        config: configuration of the adapter.
    """
    if found[1:] != needed[1:]:
        advice = "load it on the backbone it was trained on."
    else:
        classes = _classes(model, found, needed, config)
        advice = (
            f"load the base model with the number of classes of the adapter, num_labels={classes}."
            if classes is not None
            else "give the base model the head that the adapter was trained with, as peft_e2vpt.load(...) does."
        )
    return f"The adapter's tensor {name} has shape {tuple(found)}, but the model needs {tuple(needed)}: {advice}"


def _classes(model: nn.Module, found: Size, needed: Size, config: E2VPTConfig) -> int | None:
    """The number of classes to ask for; `None` if that is not what differs."""
    num_labels: int | None = getattr(getattr(model, "config", None), "num_labels", None)
    if config.labels is not None:
        classes = len(config.labels)
    elif num_labels is not None and 0 <= needed[0] - num_labels <= 1:  # detectors have a row for "no object"
        classes = found[0] - (needed[0] - num_labels)
    else:
        return None
    return None if classes == num_labels else classes


def _refuse_other_heads(tensors: dict[str, Tensor], heads: list[str]) -> None:
    """Refuses what PEFT would leave out in silence: modules that earlier versions trained because of their endings."""
    for name in tensors:
        parents = [name[:i] for i, letter in enumerate(name) if letter == "."]
        if "e2vpt_" in name or ".modules_to_save." in name:
            continue
        if any(parent.endswith(head) for parent in parents for head in heads):
            raise ValueError(
                f"The adapter's file holds {name}, but its modules_to_save={heads} does not name that module. Give "
                "the modules that it was trained with by their full paths: "
                "config = E2VPTConfig.from_pretrained(folder); config.modules_to_save = [...]; "
                "PeftModel.from_pretrained(model, folder, config=config)."
            )


def _fit_heads(model: nn.Module, tensors: dict[str, Tensor], config: E2VPTConfig, adapter_name: str) -> int:
    """Gives the heads of a further adapter their numbers of classes, and returns how many more than before."""
    several = len(getattr(model, "peft_config", {})) > 1
    gained = 0
    for path, wrapper in wrappers(model):
        prefix = f"{path}.modules_to_save.{adapter_name}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if not own:
            continue
        head = wrapper.modules_to_save[adapter_name]
        values = head.state_dict()
        different = [name for name, tensor in own.items() if tensor.shape != values[name].shape]
        only_classes = all(own[name].shape[1:] == values[name].shape[1:] for name in different)
        if different and not (several and only_classes and can_resize(head, different)):
            name = different[0]
            raise ValueError(_head_mismatch(model, f"{path}.{name}", own[name].shape, values[name].shape, config))
        for name in different:
            gained = resize(head, name, own[name])
    return gained


def _note_classes(model: nn.Module, config: E2VPTConfig, adapter_name: str, gained: int) -> None:
    """Notes the classes of an adapter where they are not those of the base model."""
    base = adapted_model(model)
    classes: ClassesOfAdapters = getattr(base, CONTAINER).classes
    if not hasattr(getattr(base, "config", None), "id2label"):
        return
    known = classes.of_base(base)
    labels = config.labels or [f"LABEL_{index}" for index in range(len(known.id2label) + gained)]
    generic = labels == [f"LABEL_{index}" for index in range(len(labels))]
    if len(labels) != len(known.id2label) or not generic and labels != list(known.id2label.values()):
        kind = (config.base_model_settings or {}).get("problem_type")
        classes.add(base, adapter_name, named(labels, kind))


def _refuse_names(missing: list[str], unknown: list[str], adapter_name: str) -> None:
    suffix = f".{adapter_name}"
    lines = [f"missing {name.removesuffix(suffix)}" for name in missing]
    for name in unknown:
        close = get_close_matches(name, [m.removesuffix(suffix) for m in missing], n=1)
        lines.append(f"unknown {name.removesuffix(suffix)}" + (f" (misspelt {close[0]}?)" if close else ""))
    shown = "; ".join(lines[:6]) + ("; ..." if len(lines) > 6 else "")
    raise ValueError(
        f"The adapter's file does not fit the model: {shown}. Load it on the backbone it was trained on, and with "
        "the adapter_config.json that was saved beside it."
    )


def _spread(
    name: str,
    values: Tensor,
    live: Tensor,
    given: dict[str, Tensor],
    config: E2VPTConfig,
    adapter_name: str,
) -> Tensor:
    token = given[name.replace("visual_prompts", "token_gates")]
    segment = given[name.replace("visual_prompts", "segment_gates")]
    kept = kept_values(token, segment, live.shape[-1], config.segment_layout, config.pruned_prompts)
    if kept.shape != live.shape or int(kept.sum()) != values.numel():
        raise ValueError(
            f"The adapter's tensor {name} holds {values.numel()} values, but its gates keep {int(kept.sum())}: "
            "the file is damaged."
        )
    prompts = torch.zeros(live.shape, dtype=values.dtype, device=values.device)
    prompts[kept.to(values.device)] = values
    return prompts
