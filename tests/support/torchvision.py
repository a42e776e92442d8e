# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""torchvision beside a torch that its compiled operators were not made for."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def declare_missing_operators() -> None:
    """Makes torchvision importable beside a torch that it does not pair with, such as a CPU build.

    timm takes image transforms from torchvision, which need none of its compiled operators. But where those cannot be
    loaded, `import torchvision` fails at two that it describes for meta tensors without a check. They are declared
    here, without a kernel: calling one is still an error. Nothing is done where torchvision is absent or imports.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
