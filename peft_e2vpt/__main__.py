# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`python -m peft_e2vpt`."""

from .cli import app


app(prog_name="python -m peft_e2vpt")
