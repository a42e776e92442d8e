# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `PruneRewindCallback`, checked as far as they can be without a run."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

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
        check_ratio(ratio, f"{name}: a pruning ratio")
    if not found:
        raise ValueError(f"{name} is a list of ratios such as (0.0, 0.5), got an empty one.")
    return tuple(float(ratio) for ratio in found)


class PruningArguments:
    """What a run with pruning is asked to do; `PruneRewindCallback` documents the arguments."""

    _made_from: dict[str, Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Lets a subclass note what it is made from: a checkpoint holds that, and attributes may have other names."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _noting(cls.__init__)  # type: ignore[method-assign]

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

    def exported_arguments(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
        """What a checkpoint can hold of the arguments.

        Returns:
            What the object, be it of a subclass, was made from, by name; the arguments of this class as they are now;
            and the names of what the checkpoint cannot hold, with whether the object was made from it.
        """
        of_base = {name: vars(self)[name] for name in _parameters(PruningArguments) if name in vars(self)}
        made_from = self._made_from
        if made_from is None:
            made_from = {name: getattr(self, name, None) for name in _parameters(type(self))}
        left_out = {
            name: name in made_from
            for name, value in {**made_from, **of_base}.items()
            if name != "trainer" and value is not None and (name in DATASETS or not _fits_into_json(value))
        }
        required = [n for n, p in inspect.signature(type(self)).parameters.items() if p.default is p.empty]
        held = {n: v for n, v in made_from.items() if n not in (*left_out, "trainer")}
        held |= {n: None for n in left_out if n in required}  # so that the Trainer can make a callback, to be refused
        held = {n: v for n, v in held.items() if v is not None or n in required}
        kept = {n: v for n, v in of_base.items() if n not in (*left_out, "trainer")}
        return held, kept, left_out


def _noting(init: Callable[..., None]) -> Callable[..., None]:
    """An `__init__` that notes its arguments by name; those given by position alone get a star, and fit nowhere."""

    @functools.wraps(init)
    def noting(self: PruningArguments, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        signature = inspect.signature(init)
        given = signature.bind(self, *args, **kwargs).arguments
        self._made_from = {}
        for name, value in list(given.items())[1:]:
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                self._made_from |= value
            elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
                self._made_from[f"*{name}"] = _ByPosition(value)
            else:
                self._made_from[name] = value

    return noting


class _ByPosition(NamedTuple):
    """A value that no keyword can give back."""

    value: Any


def _parameters(kind: type) -> list[str]:
    """The names of what a class is made from, `*args` and `**kwargs` left out."""
    parameters = inspect.signature(kind).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _fits_into_json(value: Any) -> bool:
    if isinstance(value, _ByPosition):
        return False
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
