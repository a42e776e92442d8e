# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The table of searches holds what the result lines hold."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from benchmarks import search_gain
from examples.json_lines import read_lines


def line(trials: int, accuracy: float, **more: Any) -> dict[str, Any]:
    shared = {"task": "digits", "method": "e2vpt", "seed": 0, "trials": trials}
    return {**shared, "test_accuracy": accuracy, "cpu_seconds": 30 * (1 + trials), **more}


def test_a_row_compares_a_search_with_the_usual_settings():
    settings = {"learning_rate": 0.0026, "num_visual_prompts": 4, "layers": "last half"}
    search = {"settings": settings, "pruned": 3}
    lines = [line(0, 0.891), line(0, 0.5, task="count"), line(16, 0.912, search=search)]
    _, _, row = search_gain.table(lines).splitlines()
    chosen = "rate 2.6e-3, 4 visual prompts, layers: last half"
    assert row == f"| digits | e2vpt | 16, 3 | 89.1 | 91.2 | {chosen} | 8.5, 0.5 |"


def test_the_results_in_the_repository_are_those_of_the_page(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["search_gain", "--table"])
    search_gain.main()
    printed = capsys.readouterr().out
    page = (search_gain.ROOT / "docs" / "settings.md").read_text()
    assert read_lines(search_gain.RESULTS) and printed in page


def test_a_task_is_written_as_folders_of_classes(tmp_path):
    folder = search_gain.write_images("count", tmp_path, 5)
    assert len(list(folder.glob("train/*/*.png"))) == 5
    assert len(list(folder.glob("val/*/*.png"))) == 200 and len(list(folder.glob("test/*/*.png"))) == 1000


def test_an_unknown_task_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["search_gain", "digit"])
    with pytest.raises(SystemExit):
        search_gain.main()
    assert "there is no task digit: choose from digits" in capsys.readouterr().err
