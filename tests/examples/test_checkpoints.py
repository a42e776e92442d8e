# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Converted checkpoints of MoCo v3 and MAE compute, in float64, what the files say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    BeitForImageClassification,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
)


WIDTH, HEADS, DEPTH, PATCH, IMAGE = 24, 3, 2, 4, 12
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def draw(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape)


def timm_encoder(final_norm: bool = True) -> dict[str, Tensor]:
    """A random ViT under timm's names; no bias and no norm weight has the value that a new module has."""
    num_patches = (IMAGE // PATCH) ** 2
    tensors = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, 1 + num_patches, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(WIDTH),
    }
    shapes = {
        "attn.qkv": (3 * WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.fc1": (40, WIDTH),
        "mlp.fc2": (WIDTH, 40),
    }
    for index in range(DEPTH):
        for name, shape in shapes.items():
            tensors[f"blocks.{index}.{name}.weight"] = draw(*shape)
            tensors[f"blocks.{index}.{name}.bias"] = draw(shape[0])
        for name in ("norm1", "norm2"):
            tensors[f"blocks.{index}.{name}.weight"] = 1 + draw(WIDTH)
            tensors[f"blocks.{index}.{name}.bias"] = draw(WIDTH)
    if final_norm:
        tensors |= {"norm.weight": 1 + draw(WIDTH), "norm.bias": draw(WIDTH)}
    return tensors


def last_block(tensors: dict[str, Tensor], pixels: Tensor, eps: float = 1e-6) -> Tensor:
    """The tokens (B, 1 + P, D) of the last block of a timm ViT, worked out from its tensors."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    patches = F.conv2d(pixels, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([t["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + t["pos_embed"]
    for index in range(DEPTH):

        def linear(values: Tensor, name: str, index: int = index) -> Tensor:
            return F.linear(values, t[f"blocks.{index}.{name}.weight"], t[f"blocks.{index}.{name}.bias"])

        def norm(values: Tensor, name: str, index: int = index) -> Tensor:
            weight, bias = t[f"blocks.{index}.{name}.weight"], t[f"blocks.{index}.{name}.bias"]
            return F.layer_norm(values, (WIDTH,), weight, bias, eps)

        qkv = linear(norm(x, "norm1"), "attn.qkv").unflatten(-1, (3, HEADS, WIDTH // HEADS))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        x = x + linear((weights @ value).transpose(1, 2).flatten(2), "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")
    return x


def pixels() -> Tensor:
    return torch.randn(3, 3, IMAGE, IMAGE, dtype=torch.float64)


def classifier(folder: Path) -> Any:
    return AutoModelForImageClassification.from_pretrained(folder, num_labels=5).double().eval()


def mocov3_file(path: Path, layout: str) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A file as MoCo v3 writes it: of the pre-training, with two encoders, or of the linear evaluation."""
    encoders = {name: timm_encoder() for name in checkpoints.ENCODERS}
    if layout == "linear evaluation":
        encoders = {"base_encoder": encoders["base_encoder"]}
        state = {f"module.{name}": tensor for name, tensor in encoders["base_encoder"].items()}
        state |= {"module.head.weight": draw(10, WIDTH), "module.head.bias": draw(10)}
    else:
        state = {f"module.{e}.{name}": tensor for e, tensors in encoders.items() for name, tensor in tensors.items()}
        for encoder in encoders:
            state |= {
                f"module.{encoder}.head.0.weight": draw(8, WIDTH),
                f"module.{encoder}.head.1.running_mean": draw(8),
            }
        state["module.predictor.0.weight"] = draw(8, 8)
    torch.save({"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {}}, path)
    return path, encoders


@pytest.mark.parametrize(
    ("layout", "encoder"),
    [("pre-training", "base_encoder"), ("pre-training", "momentum_encoder"), ("linear evaluation", "base_encoder")],
)
def test_mocov3_computes_what_its_file_says(layout, encoder, tmp_path):
    file, encoders = mocov3_file(tmp_path / "vit-b-300ep.pth.tar", layout)
    checkpoints.convert_mocov3(file, tmp_path / "vit", num_heads=HEADS, encoder=encoder)
    model, images = classifier(tmp_path / "vit"), pixels()
    assert type(model) is ViTForImageClassification

    tokens = last_block(encoders[encoder], images)
    norm = [encoders[encoder][f"norm.{kind}"].double() for kind in ("weight", "bias")]
    expected = model.classifier(F.layer_norm(tokens[:, 0], (WIDTH,), *norm, 1e-6))
    torch.testing.assert_close(model(images).logits, expected, **EXACT)


def mae_file(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file as MAE's authors give away: the encoder, or encoder and decoder."""
    encoder = timm_encoder()
    others = {"mask_token": draw(1, 1, 8), "decoder_embed.weight": draw(8, WIDTH), "decoder_norm.bias": draw(8)}
    torch.save({"model": encoder | others}, path)
    return path, encoder


def test_mae_computes_the_norm_of_the_mean_over_patches_of_its_file(tmp_path):
    file, encoder = mae_file(tmp_path / "mae_pretrain_vit_base.pth")
    checkpoints.convert_mae(file, tmp_path / "beit", num_heads=HEADS)
    model, images = classifier(tmp_path / "beit"), pixels()
    assert type(model) is BeitForImageClassification

    pooled = F.layer_norm(last_block(encoder, images)[:, 1:].mean(dim=1), (WIDTH,), eps=1e-6)
    torch.testing.assert_close(model(images).logits, model.classifier(pooled), **EXACT)


def test_mae_of_transformers_computes_what_its_encoder_does_without_a_mask(tmp_path):
    config = ViTMAEConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=40,
        image_size=IMAGE,
        patch_size=PATCH,
        mask_ratio=0.0,
    )
    source = ViTMAEModel(config)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    source.save_pretrained(tmp_path / "mae")
    checkpoints.convert_mae(tmp_path / "mae", tmp_path / "beit")
    model, images = classifier(tmp_path / "beit"), pixels()

    source.double().eval().layernorm = torch.nn.Identity()  # the mean is taken before the norm
    noise = torch.arange(9.0).expand(len(images), -1)  # keeps the patches in order
    tokens = source(images, noise=noise).last_hidden_state
    pooled = F.layer_norm(tokens[:, 1:].mean(dim=1), (WIDTH,), eps=config.layer_norm_eps)
    torch.testing.assert_close(model(images).logits, model.classifier(pooled), **EXACT)


@pytest.mark.parametrize("kind", ["mocov3", "mae"])
@pytest.mark.parametrize("change", ["missing", "left over", "mis-shaped"])
def test_a_tensor_that_does_not_fit_is_named(kind, change, tmp_path):
    path, name = tmp_path / "file", "blocks.1.mlp.fc2.bias"
    make = mae_file if kind == "mae" else lambda path: mocov3_file(path, "linear evaluation")
    file, _ = make(path)
    checkpoint = torch.load(file)
    state = checkpoint["model" if kind == "mae" else "state_dict"]
    prefix = "" if kind == "mae" else "module."
    if change == "missing":
        del state[prefix + name]
        message = r"missing_keys.*layers\.1\.mlp\.fc2\.bias"
    elif change == "left over":
        state[prefix + "blocks.1.ls1.gamma"] = draw(WIDTH)
        message = r"Not the names of a ViT: blocks\.1\.ls1\.gamma"
    else:
        state[prefix + name] = draw(WIDTH + 1)
        message = r"mismatched_keys.*layers\.1\.mlp\.fc2\.bias"
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match=message):
        checkpoints.CONVERTERS[kind](file, tmp_path / "model", num_heads=HEADS)
    assert not (tmp_path / "model").exists()


def test_what_a_file_cannot_tell_is_asked_for(tmp_path):
    file, _ = mocov3_file(tmp_path / "vit.pth.tar", "linear evaluation")
    with pytest.raises(ValueError, match="How many heads has a ViT of width 24"):
        checkpoints.convert_mocov3(file, tmp_path / "model")
    with pytest.raises(ValueError, match="holds no momentum_encoder"):
        checkpoints.convert_mocov3(file, tmp_path / "model", num_heads=HEADS, encoder="momentum_encoder")
    with pytest.raises(ValueError, match="An MAE file has the entry 'model', this one has .*'state_dict'"):
        checkpoints.convert_mae(file, tmp_path / "model", num_heads=HEADS)


def test_the_command_converts(tmp_path, monkeypatch, capsys):
    file, _ = mocov3_file(tmp_path / "vit.pth.tar", "pre-training")
    arguments = ["mocov3", str(file), str(tmp_path / "model"), "--num_heads", "3", "--encoder", "momentum_encoder"]
    monkeypatch.setattr(sys, "argv", ["checkpoints.py", *arguments])
    checkpoints.main()
    assert "Wrote" in capsys.readouterr().out
    assert (tmp_path / "model" / "preprocessor_config.json").is_file()
