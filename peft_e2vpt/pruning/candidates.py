# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Pruning candidates, and a model that takes their gates: what a search prepares before it measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..tuner.gates import GateOverride
from ..tuner.layer import E2VPTLayer
from ..tuner.prompt_layers import active_prompt_layers
from .importance import ImportanceScores
from .ranking import Gates, prune


@dataclass(frozen=True)
class Candidate:
    """One way to prune and what it gives on validation data.

    Attributes:
        token_ratio: ratio of prompts pruned in every layer.
        segment_ratio: ratio of segments pruned in every prompt that stays.
        num_values: values of visual prompts that stay.
        quality: measured on the validation data, the higher the better.
    """

    token_ratio: float
    segment_ratio: float
    num_values: int
    quality: float = float("nan")


class CandidateTrial:
    """The candidates of a search, and the model that they are tried in."""

    def __init__(
        self,
        model: nn.Module,
        scores: ImportanceScores,
        token_ratios: Sequence[float],
        segment_ratios: Sequence[float],
        bounds: dict[str, int],
        adapter_name: str | None,
    ) -> None:
        self.adapter_name, self.layers = active_prompt_layers(model, adapter_name)
        if len(scores.token) not in (1, len(self.layers)):
            raise ValueError(
                f"The model has {len(self.layers)} prompted layers, but the scores are for {len(scores.token)}."
            )
        config = self.layers[0].e2vpt_config[self.adapter_name]
        removes = config.pruned_prompts == "remove"
        # whether prompts leave the sequence, for all samples of a batch or for none
        self.alike = removes and config.visual_prompt_mode == "shallow"
        self.on = "attention" if removes and not self.alike else "embedding"
        self.device = self.layers[0].e2vpt_token_gates[self.adapter_name].device
        self.candidates, self.gates = _distinct_candidates(scores, token_ratios, segment_ratios, self.layers, bounds)
        # of every layer, also where all have the same: (candidates, layers, M) and (candidates, layers, M, R)
        num = len(self.layers)
        self.token = torch.stack([g.token for g in self.gates]).float().to(self.device).expand(-1, num, -1)
        self.segment = torch.stack([g.segment for g in self.gates]).float().to(self.device).expand(-1, num, -1, -1)

    def __len__(self) -> int:
        return len(self.candidates)

    @contextmanager
    def applied(self, chosen: Sequence[int], size: int) -> Iterator[None]:
        """Gives every one of `size` samples per candidate its gates; a single candidate's are those of any sample."""
        repeats = size if len(chosen) > 1 else 1
        index = torch.tensor(list(chosen), device=self.device)
        token = self.token[index].repeat_interleave(repeats, dim=0)
        segment = self.segment[index].repeat_interleave(repeats, dim=0)
        try:
            kept = token[0, 0].nonzero().flatten() if self.alike else None
            for i, layer in enumerate(self.layers):
                layer.gate_override = GateOverride(token[:, i], segment[:, i], self.on, kept)
            yield
        finally:
            for layer in self.layers:
                layer.gate_override = None

    def runs(self, longest: int) -> Iterator[range]:
        """Cuts the candidates into runs that share a batch; in a shallow adapter they prune the same prompts."""
        start = 0
        while start < len(self):
            stop = start + 1
            while stop < min(start + longest, len(self)):
                if self.alike and not torch.equal(self.token[start], self.token[stop]):
                    break
                stop += 1
            yield range(start, stop)
            start = stop


def _distinct_candidates(
    scores: ImportanceScores,
    token_ratios: Sequence[float],
    segment_ratios: Sequence[float],
    layers: Sequence[E2VPTLayer],
    bounds: dict[str, int],
) -> tuple[list[Candidate], list[Gates]]:
    widths = [layer.site.width for layer in layers]
    candidates: list[Candidate] = []
    gates: list[Gates] = []
    for token_ratio in sorted(set(token_ratios) | {0.0}):
        for segment_ratio in sorted(set(segment_ratios) | {0.0}):
            new = prune(scores, token_ratio, segment_ratio, **bounds)
            if not any(torch.equal(new.segment, old.segment) for old in gates):
                candidates.append(Candidate(token_ratio, segment_ratio, new.num_values(widths)))
                gates.append(new)
    return candidates, gates
