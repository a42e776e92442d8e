# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Times a training step on images beside one on the hidden states that `cache_frozen_prefix` has cached.

    python -m benchmarks.frozen_prefix --batch_sizes 8 --rounds 5

E2VPT and LoRA are in the last half of the layers, and a head is trained alone. Steps on images and on hidden states
take turns. Reading and resizing images, which a cache saves too, is not part of it.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.baselines import BACKBONES
from benchmarks.timing import (
    machine,
    make_batch,
    parser_of,
    print_ratios,
    records,
    take_turns,
    training_step,
    use_smallest,
    write,
)
from peft_e2vpt import E2VPTConfig, cache_frozen_prefix


METHODS = ("e2vpt", "lora", "head alone")


def build(method: str, backbone: str, image_size: int, num_visual_prompts: int, num_kv_prompts: int) -> nn.Module:
    """A ViT that trains in the last half of its layers, or its head alone."""
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ViTConfig(**BACKBONES[backbone], image_size=image_size, num_labels=100, **rates)
    model = ViTForImageClassification(config)
    last = list(range(config.num_hidden_layers // 2, config.num_hidden_layers))
    if method == "head alone":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        return model
    if method == "lora":
        targets = ["q_proj", "v_proj"]
        lora = LoraConfig(r=8, target_modules=targets, layers_to_transform=last, modules_to_save=["classifier"])
        return get_peft_model(model, lora)
    prompts = {"num_visual_prompts": num_visual_prompts, "num_kv_prompts": num_kv_prompts}
    return get_peft_model(model, E2VPTConfig(**prompts, layers_to_transform=last))


def main() -> None:
    args = parser_of(__doc__).parse_args()
    if args.smoke:
        use_smallest(args)
    print(f"{args.backbone}, {args.image_size} px, {machine(args)}")
    for size in args.batch_sizes:
        batch = make_batch(size, args.image_size, args.device)
        items = [{name: tensor[index] for name, tensor in batch.items()} for index in range(size)]
        for method in METHODS:
            sizes = (args.backbone, args.image_size, args.num_visual_prompts, args.num_kv_prompts)
            model = build(method, *sizes).to(args.device)
            cached = cache_frozen_prefix(model, items).hidden_states.to(args.device)
            hidden: dict[str, Tensor] = {**batch, "pixel_values": cached}
            steps = {name: training_step(model, b, args) for name, b in (("images", batch), ("cached", hidden))}
            seconds = take_turns(steps, args.rounds)
            print_ratios(f"{method}, batch {size}, {list(cached.shape[1:])} numbers an image", seconds, "images")
            write(records(seconds, "images"), args, measured="step", trained=method, batch_size=size)


if __name__ == "__main__":
    main()
