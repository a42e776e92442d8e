# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: the command line, the work that is timed, clocks, and how results are written."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.benchmark import timer

from benchmarks.baselines import BACKBONES, build


Times = dict[str, list[tuple[float, float]]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit-b", choices=BACKBONES)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num_visual_prompts", type=int, default=10)
    parser.add_argument("--num_kv_prompts", type=int, default=5)
    parser.add_argument("--visual_prompt_dropout", type=float, default=0.1, help="of E2VPT, drawn for every sample")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="bfloat16 is autocast")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--output", type=Path, help="a file that gets the results as JSON lines")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and one round, to see that it runs")
    return parser


def use_smallest(args: argparse.Namespace) -> None:
    """What `--smoke` means, for the arguments of `parser_of`."""
    args.backbone, args.image_size, args.batch_sizes, args.rounds = "tiny", 32, [2], 1


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What a result depends on."""
    cuda = torch.device(args.device).type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": args.dtype,
        "compile": args.compile,
    }


def build_on(method: str, args: argparse.Namespace) -> nn.Module:
    """Builds the model of a method on the device of the command line; `"e2vpt merged"` has constants as rows."""
    sizes = (args.backbone, args.image_size, args.num_visual_prompts, args.num_kv_prompts)
    model = build(method.removesuffix(" merged"), *sizes, args.visual_prompt_dropout).to(args.device)
    if method.endswith(" merged"):
        model.eval().merge_adapter()
    return model


def make_batch(size: int, image_size: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random images and labels."""
    torch.manual_seed(1)
    batch = {"pixel_values": torch.randn(size, 3, image_size, image_size), "labels": torch.randint(0, 100, (size,))}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _runner(model: nn.Module, args: argparse.Namespace) -> Callable[..., Any]:
    forward = torch.compile(model) if args.compile else model
    kind, dtype = torch.device(args.device).type, DTYPES[args.dtype]

    def run(**batch: torch.Tensor) -> Any:
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            return forward(**batch)

    return run


def forward_pass(model: nn.Module, batch: dict[str, torch.Tensor], args: argparse.Namespace) -> Callable[[], None]:
    """A forward pass in eval mode without gradients."""
    forward = _runner(model, args)

    @torch.no_grad()
    def run() -> None:
        model.eval()
        forward(pixel_values=batch["pixel_values"])

    return run


def training_step(model: nn.Module, batch: dict[str, torch.Tensor], args: argparse.Namespace) -> Callable[[], None]:
    """Forward, backward and an AdamW step of what the method trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    forward = _runner(model, args)

    def run() -> None:
        model.train()
        optimizer.zero_grad()
        forward(**batch).loss.backward()
        optimizer.step()

    return run


def _seconds(run: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds; torch's clock waits for the GPU before and after, where there is one."""
    wall, cpu = timer(), time.process_time()
    run()
    return timer() - wall, time.process_time() - cpu


def take_turns(runs: dict[str, Callable[[], None]], rounds: int, warm_up: int = 1) -> Times:
    """Wall and CPU seconds of every run in every round, after rounds of warm-up."""
    seconds: Times = {name: [] for name in runs}
    for number in range(rounds + warm_up):
        for name, run in runs.items():
            times = _seconds(run)
            if number >= warm_up:
                seconds[name].append(times)
    return seconds


def ratios(seconds: Times, name: str, reference: str, clock: int) -> list[float]:
    """The ratios of the rounds of a run to those of the reference; clock 0 is wall, 1 is CPU."""
    return [a[clock] / b[clock] for a, b in zip(seconds[name], seconds[reference], strict=True)]


def print_ratios(title: str, seconds: Times, reference: str) -> None:
    """Prints a Markdown table: per run its median time, and its ratio to the reference: median (least to most)."""
    print(f"\n{title}, ratio to {reference}\n\n| | wall ms | wall ratio | CPU ratio |\n|---|---:|---:|---:|")
    for name, times in seconds.items():
        cells = []
        for clock in (0, 1):
            found = ratios(seconds, name, reference, clock)
            cells.append(f"{statistics.median(found):.3f} ({min(found):.2f} to {max(found):.2f})")
        print(f"| {name} | {1000 * statistics.median(wall for wall, _ in times):.1f} | {' | '.join(cells)} |")


def records(seconds: Times, reference: str) -> list[dict[str, Any]]:
    """The same as results: per run the wall milliseconds and the ratios, each as median, least and most."""
    results = []
    for name, times in seconds.items():
        result: dict[str, Any] = {"method": name, "reference": reference}
        for key, values in (
            ("wall_ms", [1000 * wall for wall, _ in times]),
            ("wall_ratio", ratios(seconds, name, reference, 0)),
            ("cpu_ratio", ratios(seconds, name, reference, 1)),
        ):
            result[key] = [statistics.median(values), min(values), max(values)]
        results.append(result)
    return results


def write(results: list[dict[str, Any]], args: argparse.Namespace, **about: Any) -> None:
    """Appends results to the output file, each with what it depends on."""
    if args.output is None:
        return
    names = ("backbone", "image_size", "num_visual_prompts", "num_kv_prompts", "visual_prompt_dropout")
    setting = {name: getattr(args, name) for name in names}
    with args.output.open("a") as file:
        for result in results:
            file.write(json.dumps({**machine(args), **setting, **about, **result}) + "\n")
