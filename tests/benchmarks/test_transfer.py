# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The transfer suite: frozen layers run once, results are found again, and the tables come from the lines."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification

from benchmarks import transfer, transfer_table, transfer_tasks
from peft_e2vpt import E2VPTConfig
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def backbone() -> Dinov2ForImageClassification:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14, num_labels=6
    )
    return Dinov2ForImageClassification(config).eval()


@pytest.mark.parametrize("first_layer", [0, 1, 3, 4])
@torch.no_grad()
def test_layers_below_prompts_that_run_once_give_the_logits_of_the_whole_model(backbone, first_layer):
    backbone = copy.deepcopy(backbone).double()
    pixels = torch.randn(5, 3, 28, 28, dtype=torch.float64)
    hidden = transfer.run_frozen_layers(backbone, pixels, first_layer)
    config = {"num_visual_prompts": 3, "num_kv_prompts": 2, "seed": 1}
    if first_layer == 4:  # the head alone
        whole, rest = backbone, copy.deepcopy(backbone)
        transfer.cut(rest, first_layer)
    else:
        method = transfer.Method("e2vpt", first_layer, config)
        whole = transfer.get_peft_model(
            copy.deepcopy(backbone), E2VPTConfig(**config, layers_to_transform=list(range(first_layer, 4)))
        ).eval()
        rest = copy.deepcopy(backbone)
        transfer.cut(rest, first_layer)
        rest = transfer.tune(rest, method, ["classifier"]).eval()
        prompts = [p for name, p in whole.named_parameters() if "e2vpt_" in name]
        for mine, theirs in zip((p for n, p in rest.named_parameters() if "e2vpt_" in n), prompts, strict=True):
            mine.copy_(theirs)
    expected = whole(pixel_values=pixels).logits
    torch.testing.assert_close(rest(pixel_values=hidden).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "trained"), [("linear", {"classifier"}), ("bitfit", {"classifier", "bias"})])
def test_a_method_trains_what_its_name_says(backbone, kind, trained):
    model = transfer.tune(copy.deepcopy(backbone), transfer.Method(kind), ["classifier"])
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {
        name for name, _ in model.named_parameters() if name.startswith("classifier") or name.split(".")[-1] in trained
    }
    assert found == wanted


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind 'prompt' is none of linear, full, bitfit, lora, e2vpt"):
        transfer.Method("prompt")


@pytest.mark.parametrize("sweep", sorted((ROOT / "benchmarks" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_method_of_a_sweep_can_be_built(backbone, sweep):
    for method in transfer.Sweep.read(sweep).methods.values():
        model = copy.deepcopy(backbone)
        transfer.cut(model, min(method.first_layer, 2))
        assert any(p.requires_grad for p in transfer.tune(model, method, ["classifier"]).parameters())
        if method.pruning is not None:
            transfer.PruneRewindCallback(**method.pruning)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["count", "orientation", "x_position", "distance"])
def test_drawn_tasks_are_the_same_every_time_and_have_no_image_twice(name):
    first, second = (transfer_tasks.TASKS[name].load() for _ in range(2))
    assert [len(split.labels) for split in first[:3]] == [800, 200, 1000]
    images = [image.tobytes() for split in first[:3] for image in split.images]
    assert images == [image.tobytes() for split in second[:3] for image in split.images]
    assert len(set(images)) == 2000
    assert {label for split in first[:3] for label in split.labels} == set(range(len(first[3])))


def row(task: str, method: str, rate: float, seed: int, validation: float, test: float, group: str) -> dict:
    return {
        "task": task,
        "group": group,
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "validation_accuracy": validation,
        "test_accuracy": test,
        "trained": 10,
        "parameters": 1000,
        "cpu_seconds": 5.0,
    }


def test_the_table_takes_the_rate_chosen_on_validation_and_the_mean_over_seeds():
    rows = [
        row("digits", "e2vpt", 0.1, 0, 0.6, 0.9, "natural"),
        row("digits", "e2vpt", 0.2, 0, 0.7, 0.5, "natural"),
        row("digits", "e2vpt", 0.2, 1, 0.7, 0.7, "natural"),
        row("count", "e2vpt", 0.1, 0, 0.7, 0.2, "structured"),
        row("digits", "full", 0.1, 0, 0.7, 0.5, "natural"),
        row("count", "full", 0.1, 0, 0.7, 0.3, "structured"),
    ]
    chosen = transfer_table.chosen_rows(rows)
    assert transfer_table.cell(chosen["digits", "e2vpt"]) == "60.0 (14.1)"
    found = transfer_table.summaries(chosen, ["digits", "count"], ["e2vpt", "full"])
    assert found["e2vpt"]["mean_of_groups"] == pytest.approx(40.0)
    assert found["e2vpt"]["percent"] == pytest.approx(1.0)
    line = transfer_table.difference(chosen, ["digits", "count"], "e2vpt", "full")
    assert line == "e2vpt minus full: +0.0 points (standard error over 2 tasks 10.0; ahead on 1)"


def test_means_of_groups_are_compared_seed_by_seed():
    rows = [
        row(task, method, 0.1, seed, 0.6, accuracy, group)
        for seed, gain in ((0, 0.02), (1, 0.04))
        for task, group in (("digits", "natural"), ("emoji", "natural"), ("count", "structured"))
        for method, accuracy in (("full", 0.5), ("e2vpt", 0.5 + (gain if group == "structured" else 0.0)))
    ]
    rows.append(row("digits", "e2vpt", 0.1, 2, 0.6, 0.9, "natural"))  # the other tasks are still to come
    line = transfer_table.difference_of_groups(
        transfer_table.chosen_rows(rows), ["digits", "emoji", "count"], "e2vpt", "full"
    )
    assert line == "e2vpt minus full: +1.5 points of the mean of groups (by seed +1.0, +2.0)"


def test_changes_are_taken_over_the_seeds_that_a_method_and_the_reference_have_both_run():
    rows = [
        row("digits", "e2vpt", 0.1, 0, 0.6, 0.80, "natural"),
        row("digits", "e2vpt", 0.1, 1, 0.6, 0.90, "natural"),
        row("digits", "kv-1", 0.1, 0, 0.6, 0.75, "natural"),
        row("count", "e2vpt", 0.1, 0, 0.6, 0.50, "structured"),
        row("count", "kv-1", 0.1, 0, 0.6, 0.52, "structured"),
        row("emoji", "e2vpt", 0.1, 0, 0.6, 0.50, "natural"),
    ]
    chosen = transfer_table.chosen_rows(rows)
    table = transfer_table.table_of_changes(chosen, ["digits", "count", "emoji"], ["e2vpt", "kv-1"], "e2vpt")
    assert table.splitlines()[0] == "| minus e2vpt | digits | count | mean | standard error |"
    assert table.splitlines()[2:] == ["| kv-1 | -5.0 | +2.0 | -1.5 | 3.5 |"]


def test_a_method_that_lacks_a_task_is_in_no_mean():
    rows = [
        row("digits", "e2vpt", 0.1, 0, 0.6, 0.9, "natural"),
        row("count", "e2vpt", 0.1, 0, 0.6, 0.9, "structured"),
        row("digits", "full", 0.1, 0, 0.6, 0.9, "natural"),
    ]
    found = transfer_table.summaries(transfer_table.chosen_rows(rows), ["digits", "count"], ["e2vpt", "full"])
    assert list(found) == ["e2vpt"]


@pytest.mark.parametrize(
    ("validation", "next_rate", "skipped"),
    [
        ([0.5, 0.7], 0.3, False),
        ([0.7, 0.61], 0.3, False),
        ([0.7, 0.59], 0.3, True),
        ([0.7, 0.59], 0.2, False),  # the rate that lost is not skipped itself
        ([0.4, 0.7, 0.59], 0.4, True),
        ([], 0.1, False),
    ],
)
def test_rates_above_one_that_has_lost_ten_points_of_validation_accuracy_are_skipped(validation, next_rate, skipped):
    rows = [
        row("count", "full", 0.1 * (i + 1), 0, accuracy, 0.5, "structured") for i, accuracy in enumerate(validation)
    ]
    assert transfer.fell_behind(rows[::-1], next_rate) == skipped


@pytest.mark.processes
def test_the_suite_runs_end_to_end_and_a_second_run_adds_nothing(backbone, tmp_path, monkeypatch, capsys):
    backbone.save_pretrained(tmp_path / "model")
    size = {"height": 28, "width": 28}
    BitImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path / "model")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "learning_rates: [1.0e-3, 1.0e-2]\n"
        "methods:\n"
        "  linear: {kind: linear, first_layer: 4, epochs: 0.4}\n"
        "  e2vpt: {kind: e2vpt, first_layer: 2}\n"
        "  pruned: {kind: e2vpt, first_layer: 2, pruning: {tokens: 0.5, segments: 0.5}, learning_rate_of: e2vpt}\n"
    )
    options = ["--model", tmp_path / "model", "--image_size", 28, "--sweep", sweep, "--results", tmp_path / "r.jsonl"]
    options += ["--tasks", "count", "--seeds", 2, "--epochs", 0.2, "--batch_size", 16]
    command = [sys.executable, "-m", "benchmarks.transfer", *map(str, options)]
    for _ in range(2):
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 + 2 + 2 * 1 + 0  # two rates with seed 0; one with seed 1; pruned takes a rate
    pruned = [row for row in rows if row["method"] == "pruned"]
    assert all(row["trained"] < next(r for r in rows if r["method"] == "e2vpt")["trained"] for row in pruned)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "r.jsonl"), "--figure", str(tmp_path / "a.png")])
    capsys.readouterr()  # what libraries say when they are first used, as DeepSpeed does
    transfer_table.main()
    shown = capsys.readouterr().out
    assert shown.startswith(
        f"{len(rows)} trainings, 2 seeds, 28 px, 0.4 or 0.2 epochs, batches of 16, bf16 autocast; "
    )
    assert "| e2vpt |" in shown and (tmp_path / "a.png").stat().st_size > 0
