# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The plan of the package: wings whose imports run one way."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import peft_e2vpt


ROOT = Path(peft_e2vpt.__file__).parent
# what each wing, or module beside the wings, may import of the others
ARROWS = {
    "_compat": set(),
    "distributed": set(),
    "backbones": {"_compat"},
    "attention": {"_compat", "backbones"},
    "tuner": {"_compat", "attention", "backbones", "distributed"},
    "export": {"attention", "backbones", "tuner"},
    "evaluation": {"distributed"},
    "embeddings": {"_compat", "evaluation"},
    "attention_maps": {"_compat", "attention", "backbones", "evaluation", "tuner"},
    "training": {"_compat", "backbones", "distributed", "evaluation", "tuner"},
    "pruning": {"_compat", "distributed", "evaluation", "training", "tuner"},
    "images": {"_compat", "evaluation", "hub", "pruning", "tuner"},
    "plotting": {"_compat", "attention_maps", "evaluation", "pruning"},
    "hub": {"_compat", "backbones", "plotting", "pruning", "tuner"},
}
MOST_BELOW_THE_TUNER = 20


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(ROOT.rglob("*.py"))}


@cache
def imports_of(module: str) -> frozenset[str]:
    """Modules of the package that one imports when it is imported."""
    file = MODULES[module]
    package = file.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in MODULES else ".".join(base))
    return frozenset(found & MODULES.keys())


def reached_from(module: str) -> set[str]:
    reached, ahead = set(), [module]
    while ahead:
        for further in imports_of(ahead.pop()):
            if further not in reached:
                reached.add(further)
                ahead.append(further)
    return reached


@pytest.mark.parametrize("wing", ARROWS)
def test_a_wing_imports_only_what_the_plan_lets_it(wing):
    members = [module for module in MODULES if module.split(".")[0] == wing]
    imported = {further.split(".")[0] for module in members for further in imports_of(module)} - {wing}
    assert members and imported <= ARROWS[wing], imported - ARROWS[wing]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_reaches_itself(module):
    assert module not in reached_from(module)


def test_the_tuner_reaches_neither_cards_nor_plots_nor_pruning():
    reached = reached_from("tuner.model")
    assert len(reached) <= MOST_BELOW_THE_TUNER
    assert {module.split(".")[0] for module in reached} == {
        "_compat",
        "attention",
        "backbones",
        "distributed",
        "tuner",
    }
