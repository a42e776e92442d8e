# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What `trained_tensors`, `rewind` and `redraw` promise: earlier values, in place, of prompts and head alike."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_e2vpt import redraw, rewind, trained_tensors
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support.adapted import adapt, config_of, predict, prune, trainable, trained
from tests.support.models import build


BACKBONES = ("vit", "dinov2", "swin", "clip")


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", BACKBONES)
def test_rewinding_gives_prompts_and_head_their_values_back_in_place(name: str) -> None:
    model, inputs = adapt(name)
    kept, logits, everything = trained_tensors(model), predict(model, inputs), values_of(model)
    assert {key.split(".")[-2] for key in kept} == {"e2vpt_visual_prompts", "e2vpt_kv_prompts", "default"}
    identities = [id(p) for p in model.parameters()]
    trained(model)
    assert not torch.allclose(predict(model, inputs), logits)
    assert all(not torch.equal(p, kept[key]) for key, p in trainable(model))
    rewind(model, kept)
    assert torch.equal(predict(model, inputs), logits)
    assert all(torch.equal(tensor, everything[key]) for key, tensor in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == identities


@pytest.mark.parametrize("name", BACKBONES)
def test_pruned_values_stay_pruned(name: str) -> None:
    model, _ = adapt(name)
    kept = trained_tensors(model)
    prune(model)
    trained(model)
    rewind(model, kept)
    for layer in prompt_layers(model):
        prompts, alive = layer.e2vpt_visual_prompts["default"], layer.kept("default")
        original = kept[f"base_model.model.e2vpt.{layer.index}.e2vpt_visual_prompts.default"]
        assert 0 < int((~alive).sum())
        assert torch.equal(prompts, torch.where(alive, original, torch.zeros(())))


def test_running_means_of_a_head_are_rewound_too() -> None:
    base, inputs = build("vit")
    base.classifier = nn.Sequential(nn.BatchNorm1d(32), base.classifier)
    model = get_peft_model(base, config_of()).train()
    kept = trained_tensors(model)
    model(**inputs)
    (head,) = model.get_base_model().classifier.modules_to_save.values()
    assert not torch.equal(head[0].running_mean, torch.zeros(32))
    rewind(model, kept)
    assert torch.equal(head[0].running_mean, torch.zeros(32))


def test_a_wrapped_model_is_rewound_too() -> None:
    model, _ = adapt("vit")
    compiled = torch.compile(model, backend="eager")
    kept = trained_tensors(compiled)
    assert kept.keys() == trained_tensors(model).keys()
    trained(model)
    rewind(compiled, kept)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in trained_tensors(model).items())


def test_other_parameters_are_refused() -> None:
    model, _ = adapt("vit")
    kept = trained_tensors(model)
    missing = dict(kept)
    del missing[next(iter(kept))]
    with pytest.raises(ValueError, match="other parameters than those to rewind to: base_model"):
        rewind(model, missing)
    with pytest.raises(ValueError, match="other parameters than those to rewind to: more"):
        rewind(model, {**kept, "more": torch.zeros(1)})


def fresh(name: str = "vit") -> PeftModel:
    base, _ = build(name)
    torch.manual_seed(0)
    return get_peft_model(base, config_of(seed=0, num_visual_prompts=50))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_new_draw_comes_from_the_initial_distributions(name: str) -> None:
    model = fresh(name)
    initial, everything = trained_tensors(model), values_of(model)
    identities = [id(p) for p in model.parameters()]
    trained(model)
    redraw(model, "default", seed=1)
    assert [id(p) for p in model.parameters()] == identities
    drawn = trained_tensors(model)
    assert all(not torch.equal(drawn[key], initial[key]) for key in drawn if not key.endswith("bias"))
    assert all(torch.equal(t, everything[key]) for key, t in model.state_dict().items() if key not in drawn)
    for layer in prompt_layers(model):
        bound = math.sqrt(6 / (3 * layer.site.patch_area + layer.site.width))
        prompts = layer.e2vpt_visual_prompts["default"]
        assert 0.95 * bound < prompts.abs().max() <= bound
        assert prompts.detach().std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        bound = math.sqrt(6 / (2 * layer.site.head_dim))
        assert 0.7 * bound < layer.e2vpt_kv_prompts["default"].abs().max() <= bound


@pytest.mark.parametrize("name", ["vit", "swin", "dinov2"])
def test_a_new_head_is_drawn_as_transformers_draws_it(name: str) -> None:
    model = fresh(name)
    trained(model)
    redraw(model, "default", seed=1)
    head = model.get_base_model().classifier.modules_to_save["default"]
    assert head.weight.detach().std().item() == pytest.approx(model.get_base_model().config.initializer_range, rel=0.2)
    assert (head.bias == 0).all()


def test_a_seed_gives_its_draw_and_leaves_the_generators_alone() -> None:
    model, state = fresh(), torch.get_rng_state()
    redraw(model, "default", seed=1)
    first = trained_tensors(model)
    assert torch.equal(torch.get_rng_state(), state)
    trained(model)
    torch.rand(3)
    redraw(model, "default", seed=1)
    assert all(torch.equal(tensor, first[key]) for key, tensor in trained_tensors(model).items())
    redraw(model, "default", seed=2)
    again = trained_tensors(model)
    assert all(not torch.equal(again[key], first[key]) for key in first if not key.endswith("bias"))


def test_a_new_draw_leaves_pruned_values_and_other_adapters_alone() -> None:
    model, _ = adapt("vit")
    model.add_adapter("other", config_of(seed=3))
    others = {key: t.clone() for key, t in model.state_dict().items() if ".other" in key}
    prune(model)
    redraw(model, "default", seed=1)
    for layer in prompt_layers(model):
        prompts, alive = layer.e2vpt_visual_prompts["default"], layer.kept("default")
        assert (prompts[~alive] == 0).all() and (prompts[alive] != 0).all() and (~alive).any()
    assert others and all(torch.equal(model.state_dict()[key], tensor) for key, tensor in others.items())


def test_a_head_that_cannot_be_drawn_is_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(5))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden[:, :5] * self.factor

    base, _ = build("vit")
    base.classifier = Scale()
    model = get_peft_model(base, config_of())
    with pytest.raises(ValueError, match="Scale in the head cannot be drawn anew: rewind to 'init' instead"):
        redraw(model, "default", seed=1)
