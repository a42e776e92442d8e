# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Where the modules of version 0.1.0 have gone: importing a former path works for one more release, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


PACKAGE = __name__.rpartition(".")[0]
# former module: the modules that have its names now, the first one named in the warning
FORMER_PATHS = {
    "attending": ("attention_maps",),
    "callback": ("pruning.callback", "pruning"),
    "card": ("hub.card", "hub"),
    "combining": ("attention.rows",),
    "config": ("tuner.config",),
    "container": ("tuner.prompt_layers", "tuner"),
    "conversion": ("hub.conversion",),
    "embedding": ("embeddings",),
    "gates": ("tuner.gates",),
    "importance": ("pruning.importance",),
    "insertion": ("tuner.shallow",),
    "interception": ("attention.torch_function",),
    "labels": ("hub.companion",),
    "layer": ("tuner.layer", "tuner"),
    "loading": ("hub.loading",),
    "measuring": ("evaluation",),
    "merging": ("tuner.prompts",),
    "mixed_batch": ("tuner.mixed_batch",),
    "model": ("tuner.model",),
    "pictures": ("images",),
    "report": ("pruning.report",),
    "rewinding": ("pruning.rewinding",),
    "schedule": ("pruning.schedule",),
    "search": ("pruning.search", "pruning"),
    "sharding": ("distributed",),
    "sites": ("backbones.sites", "backbones"),
    "storage": ("tuner.state_dict",),
    "summary": ("tuner.summary",),
    "targets": ("tuner.targets",),
    "weighted": ("tuner.weighted",),
}
RENAMED = {"load_pictures": "load_images", "Pictures": "Images"}


class _FormerModule(ModuleType):
    """Looks its names up where they are now."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for target in FORMER_PATHS[self.__name__.rpartition(".")[2]]:
                module = import_module(f"{PACKAGE}.{target}")
                if hasattr(module, RENAMED.get(name, name)):
                    return getattr(module, RENAMED.get(name, name))
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)


class FormerPaths(MetaPathFinder, Loader):
    """Finds former modules; it is asked last, so that it never stands before a module that exists."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of a former module, `None` for all others."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == PACKAGE and name in FORMER_PATHS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that looks its names up where they are now."""
        return _FormerModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Warns whoever imports the module."""
        moved_to = FORMER_PATHS[module.__name__.rpartition(".")[2]][0]
        warnings.warn(
            f"{module.__name__} has moved to {PACKAGE}.{moved_to}. The next release drops the former path.",
            DeprecationWarning,
            stacklevel=2,  # frames of the import machinery are not counted
        )


def install() -> None:
    """Makes former paths importable; safe to call again."""
    if not any(isinstance(finder, FormerPaths) for finder in sys.meta_path):
        sys.meta_path.append(FormerPaths())
