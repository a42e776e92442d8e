# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""An exported backbone in 8 bit takes the adapters of the float one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from quantize_backbone import GRAPH, batches_of, products_with_weights, quantize
from transformers import ViTImageProcessor

from benchmarks.baselines import build
from benchmarks.mixed_batches import add_adapters
from peft_e2vpt.export import AdapterBank, export_adapter, export_backbone


onnx = pytest.importorskip("onnx", reason="needs the extra `export`")
ort = pytest.importorskip("onnxruntime", reason="needs the extra `export`")
pytest.importorskip("onnxscript", reason="needs the extra `export`")


pytestmark = pytest.mark.compile
NAMES = ["task0", "__base__", "task1", "task0"]
Logits = Callable[[str, np.ndarray, list[str]], np.ndarray]


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.RandomState(0).randn(len(NAMES), 3, 32, 32).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    """A folder with `float`, `dynamic` and `static`, and two adapters of unlike numbers of prompts."""
    root = tmp_path_factory.mktemp("exported")
    model: Any = build("e2vpt", "tiny", 32, 4, 2)
    add_adapters(model, "task", 2, pruned=True)
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "task" in name):
            parameter.normal_(std=0.5)
    export_backbone(model.eval(), root / "float")
    for name in ("task0", "task1"):
        export_adapter(model, name, root / f"{name}.safetensors")
    given = AdapterBank(root / "float").inputs(["__base__"] * len(NAMES))
    quantize(root / "float", root / "dynamic")
    quantize(root / "float", root / "static", [{"pixel_values": pixels, **given}])
    return root


@pytest.fixture(scope="module")
def logits(folder: Path) -> Logits:
    """Runs a graph, `logits(kind, pixels, names)`."""

    def run(kind: str, pixels: np.ndarray, names: list[str]) -> np.ndarray:
        bank = AdapterBank(folder / kind)
        for name in ("task0", "task1"):
            bank.add(name, folder / f"{name}.safetensors")
        session = ort.InferenceSession(folder / kind / GRAPH, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(["logits"], {"pixel_values": pixels, **bank.inputs(names)})[0])

    return run


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_quantised_backbone_gives_about_the_logits_of_the_float_one_for_every_adapter(
    logits: Logits, pixels: np.ndarray, kind: str
) -> None:
    expected, found = (logits(which, pixels, NAMES) for which in ("float", kind))
    assert 0 < np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def test_with_fixed_ranges_an_image_has_the_same_logits_in_any_batch(logits: Logits, pixels: np.ndarray) -> None:
    mixed = logits("static", pixels, NAMES)
    for number, name in enumerate(NAMES):
        alone = logits("static", pixels[[number]], [name])[0]
        np.testing.assert_allclose(mixed[number], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_weights_take_one_byte_and_adapters_stay_inputs_in_float(folder: Path, kind: str) -> None:
    before, after = (onnx.load(folder / which / GRAPH) for which in ("float", kind))
    assert [(i.name, i.type.tensor_type.elem_type) for i in after.graph.input] == [
        (i.name, i.type.tensor_type.elem_type) for i in before.graph.input
    ]
    blocks = 2 * 6  # of two blocks, q, k, v, the output and two of the MLP
    assert len(products_with_weights(folder / "float" / GRAPH)) == blocks
    matrices = [t for t in after.graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.INT8]
    assert len(matrices) == blocks


def test_nothing_is_written_over(folder: Path) -> None:
    with pytest.raises(FileExistsError):
        quantize(folder / "float", folder / "dynamic")


def test_a_folder_without_a_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no backbone\.onnx .* export_backbone"):
        quantize(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_batches_for_calibration_come_from_a_folder_of_images(folder: Path, tmp_path: Path) -> None:
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no image"):
        next(batches_of(folder / "float", tmp_path, str(tmp_path / "model")))
    for number in range(3):
        Image.new("RGB", (40, 20), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    batches = list(batches_of(folder / "float", tmp_path, str(tmp_path / "model"), size=2))
    assert [batch["pixel_values"].shape for batch in batches] == [(2, 3, 32, 32), (1, 3, 32, 32)]
    quantize(folder / "float", tmp_path / "static", batches)
