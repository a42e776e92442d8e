# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`E2VPTLayer`: the prompts and gates of one self-attention, and the rows they give it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .attention import Rows, attach, detach, eager_attention_of
from .backbones import AttentionSite
from .config import E2VPTConfig
from .sharding import assign, whole


@dataclass
class GateOverride:
    """Gates of every sample of a batch, in place of the stored ones, while importance or candidates are measured.

    Attributes:
        token: (B, M).
        segment: (B, M, R).
        on: whether the token gate multiplies the prompt's `"attention"` weight or its `"embedding"`.
    """

    token: Tensor
    segment: Tensor
    on: str


def expand_segments(gates: Tensor, width: int, layout: str) -> Tensor:
    """Spreads segment gates (..., R) over the dimensions of a prompt: (..., D) (paper equation 8)."""
    repeats = width // gates.shape[-1]
    if layout == "contiguous":
        return gates.repeat_interleave(repeats, dim=-1)
    return gates.repeat(*[1] * (gates.dim() - 1), repeats)


def alive_values(token: Tensor, segment: Tensor, width: int, layout: str) -> Tensor:
    """Which values of prompts take part, given their gates (M,) and (M, R): a boolean tensor (M, D)."""
    return expand_segments(segment * token[:, None], width, layout) != 0


def _draw(shape: tuple[int, ...], scheme: str, fan_in: int, xavier_fans: int, generator: Any) -> Tensor:
    """Draws initial prompts; see `E2VPTConfig.visual_prompt_init` for the bounds."""
    values = torch.empty(shape, device="cpu", dtype=torch.float32)
    if scheme == "trunc_normal":
        return nn.init.trunc_normal_(values, std=0.02, a=-0.04, b=0.04, generator=generator)
    bound = math.sqrt(6.0 / (fan_in if scheme == "kaiming_uniform" else xavier_fans))
    return values.uniform_(-bound, bound, generator=generator)


def _refresh_after_load(layer: E2VPTLayer, incompatible_keys: Any) -> None:
    layer.refresh_kept_tokens()


class E2VPTLayer(nn.Module, BaseTunerLayer):
    """The prompts of one self-attention, per adapter, and the key and value rows that they become.

    The layer stands beside the model, not around its attention: the attention module keeps its class and its path, and
    pulls its rows from here when it runs. Tensors per adapter: `e2vpt_visual_prompts` (M, D), `e2vpt_kv_prompts`
    (1 or 2, H, n, d), and, as persistent buffers, `e2vpt_token_gates` (M,) and `e2vpt_segment_gates` (M, R).

    Args:
        site: the self-attention and the block around it.
        index: number of the attention among those of the model.
    """

    adapter_layer_names = ("e2vpt_visual_prompts", "e2vpt_kv_prompts")
    other_param_names = (
        "e2vpt_token_gates",
        "e2vpt_segment_gates",
        "e2vpt_kept_tokens",
        "e2vpt_kv_source",
        "e2vpt_config",
    )
    # of BaseTunerLayer
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]
    delete_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[..., None]

    def __init__(self, site: AttentionSite, index: int) -> None:
        super().__init__()
        self.site = site
        self.index = index
        self.eager_attention = eager_attention_of(site.attention, site.name)
        self.e2vpt_visual_prompts = nn.ParameterDict()
        self.e2vpt_kv_prompts = nn.ParameterDict()
        self.e2vpt_token_gates = BufferDict(persistent=True)
        self.e2vpt_segment_gates = BufferDict(persistent=True)
        self.e2vpt_kept_tokens = BufferDict(persistent=False)
        self.e2vpt_kv_source: dict[str, tuple[E2VPTLayer]] = {}
        self.e2vpt_config: dict[str, E2VPTConfig] = {}
        self.gate_override: GateOverride | None = None
        self.merged_adapters: list[str] = []
        self.num_samples: int | None = None
        self.register_load_state_dict_post_hook(_refresh_after_load)
        self._handles: list[Any] = []
        if site.backbone.windows:
            self._handles.append(site.block.register_forward_pre_hook(self._count_samples))
        attach(site.attention, self)
        self.train(site.attention.training)

    def detach(self) -> None:
        """Leaves the base model: the attention and its block are as they were before this layer was made."""
        detach(self.site.attention)
        for handle in self._handles:
            handle.remove()

    def _count_samples(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        """Notes how many samples a windowed block sees, before they are cut into windows, for per-sample dropout."""
        if self.training:
            self.num_samples = args[0].shape[0]

    # ------------------------------------------------------------------------------------------------ PEFT's contract
    def get_base_layer(self) -> nn.Module:
        """The adapted self-attention."""
        attention: nn.Module = self.site.attention
        return attention

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        parameters = list(base_layer.parameters())
        dtypes = [parameter.dtype for parameter in parameters if parameter.dtype.is_floating_point]
        return parameters[0].device, dtypes[0] if dtypes else None

    def update_layer(
        self, adapter_name: str, config: E2VPTConfig, has_visual_prompts: bool, kv_source: E2VPTLayer | None
    ) -> None:
        """Creates the prompts and gates of an adapter.

        Args:
            adapter_name: name of the adapter.
            config: its configuration.
            has_visual_prompts: whether this layer owns visual prompts (in shallow mode only the first does).
            kv_source: the layer whose key-value prompts this layer uses instead of its own.
        """
        self.e2vpt_config[adapter_name] = config
        if has_visual_prompts and config.num_visual_prompts:
            self._create_visual_prompts(adapter_name, config)
        if kv_source is not None:
            self.e2vpt_kv_source[adapter_name] = (kv_source,)
        elif config.num_kv_prompts:
            self._create_kv_prompts(adapter_name, config)
        if config.init_weights:
            self.draw_prompts(adapter_name, config.seed)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _create_visual_prompts(self, adapter_name: str, config: E2VPTConfig) -> None:
        count, segments = config.num_visual_prompts, config.num_segments
        self.e2vpt_visual_prompts[adapter_name] = nn.Parameter(torch.zeros(self._visual_shape(config)))
        self.e2vpt_token_gates[adapter_name] = torch.ones(count)
        self.e2vpt_segment_gates[adapter_name] = torch.ones(count, segments)

    def _create_kv_prompts(self, adapter_name: str, config: E2VPTConfig) -> None:
        self.e2vpt_kv_prompts[adapter_name] = nn.Parameter(torch.zeros(self._kv_shape(config)))

    def _visual_shape(self, config: E2VPTConfig) -> tuple[int, ...]:
        return config.num_visual_prompts, self.site.width

    def _kv_shape(self, config: E2VPTConfig) -> tuple[int, ...]:
        site, copies = self.site, 1 if config.share_kv_prompts else 2
        return copies, site.num_key_value_heads, config.num_kv_prompts, site.head_dim

    @torch.no_grad()
    def draw_prompts(self, adapter_name: str, seed: int | None) -> None:
        """Draws the prompts of an adapter anew from their initial distributions, in place.

        Args:
            adapter_name: name of the adapter.
            seed: of the draw, together with the number of the layer; `None` uses torch's global generator.
        """
        config, site = self.e2vpt_config[adapter_name], self.site
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed + 7919 * self.index)
        fans = 3 * site.patch_area + site.width
        if adapter_name in self.e2vpt_visual_prompts:
            drawn = _draw(self._visual_shape(config), config.visual_prompt_init, site.width, fans, generator)
            assign(self.e2vpt_visual_prompts[adapter_name], drawn)
        if adapter_name in self.e2vpt_kv_prompts:
            fan_in = config.num_kv_prompts * site.head_dim
            drawn = _draw(self._kv_shape(config), config.kv_prompt_init, fan_in, fans, generator)
            assign(self.e2vpt_kv_prompts[adapter_name], drawn)

    # ------------------------------------------------------------------------------------------------------- the rows
    def rows(self, num_sequences: int, dtype: torch.dtype) -> Rows | None:
        """Gives the attention its rows: those of the visual prompts, `k_proj(norm(P))` and `v_proj(norm(P))`, and the
        key-value prompts themselves.

        Args:
            num_sequences: token sequences that the attention sees in this call, samples times windows.
            dtype: type of the attention's keys.

        Returns:
            The rows of all active adapters, or `None` where there are none.
        """
        if self.disable_adapters:
            return None
        before: list[tuple[Tensor, Tensor]] = []
        behind: list[tuple[Tensor, Tensor]] = []
        bias = None
        for adapter_name in self.active_adapters:
            config = self.e2vpt_config.get(adapter_name)
            if config is None:
                continue
            if config.visual_prompt_mode == "deep" and adapter_name in self.e2vpt_visual_prompts:
                num_samples = num_sequences if self.num_samples is None else self.num_samples
                prompts, bias = self.visual_prompts(adapter_name, num_samples)
                before.append(self.site.project(prompts, dtype))
            kv_prompts = self.kv_prompts(adapter_name)
            if kv_prompts is not None:
                place = behind if config.kv_prompt_position == "after" else before
                place.append((kv_prompts[:1].to(dtype), kv_prompts[-1:].to(dtype)))
        if not before and not behind:
            return None
        num_behind = sum(key.shape[2] for key, _ in behind)
        key, value = (self._stack(parts) for parts in zip(*before, *behind, strict=True))
        if bias is not None:
            bias = F.pad(bias, (0, key.shape[2] - bias.shape[1]))
        return Rows(key, value, num_behind, bias)

    @staticmethod
    def _stack(parts: tuple[Tensor, ...]) -> Tensor:
        """Joins parts (1 or B, H, P_i, d) to (B, H, P, d)."""
        if len(parts) == 1:
            return parts[0]
        batch = max(part.shape[0] for part in parts)
        dtype = parts[-1].dtype
        return torch.cat([part.to(dtype).expand(batch, -1, -1, -1) for part in parts], dim=2)

    def visual_prompts(self, adapter_name: str, num_samples: int) -> tuple[Tensor, Tensor | None]:
        """Applies gates and dropout to the visual prompts of an adapter.

        Args:
            adapter_name: name of the adapter.
            num_samples: B, the samples of the batch.

        Returns:
            Prompts (1 or B, M', D) without those removed, and the logarithm of their gates (B, M') where token gates
            are being measured on the attention weight, else `None`.
        """
        config = self.e2vpt_config[adapter_name]
        token, segment = self.e2vpt_token_gates[adapter_name][None], self.e2vpt_segment_gates[adapter_name][None]
        on_embedding = config.pruned_prompts == "zero"
        bias = None
        if self.gate_override is not None:
            segment = self.gate_override.segment
            if self.gate_override.on == "attention":
                bias = self.gate_override.token.log()
            else:
                token, on_embedding = self.gate_override.token, True
        prompts = self.e2vpt_visual_prompts[adapter_name][None]
        prompts = prompts * expand_segments(segment, prompts.shape[-1], config.segment_layout).to(prompts.dtype)
        if on_embedding:
            prompts = prompts * token[..., None].to(prompts.dtype)
        if adapter_name in self.e2vpt_kept_tokens:
            kept = self.e2vpt_kept_tokens[adapter_name]
            prompts = prompts.index_select(1, kept)
            bias = None if bias is None else bias.index_select(1, kept)
        if self.training and config.visual_prompt_dropout:
            prompts = F.dropout(prompts.expand(num_samples, -1, -1), config.visual_prompt_dropout)
        return prompts, bias

    def kv_prompts(self, adapter_name: str) -> Tensor | None:
        """The key-value prompts (1 or 2, H, n, d) of an adapter, its own or those of the layer it shares with."""
        if adapter_name in self.e2vpt_kv_source:
            return self.e2vpt_kv_source[adapter_name][0].kv_prompts(adapter_name)
        return self.e2vpt_kv_prompts[adapter_name] if adapter_name in self.e2vpt_kv_prompts else None

    # ------------------------------------------------------------------------------------------------------ the gates
    def set_gates(self, adapter_name: str, token: Tensor, segment: Tensor) -> None:
        """Fixes the gates of an adapter's visual prompts and clears the pruned values.

        Args:
            adapter_name: name of the adapter.
            token: (M,), 1 keeps a prompt and 0 prunes it.
            segment: (M, R), the same for its segments.

        Raises:
            ValueError: a shape is wrong, or a gate is neither 0 nor 1 although pruned prompts are removed.
        """
        for name, gates, stored in (
            ("token", token, self.e2vpt_token_gates[adapter_name]),
            ("segment", segment, self.e2vpt_segment_gates[adapter_name]),
        ):
            if gates.shape != stored.shape:
                raise ValueError(
                    f"{name} gates of {self.site.name} have shape {tuple(stored.shape)}, got {gates.shape}."
                )
            if self.e2vpt_config[adapter_name].pruned_prompts == "remove" and not ((gates == 0) | (gates == 1)).all():
                raise ValueError(f"{name} gates of {self.site.name} must be 0 or 1 with pruned_prompts='remove'.")
            stored.copy_(gates)
        self.clear_pruned_values(adapter_name)
        self.refresh_kept_tokens()

    def alive(self, adapter_name: str) -> Tensor:
        """Which values of the visual prompts of an adapter take part: a boolean tensor (M, D)."""
        token, segment = self.e2vpt_token_gates[adapter_name], self.e2vpt_segment_gates[adapter_name]
        return alive_values(token, segment, self.site.width, self.e2vpt_config[adapter_name].segment_layout)

    @torch.no_grad()
    def clear_pruned_values(self, adapter_name: str) -> None:
        """Sets pruned values to zero. Their gradient is zero, so an optimizer without momentum from before leaves them
        there; one with it moves them, to no effect, because the gates keep them out.
        """
        prompts = self.e2vpt_visual_prompts[adapter_name]
        assign(prompts, whole(prompts) * self.alive(adapter_name))

    def refresh_kept_tokens(self) -> None:
        """Notes which prompts the gates keep; called whenever gates change."""
        for adapter_name, gates in self.e2vpt_token_gates.items():
            if adapter_name in self.e2vpt_kept_tokens:
                del self.e2vpt_kept_tokens[adapter_name]
            removes = self.e2vpt_config[adapter_name].pruned_prompts == "remove"
            if removes and not gates.is_meta and (gates == 0).any():
                self.e2vpt_kept_tokens[adapter_name] = gates.nonzero().flatten()

    def extra_repr(self) -> str:
        return f"{self.index}: {self.site.name}"
