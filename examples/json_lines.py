# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Results as a file with a line of JSON per training, which grows and is never rewritten."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """
    Returns the rows of a file, none if there is no file. A line that is not JSON, as a run leaves it that is killed
    while it writes, is left out with a warning.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            warnings.warn(f"Line {number} of {path} is incomplete: its training runs again.", stacklevel=2)
    return rows


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Adds a row, at once, and behind a line that is incomplete on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write(("\n" if incomplete else "") + json.dumps(row) + "\n")
