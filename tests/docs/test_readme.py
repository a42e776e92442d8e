# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""README.md is short, and what it names is there."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import ROOT


TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_read_in_a_minute_and_has_one_table_of_numbers_and_one_figure() -> None:
    assert len(TEXT.splitlines()) <= 150
    assert len(re.findall(r"^\|[-:|]*-:[-:|]*\|$", TEXT, re.MULTILINE)) == 1
    assert len(re.findall(r"!\[", TEXT)) == 1


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT))))
def test_what_readme_links_to_is_there(link: str) -> None:
    assert (ROOT / link).exists()


def test_running_and_testing_take_one_line_each() -> None:
    lines = [line for line in TEXT.splitlines() if line.startswith("python3 -m venv .venv && ")]
    assert [line.split(" && ")[-1].split()[1:] for line in lines] == [
        ["examples/finetune.py", "--prune"],
        ["-m", "pytest", "-n", "2"],
    ]
