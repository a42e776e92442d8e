# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What every process of the distributed test runs; a module of its own, so that the processes import little."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.support.adapted import KV_ONLY, SHALLOW, adapt, prune, trainable


WORLD_SIZE = 2
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "shallow": ("vit", SHALLOW),
    "kv_only": ("vit", KV_ONLY),
    "kv_across_layers": ("vit", {"share_kv_prompts_across_layers": True}),
    "zeroed": ("vit", {"pruned_prompts": "zero"}),
    "swin": ("swin", {}),
}
CASES = [f"{name}{suffix}" for name in SETTINGS for suffix in ("", "_pruned") if name + suffix != "kv_only_pruned"]


def model_of(case: str) -> PeftModel:
    name, settings = SETTINGS[case.removesuffix("_pruned")]
    model, _ = adapt(name, **settings)
    if case.endswith("_pruned"):
        prune(model)
    return model.train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 3, 1, 2])


def gradients_of_mean_loss(model: nn.Module, images: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    model(pixel_values=images[0], labels=images[1]).loss.backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in trainable(model)}


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD_SIZE
    )
    images, labels = batch()
    mine = slice(rank, None, WORLD_SIZE)
    for case in CASES:
        model = DistributedDataParallel(model_of(case), find_unused_parameters=False)
        for _ in range(2):  # an unused parameter is noticed in the second step
            model.zero_grad()
            found: dict[str, Any] = gradients_of_mean_loss(model, (images[mine], labels[mine]))
        found["world size"] = torch.distributed.get_world_size()
        torch.save(found, f"{folder}/{case}-{rank}.pt")
        del model  # it holds the process group, whose end would wait for threads of gloo with the lock of Python
    torch.distributed.destroy_process_group()
