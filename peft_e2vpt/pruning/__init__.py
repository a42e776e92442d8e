# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Scoring, pruning and rewinding visual prompts (paper section 3.3), alone or inside one Trainer run."""

from .callback import PruneRewindCallback
from .importance import ImportanceScores, score_prompts
from .quality import BatchQuality, ModelQuality, Quality
from .ranking import (
    Gates,
    apply_gates,
    check_ratio,
    current_gates,
    number_to_prune,
    prune,
    prune_to_budget,
    prune_to_percentage,
)
from .report import PruningReport
from .rewinding import redraw, rewind, trained_tensors
from .search import PruningSearch, search_pruning


__all__ = [
    "BatchQuality",
    "Gates",
    "ImportanceScores",
    "ModelQuality",
    "PruneRewindCallback",
    "PruningReport",
    "PruningSearch",
    "Quality",
    "apply_gates",
    "check_ratio",
    "current_gates",
    "number_to_prune",
    "prune",
    "prune_to_budget",
    "prune_to_percentage",
    "redraw",
    "rewind",
    "score_prompts",
    "search_pruning",
    "trained_tensors",
]
