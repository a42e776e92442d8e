# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`fgvc.py` on stand-ins."""

from __future__ import annotations

from itertools import product

import pytest

from tests.support.paper_programs import METHODS, smoke


pytestmark = pytest.mark.processes


def test_fgvc_runs_every_method_on_every_data_set(tmp_path):
    found, printed = smoke("fgvc", tmp_path, "--backbone", "vit", "--method", "all")
    final = {(record["task"], record["method"]): record for record in found if record["phase"] == "final"}
    assert list(final) == list(product(["cub", "nabirds", "flowers", "dogs", "cars"], METHODS))
    head, width, layers = 3 * 32 + 3, 32, 2
    for (_, method), record in final.items():
        if method == "e2vpt":
            assert head + (1 + 5) * width * layers / 2 <= record["trained"] <= head + (5 + 5) * width * layers
        elif method == "full":
            assert record["percent"] == 100
        else:
            assert record["trained"] == head + (5 * width * layers if method == "vpt-deep" else 0)
    assert "| vit | e2vpt | published | 89.22 | |" in printed and "| vit | e2vpt | here | -" not in printed
    assert (tmp_path / "tables.md").read_text() in printed
