# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Where the frozen prefix of a model ends: the modules that it calls before the first one that trains.

The order of calls tells it, not the architecture. What stands on the call stack when the first trained module is
entered cannot be skipped; what was called by these modules before, and has returned, can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from ...tuner.layer import E2VPTLayer
from ...tuner.prompt_layers import PromptLayers
from .outputs import NoCut, Returned


class Reached(Exception):  # noqa: N818  (it ends a pass that has done what it was for)
    """Ends a forward pass where the prefix ends."""

    def __init__(self, value: Any) -> None:
        super().__init__("A forward pass was ended where the frozen prefix of the model ends.")
        self.value = value


class Call:
    """One call of a module in a forward pass, and the call that made it."""

    def __init__(self, module: nn.Module, parent: Call | None, order: int) -> None:
        self.module, self.parent, self.order = module, parent, order
        self.output: Any = None

    def stack(self) -> list[Call]:
        """The calls that were running when this one began, the outermost first, and itself."""
        return [*(self.parent.stack() if self.parent else ()), self]


@contextmanager
def _watched(model: nn.Module, entered: Callable[[Call, Any], None], keeps: set[int]) -> Iterator[list[Call]]:
    calls: list[Call] = []
    running: list[Call] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(module, running[-1] if running else None, len(calls))
        calls.append(call)
        running.append(call)
        entered(call, (args, kwargs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = running.pop()
        if call.order in keeps:
            call.output = output

    handles = [
        handle
        for module in model.modules()
        for handle in (
            module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
            module.register_forward_hook(leave),
        )
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def calls_of(model: nn.Module, run: Callable[[], Any]) -> list[Call]:
    """All calls of modules in a forward pass, in the order in which they began."""
    with _watched(model, lambda call, inputs: None, set()) as calls:
        run()
    return calls


def _trained_here(model: nn.Module, called: set[nn.Module]) -> set[nn.Module]:
    """Called modules in which trained parameters take part, whoever owns them: prompts, the block they belong to."""
    found: set[nn.Module] = set()
    ours: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, E2VPTLayer) and any(p.requires_grad for p in module.parameters()):
            found.add(module.site.block)
        if isinstance(module, PromptLayers):
            ours.update(module.parameters())
    paths = dict(model.named_modules(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and parameter not in ours:
            path = name.rpartition(".")[0]
            while path and paths[path] not in called:
                path = path.rpartition(".")[0]
            found.add(paths[path])
    return found


def first_trained(model: nn.Module, calls: list[Call]) -> Call | None:
    """The first call of a module that trains."""
    trained = _trained_here(model, {call.module for call in calls})
    return next((call for call in calls if call.module in trained), None)


class Cut(NamedTuple):
    """A place where a model can be cut.

    Attributes:
        skipped: what the calls of skipped modules return, one after the other.
        module: the one whose output, or with `at_input` whose input, is cached.
        leaf: which leaf of it, and `number`, of which call; further calls of a module run.
    """

    skipped: dict[nn.Module, list[Returned]]
    module: nn.Module
    number: int
    leaf: int
    at_input: bool


def cuts_before(
    model: nn.Module, first: Call, calls: list[Call], run: Callable[[int], Any], before_a_block: bool
) -> Iterator[Cut]:
    """The places where a model can be cut before a call, the last place first; which one is right is for a try to say.

    Args:
        model: the model.
        first: the first call of a module that trains.
        calls: all calls of the pass that it belongs to.
        run: runs the model on so many images, other ones each time.
        before_a_block: whether the call is of a block, which activation checkpoints may call again: the input of that
            second call is what the first one got, so it must come from the module before.
    """
    stack = first.stack()
    levels: list[list[Call]] = []
    for frame, inner in zip(stack, stack[1:], strict=False):
        levels.append([c for c in calls if c.parent is frame and c.order < inner.order])
    keeps = {call.order for level in levels for call in level}
    sizes = (2, 3)
    passes = [_until(model, first, keeps, partial(run, count)) for count in sizes]
    (one, one_input), (other, other_input) = passes
    if [c.module for c in one] != [c.module for c in other] or [c.module for c in one] != [
        c.module for c in calls[: first.order + 1]
    ]:
        raise NoCut("it calls its modules in an order that changes")
    returned: dict[int, Returned] = {}

    def cut(deepest: int, at_input: bool) -> Iterator[Cut]:
        last: int | None = None
        orders = sorted(call.order for level in levels[: deepest + 1] for call in level)
        for order in orders:
            if order not in returned:
                returned[order] = Returned.like(one[order].output, other[order].output, sizes)
        if at_input:
            taken = Returned.like(one_input, other_input, sizes)
            leaves, place, number = taken.of_images, first.module, 0
            if len(leaves) != 1:
                return
        else:
            last = next((order for order in reversed(orders) if returned[order].of_images), None)
            if last is None:
                return
            leaves, place = returned[last].of_images, one[last].module
            number = sum(one[order].module is place for order in orders if order < last)
        for leaf in leaves:
            skipped: dict[nn.Module, list[Returned]] = {}
            for order in orders:
                is_cached = not at_input and order == last
                template = returned[order].with_hidden_states(leaf) if is_cached else returned[order]
                skipped.setdefault(one[order].module, []).append(template)
            if skipped:
                yield Cut(skipped, place, number, leaf, at_input)

    deepest = len(levels) - 1
    once = sum(call.module is first.module for call in calls) == 1
    attempts = [(deepest, True)] if once and not before_a_block else []
    attempts += [(level, False) for level in range(deepest, -1, -1) if levels[level]]
    reasons = []
    for level, at_input in attempts:
        try:
            yield from cut(level, at_input)
        except NoCut as reason:
            reasons.append(str(reason))
    if reasons:
        raise NoCut("; ".join(dict.fromkeys(reasons)))


def _until(model: nn.Module, first: Call, keeps: set[int], run: Callable[[], Any]) -> tuple[list[Call], Any]:
    def entered(call: Call, inputs: Any) -> None:
        if call.order == first.order:
            raise Reached(inputs)

    with _watched(model, entered, keeps) as calls:
        try:
            run()
        except Reached as reached:
            return calls, reached.value
    raise NoCut("it calls its modules in an order that changes")


def modules_in(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules and their parts, each once."""
    return list(dict.fromkeys(part for root in roots for part in root.modules()))
