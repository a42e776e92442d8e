# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The version of the package, by itself so that packaging can read it without importing torch."""

__version__ = "0.1.0"
