# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `PruneRewindCallback`, checked as far as they can be without a run."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from .quality import ModelQuality, Quality
from .ranking import MIN_SEGMENTS, MIN_TOKENS, check_amount, check_count, check_number, check_ratio, renamed
from .search import RATIOS


if TYPE_CHECKING:
    from transformers import Trainer


Unit = Literal["fraction", "epochs", "steps"]
RewindTarget = Literal["init", "early", "fresh", "none"]

DATASETS = ("validation_dataset", "score_dataset")


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}.")


def _ratios(name: str, ratios: object) -> tuple[float, ...]:
    if isinstance(ratios, (str, bytes)) or not isinstance(ratios, Iterable):
        raise TypeError(f"{name} is a list of ratios such as (0.0, 0.5), got {ratios!r}.")
    found = tuple(ratios)
    for ratio in found:
        check_ratio(ratio, f"Each of {name}")
    if not found:
        raise ValueError(f"{name} is a list of ratios such as (0.0, 0.5), got an empty one.")
    return tuple(float(ratio) for ratio in found)


class PruningArguments:
    """What a run with pruning is asked to do; `PruneRewindCallback` documents the arguments."""

    def __init__(
        self,
        prune_after: float = 0.5,
        unit: Unit = "fraction",
        prune_tokens: float | int | None = None,
        prune_segments: float | int | None = None,
        max_tuned_percentage: float | None = None,
        min_tokens: int = MIN_TOKENS,
        min_segments: int = MIN_SEGMENTS,
        rewind_to: RewindTarget = "init",
        early_steps: int = 0,
        token_ratios: Sequence[float] = RATIOS,
        segment_ratios: Sequence[float] = RATIOS,
        max_score_batches: int | None = None,
        validation_dataset: Any = None,
        quality: str | Quality | ModelQuality | None = None,
        greater_is_better: bool | None = None,
        score_dataset: Any = None,
        trainer: Trainer | None = None,
        tokens: float | int | None = None,
        segments: float | int | None = None,
    ) -> None:
        prune_tokens = renamed("tokens", tokens, "prune_tokens", prune_tokens)
        prune_segments = renamed("segments", segments, "prune_segments", prune_segments)
        _check_choice("unit", unit, Unit)
        _check_choice("rewind_to", rewind_to, RewindTarget)
        prune_after = check_number("prune_after", prune_after, 0, 1 if unit == "fraction" else math.inf)
        early_steps = check_count("early_steps", early_steps)
        if (rewind_to == "early") != (early_steps > 0):
            raise ValueError(f"rewind_to='early' and early_steps go together, got {rewind_to!r} and {early_steps}.")
        if max_tuned_percentage is not None:
            max_tuned_percentage = check_number("max_tuned_percentage", max_tuned_percentage, 0, 100)
        if max_tuned_percentage is not None and (prune_tokens is not None or prune_segments is not None):
            raise ValueError(
                "Pass either a budget, max_tuned_percentage, or amounts, prune_tokens and prune_segments, not both."
            )
        if not (quality is None or isinstance(quality, (str, ModelQuality)) or callable(quality)):
            raise TypeError(
                "quality is the name of a metric of the Trainer's evaluation, a function of output and batch, or a "
                f"ModelQuality, got {quality!r}."
            )
        if not (greater_is_better is None or isinstance(greater_is_better, bool)):
            raise TypeError(f"greater_is_better is True, False or None, got {greater_is_better!r}.")
        self.prune_after = prune_after
        self.unit = unit
        self.prune_tokens = None if prune_tokens is None else check_amount("prune_tokens", prune_tokens)
        self.prune_segments = None if prune_segments is None else check_amount("prune_segments", prune_segments)
        self.max_tuned_percentage = max_tuned_percentage
        self.min_tokens = check_count("min_tokens", min_tokens)
        self.min_segments = check_count("min_segments", min_segments)
        self.rewind_to = rewind_to
        self.early_steps = early_steps
        self.token_ratios = _ratios("token_ratios", token_ratios)
        self.segment_ratios = _ratios("segment_ratios", segment_ratios)
        self.max_score_batches = (
            None if max_score_batches is None else check_count("max_score_batches", max_score_batches, 1)
        )
        self.validation_dataset = validation_dataset
        self.quality = quality
        self.greater_is_better = greater_is_better
        self.score_dataset = score_dataset
        self.trainer = trainer

    @property
    def searches(self) -> bool:
        """Whether the amounts to prune are searched on validation data."""
        return self.prune_tokens is None and self.prune_segments is None and self.max_tuned_percentage is None

    @property
    def bounds(self) -> dict[str, int]:
        """What stays at least."""
        return {"min_tokens": self.min_tokens, "min_segments": self.min_segments}

    def exported_arguments(self) -> tuple[dict[str, Any], list[str]]:
        """The arguments that a checkpoint can hold, those of a subclass too, and the names of those it cannot."""
        of_class = inspect.signature(type(self)).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in of_class)
        of_base = _parameters(PruningArguments) if takes_all else []
        held, left_out = {}, []
        for name in dict.fromkeys((*_parameters(type(self)), *of_base)):
            value = getattr(self, name, None)
            if value is None or name == "trainer":
                continue
            if name not in DATASETS and _fits_into_json(value):
                held[name] = value
            else:
                left_out.append(name)
        return held, left_out


def _parameters(kind: type) -> list[str]:
    """The names of what a class is made from, `*args` and `**kwargs` left out."""
    parameters = inspect.signature(kind).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _fits_into_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
