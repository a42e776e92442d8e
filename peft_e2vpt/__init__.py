# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""E2VPT, effective and efficient visual prompt tuning, as a PEFT method. Importing this package registers it."""
# ruff: noqa: E402

from .requirements import check_requirements


check_requirements()  # before the imports below, which fail less clearly with old versions

from ._former_paths import install as keep_former_paths
from .attention_maps import AttentionMap, PromptAttention, attention_maps, prompt_attention
from .hub.companion import AdapterCompanion
from .hub.loading import load
from .hub.pipelines import pipeline
from .hub.upload import push_to_hub
from .pruning.callback import PruneRewindCallback
from .pruning.importance import ImportanceScores, score_prompts
from .pruning.quality import ModelQuality
from .pruning.ranking import Gates, apply_gates, prune, prune_to_budget
from .pruning.report import PruningReport
from .pruning.rewinding import redraw, rewind, trained_tensors
from .pruning.search import PruningSearch, search_pruning
from .registration import register
from .training.callback import RecipeCallback
from .training.head_start import fold_heads, start_heads
from .training.optimizer import create_e2vpt_optimizer, parameter_groups, warn_in_a_trainer
from .training.prefix import cache_frozen_prefix, uncache_frozen_prefix
from .tuner.config import E2VPTConfig
from .tuner.layer import E2VPTLayer
from .tuner.model import E2VPTModel
from .tuner.prompt_layers import PromptLayers
from .tuner.summary import PromptSummary
from .version import __version__


register(E2VPTConfig, E2VPTModel)
keep_former_paths()
E2VPTConfig.companion = AdapterCompanion()
PromptLayers.when_training_begins = warn_in_a_trainer


__all__ = [
    "AttentionMap",
    "E2VPTConfig",
    "E2VPTLayer",
    "E2VPTModel",
    "Gates",
    "ImportanceScores",
    "ModelQuality",
    "PromptAttention",
    "PromptSummary",
    "PruneRewindCallback",
    "PruningReport",
    "PruningSearch",
    "RecipeCallback",
    "__version__",
    "apply_gates",
    "attention_maps",
    "cache_frozen_prefix",
    "create_e2vpt_optimizer",
    "fold_heads",
    "load",
    "parameter_groups",
    "pipeline",
    "prompt_attention",
    "prune",
    "prune_to_budget",
    "push_to_hub",
    "redraw",
    "rewind",
    "score_prompts",
    "search_pruning",
    "start_heads",
    "trained_tensors",
    "uncache_frozen_prefix",
]
