# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What `prune`, `prune_to_budget` and `apply_gates` promise: ranks, bounds, budgets, pruned values without effect."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from peft_e2vpt import Gates, ImportanceScores, apply_gates, prune, prune_to_budget
from peft_e2vpt.pruning.ranking import current_gates, number_to_prune
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support.adapted import adapt, predict, trainable
from tests.support.models import build
from tests.support.paths import GOLDEN


BACKBONES = ("vit", "dinov2", "swin", "clip")
examples = settings(deadline=None)


# ---------------------------------------------------------------------------------------- the released code's schedule
@cache
def golden() -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((GOLDEN / "pruning.json").read_text())
    return numbers


@cache
def golden_scores(name: str) -> ImportanceScores:
    tensors = load_file(GOLDEN / "pruning.safetensors")
    return ImportanceScores(tensors[f"{name}/token_scores"][None], tensors[f"{name}/piece_scores"][None], 10)


def zeros_of(gates: Tensor) -> list[int]:
    return (gates == 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", golden()["sets"])
def test_the_released_schedule_is_what_the_ratios_prune(name: str, reverse: bool) -> None:
    scores, facts = golden_scores(name), golden()["sets"][name]
    if reverse:
        scores = ImportanceScores(-scores.token, -scores.segment, 10)
    schedule = facts["reverse"] if reverse else facts
    assert facts["percents"] == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    for percent, tokens, pieces in zip(facts["percents"], schedule["tokens"], schedule["pieces"], strict=True):
        gates = prune(scores, percent / 100, percent / 100)
        assert zeros_of(gates.token[0]) == tokens
        only_segments = prune(scores, 0.0, percent / 100)
        assert [zeros_of(row) for row in only_segments.segment[0]] == pieces
        for prompt, expected in enumerate(pieces):
            assert zeros_of(gates.segment[0, prompt]) == (list(range(16)) if prompt in tokens else expected)
    assert schedule["tokens"][-1] and pieces[-1]


@pytest.mark.parametrize("name", golden()["sets"])
def test_masks_of_a_rewound_model_of_the_released_code_are_the_gates(name: str) -> None:
    for key, masks in golden()["sets"][name]["rewound"].items():
        num_tokens, num_pieces = map(int, key.split("_"))
        gates = prune(golden_scores(name), num_tokens, num_pieces)
        assert gates.token[0].tolist() == masks["token_mask"]
        for prompt, kept in enumerate(masks["token_mask"]):
            if kept:
                assert zeros_of(gates.segment[0, prompt]) == masks["piece_mask_zeros"][str(prompt)]


def pruned_at_each_percentage(count: int, minimum: int) -> list[int]:
    totals = [number_to_prune(count, percent / 100, minimum) for percent in range(10, 100, 10)]
    return [total - before for before, total in zip([0, *totals], totals, strict=False)]


@pytest.mark.parametrize("count", golden()["increments"]["tokens"])
def test_the_number_of_prompts_pruned_grows_as_in_the_released_code(count: str) -> None:
    assert pruned_at_each_percentage(int(count), minimum=1) == golden()["increments"]["tokens"][count]


# with 2 pieces the released code would prune -2
@pytest.mark.parametrize("count", [count for count in golden()["increments"]["pieces"] if count != "2"])
def test_the_number_of_segments_pruned_grows_as_in_the_released_code(count: str) -> None:
    expected = golden()["increments"]["pieces"][count]  # ends where no more can be pruned
    found = pruned_at_each_percentage(int(count), minimum=4)
    assert found[: len(expected)] == expected
    assert sum(found[len(expected) :]) == 0


# ----------------------------------------------------------------------------------------------- properties of ranking
@st.composite
def all_scores(draw: Any, distinct: bool = False) -> ImportanceScores:
    """Scores of a few layers; with few different values, so that ties are common."""
    num_layers, num_tokens = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    num_segments = draw(st.sampled_from([1, 2, 4, 8]))
    largest = 10**6 if distinct else 4

    def tensor(*shape: int) -> Tensor:
        count = int(torch.Size(shape).numel())
        values = draw(st.lists(st.integers(0, largest), min_size=count, max_size=count, unique=distinct))
        return torch.tensor(values, dtype=torch.float64).view(shape)

    return ImportanceScores(tensor(num_layers, num_tokens), tensor(num_layers, num_tokens, num_segments), 1)


amounts = st.one_of(st.floats(0, 1), st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0]))
bounds = st.fixed_dictionaries({"min_tokens": st.integers(0, 8), "min_segments": st.integers(0, 9)})


@examples
@given(all_scores(), amounts, amounts, bounds)
def test_what_is_pruned_has_the_lowest_scores_and_keeps_to_the_bounds(
    scores: ImportanceScores, tokens: float, segments: float, bound: dict[str, int]
) -> None:
    gates = prune(scores, tokens, segments, **bound)
    (_, count), num_segments = scores.token.shape, scores.segment.shape[-1]
    kept = max(count - int(tokens * count + 1e-9), min(count, bound["min_tokens"]))
    assert gates.token.unique().tolist() in ([0.0], [1.0], [0.0, 1.0])
    assert (gates.token.sum(-1) == kept).all()
    kept_segments = max(num_segments - int(segments * num_segments + 1e-9), min(num_segments, bound["min_segments"]))
    assert torch.equal(gates.segment.sum(-1), gates.token * kept_segments)
    for row in range(len(scores.token)):
        alive, dead = scores.token[row][gates.token[row] == 1], scores.token[row][gates.token[row] == 0]
        assert not len(alive) or not len(dead) or dead.max() <= alive.min()
        for prompt in gates.token[row].nonzero().flatten():
            values, gate = scores.segment[row, prompt], gates.segment[row, prompt]
            assert gate.all() or not gate.any() or values[gate == 0].max() <= values[gate == 1].min()


@examples
@given(all_scores(), amounts, amounts, amounts, bounds)
def test_a_higher_ratio_prunes_the_same_and_more(
    scores: ImportanceScores, first: float, second: float, segments: float, bound: dict[str, int]
) -> None:
    low, high = sorted((first, second))
    less, more = prune(scores, low, segments, **bound), prune(scores, high, segments, **bound)
    assert (more.token <= less.token).all() and (more.segment <= less.segment).all()
    less, more = prune(scores, segments, low, **bound), prune(scores, segments, high, **bound)
    assert torch.equal(more.token, less.token) and (more.segment <= less.segment).all()


@examples
@given(all_scores(), amounts, amounts)
def test_segments_of_pruned_prompts_are_all_zero(scores: ImportanceScores, tokens: float, segments: float) -> None:
    gates = prune(scores, tokens, segments)
    assert (gates.segment[gates.token == 0] == 0).all()
    assert (gates.segment[gates.token == 1].sum(-1) >= min(4, scores.segment.shape[-1])).all()


@examples
@given(all_scores(), amounts, amounts)
def test_ties_are_always_broken_in_the_same_way(scores: ImportanceScores, tokens: float, segments: float) -> None:
    tied = ImportanceScores(torch.zeros_like(scores.token), torch.zeros_like(scores.segment), 1)
    gates = prune(tied, tokens, segments)
    pruned = int((gates.token[0] == 0).sum())
    assert all(zeros_of(row) == list(range(pruned)) for row in gates.token)  # of equal ones, the first go
    again = prune(ImportanceScores(tied.token.clone(), tied.segment.clone(), 1), tokens, segments)
    assert torch.equal(gates.token, again.token) and torch.equal(gates.segment, again.segment)
    first, second = prune(scores, tokens, segments), prune(scores, tokens, segments)
    assert torch.equal(first.segment, second.segment)


@examples
@given(all_scores(distinct=True), st.permutations(range(3)), amounts)
def test_processes_may_add_up_their_scores_in_any_order(
    scores: ImportanceScores, order: list[int], ratio: float
) -> None:
    shares = [scores, ImportanceScores(scores.token.flip(-1), scores.segment.flip(-1), 1), scores]

    def of_all(order: list[int]) -> Gates:
        token = sum((shares[i].token for i in order), torch.zeros_like(scores.token))
        segment = sum((shares[i].segment for i in order), torch.zeros_like(scores.segment))
        return prune(ImportanceScores(token / 3, segment / 3, 3), ratio, ratio)

    assert torch.equal(of_all(order).segment, of_all([0, 1, 2]).segment)


@examples
@given(all_scores(), st.data())
def test_a_number_prunes_as_the_ratio_of_that_number(scores: ImportanceScores, data: st.DataObject) -> None:
    count, num_segments = scores.segment.shape[1:]
    tokens = data.draw(st.integers(0, count - 1))
    segments = data.draw(st.integers(0, max(num_segments - 4, 0)))
    by_number, by_ratio = prune(scores, tokens, segments), prune(scores, tokens / count, segments / num_segments)
    assert torch.equal(by_number.token, by_ratio.token) and torch.equal(by_number.segment, by_ratio.segment)


@examples
@given(all_scores(), st.integers(0, 3000), bounds, st.data())
def test_a_budget_is_kept_with_as_little_pruning_as_possible(
    scores: ImportanceScores, budget: int, bound: dict[str, int], data: st.DataObject
) -> None:
    num_layers, num_tokens, num_segments = scores.segment.shape
    widths = data.draw(st.lists(st.sampled_from([8, 16, 32]), min_size=num_layers, max_size=num_layers))
    ratios = sorted({k / n for n in (num_tokens, num_segments) for k in range(n + 1)})
    steps = [prune(scores, ratio, ratio, **bound) for ratio in ratios]
    fitting = [gates for gates in steps if gates.num_values(widths) <= budget]
    if not fitting:
        least = steps[-1].num_values(widths)
        with pytest.raises(ValueError, match=f"too small.*{least:,} values stay.*[Rr]aise the budget"):
            prune_to_budget(scores, budget, widths, **bound)
        return
    gates = prune_to_budget(scores, budget, widths, **bound)
    assert gates.num_values(widths) <= budget
    assert gates.num_values(widths) == max(step.num_values(widths) for step in fitting)


def test_values_are_counted_over_layers_of_different_widths() -> None:
    token = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    segment = torch.tensor([[[1.0, 1, 0, 1], [0, 0, 0, 0]], [[1, 1, 1, 1], [1, 0, 0, 0]]])
    assert Gates(token, segment).num_values([8, 16]) == 3 * 2 + 5 * 4
    assert Gates(token[:1], segment[:1]).num_values([8, 16, 16]) == 3 * (2 + 4 + 4)  # one set for all


@pytest.mark.parametrize(
    ("tokens", "segments", "message"),
    [
        (3, 0, "Cannot prune 3 of 3 prompts: at least 1 must remain. Prune at most 2, or pass a ratio"),
        (-1, 0, "how many to prune, 0 or more, got -1"),
        (1.5, 0.0, "between 0 and 1, got 1.5; pass a whole number to prune so many"),
        (-0.1, 0.0, "between 0 and 1, got -0.1"),
        (float("nan"), 0.0, "between 0 and 1, got nan"),
        (0, 5, "Cannot prune 5 of 8 segments: at least 4 must remain"),
        (0.0, 2.0, "between 0 and 1, got 2.0"),
    ],
)
def test_impossible_amounts_are_refused(tokens: float, segments: float, message: str) -> None:
    scores = ImportanceScores(torch.rand(2, 3), torch.rand(2, 3, 8), 1)
    with pytest.raises(ValueError, match=message):
        prune(scores, tokens, segments)


def test_a_full_ratio_prunes_down_to_the_bounds() -> None:
    scores = ImportanceScores(torch.rand(2, 6), torch.rand(2, 6, 8), 1)
    gates = prune(scores, 1.0, 1.0)
    assert gates.token.sum(-1).tolist() == [1, 1]
    assert gates.segment.sum((-1, -2)).tolist() == [4, 4]
    assert prune(scores, 1.0, 1.0, min_tokens=0).token.sum() == 0


def test_every_number_can_be_written_as_its_ratio() -> None:
    """Though 29 / 100 * 100 is a little less than 29."""
    for count in range(1, 201):
        assert [number_to_prune(count, k / count, 0) for k in range(count + 1)] == list(range(count + 1))


# ---------------------------------------------------------------------------------------------------- gates in a model
def some_gates(model: PeftModel, seed: int = 0, **bound: int) -> Gates:
    layers = prompt_layers(model)
    config = model.peft_config["default"]
    generator = torch.Generator().manual_seed(seed)
    shape = (len(layers), config.num_visual_prompts, config.num_segments)
    scores = ImportanceScores(torch.rand(shape[:2], generator=generator), torch.rand(shape, generator=generator), 1)
    return prune(scores, 1, 2, **{"min_segments": 1, **bound})


@pytest.mark.parametrize("name", BACKBONES)
def test_gates_go_to_their_layers(name: str) -> None:
    model, _ = adapt(name)
    gates = some_gates(model)
    apply_gates(model, gates)
    found = current_gates(model)
    assert torch.equal(found.token, gates.token) and torch.equal(found.segment, gates.segment)
    assert len(gates.token.unique(dim=0)) > 1
    widths = [layer.site.width for layer in prompt_layers(model)]
    assert gates.num_values(widths) == sum(
        int((layer.e2vpt_visual_prompts["default"] != 0).sum()) for layer in prompt_layers(model)
    )


def test_one_set_of_gates_goes_to_every_layer() -> None:
    model, _ = adapt("vit", gate_scope="model")
    gates = some_gates(model)
    apply_gates(model, Gates(gates.token[:1], gates.segment[:1]))
    for layer in prompt_layers(model):
        assert torch.equal(layer.e2vpt_token_gates["default"], gates.token[0])
    assert torch.equal(current_gates(model).segment, gates.segment[:1])


def test_gates_that_do_not_fit_the_model_are_refused() -> None:
    model, _ = adapt("vit")
    gates = some_gates(model)
    with pytest.raises(ValueError, match="has 3 prompted layers, but the gates are for 2"):
        apply_gates(model, Gates(gates.token[:2], gates.segment[:2]))
    with pytest.raises(ValueError, match=r"token gates of vit.*have shape \(3,\)"):
        apply_gates(model, Gates(gates.token[:, :2], gates.segment))
    with pytest.raises(ValueError, match=r"segment gates of vit.*have shape \(3, 4\)"):
        apply_gates(model, Gates(gates.token, gates.segment[..., :2]))
    with pytest.raises(ValueError, match="must be 0 or 1"):
        apply_gates(model, Gates(gates.token * 0.5, gates.segment))
    with pytest.raises(ValueError, match="no visual prompts"):
        apply_gates(adapt("vit", num_visual_prompts=0)[0], gates)


def test_gates_of_both_keep_what_both_keep() -> None:
    model, _ = adapt("vit")
    first, second = some_gates(model, 0), some_gates(model, 1)
    both = first & second
    assert torch.equal(both.token, ((first.token == 1) & (second.token == 1)).float())
    assert torch.equal(both.segment != 0, (first.segment != 0) & (second.segment != 0))
    assert both.segment.sum() < first.segment.sum()


# ------------------------------------------------------------------------------------------------------- pruned values
def train(model: PeftModel, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: int = 30) -> None:
    model.train()
    for step in range(steps):
        labels = torch.tensor([step % 5, (step + 1) % 5])
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    model.eval()


def reloaded(model: PeftModel, name: str, folder: Path) -> PeftModel:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(build(name)[0], folder).eval()


@pytest.mark.parametrize("mode", ["remove", "zero"])
@pytest.mark.parametrize("name", BACKBONES)
def test_pruned_values_stay_zero_under_momentum_and_weight_decay(name: str, mode: str, tmp_path: Path) -> None:
    model, inputs = adapt(name, pruned_prompts=mode, visual_prompt_dropout=0.1)
    identities = [id(p) for _, p in trainable(model)]
    gates = some_gates(model)
    apply_gates(model, gates)
    optimizer = torch.optim.AdamW([p for _, p in trainable(model)], lr=1e-2, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in trainable(model)}
    train(model, inputs, optimizer)
    assert [id(p) for _, p in trainable(model)] == identities
    assert all(not torch.equal(p, before[name]) for name, p in trainable(model))
    for row, layer in enumerate(prompt_layers(model)):
        prompts, alive = layer.e2vpt_visual_prompts["default"], layer.kept("default")
        assert torch.equal(alive, gates.segment[row].repeat_interleave(layer.site.width // 4, dim=-1) == 1)
        assert 0 < int((~alive).sum()) < alive.numel()
        assert (prompts[~alive] == 0).all() and (prompts[alive] != 0).all()
        assert (prompts.grad[~alive] == 0).all()
    other = reloaded(model, name, tmp_path)
    assert torch.equal(predict(other, inputs), predict(model, inputs))


@pytest.mark.parametrize("mode", ["remove", "zero"])
def test_momentum_from_before_the_pruning_has_no_effect(mode: str, tmp_path: Path) -> None:
    """An optimizer that goes on moves pruned values by the momentum it has; the gates keep them out all the same."""
    model, inputs = adapt("vit", pruned_prompts=mode)
    optimizer = torch.optim.AdamW([p for _, p in trainable(model)], lr=1e-2, weight_decay=0.1)
    train(model, inputs, optimizer, steps=3)
    apply_gates(model, some_gates(model))
    train(model, inputs, optimizer, steps=3)
    drifted = [
        layer.e2vpt_visual_prompts["default"][~layer.kept("default")].abs().max() for layer in prompt_layers(model)
    ]
    assert min(drifted) > 0
    other = reloaded(model, "vit", tmp_path)
    assert torch.equal(predict(other, inputs), predict(model, inputs))
    for layer, drift in zip(prompt_layers(other), drifted, strict=True):
        assert (layer.e2vpt_visual_prompts["default"][~layer.kept("default")] == 0).all() and drift > 0


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_layer_may_lose_all_its_prompts(name: str, tmp_path: Path) -> None:
    model, inputs = adapt(name, num_kv_prompts=0)
    gates = some_gates(model)
    gates.token[1], gates.segment[1] = 0, 0
    apply_gates(model, gates)
    optimizer = torch.optim.AdamW([p for _, p in trainable(model)], lr=1e-2, weight_decay=0.1)
    train(model, inputs, optimizer, steps=2)
    assert all(p.grad is not None for _, p in trainable(model))  # as DDP needs it
    assert model.prompt_summary().layers[1].num_values == 0
    other = reloaded(model, name, tmp_path)
    assert torch.equal(predict(other, inputs), predict(model, inputs))


@pytest.mark.parametrize("name", BACKBONES)
def test_removing_a_prompt_is_training_without_it(name: str) -> None:
    """The logits of a pruned model are those of a model that never had the prompt."""
    model, inputs = adapt(name, dtype=torch.float64)
    gates = some_gates(model, min_tokens=1)
    apply_gates(model, Gates(gates.token, gates.token[..., None].expand_as(gates.segment)))
    fewer, _ = adapt(name, dtype=torch.float64, num_visual_prompts=2)
    fewer.get_base_model().classifier.load_state_dict(model.get_base_model().classifier.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(prompt_layers(fewer), prompt_layers(model), strict=True):
            kept = theirs.e2vpt_token_gates["default"] == 1
            ours.e2vpt_visual_prompts["default"].copy_(theirs.e2vpt_visual_prompts["default"][kept])
            ours.e2vpt_kv_prompts["default"].copy_(theirs.e2vpt_kv_prompts["default"])
    torch.testing.assert_close(predict(fewer, inputs), predict(model, inputs), rtol=0, atol=1e-13)
    assert model.prompt_summary().num_prompt_values == fewer.prompt_summary().num_prompt_values
