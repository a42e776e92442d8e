# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`python -m peft_e2vpt_cli`."""

from .app import main


main("python -m peft_e2vpt_cli")
