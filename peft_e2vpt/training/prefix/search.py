# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Searches the last place where a model can begin behind a cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ...backbones.sites import find_attention_sites
from .data import Data, part
from .outputs import NoCut
from .passing import FrozenPrefix
from .proof import Proof
from .trace import Reached, calls_of, cuts_before, first_trained, modules_in
from .weights import what_changes


def find_prefix(model: nn.Module, base: nn.Module, data: Data, tried: dict[str, Any]) -> FrozenPrefix:
    """Cuts a model at the last place where it can be cut.

    Raises:
        ValueError: there is none.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("Nothing of the model trains, so there is nothing to cache for: freeze less of it.")
    some = data.for_model(part(tried, 2))
    calls = calls_of(base, lambda: model(**some))
    first = first_trained(base, calls)
    if first is None:
        raise ValueError("No module that the model calls trains, so it cannot be told which run before.")
    paths = {module: path for path, module in base.named_modules()}
    place = paths[first.module] or type(base).__name__
    proof = Proof(model, data, tried)
    reasons: list[str] = []
    attentions = _attentions_of(base)
    run = partial(_run_on_noise, model, data, tried)
    try:
        for cut in cuts_before(base, first, calls, run, not attentions.isdisjoint(first.module.modules())):
            if attentions and attentions.isdisjoint(modules_in(cut.skipped)):
                continue  # embeddings alone are not worth it
            changing = what_changes(base, list(cut.skipped))
            if changing is not None:
                reasons.append(changing)
                continue
            prefix = FrozenPrefix(base, data.name, data.position, cut, raw=tried[data.name])
            try:
                reason = proof.why_wrong(prefix)
            except BaseException:
                prefix.remove()
                raise
            if reason is None:
                return prefix
            prefix.remove()
            reasons.append(reason)
    except NoCut as error:
        reasons.append(str(error))
    if not reasons:
        raise ValueError(
            f"Nothing worth caching runs before {place}, the first module that trains. Train later layers alone, as "
            "with layers_to_transform=[6, 7, 8, 9, 10, 11], or train on the images."
        )
    raise ValueError(f"{type(base).__name__} cannot begin behind a cache, before {place}: {reasons[-1]}.")


def _attentions_of(base: nn.Module) -> set[nn.Module]:
    """The self-attentions of a model; none where it has none."""
    try:
        return {site.attention for site in find_attention_sites(base)}
    except ValueError:
        return set()


def _run_on_noise(model: nn.Module, data: Data, tried: dict[str, Any], count: int) -> Any:
    """Runs a model on so many images, with other noise on them for each number."""
    inputs = data.for_model(part(tried, count))
    generator = torch.Generator().manual_seed(count)
    noise = torch.randn(inputs[data.name].shape, generator=generator)
    inputs[data.name] = inputs[data.name] + noise.to(inputs[data.name])
    try:
        return model(**inputs)
    except Reached:
        raise
    except Exception as error:  # of whatever kind a model makes
        raise NoCut(f"it does not run on {count} other images ({type(error).__name__}: {error})") from error
