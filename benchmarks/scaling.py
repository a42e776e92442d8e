# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How the cost of E2VPT grows: along one axis at a time, beside the plain backbone, LoRA and inserted prompts.

    python -m benchmarks.scaling --output scaling.jsonl --figure scaling.png        # all axes, from ViT-B/16
    python -m benchmarks.scaling --axes prompts --batch_sizes 8 --rounds 5

Axes: `batch` (images), `image` (pixels), `prompts` (M, with n = M / 2), `backbone` (ViT-S, B, L and H), and `adapters`
(how many are active at once, their rows side by side, beside the plain backbone alone). All other settings are those
of the command line; the first of `--batch_sizes` counts. At every point the methods take turns. The reference of a
forward pass is the plain backbone, that of a training step LoRA. `serving.py` times batches in which every image has
its own adapter.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from benchmarks.timing import (
    Times,
    build_on,
    forward_pass,
    machine,
    make_batch,
    parser_of,
    print_ratios,
    ratios,
    records,
    take_turns,
    training_step,
    use_smallest,
    write,
)
from peft_e2vpt import E2VPTConfig


AXES: dict[str, list[Any]] = {
    "batch": [1, 4, 16],
    "image": [128, 224, 384],
    "prompts": [10, 25, 50, 100, 200],
    "backbone": ["vit-s", "vit-b", "vit-l", "vit-h"],
    "adapters": [1, 2, 4, 8],
}
SMALLEST: dict[str, list[Any]] = {"prompts": [2, 4], "adapters": [2]}
FORWARDS = ("plain", "e2vpt", "e2vpt merged", "inserted", "lora")
STEPS = ("lora", "class token", "e2vpt", "inserted")


def settings_at(axis: str, place: Any, args: argparse.Namespace) -> argparse.Namespace:
    """The command line with one setting changed, and `num_adapters`."""
    settings = {**vars(args), "num_adapters": 1}
    if axis == "prompts":
        settings.update(num_visual_prompts=place, num_kv_prompts=place // 2)
    else:
        names = {"batch": "batch_sizes", "image": "image_size", "backbone": "backbone", "adapters": "num_adapters"}
        settings[names[axis]] = [place] if axis == "batch" else place
    return argparse.Namespace(**settings)


def build_with_adapters(method: str, args: argparse.Namespace) -> nn.Module:
    """Builds the model of a method; one with E2VPT has several adapters where that is asked for, all active."""
    model = build_on(method.removesuffix(" merged"), args)
    if isinstance(model, PeftModel) and method != "lora":
        names = [f"adapter{number}" for number in range(1, args.num_adapters)]
        for name in names:
            config = E2VPTConfig(num_visual_prompts=args.num_visual_prompts, num_kv_prompts=args.num_kv_prompts)
            config.modules_to_save = []  # only one head can be active
            model.add_adapter(name, config)
        model.base_model.set_adapter(["default", *names])
        if method.endswith(" merged"):
            model.eval().merge_adapter()
    return model


def measure(axis: str, args: argparse.Namespace) -> tuple[Times, Times]:
    """The seconds of forward passes and of training steps at one point of an axis."""
    batch = make_batch(args.batch_sizes[0], args.image_size, args.device)
    warm_up = 3 if args.compile or args.device != "cpu" else 1
    names = ("plain", "e2vpt", "e2vpt merged") if axis == "adapters" else FORWARDS
    runs = {name: forward_pass(build_with_adapters(name, args), batch, args) for name in names}
    forwards = take_turns(runs, args.rounds, warm_up)
    del runs
    if axis == "adapters":  # together they answer, but one at a time is trained
        return forwards, {}
    runs = {name: training_step(build_with_adapters(name, args), batch, args) for name in STEPS}
    return forwards, take_turns(runs, args.rounds, warm_up)


def draw(points: dict[int, tuple[Times, Times]], clock: int, path: Path) -> None:
    """Draws the ratio to the plain backbone and to LoRA against M + n, for rows and for inserted prompts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    titles = ("forward pass / plain backbone", "training step / LoRA")
    for place, (axes, title, reference) in enumerate(
        zip(figure.subplots(1, 2), titles, ("plain", "lora"), strict=True)
    ):
        labels = {"e2vpt": "rows (E2VPT)", "e2vpt merged": "rows, merged", "inserted": "inserted tokens"}
        for method, label in labels.items():
            if method not in next(iter(points.values()))[place]:
                continue
            found = [ratios(times[place], method, reference, clock) for times in points.values()]
            middle = [statistics.median(values) for values in found]
            axes.plot(points.keys(), middle, marker="o", label=label)
            axes.fill_between(points.keys(), [min(v) for v in found], [max(v) for v in found], alpha=0.15)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(title=title, xlabel="M + n, prompts of an attention", ylabel=f"{('wall', 'CPU')[clock]} time, ratio")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--figure", type=Path, help="a file that gets the figure of cost against M + n")
    args = parser.parse_args()
    places = {axis: AXES[axis] for axis in args.axes}
    if args.smoke:
        use_smallest(args)
        places = SMALLEST
    print(machine(args))
    points: dict[int, tuple[Times, Times]] = {}
    for axis, values in places.items():
        for value in values:
            here = settings_at(axis, value, args)
            forwards, steps = measure(axis, here)
            about = {"axis": axis, "batch_size": here.batch_sizes[0], "num_adapters": here.num_adapters}
            print_ratios(f"Forward pass, {axis} {value}", forwards, "plain")
            write(records(forwards, "plain"), here, measured="forward", **about)
            if steps:
                print_ratios(f"Training step, {axis} {value}", steps, "lora")
                write(records(steps, "lora"), here, measured="step", **about)
            if axis == "prompts":
                points[here.num_visual_prompts + here.num_kv_prompts] = (forwards, steps)
    if args.figure is not None and points:
        clock = 0 if torch.device(args.device).type == "cuda" else 1
        draw(points, clock, args.figure)


if __name__ == "__main__":
    main()
