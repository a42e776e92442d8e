# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks run, each on a tiny model, and write what they measure."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def results_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a benchmark, `run(name, *arguments)`, and returns the lines that it has written."""

    def run(name: str, *arguments: str) -> list[dict[str, Any]]:
        output = tmp_path / "results.jsonl"
        monkeypatch.setattr(sys, "argv", [name, "--smoke", "--device", "cpu", "--output", str(output), *arguments])
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def test_speed_times_every_method(results_of: Run) -> None:
    results = results_of("speed")
    found = {(result["measured"], result["method"]) for result in results}
    forwards = {("forward", name) for name in ("plain", "e2vpt", "inserted", "lora", "e2vpt merged")}
    assert found == forwards | {("step", name) for name in ("class token", "e2vpt", "inserted", "lora", "full")}
    assert all(result["wall_ms"][1] > 0 for result in results)


def test_a_cached_prefix_is_timed_beside_images(results_of: Run) -> None:
    results = results_of("frozen_prefix")
    expected = {(method, kind) for method in ("e2vpt", "lora", "head alone") for kind in ("images", "cached")}
    assert {(result["trained"], result["method"]) for result in results} == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.processes
def test_memory_measures_a_forward_pass_and_a_training_step(results_of: Run) -> None:
    (result,) = results_of("memory", "--methods", "e2vpt")
    assert result["peak_mib"]["forward"] > 0
    assert result["peak_mib"]["step"] > 0


def test_scaling_times_every_point_of_an_axis_and_draws_the_cost_of_prompts(results_of: Run, tmp_path: Path) -> None:
    image = tmp_path / "scaling.png"
    results = results_of("scaling", "--figure", str(image))
    steps = {
        (result["num_visual_prompts"], result["num_kv_prompts"], result["method"])
        for result in results
        if result["measured"] == "step" and result["axis"] == "prompts"
    }
    assert steps == {(m, m // 2, name) for m in (2, 4) for name in ("lora", "class token", "e2vpt", "inserted")}
    assert {r["method"] for r in results if r["num_adapters"] == 2} == {"plain", "e2vpt", "e2vpt merged"}
    assert image.read_bytes().startswith(b"\x89PNG")


def test_the_profile_counts_fewer_operations_for_constants_than_for_prompts(results_of: Run) -> None:
    prompts, constants = results_of("profile_ops", "--methods", "e2vpt", "e2vpt merged")
    assert 0 < constants["forward"] < prompts["forward"] < prompts["step"]
    assert prompts["saved_mib"] > 0
