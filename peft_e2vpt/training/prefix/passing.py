# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`FrozenPrefix`: a model that takes cached hidden states in place of images, and images as before.

Whether a batch is one of hidden states is told by its shape, and lies with the thread and the forward pass: threads
do not see each other's passes, and nothing is left when a pass fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..._compat import forward_slot, owners_of_hooks, remove_hooks_of
from ...backbones.sites import WeakModule
from ...tuner.mixed_batch import RunningPasses
from .outputs import NoCut, Returned, leaves_of, with_leaves
from .trace import Cut, Reached
from .weights import checksum_of, versions_of, what_changes


class _Pass:
    """A forward pass of a model with a frozen prefix; without hidden states it runs as if there were no cache."""

    def __init__(self, prefix: FrozenPrefix, hidden: Tensor | None) -> None:
        self.prefix, self.hidden = prefix, hidden
        self.calls: dict[int, int] = {}


class _Passes(threading.local):
    def __init__(self) -> None:
        self.running: list[_Pass] = []


_passes, _running = _Passes(), RunningPasses()


def _hidden_states_for(prefix: FrozenPrefix) -> _Pass | None:
    """The pass of this thread, if it is one of the model of this prefix with hidden states."""
    current = _passes.running[-1] if _passes.running else None
    return current if current is not None and current.prefix is prefix and current.hidden is not None else None


class _Skipping:
    """The `forward` of a module of the prefix: in a pass with hidden states, its first calls compute nothing."""

    def __init__(self, prefix: FrozenPrefix, module: nn.Module, returned: list[Returned], before: Any) -> None:
        self._prefix = prefix
        self._module = WeakModule(module)
        self._returned = returned
        self.before = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _running.any:
            skipped = self._skip()
            if skipped is not None:
                return skipped[0]
        if self.before is not None:
            return self.before(*args, **kwargs)
        module = self._module()
        return type(module).forward(module, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _skip(self) -> tuple[Any] | None:
        current = _hidden_states_for(self._prefix)
        if current is None or current.hidden is None:
            return None
        number = current.calls.get(id(self), 0)
        current.calls[id(self)] = number + 1
        return (self._returned[number].of_batch(current.hidden),) if number < len(self._returned) else None


class FrozenPrefix:
    """Lets a model begin behind its frozen prefix; hooks on the model hold it.

    Args:
        model: the innermost model that takes images.
        name: of the argument with the images, and `position` among the arguments.
        cut: where the prefix ends.
        raw: one batch of images, for shape and type.

    Attributes:
        shape: of the hidden states of one image; `None` before the first are known.
        raw_shape: of one image.
        checksum: of the weights that the hidden states were computed with.
    """

    def __init__(self, model: nn.Module, name: str, position: int, cut: Cut, raw: Tensor) -> None:
        self.name = name
        self.raw_shape = tuple(raw.shape[1:])
        self.shape: tuple[int, ...] | None = None
        self._position = position
        self._raw_dtype = raw.dtype
        self._model = WeakModule(model)
        self._at_input, self._number, self._leaf = cut.at_input, cut.number, cut.leaf
        self._module = WeakModule(cut.module)
        self._skipped = [WeakModule(module) for module in cut.skipped]
        self._returned = list(cut.skipped.values())
        self._versions: dict[Tensor, int] = {}
        self.checksum = ""
        model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)
        if cut.at_input:
            cut.module.register_forward_pre_hook(self._give_input, with_kwargs=True)
        for module, returned in cut.skipped.items():
            slot = forward_slot(module)
            module.__dict__[slot] = _Skipping(self, module, returned, module.__dict__.get(slot))

    @property
    def skipped(self) -> list[nn.Module]:
        """The modules that do not run in a pass with hidden states, without their parts."""
        return [reference() for reference in self._skipped]

    @property
    def last_module(self) -> str:
        """The path of the module whose output, or input, is cached."""
        return self._path_of(self._module())

    def _path_of(self, module: nn.Module) -> str:
        model: nn.Module = self._model()
        paths: dict[nn.Module, str] = {part: path for path, part in model.named_modules()}
        return paths[module]

    def remove(self) -> None:
        """Makes the model take images alone, as before."""
        remove_hooks_of(self._model(), self)
        remove_hooks_of(self._module(), self)
        for module in self.skipped:
            for slot in ("forward", "_old_forward"):
                forward = module.__dict__.get(slot)
                if isinstance(forward, _Skipping):
                    if forward.before is None and slot == "forward":
                        del module.__dict__[slot]
                    else:
                        module.__dict__[slot] = forward.before or type(module).forward.__get__(module)

    # ----------------------------------------------------------------------------------------------------- in a pass
    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        by_name = self.name in kwargs
        given = kwargs[self.name] if by_name else args[self._position] if len(args) > self._position else None
        if isinstance(given, Tensor) and self.shape is not None and tuple(given.shape[1:]) == self.shape:
            images = self._begin(model, given)
            if by_name:
                return args, {**kwargs, self.name: images}
            return (*args[: self._position], images, *args[self._position + 1 :]), kwargs
        if _running.any:
            self._push(None)
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """Begins a pass with hidden states, and gives what the model sees in place of images."""
        self._push(self._requiring_gradient(model, hidden))
        if model is not self._model():
            raise RuntimeError(
                "A model that DataParallel has copied to several GPUs takes images, not the hidden states that "
                "cache_frozen_prefix has cached: start one process a GPU (torchrun), or train on the images."
            )
        reason = self.why_stale(trains=torch.is_grad_enabled())
        if reason is not None:
            raise RuntimeError(
                f"The hidden states that cache_frozen_prefix has cached are no longer those of the model: {reason}. "
                "Call uncache_frozen_prefix(model), and cache anew or train on the images."
            )
        nothing = torch.full((), torch.nan, dtype=self._raw_dtype, device=hidden.device)
        return nothing.expand(len(hidden), *self.raw_shape)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _push(self, hidden: Tensor | None) -> None:
        _passes.running.append(_Pass(self, hidden))
        _running.add(hidden is not None)

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        if _running.any:
            self._pop()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _pop(self) -> None:
        if _passes.running and _passes.running[-1].prefix is self:
            _running.add(-(_passes.running.pop().hidden is not None))

    def _requiring_gradient(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """Reentrant checkpoints pass no gradient to what is inside a block without one that enters it."""
        if self._at_input or not (model.training and torch.is_grad_enabled() and hidden.is_floating_point()):
            return hidden
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        return hidden.detach().requires_grad_() if checkpointing else hidden

    def _give_input(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._given_input(args, kwargs) if _running.any else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _given_input(self, args: Any, kwargs: Any) -> Any:
        current = _hidden_states_for(self)
        if current is None:
            return None
        leaves = leaves_of((args, kwargs))
        leaves[self._leaf] = current.hidden
        return with_leaves((args, kwargs), iter(leaves))

    # ------------------------------------------------------------------------------------------------ what it computes
    def hidden_states(self, run: Callable[[], Any]) -> Tensor:
        """Runs the prefix alone.

        Args:
            run: runs the whole model on images.

        Returns:
            What enters the first module that trains, `(B, ...)`.

        Raises:
            NoCut: something else than hidden states depends on the images, or on what else the model is given.
        """
        counts: dict[nn.Module, int] = dict.fromkeys(self.skipped, 0)
        returned = dict(zip(self.skipped, self._returned, strict=True))
        last = self._module()

        def left(module: nn.Module, args: Any, output: Any) -> None:
            number = counts[module]
            counts[module] += 1
            if number < len(returned[module]) and not returned[module][number].stands_for(output):
                raise NoCut(f"{self._path_of(module)} gives more than hidden states that depends on the image")
            if not self._at_input and module is last and number == self._number:
                raise Reached(leaves_of(output)[self._leaf])

        def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
            raise Reached(leaves_of((args, kwargs))[self._leaf])

        handles = [module.register_forward_hook(left) for module in counts]
        if self._at_input:
            handles.append(last.register_forward_pre_hook(entered, with_kwargs=True))
        try:
            run()
        except Reached as reached:
            hidden: Tensor = reached.value
            return hidden.detach()
        finally:
            for handle in handles:
                handle.remove()
        raise RuntimeError(f"{self.last_module} did not run, so its output cannot be cached.")

    def note_weights(self) -> None:
        """Notes the weights that the cached hidden states were computed with."""
        self.checksum = checksum_of(self.skipped)
        self._versions = versions_of(self.skipped)

    def why_stale(self, trains: bool = True) -> str | None:
        """Why the prefix does not give what was cached, if it does not: other weights, training, an adapter in it."""
        reason = what_changes(self._model(), self.skipped, trains)
        versions = versions_of(self.skipped)
        if reason is not None or not self.checksum or versions == self._versions:
            return reason
        if checksum_of(self.skipped) != self.checksum:
            return "its weights are others now"
        self._versions = versions
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_versions": {}}  # parameters of a copy count their changes anew


def prefix_of(model: nn.Module) -> FrozenPrefix | None:
    """The frozen prefix of the innermost model, where it has one."""
    found = owners_of_hooks(model, FrozenPrefix)
    return found[0] if found else None
