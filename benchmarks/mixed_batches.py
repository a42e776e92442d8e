# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Times one forward pass of a batch that holds many adapters beside the same batch with a single one.

    OMP_NUM_THREADS=1 python -m benchmarks.mixed_batches             # ViT-S/16 at 224 pixels, a batch of 64, M=10, n=5

Every sample has its adapter and its head, through `model(pixel_values=..., adapter_names=[...])`. "unequal" adapters
are pruned to 3 to 10 visual prompts, so that their rows are masked; "merged" ones have constants as rows. The backbone
has random weights. All take turns in every round; the reference is the active adapter, without `adapter_names`.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable

import torch
import transformers
from peft import PeftModel

from benchmarks.baselines import BACKBONES, build
from benchmarks.timing import make_batch, print_ratios, take_turns
from peft_e2vpt import E2VPTConfig
from peft_e2vpt.tuner.prompt_layers import prompt_layers


REFERENCE = "1 active"


def add_adapters(model: PeftModel, prefix: str, count: int, *, pruned: bool = False) -> list[str]:
    """Adds adapters with random prompts and heads; pruned ones keep different numbers of visual prompts."""
    active = model.peft_config["default"]
    names = [f"{prefix}{number}" for number in range(count)]
    for number, name in enumerate(names):
        config = E2VPTConfig(num_visual_prompts=active.num_visual_prompts, num_kv_prompts=active.num_kv_prompts)
        model.add_adapter(name, config)
        for layer in prompt_layers(model):
            token = torch.ones_like(layer.e2vpt_token_gates[name])
            if pruned:
                token[: number % 8] = 0
            layer.set_gates(name, token, torch.ones_like(layer.e2vpt_segment_gates[name]))
    return names


def forward_pass(model: PeftModel, pixels: torch.Tensor, names: list[str] | None) -> Callable[[], None]:
    """A forward pass; the adapters of `names` take turns from sample to sample."""
    adapter_names = None if names is None else [names[sample % len(names)] for sample in range(len(pixels))]

    @torch.no_grad()
    def run() -> None:
        model(pixel_values=pixels, adapter_names=adapter_names)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit-s", choices=BACKBONES)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_visual_prompts", type=int, default=10)
    parser.add_argument("--num_kv_prompts", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(
        f"{args.backbone}, {args.image_size} px, M={args.num_visual_prompts}, n={args.num_kv_prompts}, float32, "
        f"{args.rounds} rounds, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    model = build("e2vpt", args.backbone, args.image_size, args.num_visual_prompts, args.num_kv_prompts).eval()
    plain = add_adapters(model, "plain", args.batch_size)
    unequal = add_adapters(model, "unequal", args.batch_size, pruned=True)
    merged = add_adapters(model, "merged", args.batch_size)
    model.eval().merge_adapter(merged)
    pixels = make_batch(args.batch_size, args.image_size)["pixel_values"]
    runs = {REFERENCE: forward_pass(model, pixels, None)}
    for count in (1, 8, args.batch_size):
        runs[f"{count} mixed"] = forward_pass(model, pixels, plain[:count])
    runs[f"{args.batch_size} unequal"] = forward_pass(model, pixels, unequal)
    runs[f"{args.batch_size} merged"] = forward_pass(model, pixels, merged)
    print_ratios(f"Forward pass, batch {args.batch_size}", take_turns(runs, args.rounds), REFERENCE)


if __name__ == "__main__":
    main()
