# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What `score_prompts` promises: the mean over samples of |dL(x) / d gate|, exactly, and no trace in the model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.utils import DataLoaderConfiguration
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from peft_e2vpt import E2VPTConfig, apply_gates, prune, score_prompts, search_pruning
from peft_e2vpt.tuner.gates import GateOverride
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support.adapted import adapt, checkpoint_activations, trained
from tests.support.models import NUM_LABELS
from tests.support.paths import GOLDEN


BACKBONES = ("vit", "dinov2", "swin", "clip")
IMAGES = 5
Batch = dict[str, Any]


def images(count: int = IMAGES, dtype: torch.dtype = torch.float64) -> Batch:
    """Labelled pictures; every label occurs."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels.to(dtype), "labels": torch.arange(count) % NUM_LABELS}


def split(batch: Batch, *sizes: int) -> list[Batch]:
    parts = {name: value.split(list(sizes)) for name, value in batch.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(sizes))]


def default_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def one_image_at_a_time(
    model: PeftModel, batch: Batch, loss_fn: Any = default_loss, scope: str = "layer"
) -> tuple[Tensor, Tensor]:
    """The definition, written the slow way: a backward pass per image, gates without a batch dimension of their own.

    The gate of the attention is a factor of the prompt's weight, `rho exp(q k)`, that is log(rho) added to its score.
    """
    layers = prompt_layers(model)
    config = model.peft_config["default"]
    token = torch.zeros(len(layers), config.num_visual_prompts, dtype=torch.float64)
    segment = torch.zeros(len(layers), config.num_visual_prompts, config.num_segments, dtype=torch.float64)
    count = len(batch["labels"])
    for single in split(batch, *[1] * count):
        gates = []
        for layer in layers:
            ones = torch.ones(1, config.num_visual_prompts, dtype=torch.float64, requires_grad=True)
            parts = torch.ones(
                1, config.num_visual_prompts, config.num_segments, dtype=torch.float64, requires_grad=True
            )
            layer.gate_override = GateOverride(ones, parts, config.token_gate)
            gates += [ones, parts]
        if scope == "model":
            gates[0::2], gates[1::2] = [gates[0]] * len(layers), [gates[1]] * len(layers)
            for layer in layers:
                layer.gate_override = GateOverride(gates[0], gates[1], config.token_gate)
        loss_fn(model, single).sum().backward()
        token += torch.cat([gate.grad.abs() for gate in gates[0::2]])
        segment += torch.cat([gate.grad.abs() for gate in gates[1::2]])
    for layer in layers:
        layer.gate_override = None
    model.zero_grad()
    return token / count, segment / count


def assert_equal_scores(found: Any, token: Tensor, segment: Tensor, tolerance: float = 1e-12) -> None:
    assert token.abs().min() > 0 and segment.abs().max() > 0, "nothing is compared"
    torch.testing.assert_close(found.token, token, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.segment, segment, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------ golden numbers
PARITY = {
    "token_gate": "embedding",
    "segment_layout": "strided",
    "pruned_prompts": "zero",
    "gate_scope": "model",
    "visual_prompt_dropout": 0.0,
    "num_kv_prompts": 5,
    "num_segments": 16,
}


@cache
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "pruning.safetensors")


def golden_model(name: str) -> PeftModel:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=6,
        layer_norm_eps=1e-6,
        attn_implementation="sdpa",
    )
    base = ViTForImageClassification(config).double().eval()
    weights = load_file(GOLDEN / "vit.safetensors")
    base.load_state_dict({key.removeprefix("s0/"): t for key, t in weights.items() if key.startswith("s0/")})
    given = {key.removeprefix(f"{name}/in."): t.double() for key, t in golden().items() if key.startswith(f"{name}/")}
    mode = "shallow" if "shallow" in name else "deep"
    count = len(given["token_mask"])
    model = get_peft_model(base, E2VPTConfig(**PARITY, num_visual_prompts=count, visual_prompt_mode=mode)).eval()
    with torch.no_grad():
        for layer in prompt_layers(model):
            if "default" in layer.e2vpt_visual_prompts:
                layer.set_gates("default", given["token_mask"], given["piece_mask"])
                layer.e2vpt_visual_prompts["default"].copy_(given[f"visual_prompt.{layer.index}"])
            layer.e2vpt_kv_prompts["default"].copy_(given[f"kv_prompt.{layer.index}"][None])
    return model


@pytest.mark.parametrize("count", [5, 10])
@pytest.mark.parametrize("variant", ["deep_init", "deep_big", "deep_realmask", "shallow_big", "shallow_init"])
def test_signed_scores_equal_those_of_the_released_code(count: int, variant: str) -> None:
    name = f"M{count}_{variant}"
    batch = {"pixel_values": golden()["pixel_values"].double(), "labels": golden()["labels"].long()}
    scores = score_prompts(golden_model(name), split(batch, 4, 4, 2), signed=True)
    token, piece = golden()[f"{name}/token_scores"], golden()[f"{name}/piece_scores"]
    assert scores.num_samples == 10
    assert piece.abs().max() > 1e-5
    torch.testing.assert_close(scores.token, token[None], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.segment, piece[None], rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- exact scores
@pytest.mark.parametrize("gate", ["attention", "embedding"])
@pytest.mark.parametrize("name", BACKBONES)
def test_scores_are_the_mean_over_images_of_the_absolute_gradient_of_each(name: str, gate: str) -> None:
    model, _ = adapt(name, dtype=torch.float64, token_gate=gate)
    batch = images()
    token, segment = one_image_at_a_time(model, batch)
    scores = score_prompts(model, split(batch, 3, 2))
    assert scores.num_samples == IMAGES
    assert_equal_scores(scores, token, segment)


@pytest.mark.parametrize("gate", ["attention", "embedding"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_gates_of_the_whole_model_score_the_sum_over_its_layers_of_one_image(name: str, gate: str) -> None:
    model, _ = adapt(name, dtype=torch.float64, token_gate=gate, gate_scope="model")
    batch = images()
    token, segment = one_image_at_a_time(model, batch, scope="model")
    scores = score_prompts(model, [batch])
    assert scores.token.shape == (1, 3)
    assert_equal_scores(scores, token[:1], segment[:1])


def test_shallow_prompts_are_scored_too() -> None:
    model, _ = adapt("vit", dtype=torch.float64, visual_prompt_mode="shallow")
    batch = images()
    layer = prompt_layers(model)[0]
    expected = torch.zeros(1, 3, dtype=torch.float64)
    for single in split(batch, *[1] * IMAGES):  # d L(rho P) / d rho = sum of P times its gradient
        prompts = layer.e2vpt_visual_prompts["default"]
        (gradient,) = torch.autograd.grad(model(**single).loss, prompts)
        expected += (prompts * gradient).sum(-1).abs().detach()
    scores = score_prompts(model, split(batch, 3, 2))
    torch.testing.assert_close(scores.token, expected / IMAGES, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_a_segment_scores_as_the_values_that_it_holds(layout: str) -> None:
    model, _ = adapt("vit", dtype=torch.float64, segment_layout=layout)
    batch = images(1)
    scores = score_prompts(model, [batch])
    model.zero_grad()
    model(**batch).loss.backward()
    for row, layer in enumerate(prompt_layers(model)):
        prompts = layer.e2vpt_visual_prompts["default"]
        values = (prompts * prompts.grad).detach()
        values = values.view(3, 4, 8) if layout == "contiguous" else values.view(3, 8, 4).transpose(1, 2)
        torch.testing.assert_close(scores.segment[row], values.sum(-1).abs(), rtol=1e-12, atol=1e-12)


def test_signed_scores_are_means_of_batch_gradients_and_may_be_negative() -> None:
    model, _ = adapt("vit", dtype=torch.float64)
    batch = images()
    mean_of_batches = score_prompts(model, split(batch, 4, 1), signed=True).token
    first, second = (score_prompts(model, [part], signed=True).token for part in split(batch, 4, 1))
    torch.testing.assert_close(mean_of_batches, (first + second) / 2, rtol=1e-12, atol=1e-15)
    assert (mean_of_batches < 0).any()
    assert (score_prompts(model, [batch]).token >= mean_of_batches.abs() - 1e-6).any()


# ----------------------------------------------------------------------------------------------------- kinds of losses
def per_sample_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="none")


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    return per_sample_loss(model, batch).mean()


def smoothed_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(pixel_values=batch["pixel_values"]).logits
    return F.cross_entropy(logits, batch["labels"], label_smoothing=0.1)


@pytest.mark.parametrize("loss_fn", [per_sample_loss, mean_loss, smoothed_loss])
def test_scores_are_those_of_the_loss_that_the_user_computes(loss_fn: Any) -> None:
    model, _ = adapt("vit", dtype=torch.float64)
    batch = images()
    token, segment = one_image_at_a_time(model, batch, loss_fn)
    assert_equal_scores(score_prompts(model, split(batch, 3, 2), loss_fn=loss_fn), token, segment)


def test_the_loss_of_a_trainer_with_label_smoothing_is_scored(tmp_path: Path) -> None:
    model, _ = adapt("vit", dtype=torch.float64)
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    trainer = Trainer(model, args)
    batch = images()
    # transformers smooths as torch does, but sums in float32
    token, segment = one_image_at_a_time(model, batch, smoothed_loss)
    found = score_prompts(model, split(batch, 3, 2), loss_fn=trainer.compute_loss)
    assert_equal_scores(found, token, segment, tolerance=1e-7)
    assert "labels" in batch
    plain = score_prompts(model, [batch])
    assert not torch.allclose(found.token, plain.token, rtol=1e-3)


@pytest.mark.parametrize("kind", ["multi_label", "soft"])
def test_labels_may_be_many_or_soft(kind: str) -> None:
    model, _ = adapt("vit", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(IMAGES, NUM_LABELS, generator=generator, dtype=torch.float64)
    batch = {**images(), "labels": (labels > 0.5).double() if kind == "multi_label" else labels}

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(pixel_values=batch["pixel_values"]).logits
        return F.binary_cross_entropy_with_logits(logits, batch["labels"])

    token, segment = one_image_at_a_time(model, batch, loss_fn)
    assert_equal_scores(score_prompts(model, split(batch, 3, 2)), token, segment)  # transformers' own loss for these


# ------------------------------------------------------------------------------------------- the gate on the attention
def loss_with_weight(model: PeftModel, batch: Batch, row: int, prompt: int, weight: float) -> float:
    """The loss when the attention weight of one prompt, before it is normalised, is multiplied by `weight`."""
    layers = prompt_layers(model)
    for i, layer in enumerate(layers):
        config = layer.e2vpt_config["default"]
        token = torch.ones(1, config.num_visual_prompts, dtype=torch.float64)
        if i == row:
            token[0, prompt] = weight
        layer.gate_override = GateOverride(token, layer.e2vpt_segment_gates["default"][None], "attention")
    with torch.no_grad():
        loss = model(**batch).loss
    for layer in layers:
        layer.gate_override = None
    return float(loss)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_score_is_the_slope_of_the_loss_as_the_weight_of_the_prompt_changes(name: str) -> None:
    model, _ = adapt(name, dtype=torch.float64)
    batch, step = images(1), 1e-5
    scores = score_prompts(model, [batch])
    for row in range(len(prompt_layers(model))):
        for prompt in range(3):
            up, down = (loss_with_weight(model, batch, row, prompt, 1 + s) for s in (step, -step))
            slope = abs(up - down) / (2 * step)
            assert scores.token[row, prompt] == pytest.approx(slope, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_weight_of_zero_is_removal(name: str) -> None:
    model, _ = adapt(name, dtype=torch.float64)
    batch = images()
    untouched = loss_with_weight(model, batch, 1, 2, 1.0)
    almost, nothing = (loss_with_weight(model, batch, 1, 2, weight) for weight in (1e-14, 0.0))
    layer = prompt_layers(model)[1]
    token = torch.tensor([1.0, 1.0, 0.0])
    layer.set_gates("default", token, layer.e2vpt_segment_gates["default"].clone())
    removed = model(**batch).loss.item()
    assert abs(removed - untouched) > 1e-6
    assert nothing == pytest.approx(removed, abs=1e-13)
    assert almost == pytest.approx(removed, abs=1e-12)


def test_the_gate_on_the_embedding_hardly_matters_behind_a_norm() -> None:
    """Why the default is the attention: `norm(rho P)` depends on rho through the epsilon of the norm only."""
    scores = {}
    for gate in ("attention", "embedding"):
        model, _ = adapt("vit", dtype=torch.float64, token_gate=gate)
        scores[gate] = score_prompts(model, [images()]).token
    assert scores["embedding"].max() < 1e-6 * scores["attention"].min()


# ------------------------------------------------------------------------------------------ batches, padding, autocast
@pytest.mark.parametrize("name", BACKBONES)
def test_scores_do_not_depend_on_the_batch_size(name: str) -> None:
    model, _ = adapt(name, dtype=torch.float64)
    batch = images()
    whole = score_prompts(model, [batch])
    assert_equal_scores(score_prompts(model, split(batch, 2, 2, 1)), whole.token, whole.segment)
    assert_equal_scores(score_prompts(model, split(batch, *[1] * IMAGES)), whole.token, whole.segment)


def test_padded_samples_do_not_count() -> None:
    model, _ = adapt("vit", dtype=torch.float64)
    batch = images()
    expected = score_prompts(model, [batch])
    padding = {"pixel_values": torch.ones(3, 3, 32, 32, dtype=torch.float64), "labels": torch.full((3,), -100)}
    padded = {name: torch.cat([value[3:], padding[name]]) for name, value in batch.items()}
    found = score_prompts(model, [split(batch, 3, 2)[0], padded, padding])  # the last holds padding only
    assert found.num_samples == IMAGES
    assert_equal_scores(found, expected.token, expected.segment)


def test_only_the_asked_number_of_batches_is_read() -> None:
    model, _ = adapt("vit", dtype=torch.float64)
    parts = split(images(), 2, 2, 1)
    expected = score_prompts(model, parts[:2])
    found = score_prompts(model, parts, max_batches=2)
    assert found.num_samples == 4
    assert torch.equal(found.token, expected.token)


@pytest.mark.parametrize("name", BACKBONES)
def test_scores_under_bfloat16_autocast_are_close(name: str) -> None:
    model, _ = adapt(name)
    batch = images(dtype=torch.float32)
    exact = score_prompts(model, [batch])

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss: Tensor = model(**batch).loss
        return loss

    rough = score_prompts(model, [batch], loss_fn=loss_fn)
    for exactly, roughly in ((exact.token, rough.token), (exact.segment, rough.segment)):
        error = (roughly - exactly).norm() / exactly.norm()
        assert 1e-6 < error < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_of_a_backbone_in_its_own_precision_are_close_to_those_in_float64(dtype: torch.dtype) -> None:
    exact = score_prompts(adapt("vit", dtype=torch.float64)[0], [images()])
    found = score_prompts(adapt("vit", dtype=dtype)[0], [images(dtype=dtype)])
    assert (found.token - exact.token).norm() / exact.token.norm() < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_scores_in_float16_do_not_vanish() -> None:
    """A loss whose gradients underflow in float16 still ranks the prompts."""
    batch = images(dtype=torch.float32)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            loss: Tensor = model(**batch).loss
        return 1e-6 * loss  # as of a model that is nearly always right

    model, _ = adapt("vit")
    exact = 1e-6 * score_prompts(model, [batch]).token
    found = score_prompts(model, [batch], loss_fn=loss_fn).token
    assert (found - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_scores_do_not_depend_on_the_attention_implementation(implementation: str) -> None:
    expected = score_prompts(adapt("vit")[0], [images(dtype=torch.float32)])
    model, _ = adapt("vit", attn_implementation=implementation)
    found = score_prompts(model, [images(dtype=torch.float32)])
    torch.testing.assert_close(found.token, expected.token, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["vit", "clip", "dinov2"])
@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_attentions_that_cannot_bias_a_score_give_way_while_scores_are_measured(
    implementation: str, name: str
) -> None:
    batch = images(dtype=torch.float32)
    model, _ = adapt(name)
    expected = score_prompts(model, [batch])
    searched = search_pruning(model, expected, [batch], min_segments=1)
    config = prompt_layers(model)[0].site.attention.config.__dict__["_e2vpt_source"]
    config._attn_implementation = implementation  # as on a GPU
    found = score_prompts(model, [batch])
    torch.testing.assert_close(found.token, expected.token, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.segment, expected.segment, rtol=1e-4, atol=1e-7)
    qualities = [
        candidate.quality for candidate in search_pruning(model, expected, [batch], min_segments=1).candidates
    ]
    assert qualities == pytest.approx([candidate.quality for candidate in searched.candidates], rel=1e-5)
    assert config._attn_implementation == implementation


def test_scores_are_the_same_with_gradient_checkpointing() -> None:
    model, _ = adapt("vit", dtype=torch.float64)
    expected = score_prompts(model, [images()])
    for reentrant in (False, True):
        checkpoint_activations(model, {"use_reentrant": reentrant})
        found = score_prompts(model.train(), [images()])
        assert torch.equal(found.token, expected.token)


def test_scores_of_pruned_prompts_are_zero_and_those_of_the_others_stay_exact() -> None:
    model, _ = adapt("vit", dtype=torch.float64)
    batch = images()
    gates = prune(score_prompts(model, [batch]), 1, 2, min_segments=1)
    apply_gates(model, gates)
    scores = score_prompts(model, [batch])
    assert torch.equal(scores.token == 0, gates.token == 0)
    assert torch.equal(scores.segment == 0, gates.segment == 0)
    for row in range(3):
        for prompt in gates.token[row].nonzero().flatten().tolist():
            slopes = [
                abs(
                    loss_with_weight(model, one, row, prompt, 1 + 1e-5)
                    - loss_with_weight(model, one, row, prompt, 1 - 1e-5)
                )
                for one in split(batch, *[1] * IMAGES)
            ]
            assert scores.token[row, prompt] == pytest.approx(sum(slopes) / IMAGES / 2e-5, rel=1e-5, abs=1e-10)


# ------------------------------------------------------------------------------------------------------------ no trace
class Augmented(Dataset):
    """Pictures to which every generator adds its noise."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Batch:
        noise = random.random() + float(np.random.rand()) + torch.rand(3, 32, 32)
        return {"pixel_values": noise + index, "labels": index % NUM_LABELS}


def generator_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_scoring_leaves_no_trace_in_the_model() -> None:
    model, _ = adapt("vit", visual_prompt_dropout=0.3)
    model.train()
    prompt_layers(model)[1].eval()
    model.get_base_model().classifier.eval()
    loader = DataLoader(Augmented(), batch_size=4, shuffle=True)
    model(**next(iter(loader))).loss.backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    identities = [id(p) for p in model.parameters()]
    modes = {name: module.training for name, module in model.named_modules()}
    requires = [p.requires_grad for p in model.parameters()]
    states = generator_states()

    scores = score_prompts(model, loader)

    assert scores.token.min() > 0 and gradients
    assert generator_states() == states
    assert [id(p) for p in model.parameters()] == identities
    assert [p.requires_grad for p in model.parameters()] == requires
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    now = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert now.keys() == gradients.keys() and all(torch.equal(now[name], gradients[name]) for name in now)
    assert all(layer.gate_override is None for layer in prompt_layers(model))


def test_scoring_leaves_no_trace_when_it_fails() -> None:
    model, _ = adapt("vit")
    model.train()
    states = generator_states()

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        score_prompts(model, DataLoader(Augmented(), 4), loss_fn=loss_fn)
    assert generator_states() == states
    assert all(module.training for module in model.modules())
    assert all(layer.gate_override is None for layer in prompt_layers(model))


def test_dropout_takes_no_part_in_scores() -> None:
    batch = images(dtype=torch.float32)
    without, _ = adapt("vit")
    with_dropout, _ = adapt("vit", visual_prompt_dropout=0.5)
    expected = score_prompts(without, [batch])
    assert torch.equal(score_prompts(with_dropout.train(), [batch]).token, expected.token)


def test_a_seed_makes_scores_of_augmented_data_repeatable() -> None:
    model, _ = adapt("vit")
    loader = DataLoader(Augmented(), batch_size=4, shuffle=True)
    seeded = [score_prompts(model, loader, seed=1).token for _ in range(2)]
    random.random(), np.random.rand(), torch.rand(1)
    assert torch.equal(score_prompts(model, loader, seed=1).token, seeded[0])
    assert torch.equal(*seeded)
    assert not torch.equal(score_prompts(model, loader, seed=2).token, seeded[0])


def plain_loader() -> Any:
    return DataLoader(Augmented(), batch_size=2, shuffle=True)


def loader_with_generator() -> Any:
    return DataLoader(Augmented(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))


def prepared_loader() -> Any:
    return Accelerator(cpu=True).prepare(loader_with_generator())


def seedable_loader() -> Any:
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)).prepare(
        loader_with_generator()
    )


@pytest.mark.parametrize("max_batches", [None, 1])
@pytest.mark.parametrize("make", [plain_loader, loader_with_generator, prepared_loader, seedable_loader])
def test_a_running_epoch_and_the_next_keep_their_order_and_noise(make: Any, max_batches: int | None) -> None:
    model, _ = adapt("vit")

    def labels_of_two_epochs(score: bool) -> Iterator[Any]:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        loader = make()
        for _ in range(2):
            for step, batch in enumerate(loader):
                if score and step == 1:
                    score_prompts(model, loader, max_batches=max_batches)
                yield batch["labels"].tolist(), batch["pixel_values"].double().sum().item()
                state = GradientState()
                yield state.in_dataloader, state.end_of_dataloader, state.remainder

    undisturbed, disturbed = list(labels_of_two_epochs(False)), list(labels_of_two_epochs(True))
    assert disturbed == undisturbed
    assert len(undisturbed) == 16 and undisturbed[:8] != undisturbed[8:]


# ------------------------------------------------------------------------------------------------------ wrapped models
def test_a_compiled_model_is_scored() -> None:
    model, _ = adapt("vit", dtype=torch.float64)
    expected = score_prompts(model, [images()])
    found = score_prompts(torch.compile(model, backend="aot_eager"), [images()])
    assert torch.equal(found.token, expected.token)


def test_an_adapter_is_scored_by_name() -> None:
    model, _ = adapt("vit", adapter_name="birds", dtype=torch.float64)
    expected = score_prompts(model, [images()])
    model.add_adapter("cats", E2VPTConfig(num_visual_prompts=2, num_segments=4))
    assert torch.equal(score_prompts(model, [images()], adapter_name="birds").token, expected.token)
    with pytest.raises(ValueError, match="adapter 'cats' is not the active one: call model.set_adapter"):
        score_prompts(model, [images()], adapter_name="cats")
    with pytest.raises(ValueError, match="Adapter dogs does not exist; the model has birds, cats"):
        score_prompts(model, [images()], adapter_name="dogs")
    model.set_adapter("cats")
    assert score_prompts(model, [images()]).token.shape == (3, 2)


def test_several_active_adapters_are_not_scored_together() -> None:
    model, _ = adapt("vit", adapter_name="birds", modules_to_save=[])
    model.add_adapter("cats", E2VPTConfig(num_visual_prompts=2, num_segments=4, modules_to_save=[]))
    model.base_model.set_adapter(["birds", "cats"])
    with pytest.raises(ValueError, match="set_adapter"):
        score_prompts(model, [images(dtype=torch.float32)])


# -------------------------------------------------------------------------------------------------------------- errors
def test_what_cannot_be_scored_is_said_clearly() -> None:
    batch = images(dtype=torch.float32)
    model, _ = adapt("vit")
    with pytest.raises(ValueError, match="has no E2VPT adapter: wrap it with get_peft_model"):
        score_prompts(model.unload(), [batch])
    with pytest.raises(ValueError, match="no visual prompts to score or prune"):
        score_prompts(adapt("vit", num_visual_prompts=0)[0], [batch])
    model, _ = adapt("vit")
    with pytest.raises(ValueError, match="no loss for a batch of pixel_values"):
        score_prompts(model, [{"pixel_values": batch["pixel_values"]}])
    with pytest.raises(ValueError, match="no labelled sample"):
        score_prompts(model, [])
    with pytest.raises(ValueError, match="no labelled sample"):
        score_prompts(model, [{**batch, "labels": torch.full((IMAGES,), -100)}])
    with pytest.raises(ValueError, match=r"one number per sample, got shape \(5, 5\)"):
        score_prompts(model, [batch], loss_fn=lambda model, batch: model(**batch).logits)
    with pytest.raises(ValueError, match="loss does not depend on the prompts"):
        score_prompts(model, [batch], loss_fn=lambda model, batch: torch.zeros(()))
    other, _ = adapt("vit")
    with pytest.raises(ValueError, match="loss does not depend on the prompts"):
        score_prompts(model, [batch], loss_fn=lambda model, batch: other(**batch).loss)
    with model.disable_adapter(), pytest.raises(ValueError, match="not the active one"):
        score_prompts(model, [batch])
    with pytest.raises(TypeError, match="A batch is a dictionary .*, got a tuple: let the dataset return"):
        score_prompts(model, [tuple(batch.values())])
    with pytest.raises(FloatingPointError, match="not finite"):
        score_prompts(model, [{**batch, "pixel_values": torch.full_like(batch["pixel_values"], torch.nan)}])


def test_a_layer_without_use_scores_zero() -> None:
    model, _ = adapt("vit", dtype=torch.float64)
    batch = images()

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        hidden = model(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states
        return hidden[2].square().mean()  # before the last block

    scores = score_prompts(model, [batch], loss_fn=loss_fn)
    assert scores.token[:2].min() > 0
    assert scores.token[2].max() == 0


def test_trained_values_are_what_is_scored() -> None:
    """Not those at the start: another training, other scores."""
    model, _ = adapt("vit", dtype=torch.float64)
    first = score_prompts(model, [images()])
    assert not torch.allclose(first.token, score_prompts(trained(model), [images()]).token, rtol=1e-2)
