# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Paths of modules, and which of them a name stands for where PEFT matches the ending of a path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # cannot be called, so PEFT does not wrap them


def join(path: str, name: str) -> str:
    """The path of a child."""
    return f"{path}.{name}" if path else name


def lies_in(path: str, module: str) -> bool:
    """Whether a path is that of a module or of a part of it; all lie in the model, whose path is empty."""
    return not module or path == module or path.startswith(module + ".")


class Modules(Mapping[str, nn.Module]):
    """All modules of a model by their paths, as they were before PEFT came: its wrappers are seen through.

    A module that is reached by several paths is listed under each.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(_walk("", model))

    def __getitem__(self, path: str) -> nn.Module:
        return self._modules[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def below(self, path: str) -> list[str]:
        """Paths of a module and of all its parts."""
        found, waiting = [], [path]
        while waiting:
            found.append(waiting.pop())
            waiting += [join(found[-1], name) for name in reversed(self.children(found[-1]))]
        return found

    def children(self, path: str) -> list[str]:
        """Names of the direct parts of a module."""
        return [name for name in self._modules[path]._modules if join(path, name) in self._modules]

    def parameters(self, path: str) -> list[nn.Parameter]:
        """The parameters of a module and of all its parts."""
        found = (value for name in self.below(path) for value in self._modules[name]._parameters.values())
        return [value for value in found if value is not None]

    def holds(self, path: str, others: Iterable[str]) -> bool:
        """Whether one of several modules lies in a module."""
        return any(lies_in(other, path) for other in others)

    def outermost(self, paths: Iterable[str]) -> list[str]:
        """Those of several modules that lie in no other of them, once each and in the order of the model."""
        chosen, seen = [], set()
        given = set(paths)
        for path in self._modules:
            if path in given and not any(other != path and lies_in(path, other) for other in given):
                if id(self._modules[path]) not in seen:
                    chosen.append(path)
                seen.add(id(self._modules[path]))
        return chosen

    def with_tied(self, paths: Iterable[str]) -> list[str]:
        """Several modules, and those whose parameters are the very same as theirs."""
        values = {path: tuple(map(id, self.parameters(path))) for path in paths}
        tied = set(values.values())
        found = [path for path in self._modules if tuple(map(id, self.parameters(path))) in tied]
        apart = [path for path in found if not any(lies_in(a, b) for b in values for a, b in ((path, b), (b, path)))]
        return self.outermost([*values, *apart])

    def ending_in(self, name: str) -> list[str]:
        """Paths of the modules, once each, that PEFT would take `name` for: whose path ends with it."""
        found = {id(module): path for path, module in reversed(self._modules.items()) if path.endswith(name)}
        return list(reversed(found.values()))

    def unambiguous(self, paths: Iterable[str]) -> list[str]:
        """The same modules as paths that PEFT takes for one module each, where need be by their parts.

        PEFT matches the ending of a path, so `head` is `x.head` and `decode_head` too. A module list, which cannot be
        wrapped, is named by its parts as well.
        """
        return [part for path in paths for part in self._unambiguous(path)]

    def _unambiguous(self, path: str) -> list[str]:
        module = self._modules[path]
        parts = [join(path, name) for name in self.children(path) if self.parameters(join(path, name))]
        others = [other for other in self.ending_in(path) if self._modules[other] is not module]
        if any(value is not None for value in module._parameters.values()):
            return [path]
        within = self.unambiguous(self.outermost(parts)) if others or isinstance(module, CONTAINERS) else []
        clear = bool(within) and all(len(self.ending_in(part)) == 1 for part in within)
        if isinstance(module, CONTAINERS) or clear or any(lies_in(other, path) for other in others):
            return within
        return [path]

    def resolve(self, name: str) -> str:
        """The path that a user means by a name: the module of that path, or else the only one that ends in it.

        Raises:
            KeyError: there is none.
            ValueError: there are several.
        """
        if name in self._modules:
            return name
        found = [path for path in self.ending_in(name) if path.endswith("." + name)]
        if not found:
            raise KeyError(name)
        if len(found) > 1:
            shown = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
            raise ValueError(
                f"modules_to_save names {name!r}, which is the ending of {len(found)} modules: {shown}. Name those "
                "that are to be trained by their full paths."
            )
        return found[0]


def _walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if isinstance(module, BaseTunerLayer):
        return
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(join(path, name), child)
