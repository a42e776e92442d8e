# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`python -m peft_e2vpt`: the same as `peft-e2vpt`, which starts faster."""

from peft_e2vpt_cli.app import main


main("python -m peft_e2vpt")
