# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of many adapters beside LoRA, on a tiny model, and the tables that come from its lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


pytest.importorskip("onnxscript", reason="needs the extra `export`")
pytest.importorskip("onnxruntime", reason="needs the extra `export`")
from benchmarks import serving, serving_table  # noqa: E402


METHODS = {
    *("plain, onnx", "plain, onnx int8", "plain, torch", "e2vpt, onnx", "e2vpt, onnx int8", "e2vpt, torch"),
    *("lora, torch", "lora, onnx inputs", "lora, onnx merged"),
}


@pytest.mark.compile
@pytest.mark.slow
def test_all_ways_to_serve_take_turns_and_their_lines_make_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "serving.jsonl"
    monkeypatch.setattr(sys, "argv", ["serving", "--smoke", "--device", "cpu", "--output", str(output)])
    serving.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    batches = [row for row in rows if row["measured"] == "batch"]
    assert {(row["num_adapters"], row["method"]) for row in batches} == {(n, m) for n in (1, 3) for m in METHODS}
    assert all(row["wall_ms"][1] > 0 for row in batches)
    memory = {row["method"]: row for row in rows if row["measured"] == "memory"}
    assert memory.keys() == METHODS
    assert memory["e2vpt, onnx"]["adapter_bytes"] < memory["lora, onnx merged"]["adapter_bytes"]
    assert memory["plain, onnx"]["add_ms"] is None
    assert memory["e2vpt, onnx"]["add_ms"] > 0

    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["serving_table", str(output)])
    serving_table.main()
    printed = capsys.readouterr().out
    assert "| batch of 2 | 1 adapter | 3 adapters |" in printed
    assert printed.count("| e2vpt, onnx int8 |") == 2  # times, memory


def test_the_tables_of_8_bit_name_every_graph_and_task() -> None:
    timed = {"measured": "eight_bit", "graph": "static", "megabytes": 24.0, "times_as_fast": [2.0, 1.5, 2.5]}
    told = {"task": "solar", "same_label": 0.97, "same_label_alone": 1.0, "test_accuracy": 0.79, "refitted": 0.8}
    told["trained_on_rounded"] = 0.78
    rows = [
        {**timed, "batch_size": 1},
        {**timed, "batch_size": 32},
        {"measured": "eight_bit", "graph": "static", **told},
    ]
    table = serving_table.tables_of_eight_bit(rows)
    assert "| static | 24.0 | 2.00 (1.50 to 2.50) | 2.00 (1.50 to 2.50) |" in table
    assert "| solar | static | 97.0 % | 100.0 % | 79.0 % | 78.0 % | 80.0 % |" in table
