# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Turns checkpoints of MoCo v3 and MAE, which are not on the Hub as image classifiers, into transformers folders.

```bash
python examples/checkpoints.py mocov3 vit-b-300ep.pth.tar moco-vit-b
python examples/checkpoints.py mae mae_pretrain_vit_base.pth mae-vit-b      # the authors' file
python examples/checkpoints.py mae facebook/vit-mae-base mae-vit-b          # or the Hub's
```

```python
model = AutoModelForImageClassification.from_pretrained("mae-vit-b", num_labels=100)  # adds the head
```

* **MoCo v3** becomes a ViT: class token of the last layer, after the final norm. Of a pre-training file the encoder
  that is trained is taken (`base_encoder`), as its authors do; `--encoder momentum_encoder` takes its moving average.
  Files of the linear evaluation (`linear-vit-b-300ep.pth.tar`) have one encoder. What comes after it is left out.
* **MAE** becomes a BEiT without relative positions and without layer scale: the one class of transformers that
  classifies as MAE's fine-tuning does, by the mean over the patches of the last block and then a norm. That norm is
  new (weight 1, bias 0), there as here: the pre-trained final norm, which comes before a mean, is left out.
  BEiT's keys have no bias. A bias of the keys adds the same to all scores of a query, so softmax removes it: outputs
  and visual prompts are the same. A key-value prompt is no projected key, so its score differs by that constant. The
  largest left-out bias is printed; pre-training gives these biases no gradient.

Names in the files are timm's. A tensor that is missing, left over or of another shape is an error that names it.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BeitConfig, BeitModel, PreTrainedModel, ViTConfig, ViTMAEModel, ViTModel
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


# Heads leave no trace in a checkpoint. MoCo v3's small ViT has 12 of them, unlike timm's.
HEADS_BY_WIDTH = {384: 12, 768: 12, 1024: 16, 1280: 16}
ENCODERS = ("base_encoder", "momentum_encoder")

# timm's names and those of the first transformers ViTs, which every version of transformers reads
OUTER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
}
IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


# --------------------------------------------------------------------------------------------------- reading the files


def mocov3_encoder(checkpoint: dict[str, Any], encoder: str = "base_encoder") -> dict[str, Tensor]:
    """
    Takes one encoder out of a MoCo v3 checkpoint, under timm's names, without projector, predictor and head.

    Args:
        checkpoint (`dict[str, Any]`): What the `.pth.tar` file holds; its `state_dict` has names that start with
            `module.`, in pre-training followed by `base_encoder.`, `momentum_encoder.` or `predictor.`.
        encoder (`str`): Which encoder of a pre-training file.

    Raises:
        ValueError: The file has no `state_dict`, or it does not hold that encoder.
    """
    if "state_dict" not in checkpoint:
        raise ValueError(f"A MoCo v3 file has the entry 'state_dict', this one has {sorted(checkpoint)}.")
    tensors = {name.removeprefix("module."): tensor for name, tensor in checkpoint["state_dict"].items()}
    pretraining = any(name.startswith(ENCODERS) for name in tensors)
    prefix = f"{encoder}." if pretraining else ""
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not found or (not pretraining and encoder != "base_encoder"):
        raise ValueError(
            f"The file holds no {encoder}: its names begin like {sorted(tensors)[:3]}. Choose another --encoder."
        )
    return {name: tensor for name, tensor in found.items() if not name.startswith("head.")}


def mae_encoder(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """
    Takes the encoder out of an MAE checkpoint, under timm's names, without decoder, mask token and final norm.

    Args:
        checkpoint (`dict[str, Any]`): What the `.pth` file holds; `model` has timm's names.

    Raises:
        ValueError: The file has no `model`.
    """
    if "model" not in checkpoint:
        raise ValueError(f"An MAE file has the entry 'model', this one has {sorted(checkpoint)}.")
    left_out = ("decoder_", "mask_token", "norm.")
    return {name: tensor for name, tensor in checkpoint["model"].items() if not name.startswith(left_out)}


def mae_encoder_of(model: ViTMAEModel) -> dict[str, Tensor]:
    """Takes the encoder out of transformers' `ViTMAEModel`, under timm's names, without the final norm."""
    tensors = dict(model.named_parameters())
    found = {timm: tensors.pop(name) for timm, name in OUTER.items()}
    for index, layer in enumerate(model.layers):
        attention = layer.attention
        modules = {
            "norm1": layer.layernorm_before,
            "norm2": layer.layernorm_after,
            "attn.proj": attention.o_proj,
            "mlp.fc1": layer.mlp.fc1,
            "mlp.fc2": layer.mlp.fc2,
        }
        for kind in ("weight", "bias"):
            parts = [getattr(part, kind) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            found[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
            for name, module in modules.items():
                found[f"blocks.{index}.{name}.{kind}"] = getattr(module, kind)
    return {name: tensor.detach() for name, tensor in found.items()}


def split_projections(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Renames the tensors of a timm ViT for transformers, and cuts the common projection into queries, keys and values.

    Args:
        encoder (`dict[str, Tensor]`): Tensors under timm's names; a projection `qkv` of shape (3 D, D).

    Raises:
        ValueError: A name is not one of a timm ViT.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in encoder.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in OUTER:
            renamed[OUTER[name]] = tensor
        elif name.startswith("norm."):
            renamed[name.replace("norm.", "layernorm.")] = tensor
        elif block and block[2] == "attn.qkv":
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"encoder.layer.{block[1]}.attention.attention.{part}.{block[3]}"] = piece.contiguous()
        elif block and block[2] in IN_BLOCK:
            renamed[f"encoder.layer.{block[1]}.{IN_BLOCK[block[2]]}.{block[3]}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"Not the names of a ViT: {', '.join(sorted(unknown))}.")
    return renamed


def sizes(encoder: dict[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """
    Reads the sizes of a ViT off its tensors.

    Args:
        encoder (`dict[str, Tensor]`): Tensors under timm's names.
        num_heads (`int`, *optional*): Heads of every attention. By default known from the width.

    Raises:
        ValueError: A tensor that tells a size is missing, or the number of heads is not known or does not fit.
    """
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in encoder]
    if missing:
        raise ValueError(
            f"The checkpoint lacks {', '.join(missing)}, so it is not a ViT with a linear patch embedding."
        )
    width, channels, patch_size, _ = encoder["patch_embed.proj.weight"].shape
    num_heads = num_heads or HEADS_BY_WIDTH.get(width)
    if num_heads is None or width % num_heads:
        raise ValueError(f"How many heads has a ViT of width {width}? Pass --num_heads, a divisor of it.")
    per_side = round((encoder["pos_embed"].shape[1] - 1) ** 0.5)
    return {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": per_side * patch_size,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in encoder if name.startswith("blocks.")),
        "num_attention_heads": num_heads,
        "intermediate_size": len(encoder["blocks.0.mlp.fc1.weight"]),
    }


# -------------------------------------------------------------------------------------------------- writing the models


def write_model(
    model_class: type[PreTrainedModel], config: Any, tensors: dict[str, Tensor], folder: str | Path, **settings: Any
) -> None:
    """
    Writes a model and the configuration of its image processor.

    Raises:
        ValueError: A tensor is missing, left over or of another shape; the message names all.
    """
    with tempfile.TemporaryDirectory() as unchecked:
        config.save_pretrained(unchecked)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{unchecked}/model.safetensors")
        model, loading_info = model_class.from_pretrained(
            unchecked, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32, **settings
        )
    problems = {kind: sorted(map(str, names)) for kind, names in loading_info.items() if names}
    if problems:
        raise ValueError(f"The checkpoint does not make up a {model_class.__name__}: {problems}")
    model.save_pretrained(folder)
    write_processor(folder, config.image_size)


def write_processor(folder: str | Path, side: int) -> None:
    """Writes the configuration of an image processor: squares of `side` pixels, ImageNet's mean and deviation."""
    # Written as plain JSON: the class behind the name depends on the transformers version and on torchvision.
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_DEFAULT_MEAN,
        "image_std": IMAGENET_DEFAULT_STD,
    }
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def convert_mocov3(
    source: str | Path, folder: str | Path, *, num_heads: int | None = None, encoder: str = "base_encoder"
) -> None:
    """
    Writes the encoder of a MoCo v3 file (`.pth.tar`) to `folder` as a `ViTModel`.

    Raises:
        ValueError: The file is not as described at `mocov3_encoder`, `sizes` and `write_model`.
    """
    tensors = mocov3_encoder(torch.load(source, map_location="cpu", weights_only=True), encoder)
    config = ViTConfig(**sizes(tensors, num_heads), layer_norm_eps=1e-6)
    write_model(ViTModel, config, split_projections(tensors), folder, add_pooling_layer=False)


def convert_mae(source: str | Path, folder: str | Path, *, num_heads: int | None = None) -> None:
    """
    Writes the encoder of an MAE checkpoint to `folder` as a `BeitModel` that pools by mean.

    Args:
        source (`str` or `Path`): The authors' file (`.pth`), or a `ViTMAEModel` on the Hub or in a folder.
        folder (`str` or `Path`): Where the model goes.
        num_heads (`int`, *optional*): Heads of every attention. By default known from the width, or from the Hub.

    Raises:
        ValueError: The checkpoint is not as described at `mae_encoder`, `sizes` and `write_model`.
    """
    if Path(source).is_file():
        encoder, eps = mae_encoder(torch.load(source, map_location="cpu", weights_only=True)), 1e-6
    else:
        model = ViTMAEModel.from_pretrained(source, dtype=torch.float32)
        encoder, eps = mae_encoder_of(model), model.config.layer_norm_eps
        num_heads = num_heads or model.config.num_attention_heads
    config = BeitConfig(
        **sizes(encoder, num_heads),
        layer_norm_eps=eps,
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,
        layer_scale_init_value=0.0,
        drop_path_rate=0.0,
    )
    tensors = split_projections(encoder)
    biases = [tensors.pop(name) for name in list(tensors) if name.endswith("attention.key.bias")]
    if len(biases) != config.num_hidden_layers:
        raise ValueError(f"{config.num_hidden_layers} blocks, but biases of keys in {len(biases)}.")
    print(
        f"Left out: biases of keys, at most {max(float(bias.abs().max()) for bias in biases):.1e}; softmax does too."
    )
    tensors["pooler.layernorm.weight"] = torch.ones(config.hidden_size)
    tensors["pooler.layernorm.bias"] = torch.zeros(config.hidden_size)
    write_model(BeitModel, config, tensors, folder)


CONVERTERS: dict[str, Callable[..., None]] = {"mocov3": convert_mocov3, "mae": convert_mae}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(CONVERTERS), help="Whose checkpoint it is.")
    parser.add_argument("source", help="The file; for MAE also a model on the Hub or in a folder.")
    parser.add_argument("folder", help="Where the transformers model goes.")
    parser.add_argument("--num_heads", type=int, help="Heads of every attention. Default: known from the width.")
    parser.add_argument("--encoder", choices=ENCODERS, help="Which encoder of MoCo v3. Default: base_encoder.")
    args = parser.parse_args()
    if args.encoder is not None and args.kind != "mocov3":
        parser.error("--encoder is for mocov3.")
    which = {"encoder": args.encoder} if args.encoder is not None else {}
    CONVERTERS[args.kind](args.source, args.folder, num_heads=args.num_heads, **which)
    print(f"Wrote {args.folder}.")


if __name__ == "__main__":
    main()
