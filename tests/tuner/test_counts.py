# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""One adapter has one percentage: that of PEFT, of the summary, of tables and of the card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_e2vpt import Gates, apply_gates
from peft_e2vpt.tuner.summary import count_parameters
from peft_e2vpt_cli.content import inspect_adapter
from tests.support.adapted import config_of
from tests.support.models import build
from tests.support.training import adapted


def percentage_of_peft(model: PeftModel) -> float:
    trained, total = model.get_nb_trainable_parameters()
    return 100 * trained / total


def prune_half(model: PeftModel, layers: int = 3) -> None:
    config = model.peft_config[model.active_adapter]
    token = torch.ones(layers, config.num_visual_prompts)
    token[:, 0] = 0
    apply_gates(model, Gates(token, torch.ones(layers, config.num_visual_prompts, config.num_segments)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": []},
        {"modules_to_save": ["classifier", "vit.layernorm"]},
        {"num_visual_prompts": 0},
        {"num_kv_prompts": 0},
        {"share_kv_prompts_across_layers": True},
        {"visual_prompt_mode": "shallow"},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_the_summary_counts_what_peft_counts(settings: dict[str, object]) -> None:
    model = get_peft_model(build("vit")[0], config_of(**settings))
    summary = model.prompt_summary()
    counts = (summary.num_tuned_values, summary.num_tuned_values + summary.num_frozen_values)
    assert counts == model.get_nb_trainable_parameters() == count_parameters(model)
    assert summary.tuned_percentage == percentage_of_peft(model)


def test_other_adapters_of_a_model_do_not_change_the_percentage_of_one() -> None:
    model = adapted()
    alone = percentage_of_peft(model)
    model.add_adapter("birds", config_of(num_visual_prompts=8))
    assert model.prompt_summary("default").tuned_percentage == alone
    model.set_adapter("birds")
    assert count_parameters(model)[0] == model.prompt_summary("birds").num_tuned_values


def test_models_without_prompts_are_counted_as_peft_does() -> None:
    model = get_peft_model(build("vit")[0], LoraConfig(target_modules="all-linear", modules_to_save=["classifier"]))
    assert count_parameters(model) == model.get_nb_trainable_parameters()
    plain = nn.Linear(3, 2).requires_grad_(False)
    plain.bias.requires_grad_(True)
    assert count_parameters(plain) == (2, 8)


def test_pruned_values_are_not_counted_and_the_summary_says_that_peft_counts_them() -> None:
    model = adapted()
    before, total = model.get_nb_trainable_parameters()
    assert "pruned values" not in str(model.prompt_summary())
    prune_half(model)
    summary = model.prompt_summary()
    assert summary.num_pruned_values > 0
    assert summary.num_tuned_values == before - summary.num_pruned_values
    assert summary.num_frozen_values == total - before
    assert f"{summary.num_pruned_values:,} pruned values are not among them; PEFT's print_trainable" in str(summary)


@pytest.mark.parametrize("is_pruned", [False, True])
def test_the_card_and_the_command_line_tell_the_percentage_of_the_summary(tmp_path: Path, is_pruned: bool) -> None:
    build("vit")[0].save_pretrained(tmp_path / "base")
    model = adapted()
    if is_pruned:
        prune_half(model)
    model.save_pretrained(tmp_path / "a")
    summary, card = model.prompt_summary(), ModelCard.load(tmp_path / "a" / "README.md")
    stated = card.data.to_dict()["e2vpt"]["tuned_percentage"]
    assert stated == inspect_adapter(tmp_path / "a").tuned_percentage == round(summary.tuned_percentage, 6)
    assert f"{summary.tuned_percentage:.3f} % of the model" in card.text
