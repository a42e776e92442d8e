# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`Rows`: key and value rows, how they come together, and how they join the keys and values of one attention call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


AttentionFunction = Callable[..., "tuple[Tensor, Tensor | None]"]


class Rows(NamedTuple):
    """Key and value rows of one attention; the first dimension B is 1 where all samples have the same rows.

    Attributes:
        key: (B, H, P, d).
        value: (B, H, P, d).
        num_behind: how many of the P rows, the last ones, go behind keys and values instead of before them.
        score_bias: (B, P), added to the attention scores of the rows before the softmax; `None` adds nothing.
    """

    key: Tensor
    value: Tensor
    num_behind: int = 0
    score_bias: Tensor | None = None


class RowOwner(Protocol):
    """Whoever gives an attention its rows."""

    eager_attention: AttentionFunction | None
    is_attached: bool  # until it has left the attention for good

    def rows(self, num_sequences: int, dtype: torch.dtype) -> Rows | None:
        """The rows for a batch of `num_sequences` token sequences; `None` leaves the attention as it is."""


def per_sequence(rows: Tensor, num_sequences: int) -> Tensor:
    """Repeats rows (B, ...) for sequences in the order (sample, window): (num_sequences, ...)."""
    if rows.shape[0] == 1:
        return rows.expand(num_sequences, *rows.shape[1:])
    if rows.shape[0] == num_sequences:
        return rows
    if num_sequences % rows.shape[0]:
        raise ValueError(
            f"Prompts differ between the {rows.shape[0]} samples of the batch, but the attention sees {num_sequences} "
            "sequences, which is no multiple: samples that share one packed sequence need equal prompts."
        )
    return rows.repeat_interleave(num_sequences // rows.shape[0], dim=0)


def _beside(rows: Tensor, middle: Tensor, num_behind: int, dim: int) -> Tensor:
    if not num_behind:
        return torch.cat([rows, middle], dim=dim)
    num_before = rows.shape[dim] - num_behind
    before, behind = rows.narrow(dim, 0, num_before), rows.narrow(dim, num_before, num_behind)
    return torch.cat([before, middle, behind], dim=dim)


def _extend_block_mask(mask: Any, before: int, behind: int) -> Any:
    """Rebuilds a flex attention `BlockMask` so that every query sees the rows."""
    from torch.nn.attention.flex_attention import create_block_mask

    num_queries, num_keys = mask.seq_lengths
    mask_mod = mask.mask_mod

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inner = (key - before).clamp(0, num_keys - 1)
        seen: Tensor = (key < before) | (key >= before + num_keys) | mask_mod(batch, head, query, inner)
        return seen

    batch, heads = mask.shape[:2]
    device = mask.kv_num_blocks.device
    return create_block_mask(sees, batch, heads, num_queries, before + num_keys + behind, device=device)


def visible_value(mask: Tensor) -> int:
    """What lets a query see a key: 1 in a mask that selects (boolean, or (B, N)), 0 in one that is added."""
    return 1 if mask.dim() == 2 or mask.dtype == torch.bool else 0


def as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that selects, as one that is added to scores: 0 where it is true, the lowest number elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _extend_mask(mask: Any, rows: Rows, num_keys: int, dtype: torch.dtype, num_sequences: int) -> Any:
    """Adds the columns of the rows to an attention mask: visible to every query, biased by `rows.score_bias`."""
    behind = rows.num_behind
    before = rows.key.shape[2] - behind
    if mask is not None and not isinstance(mask, Tensor):
        mask = _extend_block_mask(mask, before, behind)
    elif mask is not None:
        mask = F.pad(mask, (before, behind), value=visible_value(mask))
    if rows.score_bias is None:
        return mask
    bias = per_sequence(rows.score_bias.to(dtype), num_sequences)
    bias = _beside(bias, bias.new_zeros(num_sequences, num_keys), behind, dim=1)[:, None, None, :]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        mask = as_added(mask, dtype)
    return mask + bias


def join_rows(rows: Rows, key: Tensor, value: Tensor, mask: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """Puts rows beside keys and values (B, H, N, d), and adds their columns to the mask.

    Args:
        rows: the rows.
        key: keys without them.
        value: values without them.
        mask: attention mask in one of the forms of `attend_with_rows`.
        dtype: type of the queries, which an added mask shares.
    """
    num_sequences, _, num_keys, _ = key.shape
    mask = _extend_mask(mask, rows, num_keys, dtype, num_sequences)
    key = _beside(per_sequence(rows.key.to(key.dtype), num_sequences), key, rows.num_behind, dim=2)
    value = _beside(per_sequence(rows.value.to(value.dtype), num_sequences), value, rows.num_behind, dim=2)
    return key, value, mask


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """What sdpa hides without a mask where it is causal, (1, 1, N, N): it aligns queries with the first keys."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril()[None, None]


class MixedBatch(NamedTuple):
    """Which adapter every sample of a batch has.

    Attributes:
        names: the adapters of the batch, each once, in the order of the samples; `"__base__"` has no rows.
        choice: (B,), the place in `names` of every sample's adapter.
        of_samples: the adapter of every sample.
    """

    names: tuple[str, ...]
    choice: Tensor
    of_samples: tuple[str, ...]


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
