# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Measures the peak memory of a forward pass and of a training step above the built model, each in a fresh process.

    python -m benchmarks.memory                   # ViT-B/16 at 224 pixels, batches of 1 and 8, M=10, n=5

On a CPU this is the peak of the resident set (Linux), on a GPU what torch has allocated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from benchmarks.baselines import METHODS
from benchmarks.timing import (
    build_on,
    forward_pass,
    machine,
    make_batch,
    parser_of,
    training_step,
    use_smallest,
    write,
)


def measure(method: str, work: str, args: argparse.Namespace) -> float:
    """MiB that a forward pass or a training step adds to the memory of the built model."""
    model = build_on(method, args)
    batch = make_batch(args.batch_sizes[0], args.image_size, args.device)
    run = (forward_pass if work == "forward" else training_step)(model, batch, args)
    if torch.device(args.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of building the model
    run()
    peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return (peak - before) / 2**20


def in_fresh_process(method: str, work: str, batch_size: int, args: argparse.Namespace) -> float:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", method, work, "--batch_sizes", str(batch_size)]
    sizes = ("image_size", "num_visual_prompts", "num_kv_prompts", "visual_prompt_dropout")
    for name in ("backbone", *sizes, "device", "dtype"):
        command += [f"--{name}", str(getattr(args, name))]
    if args.compile:
        command.append("--compile")
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "e2vpt merged"], default=[*METHODS, "e2vpt merged"])
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args)))
        return
    if args.smoke:
        use_smallest(args)
    print(
        f"{args.backbone}, {args.image_size} px, M={args.num_visual_prompts}, n={args.num_kv_prompts}, {machine(args)}"
    )
    for size in args.batch_sizes:
        print(f"\nPeak memory in MiB, batch {size}\n\n| | forward pass | training step |\n|---|---:|---:|")
        for method in args.methods:
            works = ("forward",) if method in ("plain", "e2vpt merged") else ("forward", "step")
            peaks = {work: in_fresh_process(method, work, size, args) for work in works}
            cells = [f"{peaks[work]:.0f}" if work in peaks else "" for work in ("forward", "step")]
            print(f"| {method} | {' | '.join(cells)} |")
            write([{"method": method, "peak_mib": peaks}], args, measured="memory", batch_size=size)


if __name__ == "__main__":
    main()
