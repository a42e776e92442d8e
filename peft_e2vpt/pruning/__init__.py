# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Scoring, pruning and rewinding visual prompts (paper section 3.3), alone or inside one Trainer run."""
