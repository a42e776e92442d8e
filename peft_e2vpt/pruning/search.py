# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Choosing how much to prune without training for every choice: `search_pruning`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ..distributed import is_sharded, sum_over_processes
from ..evaluation import batches, no_trace
from ..tuner.gates import GateOverride
from ..tuner.prompt_layers import active_prompt_layers, gates_on
from .importance import ImportanceScores
from .ranking import MIN_SEGMENTS, MIN_TOKENS, Gates, prune


RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Quality = Callable[[Any, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to prune and what it gives on validation data.

    Attributes:
        token_ratio: ratio of prompts pruned in every layer.
        segment_ratio: ratio of segments pruned in every prompt that stays.
        num_values: values of visual prompts that stay.
        quality: mean over the validation samples, the higher the better.
    """

    token_ratio: float
    segment_ratio: float
    num_values: int
    quality: float = float("nan")


@dataclass(frozen=True)
class PruningSearch:
    """The candidates of a search and the choice among them.

    Attributes:
        candidates: all that differ, from the least pruned on.
        chosen: index of the choice: the highest quality, of equal ones the most pruned.
        gates: the gates of the choice.
    """

    candidates: list[Candidate]
    chosen: int
    gates: Gates

    def __str__(self) -> str:
        lines = [f"{'tokens':>7}  {'segments':>8}  {'values':>9}  {'quality':>8}"]
        lines += [
            f"{c.token_ratio:>7.0%}  {c.segment_ratio:>8.0%}  {c.num_values:>9,}  {c.quality:>8.4f}"
            + ("  chosen" if i == self.chosen else "")
            for i, c in enumerate(self.candidates)
        ]
        return "\n".join(lines)


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """The labels of a validation batch.

    Raises:
        ValueError: it has none.
    """
    if "labels" not in batch:
        raise ValueError(
            f"Prunings are compared by their accuracy, but a validation batch holds only {', '.join(batch)}: let it "
            "hold labels, or call search_pruning with a quality(outputs, batch) that needs none."
        )
    labels: Tensor = batch["labels"]
    return labels


def default_quality(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Per sample (B,): whether the label is right, or for soft and multiple labels minus the binary cross entropy."""
    labels, logits = labels_of(batch), outputs["logits"].float()
    if labels.is_floating_point():
        return -F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").flatten(1).mean(1)
    correct: Tensor = logits.argmax(-1) == labels
    return correct.float()


def _distinct_candidates(
    scores: ImportanceScores,
    token_ratios: Sequence[float],
    segment_ratios: Sequence[float],
    widths: Sequence[int],
    bounds: dict[str, int],
) -> tuple[list[Candidate], list[Gates]]:
    candidates: list[Candidate] = []
    gates: list[Gates] = []
    for token_ratio in sorted(set(token_ratios) | {0.0}):
        for segment_ratio in sorted(set(segment_ratios) | {0.0}):
            new = prune(scores, token_ratio, segment_ratio, **bounds)
            if not any(torch.equal(new.segment, old.segment) for old in gates):
                candidates.append(Candidate(token_ratio, segment_ratio, new.num_values(widths)))
                gates.append(new)
    return candidates, gates


def _runs(token: Tensor, longest: int, alike: bool) -> Iterator[tuple[int, int]]:
    """Cuts candidates, given their token gates, into runs that share a batch; `alike` ones prune the same prompts."""
    start = 0
    while start < len(token):
        stop = start + 1
        while stop < min(start + longest, len(token)) and not (alike and not torch.equal(token[start], token[stop])):
            stop += 1
        yield start, stop
        start = stop


@torch.no_grad()
def search_pruning(
    model: nn.Module,
    scores: ImportanceScores,
    dataloader: Iterable[dict[str, Any]],
    *,
    token_ratios: Sequence[float] = RATIOS,
    segment_ratios: Sequence[float] = RATIOS,
    min_tokens: int = MIN_TOKENS,
    min_segments: int = MIN_SEGMENTS,
    quality: Quality = default_quality,
    max_rows: int = 64,
    adapter_name: str | None = None,
    seed: int | None = None,
) -> PruningSearch:
    """Tries every token ratio with every segment ratio (0 included) on validation data and chooses the best.

    Only forward passes, without training in between: several candidates share one batch, in which every sample has
    the gates of its candidate. Leaves the model as it was. Run by several processes, each on its share of the data,
    all get the same result.

    Args:
        model: a trained PEFT model with E2VPT.
        scores: importance of its prompts.
        dataloader: validation batches as the model takes them, with labels.
        token_ratios: ratios of prompts to prune in every layer.
        segment_ratios: ratios of segments to prune in every prompt that stays.
        min_tokens: prompts that stay in every layer at least.
        min_segments: segments that stay in every prompt at least.
        quality: a function of the model's output and the batch that returns one number per sample (B,), the higher
            the better; by default whether the label is right.
        max_rows: samples times candidates in one forward pass.
        adapter_name: which adapter, by default the active one.
        seed: makes random augmentations of the data repeatable.

    Raises:
        ValueError: the scores do not fit the model, the dataloader is empty (of a sharded model, in one process), or
            its batches have no labels.
        TypeError: a batch is not a dictionary.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    adapter_name, layers = active_prompt_layers(model, adapter_name)
    if len(scores.token) not in (1, len(layers)):
        raise ValueError(f"The model has {len(layers)} prompted layers, but the scores are for {len(scores.token)}.")
    config = layers[0].e2vpt_config[adapter_name]
    removes = config.pruned_prompts == "remove"
    leave_sequence = removes and config.visual_prompt_mode == "shallow"  # for all samples of a batch or for none
    on = "attention" if removes and not leave_sequence else "embedding"
    device = layers[0].e2vpt_token_gates[adapter_name].device
    widths = [layer.site.width for layer in layers]
    bounds = {"min_tokens": min_tokens, "min_segments": min_segments}
    candidates, gates = _distinct_candidates(scores, token_ratios, segment_ratios, widths, bounds)
    # of every layer, also where all have the same: (candidates, layers, M) and (candidates, layers, M, R)
    token = torch.stack([g.token for g in gates]).float().to(device).expand(-1, len(layers), -1)
    segment = torch.stack([g.segment for g in gates]).float().to(device).expand(-1, len(layers), -1, -1)
    totals = torch.zeros(len(candidates) + 1, dtype=torch.float64)  # the last one counts samples
    with no_trace(model, dataloader, seed), gates_on(on, layers):
        try:
            for batch in batches(dataloader, device, "Comparing prunings", in_step=is_sharded(model)):
                size, group = batch.size, max(max_rows // batch.largest, 1)
                for start, stop in _runs(token, group, alike=leave_sequence):
                    copies = {
                        name: torch.cat([value] * (stop - start)) if isinstance(value, Tensor) else value
                        for name, value in batch.inputs.items()
                    }
                    if leave_sequence:
                        layers[0].e2vpt_kept_tokens[adapter_name] = token[start, 0].nonzero().flatten()
                    for i, layer in enumerate(layers):
                        layer.gate_override = GateOverride(
                            token[start:stop, i].repeat_interleave(size, dim=0),
                            segment[start:stop, i].repeat_interleave(size, dim=0),
                            on,
                        )
                    measured = quality(model(**copies), copies)
                    if measured.numel() != (stop - start) * size:
                        raise ValueError(
                            f"quality returns one number per sample, ({(stop - start) * size},), got shape "
                            f"{tuple(measured.shape)}."
                        )
                    if batch.counts:
                        totals[start:stop] += measured.view(stop - start, size).sum(1).cpu()
                totals[-1] += size if batch.counts else 0
        finally:
            for layer in layers:
                layer.gate_override = None
                layer.refresh_gates()
    totals = sum_over_processes(totals, device)
    if not totals[-1]:
        raise ValueError("The dataloader gave no validation sample to compare prunings with.")
    candidates = [replace(c, quality=float(q)) for c, q in zip(candidates, totals[:-1] / totals[-1], strict=True)]
    chosen = max(range(len(candidates)), key=lambda i: (candidates[i].quality, -candidates[i].num_values))
    return PruningSearch(candidates, chosen, gates[chosen])
