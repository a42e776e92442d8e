# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The pages on faults and on security name tests that there are."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import ROOT


@pytest.mark.parametrize("page", ["docs/reliability.md", "SECURITY.md"])
def test_every_test_that_a_page_names_is_there(page: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / page).read_text(encoding="utf-8"))
    assert named
    for file, test in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {test}" in text, f"{file} has no {test}"


def test_at_least_sixty_faults_are_provoked() -> None:
    rows = re.findall(r"^\| .* \|$", (ROOT / "docs/reliability.md").read_text(encoding="utf-8"), flags=re.M)
    assert len([row for row in rows if "`tests/" in row]) >= 60
