# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The tables of the recipes: means and spread over seeds, and only what the result lines hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import recipes_table


def line(method: str, seed: int, accuracy: float, seconds: float, recipe: str = "video") -> dict[str, Any]:
    return {
        "recipe": recipe,
        "method": method,
        "seed": seed,
        "trained": 50,
        "parameters": 1000,
        "metrics": {"accuracy": accuracy},
        "seconds": seconds,
        "cpu_seconds": 2 * seconds,
        "image_size": 56,
        "epochs": 4,
        "batch_size": 16,
        "dtype": "float32",
        "machine": "x86_64, 2 cores, 2 threads",
        "versions": {"torch": "2.13.0"},
        "date": "2026-11-26",
    }


LINES = [
    line("lora", 0, 0.5, 30),
    line("e2vpt", 0, 0.7, 20),
    line("lora", 1, 0.7, 25),
    line("lora", 0, 0.1, 9, "other"),
]


def test_a_table_has_means_spread_and_the_least_times_of_each_method():
    table = recipes_table.table(LINES[:3])
    assert "| lora | 50 | 5.00 | 0.600 (0.141) | 25 | 50 |" in table
    assert "| e2vpt | 50 | 5.00 | 0.700 | 20 | 40 |" in table


def test_the_command_shows_the_recipe_that_was_asked_for(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    monkeypatch.setattr(sys, "argv", ["recipes_table", str(tmp_path / "lines.jsonl"), "--recipe", "video"])
    recipes_table.main()
    shown = capsys.readouterr().out
    assert shown.startswith("### video") and "other" not in shown
    assert "3 trainings, seeds 0, 1; 56 px, 4 epochs, batches of 16, float32; x86_64, 2 cores, 2 threads" in shown


def test_the_summary_has_a_line_a_recipe_and_an_empty_cell_for_what_has_not_run():
    shown = recipes_table.summary(LINES).splitlines()
    assert shown[0] == "| recipe | metric | lora | e2vpt |"
    assert shown[2:] == ["| video | accuracy | 0.600 (0.141) | 0.700 |", "| other | accuracy | 0.100 |  |"]
