# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""From scores to gates: ranking, bounds and budgets, as pure functions (paper section 3.3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from ..distributed import reshard
from ..tuner.config import plain
from ..tuner.prompt_layers import visual_prompt_layers
from ..tuner.summary import summarise
from .importance import ImportanceScores


MIN_TOKENS = 1
MIN_SEGMENTS = 4


@dataclass(frozen=True)
class Gates:
    """Which visual prompts, and which segments of them, stay: 1 keeps and 0 prunes.

    L is the number of prompted layers, or 1 where one set of gates serves the whole model.

    Attributes:
        token: (L, M).
        segment: (L, M, R); those of a pruned prompt are all 0.
    """

    token: Tensor
    segment: Tensor

    def __and__(self, other: Gates) -> Gates:
        """Keeps what both keep."""
        token = self.token * other.token.to(self.token)
        return Gates(token, self.segment * other.segment.to(self.segment) * (token != 0)[..., None])

    def of_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The gates (M,) and (M, R) of one prompted layer."""
        row = index if len(self.token) > 1 else 0
        return self.token[row], self.segment[row]

    def num_values(self, widths: Sequence[int]) -> int:
        """Prompt values that stay, given the width D of every prompted layer."""
        num_segments = self.segment.shape[-1]
        return sum(int(self.of_layer(i)[1].sum()) * width // num_segments for i, width in enumerate(widths))


def check_ratio(ratio: float, name: str = "A pruning ratio") -> None:
    """Checks a ratio of things to prune.

    Args:
        ratio: the ratio.
        name: the argument, for the message.

    Raises:
        TypeError: it is no number.
        ValueError: it lies outside 0 to 1.
    """
    ratio = plain(ratio)
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        raise TypeError(f"{name} is a number from 0 to 1, got {ratio!r}.")
    if not 0.0 <= ratio <= 1.0:
        percent = f", or {float(ratio) / 100.0:g} for {float(ratio):g} %" if 1.0 < ratio <= 100.0 else ""
        raise ValueError(f"{name} lies between 0 and 1, got {ratio}; pass a whole number to prune so many{percent}.")


def check_amount(name: str, amount: object) -> float | int:
    """Checks an amount of things to prune, before it is known how many there are.

    Args:
        name: the argument, for the message.
        amount: a ratio (a float) or a number (an int), also those of NumPy.

    Returns:
        The amount as Python's own float or int.

    Raises:
        TypeError: it is something else.
        ValueError: a ratio outside 0 to 1, or a number below 0.
    """
    amount = plain(amount)
    if isinstance(amount, bool) or not isinstance(amount, Real):
        raise TypeError(
            f"{name} is a ratio such as 0.5 (a float from 0 to 1) or how many to prune (an int), got {amount!r}."
        )
    if isinstance(amount, Integral):
        if amount < 0:
            raise ValueError(f"{name} is how many to prune, 0 or more, got {amount}.")
        return int(amount)
    check_ratio(float(amount), f"{name}: a pruning ratio")
    return float(amount)


def check_count(name: str, count: object, least: int = 0) -> int:
    """Checks a number of things.

    Args:
        name: the argument, for the message.
        count: the number, also one of NumPy.
        least: what it is at least.

    Returns:
        The number as Python's own.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is too small.
    """
    count = plain(count)
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise TypeError(f"{name} is a whole number of at least {least}, got {count!r}.")
    if count < least:
        raise ValueError(f"{name} is a whole number of at least {least}, got {count}.")
    return int(count)


def check_number(name: str, number: object, least: float, most: float) -> float:
    """Checks a number that lies between two others.

    Raises:
        TypeError: it is no number.
        ValueError: it lies outside, or is NaN.
    """
    number = plain(number)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name} is a number, got {number!r}.")
    if not least < float(number) < most:
        raise ValueError(f"{name} lies between {least:g} and {most:g}, got {number}.")
    return int(number) if isinstance(number, Integral) else float(number)


def number_to_prune(count: int, amount: float | int, minimum: int, what: str = "prompts") -> int:
    """How many of `count` things to prune so that `minimum` of them stay.

    Args:
        count: how many there are.
        amount: a ratio (float, rounded down as in the released code) or a number (int).
        minimum: how many stay at least; all stay where `count` is not above it.
        what: what they are, for the message.

    Raises:
        TypeError: the amount is neither.
        ValueError: a ratio outside 0 to 1, or a number that leaves fewer than `minimum`.
    """
    minimum = check_count(f"The least number of {what} that stay", minimum)
    amount, most = check_amount(f"The amount of {what} to prune", amount), max(count - minimum, 0)
    if isinstance(amount, int):
        if amount > most:
            ratio = (
                f"{amount / 100:g} prunes {amount} % of them" if count < amount <= 100 else "0.5 prunes half of them"
            )
            raise ValueError(
                f"Cannot prune {amount} of {count} {what}: at least {minimum} must remain. Prune at most {most}, or "
                f"pass a ratio: {ratio}."
            )
        return amount
    return min(math.floor(amount * count + 1e-9), most)


def renamed(old: str, given: float | int | None, new: str, value: float | int | None) -> float | int | None:
    """The value of an argument that has a new name; the old one is accepted for one release.

    Raises:
        TypeError: both were passed.
    """
    if given is None:
        return value
    if value is not None:
        raise TypeError(f"{old} is the former name of {new}: pass {new} alone.")
    warnings.warn(f"{old} is now called {new}, since it says what to prune.", DeprecationWarning, stacklevel=3)
    return given


def _keep_highest(scores: Tensor, num_pruned: int) -> Tensor:
    """Gates (..., K) of scores (..., K) with the lowest set to 0; of equal scores the first goes first."""
    lowest = scores.argsort(dim=-1, stable=True)[..., :num_pruned]
    return torch.ones_like(scores).scatter(-1, lowest, 0.0)


def prune(
    scores: ImportanceScores,
    prune_tokens: float | int | None = None,
    prune_segments: float | int | None = None,
    *,
    min_tokens: int = MIN_TOKENS,
    min_segments: int = MIN_SEGMENTS,
    tokens: float | int | None = None,
    segments: float | int | None = None,
) -> Gates:
    """Prunes the prompts with the lowest scores in each layer, then the segments with the lowest in each survivor.

    Example:

        >>> scores = score_prompts(model, train_loader)
        >>> gates = prune(scores, prune_tokens=0.5, prune_segments=2)  # half of the prompts, 2 segments of the rest
        >>> apply_gates(model, gates)

    Args:
        scores: importance of prompts and segments.
        prune_tokens: the ratio (float) or number (int) of prompts to prune in every layer, by default none.
        prune_segments: the same for the segments of every prompt that stays.
        min_tokens: prompts that stay in every layer at least.
        min_segments: segments that stay in every prompt at least.
        tokens: deprecated, the former name of `prune_tokens`.
        segments: deprecated, the former name of `prune_segments`.

    Raises:
        TypeError: an amount is neither a ratio nor a number.
        ValueError: an amount is impossible; see `number_to_prune`.
    """
    token_amount = renamed("tokens", tokens, "prune_tokens", prune_tokens)
    segment_amount = renamed("segments", segments, "prune_segments", prune_segments)
    token_amount = 0 if token_amount is None else check_amount("prune_tokens", token_amount)
    segment_amount = 0 if segment_amount is None else check_amount("prune_segments", segment_amount)
    num_tokens, num_segments = scores.segment.shape[-2:]
    token = _keep_highest(scores.token, number_to_prune(num_tokens, token_amount, min_tokens))
    segment = _keep_highest(scores.segment, number_to_prune(num_segments, segment_amount, min_segments, "segments"))
    return Gates(token, segment * token[..., None])


def prune_to_budget(
    scores: ImportanceScores,
    max_values: int,
    widths: Sequence[int],
    *,
    min_tokens: int = MIN_TOKENS,
    min_segments: int = MIN_SEGMENTS,
) -> Gates:
    """Prunes prompts and segments at one common ratio, the smallest that leaves at most `max_values` prompt values.

    Args:
        scores: importance of prompts and segments.
        max_values: the budget, in values of visual prompts over all layers.
        widths: the width D of every prompted layer.
        min_tokens: prompts that stay in every layer at least.
        min_segments: segments that stay in every prompt at least.

    Raises:
        ValueError: the bounds leave more values than the budget has.
    """
    num_tokens, num_segments = scores.segment.shape[-2:]
    ratios = {k / count for count in (num_tokens, num_segments) for k in range(count + 1)}
    gates = prune(scores, min_tokens=min_tokens, min_segments=min_segments)
    for ratio in sorted(ratios):
        gates = prune(scores, ratio, ratio, min_tokens=min_tokens, min_segments=min_segments)
        if gates.num_values(widths) <= max_values:
            return gates
    raise ValueError(
        f"A budget of {max_values:,} prompt values is too small: with at least {min_tokens} prompts a layer and "
        f"{min_segments} segments a prompt, {gates.num_values(widths):,} values stay. Raise the budget or lower the "
        "bounds."
    )


def prune_to_percentage(
    model: nn.Module,
    scores: ImportanceScores,
    max_tuned_percentage: float,
    adapter_name: str | None = None,
    *,
    min_tokens: int = MIN_TOKENS,
    min_segments: int = MIN_SEGMENTS,
) -> Gates:
    """The same as `prune_to_budget`, for a percentage of the model as `PromptSummary` counts it, with the head.

    Args:
        model: a PEFT model with E2VPT.
        scores: importance of its prompts and segments.
        max_tuned_percentage: trained parameters in percent of all, between 0 and 100.
        adapter_name: which adapter, by default the active one.
        min_tokens: prompts that stay in every layer at least.
        min_segments: segments that stay in every prompt at least.

    Raises:
        ValueError: the bounds leave more values than the budget has.
    """
    max_tuned_percentage = check_number("max_tuned_percentage", max_tuned_percentage, 0, 100)
    adapter_name, layers = visual_prompt_layers(model, adapter_name)
    summary = summarise(model, adapter_name)
    visual = sum(int(layer.kept(adapter_name).sum()) for layer in layers)
    fixed = summary.num_tuned_values - visual  # head and key-value prompts
    ratio = max_tuned_percentage / 100.0
    budget = int(ratio / (1.0 - ratio) * summary.num_frozen_values) - fixed
    widths = [layer.site.width for layer in layers]
    least = prune(scores, 1.0, 1.0, min_tokens=min_tokens, min_segments=min_segments).num_values(widths)
    if budget < least:
        alone, lowest = (summary.percentage_of(values) for values in (fixed, fixed + least))
        raise ValueError(
            f"max_tuned_percentage={max_tuned_percentage} is too small: head and key-value prompts alone take "
            f"{alone:.3f} % of the model, and with at least {min_tokens} visual prompts a layer and {min_segments} "
            f"segments a prompt it is {lowest:.3f} %. Raise it to {math.ceil(1000.0 * lowest) / 1000.0:.3f} or more, "
            "or lower num_kv_prompts, min_tokens or min_segments."
        )
    return prune_to_budget(scores, budget, widths, min_tokens=min_tokens, min_segments=min_segments)


def current_gates(model: nn.Module, adapter_name: str | None = None) -> Gates:
    """Copies the gates that a model has, by default those of its active adapter."""
    adapter_name, layers = visual_prompt_layers(model, adapter_name)
    if layers[0].e2vpt_config[adapter_name].gate_scope == "model":
        layers = layers[:1]
    gates = [layer.gates(adapter_name) for layer in layers]
    return Gates(torch.stack([token for token, _ in gates]), torch.stack([segment for _, segment in gates]))


def apply_gates(model: nn.Module, gates: Gates, adapter_name: str | None = None) -> None:
    """Fixes gates in a model: pruned prompts and segments have no effect, no gradient and no value from here on.

    Args:
        model: a PEFT model with E2VPT.
        gates: gates of its prompted layers.
        adapter_name: which adapter, by default the active one.

    Raises:
        ValueError: the gates are of another number of layers.
    """
    reshard(model)
    adapter_name, layers = visual_prompt_layers(model, adapter_name)
    if len(gates.token) not in (1, len(layers)):
        raise ValueError(f"The model has {len(layers)} prompted layers, but the gates are for {len(gates.token)}.")
    for i, layer in enumerate(layers):
        layer.set_gates(adapter_name, *gates.of_layer(i))
