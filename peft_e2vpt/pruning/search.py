# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Choosing how much to prune without training for every choice: `search_pruning`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers.utils import logging

from ..distributed import is_distributed, is_sharded, refuse_flat_parameters, sum_over_processes
from ..evaluation import Batch, batches, no_trace
from .candidates import Candidate, CandidateTrial
from .importance import ImportanceScores
from .quality import BatchQuality, ModelQuality, Quality, is_joined
from .ranking import MIN_SEGMENTS, MIN_TOKENS, Gates


logger = logging.get_logger(__name__)

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


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


def _repeated(inputs: dict[str, Any], times: int, size: int) -> dict[str, Any]:
    """A batch several times over, one below the other; what is not one entry per sample stays as it is."""

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.cat([value] * times) if value.dim() else value
        return value * times if isinstance(value, (list, tuple)) and len(value) == size else value

    return inputs if times == 1 else {name: repeat(value) for name, value in inputs.items()}


def _measure(
    trial: CandidateTrial, model: nn.Module, batch: Batch, chosen: Sequence[int], quality: BatchQuality
) -> tuple[Tensor, Any]:
    """Measures candidates on one batch together: numbers (candidates, B), or () where the batch has only one."""
    count = len(chosen)
    with trial.applied(chosen, batch.size):
        values, outputs = quality(model, _repeated(batch.inputs, count, batch.size))
    if values.dim() == 0 and count == 1:
        return values, outputs
    if values.shape != (count * batch.size,):
        raise ValueError(
            f"quality returns one number per sample, ({count * batch.size},), or one for the batch, got shape "
            f"{tuple(values.shape)}."
        )
    return values.view(count, batch.size), outputs


def _may_share(trial: CandidateTrial, model: nn.Module, batch: Batch, quality: BatchQuality, max_rows: int) -> bool:
    """Whether candidates may share a forward pass: whether samples of a batch leave each other alone.

    Tried on one batch: what two candidates give alone has to be what they give together, with a copy of the first
    beside them if there is room.
    """
    order = [0, 0, 1] if max_rows >= 3 * batch.largest else [0, 1]
    pair = 0, next(iter(trial.runs(len(trial))))[-1]
    alone, outputs = [], []
    for candidate in pair:
        values, output = _measure(trial, model, batch, [candidate], quality)
        if values.dim() == 0:
            return False
        alone.append(values[0])
        outputs.append(output)
    try:
        together, joined = _measure(trial, model, batch, [pair[i] for i in order], quality)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        if should_reduce_batch_size(error):
            raise
        logger.info(f"Pruning candidates are tried one at a time, since a batch cannot hold copies of itself: {error}")
        return False
    same = is_joined(together.flatten(), [alone[i] for i in order], batch.size) and is_joined(
        joined, [outputs[i] for i in order], batch.size
    )
    if not same:
        logger.info("Pruning candidates are tried one at a time, since samples of a batch depend on each other.")
    return same


def _measure_in_batches(
    trial: CandidateTrial, model: nn.Module, dataloader: Iterable[Any], quality: BatchQuality, max_rows: int
) -> list[float]:
    """The mean quality of every candidate over the batches of all processes."""
    totals = torch.zeros(len(trial) + 1, dtype=torch.float64)  # the last one counts samples
    sharded = is_sharded(model)
    stream = batches(dataloader, trial.device, "Comparing pruning candidates", in_step=sharded)
    first = next(stream, None)
    shares = False
    if first is not None:
        has_room = max_rows >= 2 * first.largest and len(trial) > 1
        shares = has_room and _may_share(trial, model, first, quality, max_rows)
        if sharded and is_distributed():  # all processes make the same forward passes
            shares = not sum_over_processes(torch.tensor([float(not shares)]), trial.device).item()
    for batch in chain([first] if first is not None else [], stream):
        longest = max(max_rows // batch.largest, 1) if shares else 1
        for run in trial.runs(longest):
            values, _ = _measure(trial, model, batch, run, quality)
            if batch.counts:
                summed = values.sum(-1) if values.dim() else values * batch.size
                totals[run.start : run.stop] += summed.cpu()
        totals[-1] += batch.size if batch.counts else 0
    totals = sum_over_processes(totals, trial.device)
    if not totals[-1]:
        raise ValueError("The dataloader gave no validation sample to compare prunings with.")
    means: list[float] = (totals[:-1] / totals[-1]).tolist()
    return means


def _choose(trial: CandidateTrial, qualities: Sequence[float]) -> PruningSearch:
    """The best candidate, of equal ones the most pruned; one whose quality is not a number is never chosen."""
    candidates = [replace(c, quality=q) for c, q in zip(trial.candidates, qualities, strict=True)]
    numbers = [i for i, candidate in enumerate(candidates) if not math.isnan(candidate.quality)]
    if not numbers:
        logger.warning("The quality of every pruning candidate is not a number (NaN), so nothing is pruned.")
    chosen = max(numbers, key=lambda i: (candidates[i].quality, -candidates[i].num_values), default=0)
    return PruningSearch(candidates, chosen, trial.gates[chosen])


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
    quality: Quality | BatchQuality | ModelQuality | None = None,
    max_rows: int = 64,
    adapter_name: str | None = None,
    seed: int | None = None,
) -> PruningSearch:
    """Tries every token ratio with every segment ratio (0 included) on validation data and chooses the best.

    Only forward passes, without training in between. Where the samples of a batch leave each other alone, several
    candidates share one, in which every sample has the gates of its candidate; whether they do is tried on the first
    batch. Leaves the model as it was. Run by several processes, each on its share of the data, all get the same
    result.

    Example:

        >>> scores = score_prompts(model, train_loader)
        >>> search = search_pruning(model, scores, validation_loader)
        >>> print(search)
        >>> apply_gates(model, search.gates)

    Args:
        model: a trained PEFT model with E2VPT.
        scores: importance of its prompts.
        dataloader: validation batches as the model takes them, with labels.
        token_ratios: ratios of prompts to prune in every layer.
        segment_ratios: ratios of segments to prune in every prompt that stays.
        min_tokens: prompts that stay in every layer at least.
        min_segments: segments that stay in every prompt at least.
        quality: a function of the model's output and the batch that returns one number per sample (B,) or one for the
            batch, the higher the better. A `ModelQuality` measures the model as a whole instead and leaves the
            dataloader alone. By default accuracy where every sample has a single label, else minus the loss.
        max_rows: samples times candidates in one forward pass.
        adapter_name: which adapter, by default the active one.
        seed: makes random augmentations of the data repeatable.

    Raises:
        ValueError: the scores do not fit the model, FSDP1 shards it, the dataloader is empty (of a sharded model, in
            one process), or its batches have neither labels nor loss.
        TypeError: a batch is not a dictionary.
    """
    refuse_flat_parameters(model)
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    bounds = {"min_tokens": min_tokens, "min_segments": min_segments}
    trial = CandidateTrial(model, scores, token_ratios, segment_ratios, bounds, adapter_name)
    if isinstance(quality, ModelQuality):
        found = []
        for i in range(len(trial)):
            with no_trace(model, dataloader, seed), trial.applied([i], 1):
                found.append(quality(model))
        return _choose(trial, found)
    if not isinstance(quality, BatchQuality):
        quality = BatchQuality(quality)
    with no_trace(model, dataloader, seed):
        return _choose(trial, _measure_in_batches(trial, model, dataloader, quality, max_rows))
