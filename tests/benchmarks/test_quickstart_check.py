# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The check of README runs README's code, and its table says what the lines hold."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Trainer

from benchmarks import quickstart_check
from benchmarks.transfer import Inputs
from peft_e2vpt import PruneRewindCallback
from tests.support.models import DINOV2


def line(task: str, method: str, seed: int, accuracy: float) -> dict[str, Any]:
    return {"task": task, "method": method, "seed": seed, "test_accuracy": accuracy, "test_images": 100, "code": ""}


def test_the_code_is_that_of_readme():
    code = quickstart_check.code_of_readme()
    assert code in quickstart_check.README.read_text("utf-8") and code.startswith("import peft_e2vpt")
    assert code.count("google/vit-base-patch16-224-in21k") == code.count("num_labels=") == 1
    assert "RecipeCallback()" in code and "learning_rate" not in code


def test_without_pruning_the_first_half_is_left():
    pruned, unpruned = quickstart_check.code_of_readme(), quickstart_check.code_of_readme("unpruned")
    assert "PruneRewindCallback" in pruned and "PruneRewindCallback" not in unpruned
    assert "num_train_epochs=8" in pruned and "num_train_epochs=4" in unpruned
    assert "PruneRewindCallback()" in quickstart_check.code_of_readme("rewound")


def test_comments_make_no_other_code():
    digests = [quickstart_check.digest_of(code) for code in ("a = 1  # one", "# two\na = 1", "a = 2")]
    assert digests[0] == digests[1] != digests[2]


def test_the_table_shows_means_over_seeds_and_the_standard_error(monkeypatch):
    rows = [line("digits", "README", seed, accuracy) for seed, accuracy in enumerate((0.9, 1.0))]
    searched = [{**line("digits", "e2vpt", 0, 0.5), "learning_rate": 1, "validation_accuracy": 1}]
    monkeypatch.setattr(quickstart_check, "read_lines", lambda path: searched)
    table = quickstart_check.table([*rows, line("digits", "probe", 0, 0.8)])
    assert table.splitlines()[2] == "| digits | 80.0 (1) | 95.0 (2) | 4.0 | 50.0 |"
    assert table.splitlines()[3:] == ["| mean of 1 | 80.0 | 95.0 |  |  |", "| mean of 1 | 80.0 | 95.0 |  | 50.0 |"]


def test_a_mean_is_that_of_the_tasks_that_all_columns_have(monkeypatch):
    rows = [line("digits", "probe", 0, 0.8), line("solar", "probe", 0, 0.6), line("solar", "README", 0, 0.7)]
    monkeypatch.setattr(quickstart_check, "read_lines", lambda path: [])
    assert quickstart_check.table(rows).splitlines()[-1] == "| mean of 1 | 60.0 | 70.0 |  |  |"


@pytest.mark.training
@pytest.mark.parametrize("variant", ["", "unpruned", "rewound"])
def test_readme_runs_on_a_task(tmp_path, monkeypatch, variant):
    Dinov2Model(Dinov2Config(**DINOV2)).save_pretrained(tmp_path)
    check = quickstart_check.Check.__new__(quickstart_check.Check)
    check.args = argparse.Namespace(model=str(tmp_path), bf16=False, variant=variant)
    check.num_labels = 3
    images = [torch.randn(count, 3, 32, 32) for count in (24, 8, 9)]
    splits = [Inputs(pixels, (torch.arange(len(pixels)) % 3).tolist()) for pixels in images]
    check.train, check.validation, check.test = splits
    trained = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda trainer: trained.append(trainer) or train(trainer))
    row = check.readme(seed=3)
    assert 0 <= row["test_accuracy"] <= 1 and row["trained"] > 0
    assert trained[0].args.seed == 3
    reports = [c.report for c in trained[0].callback_handler.callbacks if isinstance(c, PruneRewindCallback)]
    assert [report is not None for report in reports] == ([] if variant == "unpruned" else [True])
    assert 0 <= check.probe(seed=3)["test_accuracy"] <= 1
