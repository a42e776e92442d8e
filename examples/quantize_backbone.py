"""Quantises an exported backbone to 8 bit with onnxruntime; its adapters stay as they are.

```bash
pip install -e ".[export]" pillow
python examples/quantize_backbone.py exported exported-int8                                    # dynamic
python examples/quantize_backbone.py exported exported-int8 --images photos --processor MODEL   # static
```

`exported` is a folder of `export_backbone(model, "exported")`. The new one is used in the same way:
`AdapterBank("exported-int8")` and `exported-int8/backbone.onnx`.

What is quantised are the products with the weights of the backbone, with a scale for every output channel. What has to
do with adapters stays in float: keys and values with their rows, the scores with the bias of rows that are not there
(-1e4, which would take up all of an 8-bit range), and the heads (bias -inf where a class is not there). So an adapter
trained on the float backbone is an adapter of the quantised one too; `benchmarks/eight_bit.py` measures how well.

* dynamic: the ranges of what is multiplied with the weights are those of each batch, so an answer depends a little on
  the other images in its batch;
* static: they are fixed beforehand, from images (about 100), and every image gets the same answer in any batch.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


Inputs = dict[str, np.ndarray]  # all inputs of the graph for a batch, by name
GRAPH = "backbone.onnx"


def quantize(source: str | Path, target: str | Path, batches: Iterable[Inputs] | None = None) -> Path:
    """
    Writes an exported backbone in 8 bit, with everything that lies beside it.

    Args:
        source (`str` or `Path`): The folder of `export_backbone` in the format `"onnx"`.
        target (`str` or `Path`): The folder to write, a new one.
        batches (iterable of `dict[str, np.ndarray]`, *optional*):
            Inputs of the graph to find ranges from, for static quantisation. By default it is dynamic.

    Returns:
        `Path`: The new graph.

    Raises:
        ValueError: `source` has no graph in ONNX.
        FileExistsError: `target` exists.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, target = Path(source), Path(target)
    if not (source / GRAPH).is_file():
        raise ValueError(f"There is no {GRAPH} in {source}: write it with export_backbone(model, {str(source)!r}).")
    with tempfile.TemporaryDirectory() as folder:
        prepared, written = Path(folder, "prepared.onnx"), Path(folder, GRAPH)
        quant_pre_process(str(source / GRAPH), str(prepared), skip_symbolic_shape=True)
        common = {"nodes_to_quantize": products_with_weights(prepared), "per_channel": True}
        common["weight_type"] = QuantType.QInt8
        if batches is None:
            quantize_dynamic(prepared, written, **common)
        else:
            quantize_static(
                *(prepared, written, Reader(batches)),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm"],
                activation_type=QuantType.QUInt8,
                **common,
            )
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(f"{GRAPH}*"))
        return Path(shutil.move(written, target / GRAPH))


def products_with_weights(graph: Path) -> list[str]:
    """Names the matrix products of a graph one side of which is a constant."""
    import onnx

    model = onnx.load(str(graph))
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and not constants.isdisjoint(node.input[:2])
    ]


class Reader:
    """
    A `CalibrationDataReader` over batches.

    Args:
        batches (iterable of `dict[str, np.ndarray]`): Inputs of the graph.
    """

    def __init__(self, batches: Iterable[Inputs]) -> None:
        self.batches: Iterator[Inputs] = iter(batches)

    def get_next(self) -> Inputs | None:
        """Returns the next batch, `None` after the last."""
        return next(self.batches, None)

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Inputs:
        return next(self.batches)


def batches_of(folder: Path, images: Path, model_name: str, size: int = 16) -> Iterator[Inputs]:
    """Makes batches for calibration from a folder of images, without an adapter."""
    from PIL import Image
    from transformers import AutoImageProcessor

    from peft_e2vpt.export import AdapterBank

    bank = AdapterBank(folder)
    [(name, (_, *square))] = bank.layout.images.items()
    sides = dict(zip(("height", "width"), square, strict=True))
    processor: Any = AutoImageProcessor.from_pretrained(model_name, size=sides, crop_size=sides)
    files = sorted(file for file in images.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not files:
        raise ValueError(f"There is no image in {images}.")
    for start in range(0, len(files), size):
        opened = [Image.open(file).convert("RGB") for file in files[start : start + size]]
        pixels = processor(opened, return_tensors="np")[name].astype(np.float32)
        yield {name: pixels, **bank.inputs(["__base__"] * len(opened))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="Folder of an exported backbone.")
    parser.add_argument("target", type=Path, help="Folder to write.")
    parser.add_argument("--images", type=Path, help="Folder of images, for static quantisation.")
    parser.add_argument("--processor", help="Model whose image processor prepares them.")
    args = parser.parse_args()
    if (args.images is None) != (args.processor is None):
        parser.error("--images and --processor go together.")
    try:
        batches = None if args.images is None else batches_of(args.source, args.images, args.processor)
        written = quantize(args.source, args.target, batches)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    before, after = ((args.source / GRAPH).stat().st_size, written.stat().st_size)
    print(f"{before / 1e6:.1f} MB in float32, {after / 1e6:.1f} MB in 8 bit: {written}")


if __name__ == "__main__":
    main()
