# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Scripts to run, `python examples/finetune.py`, whose functions `benchmarks` share."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parent))  # they import each other as siblings, as scripts do
