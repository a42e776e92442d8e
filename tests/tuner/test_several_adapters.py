# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Adapters that differ in numbers of prompts, pruning and heads live in one model, each as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from tests.support.adapted import config_of, predict
from tests.support.models import build
from tests.support.several import DIFFERENT, with_adapters


families = pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "clip"])


def saved(name: str, folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Saves all adapters of one model; their images, and what each adapter answers."""
    model, pixels = with_adapters(name, DIFFERENT)
    answers = {}
    for adapter_name in DIFFERENT:
        model.set_adapter(adapter_name)
        answers[adapter_name] = predict(model, {"pixel_values": pixels})
    model.save_pretrained(folder)
    return pixels, answers


@families
def test_each_adapter_of_a_model_is_saved_as_itself_and_answers_alone_as_it_did_in_company(tmp_path, name):
    pixels, answers = saved(name, tmp_path)
    for adapter_name, expected in answers.items():
        alone = PeftModel.from_pretrained(build(name)[0], tmp_path / adapter_name, "any").eval()
        assert torch.equal(predict(alone, {"pixel_values": pixels}), expected)


@families
def test_adapters_loaded_one_after_the_other_answer_as_they_were_saved(tmp_path, name):
    pixels, answers = saved(name, tmp_path)
    first, *others = DIFFERENT
    model = PeftModel.from_pretrained(build(name)[0], tmp_path / first, first)
    for other in others:
        model.load_adapter(tmp_path / other, other)
    for adapter_name in reversed(answers):
        model.set_adapter(adapter_name)
        assert torch.equal(predict(model.eval(), {"pixel_values": pixels}), answers[adapter_name])
    for adapter_name in others:
        model.delete_adapter(adapter_name)
    model.set_adapter(first)
    assert torch.equal(predict(model, {"pixel_values": pixels}), answers[first])


def test_an_adapter_may_be_called_like_a_part_of_the_path_of_a_tensor(tmp_path):
    named = dict(zip(["0", "1", "classifier", "e2vpt", "base_model"], DIFFERENT.values(), strict=True))
    model, pixels = with_adapters("vit", named)
    model.save_pretrained(tmp_path)
    for adapter_name in named:
        model.set_adapter(adapter_name)
        again = PeftModel.from_pretrained(build("vit")[0], tmp_path / adapter_name, adapter_name).eval()
        given = {"pixel_values": pixels}
        assert torch.equal(predict(again, given), predict(model, given))


@pytest.mark.compile
def test_switching_between_adapters_compiles_once_for_each(tmp_path, fresh_compiler):
    pixels, answers = saved("vit", tmp_path)
    model, _ = with_adapters("vit", DIFFERENT)
    programs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        programs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=count)
    for _ in range(2):
        for adapter_name, expected in answers.items():
            model.set_adapter(adapter_name)
            torch.testing.assert_close(predict(compiled, {"pixel_values": pixels}), expected)
    assert len(programs) == len(answers)


def test_numbers_that_are_none_of_a_layer_name_adapters(tmp_path: Path) -> None:
    model = get_peft_model(build("vit")[0], config_of(seed=1), adapter_name="37")
    model.add_adapter("102", config_of(seed=2))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("vit")[0], str(tmp_path / "37"), adapter_name="37")
    loaded.load_adapter(str(tmp_path / "102"), adapter_name="102")
    found = loaded.state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in model.state_dict().items())
