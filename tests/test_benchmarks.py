# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks run, each on a tiny model, and write what they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def results_of(script: str, output: Path, *arguments: str) -> list[dict]:
    command = [sys.executable, str(BENCHMARKS / script), "--smoke", "--device", "cpu", "--output", str(output)]
    subprocess.run([*command, *arguments], check=True)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_speed_times_every_method(tmp_path: Path) -> None:
    results = results_of("speed.py", tmp_path / "speed.jsonl")
    found = {(result["measured"], result["method"]) for result in results}
    forwards = {("forward", name) for name in ("plain", "e2vpt", "inserted", "lora", "e2vpt merged")}
    assert found == forwards | {("step", name) for name in ("e2vpt", "inserted", "lora", "full")}
    assert all(result["wall_ms"][1] > 0 for result in results)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_measures_a_forward_pass_and_a_training_step(tmp_path: Path) -> None:
    (result,) = results_of("memory.py", tmp_path / "memory.jsonl", "--methods", "e2vpt")
    assert result["peak_mib"]["forward"] > 0
    assert result["peak_mib"]["step"] > 0
