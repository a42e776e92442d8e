# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Builds the tables of the recipes from their result lines.

    for seed in 0 1 2; do
        for recipe in segmentation detection regression multi_label retrieval video; do
            python examples/recipes/$recipe.py --prune --bf16 --seed $seed --results benchmarks/results/recipes.jsonl
        done
    done
    python -m benchmarks.recipes_table benchmarks/results/recipes.jsonl [--recipe detection | --summary]

Metrics are means over the seeds, with the standard deviation in brackets; times are the least of the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from examples.json_lines import read_lines


Row = dict[str, Any]


def cell(values: list[float]) -> str:
    """Mean and, in brackets, the standard deviation over seeds."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})"


def table(rows: list[Row]) -> str:
    """The table of one recipe: a line per method, in the order of the file."""
    names = list(rows[0]["metrics"])
    lines = [
        f"| method | trained parameters | % of the model | {' | '.join(names)} | seconds | CPU seconds |",
        "|---|" + "---:|" * (len(names) + 4),
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        members = [row for row in rows if row["method"] == method]
        trained = statistics.mean(row["trained"] for row in members)
        percent = 100 * trained / members[0]["parameters"]
        numbers = " | ".join(cell([row["metrics"][name] for row in members]) for name in names)
        least = [min(row[name] for row in members) for name in ("seconds", "cpu_seconds")]
        lines.append(f"| {method} | {trained:,.0f} | {percent:.2f} | {numbers} | {least[0]:.0f} | {least[1]:.0f} |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """A line per recipe with its first metric, a column per method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [f"| recipe | metric | {' | '.join(methods)} |", "|---|---|" + "---:|" * len(methods)]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        members = [row for row in rows if row["recipe"] == recipe]
        metric = next(iter(members[0]["metrics"]))
        cells = []
        for method in methods:
            values = [row["metrics"][metric] for row in members if row["method"] == method]
            cells.append(cell(values) if values else "")
        lines.append(f"| {recipe} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def conditions(rows: list[Row]) -> str:
    """What the trainings have run on and with; several values are all named."""

    def values(name: str) -> str:
        return " or ".join(dict.fromkeys(str(row[name]) for row in rows))

    versions = " or ".join(
        dict.fromkeys(", ".join(f"{name} {number}" for name, number in row["versions"].items()) for row in rows)
    )
    seeds = sorted({row["seed"] for row in rows})
    return (
        f"{len(rows)} trainings, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; "
        f"{values('image_size')} px, {values('epochs')} epochs, batches of {values('batch_size')}, {values('dtype')}; "
        f"{values('machine')}; {versions}; {values('date')}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--recipe", help="Show this recipe only.")
    parser.add_argument("--summary", action="store_true", help="Show a line per recipe instead.")
    args = parser.parse_args()
    rows = [row for row in read_lines(args.results) if args.recipe in (None, row["recipe"])]
    if args.summary:
        print(summary(rows))
        return
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        members = [row for row in rows if row["recipe"] == recipe]
        print(f"### {recipe}\n\n{table(members)}\n\n{conditions(members)}\n")


if __name__ == "__main__":
    main()
