# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Modules of version 0.1.0 that were named in documents and examples can still be imported where they were."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module

import pytest

import peft_e2vpt
from peft_e2vpt._former_paths import FORMER_PATHS
from tests.support.paths import ROOT


NAMES = {  # what README.md, docs, examples and tests imported from each
    "attending": ["AttentionMap", "PromptAttention", "attention_maps", "prompt_attention"],
    "attention": ["Rows"],
    "backbones": ["BACKBONES"],
    "callback": ["PruneRewindCallback"],
    "card": ["Location", "write_card"],
    "combining": ["join_rows", "side_by_side"],
    "config": ["E2VPTConfig"],
    "container": ["PromptLayers", "prompt_layers", "visual_prompt_layers"],
    "conversion": ["read_checkpoint"],
    "embedding": ["class_token_embeddings"],
    "gates": ["GateOverride"],
    "hub": ["push_to_hub"],
    "importance": ["ImportanceScores", "score_prompts"],
    "insertion": [],
    "interception": [],
    "labels": ["labels_of"],
    "layer": ["E2VPTLayer", "GateOverride"],
    "loading": ["load"],
    "measuring": ["no_trace"],
    "merging": [],
    "mixed_batch": ["one_adapter_per_sample"],
    "model": ["E2VPTModel"],
    "pictures": ["accuracy", "load_pictures", "load_images", "name_columns"],
    "pruning": ["Gates", "apply_gates", "current_gates", "number_to_prune", "prune"],
    "report": ["REPORT_NAME", "PruningReport"],
    "rewinding": ["redraw", "rewind", "trained_tensors"],
    "schedule": [],
    "search": ["RATIOS", "PruningSearch", "search_pruning"],
    "sharding": ["assign", "is_sharded", "whole"],
    "sites": ["find_attention_sites", "find_heads"],
    "storage": [],
    "summary": ["PromptSummary"],
    "targets": [],
    "weighted": [],
}
STILL_THERE = {"attention", "backbones", "hub", "pruning"}  # packages of the same name


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Former modules are imported anew, so that they warn."""
    for name in FORMER_PATHS:
        monkeypatch.delitem(sys.modules, f"peft_e2vpt.{name}", raising=False)
        monkeypatch.delattr(peft_e2vpt, name, raising=False)


def test_the_names_of_every_former_module_are_tested() -> None:
    assert NAMES.keys() - STILL_THERE == FORMER_PATHS.keys()


@pytest.mark.parametrize("name", FORMER_PATHS)
def test_importing_a_former_module_warns_and_names_the_new_one(forgotten: None, name: str) -> None:
    with pytest.warns(DeprecationWarning) as noted:
        import_module(f"peft_e2vpt.{name}")
    (warning,) = noted
    new = str(warning.message).split("moved to ")[1].split(". ")[0]
    assert new == f"peft_e2vpt.{FORMER_PATHS[name][0]}" and import_module(new)


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in NAMES for name in NAMES[module]])
@pytest.mark.filterwarnings("ignore:peft_e2vpt.* has moved:DeprecationWarning")
def test_a_former_module_offers_what_it_did(forgotten: None, module: str, name: str) -> None:
    found = getattr(import_module(f"peft_e2vpt.{module}"), name)
    assert found is getattr(peft_e2vpt, name, found)


def test_a_name_that_never_was_is_an_attribute_error(forgotten: None) -> None:
    with pytest.warns(DeprecationWarning):
        former = import_module("peft_e2vpt.layer")
    with pytest.raises(AttributeError, match=r"module 'peft_e2vpt.layer' has no attribute 'nothing'"):
        _ = former.nothing
    with pytest.raises(ImportError, match="nothing"):
        exec("from peft_e2vpt.layer import nothing")


def test_the_warning_points_to_the_line_that_imports(forgotten: None) -> None:
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        from peft_e2vpt.container import prompt_layers  # noqa: F401
    assert [warning.filename for warning in noted] == [__file__]


def test_modules_that_never_were_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'peft_e2vpt.nothing'"):
        import_module("peft_e2vpt.nothing")


@pytest.mark.packaging
def test_importing_the_package_imports_no_former_module() -> None:
    program = "import sys, peft_e2vpt; print([name for name in sys.modules if name in sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:peft_e2vpt", "-c", program]
        + [f"peft_e2vpt.{name}" for name in FORMER_PATHS],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout == "[]\n", done.stderr
