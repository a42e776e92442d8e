# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How the rows of several prompts come together: side by side for all samples, or another adapter for every sample."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import Rows


class MixedBatch(NamedTuple):
    """Which adapter every sample of a batch has.

    Attributes:
        names: the adapters of the batch, each once, in the order of the samples; `"__base__"` has no rows.
        choice: (B,), the place in `names` of every sample's adapter.
    """

    names: tuple[str, ...]
    choice: Tensor


def side_by_side(parts: list[Rows]) -> Rows | None:
    """Joins rows (1 or B, H, P_i, d) that all samples see to (1 or B, H, P, d); those behind stay behind."""
    if len(parts) < 2:
        return parts[0] if parts else None
    batch = max(rows.key.shape[0] for rows in parts)
    dtype = parts[-1].key.dtype
    num_behind = sum(rows.num_behind for rows in parts)
    if num_behind:
        halves = [_halves(rows) for rows in parts]
        parts = [before for before, _ in halves] + [behind for _, behind in halves]

    def joined(name: str) -> Tensor:
        tensors = [getattr(rows, name).to(dtype) for rows in parts]
        return torch.cat([t if len(t) == batch else t.expand(batch, -1, -1, -1) for t in tensors], dim=2)

    bias = None
    if any(rows.score_bias is not None for rows in parts):
        biases = [_zero_bias(rows) if rows.score_bias is None else rows.score_bias for rows in parts]
        bias = torch.cat([part.expand(batch, -1) for part in biases], dim=1)
    return Rows(joined("key"), joined("value"), num_behind, bias)


def _halves(rows: Rows) -> tuple[Rows, Rows]:
    """Splits rows into those before and those behind keys and values."""
    sizes = [rows.key.shape[2] - rows.num_behind, rows.num_behind]
    biases = (None, None) if rows.score_bias is None else rows.score_bias.split(sizes, dim=1)
    parts = zip(rows.key.split(sizes, dim=2), rows.value.split(sizes, dim=2), biases, strict=True)
    before, behind = [Rows(key, value, score_bias=bias) for key, value, bias in parts]
    return before, behind


def _zero_bias(rows: Rows) -> Tensor:
    return rows.key.new_zeros(1, rows.key.shape[2])


def one_per_sample(choices: list[Rows | None], choice: Tensor) -> Rows | None:
    """Gives every sample the rows of its own choice.

    Where choices differ in their number of rows, the rows that a sample lacks are zeros with a score bias of -inf,
    which the softmax turns into a weight of exactly 0. Where they agree there is no bias.

    Args:
        choices: rows (1, H, P_i, d) of the adapters of a batch without a bias of their own; `None` has none.
        choice: (B,), which of them every sample has.

    Returns:
        Rows (B, H, P, d), all before keys and values, P being the largest P_i; with one choice, that choice.
    """
    given = [rows for rows in choices if rows is not None]
    if len(choices) == 1 or not given:
        return choices[0]
    counts = [0 if rows is None else rows.key.shape[2] for rows in choices]
    most = max(counts)
    choice = choice.to(given[0].key.device)

    def of_samples(table: Tensor) -> Tensor:
        # as many choices as samples are in the order of the samples
        return table if len(table) == len(choice) else table.index_select(0, choice)

    def gathered(name: str) -> Tensor:
        nothing = getattr(given[0], name)[:, :, :0]
        tensors = [nothing if rows is None else getattr(rows, name) for rows in choices]
        return of_samples(torch.cat([_padded(tensor, most) for tensor in tensors]))

    bias = None
    if min(counts) < most:
        missing = torch.arange(most)[None] >= torch.tensor(counts)[:, None]
        bias = of_samples(torch.zeros(missing.shape).masked_fill(missing, -torch.inf).to(choice.device))
    return Rows(gathered("key"), gathered("value"), score_bias=bias)


def _padded(rows: Tensor, count: int) -> Tensor:
    missing = count - rows.shape[2]
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows
