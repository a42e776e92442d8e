# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The table of fixed rates chooses on some tasks and reports on the others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import fixed_rate_table


def line(method: str, task: str, rate: float, validation: float, test: float, seed: int = 0) -> dict[str, Any]:
    return {
        "method": method,
        "task": task,
        "seed": seed,
        "learning_rate": rate,
        "validation_accuracy": validation,
        "test_accuracy": test,
    }


ROWS = [
    line("e2vpt", "digits", 0.1, 0.5, 0.1),
    line("e2vpt", "digits", 1.0, 0.9, 0.2),
    line("e2vpt", "emoji", 0.1, 0.9, 0.8),
    line("e2vpt", "emoji", 1.0, 0.1, 0.3),
    line("e2vpt", "digits", 0.1, 1.0, 1.0, seed=1),
    line("lora", "digits", 1.0, 0.9, 0.2),
    line("lora", "emoji", 1.0, 0.9, 0.2),
]


def test_the_rate_is_chosen_by_validation_on_the_chosen_tasks_alone():
    table = fixed_rate_table.fixed_table(ROWS, ["e2vpt"], ["digits"], ["emoji"])
    assert table.splitlines()[-1] == "| e2vpt | 1 | 30.0 | 30.0 | 50.0 |"


def test_the_curve_is_the_mean_over_tasks_with_the_first_seed():
    table = fixed_rate_table.curve_table(ROWS, ["e2vpt", "lora"], ["digits", "emoji"])
    assert table.splitlines()[0] == "| method | 0.1 | 1 |"
    assert table.splitlines()[-2:] == ["| e2vpt | 45.0 | 25.0 |", "| lora |  | 20.0 |"]


def test_methods_without_a_search_are_left_out():
    tasks = ["digits", "emoji"]
    runs = {name: fixed_rate_table.runs_of(ROWS, name) for name in ("e2vpt", "lora")}
    assert [name for name in runs if fixed_rate_table.searches(runs[name], tasks)] == ["e2vpt"]


def test_a_task_that_was_not_run_counts_in_the_figure_with_the_rate_before(tmp_path):
    rows = [row for row in ROWS if row["method"] == "e2vpt" and (row["task"], row["learning_rate"]) != ("emoji", 1.0)]
    points = fixed_rate_table.curve(fixed_rate_table.runs_of(rows, "e2vpt"), ["digits", "emoji"])
    assert points == [(0.1, pytest.approx(45), True), (1.0, pytest.approx(50), False)]
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(json.dumps(row) for row in ROWS))
    fixed_rate_table.main([str(results), "--chosen_on", "digits", "--figure", str(tmp_path / "rates.png")])
    assert {path.name for path in tmp_path.glob("*.png")} == {"rates.png", "rates-dark.png"}
