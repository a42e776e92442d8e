# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Adapters for different classes on one backbone: each with the head and the names that it was trained with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_e2vpt import E2VPTConfig
from tests.support.adapted import config_of, trained


VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
CLASSES = {"pets": 37, "flowers": 102}
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def backbone(num_labels: int, **settings: Any) -> Any:
    """A ViT with this many classes; whatever their number, the backbone is the same."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**VIT, **settings}, num_labels=num_labels)
    )
    return model.eval()


def names_of(adapter: str) -> dict[int, str]:
    return {index: f"{adapter} {index}" for index in range(CLASSES[adapter])}


@torch.no_grad()
def logits(model: Any, **arguments: Any) -> Tensor:
    return model(pixel_values=PIXELS, **arguments).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The folders of both adapters, and what each answers where it is alone."""
    folder, answers = tmp_path_factory.mktemp("adapters"), {}
    for name, number in CLASSES.items():
        base = backbone(number)
        base.config.id2label = names_of(name)
        base.config.label2id = {label: index for index, label in names_of(name).items()}
        model = trained(get_peft_model(base, config_of(seed=number))).eval()
        model.save_pretrained(folder / name)
        answers[name] = logits(PeftModel.from_pretrained(backbone(number), folder / name).eval())
    return folder, answers


def both(folder: Path) -> PeftModel:
    model = PeftModel.from_pretrained(backbone(CLASSES["pets"]), folder / "pets", "pets")
    model.load_adapter(folder / "flowers", "flowers")
    return model.eval()


def test_the_active_adapter_gives_the_logits_of_its_classes(saved: tuple[Path, dict[str, Tensor]]) -> None:
    folder, answers = saved
    model = both(folder)
    for name in ("pets", "flowers", "pets"):
        model.set_adapter(name)
        assert torch.equal(logits(model), answers[name])


def test_the_config_names_the_classes_of_the_active_adapter(saved: tuple[Path, dict[str, Tensor]]) -> None:
    model = both(saved[0])
    generic = {index: f"LABEL_{index}" for index in range(37)}
    for name in ("pets", "flowers", "pets"):
        model.set_adapter(name)
        assert model.config.id2label == names_of(name)
        assert model.config.num_labels == model.get_base_model().num_labels == CLASSES[name]
        assert model.config.label2id[f"{name} 3"] == 3
        with model.disable_adapter():
            assert model.config.id2label == generic
        assert model.config.id2label == names_of(name)
    model.set_adapter("flowers")
    base = model.unload()
    assert base.config.id2label == generic and base.num_labels == 37


def test_a_pipeline_names_the_classes_of_the_active_adapter(saved: tuple[Path, dict[str, Tensor]]) -> None:
    model = both(saved[0])
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor)
    image = Image.fromarray(np.full((32, 32, 3), 99, dtype=np.uint8))
    for name in CLASSES:
        model.set_adapter(name)
        found = classify(image, top_k=CLASSES[name])
        assert {entry["label"] for entry in found} == set(names_of(name).values())


def test_an_adapter_with_more_classes_trains_on(saved: tuple[Path, dict[str, Tensor]]) -> None:
    model = PeftModel.from_pretrained(backbone(37), saved[0] / "pets", "pets")
    model.load_adapter(saved[0] / "flowers", "flowers", is_trainable=True)
    model.set_adapter("flowers")
    output = model.train()(pixel_values=PIXELS, labels=torch.tensor([0, 40, 101, 7]))
    output.loss.backward()
    trained_now = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in trained_now.values())
    assert all("flowers" in key for key in trained_now)


def test_every_adapter_is_saved_with_its_own_classes(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    model = both(saved[0])
    model.set_adapter("flowers")
    model.save_pretrained(tmp_path)
    for name in CLASSES:
        on_disk = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert on_disk["labels"] == list(names_of(name).values())
        alone = PeftModel.from_pretrained(backbone(CLASSES[name]), tmp_path / name).eval()
        assert torch.equal(logits(alone), saved[1][name])
    assert model.config.id2label == names_of("flowers")


def test_a_deleted_adapter_takes_its_classes_away(saved: tuple[Path, dict[str, Tensor]]) -> None:
    model = both(saved[0])
    model.set_adapter("flowers")
    model.delete_adapter("flowers")
    assert model.active_adapter == "pets" and model.config.id2label == names_of("pets")
    assert torch.equal(logits(model), saved[1]["pets"])


def test_the_classes_of_each_adapter_survive_a_copy(saved: tuple[Path, dict[str, Tensor]]) -> None:
    model = copy.deepcopy(both(saved[0]))
    model.set_adapter("flowers")
    assert model.config.num_labels == 102 and torch.equal(logits(model), saved[1]["flowers"])


def test_a_weighted_sum_has_the_classes_of_its_parts(saved: tuple[Path, dict[str, Tensor]]) -> None:
    model = both(saved[0])
    model.load_adapter(saved[0] / "flowers", "again")
    model.add_weighted_adapter(["flowers", "again"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    assert model.config.id2label == names_of("flowers")
    torch.testing.assert_close(logits(model.eval()), saved[1]["flowers"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_empty_model_takes_the_values_of_other_classes(
    saved: tuple[Path, dict[str, Tensor]], low_cpu_mem_usage: bool
) -> None:
    model = PeftModel.from_pretrained(backbone(37), saved[0] / "pets", "pets", low_cpu_mem_usage=low_cpu_mem_usage)
    model.load_adapter(saved[0] / "flowers", "flowers", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("flowers")
    assert torch.equal(logits(model.eval()), saved[1]["flowers"])


# ------------------------------------------------------------------------------------------------------ mixed batches
def test_a_mixed_batch_fills_up_with_minus_infinity(saved: tuple[Path, dict[str, Tensor]]) -> None:
    folder, answers = saved
    found = logits(both(folder), adapter_names=["flowers", "pets", "pets", "flowers"])
    assert found.shape == (4, 102)
    for sample, name in enumerate(["flowers", "pets", "pets", "flowers"]):
        number = CLASSES[name]
        torch.testing.assert_close(found[sample, :number], answers[name][sample])
        assert (found[sample, number:] == -torch.inf).all()
        expected = answers[name][sample].softmax(-1)
        torch.testing.assert_close(found[sample].softmax(-1)[:number], expected)
    assert found.isfinite().sum() == 2 * 37 + 2 * 102


# --------------------------------------------------------------------------------------------------------- what fails
def test_the_first_adapter_of_a_model_has_the_number_of_classes_of_the_model(
    saved: tuple[Path, dict[str, Tensor]],
) -> None:
    base = backbone(4)
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"\(37, 32\), but the model needs \(4, 32\).*num_labels=37"):
        PeftModel.from_pretrained(base, saved[0] / "pets")
    assert [name for name, _ in base.named_modules()] == modules and base.config.num_labels == 4


def other_width(folder: Path, source: Path) -> None:
    get_peft_model(backbone(5, hidden_size=64), config_of()).save_pretrained(folder)


def other_depth(folder: Path, source: Path) -> None:
    get_peft_model(backbone(5, num_hidden_layers=3), config_of()).save_pretrained(folder)


def misspelt(folder: Path, source: Path) -> None:
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({key.replace("visual", "visul"): tensor for key, tensor in tensors.items()}, folder / source.name)
    (folder / source.name).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("write", [other_width, other_depth, misspelt])
def test_a_load_that_fails_leaves_nothing_behind(
    saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, write: Any, is_trainable: bool
) -> None:
    write(tmp_path, saved[0] / "flowers")
    model = PeftModel.from_pretrained(backbone(37), saved[0] / "pets", "pets").eval()
    keys = set(model.state_dict())
    with pytest.raises(ValueError):
        model.load_adapter(tmp_path, "flowers", is_trainable=is_trainable)
    assert list(model.peft_config) == ["pets"] and model.active_adapter == "pets"
    assert set(model.state_dict()) == keys
    assert model.config.id2label == names_of("pets") and torch.equal(logits(model), saved[1]["pets"])
    model.load_adapter(saved[0] / "flowers", "flowers")
    model.set_adapter("flowers")
    assert torch.equal(logits(model.eval()), saved[1]["flowers"])


def test_a_trained_adapter_survives_a_file_that_does_not_fit_it(
    saved: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    other_width(tmp_path, saved[0] / "pets")
    model = get_peft_model(backbone(37), E2VPTConfig.from_pretrained(saved[0] / "pets")).train()
    expected = logits(trained(model).eval())
    with pytest.raises(ValueError):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model), expected)


def test_tensors_of_modules_that_earlier_versions_trained_by_their_endings_are_not_left_out(
    saved: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    tensors = load_file(saved[0] / "pets" / "adapter_model.safetensors")
    extra = {"base_model.model.vit.inner_classifier.weight": torch.ones(2, 2)}
    save_file({**tensors, **extra}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((saved[0] / "pets" / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match="inner_classifier.weight, but its modules_to_save=.*full paths"):
        PeftModel.from_pretrained(backbone(37), tmp_path)
