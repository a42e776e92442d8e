# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Where the files lie that tests read or run."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
GOLDEN = ROOT / "tests" / "golden"
