# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The command line, `peft-e2vpt`, one file for each command.

It is a package beside `peft_e2vpt`, because importing that one imports PEFT and takes seconds. Nothing here imports
torch, transformers, PEFT or `peft_e2vpt` before a command that needs them runs.
"""
