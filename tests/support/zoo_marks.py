# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The marks of tests that are parametrised over the models of `zoo.py`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import zoo


ONE_OF_EACH_KIND = {"vit", "swin", "sam_vision", "hiera", "vitdet", "cvt", "levit", "bridgetower_vision"}


def marks_of(name: str) -> list[Any]:
    marks = [] if name in ONE_OF_EACH_KIND else [pytest.mark.thorough]
    return [*marks, pytest.mark.timm] if zoo.is_timm(name) else marks


def parameters(names: list[str]) -> list[Any]:
    """The names, those of timm's models and all but one of each kind with their marks."""
    return [pytest.param(name, marks=marks_of(name)) for name in names]
