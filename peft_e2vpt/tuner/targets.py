# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Which self-attentions a config adapts and which modules it trains in full, checked before anything is changed."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import device_and_dtype, is_quantised, stops_gradients
from ..backbones.heads import find_heads, other_parts
from ..backbones.module_names import Modules, lies_in
from ..backbones.sites import AttentionSite
from .config import E2VPTConfig
from .heads import wrappers
from .mixed_batch import BASE


HEADS_OF_TEXT_MODELS = {  # names that PEFT adds to `modules_to_save` for a task type
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


def matches(name: str, patterns: list[str] | str) -> bool:
    """Whether a module path matches a regular expression as a whole, or equals or ends with one of several names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def find_targets(model: nn.Module, config: E2VPTConfig, sites: dict[str, AttentionSite]) -> list[str]:
    """Names of the self-attentions that `config` adapts, in the order of their numbers.

    Args:
        model: the model to adapt.
        config: what the user chose.
        sites: the self-attentions of the model by name.

    Raises:
        ValueError: a choice of modules or layers matches none of them, or excludes none or all.
    """
    if config.target_modules is None:
        vision = [name for name, site in sites.items() if site.is_vision]
        targets = vision or list(sites)
    else:
        targets = [name for name in sites if matches(name, config.target_modules)]
        if not targets:
            raise ValueError(
                f"target_modules={config.target_modules!r} matches none of the {len(sites)} "
                f"self-attentions of {type(model).__name__}, which are called {next(iter(sites))!r} "
                f"to {list(sites)[-1]!r}. Leave it at None to adapt them all."
            )
    if config.exclude_modules is not None:
        kept = [name for name in targets if not matches(name, config.exclude_modules)]
        if kept == targets or not kept:
            what = "none" if kept else "all"
            raise ValueError(
                f"exclude_modules={config.exclude_modules!r} leaves out {what} of the {len(targets)} "
                f"self-attentions, which are called {targets[0]!r} to {targets[-1]!r}."
            )
        targets = kept
    if config.layers_to_transform is not None:
        assert isinstance(config.layers_to_transform, list)
        beyond = [layer for layer in config.layers_to_transform if layer >= len(targets)]
        if beyond:
            raise ValueError(
                f"layers_to_transform names {beyond}, but the model has {len(targets)} self-attentions to adapt, "
                f"numbered 0 to {len(targets) - 1}."
            )
        targets = [targets[layer] for layer in sorted(set(config.layers_to_transform))]
    return targets


def check_sites(model: nn.Module, config: E2VPTConfig, sites: list[AttentionSite]) -> None:
    """Checks that the targeted self-attentions can have the prompts of `config`.

    Raises:
        ValueError: a width is not divisible by the number of segments, heads to share differ, or tokens cannot be
            inserted for shallow prompts.
    """
    first = sites[0]
    for site in sites:
        width, segments = site.width, config.num_segments
        if config.num_visual_prompts and width % segments:
            raise ValueError(
                f"The width {width} of {site.name} is not divisible by num_segments={segments}: pass one of "
                f"num_segments={', '.join(str(r) for r in range(1, 65) if width % r == 0)}."
            )
        heads, heads_of_first = site.num_key_value_heads, first.num_key_value_heads
        if config.share_kv_prompts_across_layers and (heads, site.head_dim) != (heads_of_first, first.head_dim):
            raise ValueError(
                f"share_kv_prompts_across_layers needs equal heads in all layers, but {first.name} has "
                f"{heads_of_first} heads of size {first.head_dim} and {site.name} has {heads} of size "
                f"{site.head_dim}: leave it False for this backbone."
            )
    if config.visual_prompt_mode == "shallow":
        _check_shallow(type(model).__name__, sites)


def _check_shallow(model: str, sites: list[AttentionSite]) -> None:
    if "Backbone" in model:
        raise ValueError(f"visual_prompt_mode='shallow' is not offered for {model}, which reads inner layers.")
    for site in sites:
        if site.prefix_tokens is None or site.width != sites[0].width:
            raise ValueError(
                f"visual_prompt_mode='shallow' puts tokens into the sequence, which {model} does not allow "
                f"({type(site.attention).__name__} works on windows, a position bias or a padding mask): pass "
                "visual_prompt_mode='deep'."
            )


def check_adapter_name(name: str) -> None:
    """Checks the name of a new adapter, which becomes part of module paths and the name of a folder.

    Raises:
        ValueError: it would lead out of the folder that the adapter is saved in, or hide a method of a module.
    """
    if not isinstance(name, str) or not name or re.search(r"[./\\\0]", name):
        raise ValueError(f"An adapter's name is also that of its folder, without . / and \\, got {name!r}.")
    if name == BASE or any(hasattr(kind, name) for kind in (nn.ModuleDict, nn.ParameterDict)):
        raise ValueError(f"{name!r} cannot be the name of an adapter: torch or PEFT give it a meaning of their own.")


def own_copy(config: E2VPTConfig) -> E2VPTConfig:
    """A copy of a user's config for one model, in which heads are noted; what PEFT wrote into the user's goes.

    Raises:
        ValueError: the config has been changed to something impossible.
    """
    own = copy.deepcopy(config)
    own.base_model_given = own.base_model_name_or_path
    config.base_model_name_or_path = config.base_model_given
    names, added = config.modules_to_save, HEADS_OF_TEXT_MODELS.get(config.task_type or "", [])
    if names is not None and added and names[-len(added) :] == added:
        own.modules_to_save = config.modules_to_save = names[: -len(added)] or None
    own.check()
    return own


def choose_heads(model: nn.Module, sites: list[AttentionSite], names: list[str] | None) -> list[str]:
    """Paths of the modules that an adapter trains in full, each a name that PEFT takes for this module alone.

    Args:
        model: the model to adapt.
        sites: its self-attentions.
        names: the user's choice; `None` finds the head, with a warning where a task model has none that is known.

    Raises:
        ValueError: a name is unknown, stands for several modules or is that of a single parameter.
    """
    if names is not None:
        return _by_name(model, names)
    heads = find_heads(model, sites)
    parts = [] if heads else other_parts(model, sites)
    if parts:
        warnings.warn(
            f"No head was found in {type(model).__name__}, so only prompts are trained and saved. If "
            f"{' or '.join(parts)} is new for your task, pass modules_to_save=[{parts[-1]!r}]; modules_to_save=[] if "
            "prompts are all you want to train.",
            stacklevel=2,
        )
    return heads


def _by_name(model: nn.Module, names: list[str]) -> list[str]:
    modules = Modules(model)
    paths = []
    for name in names:
        try:
            paths.append(modules.resolve(name))
        except KeyError:
            if any(matches(parameter, [name]) for parameter, _ in model.named_parameters()):
                raise ValueError(
                    f"modules_to_save names {name!r}, a single parameter of {type(model).__name__}; only whole "
                    "modules can be saved: name the module that holds it."
                ) from None
            raise ValueError(
                f"modules_to_save names {name!r}, which {type(model).__name__} does not have. Its parts are "
                f"{', '.join(child for child in modules.children('') if modules.parameters(child))}."
            ) from None
    return modules.unambiguous(modules.outermost(paths))


def check_heads(model: nn.Module, paths: list[str], targets: list[str]) -> None:
    """Checks that modules can be trained in full beside prompts.

    Raises:
        ValueError: a module holds an adapted attention, or its weights are quantised.
    """
    modules = Modules(model)
    for path in paths:
        adapted = [target for target in targets if lies_in(target, path)]
        if adapted:
            raise ValueError(
                f"modules_to_save names {path!r}, which holds the adapted self-attention {adapted[0]}: a module "
                "is either trained in full or adapted. Leave the attention out with exclude_modules."
            )
        if is_quantised(modules[path]):
            raise ValueError(
                f"The weights of {path!r} are quantised, so an adapter cannot have a copy of it that trains. Leave it "
                f"out when the model is quantised: BitsAndBytesConfig(..., llm_int8_skip_modules=[{path!r}]), "
                f"TorchAoConfig(..., modules_to_not_convert=[{path!r}]), QuantoConfig likewise. To serve, quantise "
                "the model after the adapter has been loaded."
            )


def check_gradients(model: nn.Module) -> None:
    """Checks that gradients pass through a model.

    Raises:
        ValueError: a layer is quantised in such a way that none does.
    """
    for path, module in model.named_modules():
        if stops_gradients(module):
            raise ValueError(
                f"Prompts can neither train nor be scored on this model: no gradient passes through "
                f"{path} ({type(module).__name__}), whose arithmetic is quantised. Train them on the plain model or "
                "on one whose weights alone are quantised (bitsandbytes in 8 bit, torchao's Int8WeightOnlyConfig), "
                "and quantise afterwards."
            )


def _cast_to_weight(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Feeds a float32 head on a half-precision backbone with float32."""
    _, dtype = device_and_dtype(head)
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def cast_heads(model: nn.Module, adapter_name: str, to_float32: bool) -> None:
    """Lets the heads of an adapter take inputs of another dtype than their own.

    Args:
        model: the adapted model.
        adapter_name: name of the adapter.
        to_float32: whether heads in half precision are trained in float32.
    """
    for _, module in wrappers(model):
        if adapter_name in module.modules_to_save:
            head = module.modules_to_save[adapter_name]
            dtypes = {parameter.dtype for parameter in head.parameters()}
            if to_float32 and dtypes & {torch.float16, torch.bfloat16}:
                head.float()
            if dtypes and _cast_to_weight not in head._forward_pre_hooks.values():
                head.register_forward_pre_hook(_cast_to_weight)
