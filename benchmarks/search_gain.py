# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What `finetune.py --search` gains and costs on tasks of the transfer suite.

    python -m benchmarks.search_gain digits --trials 12            # searches, adds lines to the results
    python -m benchmarks.search_gain --table                       # prints them as a table

Each task is written out as folders of images, as a user has them, and `examples/finetune.py` runs twice on it: with
its usual settings, and with settings searched on the validation images. Accuracies are those of the test images,
which no search has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.transfer_tasks import TASKS
from examples.json_lines import append_line, read_lines
from examples.search import in_words


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "search.jsonl"


def write_images(task: str, folder: Path, limit: int | None) -> Path:
    """Writes a task as `SPLIT/CLASS/NUMBER.png`, of the training images the first so many."""
    *splits, names = TASKS[task].load()
    for name, split in zip(("train", "val", "test"), splits, strict=True):
        pairs = list(zip(split.images, split.labels, strict=True))
        for number, (image, label) in enumerate(pairs[:limit] if name == "train" else pairs):
            path = folder / name / names[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return folder


def finetune(images: Path, output: Path, args: argparse.Namespace, *options: object) -> float:
    """Runs the script, and returns the CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, ROOT / "examples" / "finetune.py", "--train_dir", images, "--output_dir", output]
    command += ["--image_size", 56, "--use_cpu", "--bf16", "--method", args.method, "--seed", args.seed, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(list(map(str, command)), check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(task: str, args: argparse.Namespace) -> None:
    """Trains a method on one task with its usual settings and with searched ones, and adds a line for each."""
    with tempfile.TemporaryDirectory() as scratch:
        images = write_images(task, Path(scratch) / "images", args.max_train_images)
        for trials in (0, args.trials):
            output = Path(scratch) / f"{trials}"
            seconds = finetune(images, output, args, *(["--search", trials] if trials else []))
            results = json.loads((output / "results.json").read_text())
            (row,) = results["methods"]
            line: dict[str, Any] = {"task": task, "method": args.method, "seed": args.seed, "trials": trials}
            line |= {"test_accuracy": row["accuracy"], "trained": row["trained"], "images": results["images"]}
            if trials:
                search = json.loads((output / args.method / "search.json").read_text())
                kept = ("trial", "settings", "accuracy", "state", "seconds")
                line |= {"search": search["chosen"], "all": [{n: t[n] for n in kept} for t in search["trials"]]}
            line |= {"seconds_of_training": row["seconds"], "cpu_seconds": round(seconds, 1), "image_size": 56}
            threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
            line |= {
                "date": time.strftime("%Y-%m-%d"),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads",
                "dtype": "bf16 autocast",
                "versions": {name: version(name) for name in ("torch", "transformers", "peft", "optuna")},
            }
            append_line(args.results, line)


def table(lines: list[dict[str, Any]]) -> str:
    """A row for each search, beside the usual settings."""
    usual = {(row["task"], row["method"], row["seed"]): row for row in lines if not row["trials"]}
    rows = [
        "| task | method | trials, ended early | usual settings | searched | chosen | CPU minutes, without a search |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    for row in (row for row in lines if row["trials"]):
        before = usual[row["task"], row["method"], row["seed"]]
        rows.append(
            f"| {row['task']} | {row['method']} | {row['trials']}, {row['search']['pruned']} "
            f"| {100 * before['test_accuracy']:.1f} | {100 * row['test_accuracy']:.1f} "
            f"| {in_words(row['search']['settings'])} "
            f"| {row['cpu_seconds'] / 60:.1f}, {before['cpu_seconds'] / 60:.1f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--method", default="e2vpt")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_train_images", type=int, default=300)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the lines as a table")
    args = parser.parse_args()
    if unknown := set(args.tasks) - set(TASKS):
        parser.error(f"there is no task {', '.join(sorted(unknown))}: choose from {', '.join(TASKS)}")
    for task in args.tasks:
        measure(task, args)
    if args.table:
        print(table(read_lines(args.results)))


if __name__ == "__main__":
    main()
