# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The tensors of an adapter as they are on disk: pruned values left out, and everything checked on the way back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Size, Tensor, nn

from .._compat import is_quantised, with_packed_layers
from ..backbones.sites import AttentionSite
from .config import E2VPTConfig
from .gates import BY_TRANSFORMERS, as_switches, kept_values
from .heads import ClassesOfAdapters, can_resize, named, resize, wrappers
from .prompt_layers import CONTAINER, adapted_model, prompt_layers
from .prompts import shapes_of_prompts


PREFIX = "base_model.model."  # of all names in a file


def _check_that_heads_can_be_saved(model: nn.Module, adapter_name: str) -> None:
    for path, wrapper in wrappers(adapted_model(model)):
        if adapter_name in wrapper.modules_to_save and is_quantised(wrapper.modules_to_save[adapter_name]):
            raise ValueError(
                f"The head {path!r} of the adapter {adapter_name!r} is quantised, so it cannot be saved: save the "
                "adapter before the model is quantised, or quantise a copy of it."
            )


def _put_back_what_other_names_took(
    model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, others: Sequence[str]
) -> None:
    """Completes what PEFT is about to save, in place.

    PEFT takes out every tensor that has the name of another adapter anywhere in its path: beside an adapter "1", all
    others would lose the prompts of the second layer.
    """
    ends = f".{adapter_name}"
    for key, tensor in model.state_dict().items():
        is_ours = (".e2vpt_" in key and key.endswith(ends)) or f".modules_to_save{ends}." in key
        if not is_ours or key in state_dict or set(others).isdisjoint(key.removesuffix(ends).split(".")):
            continue
        if hasattr(tensor, "device_mesh"):
            raise ValueError(
                f"The adapter {adapter_name!r} cannot be saved sharded beside {', '.join(map(repr, others))}: PEFT "
                f"takes one of these names for a part of {key}. Name adapters by words that no module is called by."
            )
        state_dict[key] = tensor


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
        _check_that_heads_can_be_saved(model, adapter_name)
        _put_back_what_other_names_took(model, state_dict, adapter_name, unwanted_adapter_names)
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
        if ".modules_to_save." not in key:
            return key  # of a head, from which PEFT has taken the name: the adapter may be called like the head
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
        return with_packed_layers(model, fitting)


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
        elif _is_gate(key):
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
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"The adapter's {name} is of type {type(tensor).__name__}, and a tensor is needed.")
    values = model.state_dict()
    _refuse_other_heads(tensors, config.modules_to_save or [])
    gained = _fit_heads(model, tensors, config, adapter_name)
    live = {name: tensor for name, tensor in values.items() if ".e2vpt_" in name and name.endswith(f".{adapter_name}")}
    given = {name: tensor for name, tensor in tensors.items() if ".e2vpt_" in name}
    _check_names(given, live, adapter_name)
    for name, tensor in given.items():
        _check_shape(name, tensor.shape, live[name].shape, f".{adapter_name}")
        _check_floating(name, tensor.is_floating_point() or _is_gate(name))
        if _is_gate(name):
            _check_gate_values(name, tensor, config)
    for name, tensor in given.items():
        if tensor.shape != live[name].shape:
            tensors[name] = _spread(name, tensor, live[name], given, config)
    _warn_of_infinite({name: tensor for name, tensor in tensors.items() if name in values})
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
        only_classes = all(own[name].shape[1:] == values[name].shape[1:] for name in different) and all(
            len(own[other]) == len(own[name])  # weight and bias of a layer
            for name in different
            for other in own
            if other.rpartition(".")[0] == name.rpartition(".")[0]
        )
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


def _is_gate(name: str) -> bool:
    return ".e2vpt_token_gates" in name or ".e2vpt_segment_gates" in name


def _check_names(found: Iterable[str], needed: Iterable[str], adapter_name: str = "") -> None:
    missing, unknown = sorted(set(needed) - set(found)), sorted(set(found) - set(needed))
    if not missing and not unknown:
        return
    suffix = f".{adapter_name}" if adapter_name else ""
    lines = [f"missing {name.removesuffix(suffix)}" for name in missing]
    for name in unknown:
        close = get_close_matches(name, [m.removesuffix(suffix) for m in missing], n=1)
        lines.append(f"unknown {name.removesuffix(suffix)}" + (f" (misspelt {close[0]}?)" if close else ""))
    shown = "; ".join(lines[:6]) + ("; ..." if len(lines) > 6 else "")
    raise ValueError(
        f"The adapter's file does not fit the model: {shown}. Load it on the backbone it was trained on, and with "
        "the adapter_config.json that was saved beside it."
    )


def _check_shape(name: str, found: Size, needed: Size, suffix: str = "") -> None:
    """Checks the shape of a tensor of prompts; pruned visual prompts are the values (values,) that are left."""
    if name.endswith(f".e2vpt_visual_prompts{suffix}") and len(found) == 1:
        return
    if found != needed:
        raise ValueError(
            f"The adapter's tensor {name} has shape {tuple(found)}, but the model needs {tuple(needed)}: was it "
            "trained on another backbone or with another E2VPTConfig?"
        )


def _check_floating(name: str, is_floating: bool) -> None:
    if not is_floating:
        raise ValueError(f"The adapter's tensor {name} holds no floating-point numbers: the file is damaged.")


def _check_gate_values(name: str, gates: Tensor, config: E2VPTConfig) -> None:
    """Checks stored gates: 0 or 1 where pruned prompts are removed, else any number (released code trains them)."""
    fine = (gates == 0) | (gates == 1) if config.pruned_prompts == "remove" else gates.float().isfinite()
    if not fine.all():
        what = "0 and 1" if config.pruned_prompts == "remove" else "finite numbers"
        raise ValueError(
            f"The adapter's tensor {name} holds {gates[~fine].flatten()[0].item()}, and gates are {what}: the file is "
            "damaged."
        )


def _warn_of_infinite(tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _all_finite(tensor)]
    if bad:
        warnings.warn(
            f"The adapter's tensor {bad[0]} holds infinite values or NaNs, so the model's answers will be of no use: "
            "take a checkpoint from before its training went wrong.",
            stacklevel=2,
        )


def _all_finite(tensor: Tensor) -> bool:
    return tensor.is_meta or bool(tensor.float().isfinite().all())


def shapes_in_file(config: E2VPTConfig, sites: Sequence[tuple[int, AttentionSite]]) -> dict[str, Size]:
    """The tensors of an adapter's prompts and gates, by their names in its file, before there are any.

    Args:
        config: configuration of the adapter.
        sites: the adapted self-attentions by number, in the order of the layers.
    """
    shapes: dict[str, Size] = {}
    for index, site in sites:
        is_first = index == sites[0][0]
        has_visual = config.num_visual_prompts > 0 and (is_first or config.visual_prompt_mode == "deep")
        has_kv = config.num_kv_prompts > 0 and (is_first or not config.share_kv_prompts_across_layers)
        for kind, shape in shapes_of_prompts(site, config).items():
            if has_kv if kind == "kv_prompts" else has_visual:
                shapes[f"{PREFIX}{CONTAINER}.{index}.e2vpt_{kind}"] = shape
    return shapes


def values_of_heads(model: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """The parameters and buffers of modules that an adapter trains in full, by their names in its file."""
    values: dict[str, Tensor] = {}
    for path in paths:
        module = model.get_submodule(path)
        original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        values |= {f"{PREFIX}{path}.{name}": value for name, value in original.state_dict().items()}
    return values


def check_file(
    path: Path,
    model: nn.Module,
    config: E2VPTConfig,
    prompts: dict[str, Size],
    heads: dict[str, Tensor],
    any_classes: bool,
    by_transformers: bool,
) -> None:
    """Checks the tensors of a file before an adapter is made for them: of all but gates the header alone is read.

    Args:
        path: the file.
        model: the model that is about to be adapted.
        config: configuration of the adapter.
        prompts: the shapes that prompts and gates need, as `shapes_in_file` gives them.
        heads: the parameters and buffers of the modules that the adapter trains in full, as the model has them.
        any_classes: whether they may have another number of classes in the file.
        by_transformers: whether transformers itself loads the file, which cannot load pruned prompts.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or type; the message names it.
    """
    with safe_open(path, framework="pt") as file:
        stored = {PREFIX + name.removeprefix(PREFIX): file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: Size(part.get_shape()) for name, part in stored.items()}
        found = {name: shape for name, shape in shapes.items() if ".e2vpt_" in name}
        _check_names({**found, **{name: shapes[name] for name in heads if name in shapes}}, {**prompts, **heads})
        for name, tensor in heads.items():
            shape = shapes[name]
            if shape != tensor.shape and not (any_classes and shape and shape[1:] == tensor.shape[1:]):
                raise ValueError(_head_mismatch(model, name, shape, tensor.shape, config))
        for name in found:
            _check_shape(name, shapes[name], prompts[name])
        for name in (*found, *heads):
            needs_floats = name not in heads or heads[name].is_floating_point()
            is_floating = stored[name].get_dtype().startswith(("F", "BF"))
            _check_floating(name, is_floating or not needs_floats or _is_gate(name))
        gates = {name: stored[name][:] for name in found if _is_gate(name)}
        for name, values in gates.items():
            _check_gate_values(name, values, config)
            if by_transformers and (values != 1).any():
                raise ValueError(BY_TRANSFORMERS)
        for name, shape in found.items():
            if shape != prompts[name]:
                _kept(name, shape.numel(), prompts[name], gates, config)


def _spread(name: str, values: Tensor, live: Tensor, given: Mapping[str, Tensor], config: E2VPTConfig) -> Tensor:
    kept = _kept(name, values.numel(), live.shape, given, config)
    prompts = torch.zeros(live.shape, dtype=values.dtype, device=values.device)
    prompts[kept.to(values.device)] = values
    return prompts


def _kept(name: str, found: int, needed: Size, gates: Mapping[str, Tensor], config: E2VPTConfig) -> Tensor:
    """Which values of pruned visual prompts (M, D) are in the file.

    Raises:
        ValueError: the file holds another number of them.
    """
    token = gates[name.replace("visual_prompts", "token_gates")]
    segment = gates[name.replace("visual_prompts", "segment_gates")]
    kept = kept_values(token, segment, needed[-1], config.segment_layout, config.pruned_prompts)
    if kept.shape != needed or int(kept.sum()) != found:
        raise ValueError(
            f"The adapter's tensor {name} holds {found} values, but its gates keep {int(kept.sum())}: the file is "
            "damaged."
        )
    return kept
