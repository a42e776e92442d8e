# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`E2VPTLayer`: the prompts and gates of one self-attention, and the rows they give it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .._compat import BufferDict
from ..attention import interface, torch_function
from ..attention.rows import MixedBatch, Rows, one_per_sample, side_by_side
from ..backbones.sites import AttentionSite
from ..distributed import assign, whole
from .config import E2VPTConfig
from .constants import Sources
from .gates import GateOverride, StoredGates, alive_values, expand_segments


def _draw(shape: tuple[int, ...], scheme: str, fan_in: int, xavier_fans: int, generator: Any) -> Tensor:
    """Draws initial prompts; see `E2VPTConfig.visual_prompt_init` for the bounds."""
    values = torch.empty(shape, device="cpu", dtype=torch.float32)
    if scheme == "trunc_normal":
        return nn.init.trunc_normal_(values, std=0.02, a=-0.04, b=0.04, generator=generator)
    bound = math.sqrt(6.0 / (fan_in if scheme == "kaiming_uniform" else xavier_fans))
    return values.uniform_(-bound, bound, generator=generator)


def _refresh_after_load(layer: E2VPTLayer, incompatible_keys: Any) -> None:
    layer.refresh_gates()
    layer.refresh_merged_rows()


class E2VPTLayer(nn.Module, BaseTunerLayer):
    """The prompts of one self-attention, per adapter, and the key and value rows that they become.

    The layer stands beside the model, not around its attention: the attention module keeps its class and its path, and
    pulls its rows from here when it runs. Tensors per adapter: `e2vpt_visual_prompts` (M, D), `e2vpt_kv_prompts`
    (1 or 2, H, n, d), and, as persistent buffers, `e2vpt_token_gates` (M,) and `e2vpt_segment_gates` (M, R); of a
    merged adapter also `e2vpt_merged_rows` (2, 1, H, P, d), its keys and values, a buffer that is not saved. What the
    gates mean for a forward pass is worked out when they change: `e2vpt_kept_tokens` (M',) where prompts are removed,
    and `e2vpt_value_gates` (M', D) where values of those that stay are not just multiplied by 1.

    Args:
        site: the self-attention and the block around it.
        index: number of the attention among those of the model.
    """

    adapter_layer_names = ("e2vpt_visual_prompts", "e2vpt_kv_prompts")
    other_param_names = (
        "e2vpt_token_gates",
        "e2vpt_segment_gates",
        "e2vpt_kept_tokens",
        "e2vpt_value_gates",
        "e2vpt_merged_rows",
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
        self.eager_attention = interface.eager_attention_of(site.attention)
        self.e2vpt_visual_prompts = nn.ParameterDict()
        self.e2vpt_kv_prompts = nn.ParameterDict()
        self.e2vpt_token_gates = StoredGates()
        self.e2vpt_segment_gates = StoredGates()
        self.e2vpt_kept_tokens = BufferDict(persistent=False)
        self.e2vpt_value_gates = BufferDict(persistent=False)
        self.e2vpt_merged_rows = BufferDict(persistent=False)
        self.e2vpt_kv_source: dict[str, tuple[E2VPTLayer]] = {}
        self.e2vpt_config: dict[str, E2VPTConfig] = {}
        self.gate_override: GateOverride | None = None
        self.mixed_batch: MixedBatch | None = None
        self.num_samples: int | None = None
        self._merged_from: Sources | None = None
        self.register_load_state_dict_post_hook(_refresh_after_load)  # type: ignore[no-untyped-call]
        self._handles: list[Any] = []
        if site.backbone.windows:
            self._handles.append(site.block.register_forward_pre_hook(self._count_samples))
        self._was_asked = False
        if self.eager_attention is not None:
            interface.attach(site.attention, self)
            self._handles.append(site.attention.register_forward_hook(self._check_that_rows_were_asked_for))
        else:
            torch_function.attach(site.attention, self, site.name, site.num_key_value_heads, site.backbone.one_graph)
        self.train(site.attention.training)

    @property
    def socket(self) -> str:
        """How rows reach the attention: by transformers' `"interface"`, or by `"interception"` of its arithmetic."""
        return "interception" if self.eager_attention is None else "interface"

    @property
    def attention_config(self) -> Any:
        """The config that tells the attention's implementation; `None` where the attention asks none."""
        return None if self.eager_attention is None else interface.config_of(self.site.attention)

    def detach(self) -> None:
        """Leaves the base model: the attention and its block are as they were before this layer was made."""
        if self.eager_attention is not None:
            interface.detach(self.site.attention)
        else:
            torch_function.detach(self.site.attention)
        for handle in self._handles:
            handle.remove()

    def _check_that_rows_were_asked_for(self, attention: nn.Module, args: Any, output: Any) -> None:
        """Makes sure that prompts never train without an effect, whatever way a model file takes to its attention."""
        if torch.compiler.is_compiling():
            return
        if not self._was_asked:
            raise RuntimeError(
                f"{self.site.name} ({type(attention).__name__}) has not used its prompts: it has computed "
                "its attention without asking transformers' attention interface. Leave it out with exclude_modules."
            )
        self._was_asked = False

    def _count_samples(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        """Notes how many samples a windowed block sees before they are cut into windows, where samples differ."""
        if self.training or self.mixed_batch is not None:
            self.num_samples = args[0].shape[0]

    def _replicate_for_data_parallel(self) -> E2VPTLayer:
        raise RuntimeError(
            "E2VPT does not work in torch.nn.DataParallel, whose copies of the model would all use the prompts on the "
            "first GPU: start one process per GPU with torchrun or accelerate launch, or show the program a single "
            "GPU with CUDA_VISIBLE_DEVICES=0."
        )

    # ------------------------------------------------------------------------------------------------ PEFT's contract
    def get_base_layer(self) -> nn.Module:
        """The adapted self-attention."""
        attention: nn.Module = self.site.attention
        return attention

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        parameters = list(base_layer.parameters())
        dtypes = [parameter.dtype for parameter in parameters if parameter.dtype.is_floating_point]
        device = parameters[0].device
        for module in base_layer.modules():
            hook: Any = getattr(module, "_hf_hook", None)
            if device.type == "meta" and getattr(hook, "offload", False):  # by Accelerate, which brings it back to run
                device = torch.device(hook.execution_device)
        return device, dtypes[0] if dtypes else None

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
            The rows of all active adapters, in a mixed batch those of every sample's own adapter, or `None` where
            there are none.

        Raises:
            ValueError: a mixed batch has more or fewer adapter names than samples.
        """
        if not torch.compiler.is_compiling():
            self._was_asked = True
        if self.disable_adapters:
            return None
        rows = self._rows_of_adapters(num_sequences, dtype)
        backbone = self.site.backbone
        if rows is None or not (backbone.cosine or backbone.score_bias):
            return rows
        bias = rows.key.new_zeros(1, rows.key.shape[2]) if rows.score_bias is None else rows.score_bias
        return rows._replace(key=self.site.normalise(rows.key), score_bias=bias + backbone.score_bias)

    def _rows_of_adapters(self, num_sequences: int, dtype: torch.dtype) -> Rows | None:
        if self._may_be_constant() and not torch.compiler.is_compiling():
            self.refresh_merged_rows()
        num_samples = num_sequences if self.num_samples is None else self.num_samples
        if self.mixed_batch is None:
            return side_by_side([p for name in self.active_adapters for p in self._parts(name, num_samples, dtype)])
        names, choice = self.mixed_batch
        if len(choice) != num_samples:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(choice)} and {num_samples} respectively."
            )
        return one_per_sample([side_by_side(self._parts(name, num_samples, dtype)) for name in names], choice)

    def _parts(self, adapter_name: str, num_samples: int | None, dtype: torch.dtype) -> list[Rows]:
        """The rows of an adapter: the constants of a merged one, or those of visual and of key-value prompts."""
        if adapter_name not in self.e2vpt_config:
            return []
        if adapter_name in self.e2vpt_merged_rows and self._may_be_constant():
            key, value = self.e2vpt_merged_rows[adapter_name].unbind()
            return [self._in_heads(key, value, adapter_name)]
        return self._computed_parts(adapter_name, num_samples, dtype)

    def _may_be_constant(self) -> bool:
        return not self.training and self.gate_override is None

    def _computed_parts(self, adapter_name: str, num_samples: int | None, dtype: torch.dtype) -> list[Rows]:
        parts = []
        if self._has_visual_rows(adapter_name):
            prompts, bias = self.visual_prompts(adapter_name, num_samples)
            parts.append(Rows(*self.site.project(prompts, dtype), score_bias=bias))
        kv_prompts = self.kv_prompts(adapter_name)
        if kv_prompts is not None:
            kv_prompts = kv_prompts.to(dtype)
            key, value = kv_prompts.split(1) if len(kv_prompts) == 2 else (kv_prompts, kv_prompts)
            parts.append(self._in_heads(key, value, adapter_name))
        return parts

    def _in_heads(self, key: Tensor, value: Tensor, adapter_name: str) -> Rows:
        """Rows of constants and key-value prompts (1, H, P, d), cut where keys or values are narrower than d."""
        if self.site.key_dim != self.site.value_dim:
            key, value = key[..., : self.site.key_dim], value[..., : self.site.value_dim]
        return Rows(key, value, self._num_behind(adapter_name))

    def _has_visual_rows(self, adapter_name: str) -> bool:
        deep = self.e2vpt_config[adapter_name].visual_prompt_mode == "deep"
        return deep and adapter_name in self.e2vpt_visual_prompts

    def _num_behind(self, adapter_name: str) -> int:
        if self.e2vpt_config[adapter_name].kv_prompt_position == "before":
            return 0
        kv_prompts = self.kv_prompts(adapter_name)
        return 0 if kv_prompts is None else kv_prompts.shape[2]

    def num_visual_rows(self, adapter_name: str) -> int:
        """How many rows the visual prompts of an adapter give to this attention, without those removed."""
        if adapter_name not in self.e2vpt_config or not self._has_visual_rows(adapter_name):
            return 0
        kept = self.e2vpt_kept_tokens
        return len((kept if adapter_name in kept else self.e2vpt_visual_prompts)[adapter_name])

    def num_kv_rows(self, adapter_name: str) -> int:
        """How many rows the key-value prompts of an adapter give to this attention."""
        kv_prompts = self.kv_prompts(adapter_name) if adapter_name in self.e2vpt_config else None
        return 0 if kv_prompts is None else kv_prompts.shape[2]

    def num_rows(self, adapter_name: str) -> int:
        """P, how many rows an adapter gives to this attention; 0 where it has no part in it."""
        return self.num_visual_rows(adapter_name) + self.num_kv_rows(adapter_name)

    def visual_prompts(self, adapter_name: str, num_samples: int | None) -> tuple[Tensor, Tensor | None]:
        """Applies gates and dropout to the visual prompts of an adapter.

        Args:
            adapter_name: name of the adapter.
            num_samples: B, the samples of the batch, each with a dropout of its own; `None` drops nothing.

        Returns:
            Prompts (1 or B, M', D) without those removed, and the logarithm of their gates (B, M') where token gates
            are being measured on the attention weight, else `None`.
        """
        config, bias = self.e2vpt_config[adapter_name], None
        prompts = self.e2vpt_visual_prompts[adapter_name][None]
        if self.gate_override is not None:
            prompts, bias = self._gated(prompts, self.gate_override, adapter_name)
        if adapter_name in self.e2vpt_kept_tokens:
            kept = self.e2vpt_kept_tokens[adapter_name]
            prompts = prompts.index_select(1, kept)
            bias = None if bias is None else bias.index_select(1, kept)
        if self.gate_override is None and adapter_name in self.e2vpt_value_gates:
            prompts = prompts * self.e2vpt_value_gates[adapter_name].to(prompts.dtype)
        if self.training and num_samples is not None and config.visual_prompt_dropout:
            prompts = F.dropout(prompts.expand(num_samples, -1, -1), config.visual_prompt_dropout)
        return prompts, bias

    def _gated(self, prompts: Tensor, override: GateOverride, adapter_name: str) -> tuple[Tensor, Tensor | None]:
        """Prompts of every sample (B, M, D) under gates that are measured, and the logarithm of those on attention."""
        config, token, bias = self.e2vpt_config[adapter_name], self.e2vpt_token_gates[adapter_name], None
        segment = expand_segments(override.segment, prompts.shape[-1], config.segment_layout)
        prompts = prompts * segment.to(prompts.dtype)
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

    # --------------------------------------------------------------------------------------------- rows as constants
    @property
    def merged_adapters(self) -> list[str]:
        """The adapters whose rows are constants."""
        return list(self.e2vpt_merged_rows.keys())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Computes the rows of adapters once; in eval mode they are constants from now on.

        Constants follow their prompts: when a tensor that they were computed from is written to or replaced, they are
        computed anew. In training mode, and while gates are measured, rows are computed from the prompts as ever.
        What nothing notices: writing through `.data` in eval mode; switching a LoRA on the projections on or off; and,
        in a compiled program, writing in eval mode without `load_state_dict` or `set_gates`. Unmerge before and merge
        after that.

        Args:
            safe_merge: whether to check for infinite values and NaNs.
            adapter_names: adapters of the layer, by default the active ones.

        Raises:
            ValueError: a check was asked for and failed.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name in self.e2vpt_config:
                rows = self.computed_rows(adapter_name)
                if safe_merge and not rows.isfinite().all():
                    raise ValueError(
                        f"NaNs detected in the merged rows of {self.site.name}. The adapter {adapter_name} seems to "
                        "be broken."
                    )
                self.e2vpt_merged_rows[adapter_name] = rows
        self._note_sources()

    def unmerge(self) -> None:
        """Computes the rows of all adapters anew in every forward pass, as before `merge`."""
        self.e2vpt_merged_rows.clear()
        self._merged_from = None

    @torch.no_grad()
    def computed_rows(self, adapter_name: str) -> Tensor:
        """The rows of an adapter without dropout and gradient: keys and values, a tensor (2, 1, H, P, d)."""
        _, dtype = self._get_base_layer_device_and_dtype(self.site.attention)
        rows = side_by_side(self._computed_parts(adapter_name, None, dtype or torch.get_default_dtype()))
        assert rows is not None  # an adapter in deep mode has rows
        width = self.site.head_dim
        return torch.stack([F.pad(part, (0, width - part.shape[-1])) for part in (rows.key, rows.value)])

    def refresh_merged_rows(self) -> None:
        """Computes constants anew where what they were computed from has changed."""
        if self._merged_from is not None and not self._merged_from.unchanged():
            self._recompute_merged_rows()

    def _recompute_merged_rows(self) -> None:
        for adapter_name in self.merged_adapters:
            self.e2vpt_merged_rows[adapter_name] = self.computed_rows(adapter_name)
        self._note_sources()

    def _note_sources(self) -> None:
        lenders = [layer for (layer,) in self.e2vpt_kv_source.values()]
        modules = [self, *lenders, self.site.attention, *self.site.norms]
        self._merged_from = Sources(part for module in modules for part in module.modules())

    def train(self, mode: bool = True) -> E2VPTLayer:
        """Sets training or eval mode; after training, constants are computed anew.

        A compiled program does not look for changes, and an optimizer may write in a way that torch does not count.
        """
        trained = self.training and not mode
        super().train(mode)
        if trained and self.merged:
            self._recompute_merged_rows()
        return self

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
        self.refresh_gates()
        self.refresh_merged_rows()

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

    def refresh_gates(self) -> None:
        """Works out which prompts the gates keep, and what they multiply them with; called whenever gates change."""
        for adapter_name, token in self.e2vpt_token_gates.items():
            for stored in (self.e2vpt_kept_tokens, self.e2vpt_value_gates):
                if adapter_name in stored:
                    del stored[adapter_name]
            if token.is_meta:
                continue
            config, segment = self.e2vpt_config[adapter_name], self.e2vpt_segment_gates[adapter_name]
            if config.pruned_prompts == "zero":
                segment = segment * token[:, None]
            elif (token == 0).any():
                kept = token.nonzero().flatten()
                self.e2vpt_kept_tokens[adapter_name] = kept
                segment = segment[kept]
            if (segment != 1).any():
                gates = expand_segments(segment, self.site.width, config.segment_layout)
                self.e2vpt_value_gates[adapter_name] = gates

    def extra_repr(self) -> str:
        return f"{self.index}: {self.site.name}"
