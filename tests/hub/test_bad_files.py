# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A bad file is named, whatever loads it, and the model that it was meant for stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import peft_e2vpt
from peft_e2vpt import E2VPTConfig
from peft_e2vpt._compat import loaded_from
from tests.support.adapted import config_of, predict, prune, save_with_base
from tests.support.command_line import fail


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PROMPTS = "base_model.model.e2vpt.1.e2vpt_visual_prompts"
GATES = "base_model.model.e2vpt.0.e2vpt_token_gates"
SEGMENTS = "base_model.model.e2vpt.0.e2vpt_segment_gates"
KV = "base_model.model.e2vpt.2.e2vpt_kv_prompts"
HEAD = "base_model.model.classifier.weight"


class Good(NamedTuple):
    base: Path
    adapter: Path
    inputs: dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Good:
    folder = tmp_path_factory.mktemp("good")
    _, _, inputs = save_with_base(folder)
    return Good(folder / "base", folder / "adapter", inputs)


@pytest.fixture
def good(saved: Good, tmp_path: Path) -> Good:
    """A copy of the adapter, to be damaged."""
    copy = tmp_path / "adapter"
    copy.mkdir()
    for file in saved.adapter.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return saved._replace(adapter=copy)


def base_of(good: Good) -> Any:
    return transformers.ViTForImageClassification.from_pretrained(good.base)


# ----------------------------------------------------------------------------------------------------------- the doors
def by_peft(good: Good, model: Any) -> Any:
    return PeftModel.from_pretrained(model, str(good.adapter))


def by_peft_without_memory(good: Good, model: Any) -> Any:
    return PeftModel.from_pretrained(model, good.adapter, low_cpu_mem_usage=True)


def by_peft_with_a_config(good: Good, model: Any) -> Any:
    return PeftModel.from_pretrained(model, good.adapter, config=E2VPTConfig.from_pretrained(good.adapter))


def by_transformers(good: Good, model: Any) -> Any:
    model.load_adapter(str(good.adapter))
    return model


ONTO_A_MODEL = (by_peft, by_peft_without_memory, by_peft_with_a_config, by_transformers)


def edited(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        edit(tensors)
        save_file(tensors, folder / TENSORS)

    return damage


def written(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def settings(**changes: Any) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**content, **changes}))

    return damage


def truncated(folder: Path) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


def a_folder(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / TENSORS).mkdir()


TENSOR_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: (folder / TENSORS).unlink(), rf"no {TENSORS} was found"),
    "a folder": (a_folder, rf"no {TENSORS} was found"),
    "empty": (written(TENSORS, b""), rf"{TENSORS} is damaged or incomplete"),
    "truncated": (truncated, rf"{TENSORS} is damaged or incomplete"),
    "header of 2**63 bytes": (written(TENSORS, b"\xff" * 7 + b"\x7f{}"), rf"{TENSORS} is damaged or incomplete"),
    "pointer": (written(TENSORS, POINTER), rf"{TENSORS} is a pointer of Git LFS"),
    "HTML": (written(TENSORS, b"<!DOCTYPE html><html>404</html>"), rf"{TENSORS} is damaged or incomplete"),
    "pickle": (pickled, r"adapter_model.bin, a pickle"),
    "prompts missing": (edited(lambda t: t.pop(PROMPTS)), f"missing {PROMPTS}"),
    "prompts of integers": (edited(lambda t: t.update({PROMPTS: t[PROMPTS].long()})), f"{PROMPTS} holds no floating"),
    "prompts of another rank": (
        edited(lambda t: t.update({PROMPTS: t[PROMPTS][None]})),
        rf"{PROMPTS} has shape \(1, ",
    ),
    "prompts of another number": (settings(num_visual_prompts=4), r"has shape \(3, 4\), but the model needs \(4, 4"),
    "far more prompts": (settings(num_visual_prompts=100_000), r"but the model needs \(100000"),
    "far more key-value prompts": (settings(num_kv_prompts=100_000), r"but the model needs \(1, 4, 100000, 8"),
    "a gate of a half": (edited(lambda t: t[GATES].fill_(0.5)), f"{GATES} holds 0.5, and gates are 0 and 1"),
    "a gate of NaN": (edited(lambda t: t[SEGMENTS].fill_(torch.nan)), f"{SEGMENTS} holds nan, and gates are 0 and 1"),
    "fewer values than kept": (edited(lambda t: t.update({PROMPTS: t[PROMPTS].flatten()[:7].clone()})), "7 values"),
    "one tensor more": (edited(lambda t: t.update({KV.replace(".2.", ".9."): t[KV].clone()})), "unknown .*9.e2vpt_kv"),
    "head missing": (edited(lambda t: t.pop(HEAD)), f"missing {HEAD}"),
    "head misspelt": (edited(lambda t: t.update({HEAD.replace("fier", "feir"): t.pop(HEAD)})), f"missing {HEAD}"),
    "head of integers": (edited(lambda t: t.update({HEAD: t[HEAD].long()})), f"{HEAD} holds no floating"),
    "head of more classes": (edited(lambda t: t.update({HEAD: torch.zeros(7, 32)})), rf"{HEAD} has shape \(7, 32\)"),
}
CONFIG_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "more than an adapter can have": (settings(num_visual_prompts=10**9), "num_visual_prompts must be at most"),
    "segments": (settings(num_segments=10**9), "num_segments must be at most"),
    "not divisible": (settings(num_segments=7), "not divisible by num_segments=7"),
    "text for a number": (settings(num_kv_prompts="5"), "num_kv_prompts must be a whole number"),
    "infinity": (settings(visual_prompt_dropout=float("inf")), "visual_prompt_dropout must be a number"),
    "another head": (settings(modules_to_save=["head"]), "modules_to_save names 'head'"),
    "a newer format": (settings(format_version=99), "format_version=99"),
    "a regular expression without end": (settings(target_modules="(a+)+$"), "may never end"),
}
DAMAGES = {**TENSOR_DAMAGES, **CONFIG_DAMAGES}


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("door", ONTO_A_MODEL)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_file_is_named_and_the_model_stays_as_it_was(good: Good, damage: str, door: Callable[..., Any]) -> None:
    spoil, message = DAMAGES[damage]
    whole = {file.name: file.read_bytes() for file in good.adapter.iterdir()}
    model = base_of(good).eval()
    before, answer = state_of(model), predict(model, good.inputs)
    spoil(good.adapter)
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        door(good, model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(predict(model, good.inputs), answer)
    assert not getattr(model, "peft_config", {})
    for file in good.adapter.iterdir():
        file.rmdir() if file.is_dir() else file.unlink()
    for name, content in whole.items():
        (good.adapter / name).write_bytes(content)
    assert not torch.equal(predict(door(good, model).eval(), good.inputs), answer)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_further_adapter_leaves_the_others_as_they_were(good: Good, saved: Good, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    model = PeftModel.from_pretrained(base_of(good), saved.adapter).eval()
    before, answer = state_of(model), predict(model, good.inputs)
    spoil(good.adapter)
    with pytest.raises((ValueError, TypeError, OSError), match=message.replace("missing base_model.model.cl", ".*cl")):
        if damage == "head of more classes":  # which a further adapter may have, but not in its weight alone
            message = "bias"
        model.load_adapter(good.adapter, "further")
        raise ValueError(message)
    assert list(model.peft_config) == ["default"] and model.active_adapter == "default"
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(predict(model, good.inputs), answer)
    model.load_adapter(saved.adapter, "further")
    model.set_adapter("further")
    assert torch.equal(predict(model, good.inputs), answer)


def test_a_bad_adapter_does_not_take_the_place_of_one_that_another_model_has_put_there(
    good: Good, saved: Good
) -> None:
    base = base_of(good)
    model = PeftModel.from_pretrained(base, saved.adapter).eval()
    answer, config = predict(model, good.inputs), model.peft_config["default"]
    truncated(good.adapter)
    with pytest.raises(ValueError, match="damaged"), pytest.warns(UserWarning):
        PeftModel.from_pretrained(base, good.adapter)
    assert torch.equal(predict(model, good.inputs), answer) and model.peft_config == {"default": config}


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "head of more classes"])
def test_load_and_pipeline_name_a_bad_file_before_they_give_a_model(good: Good, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(good.adapter)
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        peft_e2vpt.load(good.adapter)
    if damage in ("truncated", "text for a number", "a gate of NaN"):
        with pytest.raises((ValueError, TypeError, OSError), match=message):
            peft_e2vpt.pipeline("image-classification", good.adapter)


def test_a_pruned_adapter_is_refused_by_transformers_before_the_model_is_changed(good: Good) -> None:
    model = PeftModel.from_pretrained(base_of(good), good.adapter)
    prune(model)
    model.save_pretrained(good.adapter)
    base = base_of(good).eval()
    before = set(base.state_dict())
    with pytest.raises(ValueError, match=r"use peft_e2vpt\.load"):
        by_transformers(good, base)
    assert set(base.state_dict()) == before and not hasattr(base, "peft_config")


def test_values_that_are_not_finite_are_warned_of(good: Good) -> None:
    edited(lambda t: t[PROMPTS].fill_(torch.inf))(good.adapter)
    with pytest.warns(UserWarning, match=f"{PROMPTS}.* holds infinite values or NaNs"):
        by_peft(good, base_of(good))


# ----------------------------------------------------------------------------------------------------- other entrances
@pytest.mark.parametrize("value", [None, "text", 3, [1.0]])
def test_a_state_dict_of_something_else_than_tensors_is_refused(good: Good, value: Any) -> None:
    model = PeftModel.from_pretrained(base_of(good), good.adapter).eval()
    answer, tensors = predict(model, good.inputs), load_file(good.adapter / TENSORS)
    with pytest.raises(ValueError, match=f"{PROMPTS}.* a tensor is needed"):
        set_peft_model_state_dict(model, {**tensors, PROMPTS: value})
    with pytest.raises(ValueError, match=f"{GATES}.* gates are 0 and 1"):
        set_peft_model_state_dict(model, {**tensors, GATES: tensors[GATES] * torch.nan})
    assert torch.equal(predict(model, good.inputs), answer)


@pytest.mark.parametrize("content", [b"", b"{", b'{"peft_type": "E2V', b"\xff\xfe", b"[" * 100_000, POINTER])
def test_a_damaged_config_is_named_by_its_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    for read in (E2VPTConfig.from_pretrained, peft_e2vpt.load):
        with pytest.raises(ValueError, match=rf"{tmp_path}/{CONFIG} is (damaged|a pointer)"):
            read(str(tmp_path))
    assert CONFIG in fail("inspect", str(tmp_path))


@pytest.mark.parametrize("content", ["[1, 2]", "3", '"E2VPT"', "null", "{}", '{"num_visual_prompts": 3}'])
def test_json_of_something_else_is_no_config(tmp_path: Path, content: str) -> None:
    (tmp_path / CONFIG).write_text(content)
    for read in (E2VPTConfig.from_pretrained, peft_e2vpt.load):
        with pytest.raises(
            (ValueError, TypeError), match=rf"{tmp_path}/{CONFIG} is not the configuration of an adapt"
        ):
            read(str(tmp_path))
    assert "has no peft_type" in fail("inspect", str(tmp_path))


@pytest.mark.parametrize("method", ["NONE", 3, ["E2VPT"], {"a": 1}])
def test_a_method_that_nobody_knows_is_named(tmp_path: Path, method: Any) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": method}))
    for read in (E2VPTConfig.from_pretrained, peft_e2vpt.load):
        with pytest.raises(ValueError, match=rf"{CONFIG} has peft_type=.*, which PEFT does not know"):
            read(str(tmp_path))


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path, good: Good) -> None:
    with pytest.raises(ValueError, match=rf"{good.adapter / TENSORS}, which is a file: pass the folder"):
        peft_e2vpt.load(good.adapter / TENSORS)
    assert "which is a file: pass the folder" in fail("inspect", str(good.adapter / TENSORS))


@pytest.mark.parametrize("command", ["inspect", "card"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "pointer", "text for a number"])
def test_commands_name_a_bad_file_in_one_sentence(good: Good, damage: str, command: str) -> None:
    if (damage, command) == ("text for a number", "inspect"):
        return  # it shows what the file says
    spoil, _ = DAMAGES[damage]
    spoil(good.adapter)
    message = fail(command, str(good.adapter))
    assert str(good.adapter) in message


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.pop(GATES),
        lambda t: t.update({GATES: t[GATES][:1].clone()}),
        lambda t: t.update({KV: t[KV][0]}),
        lambda t: t.update({KV.replace(".2.", ".two."): t.pop(KV)}),
        lambda t: t.update({SEGMENTS: torch.zeros(3, 0)}),
        lambda t: t.update({KV + ".more": torch.zeros(1)}),
    ],
)
def test_inspect_says_that_tensors_are_no_adapter(good: Good, edit: Callable[..., Any]) -> None:
    edited(edit)(good.adapter)
    assert f"{TENSORS} is damaged" in fail("inspect", str(good.adapter))


# --------------------------------------------------------------------------------------------- where it is loaded from
def test_what_is_being_loaded_is_known_while_peft_and_transformers_load(good: Good) -> None:
    found = []

    class Watched(type(E2VPTConfig.companion)):  # type: ignore[misc]
        def tensors(self, origin: Any) -> Path:
            found.append(origin)
            return super().tensors(origin)

    with replaced_companion(Watched()):
        for door in ONTO_A_MODEL:
            door(good, base_of(good))
        model = get_peft_model(base_of(good), config_of())
        assert loaded_from() is None and len(found) == 4  # a new adapter is loaded from nowhere
        model.load_adapter(good.adapter.parent, "further", subfolder=good.adapter.name)
        model.load_adapter(good.adapter, "default")  # into a live adapter: nothing is made
    assert [origin.by_transformers for origin in found] == [False, False, False, True, False]
    assert {origin.where for origin in found[:4]} == {str(good.adapter)}
    assert (found[4].where, found[4].download) == (str(good.adapter.parent), {"subfolder": "adapter"})


class replaced_companion:
    def __init__(self, companion: Any) -> None:
        self.companion = companion

    def __enter__(self) -> None:
        self.before, E2VPTConfig.companion = E2VPTConfig.companion, self.companion

    def __exit__(self, *error: object) -> None:
        E2VPTConfig.companion = self.before


def test_a_config_from_a_file_makes_a_new_adapter_without_its_tensors(good: Good) -> None:
    (good.adapter / TENSORS).unlink()
    config = E2VPTConfig.from_pretrained(good.adapter)
    config.inference_mode, config.num_visual_prompts = False, 7
    assert get_peft_model(base_of(good), config).prompt_summary().layers[0].num_visual_prompts == 7
