# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Times a forward pass and a training step of E2VPT beside the plain backbone, inserted prompts and LoRA.

    python benchmarks/speed.py                    # ViT-B/16 at 224 pixels, batches of 1 and 8, M=10, n=5
    python benchmarks/speed.py --num_visual_prompts 100 --batch_sizes 8

Methods take turns in every round, so that whatever else the machine does hits all of them; a table gives the median
and the spread of the ratios of the rounds. Peak memory is that of a fresh process which takes one training step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import transformers
from baselines import BACKBONES, METHODS, build
from torch import nn


def forward_pass(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A forward pass in eval mode without gradients."""

    @torch.no_grad()
    def run() -> None:
        model.eval()
        model(pixel_values=batch["pixel_values"])

    return run


def training_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward, backward and an AdamW step of what the method trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        model.train()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return run


def make_batch(size: int, image_size: int) -> dict[str, torch.Tensor]:
    """Random images and labels."""
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(size, 3, image_size, image_size), "labels": torch.randint(0, 100, (size,))}


def take_turns(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of every run in every round, after one round of warm-up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if i:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def print_ratios(title: str, seconds: dict[str, list[tuple[float, float]]], reference: str) -> None:
    """Prints, per method, the median time and its ratio to the reference: median (minimum to maximum) of rounds."""
    print(f"\n{title}, ratio to {reference}")
    print(f"{'method':>10}  {'wall ms':>8}  {'wall ratio':>20}  {'CPU ratio':>20}")
    for name, times in seconds.items():
        cells = []
        for clock in (0, 1):
            ratios = [a[clock] / b[clock] for a, b in zip(times, seconds[reference], strict=True)]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
        milliseconds = 1000 * statistics.median(wall for wall, _ in times)
        print(f"{name:>10}  {milliseconds:>8.1f}  {cells[0]:>20}  {cells[1]:>20}")


def peak_memory(method: str, batch_size: int, args: argparse.Namespace) -> float:
    """MiB that one training step adds to the memory of the built model, in a process of its own."""
    command = [sys.executable, __file__, "--memory_of", method, "--batch_sizes", str(batch_size)]
    for name in ("backbone", "image_size", "num_visual_prompts", "num_kv_prompts"):
        command += [f"--{name}", str(getattr(args, name))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1])["peak_mib"])


def measure_memory(method: str, args: argparse.Namespace) -> None:
    """Prints what `peak_memory` reads."""
    model = build(method, args.backbone, args.image_size, args.num_visual_prompts, args.num_kv_prompts)
    batch = make_batch(args.batch_sizes[0], args.image_size)
    run = forward_pass(model, batch) if method == "plain" else training_step(model, batch)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of building the model
    run()
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps({"peak_mib": (peak - before) / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit-b", choices=BACKBONES)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num_visual_prompts", type=int, default=10)
    parser.add_argument("--num_kv_prompts", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory_of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        measure_memory(args.memory_of, args)
        return
    print(
        f"{args.backbone}, {args.image_size} px, M={args.num_visual_prompts}, n={args.num_kv_prompts}, float32, "
        f"{args.rounds} rounds, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    models = {
        name: build(name, args.backbone, args.image_size, args.num_visual_prompts, args.num_kv_prompts)
        for name in METHODS
    }
    for size in args.batch_sizes:
        batch = make_batch(size, args.image_size)
        forwards = {name: forward_pass(model, batch) for name, model in models.items()}
        print_ratios(f"Forward pass, batch {size}", take_turns(forwards, args.rounds), "plain")
        steps = {name: training_step(model, batch) for name, model in models.items() if name != "plain"}
        print_ratios(f"Training step, batch {size}", take_turns(steps, args.rounds), "lora")
    size = args.batch_sizes[-1]
    print(f"\nPeak memory of a training step above the built model, batch {size} (plain: a forward pass)")
    for name in METHODS:
        print(f"{name:>10}  {peak_memory(name, size, args):>8.0f} MiB")


if __name__ == "__main__":
    main()
