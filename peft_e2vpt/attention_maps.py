# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How much attention queries give to prompts: `prompt_attention`, and the attention weights: `attention_maps`.

While it is measured, the model runs as `"eager"`, the implementation that returns its weights. Prompts are columns of
them beside those of the tokens, in the order in which `attention.join_rows` has put their rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import Tensor, nn

from ._compat import device_and_dtype
from .attention.interface import config_of, eager_attention_of, running_eagerly
from .backbones.sites import AttentionSite, find_attention_sites
from .evaluation import no_trace
from .tuner.layer import E2VPTLayer
from .tuner.prompt_layers import PromptLayers, attention_configs, prompt_layers


KINDS = ("visual prompts", "key-value prompts", "image tokens")
VISUAL, KEY_VALUE, TOKEN = range(len(KINDS))


@dataclass(frozen=True)
class AttentionMap:
    """The weights of one self-attention for one batch.

    Attributes:
        layer: number of the attention among those of the model.
        name: its path in the model.
        is_adapted: whether an adapter may give it rows.
        weights: (B, H, N, K), for each of N queries its weights on K keys, which sum to 1; with windows B counts
            samples times windows, in the order (sample, window). Queries are tokens, never prompts.
        kinds: (K,), of every key its place in `KINDS`: 0 visual prompt, 1 key-value prompt, 2 token.
        num_prefix_tokens: class and register tokens, which stand before the patches.
    """

    layer: int
    name: str
    is_adapted: bool
    weights: Tensor
    kinds: Tensor
    num_prefix_tokens: int

    def between_tokens(self) -> Tensor:
        """The weights (B, H, N, N') on tokens, divided by their sum: the attention that is left to the image."""
        weights = self.weights[..., self.kinds == TOKEN]
        return weights / weights.sum(-1, keepdim=True)


@dataclass(frozen=True)
class PromptAttention:
    """The share of their attention that queries give to each kind of key, in L adapted attentions.

    The last dimension is that of `KINDS`: visual prompts, key-value prompts, image tokens (class and register tokens
    among them). Shares are means over heads, and sum to 1.

    Attributes:
        layers: numbers of the attentions.
        class_token: (L, B, 3), of the class token, the first of the sequence; `None` where there is none.
        patches: (L, B, 3), mean over the patches; with windows, over those of all windows.
        num_keys: (L, 3), how many keys of each kind a query sees.
    """

    layers: list[int]
    class_token: Tensor | None
    patches: Tensor
    num_keys: Tensor


def attention_maps(
    model: nn.Module, inputs: dict[str, Any], *, num_prefix_tokens: int | None = None
) -> list[AttentionMap]:
    """Returns the attention weights of every self-attention of the adapted tower, also of those without prompts.

    Active adapters take part as they do in a forward pass: pruned prompts have no column, and inside
    `model.disable_adapter()` no prompt has one. Nothing of the model changes: neither its mode, nor its attention
    implementation, nor random number generators.

    Args:
        model: a model with E2VPT, also wrapped in DDP or compiled.
        inputs: a batch as the model takes it; moved to the model's device.
        num_prefix_tokens: class and register tokens before the patches; by default what is known of the backbone.

    Raises:
        ValueError: the model has no E2VPT adapter; an attention computes its weights without transformers'
            attention interface (Swin-V2, Hiera, timm's models, ...), or does not return them (SAM 2, Qwen-VL, ...);
            the number of prefix tokens is not known; or the samples have different adapters.
    """
    maps: list[AttentionMap] = []
    _visit(model, inputs, num_prefix_tokens, maps.append)
    return maps


def prompt_attention(
    model: nn.Module, inputs: dict[str, Any], *, num_prefix_tokens: int | None = None
) -> PromptAttention:
    """Measures how much of their attention the class token and the patches give to prompts, layer by layer.

    The same as the sums over the columns of `attention_maps`, without keeping the maps. In models with windows a
    padded token counts as a patch. `result.patches.mean(1)` is the mean over the samples.

    Args:
        model: a model with E2VPT, also wrapped in DDP or compiled.
        inputs: a batch of B samples as the model takes it; moved to the model's device.
        num_prefix_tokens: class and register tokens before the patches; by default what is known of the backbone.

    Raises:
        ValueError: as `attention_maps`, or the samples share one packed sequence.
    """
    layers: list[int] = []
    of_class: list[Tensor] = []
    of_patches: list[Tensor] = []
    num_keys: list[Tensor] = []
    num_samples = next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor))

    def measure(found: AttentionMap) -> None:
        if not found.is_adapted:
            return
        if len(found.weights) % num_samples:
            raise ValueError(
                f"{found.name} sees {len(found.weights)} sequences for {num_samples} samples, so that the attention "
                "of one sample is not known: measure one sample at a time."
            )
        dtype = torch.promote_types(found.weights.dtype, torch.float32)
        kinds = nn.functional.one_hot(found.kinds, len(KINDS))
        # (samples, windows, queries, kinds)
        shares = (found.weights.to(dtype) @ kinds.to(dtype)).mean(1).unflatten(0, (num_samples, -1)).cpu()
        layers.append(found.layer)
        of_class.append(shares[:, :, 0].mean(1))
        of_patches.append(shares[:, :, found.num_prefix_tokens :].mean((1, 2)))
        num_keys.append(kinds.sum(0).cpu())

    prefix = _visit(model, inputs, num_prefix_tokens, measure)
    return PromptAttention(
        layers, torch.stack(of_class) if prefix else None, torch.stack(of_patches), torch.stack(num_keys)
    )


@torch.no_grad()
def _visit(
    model: nn.Module, inputs: dict[str, Any], num_prefix_tokens: int | None, visit: Callable[[AttentionMap], None]
) -> int:
    """Runs the model once and shows every attention map to `visit`; returns the number of prefix tokens."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    layers = prompt_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no E2VPT adapter: wrap it with get_peft_model(model, E2VPTConfig()) first."
        )
    for layer in layers:
        if layer.attention_path != "interface":
            raise ValueError(
                f"{layer.site.name} ({type(layer.site.attention).__name__}) computes its own attention, so that "
                "its weights cannot be read; only attentions that ask transformers' attention interface return them."
            )
    if "adapter_names" in inputs:
        raise ValueError(
            "Samples with different adapters have different prompts: leave adapter_names out of the batch, and choose "
            "one adapter with model.set_adapter(name)."
        )
    prefix = _prefix_tokens(layers) if num_prefix_tokens is None else num_prefix_tokens
    container = next(module for module in model.modules() if isinstance(module, PromptLayers))
    adapted = {layer.site.attention: layer for layer in layers}
    with ExitStack() as stack:
        stack.enter_context(no_trace(model, ()))
        stack.enter_context(running_eagerly(attention_configs(layers)))
        for index, site in _sites_of_towers(model, layers):
            hook = partial(_show, index, site, adapted.get(site.attention), container, prefix, visit)
            stack.callback(site.attention.register_forward_hook(hook).remove)
        model(**send_to_device(dict(inputs), device_and_dtype(model)[0]))
    return prefix


def _prefix_tokens(layers: list[E2VPTLayer]) -> int:
    counts = {0 if layer.site.backbone.windows else layer.site.prefix_tokens for layer in layers}
    if len(counts) > 1 or None in counts:
        raise ValueError(
            f"How many class and register tokens stand before the patches of {type(layers[0].site.block).__name__} is "
            "not known: pass num_prefix_tokens (0 where there are none)."
        )
    (count,) = counts
    assert count is not None
    return count


def _sites_of_towers(model: nn.Module, layers: list[E2VPTLayer]) -> list[tuple[int, AttentionSite]]:
    """All attentions that share their config with an adapted one, with their numbers."""
    configs = {id(layer.attention_config) for layer in layers}

    def shares(site: AttentionSite) -> bool:
        asks = eager_attention_of(site.attention, site.backbone.eager) is not None
        return asks and id(config_of(site.attention)) in configs

    return [(index, site) for index, site in enumerate(find_attention_sites(model)) if shares(site)]


def _show(
    index: int,
    site: AttentionSite,
    layer: E2VPTLayer | None,
    container: PromptLayers,
    prefix: int,
    visit: Callable[[AttentionMap], None],
    attention: nn.Module,
    args: Any,
    output: Any,
) -> None:
    """A forward hook of an attention, which returns its output and its weights.

    Raises:
        ValueError: it returns no weights.
    """
    weights = output[1] if isinstance(output, tuple) else None
    if not isinstance(weights, Tensor) or weights.dim() != 4:
        raise ValueError(
            f"{site.name} ({type(attention).__name__}) does not return its attention weights, so that they cannot be "
            "read."
        )
    kinds = _kinds(site, layer, container, weights.shape[-1]).to(weights.device)
    inserted = _num_inserted(site, container)
    if inserted:  # shallow prompts are queries too
        before, _, behind = weights.tensor_split((prefix, prefix + inserted), dim=2)
        weights = torch.cat([before, behind], dim=2)
    visit(AttentionMap(index, site.name, layer is not None, weights, kinds, prefix))


def _num_inserted(site: AttentionSite, container: PromptLayers) -> int:
    """How many shallow prompts are tokens of the sequence here."""
    passed = [insertion for insertion in container.insertions.values() if site.block in insertion.blocks]
    return sum(insertion.count() for insertion in passed if insertion.is_active())


def _kinds(site: AttentionSite, layer: E2VPTLayer | None, container: PromptLayers, num_keys: int) -> Tensor:
    """Of every column of the weights, what it is, in the order of the rows of `E2VPTLayer.rows`."""
    before: list[int] = []
    behind: list[int] = []
    if layer is not None and not layer.disable_adapters:
        for name in layer.active_adapters:
            before += [VISUAL] * layer.num_visual_rows(name)
            is_behind = name in layer.e2vpt_config and layer.e2vpt_config[name].kv_prompt_position == "after"
            (behind if is_behind else before).extend([KEY_VALUE] * layer.num_kv_rows(name))
    tokens = [TOKEN] * (num_keys - len(before) - len(behind))
    inserted = _num_inserted(site, container)
    if inserted:
        place = site.prefix_tokens
        assert place is not None
        tokens[place : place + inserted] = [VISUAL] * inserted
    return torch.tensor([*before, *tokens, *behind])
