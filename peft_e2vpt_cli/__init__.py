# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The command line, `peft-e2vpt`. It is a package beside `peft_e2vpt`, whose import takes seconds because it imports PEFT.

One file for each command. None of them imports torch, transformers, PEFT or `peft_e2vpt` before it runs.
"""
