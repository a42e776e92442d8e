# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Real processes: two of them (gloo, DDP without `find_unused_parameters`) prune as one does, and stay equal.

`worker.py` says what the two processes do; one start of them serves all tests of this file but those of the example.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from peft_e2vpt import (
    PruneRewindCallback,
    PruningReport,
    apply_gates,
    redraw,
    rewind,
    score_prompts,
    search_pruning,
    trained_tensors,
)
from peft_e2vpt.pruning.ranking import current_gates
from tests.support.paths import EXAMPLES
from tests.support.processes import launch, torchrun
from tests.support.sharded_worker import assert_same_run
from tests.support.sharded_worker import run as sharded_run
from tests.support.training import HALF, Images, adapted, assert_same_bits
from tests.support.worker import heads, last_layer, recipe, run, scores_and_search, sharded


pytestmark = pytest.mark.processes


EXAMPLE = EXAMPLES / "accelerate_loop.py"
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    out = tmp_path_factory.mktemp("processes")
    torchrun("-m", "tests.support.worker", str(out))
    yield [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", ["functions", "wrapped"])
def test_scores_of_unequal_shares_are_those_of_one_process(ranks: Ranks, kind: str) -> None:
    alone = scores_and_search(0, 1)
    found = ranks[0][kind]
    assert found["scores"][2] == alone["scores"][2] == 21
    for mine, expected in zip(found["scores"][:2], alone["scores"][:2], strict=True):
        assert expected.min() > 0
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-14)
    assert [c.quality for c in found["search"][0]] == [c.quality for c in alone["search"][0]]
    assert found["search"][1] == alone["search"][1]
    assert torch.equal(found["search"][2], alone["search"][2])


def test_a_process_without_samples_gets_the_scores_of_the_others(ranks: Ranks) -> None:
    alone = scores_and_search(0, 1)
    for rank in ranks:
        token, num_samples = rank["functions"]["alone"]
        assert num_samples == 21
        torch.testing.assert_close(token, alone["scores"][0], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", ["functions", "wrapped"])
def test_both_processes_get_the_same_bits(ranks: Ranks, kind: str) -> None:
    one, two = (rank[kind] for rank in ranks)
    assert torch.equal(one["scores"][0], two["scores"][0]) and torch.equal(one["scores"][1], two["scores"][1])
    assert torch.equal(one["signed"], two["signed"]) and (one["signed"] < 0).any()
    assert one["search"][:2] == two["search"][:2] and torch.equal(one["search"][2], two["search"][2])


@pytest.mark.parametrize("name", ["search_run", "straight", "resumed15", "resumed10", "resumed5", "bare"])
def test_both_processes_hold_the_same_model_after_pruning_and_at_the_end(ranks: Ranks, name: str) -> None:
    one, two = (rank[name] for rank in ranks)
    assert_same_bits(one["state"], two["state"])
    if name not in ("resumed15", "bare"):
        assert_same_bits(one["boundary"], two["boundary"])
    assert one["report"] == two["report"] and isinstance(one["report"], PruningReport)
    gates = torch.tensor(one["report"].token_gates)
    assert (gates == 0).any() and (gates.sum() > 0) == (name != "bare")


def test_the_gates_are_those_of_one_process(ranks: Ranks, tmp_path: Path) -> None:
    alone = run(tmp_path, 1, PruneRewindCallback())
    two = ranks[0]["search_run"]
    for name in ("token_gates", "segment_gates", "candidates", "chosen", "num_scored_samples", "step"):
        assert getattr(two["report"], name) == getattr(alone["report"], name)
    scores, expected = (torch.tensor(report.token_scores) for report in (two["report"], alone["report"]))
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)
    assert_close(two["boundary"], alone["boundary"])
    assert_close(two["state"], alone["state"])


def test_hidden_states_that_one_process_has_cached_train_all_as_images_do(ranks: Ranks, tmp_path: Path) -> None:
    alone = last_layer(tmp_path, 1, cached=False)
    for rank in ranks:
        assert rank["cached"]["report"].token_gates == alone["report"].token_gates
        assert_close(rank["cached"]["state"], alone["state"])


@pytest.mark.parametrize("step", [15, 10, 5])
def test_a_resumed_run_equals_the_straight_run_to_the_bit(ranks: Ranks, step: int) -> None:
    for rank in ranks:
        straight, resumed = rank["straight"], rank[f"resumed{step}"]
        assert_same_bits(resumed["state"], straight["state"])
        assert resumed["report"] == straight["report"]
        assert resumed["history"] == straight["history"]
    assert ranks[0]["straight"]["report"].num_scored_samples == 21


@pytest.mark.parametrize("kind", ["heads", "sharded heads"])
def test_heads_start_as_in_one_process(ranks: Ranks, kind: str) -> None:
    alone = heads(0, 1, shard=False)
    for rank in ranks:
        assert rank[kind]["start"] == alone["start"] and alone["start"].num_samples == 21
        assert_same_bits(rank[kind]["trained"], ranks[0][kind]["trained"])
        for name, tensor in alone["trained"].items():  # the fit ends where its line search does
            torch.testing.assert_close(rank[kind]["trained"][name], tensor, rtol=1e-5, atol=1e-6)


def test_a_run_with_the_recipe_is_that_of_one_process(ranks: Ranks, tmp_path: Path) -> None:
    alone = recipe(tmp_path, 1)
    assert_same_bits(ranks[1]["recipe"]["state"], ranks[0]["recipe"]["state"])
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(ranks[0]["recipe"]["state"][name], tensor, rtol=1e-4, atol=1e-5)
    for rank in ranks:
        assert_same_bits(rank["recipe resumed"]["state"], rank["recipe"]["state"])


def test_prompts_may_all_be_pruned_under_ddp(ranks: Ranks) -> None:
    """Without `find_unused_parameters`, DDP would stop at a parameter without a gradient."""
    for rank in ranks:
        assert rank["bare"]["report"].numbers()["pruning_prompts_kept"] == 0
        assert sum("loss" in entry for entry in rank["bare"]["history"]) == 8


def test_a_model_that_fsdp_shards_is_pruned_and_rewound_like_one_in_one_process(ranks: Ranks) -> None:
    alone = sharded(0, 1)
    for rank in ranks:
        found = rank["sharded"]
        torch.testing.assert_close(found["scores"].token, alone["scores"].token, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found["scores"].segment, alone["scores"].segment, rtol=1e-9, atol=1e-12)
        assert found["search"][1] == alone["search"][1]
        assert [c.quality for c in found["search"][0]] == [c.quality for c in alone["search"][0]]
        assert_close(found["trained"], alone["trained"])
        assert found["without data"].startswith("The model is sharded, so every process needs a batch")
    prompts = [tensor for name, tensor in alone["trained"].items() if "visual_prompts" in name]
    assert all(0 < int((tensor == 0).sum()) < tensor.numel() for tensor in prompts)


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "a part of it"])
def test_a_model_that_the_first_version_of_fsdp_flattens_is_refused(whole: bool) -> None:
    model = adapted()
    gates = current_gates(model)
    scores = score_prompts(model, [Images(4)[:]])
    values = trained_tensors(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        inner = model if whole else model.base_model.model.vit
        flat = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True)
        if whole:
            model = flat
        else:
            model.base_model.model.vit = flat
        for function in (
            lambda: trained_tensors(model),
            lambda: rewind(model, values),
            lambda: redraw(model, "default", 0),
            lambda: apply_gates(model, gates),
            lambda: score_prompts(model, [Images(4)[:]]),
            lambda: search_pruning(model, scores, [Images(4)[:]]),
        ):
            with pytest.raises(ValueError, match=r"FSDP1\), which hides .*: shard it with .*fully_shard \(FSDP2\)"):
                function()
    finally:
        torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------- the Trainer and FSDP2
@pytest.fixture(scope="module")
def fsdp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    torchrun("-m", "tests.support.sharded_worker", "fsdp2", str(folder))
    return folder


@pytest.fixture(scope="module")
def fsdp_ranks(fsdp_folder: Path) -> Ranks:
    return [torch.load(fsdp_folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize(("name", "settings"), [("search", {}), ("fresh", {**HALF, "rewind_to": "fresh"})])
def test_the_trainer_with_fsdp_trains_as_one_process(
    fsdp_ranks: Ranks, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    alone = sharded_run(tmp_path, "alone", PruneRewindCallback(**settings))
    for rank in fsdp_ranks:
        assert_same_run(rank[name], alone)
        assert_same_bits(rank[name]["end"], fsdp_ranks[0][name]["end"])
        assert rank["no effect"] is True


@pytest.mark.parametrize("step", [15, 5])
def test_a_resumed_run_with_fsdp_equals_the_straight_run_to_the_bit(fsdp_ranks: Ranks, step: int) -> None:
    for rank in fsdp_ranks:
        straight, resumed = rank["search"], rank[f"resumed{step}"]
        assert_same_bits(resumed["end"], straight["end"])
        assert resumed["report"] == straight["report"] and resumed["history"] == straight["history"]


@pytest.mark.parametrize("step", [15, 10, 5])
def test_checkpoints_that_fsdp_writes_in_parts_resume_to_the_bit(fsdp_ranks: Ranks, step: int) -> None:
    """`state_dict_type="SHARDED_STATE_DICT"`: before and after pruning."""
    for rank in fsdp_ranks:
        straight, resumed = rank["parts"], rank[f"parts{step}"]
        assert_same_bits(resumed["end"], straight["end"])
        assert resumed["report"] == straight["report"] and resumed["history"] == straight["history"]
        assert resumed["summary"] == straight["summary"]


def test_a_pruned_model_is_read_from_parts_by_hand(fsdp_ranks: Ranks) -> None:
    for rank in fsdp_ranks:
        assert_same_bits(rank["own files"], rank["parts"]["end"])


def test_the_best_model_of_the_second_part_is_loaded_with_fsdp(fsdp_folder: Path, fsdp_ranks: Ranks) -> None:
    assert {rank["best"]["best step"] for rank in fsdp_ranks} == {15}  # neither of the first part nor the last
    folder = fsdp_folder / "best"
    best, end = (load_file(folder / name / "adapter_model.safetensors") for name in ("checkpoint-15", "adapter"))
    assert_same_bits(end, best)


def test_the_adapter_of_a_model_that_fsdp_shards_is_compact(fsdp_folder: Path, fsdp_ranks: Ranks) -> None:
    weights = load_file(fsdp_folder / "search" / "adapter" / "adapter_model.safetensors")
    for name, tensor in fsdp_ranks[0]["search"]["end"].items():
        if "visual_prompts" in name:
            stored = weights[name.removesuffix(".default")]
            assert torch.equal(stored, tensor[tensor != 0] if stored.dim() == 1 else tensor)
    assert any(tensor.dim() == 1 for name, tensor in weights.items() if "visual_prompts" in name)


# ---------------------------------------------------------------------------------------- a training loop of one's own
@pytest.mark.parametrize("processes", [1, 2])
def test_the_loop_with_accelerate_runs_as_it_stands(processes: int, tmp_path: Path) -> None:
    arguments = ("--smoke", "--output_dir", str(tmp_path))
    if processes == 1:
        arguments += ("--tokens", "0.5", "--segments", "0.25", "--gradient_accumulation_steps", "2")
        launch(sys.executable, str(EXAMPLE), *arguments)
    else:
        torchrun(str(EXAMPLE), *arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["processes"] == processes
    assert results["scored_images"] == 37
    assert results["tuned_percentage"] < results["tuned_percentage_before"]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    kept = [int(tensor.sum()) for name, tensor in sorted(weights.items()) if "token_gates" in name]
    assert kept == results["prompts_kept"] and max(kept) < 10
    if processes == 1:
        assert kept == [5, 5]


def test_two_processes_are_not_one(ranks: Ranks, tmp_path: Path) -> None:
    """Each process draws its own dropout, so the comparison above is one of different trainings."""
    alone = run(tmp_path, 1, PruneRewindCallback(**HALF), dropout=0.1)
    name = next(name for name in alone["state"] if "visual_prompts" in name)
    assert not torch.allclose(ranks[0]["straight"]["state"][name], alone["state"][name], rtol=1e-4, atol=1e-4)
