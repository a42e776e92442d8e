# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What training needs of a frozen backbone: statistics that stay, and gradients that come through its checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .._compat import keeps_statistics
from ..backbones.sites import WeakModule
from .layer import E2VPTLayer


# ---------------------------------------------------------------------------------------------------------- statistics
class _StaysInEvalMode:
    """The `train` of a frozen module with statistics: whoever calls it, on this module or one around it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = WeakModule(module)
        self.asked_for = module.training

    def __call__(self, mode: bool = True) -> nn.Module:
        """Notes the mode, gives it to the parts of the module and leaves the module itself in eval mode."""
        module: nn.Module = self._module()
        type(module).train(module, mode)
        self.asked_for = module.training
        module.training = False
        return module


def freeze_statistics(model: nn.Module) -> None:
    """Lets no training step change the running statistics of a frozen backbone, of batch norms for instance.

    They would belong to the prompts that were trained with them, but are not saved with an adapter. Modules with
    statistics stay in eval mode; all others, such as dropout, have the mode that they are given. Not frozen are the
    copies that adapters train, and a norm whose own weights require a gradient. May be called again, where modules
    or adapters have been added.
    """
    trained = _trained_modules(model)
    for module in model.modules():
        if keeps_statistics(module):
            (_thaw if module in trained else _freeze)(module)


def _trained_modules(model: nn.Module) -> set[nn.Module]:
    """The copies of modules that adapters have, with their parts, and what has weights that require a gradient."""
    modules = list(model.modules())
    copies = {part for w in modules if isinstance(w, ModulesToSaveWrapper) for part in w.modules_to_save.modules()}
    return copies.union(m for m in modules if any(w is not None and w.requires_grad for w in m._parameters.values()))


def _keep_running_stats() -> None:
    """The `reset_running_stats` of a frozen norm, which torch's `update_bn` calls before it collects them anew."""


def _freeze(module: nn.Module) -> None:
    if not isinstance(module.__dict__.get("train"), _StaysInEvalMode):
        module.__dict__["train"] = _StaysInEvalMode(module)
        module.training = False
    if hasattr(module, "reset_running_stats"):
        module.__dict__["reset_running_stats"] = _keep_running_stats


def _thaw(module: nn.Module) -> None:
    if isinstance(frozen := module.__dict__.get("train"), _StaysInEvalMode):
        del module.__dict__["train"]
        module.__dict__.pop("reset_running_stats", None)
        module.training = frozen.asked_for


def thaw_statistics(model: nn.Module) -> None:
    """Undoes `freeze_statistics`: modules get the mode that they have been given last."""
    for module in model.modules():
        _thaw(module)


def _is_comparable(buffer: Tensor) -> bool:
    packed = buffer.is_quantized or (buffer.is_floating_point() and buffer.dtype.itemsize == 1)
    return not (buffer.is_meta or packed)


class FirstPass:
    """The buffers of a frozen backbone before its first forward pass in training mode, of modules that nobody knows.

    Args:
        model: the adapted model.
        ours: what belongs to adapters.
    """

    def __init__(self, model: nn.Module, ours: nn.Module) -> None:
        left_out = {*_trained_modules(model), *ours.modules()}
        self._before = [
            (path, module, name, buffer.detach().clone())
            for path, module in model.named_modules()
            if module not in left_out and not isinstance(module.__dict__.get("train"), _StaysInEvalMode)
            for name, buffer in module._buffers.items()
            if buffer is not None and _is_comparable(buffer)
        ]

    def set_back(self) -> None:
        """Sets buffers back that the pass has changed, and keeps their modules in eval mode from now on."""
        for path, module, name, before in self._before:
            after = module._buffers.get(name)
            if after is None or after.shape != before.shape:
                continue
            before = before.to(after.device)
            if bool(((after == before) | (after != after)).all()):  # NaN is what it was
                continue
            module._buffers[name] = before
            _freeze(module)
            warnings.warn(
                f"{path} ({type(module).__name__}) changes its buffer {name!r} in training mode. It belongs to the "
                "frozen backbone: its value has been set back, and the module stays in eval mode from now on.",
                stacklevel=3,
            )


# ------------------------------------------------------------------------------------------------ gradients of inputs
def requiring_gradient(value: Any) -> Any:
    """The output of a module with every tensor in it asking for a gradient."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.requires_grad_()
    if isinstance(value, tuple):
        return tuple(requiring_gradient(part) for part in value)
    if isinstance(value, ModelOutput):
        return type(value)(**{name: requiring_gradient(part) for name, part in value.items()})
    return value


class _RequireGradient:
    """Stands for a hook of transformers or PEFT that expects a tensor, where embeddings may give several."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return requiring_gradient(output)


class _EnableInputGradients:
    """The `enable_input_require_grads` of an adapted model: as transformers', for embeddings of any output."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = WeakModule(model)
        self.before = _has_input_hooks(model)

    def __call__(self) -> None:
        model = self._model()
        if _has_input_hooks(model):  # transformers would forget those that it has
            model.disable_input_require_grads()
        type(model).enable_input_require_grads(model)
        take_over_input_hooks(model)


def _has_input_hooks(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None))


def take_over_input_hooks(model: nn.Module) -> None:
    """Lets embeddings that give several tensors require a gradient, whoever asks for it, before now or later.

    transformers' `enable_input_require_grads`, which PEFT calls for a model with checkpoints, and the hook that
    programs copy from it fail there: 'tuple' object has no attribute 'requires_grad_'.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
                module._forward_hooks[key] = _RequireGradient(hook)
        if isinstance(module, PreTrainedModel) and "enable_input_require_grads" not in module.__dict__:
            module.__dict__["enable_input_require_grads"] = _EnableInputGradients(module)


def give_back_input_hooks(model: nn.Module) -> None:
    """Undoes `take_over_input_hooks`; inputs require a gradient where they did before."""
    for module in model.modules():
        enable = module.__dict__.get("enable_input_require_grads")
        if isinstance(module, PreTrainedModel) and isinstance(enable, _EnableInputGradients):
            del module.__dict__["enable_input_require_grads"]
            if _has_input_hooks(module) and not enable.before:
                module.disable_input_require_grads()
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _RequireGradient):
                module._forward_hooks[key] = hook.original


# --------------------------------------------------------------------------------------------------------- checkpoints
def modules_before(blocks: Iterable[nn.Module], model: nn.Module) -> list[nn.Module]:
    """Lists what has weights and comes before the blocks in the order of the model, such as its embeddings."""
    inner = set(blocks)
    before = []
    for module in model.modules():
        if module in inner or inner.isdisjoint(module.modules()):
            continue
        for child in module.children():
            if not inner.isdisjoint(child.modules()):
                break
            if any(True for _ in child.parameters()):
                before.append(child)
    return [module for module in before if not any(module in block.modules() for block in inner)]


def _tensors(output: Any, depth: int = 0) -> Iterator[tuple[Tensor, int]]:
    """The tensors of an output, and how deep each lies in it."""
    if isinstance(output, Tensor):
        yield output, depth
    elif isinstance(output, (dict, list, tuple)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part, depth + 1)


def _nodes(output: Any) -> Iterator[Any]:
    """The nodes of the graph behind an output."""
    waiting = [tensor.grad_fn for tensor, _ in _tensors(output)]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [further for further, _ in node.next_functions]
            yield node


def _module_of(function: Any) -> nn.Module | None:
    """The module that a checkpoint runs again: the function itself, or what it is bound to, given, or closed over."""
    if isinstance(function, nn.Module):
        return function
    if isinstance(function, partial):
        parts = [function.func, *function.args]
    elif hasattr(function, "__self__"):
        parts = [function.__self__]
    else:
        parts = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return next((module for part in parts if (module := _module_of(part)) is not None), None)


def lost_gradients(output: Any, layers: list[E2VPTLayer]) -> str | None:
    """What a backward pass from an output does not come to because of reentrant checkpoints, as part of a sentence.

    They know tensors that are given by position and those that are given back alone or in a plain tuple.

    Args:
        output: of a model in training mode.
        layers: those whose prompts are in use.
    """
    parameters: set[Tensor] = set()
    modules: set[nn.Module] = set()  # that run again on the way back, with their parts
    for node in _nodes(output):
        if hasattr(node, "variable"):
            parameters.add(node.variable)
        elif hasattr(node, "run_function"):
            module = _module_of(node.run_function)
            if module is None:
                return None
            modules.update(module.modules())
    trained = [layer for layer in layers if any(parameter.requires_grad for parameter in layer.parameters())]
    left_out = [
        layer.site.name
        for layer in trained
        if layer.site.attention not in modules and parameters.isdisjoint(layer.parameters())
    ]
    if left_out:
        return f"for the prompts of {len(left_out)} of {len(trained)} attentions (the first: {left_out[0]})"
    listed = [tensor for tensor, depth in _tensors(output) if depth > 1 and tensor.is_floating_point()]
    if trained and any(not tensor.requires_grad for tensor in listed):
        return "behind the hidden states in its output"
    return None
