# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A user's own images, and a backbone small enough to learn them in seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


LEVELS = {"dark": 30, "bright": 200}


def draw_images(folder: Path, count: int, seed: int = 0) -> Path:
    """Writes noisy images of two classes, dark and bright, into a folder each."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    for label, level in LEVELS.items():
        (folder / label).mkdir(parents=True)
        for index in range(count):
            pixels = level + torch.randint(0, 50, (40, 40, 3), generator=generator)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / label / f"{index}.png")
    return folder


def save_tiny_vit(folder: Path) -> Path:
    """Saves a random ViT of two layers with the configuration of its image processor."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes), add_pooling_layer=False).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def script_runner(
    script: ModuleType, usual: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Makes what runs `finetune.py` in this process and returns what it prints; its exit status is `code`.

    Options given to it replace the usual ones, `None` leaves one out.
    """

    def finetune(*flags: str, **options: object) -> str:
        arguments = ["finetune.py", "--use_cpu", *flags]
        for name, value in {**usual, **options}.items():
            if value is not None:
                arguments += [f"--{name}", *(value.split() if name == "method" else [str(value)])]
        monkeypatch.setattr(sys, "argv", arguments)
        capsys.readouterr()
        try:
            script.main()
        except SystemExit as stop:
            finetune.code, text = (stop.code, "") if isinstance(stop.code, int) else (1, str(stop.code))
        else:
            finetune.code, text = 0, ""
        return "".join(capsys.readouterr()) + text

    return finetune
