# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Measurements, each a module to run from the root folder: `python -m benchmarks.speed`."""
