# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`PromptLayers`: where an adapted model keeps the prompt layers of its self-attentions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat import bring_back, device_and_dtype
from ..attention.rows import as_added
from ..backbones.sites import AttentionSite, WeakModule, towers_that_add_masks
from .frozen import (
    FirstPass,
    freeze_statistics,
    give_back_input_hooks,
    lost_gradients,
    modules_before,
    requiring_gradient,
    take_over_input_hooks,
    thaw_statistics,
)
from .heads import ClassesOfAdapters, OwnerOfHooks, unwrap, wrappers
from .layer import E2VPTLayer
from .shallow import ShallowInsertion


CONTAINER = "e2vpt"
TAGS = ("peft", "e2vpt", "visual-prompt-tuning")  # of an adapted model


def _refresh_constants_after_load(container: PromptLayers, incompatible_keys: Any) -> None:
    for layer in prompt_layers(container):  # now that all have their prompts: layers may share them
        layer.refresh_merged_rows()


class PromptLayers(OwnerOfHooks, nn.ModuleDict):
    """The child `e2vpt` of an adapted model: an `E2VPTLayer` per self-attention, by the number of the attention.

    Args:
        model: the base model.
        sites: its self-attentions.

    Attributes:
        base_requires_grad: which parameters of the base model required a gradient before it was adapted.
        insertions: where shallow prompts enter and leave the sequence, by adapter.
        classes: the classes of adapters that have their own.
    """

    when_training_begins: ClassVar[Callable[[], None] | None] = None  # set where the whole package is imported

    def __init__(self, model: nn.Module, sites: list[AttentionSite]) -> None:
        super().__init__()
        self.base_requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.insertions: dict[str, ShallowInsertion] = {}
        self.classes = ClassesOfAdapters()
        self.register_load_state_dict_post_hook(_refresh_constants_after_load)  # type: ignore[no-untyped-call]
        before = modules_before([site.block for site in sites], model)
        self._handles = [module.register_forward_hook(self._require_gradient) for module in before]
        self._handles += [
            tower.register_forward_pre_hook(self._add_mask_as_scores, with_kwargs=True)
            for tower in towers_that_add_masks(model, sites)
        ]
        checkpointing = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._checkpointing = [WeakModule(module) for module in checkpointing]
        self._handles.append(model.register_forward_pre_hook(self._begin_pass))
        self._handles.append(model.register_forward_hook(self._end_pass))
        self._first_pass: FirstPass | None = None
        self._has_trained = False
        self._checked: Any = None  # the checkpoint function with which gradients have been looked at
        self._model = WeakModule(model)
        take_over_input_hooks(model)

    def layers(self) -> list[E2VPTLayer]:
        """All prompt layers, in the order in which they were made; another thread may be making one."""
        return [layer for layer in tuple(self.values()) if isinstance(layer, E2VPTLayer)]

    def layer_of(self, index: int, site: AttentionSite) -> E2VPTLayer:
        """The prompt layer of a self-attention, made on first demand."""
        if str(index) not in self:
            self[str(index)] = E2VPTLayer(site, index)
        layer = self[str(index)]
        assert isinstance(layer, E2VPTLayer)
        return layer

    def train(self, mode: bool = True) -> PromptLayers:
        """Sets the mode, after the rest of the model: what has come into it meanwhile is frozen too."""
        if mode:
            self.prepare_backbone()
        super().train(mode)
        return self

    def prepare_backbone(self) -> None:
        """Freezes the statistics of the base model, and lets its embeddings require gradients in any order."""
        freeze_statistics(self._model())
        take_over_input_hooks(self._model())

    def _begin_pass(self, model: nn.Module, args: Any) -> None:
        """Takes prompts back that Accelerate has offloaded with the base model, where nothing would load them."""
        if torch.compiler.is_compiling():
            return
        if any(layer.is_offloaded for layer in self.layers()):
            bring_back(self)
        if self.training and not self._has_trained:
            self._has_trained, self._first_pass = True, FirstPass(model, self)
            notify = type(self).when_training_begins
            if notify is not None:
                notify()

    def _end_pass(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._first_pass is not None:
            first, self._first_pass = self._first_pass, None
            first.set_back()
        if self.training and self._is_trained_with_checkpoints():
            self._check_that_gradients_arrive(model, output)

    def _checkpoint_function(self) -> Any:
        """What runs the blocks of the model while it saves activations; `None` where it does not."""
        for reference in self._checkpointing:
            module = reference()
            if module.gradient_checkpointing:
                return getattr(module, "_gradient_checkpointing_func", True)
        return None

    def _is_trained_with_checkpoints(self) -> bool:
        if not torch.is_grad_enabled() or self._checkpoint_function() is None:
            return False
        return any(not layer.disable_adapters for layer in self.layers())

    def _require_gradient(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Lets a gradient into the first block: reentrant checkpoints give none to what is inside without it."""
        if (module.training or self.training) and self._is_trained_with_checkpoints():
            return requiring_gradient(output)
        return None

    def _check_that_gradients_arrive(self, model: nn.Module, output: Any) -> None:
        """Warns once where reentrant checkpoints of the model pass no gradient on."""
        function = self._checkpoint_function()
        if function is self._checked:
            return
        self._checked = function
        lost = lost_gradients(output, self.layers())
        if lost is not None:
            warnings.warn(
                f"Reentrant activation checkpoints of {type(model).__name__} lose the gradients {lost}, so that "
                "prompts do not learn as they should. Set use_reentrant=False: gradient_checkpointing_kwargs={"
                '"use_reentrant": False}.',
                stacklevel=2,
            )

    def _add_mask_as_scores(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Lets a mask shift no score that it shows: a boolean one added to a position bias is 1 there, and 0 for rows.

        transformers makes one of its own accord while it exports a model.
        """
        if all(layer.disable_adapters for layer in self.layers()):
            return None
        mask = kwargs.get("attention_mask")
        if mask is None:
            device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)  # adds 0 to numbers of any type
        elif mask.dim() == 2 or not mask.is_floating_point():
            dtype = device_and_dtype(tower)[1] or torch.get_default_dtype()
            mask = as_added(mask.bool()[:, None, None] if mask.dim() == 2 else mask.bool(), dtype)
        return args, {**kwargs, "attention_mask": mask}

    def detach(self) -> None:
        """Leaves the base model: its modules are as they were before."""
        for layer in prompt_layers(self):
            layer.detach()
        for insertion in self.insertions.values():
            insertion.detach()
        for handle in self._handles:
            handle.remove()
        thaw_statistics(self._model())
        give_back_input_hooks(self._model())


def adapted_model(model: nn.Module) -> nn.Module:
    """The adapted model inside of what wraps it.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(dict(module.named_children()).get(CONTAINER), PromptLayers):
            return module
    raise ValueError(f"{type(model).__name__} has no E2VPT adapter.")


def prompt_layers(model: nn.Module) -> list[E2VPTLayer]:
    """Lists the prompt layers of a model in the order of their attentions, whatever wraps the model."""
    layers = [module for module in model.modules() if isinstance(module, E2VPTLayer)]
    return sorted(layers, key=lambda layer: layer.index)


def visual_prompt_layers(model: nn.Module, adapter_name: str | None = None) -> tuple[str, list[E2VPTLayer]]:
    """Returns the name of the adapter, by default the active one, and the layers with visual prompts of it.

    Raises:
        ValueError: the model has no E2VPT adapter, or none of this name, or the adapter has no visual prompts.
    """
    layers = prompt_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no E2VPT adapter: wrap it with get_peft_model(model, E2VPTConfig()) first."
        )
    present = dict.fromkeys(name for layer in layers for name in layer.e2vpt_config)
    # none is active where the last active one was deleted
    adapter_name = adapter_name or next(iter((*layers[0].active_adapters, *present)))
    if adapter_name not in present:
        raise ValueError(f"Adapter {adapter_name} does not exist; the model has {', '.join(present)}.")
    prompted = [layer for layer in layers if adapter_name in layer.e2vpt_visual_prompts]
    if not prompted:
        raise ValueError(
            f"The adapter {adapter_name!r} has no visual prompts to score or prune: it needs num_visual_prompts of at "
            "least 1."
        )
    return adapter_name, prompted


def active_prompt_layers(model: nn.Module, adapter_name: str | None = None) -> tuple[str, list[E2VPTLayer]]:
    """The same as `visual_prompt_layers`, of an adapter that takes part in the forward pass, and alone.

    Raises:
        ValueError: as there, or the adapter is switched off, or others are active too.
    """
    adapter_name, layers = visual_prompt_layers(model, adapter_name)
    active = layers[0].active_adapters
    if len(active) > 1 and not layers[0].disable_adapters:
        raise ValueError(
            f"Several adapters are active ({', '.join(active)}), and prompts are scored and pruned of one alone: call "
            f"model.set_adapter({adapter_name!r}) first."
        )
    if layers[0].disable_adapters or layers[0].active_adapters != [adapter_name]:
        raise ValueError(
            f"The adapter {adapter_name!r} is not the active one: call model.set_adapter({adapter_name!r}) first."
        )
    return adapter_name, layers


def attention_configs(layers: Iterable[E2VPTLayer]) -> list[Any]:
    """The configs that tell the attention implementation of layers; without those that ask none."""
    return [config for layer in layers if (config := layer.attention_config) is not None]


def tag(model: nn.Module) -> None:
    """Gives a model the tags of E2VPT; a Trainer's card has no others."""
    if isinstance(model, PreTrainedModel):
        model.add_model_tags(list(TAGS))


def _untag(model: nn.Module) -> None:
    if isinstance(model, PreTrainedModel):
        others = [name for name in model.model_tags or [] if name not in TAGS]
        if others:
            model.model_tags = others
        elif "model_tags" in vars(model):
            del model.model_tags  # the class has None


def restore_base_model(model: Any) -> None:
    """Makes an adapted model what it was before its first adapter; without effect where that has been done."""
    container = getattr(model, CONTAINER, None)
    if container is None:
        return
    container.detach()
    container.classes.show(model, None)
    delattr(model, CONTAINER)
    _untag(model)
    for _, wrapper in list(wrappers(model)):
        unwrap(model, wrapper)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = container.base_requires_grad[name]
    if hasattr(model, "peft_config"):
        del model.peft_config
