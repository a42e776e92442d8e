# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Figures of prompts, attention and runs; they need the extra `plot` (matplotlib, scikit-learn).

| function | what it shows |
|---|---|
| `plot_pruning` | importance of every prompt, and the segments that were kept |
| `plot_prompt_attention` | how much attention goes to prompts, layer by layer |
| `plot_attention_maps` | where in an image attention goes, with and without prompts |
| `plot_run` | losses, accuracies and learning rate of a training run with its phases |
| `plot_methods` | accuracy of methods against their trained parameters |
| `FiguresCallback` | attention of a few images at every evaluation, in TensorBoard or Weights & Biases |
| `plot_embeddings` | class-token embeddings in the plane of their principal components |

Each returns a matplotlib `Figure`, which `figure.savefig(path)` writes and a notebook shows. `examples/figures.py`
draws all of them from a run of `examples/finetune.py`.
"""

from .attention import plot_attention_maps, plot_prompt_attention, rollout
from .canvas import DARK
from .embeddings import plot_embeddings, principal_components
from .methods import plot_methods
from .pruning import plot_pruning
from .run import plot_run
from .tracking import FiguresCallback


__all__ = [
    "DARK",
    "FiguresCallback",
    "plot_attention_maps",
    "plot_embeddings",
    "plot_methods",
    "plot_prompt_attention",
    "plot_pruning",
    "plot_run",
    "principal_components",
    "rollout",
]
