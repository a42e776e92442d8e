# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Saved adapters: loading, uploading, their cards, and checkpoints of the released code."""

from .card import AdapterFacts, Location, write_card
from .companion import AdapterCompanion, facts_of
from .conversion import read_checkpoint
from .loading import load
from .pipelines import pipeline
from .upload import push_to_hub


__all__ = [
    "AdapterCompanion",
    "AdapterFacts",
    "Location",
    "facts_of",
    "load",
    "pipeline",
    "push_to_hub",
    "read_checkpoint",
    "write_card",
]
