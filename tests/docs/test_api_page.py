# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The API page of the documents leaves no public name out."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

import peft_e2vpt
from peft_e2vpt import export, images, plotting
from tests.support.paths import DOCS


PAGE = DOCS / "api.md"


@pytest.mark.parametrize("module", [peft_e2vpt, export, images, plotting], ids=lambda module: module.__name__)
def test_every_public_name_is_on_the_api_page(module: ModuleType) -> None:
    documented: dict[str, list[str]] = {}
    for directive, name in re.findall(r"^\.\. (\w+):: ([\w.]+)", PAGE.read_text(), re.MULTILINE):
        if directive == "currentmodule":
            current = documented.setdefault(name, [])
        elif directive.startswith(("auto", "data")):
            current.append(name)
    assert sorted(documented[module.__name__]) == sorted(module.__all__)
