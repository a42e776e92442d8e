# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The programs with the paper's experiments, started on stand-ins as a user starts them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from json_lines import read_lines

from tests.support.paths import EXAMPLES
from tests.support.processes import launch


BACKBONES = ["vit", "swin", "mae", "mocov3"]
METHODS = ["e2vpt", "vpt-deep", "linear", "full"]
PHASES = ["grid", "grid", "prune", "final"]
ENVIRONMENT = {"PYTHONPATH": str(EXAMPLES.parent)}


def trainings(output_dir: Path) -> list[dict[str, Any]]:
    return read_lines(output_dir / "results.jsonl")


def smoke(benchmark: str, output_dir: Path, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    """The finished trainings and the printed text of a smoke run."""
    command = (sys.executable, str(EXAMPLES / f"{benchmark}.py"), "--smoke", "--use_cpu", "--disable_tqdm", "True")
    printed = launch(*command, "--output_dir", str(output_dir), *arguments, env=ENVIRONMENT)
    return trainings(output_dir), printed
