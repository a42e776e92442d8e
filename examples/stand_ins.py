# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Tiny random backbones and images in place of the real ones, for the smoke runs of `vtab1k.py` and `fgvc.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import write_processor


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


def make_backbones(folder: Path, names: dict[str, Any]) -> None:
    """
    Writes a tiny random backbone for every name: of the class that the real one has, or a file of its authors' layout.

    Args:
        folder (`Path`): Where `folder/NAME` goes.
        names: `vit`, `swin`, `mae` and `mocov3`.
    """
    from transformers import (
        SwinConfig,
        SwinModel,
        ViTConfig,
        ViTMAEConfig,
        ViTMAEModel,
        ViTModel,
    )

    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, image_size=32, patch_size=4, drop_path_rate=0.0
    )
    models = {
        "vit": lambda: ViTModel(ViTConfig(**SIZES)),
        "swin": lambda: SwinModel(swin),
        "mae": lambda: ViTMAEModel(ViTMAEConfig(**SIZES, decoder_num_hidden_layers=1, decoder_hidden_size=8)),
    }
    folder.mkdir(parents=True)
    for name in names:
        if name == "mocov3":
            write_mocov3(folder / name)
        else:
            models[name]().save_pretrained(folder / name)
            write_processor(folder / name, side=32)


def write_mocov3(path: Path) -> None:
    """Writes a file as MoCo v3's linear evaluation leaves it: names of timm, one encoder, a head for ImageNet."""
    width, inner, patch_size = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["patch_size"]
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + (SIZES["image_size"] // patch_size) ** 2, width),
        "patch_embed.proj.weight": (width, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (10, width),
        "head.bias": (10,),
    }
    for index in range(SIZES["num_hidden_layers"]):
        outputs = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (inner, width)}
        for name, shape in {**outputs, "mlp.fc2": (width, inner), "norm1": (width,), "norm2": (width,)}.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
    state = {
        f"module.{name}": torch.ones(shape) if "norm" in name and name.endswith("weight") else 0.1 * torch.randn(shape)
        for name, shape in shapes.items()
    }
    torch.save({"epoch": 90, "arch": "vit_base", "state_dict": state}, path)


def write_image(path: Path, label: int, index: int, side: int = 32) -> None:
    """Writes a noisy image whose colour tells its class."""
    from PIL import Image

    generator = torch.Generator().manual_seed(1000 * label + index)
    pixels = torch.randint(0, 80, (side, side, 3), generator=generator)
    pixels[..., label % 3] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
