# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""One exported graph of a backbone takes adapters as inputs, and gives the numbers of the adapted model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_e2vpt.export import AdapterBank, BackboneGraph, GraphLayout, export_adapter, export_backbone, read_adapter
from peft_e2vpt.export.backbone import outputs_by_name
from peft_e2vpt.export.layout import layout_of
from tests.support import zoo
from tests.support import zoo_checks as checks
from tests.support.adapted import SHALLOW, adapt, config_of, predict, prune, trained
from tests.support.models import build
from tests.support.several import ALIKE, BASE, DIFFERENT, one_by_one, with_adapters
from tests.support.zoo_marks import marks_of


Run = Callable[[Tensor, list[str]], Tensor]
FORMATS = ["torch", pytest.param("onnx", marks=pytest.mark.compile)]


def runner(folder: Path, bank: AdapterBank, format: str) -> Run:
    """Runs images with adapters through what was exported."""
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(folder / "backbone.onnx")

        def run(pixels: Tensor, names: list[str]) -> Tensor:
            inputs = {"pixel_values": pixels.numpy(), **bank.inputs(names)}
            return torch.from_numpy(session.run(["logits"], inputs)[0])

        return run
    program = torch.export.load(folder / "backbone.pt2").module()
    return lambda pixels, names: program({"pixel_values": pixels}, bank.inputs(names, library="torch"))["logits"]


def exported(model: PeftModel, folder: Path, format: str = "torch") -> tuple[AdapterBank, Run]:
    """A model's backbone and all its adapters."""
    export_backbone(model, folder, format=format)
    bank = AdapterBank(folder)
    for name in model.peft_config:
        bank.add(name, export_adapter(model, name, folder / f"{name}.safetensors"))
    return bank, runner(folder, bank, format)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Tensor, Path]:
    """A model with adapters that differ in everything, exported."""
    model, pixels = with_adapters("vit", DIFFERENT)
    folder = tmp_path_factory.mktemp("exported")
    exported(model, folder)
    return model, pixels, folder


# ------------------------------------------------------------------------------------------------ one graph, equal
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_every_sample_gets_the_answer_of_its_own_adapter(name: str, format: str, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
    model, pixels = with_adapters(name, DIFFERENT)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _, run = exported(model, tmp_path, format)
    names = [*DIFFERENT, BASE]
    expected = one_by_one(model, pixels, names)
    torch.testing.assert_close(run(pixels, names), expected, rtol=1e-4, atol=1e-5)
    for sample, adapter in enumerate(names):  # alone: one sample, one adapter, for the base model no row at all
        found = run(pixels[sample : sample + 1], [adapter])
        torch.testing.assert_close(found, expected[sample : sample + 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(pixels, [BASE] * len(pixels)), one_by_one(model, pixels, [BASE] * len(pixels)))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_graph_equals_the_model_in_float64() -> None:
    model, pixels = with_adapters("vit", ALIKE, dtype=torch.float64)
    model.double()
    layout = layout_of(model)
    graph = BackboneGraph(model, layout)
    rows = [[layer.computed_rows(name) for layer in model.get_base_model().e2vpt.layers()] for name in ALIKE]
    keys, values = (torch.stack([torch.stack([r[i][0] for r in rows_]) for rows_ in rows], 1) for i in (0, 1))
    heads = [model.get_base_model().classifier.modules_to_save[name] for name in ALIKE]
    adapter = {
        "adapter_index": torch.tensor([2, 0, 1, 1]),
        "keys": keys,
        "values": values,
        "row_bias": torch.zeros(keys.shape[0], 3, keys.shape[3], dtype=torch.float64),
        "head_weight": torch.stack([head.weight for head in heads]),
        "head_bias": torch.stack([head.bias for head in heads]),
    }
    found = graph({"pixel_values": pixels}, adapter)["logits"]
    expected = one_by_one(model, pixels, ["c", "a", "b", "b"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# Their plain versions are exported, but no input can say which adapter a sample has. `checks.WITHOUT_EXPORT` has those
# whose plain versions are not exported either.
WITHOUT_ADAPTERS_AS_INPUTS = {"x_clip_vision": "frames, of which the last layers see one sequence a video"}


# Their plain versions become programs of torch, but no graphs in ONNX.
WITHOUT_ONNX = {"siglip2": "asks whether a mask hides nothing, `_is_all_true`, which torch.onnx does not know"}


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_ONNX)
def test_a_model_without_a_graph_in_onnx_has_none_without_prompts_either(name: str) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra `export`")
    model, inputs = checks.build(name)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="Failed to convert the exported program"):
        torch.onnx.export(checks.export(model, inputs), (), dynamo=True, verbose=False)


@pytest.mark.parametrize("name", WITHOUT_ADAPTERS_AS_INPUTS)
def test_a_backbone_whose_samples_share_a_sequence_is_refused(name: str, tmp_path: Path) -> None:
    base, inputs = checks.build(name)
    with pytest.raises(ValueError, match="samples that share one packed sequence need equal prompts"):
        export_backbone(base, tmp_path, format="torch", example_inputs=inputs)


def outputs_of(
    folder: Path, bank: AdapterBank, format: str, images: dict[str, Tensor], name: str
) -> dict[str, Tensor]:
    """All outputs of what was exported, with one adapter for all samples."""
    names = [name] * len(next(iter(images.values())))
    if format == "torch":
        with torch.no_grad():
            program = torch.export.load(folder / "backbone.pt2").module()
            return program(images, bank.inputs(names, library="torch"))
    session = pytest.importorskip("onnxruntime").InferenceSession(folder / "backbone.onnx")
    given = {**{key: value.numpy() for key, value in images.items()}, **bank.inputs(names)}
    taken = [node.name for node in session.get_inputs()]  # without what the model does not read
    arrays = session.run(None, {key: given[key] for key in taken})
    return {node.name: torch.from_numpy(array) for node, array in zip(session.get_outputs(), arrays, strict=True)}


def sweep() -> list[Any]:
    """The zoo in both formats; a few models in one of them are in quick runs too."""
    found = []
    for name in zoo.names(attention=True):
        if name not in {**checks.WITHOUT_EXPORT, **WITHOUT_ADAPTERS_AS_INPUTS} and not zoo.is_timm(name):
            quick = [] if name in ("hiera", "beit", "yolos") else [pytest.mark.slow]
            found.append(pytest.param(name, "torch", marks=[*marks_of(name), *quick]))
            if name not in WITHOUT_ONNX:
                found.append(pytest.param(name, "onnx", marks=[*marks_of(name), pytest.mark.slow]))
    return found


@pytest.mark.compile
@pytest.mark.parametrize("name, format", sweep())
def test_every_backbone_that_exports_takes_adapters_as_inputs(name: str, format: str, tmp_path: Path) -> None:
    reason = checks.missing(name)
    if reason:
        pytest.skip(f"not in this environment: {reason}")
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="needs the extra `export`")
    base, inputs = checks.build(name)
    model = get_peft_model(base, checks.config(modules_to_save=None), "a")
    model.add_adapter("b", checks.config(num_visual_prompts=2, seed=5, modules_to_save=None))
    with torch.no_grad():
        checks.disturb_heads(model)
    model.eval()
    layout = export_backbone(model, tmp_path, format=format, example_inputs=inputs)
    bank = AdapterBank(tmp_path)
    for adapter in "ab":
        bank.add(adapter, export_adapter(model, adapter, tmp_path / f"{adapter}.safetensors"))
        model.set_adapter(adapter)
        with torch.no_grad():
            expected = outputs_by_name(model(**inputs))
        found = outputs_of(tmp_path, bank, format, inputs, adapter)
        assert tuple(found) == tuple(expected) == layout.outputs
        assert max(checks.apart(found[key], expected[key]) for key in expected) < 1e-4


# ------------------------------------------------------------------------------------------------------------- sizes
def test_a_pruned_adapter_costs_its_pruned_size(tmp_path: Path) -> None:
    model, _ = adapt("vit", num_visual_prompts=8)
    whole = load_file(export_adapter(model, "default", tmp_path / "whole.safetensors"))
    prune(model)
    pruned = load_file(export_adapter(model, "default", tmp_path / "pruned.safetensors"))
    kept = [int(layer.num_rows("default")) for layer in model.get_base_model().e2vpt.layers()]
    assert [pruned[f"rows.{number}.keys"].shape[1] for number in range(3)] == kept
    assert sum(t.numel() for t in pruned.values()) < sum(t.numel() for t in whole.values())


def test_an_adapter_of_some_layers_is_one_of_all_without_rows_in_the_others(tmp_path: Path) -> None:
    model, pixels = with_adapters("vit", {"a": {}, "last": {"layers_to_transform": [2], "seed": 3}})
    bank, run = exported(model, tmp_path)
    assert list(load_file(tmp_path / "last.safetensors")) == sorted(
        ["head.classifier.bias", "head.classifier.weight", "rows.2.keys", "rows.2.values"]
    )
    names = ["last", "a", BASE]
    torch.testing.assert_close(run(pixels, names), one_by_one(model, pixels, names), rtol=1e-4, atol=1e-5)


def test_adapters_tell_different_numbers_of_classes_apart(tmp_path: Path) -> None:
    model, pixels = with_adapters("vit", {"a": {}, "b": {"seed": 1}})
    two, _ = build("vit")
    two.classifier, two.config.id2label, two.num_labels = nn.Linear(32, 2), {0: "no", 1: "yes"}, 2
    few = trained(get_peft_model(two, config_of(seed=4), "few")).eval()
    bank, run = exported(model, tmp_path)
    bank.add("few", export_adapter(few, "few", tmp_path / "few.safetensors"))
    names = ["few", "a", BASE]
    logits = run(pixels, names)
    assert logits[0, 2:].isneginf().all() and logits[1:].isfinite().all()
    parts = bank.batch(names).split(logits)
    torch.testing.assert_close(parts[0], predict(few, {"pixel_values": pixels[:1]})[0], rtol=1e-4, atol=1e-5)
    assert [len(part) for part in parts] == [2, 5, 5]


def test_a_model_without_adapters_is_exported_too(tmp_path: Path) -> None:
    base, inputs = build("vit")
    layout = export_backbone(base, tmp_path, format="torch")
    model = trained(get_peft_model(build("vit")[0], config_of())).eval()
    assert layout.fingerprint == layout_of(model).fingerprint
    bank = AdapterBank(tmp_path)
    bank.add("later", export_adapter(model, "default", tmp_path / "later.safetensors"))
    run = runner(tmp_path, bank, "torch")
    pixels = inputs["pixel_values"]
    torch.testing.assert_close(run(pixels, ["later"] * 2), predict(model, inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(pixels, [BASE] * 2), predict(build("vit")[0], inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.compile
def test_onnxruntime_takes_an_adapter_in_its_own_format(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, pixels = with_adapters("vit", ALIKE)
    export_backbone(model, tmp_path)
    path = export_adapter(model, "b", tmp_path / "b.onnx_adapter")
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    session = onnxruntime.InferenceSession(tmp_path / "backbone.onnx")
    inputs = {"pixel_values": pixels.numpy(), "adapter_index": np.zeros(len(pixels), np.int64)}
    # `session.run` asks for the inputs of an adapter too, before it counts them; other languages do not
    [logits] = session._sess.run(["logits"], inputs, options)
    expected = one_by_one(model, pixels, ["b"] * len(pixels))
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- dense heads
def test_a_head_that_is_not_linear_is_one_for_all_samples_of_a_batch(tmp_path: Path) -> None:
    base, inputs = checks.build("yolos")
    model = get_peft_model(base, checks.config(modules_to_save=None), "a")
    model.add_adapter("b", checks.config(seed=5, modules_to_save=None))
    bank, _ = exported(model.eval(), tmp_path)
    assert not bank.layout.per_sample_heads
    with pytest.raises(ValueError, match=r"The head class_labels_classifier is not a linear layer.*for each of a, b"):
        bank.inputs(["a", "b"])


# -------------------------------------------------------------------------------------------------------- refusals
def test_shallow_prompts_are_no_input(tmp_path: Path) -> None:
    model, _ = adapt("vit", **SHALLOW)
    with pytest.raises(ValueError, match="'default' has visual_prompt_mode='shallow'.*Only adapters in 'deep' mode"):
        export_backbone(model, tmp_path)


def test_wrong_words_are_refused(shared: Any, tmp_path: Path) -> None:
    model, _, folder = shared
    with pytest.raises(ValueError, match="format is 'tflite': choose one of 'onnx', 'torch'"):
        export_backbone(model, tmp_path, format="tflite")
    with pytest.raises(ValueError, match="Adapter nobody does not exist; the model has a, b, kv, pruned, zeroed"):
        export_adapter(model, "nobody", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="written as .safetensors or .onnx_adapter, got a.bin"):
        export_adapter(model, "a", tmp_path / "a.bin")
    with pytest.raises(ValueError, match="hold a single sample"):
        export_backbone(model, tmp_path, example_inputs={"pixel_values": torch.zeros(1, 3, 32, 32)})
    with pytest.raises(ValueError, match="holds no exported backbone.*export_backbone"):
        AdapterBank(tmp_path)
    with pytest.raises(ValueError, match="names is 'a': give a list"):
        AdapterBank(folder).inputs("a")
    assert not list(tmp_path.iterdir())


def damaged(
    folder: Path,
    path: Path,
    metadata: dict[str, str] | None = None,
    tensors: dict[str, Tensor] | None = None,
    without: str | None = None,
) -> Path:
    """An exported adapter with other tensors or metadata."""
    with safe_open(folder / "a.safetensors", framework="pt") as file:
        facts = {**file.metadata(), **(metadata or {})}
    kept = {**load_file(folder / "a.safetensors"), **(tensors or {})}
    kept.pop(without, None)
    save_file(kept, path, facts)
    return path


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "another backbone": ({"metadata": {"fingerprint": "0" * 64}}, "trained on another backbone"),
    "no exported adapter": ({"metadata": {"kind": "pt"}}, "is not an exported adapter"),
    "a later version": ({"metadata": {"format": "99"}}, "of another version, 99: upgrade peft_e2vpt"),
    "a version that is no number": ({"metadata": {"format": "x"}}, "of another version, x"),
    "labels that are no list": ({"metadata": {"labels": '{"a": 1}'}}, "labels is not a list of names"),
    "labels that are no JSON": ({"metadata": {"labels": "["}}, "cannot be read as an exported adapter"),
    "an unknown tensor": ({"tensors": {"rows.9.keys": torch.zeros(4, 2, 8)}}, "rows.9.keys .* takes no such tensor"),
    "another width": ({"tensors": {"rows.0.keys": torch.zeros(4, 5, 9)}}, r"rows.0.keys .* takes \(4, any, 8\)"),
    "other rows in keys": ({"tensors": {"rows.0.keys": torch.zeros(4, 9, 8)}}, "another number of rows"),
    "no head": ({"without": "head.classifier.weight"}, "has no head.classifier.weight"),
    "values that are not finite": ({"tensors": {"rows.0.keys": torch.full((4, 5, 8), torch.nan)}}, "not finite"),
    "half precision": ({"tensors": {"rows.0.keys": torch.zeros(4, 5, 8).half()}}, "is of F16 instead of F32"),
    "bfloat16": ({"tensors": {"rows.0.keys": torch.zeros(4, 5, 8).bfloat16()}}, "is of BF16 instead of F32"),
    "names of other classes": ({"metadata": {"labels": '["a", "b"]'}}, "names 2 classes, but its head has 5"),
    "a bias of other classes": ({"tensors": {"head.classifier.bias": torch.zeros(3)}}, "are not of as many classes"),
    "a head of other width": ({"tensors": {"head.classifier.weight": torch.zeros(5, 9)}}, r"takes \(any, 32\)"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_adapter_is_refused_and_the_bank_is_what_it_was(damage: str, shared: Any, tmp_path: Path) -> None:
    _, _, folder = shared
    changes, message = DAMAGE[damage]
    bank = AdapterBank(folder)
    bank.add("a", folder / "a.safetensors")
    before = bank.inputs(["a"])
    with pytest.raises(ValueError, match=message):
        bank.add("a", damaged(folder, tmp_path / "bad.safetensors", **changes))
    after = bank.inputs(["a"])
    assert list(bank) == ["a"] and all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 64], ids=len)
def test_a_file_that_is_no_safetensors_is_refused_by_name(content: bytes, shared: Any, tmp_path: Path) -> None:
    _, _, folder = shared
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.safetensors cannot be read as an exported adapter"):
        AdapterBank(folder).add("broken", path)


def test_a_layout_survives_json_and_a_damaged_one_is_refused(shared: Any) -> None:
    _, _, folder = shared
    text = (folder / "backbone.json").read_text(encoding="utf-8")
    layout = GraphLayout.from_json(text)
    assert GraphLayout.from_json(layout.to_json()) == layout
    for broken in (text[:50], "[]", "{}", json.dumps({**json.loads(text), "groups": 3})):
        with pytest.raises(ValueError, match="not the layout of an exported backbone"):
            GraphLayout.from_json(broken)
    assert read_adapter(layout, folder / "pruned.safetensors").name == "pruned"
