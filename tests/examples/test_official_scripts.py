# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The example scripts of transformers and the notebooks of PEFT work with `E2VPTConfig` where they have LoRA."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForObjectDetection, ResNetConfig, Trainer, TrainingArguments

import peft_e2vpt
from peft_e2vpt import E2VPTConfig, PruneRewindCallback
from tests.support.official import NAMES, SCRIPTS, Script, detr


pytestmark = pytest.mark.training
CONFIG = {"num_visual_prompts": 4, "num_kv_prompts": 2, "num_segments": 8, "visual_prompt_dropout": 0.0, "seed": 0}


@pytest.fixture(params=SCRIPTS)
def script(request) -> Script:
    return SCRIPTS[request.param]


@pytest.fixture
def checkpoint(script, tmp_path) -> str:
    return script.write_checkpoint(tmp_path / "checkpoint")


def train(script: Script, model: Any, folder: Any, callbacks: tuple[Any, ...] = (), **settings: Any) -> Trainer:
    args = TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,  # the last batch is shorter
        learning_rate=1e-2,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **script.arguments,
        **settings,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=script.dataset(8, seed=1),
        eval_dataset=script.dataset(4, seed=2),
        data_collator=script.collate,
        compute_metrics=script.compute_metrics,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def answers(script: Script, model: Any) -> list[Tensor]:
    """What the model answers to a batch without labels."""
    batch = script.collate(script.dataset(3, seed=3))
    inputs = {name: value for name, value in batch.items() if "label" not in name}
    model.eval()
    with torch.no_grad():
        outputs = model(**inputs)
    return [value for value in outputs.to_tuple() if isinstance(value, Tensor)]


def trained_values(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_script_trains_every_trainable_tensor_and_evaluates_with_its_metric(script, checkpoint, tmp_path):
    model = get_peft_model(script.load_model(checkpoint), E2VPTConfig(**CONFIG))
    before = trained_values(model)
    trainer = train(script, model, tmp_path / "out")
    still = [name for name, value in trained_values(model).items() if torch.equal(value, before[name])]
    assert not still
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert script.compute_metrics is None or any(name.endswith(("accuracy", "iou", "map")) for name in metrics)


def test_a_script_prunes_and_rewinds_with_the_callback_as_it_is(script, checkpoint, tmp_path):
    model = get_peft_model(script.load_model(checkpoint), E2VPTConfig(**CONFIG))
    callback = PruneRewindCallback(token_ratios=(0.5,), segment_ratios=(0.25,))
    train(script, model, tmp_path / "out", (callback,))
    assert len(callback.report.candidates) == 4  # no pruning, either, both


def test_what_a_script_saves_gives_the_same_answers_on_a_fresh_base_model(script, checkpoint, tmp_path):
    model = get_peft_model(script.load_model(checkpoint), E2VPTConfig(**CONFIG))
    trainer = train(script, model, tmp_path / "out")
    trainer.save_model(tmp_path / "adapter")
    expected = answers(script, model)
    torch.manual_seed(5)  # another new head than that of the training
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(script.load_model(config.base_model_name_or_path), tmp_path / "adapter")
    torch.testing.assert_close(answers(script, fresh), expected, rtol=0, atol=0)


def test_load_builds_the_model_of_a_script_from_its_adapter_alone(script, checkpoint, tmp_path):
    model = get_peft_model(script.load_model(checkpoint), E2VPTConfig(**CONFIG))
    train(script, model, tmp_path / "out").save_model(tmp_path / "adapter")
    loaded = peft_e2vpt.load(tmp_path / "adapter")
    torch.testing.assert_close(answers(script, loaded), answers(script, model), rtol=0, atol=0)
    if script.for_model:
        assert loaded.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "contrastive_image_text"], indirect=True)
def test_a_script_without_trainer_trains_in_its_own_loop(script, checkpoint):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = get_peft_model(script.load_model(checkpoint), E2VPTConfig(**CONFIG))
    before = trained_values(model)
    loader = DataLoader(script.dataset(8, seed=1), 2, shuffle=True, collate_fn=script.collate)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    after = trained_values(accelerator.unwrap_model(model))
    assert [name for name in before if torch.equal(after[name], before[name])] == []


def test_contrastive_training_puts_prompts_into_the_three_layers_of_the_vision_tower_only(tmp_path):
    script = SCRIPTS["contrastive_image_text"]
    model = get_peft_model(script.load_model(script.write_checkpoint(tmp_path)), E2VPTConfig(**CONFIG))
    assert len(model.prompt_summary().layers) == 3


def test_a_detector_on_a_convolutional_backbone_is_refused_in_words():
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    model = AutoModelForObjectDetection.from_config(detr(resnet))
    with pytest.raises(ValueError, match="DetrForObjectDetection has no self-attention that E2VPT knows"):
        get_peft_model(model, E2VPTConfig(**CONFIG))
