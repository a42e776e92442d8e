# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What `search_pruning` promises: every candidate measures as the model pruned so would, and one is chosen."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from peft_e2vpt import E2VPTConfig, ImportanceScores, apply_gates, prune, score_prompts, search_pruning
from peft_e2vpt.pruning.search import RATIOS
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support.adapted import adapt
from tests.support.models import NUM_LABELS


BACKBONES = ("vit", "dinov2", "swin", "clip")
TOKENS, SEGMENTS = (0.0, 0.34, 0.67), (0.0, 0.25, 0.5, 0.75)
FEW = {"token_ratios": TOKENS, "segment_ratios": SEGMENTS, "min_segments": 1}
Batch = dict[str, Any]


def images(count: int = 7, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Two batches, the second one smaller."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(NUM_LABELS, (count,), generator=generator)
    return [
        {"pixel_values": pixels[:4], "labels": labels[:4]},
        {"pixel_values": pixels[4:], "labels": labels[4:]},
    ]


def likelihood(outputs: Any, batch: Batch) -> Tensor:
    return -F.cross_entropy(outputs.logits, batch["labels"], reduction="none")


def scored(name: str, **settings: Any) -> tuple[PeftModel, ImportanceScores]:
    model, _ = adapt(name, dtype=torch.float64, **settings)
    return model, score_prompts(model, images())


@torch.no_grad()
def measured_alone(model: PeftModel, scores: ImportanceScores, tokens: float, segments: float) -> tuple[float, float]:
    """Accuracy and mean log-likelihood of a copy of the model that is really pruned."""
    pruned = deepcopy(model).eval()
    apply_gates(pruned, prune(scores, tokens, segments, min_segments=1))
    right, likely, count = 0.0, 0.0, 0
    for batch in images():
        outputs = pruned(**batch)
        right += float((outputs.logits.argmax(-1) == batch["labels"]).sum())
        likely += float(likelihood(outputs, batch).sum())
        count += len(batch["labels"])
    return right / count, likely / count


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{}, {"pruned_prompts": "zero"}, {"gate_scope": "model"}], ids=str)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_candidate_measures_what_the_model_pruned_so_gives(name: str, settings: dict[str, Any]) -> None:
    model, scores = scored(name, **settings)
    by_accuracy = search_pruning(model, scores, images(), **FEW)
    by_likelihood = search_pruning(model, scores, images(), quality=likelihood, **FEW)
    assert len(by_accuracy.candidates) == len(TOKENS) * len(SEGMENTS)
    qualities = set()
    for one, two in zip(by_accuracy.candidates, by_likelihood.candidates, strict=True):
        accuracy, likely = measured_alone(model, scores, one.token_ratio, one.segment_ratio)
        assert one.quality == accuracy
        assert two.quality == pytest.approx(likely, abs=1e-12)
        qualities.add(round(two.quality, 12))
    assert len(qualities) == len(by_likelihood.candidates), "candidates that do not differ prove nothing"


@pytest.mark.parametrize("mode", ["remove", "zero"])
def test_shallow_candidates_measure_what_the_model_pruned_so_gives(mode: str) -> None:
    model, scores = scored("vit", visual_prompt_mode="shallow", pruned_prompts=mode)
    search = search_pruning(model, scores, images(), quality=likelihood, **FEW)
    assert len(search.candidates) == 12
    for candidate in search.candidates:
        _, likely = measured_alone(model, scores, candidate.token_ratio, candidate.segment_ratio)
        assert candidate.quality == pytest.approx(likely, abs=1e-12)
    assert prompt_layers(model)[0].gate_effect("default").kept is None


@pytest.mark.parametrize("max_rows", [1, 8, 20, 1000])
def test_the_result_does_not_depend_on_how_many_candidates_share_a_batch(max_rows: int) -> None:
    model, scores = scored("swin")
    expected = search_pruning(model, scores, images(), quality=likelihood, **FEW)
    found = search_pruning(model, scores, images(), quality=likelihood, max_rows=max_rows, **FEW)
    assert found.chosen == expected.chosen
    for one, two in zip(found.candidates, expected.candidates, strict=True):
        assert one.quality == pytest.approx(two.quality, abs=1e-12)


def test_candidates_share_forward_passes() -> None:
    model, scores = scored("vit")
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    search_pruning(model, scores, images(), max_rows=20, **FEW)
    handle.remove()
    assert sizes[:3] == [4, 4, 12]  # whether they may: two alone, and together beside a copy
    assert sizes[3:] == [20, 20, 8, 18, 18]  # 12 candidates: of 4 samples 5 at a time, of 3 samples 6


def test_of_equal_candidates_the_most_pruned_is_chosen() -> None:
    model, scores = scored("vit")
    search = search_pruning(model, scores, images(), quality=lambda outputs, batch: torch.ones(len(batch["labels"])))
    assert {c.quality for c in search.candidates} == {1.0}
    fewest = min(c.num_values for c in search.candidates)
    assert search.candidates[search.chosen].num_values == fewest
    assert [c.num_values for c in search.candidates].count(fewest) == 1


def test_the_best_candidate_is_chosen_with_its_gates() -> None:
    model, scores = scored("vit")
    search = search_pruning(model, scores, images(), quality=likelihood, **FEW)
    best = search.candidates[search.chosen]
    assert best.quality == max(c.quality for c in search.candidates)
    expected = prune(scores, best.token_ratio, best.segment_ratio, min_segments=1)
    assert torch.equal(search.gates.token, expected.token) and torch.equal(search.gates.segment, expected.segment)
    assert search.gates.num_values([32, 32, 32]) == best.num_values


def test_pruning_nothing_is_always_among_the_candidates() -> None:
    model, scores = scored("vit")
    search = search_pruning(model, scores, images(), token_ratios=[0.67], segment_ratios=[0.5], min_segments=1)
    pairs = [(c.token_ratio, c.segment_ratio) for c in search.candidates]
    assert pairs == [(0.0, 0.0), (0.0, 0.5), (0.67, 0.0), (0.67, 0.5)]
    assert search.candidates[0].num_values == 3 * 3 * 32


def test_ratios_that_prune_the_same_are_tried_once() -> None:
    model, scores = scored("vit")
    search = search_pruning(model, scores, images(), min_segments=1)  # 10 x 10 ratios of 3 prompts, 4 segments
    pairs = [(c.token_ratio, c.segment_ratio) for c in search.candidates]
    assert pairs == [(t, s) for t in (0.0, 0.4, 0.7) for s in (0.0, 0.3, 0.5, 0.8)]
    assert set(RATIOS) >= {ratio for pair in pairs for ratio in pair}
    bounded = search_pruning(model, scores, images(), min_tokens=2)
    assert [(c.token_ratio, c.segment_ratio) for c in bounded.candidates] == [(0.0, 0.0), (0.4, 0.0)]


def test_many_and_soft_labels_are_measured_by_their_cross_entropy() -> None:
    model, _ = adapt("vit", dtype=torch.float64)
    batches = [{**batch, "labels": F.one_hot(batch["labels"], NUM_LABELS).double()} for batch in images()]
    scores = score_prompts(model, batches)
    search = search_pruning(model, scores, batches, **FEW)
    with torch.no_grad():
        losses = [float(model(**batch).loss) * len(batch["labels"]) for batch in batches]
    assert search.candidates[0].quality == pytest.approx(-sum(losses) / 7, abs=1e-6)


def test_searching_leaves_no_trace_in_the_model() -> None:
    model, scores = scored("vit", visual_prompt_dropout=0.5)
    model.train()
    model.get_base_model().classifier.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    search_pruning(model, scores, images(), quality=likelihood, **FEW)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(layer.gate_override is None for layer in prompt_layers(model))


def test_a_search_that_fails_leaves_no_trace() -> None:
    model, scores = scored("vit")
    model.train()
    with pytest.raises(
        ValueError, match="a validation batch holds only pixel_values: let it hold labels, or pass a quality"
    ):
        search_pruning(model, scores, [{"pixel_values": images()[0]["pixel_values"]}])
    assert all(layer.gate_override is None for layer in prompt_layers(model)) and model.training


def test_the_table_shows_every_candidate_and_the_choice() -> None:
    model, scores = scored("vit")
    search = search_pruning(model, scores, images(), **FEW)
    lines = str(search).splitlines()
    assert len(lines) == 1 + len(search.candidates)
    assert lines[1 + search.chosen].endswith("chosen") and str(search).count("chosen") == 1
    assert lines[1].split()[:3] == ["0%", "0%", "288"]


def test_what_cannot_be_searched_is_said_clearly() -> None:
    model, scores = scored("vit")
    with pytest.raises(ValueError, match="no validation sample"):
        search_pruning(model, scores, [])
    with pytest.raises(ValueError, match="has 3 prompted layers, but the scores are for 2"):
        search_pruning(model, ImportanceScores(scores.token[:2], scores.segment[:2], 1), images())
    with pytest.raises(
        ValueError, match=r"quality returns one number per sample, \(4,\), or one for the batch, got shape \(2,\)"
    ):
        search_pruning(model, scores, images(), quality=lambda outputs, batch: likelihood(outputs, batch)[:2], **FEW)
    with model.disable_adapter(), pytest.raises(ValueError, match="'default' is not the active one"):
        search_pruning(model, scores, images())
    model.add_adapter("other", E2VPTConfig(num_segments=4))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="'default' is not the active one"):
        search_pruning(model, scores, images(), adapter_name="default")
    with pytest.raises(ValueError, match="pruning ratio lies between 0 and 1, got 1.5"):
        search_pruning(model, score_prompts(model, images()), images(), token_ratios=[1.5])
