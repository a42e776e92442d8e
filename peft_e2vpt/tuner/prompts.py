# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`Prompts`: the prompts of one self-attention and the gates on them, and the key and value rows they become."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat import has_values
from ..attention.rows import Rows, side_by_side
from ..backbones.sites import AttentionSite
from ..distributed import assign, whole
from .config import E2VPTConfig
from .gates import (
    GateEffect,
    GateOverride,
    StoredGates,
    as_switches,
    check_gates,
    effect_of,
    expand_segments,
    kept_values,
)


def _draw(
    shape: tuple[int, ...], scheme: str, fan_in: int, xavier_fans: int, generator: torch.Generator | None
) -> Tensor:
    """Draws initial prompts; see `E2VPTConfig.visual_prompt_init` for the bounds."""
    values = torch.empty(shape, device="cpu", dtype=torch.float32)
    if scheme == "trunc_normal":
        return nn.init.trunc_normal_(values, std=0.02, a=-0.04, b=0.04, generator=generator)
    bound = math.sqrt(6.0 / (fan_in if scheme == "kaiming_uniform" else xavier_fans))
    return values.uniform_(-bound, bound, generator=generator)


def shapes_of_prompts(site: AttentionSite, config: E2VPTConfig) -> dict[str, torch.Size]:
    """The shapes of visual prompts, their gates and key-value prompts of a self-attention that owns them all."""
    count, copies = config.num_visual_prompts, 1 if config.share_kv_prompts else 2
    return {
        "visual_prompts": torch.Size((count, site.width)),
        "token_gates": torch.Size((count,)),
        "segment_gates": torch.Size((count, config.num_segments)),
        "kv_prompts": torch.Size((copies, site.num_key_value_heads, config.num_kv_prompts, site.head_dim)),
    }


class Prompts(nn.Module):
    """The prompts of one self-attention, per adapter, and what their gates leave of them.

    Tensors per adapter: `e2vpt_visual_prompts` (M, D), `e2vpt_kv_prompts` (1 or 2, H, n, d), and, as persistent
    buffers, `e2vpt_token_gates` (M,) and `e2vpt_segment_gates` (M, R). What the gates do in a forward pass follows
    them, whoever writes them: it is no buffer, and worked out anew where a forward pass, `train()` or `eval()`, a
    copy, a move or a loaded state dict finds other gates. A forward pass that is compiled or exported takes what was
    worked out last; on a GPU, what is written through `.data` counts from the next `train()` or `eval()` on.

    Args:
        site: the self-attention and the block around it.
        index: number of the attention among those of the model.

    Attributes:
        gate_override: gates that are being measured, in place of the stored ones.
    """

    def __init__(self, site: AttentionSite, index: int) -> None:
        super().__init__()
        self.site = site
        self.index = index
        self.e2vpt_visual_prompts = nn.ParameterDict()
        self.e2vpt_kv_prompts = nn.ParameterDict()
        self.e2vpt_token_gates = StoredGates()
        self.e2vpt_segment_gates = StoredGates()
        self.e2vpt_gate_effects: dict[str, GateEffect] = {}
        self.e2vpt_kv_source: dict[str, tuple[Prompts]] = {}  # in a tuple, the other layer is no child
        self.e2vpt_config: dict[str, E2VPTConfig] = {}
        self.gate_override: GateOverride | None = None

    @property
    def is_offloaded(self) -> bool:
        """Whether Accelerate has taken prompts off with the base model; another thread may be adding an adapter."""
        prompts = (self.e2vpt_visual_prompts, self.e2vpt_kv_prompts)
        return any(
            value.is_meta for held in prompts for value in tuple(held._parameters.values()) if value is not None
        )

    # ------------------------------------------------------------------------------------------------------- creating
    def create(
        self, adapter_name: str, config: E2VPTConfig, has_visual_prompts: bool, kv_source: Prompts | None
    ) -> None:
        """Creates the prompts and gates of an adapter.

        Args:
            adapter_name: name of the adapter.
            config: its configuration.
            has_visual_prompts: whether this attention owns visual prompts (in shallow mode only the first does).
            kv_source: the prompts whose key-value prompts this attention uses instead of its own.
        """
        self.e2vpt_config[adapter_name], shapes = config, shapes_of_prompts(self.site, config)
        if has_visual_prompts and config.num_visual_prompts:
            self.e2vpt_visual_prompts[adapter_name] = nn.Parameter(torch.zeros(shapes["visual_prompts"]))
            self.e2vpt_token_gates[adapter_name] = torch.ones(shapes["token_gates"])
            self.e2vpt_segment_gates[adapter_name] = torch.ones(shapes["segment_gates"])
            self.e2vpt_gate_effects[adapter_name] = GateEffect()
        if kv_source is not None:
            self.e2vpt_kv_source[adapter_name] = (kv_source,)
        elif config.num_kv_prompts:
            self.e2vpt_kv_prompts[adapter_name] = nn.Parameter(torch.zeros(shapes["kv_prompts"]))
        self.draw_prompts(adapter_name, config.seed)

    @torch.no_grad()
    def draw_prompts(self, adapter_name: str, seed: int | None) -> None:
        """Draws the prompts of an adapter anew from their initial distributions, in place.

        Args:
            adapter_name: name of the adapter.
            seed: of the draw, together with the number of the attention; `None` uses torch's global generator.
        """
        config, site = self.e2vpt_config[adapter_name], self.site
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed + 7919 * self.index)
        fans, shapes = 3 * site.patch_area + site.width, shapes_of_prompts(site, config)
        if adapter_name in self.e2vpt_visual_prompts:
            drawn = _draw(shapes["visual_prompts"], config.visual_prompt_init, site.width, fans, generator)
            assign(self.e2vpt_visual_prompts[adapter_name], drawn)
        if adapter_name in self.e2vpt_kv_prompts:
            fan_in = config.num_kv_prompts * site.head_dim
            drawn = _draw(shapes["kv_prompts"], config.kv_prompt_init, fan_in, fans, generator)
            assign(self.e2vpt_kv_prompts[adapter_name], drawn)

    # ------------------------------------------------------------------------------------------------------- reading
    def visual_prompts(self, adapter_name: str, num_samples: int | None) -> tuple[Tensor, Tensor | None]:
        """Applies gates and dropout to the visual prompts of an adapter.

        Args:
            adapter_name: name of the adapter.
            num_samples: B, the samples of the batch, each with a dropout of its own; `None` drops nothing.

        Returns:
            Prompts (1 or B, M', D) without those removed, and the logarithm of their gates (B, M') where token gates
            are being measured on the attention weight, else `None`.
        """
        config, override = self.e2vpt_config[adapter_name], self.gate_override
        prompts, effect = self.e2vpt_visual_prompts[adapter_name][None], self.gate_effect(adapter_name)
        bias = effect.bias
        if override is not None:
            prompts, bias = self._gated(prompts, override, adapter_name)
        kept = effect.kept if override is None or override.kept is None else override.kept
        if kept is not None:
            prompts = prompts.index_select(1, kept)
            bias = None if bias is None else bias.index_select(1, kept)
        if override is None and effect.values is not None:
            prompts = prompts * effect.values.to(prompts.dtype)
        if self.training and num_samples is not None and config.visual_prompt_dropout:
            prompts = F.dropout(prompts.expand(num_samples, -1, -1), config.visual_prompt_dropout)
        return prompts, bias

    def _gated(self, prompts: Tensor, override: GateOverride, adapter_name: str) -> tuple[Tensor, Tensor | None]:
        """Prompts of every sample (B, M, D) under gates that are measured, and the logarithm of those on attention."""
        config, (token, _), bias = self.e2vpt_config[adapter_name], self.gates(adapter_name), None
        segment = expand_segments(override.segment, prompts.shape[-1], config.segment_layout)
        prompts = prompts * self.kept(adapter_name) * segment.to(prompts.dtype)  # optimizers may move pruned values
        if override.on == "attention":
            bias = override.token.log()
        else:
            token = override.token
        if override.on == "embedding" or config.pruned_prompts == "zero":
            prompts = prompts * token[..., None].to(prompts.dtype)
        return prompts, bias

    def kv_prompts(self, adapter_name: str) -> Tensor | None:
        """The key-value prompts (1 or 2, H, n, d) of an adapter, its own or those of the layer it shares with."""
        if adapter_name in self.e2vpt_kv_source:
            return self.e2vpt_kv_source[adapter_name][0].kv_prompts(adapter_name)
        return self.e2vpt_kv_prompts[adapter_name] if adapter_name in self.e2vpt_kv_prompts else None

    def has_visual_rows(self, adapter_name: str) -> bool:
        """Whether an adapter has visual prompts that become rows; in shallow mode they are tokens of the sequence."""
        config = self.e2vpt_config.get(adapter_name)
        return config is not None and config.visual_prompt_mode == "deep" and adapter_name in self.e2vpt_visual_prompts

    def num_visual_rows(self, adapter_name: str) -> int:
        """How many rows the visual prompts of an adapter give to this attention, without those removed."""
        return self.num_kept_prompts(adapter_name) if self.has_visual_rows(adapter_name) else 0

    def num_kept_prompts(self, adapter_name: str) -> int:
        """How many visual prompts of an adapter take part in a forward pass, all but those removed."""
        override, kept = self.gate_override, self.gate_effect(adapter_name).kept
        if override is not None and override.kept is not None:
            kept = override.kept
        return self.e2vpt_config[adapter_name].num_visual_prompts if kept is None else len(kept)

    def num_kv_rows(self, adapter_name: str) -> int:
        """How many rows the key-value prompts of an adapter give to this attention."""
        kv_prompts = self.kv_prompts(adapter_name)
        return 0 if kv_prompts is None else kv_prompts.shape[2]

    def num_rows(self, adapter_name: str) -> int:
        """P, how many rows an adapter gives to this attention; 0 where it has no part in it."""
        return self.num_visual_rows(adapter_name) + self.num_kv_rows(adapter_name)

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
        binary = self.e2vpt_config[adapter_name].pruned_prompts == "remove"
        stored = (self.e2vpt_token_gates[adapter_name], self.e2vpt_segment_gates[adapter_name])
        for name, gates, before in zip(("token", "segment"), (token, segment), stored, strict=True):
            check_gates(f"{name} gates of {self.site.name}", gates, before.shape, binary)
        stored[0].copy_(token)
        stored[1].copy_(segment)
        self.clear_pruned_values(adapter_name)
        if has_values(stored[0]):
            self._work_out(adapter_name)

    def gates(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The gates (M,) and (M, R) of an adapter's visual prompts, those of an average of models as 0 and 1."""
        pruned_prompts = self.e2vpt_config[adapter_name].pruned_prompts
        token, segment = self.e2vpt_token_gates[adapter_name], self.e2vpt_segment_gates[adapter_name]
        return as_switches(token, pruned_prompts), as_switches(segment, pruned_prompts)

    def kept(self, adapter_name: str) -> Tensor:
        """Which values of the visual prompts of an adapter take part: a boolean tensor (M, D)."""
        config = self.e2vpt_config[adapter_name]
        token, segment = self.e2vpt_token_gates[adapter_name], self.e2vpt_segment_gates[adapter_name]
        return kept_values(token, segment, self.site.width, config.segment_layout, config.pruned_prompts)

    @torch.no_grad()
    def clear_pruned_values(self, adapter_name: str) -> None:
        """Sets pruned values to zero. Their gradient is zero, so an optimizer without momentum from before leaves them
        there; one with it moves them, to no effect, because the gates keep them out.
        """
        prompts = self.e2vpt_visual_prompts[adapter_name]
        assign(prompts, whole(prompts) * self.kept(adapter_name))

    def gate_effect(self, adapter_name: str) -> GateEffect:
        """What the gates of an adapter do in a forward pass, worked out anew where they are not what they were."""
        effect = self.e2vpt_gate_effects[adapter_name]
        if torch.compiler.is_compiling():  # no shape in a graph may depend on values
            return effect
        # straight from the modules: this runs in every attention of every forward pass
        modules: dict[str, Any] = self._modules
        token: Tensor = modules["e2vpt_token_gates"]._buffers[adapter_name]
        segment: Tensor = modules["e2vpt_segment_gates"]._buffers[adapter_name]
        if effect.is_of(token, segment) or not (has_values(token) and has_values(segment)):
            return effect
        found = self._work_out(adapter_name)
        if found.seen and found.has_other_fractions_than(effect):
            warnings.warn(
                f"The visual prompts of {self.site.name} have gates between 0 and 1, as an average of models has that "
                "were pruned differently. With pruned_prompts='zero' gates are factors, so pruned prompts take part "
                "again. To prune the average too: apply_gates(average, gates) with the gates of the pruned model.",
                stacklevel=2,
            )
        return found

    def refresh_gates(self) -> None:
        """Works out what the gates of all adapters do, whether or not they are known to have changed."""
        for adapter_name, token in self.e2vpt_token_gates.items():
            if has_values(token):
                self._work_out(adapter_name)

    def _work_out(self, adapter_name: str) -> GateEffect:
        config = self.e2vpt_config[adapter_name]
        token, segment = self.e2vpt_token_gates[adapter_name], self.e2vpt_segment_gates[adapter_name]
        effect = effect_of(token, segment, self.site.width, config.segment_layout, config.pruned_prompts)
        if effect.seen:
            self.e2vpt_gate_effects[adapter_name] = effect
        elif config.visual_prompt_mode == "shallow" and config.pruned_prompts == "remove":
            raise ValueError(
                "torch.func.vmap over models needs visual_prompt_mode='deep': prompts that one model has pruned "
                "cannot leave the sequence of that model alone."
            )
        return effect

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Prompts:
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for adapter_name, effect in self.e2vpt_gate_effects.items():
            if not has_values(self.e2vpt_token_gates[adapter_name]):
                self.e2vpt_gate_effects[adapter_name] = effect.moved(fn)
        self.refresh_gates()
        return self

    def train(self, mode: bool = True) -> Prompts:
        """Sets training or eval mode, and looks at the gates anew."""
        super().train(mode)
        self.refresh_gates()
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.refresh_gates()  # a copy that is exported right away takes what is worked out here
        return self.__dict__.copy()


def rows_of_prompts(prompts: Prompts, adapter_name: str, num_samples: int | None, dtype: torch.dtype) -> list[Rows]:
    """The rows of an adapter: `k_proj(norm(P))` and `v_proj(norm(P))` of visual prompts, and key-value prompts.

    Args:
        prompts: the prompts of the attention.
        adapter_name: name of the adapter.
        num_samples: B, the samples of the batch, each with a dropout of its own; `None` drops nothing.
        dtype: type of the attention's keys.

    Returns:
        Rows (1 or B, H, P_i, d) of each kind of prompts that the adapter has.
    """
    parts = []
    if prompts.has_visual_rows(adapter_name):
        visual_prompts, bias = prompts.visual_prompts(adapter_name, num_samples)
        key, value = _projected(prompts, visual_prompts, dtype)
        parts.append(Rows(key, value, score_bias=bias))
    kv_prompts = prompts.kv_prompts(adapter_name)
    if kv_prompts is not None:
        kv_prompts = kv_prompts.to(dtype)
        key, value = kv_prompts.split(1) if len(kv_prompts) == 2 else (kv_prompts, kv_prompts)
        parts.append(_in_heads(prompts, key, value, adapter_name))
    return parts


def _projected(prompts: Prompts, visual_prompts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Key and value rows (1 or B, H, M', d) of visual prompts (1 or B, M', D)."""
    site = prompts.site
    if not prompts.training and not visual_prompts.shape[1]:  # quantised layers cannot scale nothing
        shape = len(visual_prompts), site.num_key_value_heads, 0
        nothing = visual_prompts.to(dtype)  # reshaped, so that it stays in the graph
        return nothing.reshape(*shape, site.key_dim), nothing.reshape(*shape, site.value_dim)
    key, value = site.project(visual_prompts, dtype)
    measured = prompts.training or prompts.gate_override is not None
    if measured and torch.is_grad_enabled() and visual_prompts.requires_grad and not site.lets_gradients_through(key):
        raise RuntimeError(
            f"Prompts cannot train: no gradient passes through the projections of {site.name}, whose arithmetic is "
            "quantised. Train before the model is quantised, or, where 4-bit weights of bitsandbytes are on a CPU, "
            "before it first runs in eval mode; to serve, call model.eval()."
        )
    return key, value


@torch.no_grad()
def constant_rows(prompts: Prompts, adapter_name: str, dtype: torch.dtype) -> Tensor:
    """The rows of an adapter without dropout and gradient: keys and values, a tensor (2, 1, H, P, d)."""
    rows = side_by_side(rows_of_prompts(prompts, adapter_name, None, dtype))
    assert rows is not None  # an adapter in deep mode has rows
    width = prompts.site.head_dim
    return torch.stack([F.pad(part, (0, width - part.shape[-1])) for part in (rows.key, rows.value)])


def rows_of_constants(prompts: Prompts, adapter_name: str, constants: Tensor) -> Rows:
    """The rows that `constant_rows` gave as a tensor (2, 1, H, P, d)."""
    key, value = constants.unbind()
    return _in_heads(prompts, key, value, adapter_name)


def _in_heads(prompts: Prompts, key: Tensor, value: Tensor, adapter_name: str) -> Rows:
    """Rows (1, H, P, d), cut where keys or values are narrower than d; key-value prompts may go behind."""
    if prompts.site.key_dim != prompts.site.value_dim:
        key, value = key[..., : prompts.site.key_dim], value[..., : prompts.site.value_dim]
    before = prompts.e2vpt_config[adapter_name].kv_prompt_position == "before"
    return Rows(key, value, 0 if before else prompts.num_kv_rows(adapter_name))


def as_scored(site: AttentionSite, rows: Rows) -> Rows:
    """Rows as the scores of an attention take them: of length 1 for a cosine, and with its average position bias."""
    backbone = site.backbone
    if not (backbone.cosine or backbone.score_bias):
        return rows
    bias = rows.key.new_zeros(1, rows.key.shape[2]) if rows.score_bias is None else rows.score_bias
    return rows._replace(key=site.normalise(rows.key), score_bias=bias + backbone.score_bias)
