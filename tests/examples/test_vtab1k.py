# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`vtab1k.py` on stand-ins, in one process and in two."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from tests.support.paper_programs import BACKBONES, ENVIRONMENT, PHASES, smoke, trainings
from tests.support.paths import EXAMPLES
from tests.support.processes import torchrun


pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def vtab_run(tmp_path_factory) -> tuple[list[dict[str, Any]], str]:
    return smoke("vtab1k", tmp_path_factory.mktemp("vtab1k"))


def test_vtab_runs_every_phase_on_thorough(vtab_run):
    found, _ = vtab_run
    tasks = ["cifar", "eurosat", "dsprites_loc"]  # one of every group
    expected = [(task, name, phase) for task, name in product(tasks, BACKBONES) for phase in PHASES]
    assert [(record["task"], record["backbone"], record["phase"]) for record in found] == expected
    assert all(record["processes"] == 1 and 0 <= record["accuracy"] <= 1 for record in found)


def test_the_final_training_has_the_chosen_rate_and_what_pruning_left(vtab_run):
    found, _ = vtab_run
    for start in range(0, len(found), len(PHASES)):
        *grid, prune, final = found[start : start + len(PHASES)]
        best = max(record["accuracy"] for record in grid)
        rate = min(record["learning_rate"] for record in grid if record["accuracy"] == best)
        assert prune["learning_rate"] == final["learning_rate"] == rate
        tokens = torch.tensor(prune["token_gates"])
        assert tokens.shape == (2, prune["settings"]["num_visual_prompts"])
        assert torch.tensor(prune["segment_gates"]).shape == (*tokens.shape, 8)
        assert final["trained"] == prune["trained"] <= grid[0]["trained"]
    assert any(record["trained"] < before["trained"] for before, record in zip(found, found[3:], strict=False))


def test_the_table_has_the_published_numbers_beside_ours(vtab_run):
    _, printed = vtab_run
    assert "| vit | e2vpt | here |" in printed
    assert "| vit | e2vpt | published | 80.01 | 84.43 | 57.39 | 73.94 | 71.42 | |" in printed
    assert "| mocov3 | e2vpt | published | 76.47 | 87.28 | 54.91 |" in printed


def test_two_processes_share_every_step_and_one_writes(tmp_path):
    arguments = ["--smoke", "--backbone", "vit", "--use_cpu", "--ddp_backend", "gloo", "--disable_tqdm", "True"]
    torchrun(str(EXAMPLES / "vtab1k.py"), *arguments, "--output_dir", str(tmp_path), env=ENVIRONMENT)
    found = trainings(tmp_path)
    assert [record["phase"] for record in found] == 3 * PHASES
    assert all(record["processes"] == 2 for record in found)
