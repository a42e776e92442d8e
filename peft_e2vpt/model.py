# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`E2VPTModel`: finds the self-attentions of a model and gives each its prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import eager_attention_of, owner_of
from .backbones import AttentionSite, find_attention_sites, find_heads
from .config import E2VPTConfig
from .insertion import ShallowInsertion
from .layer import E2VPTLayer


CONTAINER = "e2vpt"


class PromptLayers(nn.ModuleDict):
    """The child `e2vpt` of an adapted model: an `E2VPTLayer` per self-attention, by the number of the attention.

    Attributes:
        base_requires_grad: which parameters of the base model required a gradient before it was adapted.
        insertions: where shallow prompts enter and leave the sequence, by adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.insertions: dict[str, ShallowInsertion] = {}
        towers = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        embeddings = {module for tower in towers if (module := _embeddings_of(tower)) is not None}
        self._handles = [module.register_forward_hook(self._require_gradient) for module in embeddings]

    def _require_gradient(self, embeddings: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Lets a gradient into the first block: reentrant checkpoints give none to what is inside without it."""
        if not embeddings.training or not torch.is_grad_enabled():
            return
        layers = [layer for layer in prompt_layers(self) if not layer.disable_adapters]
        if any(getattr(layer.site.block, "gradient_checkpointing", False) for layer in layers):
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    tensor.requires_grad_()

    def detach(self) -> None:
        """Leaves the base model: its modules are as they were before."""
        for layer in prompt_layers(self):
            layer.detach()
        for insertion in self.insertions.values():
            insertion.detach()
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class PromptCount:
    """What is alive in one adapted self-attention.

    Attributes:
        index: number of the self-attention.
        name: path of the self-attention.
        num_visual_prompts: visual prompts alive.
        num_segments: segments alive in them.
        num_kv_prompts: key-value prompts.
        num_values: trained values that take part.
    """

    index: int
    name: str
    num_visual_prompts: int
    num_segments: int
    num_kv_prompts: int
    num_values: int


@dataclass(frozen=True)
class PromptSummary:
    """Prompts and trained values of one adapter, counted as in the paper: with the head, without pruned values.

    Attributes:
        layers: one `PromptCount` per adapted self-attention.
        num_prompt_values: trained prompt values that take part.
        num_head_values: trained values of the head (`modules_to_save`).
        num_backbone_values: values of the model without the adapter's, the head left out.
    """

    layers: list[PromptCount]
    num_prompt_values: int
    num_head_values: int
    num_backbone_values: int

    @property
    def num_tuned_values(self) -> int:
        """Prompt values and head values."""
        return self.num_prompt_values + self.num_head_values

    @property
    def tuned_percentage(self) -> float:
        """Tuned values as a percentage of all values of the model, prompts and head included."""
        return 100.0 * self.num_tuned_values / (self.num_tuned_values + self.num_backbone_values)

    def __str__(self) -> str:
        lines = [f"{'layer':>5}  {'prompts':>7}  {'segments':>8}  {'kv prompts':>10}  {'values':>9}  attention"]
        lines += [
            f"{layer.index:>5}  {layer.num_visual_prompts:>7}  {layer.num_segments:>8}  {layer.num_kv_prompts:>10}  "
            f"{layer.num_values:>9,}  {layer.name}"
            for layer in self.layers
        ]
        lines.append(
            f"prompts {self.num_prompt_values:,} + head {self.num_head_values:,} = {self.num_tuned_values:,} tuned "
            f"values, {self.tuned_percentage:.3f} % of the model"
        )
        return "\n".join(lines)


def _matches(name: str, patterns: list[str] | str) -> bool:
    """Whether a module path matches a regular expression as a whole, or equals or ends with one of several names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def _embeddings_of(model: PreTrainedModel) -> nn.Module | None:
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embeddings if isinstance(embeddings, nn.Module) else None


def _lies_in(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _cast_to_weight(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Feeds a float32 head on a half-precision backbone with float32."""
    dtype = next(head.parameters()).dtype
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def prompt_layers(model: nn.Module) -> list[E2VPTLayer]:
    """Lists the prompt layers of a model in the order of their attentions, whatever wraps the model."""
    layers = [module for module in model.modules() if isinstance(module, E2VPTLayer)]
    return sorted(layers, key=lambda layer: layer.index)


class E2VPTModel(BaseTuner):
    """The E2VPT tuner; `get_peft_model(model, E2VPTConfig())` makes one.

    Prompts and gates live in a child `e2vpt` of the base model, numbered by attention, so that the names in a saved
    adapter do not depend on the module paths of the model. Attention modules keep their class and path.

    Raises:
        ValueError: the model has no self-attention that can take prompts, a name given in the config is not in the
            model, a width is not divisible by the number of segments, or the mode is impossible for the backbone.
    """

    prefix = "e2vpt_"
    tuner_layer_cls = E2VPTLayer
    target_module_mapping: dict[str, list[str]] = {}
    model: Any  # the adapted model

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(model, PeftModel):
            raise ValueError(
                "The model is a PeftModel already. Add an adapter to it with model.add_adapter(name, config), or "
                "pass the plain model: model.unload()."
            )
        super().__init__(model, *args, **kwargs)

    # ------------------------------------------------------------------------------------------- finding and creating
    def _pre_injection_hook(self, model: nn.Module, config: E2VPTConfig, adapter_name: str) -> None:
        """Takes out an adapter of this name that an earlier PeftModel has left in the model."""
        self._remove_insertion(adapter_name)
        for name, module in list(model.named_modules()):
            if isinstance(module, E2VPTLayer):
                module.delete_adapter(adapter_name)
            elif isinstance(module, ModulesToSaveWrapper) and list(module.modules_to_save) == [adapter_name]:
                model.set_submodule(name, module.original_module)

    def _prepare_adapter_config(self, peft_config: E2VPTConfig, model_config: dict[str, Any]) -> E2VPTConfig:
        # numbers of attentions and paths of modules as they are before anything is changed
        self._sites = {site.name: (index, site) for index, site in enumerate(find_attention_sites(self.model))}
        self._targets = self._find_targets(peft_config)
        self._check_sites(peft_config, [self._sites[name][1] for name in self._targets])
        heads = peft_config.modules_to_save
        if heads is not None and peft_config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
            # PEFT has added the names that heads of text models have
            text_heads = {name for name in ("classifier", "score") if not hasattr(self.model, name)}
            heads = [name for name in heads if name not in text_heads] or None
        if heads is None:
            heads = find_heads(self.model, [site for _, site in self._sites.values()])
            heads = [name for name in heads if name != CONTAINER]
        self._check_modules_to_save(heads)
        peft_config.modules_to_save = heads
        return peft_config

    def _find_targets(self, config: E2VPTConfig) -> list[str]:
        """Names of the self-attentions that `config` adapts, in the order of their numbers."""
        if config.target_modules is None:
            vision = [name for name, (_, site) in self._sites.items() if site.is_vision]
            targets = vision or list(self._sites)
        else:
            targets = [name for name in self._sites if _matches(name, config.target_modules)]
            if not targets:
                raise ValueError(
                    f"target_modules={config.target_modules!r} matches none of the {len(self._sites)} "
                    f"self-attentions of {type(self.model).__name__}, which are called {next(iter(self._sites))!r} "
                    f"to {list(self._sites)[-1]!r}. Leave it at None to adapt them all."
                )
        if config.exclude_modules is not None:
            kept = [name for name in targets if not _matches(name, config.exclude_modules)]
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

    def _check_sites(self, config: E2VPTConfig, sites: list[AttentionSite]) -> None:
        first = sites[0]
        for site in sites:
            eager_attention_of(site.attention, site.name)
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
            self._check_shallow(sites)

    def _check_shallow(self, sites: list[AttentionSite]) -> None:
        model = type(self.model).__name__
        if "Backbone" in model:
            raise ValueError(f"visual_prompt_mode='shallow' is not offered for {model}, which reads inner layers.")
        for site in sites:
            if site.prefix_tokens is None or site.width != sites[0].width:
                raise ValueError(
                    f"visual_prompt_mode='shallow' puts tokens into the sequence, which {model} does not allow "
                    f"({type(site.attention).__name__} works on windows, a position bias or a padding mask): pass "
                    "visual_prompt_mode='deep'."
                )

    def _check_modules_to_save(self, names: list[str]) -> None:
        modules = [name for name, _ in self.model.named_modules()]
        parameters = [name for name, _ in self.model.named_parameters()]
        for name in names:
            adapted = [t for t in self._targets for module in modules if _lies_in(t, module) and module.endswith(name)]
            if adapted:
                raise ValueError(
                    f"modules_to_save names {name!r}, which holds the adapted self-attention {adapted[0]}: a module "
                    "is either trained in full or adapted. Leave the attention out with exclude_modules."
                )
            if any(_matches(module, [name]) for module in modules):
                continue
            if any(_matches(parameter, [name]) for parameter in parameters):
                raise ValueError(
                    f"modules_to_save names {name!r}, a single parameter of {type(self.model).__name__}; only whole "
                    "modules can be saved: name the module that holds it."
                )
            children = ", ".join(child for child, _ in self.model.named_children() if child != CONTAINER)
            raise ValueError(
                f"modules_to_save names {name!r}, which {type(self.model).__name__} does not have. Its parts are "
                f"{children}."
            )

    def _check_target_module_exists(self, peft_config: E2VPTConfig, key: str) -> Any:
        excluded = peft_config.exclude_modules
        if key in self._sites and excluded is not None and _matches(key, excluded):
            return _ExcludedModule()  # else PEFT would warn that nothing was excluded
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: E2VPTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        # modules come in the order of the model, targets vision first: the first of them may be yet to come
        layer, first = self._layer_of(current_key), self._layer_of(self._targets[0])
        shallow = peft_config.visual_prompt_mode == "shallow"
        kv_source = first if peft_config.share_kv_prompts_across_layers and layer is not first else None
        layer.update_layer(adapter_name, peft_config, not shallow or layer is first, kv_source)
        if shallow and layer is first:
            last = self._sites[self._targets[-1]][0]
            blocks = [site.block for index, site in self._sites.values() if layer.index <= index <= last]
            insertions = getattr(self.model, CONTAINER).insertions
            insertions[adapter_name] = ShallowInsertion(adapter_name, layer, blocks)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)

    def _layer_of(self, name: str) -> E2VPTLayer:
        """The prompt layer of the self-attention called `name`, made on first demand."""
        index, site = self._sites[name]
        layer = owner_of(site.attention)
        if not isinstance(layer, E2VPTLayer):
            if not hasattr(self.model, CONTAINER):
                self.model.add_module(CONTAINER, PromptLayers(self.model))
            layer = getattr(self.model, CONTAINER)[str(index)] = E2VPTLayer(site, index)
        return layer

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                head = module.modules_to_save[adapter_name]
                dtypes = {parameter.dtype for parameter in head.parameters()}
                if autocast_adapter_dtype and dtypes & {torch.float16, torch.bfloat16}:
                    head.float()
                if dtypes and _cast_to_weight not in head._forward_pre_hooks.values():
                    head.register_forward_pre_hook(_cast_to_weight)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:  # PEFT would drop it silently
            raise ValueError(
                "adapter_names, one adapter per sample, is not supported by E2VPT: run one forward per adapter, after "
                "model.set_adapter(name)."
            )
        yield

    # ------------------------------------------------------------------------------------------------------- counting
    def prompt_summary(self, adapter_name: str | None = None) -> PromptSummary:
        """Counts what is alive in an adapter, by default the active one."""
        adapter_name = adapter_name or self.active_adapters[0]
        layers: list[PromptCount] = []
        seen: set[int] = set()
        for layer in prompt_layers(self.model):
            config = layer.e2vpt_config.get(adapter_name)
            if config is None:
                continue
            tokens = segments = values = 0
            if adapter_name in layer.e2vpt_visual_prompts:
                gates = layer.e2vpt_token_gates[adapter_name]
                tokens = int((gates != 0).sum())
                segments = int(((layer.e2vpt_segment_gates[adapter_name] * gates[:, None]) != 0).sum())
                values = int(layer.alive(adapter_name).sum())
            if adapter_name in layer.e2vpt_kv_prompts:
                values += layer.e2vpt_kv_prompts[adapter_name].numel()
            layers.append(PromptCount(layer.index, layer.site.name, tokens, segments, config.num_kv_prompts, values))
        num_head = 0
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                seen.update(id(parameter) for parameter in module.parameters())
                if adapter_name in module.modules_to_save:
                    num_head += sum(p.numel() for p in module.modules_to_save[adapter_name].parameters())
            elif isinstance(module, PromptLayers):
                seen.update(id(parameter) for parameter in module.parameters())
        num_backbone = sum(parameter.numel() for parameter in self.model.parameters() if id(parameter) not in seen)
        return PromptSummary(layers, sum(layer.num_values for layer in layers), num_head, num_backbone)

    def print_prompt_summary(self, adapter_name: str | None = None) -> None:
        """Prints, per layer, the prompts and segments alive and their values, and the tuned percentage."""
        print(self.prompt_summary(adapter_name))

    # ------------------------------------------------------------------------------------------------ giving back
    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            "E2VPT adds key and value rows to every attention, which no plain weights can express, so it cannot be "
            "merged into them. Keep the adapter, or use model.unload() for the base model without it."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        self._restore_base_model()
        model: nn.Module = self.model
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; with the last one, the base model is what it was before."""
        super().delete_adapter(adapter_name)
        self._remove_insertion(adapter_name)
        if not self.peft_config:
            self._restore_base_model()

    def _remove_insertion(self, adapter_name: str) -> None:
        container = getattr(self.model, CONTAINER, None)
        if container is not None and adapter_name in container.insertions:
            container.insertions.pop(adapter_name).detach()

    def _restore_base_model(self) -> None:
        container = getattr(self.model, CONTAINER, None)
        if container is None:  # the last adapter has been deleted before
            return
        container.detach()
        if getattr(self.model, "_require_grads_hooks", None):
            self.model.disable_input_require_grads()
        delattr(self.model, CONTAINER)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                self.model.set_submodule(name, module.original_module)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = container.base_requires_grad[name]
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config

    # ------------------------------------------------------------------------------------------------------- on disk
    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: E2VPTConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's tensors; of pruned visual prompts only the surviving values, a tensor (values,)."""
        tensors: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        layers = {str(layer.index): layer for layer in prompt_layers(model)}
        for key, tensor in tensors.items():
            if f".e2vpt_visual_prompts.{adapter_name}" in key:
                alive = layers[key.split(".")[-3]].alive(adapter_name)
                if not alive.all():
                    tensors[key] = tensor[alive.to(tensor.device)]
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if ".e2vpt_" in key:
            return key.removesuffix(f".{adapter_name}")
        return str(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: E2VPTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Checks the tensors of a file against the model and spreads pruned visual prompts to full shape.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape; the message names it.
        """
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        values = model.state_dict()
        for name, tensor in remapped.items():
            if f".modules_to_save.{adapter_name}." in name and name in values and tensor.shape != values[name].shape:
                raise ValueError(
                    f"The adapter's tensor {name.replace(f'.modules_to_save.{adapter_name}', '')} has shape "
                    f"{tuple(tensor.shape)}, but the model needs {tuple(values[name].shape)}: load the base model "
                    f"with the number of classes of the adapter, num_labels={len(tensor)}."
                )
        live = {
            name: tensor for name, tensor in values.items() if ".e2vpt_" in name and name.endswith(f".{adapter_name}")
        }
        given = {name: tensor for name, tensor in remapped.items() if ".e2vpt_" in name}
        missing, unknown = sorted(live.keys() - given.keys()), sorted(given.keys() - live.keys())
        if missing or unknown:
            cls._explain_names(missing, unknown, adapter_name)
        for name, tensor in given.items():
            if name.endswith(f".e2vpt_visual_prompts.{adapter_name}") and tensor.dim() == 1:
                remapped[name] = cls._spread(name, tensor, live[name], given, config, adapter_name)
            elif tensor.shape != live[name].shape:
                raise ValueError(
                    f"The adapter's tensor {name} has shape {tuple(tensor.shape)}, but the model needs "
                    f"{tuple(live[name].shape)}: was it trained on another backbone or with another E2VPTConfig?"
                )
        return remapped

    @staticmethod
    def _explain_names(missing: list[str], unknown: list[str], adapter_name: str) -> None:
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

    @staticmethod
    def _spread(
        name: str,
        values: Tensor,
        live: Tensor,
        given: dict[str, Tensor],
        config: E2VPTConfig,
        adapter_name: str,
    ) -> Tensor:
        from .layer import expand_segments

        token = given[name.replace("visual_prompts", "token_gates")]
        segment = given[name.replace("visual_prompts", "segment_gates")]
        alive = expand_segments(segment * token[:, None], live.shape[-1], config.segment_layout) != 0
        if alive.shape != live.shape or int(alive.sum()) != values.numel():
            raise ValueError(
                f"The adapter's tensor {name} holds {values.numel()} values, but its gates keep {int(alive.sum())}: "
                "the file is damaged."
            )
        prompts = torch.zeros(live.shape, dtype=values.dtype, device=values.device)
        prompts[alive.to(values.device)] = values
        return prompts
