# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Two processes under DeepSpeed's ZeRO-2 and ZeRO-3 prune and rewind as one process does, on CPUs (gloo).

DeepSpeed is an extra: `pip install -e '.[deepspeed,test]' && python -m pytest -m deepspeed`. `sharded_worker.py` says
what the two processes do, and how closely they agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_e2vpt import PruneRewindCallback, trained_tensors
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support.models import build
from tests.support.processes import torchrun
from tests.support.sharded_worker import assert_same_run, run
from tests.support.training import HALF, Images, adapted, assert_same_bits


Ranks = list[dict[str, Any]]

pytestmark = [
    pytest.mark.processes,
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install -e '.[deepspeed]'"),
]


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def out(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(kind)
    torchrun("-m", "tests.support.sharded_worker", kind, str(folder), env={"DS_ACCELERATOR": "cpu"})
    return folder


@pytest.fixture(scope="module")
def ranks(out: Path) -> Iterator[Ranks]:
    yield [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("alone"), "alone", PruneRewindCallback())


def rates_of(entry: dict[str, Any]) -> list[float]:
    return [logged["learning_rate"] for logged in entry["history"] if "loss" in logged]


def test_gates_and_weights_are_those_of_one_process(ranks: Ranks, alone: dict[str, Any]) -> None:
    gates = torch.tensor(alone["report"].token_gates)
    assert (gates == 0).any() and (gates == 1).any() and alone["report"].num_scored_samples == 21
    for rank in ranks:
        assert_same_run(rank["search"], alone)
        found, expected = (rates_of(entry) for entry in (rank["search"], alone))
        assert found == pytest.approx(expected, abs=1e-12) and len(found) == 20 and found[10] == 0.0


def test_both_processes_hold_the_same_bits(ranks: Ranks) -> None:
    one, two = ranks
    for name in ("search", "resumed15", "resumed5", "fresh", "own optimizer", "bf16"):
        assert one[name]["report"] == two[name]["report"]
        assert_same_bits(one[name]["end"], two[name]["end"])
        if name != "resumed15":
            assert_same_bits(one[name]["start"], two[name]["start"])


def test_pruned_values_have_no_effect(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["no effect"] is True
        pruned = [tensor == 0 for name, tensor in rank["search"]["end"].items() if "visual_prompts" in name]
        gates = torch.tensor(rank["search"]["report"].token_gates) == 0
        assert all(torch.equal(zeros.all(1), gate) for zeros, gate in zip(pruned, gates, strict=True))


@pytest.mark.parametrize("step", [15, 5])
def test_a_resumed_run_equals_the_straight_run_to_the_bit(ranks: Ranks, step: int) -> None:
    for rank in ranks:
        straight, resumed = rank["search"], rank[f"resumed{step}"]
        assert_same_bits(resumed["end"], straight["end"])
        assert resumed["report"] == straight["report"] and resumed["history"] == straight["history"]


def test_a_new_draw_is_that_of_one_process(ranks: Ranks, tmp_path: Path) -> None:
    alone = run(tmp_path, "alone", PruneRewindCallback(**HALF, rewind_to="fresh"))
    for rank in ranks:
        assert_same_run(rank["fresh"], alone)


def test_a_scheduler_that_the_engine_steps_starts_again(ranks: Ranks, tmp_path: Path) -> None:
    early = PruneRewindCallback(**HALF, rewind_to="early", early_steps=2)
    alone = run(tmp_path, "alone", early, weight_decay=0.0)
    for rank in ranks:
        assert_same_run(rank["own optimizer"], alone)
        assert rates_of(rank["own optimizer"])[:-1] == pytest.approx(rates_of(alone)[1:], abs=1e-12)  # logs the next


def test_master_weights_of_a_half_precision_engine_return_to_the_start(ranks: Ranks) -> None:
    model = adapted("swin")
    start = {name: tensor.bfloat16().float() for name, tensor in trained_tensors(model).items()}
    for rank in ranks:
        report, found = rank["bf16"]["report"], rank["bf16"]["start"]
        assert report.num_scored_samples == 21
        for layer, token, segment in zip(prompt_layers(model), report.token_gates, report.segment_gates, strict=True):
            layer.set_gates("default", torch.tensor(token), torch.tensor(segment))
            start[f"base_model.model.e2vpt.{layer.index}.e2vpt_visual_prompts.default"] *= layer.kept("default")
        assert_same_bits(found, start)
        assert any((tensor == 0).any() for name, tensor in found.items() if "visual_prompts" in name)
        assert not any(torch.equal(rank["bf16"]["end"][name], tensor) for name, tensor in start.items())


@pytest.mark.parametrize("kind", ["zero3"], indirect=True, scope="module")  # ZeRO-2 leaves parameters whole
def test_a_backbone_that_was_loaded_in_parts_gives_the_same_run(ranks: Ranks, alone: dict[str, Any]) -> None:
    for rank in ranks:
        assert_same_run(rank["loaded in parts"], alone)


def test_the_best_model_of_the_second_part_is_loaded_at_the_end(out: Path, ranks: Ranks) -> None:
    steps = {rank["best"]["best step"] for rank in ranks}
    assert steps == {15}  # neither of the first part nor the last
    best, end = (load_file(out / "best" / name / "adapter_model.safetensors") for name in ("checkpoint-15", "adapter"))
    assert_same_bits(end, best)


@pytest.mark.parametrize("folder", ["adapter", "checkpoint-15"])
def test_the_saved_adapter_is_compact_and_loads_back(out: Path, ranks: Ranks, folder: str) -> None:
    weights = load_file(out / "search" / folder / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(build("vit")[0], out / "search" / folder)
    sizes = [int(layer.kept("default").sum()) for layer in prompt_layers(model)]
    stored = [tensor for name, tensor in sorted(weights.items()) if "visual_prompts" in name]
    assert [tensor.numel() for tensor in stored if tensor.dim() == 1] == [size for size in sizes if size < 4 * 32]
    assert any(tensor.dim() == 1 for tensor in stored)
    if folder == "adapter":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        loaded = {name: tensor for name, tensor in trained_tensors(model).items() if name in ranks[0]["search"]["end"]}
        assert_same_bits(loaded, ranks[0]["search"]["end"])
        assert model(pixel_values=Images(2).pixels).logits.isfinite().all()
