# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Heads of every kind start as linear probes; the pass that starts them leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import MobileViTConfig, MobileViTForImageClassification, ViTConfig, ViTForImageClassification

from peft_e2vpt import E2VPTConfig, fold_heads, rewind, start_heads, trained_tensors
from peft_e2vpt.training.head_start import standardised_layers
from tests.support import zoo, zoo_checks
from tests.support.models import FAMILIES, build
from tests.support.tasks import TASKS
from tests.support.training import Images, adapted


CLASSIFIERS = [name for name, family in FAMILIES.items() if "Classification" in family.model]
STARTED = {
    "regression": 1,
    "multi-label": 1,
    "segmentation (SegFormer)": 1,
    "segmentation (DPT)": 1,
    "video classification": 1,
    "detection": 0,
    "contrastive": 0,
    "masked image modelling": 0,
    "captioning": 0,
}
Batches = list[dict[str, Tensor]]


def batches_for(name: str, count: int = 6, dtype: torch.dtype = torch.float64) -> Batches:
    """Batches of noise that a tiny model of `models.py` takes, with labels."""
    generator = torch.Generator().manual_seed(3)
    _, inputs = build(name, dtype=dtype)
    made = []
    for _ in range(count):
        noisy = {
            key: value + 0.5 * torch.randn(value.shape, generator=generator, dtype=dtype)
            if value.is_floating_point()
            else value
            for key, value in inputs.items()
        }
        size = len(next(iter(noisy.values())))
        made.append({**noisy, "labels": torch.randint(3, (size,), generator=generator)})
    return made


def loss_of(model: nn.Module, batches: Batches) -> float:
    with torch.no_grad():
        return float(torch.stack([loss_of_batch(model.eval(), batch) for batch in batches]).mean())


def loss_of_batch(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if "teacher" in type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__.lower():
        others = {key: value for key, value in batch.items() if key != "labels"}
        return F.cross_entropy(model(**others).logits, batch["labels"])
    loss: Tensor = model(**batch).loss
    return loss


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a pass could leave behind, but the last layers."""
    last = {f"{path}.{kind}" for path in standardised_layers(model) for kind in ("weight", "bias")}
    buffers = {n: b.clone() for n, b in model.named_buffers() if "_feature_" not in n}
    return {
        "values": {n: p.detach().clone() for n, p in model.named_parameters() if n not in last},
        "buffers": buffers,
        "modes": {n: m.training for n, m in model.named_modules()},
        "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_head_of_a_classifier_is_the_probe_of_least_loss(name):
    model, batches = adapted(name, dtype=torch.float64, visual_prompt_dropout=0.0), batches_for(name)
    before = loss_of(model, batches)
    start = start_heads(model, batches, weight_decay=0.1)
    heads = 2 if "teacher" in name else 1
    assert len(start.layers) == heads and not start.reason
    assert start.num_samples == sum(len(batch["labels"]) for batch in batches)
    assert loss_of(model, batches) < min(before, 1.1)
    for path in start.layers:
        assert is_stationary(model, path, batches)


def is_stationary(model: nn.Module, path: str, batches: Batches) -> bool:
    """Whether no step of a last layer, on standardised features, makes the regularised loss smaller."""
    layer = model.get_submodule(path)
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.detach()))
    taken: list[Tensor] = []
    first = layer.register_forward_pre_hook(lambda layer, inputs: taken.append(inputs[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    handle.remove(), first.remove()
    features = torch.cat(taken)
    scale, mean = layer._feature_scale, layer._feature_mean
    if (features.mean(0).abs() > 1e-3).any():  # seen before the layer's own hook
        features = (features - mean) * scale
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    labels = torch.cat([batch["labels"] for batch in batches])
    loss = F.cross_entropy(F.linear(features, weight, bias), labels) + 0.05 * weight.square().sum()
    loss = loss + 0.5e-4 * bias.square().sum()
    return all(g.abs().max() < 1e-4 for g in torch.autograd.grad(loss, (weight, bias)))


@pytest.mark.parametrize("mode", [True, False])
def test_the_pass_leaves_no_trace(mode):
    model, batches = adapted(dtype=torch.float64), batches_for("vit")
    start_heads(model, batches)
    model.train(mode)
    before = everything(model)
    start_heads(model, batches)
    after = everything(model)
    values = [
        (before[key].pop(name), after[key].pop(name)) for key in ("values", "buffers") for name in list(before[key])
    ]
    assert all(torch.equal(one, other) for one, other in values)
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after


@pytest.mark.parametrize("name", STARTED)
def test_every_kind_of_task_starts_or_says_why_not(name):
    task = TASKS[name]
    model, samples = task.adapted(modules_to_save=None), task.samples(8)
    batches = [task.collate(samples[i : i + 4]) for i in (0, 4)]
    kept = trained_tensors(model)
    start = start_heads(model, batches)
    assert len(start.layers) == STARTED[name], start
    assert bool(start.reason) == (not start.layers)
    if start.layers:
        rewound = trained_tensors(model)
        assert loss_of(model, batches) < loss_after_rewinding(model, kept, batches)
        assert rewound.keys() > kept.keys()
    else:
        assert all(torch.equal(tensor, kept[key]) for key, tensor in trained_tensors(model).items())


def loss_after_rewinding(model: nn.Module, tensors: dict[str, Tensor], batches: Batches) -> float:
    fold_heads(model)
    rewind(model, tensors)
    return loss_of(model, batches)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [spec.name for spec in zoo.ZOO if spec.attention and "Classification" in spec.model])
def test_every_classifier_of_the_zoo_starts(name):
    if zoo_checks.missing(name):
        pytest.skip(zoo_checks.missing(name))
    model, inputs = zoo_checks.adapt(name, modules_to_save=None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        size = len(zoo.output_of(model(**inputs)))
    batches = [{**inputs, "labels": torch.randint(2, (size,), generator=generator)} for _ in range(2)]
    assert start_heads(model, batches).layers


class Pixels(nn.Module):
    """A model of a user: 12 numbers in, and a head of a kind of its own."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Linear(12, 8).requires_grad_(False)
        self.head = head

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(pixel_values))}


class Doubled(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return 2 * super().forward(features)


def numbers(labels: Tensor | None = None) -> Batches:
    generator = torch.Generator().manual_seed(0)
    pixels = 9 + torch.randn(24, 12, generator=generator)
    labels = torch.randint(3, (24,), generator=generator) if labels is None else labels
    return [{"pixel_values": pixels[i : i + 8], "labels": labels[i : i + 8]} for i in (0, 8, 16)]


@pytest.mark.parametrize(
    ("head", "layers"),
    {
        "linear": (lambda: nn.Linear(8, 3), ["head"]),
        "MLP": (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), ["head.2"]),
        "MLP with a batch norm": (
            lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
            ["head.3"],
        ),
        "behind dropout": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3)), ["head.1"]),
        "without bias": (lambda: nn.Linear(8, 3, bias=False), ["head"]),
        "before softmax": (lambda: nn.Sequential(nn.Linear(8, 3), nn.Softmax(-1)), []),
        "a linear layer of another kind": (lambda: Doubled(8, 3), []),
        "none": (nn.Identity, []),
    }.values(),
    ids=lambda value: None,
)
def test_of_a_head_the_layer_that_gives_the_logits_starts(head, layers):
    torch.manual_seed(0)
    model = Pixels(head())
    before = everything(model)
    start = start_heads(model, numbers())
    assert start.layers == layers
    assert all(torch.equal(value, before["buffers"][name]) for name, value in everything(model)["buffers"].items())
    if layers:
        logits = torch.cat([model.eval()(b["pixel_values"])["logits"] for b in numbers()])
        assert bool(start.reason) is False and logits.isfinite().all()
    else:
        assert "logits" in start.reason or "trains no" in start.reason


@pytest.mark.parametrize(
    ("labels", "started"),
    [
        (torch.rand(24, 3, generator=torch.Generator().manual_seed(0)).softmax(1), True),  # mixed images
        (torch.randint(2, (24, 3), generator=torch.Generator().manual_seed(0)).float(), True),
        (torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), True),
        (torch.arange(24) % 4 - 1, True),  # -1: no class
        (torch.full((24,), -100), False),
        (torch.zeros(24, 5, dtype=torch.long), False),  # tokens
    ],
    ids=["shares", "several", "numbers", "some without a class", "all without a class", "tokens"],
)
def test_labels_tell_the_loss(labels, started):
    torch.manual_seed(0)
    model = Pixels(nn.Linear(8, 3))
    assert bool(start_heads(model, numbers(labels)).layers) is started


def test_ridge_regression_is_that_of_the_normal_equations():
    labels = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Pixels(nn.Linear(8, 3)).double()
    batches = [{key: value.double() for key, value in batch.items()} for batch in numbers(labels)]
    start_heads(model, batches, weight_decay=0.5)
    features = model.body(torch.cat([batch["pixel_values"] for batch in batches]))
    standardised = (features - model.head._feature_mean) * model.head._feature_scale
    gram = standardised.T @ standardised / 24 + 0.5 * torch.eye(8, dtype=torch.float64)
    expected = torch.linalg.inv(gram) @ standardised.T @ (labels - labels.mean(0)) / 24
    torch.testing.assert_close(model.head.weight, expected.T, rtol=1e-9, atol=1e-12)


def test_a_head_of_lora_and_one_of_a_plain_model_start_alike():
    base, _ = build("vit")
    batches = batches_for("vit", dtype=torch.float32)
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj", "query"], modules_to_save=["classifier"]))
    assert [path.rpartition(".")[0] for path in start_heads(lora, batches).layers] == [
        "base_model.model.classifier.modules_to_save"
    ]
    plain, _ = build("vit")
    plain.requires_grad_(False).classifier.requires_grad_(True)
    assert start_heads(plain, batches).layers == ["classifier"]
    torch.testing.assert_close(loss_of(lora, batches), loss_of(plain, batches), rtol=1e-5, atol=1e-5)


def test_of_several_adapters_the_active_one_starts():
    model = adapted()
    model.add_adapter("other", E2VPTConfig(num_visual_prompts=2, num_segments=8))
    model.set_adapter("other")
    assert [
        path.rpartition(".")[2] for path in start_heads(model, batches_for("vit", dtype=torch.float32)).layers
    ] == ["other"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backbone_in_half_precision_gets_a_float32_start(dtype):
    model = adapted(dtype=dtype, visual_prompt_dropout=0.0)
    batches = batches_for("vit", dtype=dtype)
    before = loss_of(model, batches)
    assert start_heads(model, batches).layers
    assert loss_of(model, batches) < before


def test_a_saved_adapter_holds_the_plain_head(tmp_path):
    model, batches = adapted(dtype=torch.float64), batches_for("vit")
    start_heads(model, batches)
    expected = loss_of(model, batches)
    model.save_pretrained(tmp_path / "standardised")
    fold_heads(model)
    assert not standardised_layers(model)
    model.save_pretrained(tmp_path / "plain")
    for folder in ("standardised", "plain"):
        loaded = PeftModel.from_pretrained(build("vit", dtype=torch.float64)[0], tmp_path / folder)
        assert not standardised_layers(loaded)
        assert loss_of(loaded, batches) == pytest.approx(expected, abs=1e-6)
    sizes = {len((tmp_path / f / "adapter_model.safetensors").read_bytes()) for f in ("standardised", "plain")}
    assert len(sizes) == 1


def test_no_more_samples_are_read_than_asked_for():
    model, batches = adapted(), batches_for("vit", dtype=torch.float32)
    size = len(batches[0]["labels"])

    def once():
        yield batches[0]
        yield batches[1]
        raise AssertionError("read too far")

    assert start_heads(model, once(), max_samples=size + 1).num_samples == size + 1


def test_a_convolutional_head_over_one_position_starts():
    torch.manual_seed(0)
    config = MobileViTConfig(image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8] * 7, num_labels=3)
    model = MobileViTForImageClassification(config)
    model.requires_grad_(False).classifier.requires_grad_(True)
    images = torch.randn(8, 3, 64, 64)
    assert start_heads(model, [{"pixel_values": images, "labels": torch.arange(8) % 3}]).layers == ["classifier"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_samples": 1}, "max_samples must be at least 2"), ({"weight_decay": 0.0}, "weight_decay must be above 0")],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        start_heads(adapted(), [], **settings)


@pytest.mark.parametrize("batches", [[], "one image"])
def test_too_few_data_leave_the_head_as_it_is(batches):
    model = ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    )
    one = [{"pixel_values": Images(1)[0]["pixel_values"][None], "labels": torch.tensor([1])}]
    start = start_heads(model, one if batches else [])
    assert not start.layers and start.reason
