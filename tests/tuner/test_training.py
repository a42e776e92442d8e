# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Training: Trainer as users run it, checkpointed activations, half precision, pruned values, two processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.multiprocessing
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.support.adapted import (
    CHECKPOINTING,
    KV_ONLY,
    SHALLOW,
    WITHOUT_GRADIENT,
    adapt,
    checkpoint_activations,
    config_of,
    gradients,
    layers_of,
    predict,
    prune,
    trainable,
    trained,
)
from tests.support.ddp_worker import CASES, WORLD_SIZE, batch, gradients_of_mean_loss, model_of, run
from tests.support.models import NAMES, build, output_of


pytestmark = pytest.mark.training


# ------------------------------------------------------------------------------------------------------------- Trainer
def images(count: int = 16, seed: int = 0) -> datasets.Dataset:
    """Images whose class is the brightest of five stripes, with a column that the model does not take."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    for image, label in zip(pixels, labels, strict=True):
        image[:, 6 * label : 6 * label + 6] += 2
    names = [f"{number}.png" for number in range(count)]
    columns = {"pixel_values": pixels.numpy(), "labels": labels.tolist(), "file_name": names}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def trainer_of(model: nn.Module, folder: Path, callbacks: Any = None, **settings: Any) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        **settings,
    }
    return Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=images(),
        eval_dataset=images(12, seed=1),
        compute_metrics=accuracy,
        callbacks=callbacks,
    )


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model)}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


def test_a_run_learns_changes_prompts_and_head_only_and_leaves_only_the_adapter_on_disk(tmp_path):
    base, _ = build("vit")
    frozen = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = get_peft_model(base, config_of(visual_prompt_dropout=0.1))
    before = values_of(model)
    saving = {"save_strategy": "steps", "save_steps": 40, "eval_strategy": "steps", "eval_steps": 20}
    trainer = trainer_of(model, tmp_path, max_steps=40, learning_rate=3e-2, **saving)
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert sum({"eval_loss", "eval_accuracy"} <= entry.keys() for entry in trainer.state.log_history) == 2
    assert len(differing(before, values_of(model))) == len(before) == 8
    saved = tmp_path / "checkpoint-40"
    assert (saved / "adapter_model.safetensors").stat().st_size < 10_000
    assert not (saved / "model.safetensors").exists() and not (saved / "pytorch_model.bin").exists()
    backbone = model.unload()
    assert differing(frozen, {name: p.detach() for name, p in backbone.named_parameters()}) == []


def test_metrics_do_not_depend_on_whether_the_labels_are_named(tmp_path):
    model, _ = adapt()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = [trainer_of(model, tmp_path, **settings).evaluate() for settings in ({}, {"label_names": ["labels"]})]
    for name in ("eval_loss", "eval_accuracy"):
        assert found[0][name] == found[1][name]


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_only_columns_that_the_base_model_does_not_take_are_removed(tmp_path, remove_unused_columns):
    trainer = trainer_of(adapt()[0], tmp_path, remove_unused_columns=remove_unused_columns)
    columns = set(next(iter(trainer.get_train_dataloader())))
    assert columns == {"pixel_values", "labels"}


def resumable(seed: int = 0, adapter_name: str = "default") -> PeftModel:
    base, _ = build("vit")
    torch.manual_seed(seed)
    return get_peft_model(base, config_of(visual_prompt_dropout=0.1, seed=None), adapter_name)


@pytest.mark.parametrize("adapter_name", ["default", "birds"])
def test_a_resumed_run_is_bit_by_bit_the_straight_run(tmp_path, adapter_name):
    saving = {"save_strategy": "steps", "save_steps": 5}
    straight = resumable(adapter_name=adapter_name)
    trainer_of(straight, tmp_path, **saving).train()
    resumed = resumable(seed=7, adapter_name=adapter_name)  # other initial prompts
    start = values_of(resumed)
    trainer_of(resumed, tmp_path, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert differing(values_of(straight), values_of(resumed)) == []
    assert len(differing(start, values_of(resumed))) == len(start)


class Falling:
    """A metric that is best at its first call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prediction: transformers.EvalPrediction) -> dict[str, float]:
        self.calls += 1
        return {"score": -float(self.calls)}


BEST = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
}


@pytest.mark.parametrize("settings", [{}, SHALLOW, {"share_kv_prompts_across_layers": True}], ids=str)
def test_the_best_model_is_loaded_at_the_end(tmp_path, settings):
    model = get_peft_model(build("vit")[0], config_of(**settings))
    trainer = trainer_of(model, tmp_path, **BEST)
    trainer.compute_metrics = Falling()
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    _, inputs = build("vit")
    answers = {}
    for step in (2, 8):
        loaded = PeftModel.from_pretrained(build("vit")[0], tmp_path / f"checkpoint-{step}")
        answers[step] = predict(loaded.eval(), inputs)
    assert torch.equal(predict(model.eval(), inputs), answers[2])
    assert not torch.allclose(answers[2], answers[8], atol=1e-3)


# -------------------------------------------------------------------------------------------- checkpointed activations
class Gradients(transformers.TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor | None] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.of = {n: None if p.grad is None else p.grad.clone() for n, p in trainable(model)}


def gradients_in_trainer(
    folder: Path, name: str, settings: dict[str, Any], **arguments: Any
) -> dict[str, Tensor | None]:
    model, _ = adapt(name, visual_prompt_dropout=0.2, **settings)  # wrapped first, then given to Trainer
    callback = Gradients()
    trainer = trainer_of(model, folder, [callback], max_steps=1, max_grad_norm=0, **arguments)
    trainer.train()
    blocks = [layer.site.block for layer in layers_of(model)]
    assert all(block.gradient_checkpointing == arguments.get(CHECKPOINTING, False) for block in blocks)
    return callback.of


@pytest.mark.filterwarnings(WITHOUT_GRADIENT)
@pytest.mark.parametrize("use_reentrant", [True, False, None])
@pytest.mark.parametrize(
    "name, settings",
    [("vit", {}), ("vit", SHALLOW), ("vit", KV_ONLY), ("dinov2", {}), ("swin", {}), ("swin", KV_ONLY)],
    ids=str,
)
def test_trainer_with_checkpointed_activations_gives_the_gradients_of_a_run_without(
    tmp_path, name, settings, use_reentrant
):
    expected = gradients_in_trainer(tmp_path, name, settings)
    kwargs = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    found = gradients_in_trainer(tmp_path, name, settings, **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": kwargs})
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        assert gradient is not None and gradient.abs().max() > 1e-7, key
        assert found[key] is not None, key
        torch.testing.assert_close(found[key], gradient)


@pytest.mark.filterwarnings(WITHOUT_GRADIENT)
@pytest.mark.parametrize(
    ("name", "order"),
    [(name, order) for name in NAMES for order in ("before wrapping", "after wrapping", "on the base model")],
)
def test_reentrant_checkpoints_give_every_family_its_gradients_whenever_they_are_enabled(name, order):
    plain, inputs = adapt(name)
    expected = gradients(plain.train(), inputs)
    base, _ = build(name)
    if order == "before wrapping":
        checkpoint_activations(base, {"use_reentrant": True})
    model = trained(get_peft_model(base, config_of())).train()
    if order != "before wrapping":
        checkpoint_activations(model if order == "after wrapping" else base, {"use_reentrant": True})
    found = gradients(model, inputs)
    for key, gradient in expected.items():
        assert found[key] is not None, key
        torch.testing.assert_close(found[key], gradient)
    back = model.unload()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in back.modules())


# ------------------------------------------------------------------------------------------------------ half precision
HALF = (torch.float16, torch.bfloat16)
halves = pytest.mark.parametrize("dtype", HALF, ids=str)


@halves
@pytest.mark.parametrize(
    "name, settings",
    [("vit", {}), ("vit", SHALLOW), ("dinov2", {}), ("siglip2", {}), ("swin", {}), ("beit_relative_bias", {})],
    ids=str,
)
def test_on_a_half_precision_base_prompts_and_head_are_float32_and_the_answer_is_that_of_float32(
    name, settings, dtype
):
    expected, inputs = adapt(name, **settings)
    expected = predict(expected, inputs)
    model, inputs = adapt(name, dtype=dtype, **settings)
    with torch.no_grad():
        assert {states.dtype for states in model(**inputs, output_hidden_states=True).hidden_states} == {dtype}
    assert {parameter.dtype for _, parameter in trainable(model)} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1.5e-1}[dtype]
    assert (predict(model, inputs).float() - expected).abs().max() < tolerance * expected.abs().max()
    with torch.autocast("cpu", dtype=dtype):
        assert (predict(model, inputs).float() - expected).abs().max() < tolerance * expected.abs().max()


@halves
def test_a_scaled_loss_gives_float32_gradients_that_can_be_unscaled(dtype):
    """fp16 training on an fp16 base: "Attempting to unscale FP16 gradients" is what a half-precision head brings."""
    reference, inputs = adapt("vit")
    expected = gradients(reference.train(), inputs)
    model, inputs = adapt("vit", dtype=dtype)
    model.train()
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model)], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", dtype=dtype):
        loss = output_of(model(**inputs)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for name, parameter in trainable(model):
        assert parameter.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0)
        assert cosine > (0.999 if dtype == torch.float16 else 0.98), name
    before = values_of(model)
    scaler.step(optimizer)
    assert len(differing(before, values_of(model))) == len(before)


def test_training_in_bfloat16_by_trainer_keeps_the_trained_values_in_float32(tmp_path):
    base, _ = build("vit", dtype=torch.bfloat16)
    model = get_peft_model(base, config_of())
    before = values_of(model)
    trainer_of(model, tmp_path, bf16=True, max_steps=2).train()
    after = values_of(model)
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert len(differing(before, after)) == len(before)


# ------------------------------------------------------------------------------------------------------- pruned values
STATES = {
    "deep": {},
    "zeroed": {"pruned_prompts": "zero"},
    "strided": {"segment_layout": "strided"},
    "shallow": SHALLOW,
}
states = pytest.mark.parametrize("state", STATES)


def steps(model: nn.Module, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer, count: int) -> None:
    labels = torch.tensor([0, 3])
    for _ in range(count):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([parameter for _, parameter in trainable(model)], lr=1e-2, weight_decay=0.3)


def pruned_values(model: nn.Module) -> list[Tensor]:
    layers = [layer for layer in layers_of(model) if "default" in layer.e2vpt_visual_prompts]
    return [layer.e2vpt_visual_prompts["default"].detach()[~layer.kept("default")] for layer in layers]


@states
def test_pruned_values_stay_zero_and_living_ones_move(state):
    model, inputs = adapt(**STATES[state])
    parameters = [(name, id(parameter)) for name, parameter in trainable(model)]
    steps(model, inputs, adamw(model), 3)
    prune(model)
    assert [(name, id(parameter)) for name, parameter in trainable(model)] == parameters
    before = values_of(model)
    steps(model.train(), inputs, adamw(model), 20)
    assert all(values.numel() and (values == 0).all() for values in pruned_values(model))
    all_pruned = ["base_model.model.e2vpt.0.e2vpt_visual_prompts.default"]
    assert [name for name, value in values_of(model).items() if torch.equal(value, before[name])] == all_pruned


@states
def test_what_lies_in_pruned_places_has_no_effect(state):
    """Momentum from before the pruning moves the stored values; neither answers, gradients nor files may see them."""
    model, inputs = adapt(**STATES[state])
    optimizer = adamw(model)
    steps(model, inputs, optimizer, 3)
    prune(model)
    steps(model, inputs, optimizer, 20)
    assert any((values != 0).any() for values in pruned_values(model))  # the momentum is there
    found, gradient = predict(model, inputs), gradients(model, inputs)
    gradient = {name: value.clone() for name, value in gradient.items()}
    for layer in layers_of(model):
        if "default" in layer.e2vpt_visual_prompts:
            layer.clear_pruned_values("default")
    assert torch.equal(predict(model, inputs), found)
    assert differing(gradient, gradients(model, inputs)) == []


@states
def test_everything_trainable_stays_in_the_graph_when_a_layer_has_lost_all_its_prompts(state):
    model, inputs = adapt(**STATES[state])
    prune(model)
    found = gradients(model.train(), inputs)
    assert not [name for name, gradient in found.items() if gradient is None]
    for layer in layers_of(model):
        if "default" in layer.e2vpt_visual_prompts:
            gradient = layer.e2vpt_visual_prompts["default"].grad
            assert (gradient[~layer.kept("default")] == 0).all()
            assert (gradient[layer.kept("default")] != 0).all()


def test_pruning_everything_leaves_the_key_value_prompts():
    model, inputs = adapt()
    for layer in layers_of(model):
        layer.set_gates("default", torch.zeros(3), torch.ones(3, 4))
    kv_only, _ = adapt(**KV_ONLY)
    kv_only.load_state_dict({k: v for k, v in model.state_dict().items() if "visual" not in k}, strict=False)
    assert torch.equal(predict(model, inputs), predict(kv_only, inputs))


# ------------------------------------------------------------------------------------------------------- two processes
@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(run, (str(folder),), nprocs=WORLD_SIZE)
    return {case: [torch.load(folder / f"{case}-{rank}.pt") for rank in range(WORLD_SIZE)] for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.processes
def test_two_processes_get_the_gradients_of_one(of_two_processes, case):
    """DistributedDataParallel with `find_unused_parameters=False`: every trainable tensor has to be used."""
    expected = gradients_of_mean_loss(model_of(case), batch())
    ranks = of_two_processes[case]
    assert len(ranks) == 2
    for found in ranks:
        assert found.pop("world size") == 2
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
