# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`E2VPTLayer`: the prompts of one self-attention as a layer of PEFT, and the rows that its attention asks it for."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .._compat import device_and_dtype, has_values, is_batched
from ..attention import interface, torch_function
from ..attention.rows import Rows, one_per_sample, side_by_side
from ..backbones.sites import AttentionSite
from .config import E2VPTConfig
from .gates import Seen
from .mixed_batch import current_choice
from .prompts import Prompts, as_scored, constant_rows, rows_of_constants, rows_of_prompts


class _Batch(threading.local):
    """How many samples the windowed block that a thread runs has got, before they are cut into windows."""

    num_samples: int | None = None


_batch = _Batch()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _num_samples_of_this_thread() -> int | None:
    return _batch.num_samples


DATA_PARALLEL = (
    "E2VPT does not work in torch.nn.DataParallel, whose copies of the model would all use the prompts on the first "
    "GPU: start one process per GPU with torchrun or accelerate launch, or show the program a single GPU with "
    "CUDA_VISIBLE_DEVICES=0."
)


def _refresh_gates_after_load(layer: E2VPTLayer, incompatible_keys: Any) -> None:
    layer.refresh_gates()


class E2VPTLayer(Prompts, BaseTunerLayer):
    """The prompts of one self-attention, per adapter, and the key and value rows that they become.

    The layer stands beside the model, not around its attention: the attention module keeps its class and its path, and
    pulls its rows from here when it runs. The tensors are those of `Prompts`, and of a merged adapter also
    `e2vpt_merged_rows` (2, 1, H, P, d), its keys and values. They are no buffer: whoever copies or averages a model
    does that with its prompts, and the rows follow.

    Args:
        site: the self-attention and the block around it.
        index: number of the attention among those of the model.
    """

    adapter_layer_names = ("e2vpt_visual_prompts", "e2vpt_kv_prompts")
    other_param_names = (
        "e2vpt_token_gates",
        "e2vpt_segment_gates",
        "e2vpt_gate_effects",
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
        super().__init__(site, index)
        self.eager_attention = interface.eager_attention_of(site.attention, site.backbone.eager)
        self.e2vpt_merged_rows: dict[str, Tensor] = {}
        self._merged_from: dict[str, tuple[Seen, ...]] = {}
        self._num_samples: int | None = None
        self.register_load_state_dict_post_hook(_refresh_gates_after_load)  # type: ignore[no-untyped-call]
        self._handles: list[Any] = []
        if site.backbone.windows:
            self._handles.append(site.block.register_forward_pre_hook(self._count_samples))
        self._has_given_rows = False  # ever: what proves that the attention asks for them
        self.is_attached = True
        if self.eager_attention is not None:
            interface.attach(site.attention, self)
            self._handles.append(site.attention.register_forward_hook(self._check_that_rows_were_asked_for))
        else:
            torch_function.attach(site.attention, self, site.name, site.num_key_value_heads, site.backbone.one_graph)
            self._handles.append(site.attention.register_forward_hook(self._check_that_forward_is_adapted))
        self.train(site.attention.training)

    @property
    def attention_path(self) -> str:
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
        self.is_attached = False
        for handle in self._handles:
            handle.remove()

    def _check_that_rows_were_asked_for(self, attention: nn.Module, args: Any, output: Any) -> None:
        """Makes sure that prompts never train without an effect, whatever way a model file takes to its attention."""
        if not (torch.compiler.is_compiling() or self._has_given_rows):
            raise RuntimeError(
                f"{self.site.name} ({type(attention).__name__}) has not used its prompts: it has computed "
                "its attention without asking transformers' attention interface. Leave it out with exclude_modules."
            )

    def _check_that_forward_is_adapted(self, attention: nn.Module, args: Any, output: Any) -> None:
        """Makes sure that nobody has set the attention's own forward back, such as a hook that was removed."""
        if not (torch.compiler.is_compiling() or torch_function.has_run_for(self) or self.disable_adapters):
            raise RuntimeError(
                f"{self.site.name} ({type(attention).__name__}) has not used its prompts: its forward was replaced "
                "after the model was adapted. Put the adapted one back, or save the adapter and load it into the "
                "changed model."
            )

    def _count_samples(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        """Notes how many samples a windowed block sees before they are cut into windows."""
        _batch.num_samples = args[0].shape[0]
        if self.training:  # torch.compile notices a change of what is on the module alone
            self._num_samples = _batch.num_samples

    def _replicate_for_data_parallel(self) -> E2VPTLayer:
        raise RuntimeError(DATA_PARALLEL)

    # ------------------------------------------------------------------------------------------------ PEFT's contract
    def get_base_layer(self) -> nn.Module:
        """The adapted self-attention."""
        attention: nn.Module = self.site.attention
        return attention

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        return device_and_dtype(base_layer)

    def update_layer(
        self, adapter_name: str, config: E2VPTConfig, has_visual_prompts: bool, kv_source: E2VPTLayer | None
    ) -> None:
        """Creates the prompts and gates of an adapter, beside the attention and trained or not; see `create`."""
        self.create(adapter_name, config, has_visual_prompts, kv_source)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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
        if not (torch.compiler.is_compiling() or self._has_given_rows):
            self._has_given_rows = True
        rows = self._rows_of_adapters(num_sequences, dtype)
        return None if rows is None else as_scored(self.site, rows)

    def take_rows_from(self, source: Callable[[int, torch.dtype], Rows | None]) -> None:
        """Lets rows come from somewhere else than the prompts of this layer, with the signature of `rows`."""
        self.rows = source  # type: ignore[method-assign, assignment]
        self._has_given_rows = True

    def adapters_of_pass(self) -> Sequence[str]:
        """The adapters that all samples of the forward pass have, in a mixed batch none."""
        choice = current_choice()
        if choice is not None:
            return choice.active
        return () if self.disable_adapters else self.active_adapters

    def _samples_of(self, num_sequences: int) -> int:
        """How many samples stand behind the sequences that the attention sees."""
        if not self.site.backbone.windows:
            return num_sequences
        compiles = self.training and torch.compiler.is_compiling()
        counted: int | None = self._num_samples if compiles else _num_samples_of_this_thread()
        return num_sequences if counted is None else counted

    def _rows_of_adapters(self, num_sequences: int, dtype: torch.dtype) -> Rows | None:
        choice = current_choice()
        if choice is None or choice.mixed is None:
            num_dropped = self._samples_of(num_sequences) if self.training else None
            active = self.adapters_of_pass()
            return side_by_side([part for name in active for part in self._parts(name, num_dropped, dtype)])
        num_samples = self._samples_of(num_sequences)
        names, of_sample, _ = choice.mixed
        if len(of_sample) != num_samples:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(of_sample)} and {num_samples} respectively."
            )
        return one_per_sample([side_by_side(self._parts(name, None, dtype)) for name in names], of_sample)

    def _parts(self, adapter_name: str, num_dropped: int | None, dtype: torch.dtype) -> list[Rows]:
        """The rows of an adapter: the constants of a merged one, or those of visual and of key-value prompts."""
        if adapter_name not in self.e2vpt_config:
            return []
        if not self.training and self.gate_override is None:
            constants = self.e2vpt_merged_rows.get(adapter_name)  # looked up once: a thread may unmerge
            if constants is not None:
                return [rows_of_constants(self, adapter_name, self._up_to_date(adapter_name, constants))]
        return rows_of_prompts(self, adapter_name, num_dropped, dtype)

    def computed_rows(self, adapter_name: str) -> Tensor:
        """The rows of an adapter without dropout and gradient: keys and values, a tensor (2, 1, H, P, d)."""
        _, dtype = self._get_base_layer_device_and_dtype(self.site.attention)
        with torch.autocast(self._sources(adapter_name)[0].device.type, enabled=False):
            return constant_rows(self, adapter_name, dtype or torch.get_default_dtype())

    # --------------------------------------------------------------------------------------------- rows as constants
    @property
    def merged_adapters(self) -> list[str]:
        """The adapters whose rows are constants."""
        return list(self.e2vpt_merged_rows.keys())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Computes the rows of adapters once; in eval mode they are constants from now on.

        `E2VPTModel.merge_adapter` says when they are computed anew. In training mode, and while gates are measured,
        rows are computed from the prompts as ever.

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
                self._keep(adapter_name, rows)

    def unmerge(self) -> None:
        """Computes the rows of all adapters anew in every forward pass, as before `merge`."""
        self.e2vpt_merged_rows.clear()
        self._merged_from.clear()

    def refresh_merged_rows(self) -> None:
        """Computes constants anew; called where prompts, gates or projections are known to have changed."""
        for adapter_name in self.merged_adapters:
            self._refresh(adapter_name)

    def _refresh(self, adapter_name: str) -> None:
        if all(map(has_values, self._sources(adapter_name))):
            self._keep(adapter_name, self.computed_rows(adapter_name))

    def _keep(self, adapter_name: str, rows: Tensor) -> None:
        self._merged_from[adapter_name] = tuple(map(Seen.now, self._sources(adapter_name)))
        self.e2vpt_merged_rows[adapter_name] = rows

    def _sources(self, adapter_name: str) -> list[Tensor]:
        """The tensors of an adapter that its rows are made of."""
        # straight from the modules: this runs in every attention of every forward pass
        modules: dict[str, Any] = self._modules
        tensors = [
            modules["e2vpt_visual_prompts"]._parameters.get(adapter_name),
            modules["e2vpt_token_gates"]._buffers.get(adapter_name),
            modules["e2vpt_segment_gates"]._buffers.get(adapter_name),
            self.kv_prompts(adapter_name),
        ]
        return [tensor for tensor in tensors if tensor is not None]

    def _up_to_date(self, adapter_name: str, rows: Tensor) -> Tensor:
        """Constant rows (2, 1, H, P, d), computed anew where the prompts or gates are not what they were."""
        if torch.compiler.is_compiling():
            return rows
        sources, seen = self._sources(adapter_name), self._merged_from.get(adapter_name, ())
        unchanged = len(seen) == len(sources) and all(map(Seen.is_now, seen, sources))
        if unchanged or not all(map(has_values, sources)):
            return rows
        computed = self.computed_rows(adapter_name)
        if self.e2vpt_merged_rows.get(adapter_name) is rows and not any(map(is_batched, sources)):
            self._keep(adapter_name, computed)
        return computed

    def set_gates(self, adapter_name: str, token: Tensor, segment: Tensor) -> None:
        super().set_gates(adapter_name, token, segment)
        if adapter_name in self.merged_adapters:
            self._refresh(adapter_name)

    def train(self, mode: bool = True) -> E2VPTLayer:
        """Sets training or eval mode; constants are computed anew after training, and where prompts have changed."""
        trained = self.training and not mode
        super().train(mode)
        if trained:
            self.refresh_merged_rows()
        else:
            for adapter_name, rows in list(self.e2vpt_merged_rows.items()):
                self._up_to_date(adapter_name, rows)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> E2VPTLayer:
        super()._apply(fn, *args, **kwargs)
        self.e2vpt_merged_rows = {name: fn(rows) for name, rows in self.e2vpt_merged_rows.items()}
        self._merged_from = {}  # they are computed anew once the whole model has moved
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_merged_from": {}}

    # ---------------------------------------------------------------------------------------------------- former names
    @property
    def socket(self) -> str:
        """The former name of `attention_path`; the next release drops it."""
        warnings.warn("socket is now called attention_path.", DeprecationWarning, stacklevel=2)
        return self.attention_path

    def alive(self, adapter_name: str) -> Tensor:
        """The former name of `kept`; the next release drops it."""
        warnings.warn("alive is now called kept.", DeprecationWarning, stacklevel=2)
        return self.kept(adapter_name)

    def extra_repr(self) -> str:
        return f"{self.index}: {self.site.name}"
