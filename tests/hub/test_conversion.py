# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of the released code become adapters with the released logits; files that cannot are refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_e2vpt.hub.conversion import read_checkpoint
from tests.golden.test_golden import CASES, Case, stored
from tests.support.released import base_of, checkpoint_of


# what classifies the mean of all tokens is no model of transformers; one adapter cannot have the prompts of one layer
CONVERTIBLE = [case for case in CASES if case.family != "mae" and not case.name.endswith("_kvfirst")]
ONE = next(case for case in CONVERTIBLE if case.family == "vit" and case.has_gates and case.deep)


def write(folder: Path, tensors: Any) -> Path:
    torch.save(tensors, folder / "last_model.pth")
    return folder / "last_model.pth"


def fresh(case: Case) -> Any:
    """The backbone under another head, as a user loads it."""
    base = base_of(case)
    base.classifier = nn.Linear(base.classifier.in_features, 6)
    return base


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if index % 8 == 0 else pytest.mark.thorough)
        for index, case in enumerate(CONVERTIBLE)
    ],
)
def test_a_converted_checkpoint_has_the_released_logits(tmp_path: Path, case: Case) -> None:
    checkpoint = read_checkpoint(write(tmp_path, {"model": checkpoint_of(case), "iteration": 3}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.adapt(fresh(case)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(fresh(case).double(), tmp_path / "adapter").eval()
    pixels = stored("inputs")[f"s{case.settings['seed']}/pixel_values"][: case.settings["batch"]].double()
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    torch.testing.assert_close(logits, case.logits, rtol=0, atol=1e-12)


def test_all_convertible_cases_are_here() -> None:
    families = [case.family for case in CONVERTIBLE]
    assert {family: families.count(family) for family in set(families)} == {"vit": 96, "moco": 24, "swin": 8}
    assert sum(case.has_gates for case in CONVERTIBLE) > 40


def test_names_of_a_wrapped_model_are_understood_as_well(tmp_path: Path) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in checkpoint_of(ONE).items()}
    assert read_checkpoint(write(tmp_path, tensors)).num_labels == 6


def test_a_base_model_with_another_epsilon_is_named_with_its_remedy(tmp_path: Path) -> None:
    base = fresh(ONE)
    for module in base.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12
    with pytest.warns(UserWarning, match=r"layer_norm_eps=1e-06, the base model 1e-12"):
        read_checkpoint(write(tmp_path, {"model": checkpoint_of(ONE)})).adapt(base)


# ------------------------------------------------------------------------------------------------------------- refused
def changed(*left_out: str, **added: Tensor) -> dict[str, Tensor]:
    tensors = checkpoint_of(ONE)
    return {name: tensor for name, tensor in {**tensors, **added}.items() if name not in left_out}


WRONG: dict[str, tuple[Any, str]] = {
    "no head": (changed("head.last_layer.bias"), "missing head.last_layer.bias"),
    "no prompts": (changed("enc.transformer.prompt_embeddings"), "missing enc.transformer.prompt_embeddings"),
    "a deeper head": (changed(**{"head.projection.0.weight": torch.ones(1)}), "not known head.projection.0.weight"),
    "projected prompts": (
        changed(**{"enc.transformer.prompt_proj.weight": torch.ones(1)}),
        "not known enc.transformer.prompt_proj.weight",
    ),
    "half a block": (
        changed("enc.transformer.encoder.layer.1.attn.key.weight"),
        "missing enc.transformer.encoder.layer.1.attn.key.weight",
    ),
    "key-value prompts of one layer": (
        changed("enc.transformer.encoder.layer.1.attn.deep_QKV_embeddings"),
        "key-value prompts in 2 of 3 transformer blocks",
    ),
    "a masked autoencoder": (changed(**{"enc.fc_norm.weight": torch.ones(1)}), "a masked autoencoder"),
    "something else": ({"a.weight": torch.ones(1)}, "not known a.weight"),
    "no tensors": ({"model": {"epoch": 3}}, "holds no tensors by name"),
    "a list": ([torch.ones(1)], "holds no tensors by name"),
    "code": (Path("x"), "torch.load"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    content, message = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        read_checkpoint(write(tmp_path, content))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match="no file of tensors"):
        read_checkpoint(tmp_path / "x.pth")


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write(tmp_path, {"model": checkpoint_of(ONE)}))
    base = fresh(ONE)
    base.vit.layers[1].layernorm_before.bias.data += 0.1
    with pytest.raises(ValueError, match=r"the norm bias of block 1 differs by up to 0\.1"):
        checkpoint.adapt(base)
    base = fresh(ONE)
    del base.vit.layers[2]
    with pytest.raises(ValueError, match="has 3 transformer blocks, but ViTForImageClassification has 2"):
        checkpoint.adapt(base)


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    base = fresh(ONE)
    base.classifier = nn.Linear(32, 7)
    with pytest.raises(ValueError, match="num_labels=6"):
        read_checkpoint(write(tmp_path, {"model": checkpoint_of(ONE)})).adapt(base)
