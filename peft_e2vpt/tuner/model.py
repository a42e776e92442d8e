# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`E2VPTModel`: finds the self-attentions of a model and gives each its prompts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .._compat import ExcludedModule, loaded_from
from ..backbones.heads import has_input_embeddings
from ..backbones.sites import find_attention_sites
from .config import E2VPTConfig
from .heads import ClassesOfAdapters, unwrap_unused, wrap
from .layer import E2VPTLayer
from .mixed_batch import BASE, SWITCHING, active_adapters_kept, check_adapter_names, one_adapter_per_sample
from .prompt_layers import CONTAINER, PromptLayers, restore_base_model, tag
from .shallow import ShallowInsertion
from .state_dict import TunerOnDisk, check_file, shapes_in_file, values_of_heads
from .targets import (
    cast_heads,
    check_adapter_name,
    check_gradients,
    check_heads,
    check_sites,
    choose_heads,
    find_targets,
    matches,
    own_copy,
)


if TYPE_CHECKING:
    from .summary import PromptSummary


class E2VPTModel(TunerOnDisk):
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
        adapters: dict[str, E2VPTConfig] = getattr(model, "peft_config", {})  # of an earlier PeftModel
        before = dict(adapters)
        try:
            super().__init__(model, *args, **kwargs)
        except Exception:
            adapters.clear()
            adapters.update(before)
            raise

    # ------------------------------------------------------------------------------------------- finding and creating
    def _take_out(self, model: nn.Module, adapter_name: str) -> None:
        """Takes out an adapter of this name that an earlier PeftModel has left in the model."""
        self._remove_insertion(adapter_name)
        for module in model.modules():
            if isinstance(module, E2VPTLayer):
                module.delete_adapter(adapter_name)
            elif isinstance(module, ModulesToSaveWrapper):
                module.delete_adapter(adapter_name, None)
        unwrap_unused(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter with a copy of its config, which says what was found; the user's stays as it is."""
        check_adapter_name(adapter_name)
        config = own_copy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        self._choose(config)
        self._check_file(config)
        self._take_out(model, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        active = adapter_name in self.active_adapters
        wrap(model, self._heads, adapter_name, active, config.inference_mode)
        self._container.prepare_backbone()
        config.modules_to_save = self._heads
        if active and len(self.peft_config) > 1:  # those that another PeftModel has left in the model
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_tied_modules(self, model: nn.Module, peft_config: E2VPTConfig) -> None:
        """Lets PEFT warn of embeddings that are trained though other weights are tied to them, where there are any."""
        if has_input_embeddings(model):
            super()._check_tied_modules(model, peft_config)

    def _choose(self, config: E2VPTConfig) -> None:
        """Numbers of attentions and paths of modules, as they are before anything is changed."""
        sites = {site.name: site for site in find_attention_sites(self.model)}
        self._sites = {name: (index, site) for index, (name, site) in enumerate(sites.items())}
        self._targets = find_targets(self.model, config, sites)
        check_sites(self.model, config, [sites[name] for name in self._targets])
        self._heads = choose_heads(self.model, list(sites.values()), config.modules_to_save)
        check_heads(self.model, self._heads, self._targets)
        if not config.inference_mode:
            check_gradients(self.model)

    def _check_file(self, config: E2VPTConfig) -> None:
        """Checks the file of an adapter that is being loaded, while the model is still as it was."""
        origin = loaded_from()
        if origin is None or config.companion is None:
            return
        check_file(
            config.companion.tensors(origin),
            self.model,
            config,
            shapes_in_file(config, [self._sites[name] for name in self._targets]),
            values_of_heads(self.model, self._heads),
            len(self.peft_config) > 1 and not origin.by_transformers,
            origin.by_transformers,
        )

    def _prepare_adapter_config(self, peft_config: E2VPTConfig, model_config: dict[str, Any]) -> E2VPTConfig:
        peft_config.modules_to_save = None  # PEFT would match the endings of paths: `inject_adapter` wraps them
        if peft_config.companion is not None:
            peft_config.companion.bind(peft_config, self.model)
        tag(self.model)
        return peft_config

    def _check_target_module_exists(self, peft_config: E2VPTConfig, key: str) -> Any:
        excluded = peft_config.exclude_modules
        if key in self._sites and excluded is not None and matches(key, excluded):
            return ExcludedModule()  # else PEFT would warn that nothing was excluded
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
            self._container.insertions[adapter_name] = ShallowInsertion(adapter_name, layer, blocks)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)

    def _layer_of(self, name: str) -> E2VPTLayer:
        """The prompt layer of the self-attention called `name`, made on first demand."""
        if not hasattr(self.model, CONTAINER):
            sites = [site for _, site in self._sites.values()]
            self.model.add_module(CONTAINER, PromptLayers(self.model, sites))
        return self._container.layer_of(*self._sites[name])

    @property
    def _container(self) -> PromptLayers:
        container: PromptLayers = getattr(self.model, CONTAINER)
        return container

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        cast_heads(self.model, adapter_name, autocast_adapter_dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None and (self.training or torch.compiler.is_compiling()):
            yield  # checkpoints run again after the pass, and compiled code notices what is active
            return
        layers = self._container.layers()
        if adapter_names is None or layers[0].disable_adapters:
            with active_adapters_kept(layers):
                yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        check_adapter_names(adapter_names, self.peft_config)
        adapters = set(adapter_names) - {BASE}
        self._refuse_shallow(adapters, "be one of several in a batch")
        configs = {name: self.peft_config[name] for name in adapters}
        with one_adapter_per_sample(self.model, adapter_names):
            yield
        gone = sorted(name for name, config in configs.items() if self.peft_config.get(name) is not config)
        if gone:
            raise RuntimeError(
                f"{', '.join(gone)} was deleted or replaced while a batch ran with it, so its answers are dropped: "
                "run the batch again."
            )

    def _refuse_shallow(self, adapter_names: Iterable[str], purpose: str) -> None:
        for name in adapter_names:
            if self.peft_config[name].visual_prompt_mode == "shallow":
                raise ValueError(
                    f"The adapter {name!r} has visual_prompt_mode='shallow': its prompts are tokens of the sequence, "
                    f"not rows of each attention, so it cannot {purpose}. Only adapters in 'deep' mode can."
                )

    # ------------------------------------------------------------------------------------------------------ activating
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter the active one, and the config of the model name the classes of that adapter."""
        with SWITCHING:
            super().set_adapter(adapter_name, inference_mode)
            self._show_classes()

    def enable_adapter_layers(self) -> None:
        """Switches adapters on again."""
        with SWITCHING:
            super().enable_adapter_layers()
            self._show_classes()

    def disable_adapter_layers(self) -> None:
        """Switches adapters off: the model, with the classes in its config, is the base model."""
        with SWITCHING:
            super().disable_adapter_layers()
            self._classes.show(self.model, None)

    @property
    def _classes(self) -> ClassesOfAdapters:
        return self._container.classes

    def _show_classes(self) -> None:
        active = self.active_adapters
        self._classes.show(self.model, active[0] if active else None)

    def train(self, mode: bool = True) -> E2VPTModel:
        """Sets the mode; an adapter that has been trained is no longer one that waits for its values."""
        if mode:
            for config in self.peft_config.values():
                config.waits_for_values = False
            if not any(parameter.requires_grad for parameter in self.model.parameters()):
                warnings.warn(
                    f"The model is in training mode, but the adapter {self.active_adapters[0]!r} is frozen, so there "
                    "is nothing to train: load it with is_trainable=True, as in peft_e2vpt.load(..., "
                    "is_trainable=True) or PeftModel.from_pretrained(..., is_trainable=True).",
                    stacklevel=2,
                )
        super().train(mode)
        return self

    # ------------------------------------------------------------------------------------------------------- counting
    def prompt_summary(self, adapter_name: str | None = None) -> PromptSummary:
        """Counts what is kept of an adapter, by default the active one.

        Raises:
            ValueError: the adapter does not exist.
        """
        from .summary import summarise  # when somebody asks

        # none is active where the last active one was deleted
        adapter_name = adapter_name or next(iter((*self.active_adapters, *self.peft_config)))
        self._check_names([adapter_name])
        return summarise(self.model, adapter_name)

    def print_prompt_summary(self, adapter_name: str | None = None) -> None:
        """Prints the prompts, segments and trained parameters kept in every layer, and the tuned percentage."""
        print(self.prompt_summary(adapter_name))

    # ------------------------------------------------------------------------------------- merging and combining rows
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Turns the rows of adapters into constants: in eval mode no norm and no projection runs for prompts.

        The model gives the same outputs as before and stays a PeftModel; which adapter is active does not change.
        No gradient reaches the prompts in eval mode. Constants are not saved. `unmerge_adapter` undoes it, and so
        does, with PEFT's warning, adding or activating an adapter.

        Constants follow the prompts and gates of the adapter, whoever writes them: an optimizer, a pruning, a state
        dict, an average of models. They are computed anew in the next forward pass, and for one that is compiled or
        exported by the next `train()` or `eval()`. What torch does not count, as what is written through `.data`, is
        noticed where training mode ends. A copy of the model computes its own. Nothing else is noticed: call
        `unmerge_adapter` and `merge_adapter` after writing in eval mode into the norms and projections that prompts
        come through, and after switching a LoRA on these projections on or off.

        Args:
            adapter_names: adapters in deep mode; by default the active ones.
            safe_merge: whether to check the rows for infinite values and NaNs.

        Raises:
            ValueError: an adapter does not exist, is in shallow mode, or has rows that are not finite.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if not isinstance(names, str):  # PEFT says what is wrong with a string
            self._check_names(names)
            self._refuse_shallow(names, "be merged")
        super().merge_adapter(adapter_names, safe_merge)

    def _check_names(self, adapter_names: list[str]) -> None:
        for name in adapter_names:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} does not exist; the model has {', '.join(self.peft_config)}.")

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Adds an adapter whose rows are weighted sums of the rows of others.

        In every attention, row k of the new adapter is `K_k = sum_i w_i K_k^(i)`, `V_k = sum_i w_i V_k^(i)`, with the
        key and value rows of adapter i, those of its visual prompts first and its key-value prompts after them. The
        sum is exact in the rows; prompts themselves cannot be summed, because a norm stands between them and their
        rows. So the new adapter has key-value prompts only, apart for keys and values. Its heads are the same sums of
        the heads, `W = sum_i w_i W^(i)`. Row is added to row by its number, so this is for adapters that started from
        the same prompts. The new adapter is not made the active one.

        Args:
            adapters: names of adapters in deep mode.
            weights: w, one per adapter, of any sign.
            adapter_name: name of the new adapter.

        Raises:
            ValueError: a name or number of weights is wrong, an adapter is in shallow mode, or the adapters differ in
                the attentions they adapt, their numbers of rows, or their heads.
        """
        from .weighted import check_weights, combine, combined_config  # few models need it

        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        check_weights(adapters, weights)
        self._check_names(adapters)
        self._refuse_shallow(adapters, "be combined with others")
        config = combined_config(self.model, [self.peft_config[name] for name in adapters], adapters)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        self._cast_adapter_dtype(adapter_name)
        combine(self.model, adapters, weights, adapter_name)
        self._classes.share(self.model, adapters[0], adapter_name)

    # ------------------------------------------------------------------------------------------------ giving back
    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            raise NotImplementedError(
                "E2VPT adds key and value rows to every attention, which no plain weights can express, so it cannot "
                "be merged into them. model.merge_adapter() turns the rows into constants and keeps the PeftModel; "
                "model.unload() gives the base model without the adapter."
            )
        restore_base_model(self.model)
        model: nn.Module = self.model
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; with the last one, the base model is what it was before."""
        with SWITCHING:
            super().delete_adapter(adapter_name)
        self._remove_insertion(adapter_name)
        unwrap_unused(self.model)
        self._classes.remove(self.model, adapter_name)
        self._show_classes()
        if not self.peft_config:
            restore_base_model(self.model)

    def _remove_insertion(self, adapter_name: str) -> None:
        container = getattr(self.model, CONTAINER, None)
        if container is not None and adapter_name in container.insertions:
            container.insertions.pop(adapter_name).detach()
