# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The API page of the documents leaves no public name out."""

from __future__ import annotations

import re
from pathlib import Path

import peft_e2vpt


PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def test_every_public_name_is_on_the_api_page() -> None:
    documented = re.findall(r"^\.\. auto(?:class|function|data):: (\w+)", PAGE.read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(peft_e2vpt.__all__)
