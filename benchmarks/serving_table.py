# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Builds the tables of `benchmarks.serving` and `benchmarks.eight_bit` from their result lines.

    python -m benchmarks.serving_table benchmarks/results/serving.jsonl benchmarks/results/eight_bit.jsonl

Ratios are medians over the rounds of a run, in brackets the least and the most; those of batches are of CPU time
(`--wall` for wall time), because other programs on a shared machine take their turns between the rounds too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.json_lines import read_lines


Row = dict[str, Any]
COLUMNS = ("same_label", "same_label_alone", "test_accuracy", "trained_on_rounded", "refitted")


def of_kind(rows: list[Row], measured: str) -> list[Row]:
    """The lines of one kind of measurement."""
    return [row for row in rows if row["measured"] == measured]


def table_of_batches(rows: list[Row], size: int, clock: str = "cpu_ratio") -> str:
    """A line per method, a column per number of adapters, for one batch size."""
    members = [row for row in rows if row["batch_size"] == size]
    counts = sorted({row["num_adapters"] for row in members})
    heads = [f"{count} adapter{'s' if count > 1 else ''}" for count in counts]
    lines = [f"| batch of {size} | {' | '.join(heads)} |", "|---|" + "---:|" * len(counts)]
    for method in dict.fromkeys(row["method"] for row in members):
        cells = []
        for count in counts:
            found = [row[clock] for row in members if (row["method"], row["num_adapters"]) == (method, count)]
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*found[-1]) if found else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_memory(rows: list[Row]) -> str:
    """A line per method: what the backbone takes, what an adapter takes, and how long it takes to add one."""
    lines = ["| | backbone, MB | one more adapter, kB | to add one, ms |", "|---|---:|---:|---:|"]
    for row in rows:
        took = "" if row["add_ms"] is None else f"{row['add_ms']:.1f}"
        adapter = f"{row['adapter_bytes'] / 1e3:,.0f}" if row["adapter_bytes"] else ""
        backbone = f"{row['backbone_bytes'] / 1e6:.1f}" if row["backbone_bytes"] else ""
        lines.append(f"| {row['method']} | {backbone} | {adapter} | {took} |")
    return "\n".join(lines)


def tables_of_eight_bit(rows: list[Row]) -> str:
    """Speed and size of the graphs, then their labels and accuracies for every task."""
    lines = [
        "| graph | MB | " + " | ".join(f"times as fast, batch of {s}" for s in (1, 32)) + " |",
        "|---|---:|---:|---:|",
    ]
    timed = [row for row in rows if "batch_size" in row]
    for graph in dict.fromkeys(row["graph"] for row in timed):
        members = {row["batch_size"]: row for row in timed if row["graph"] == graph}
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*members[size]["times_as_fast"]) for size in (1, 32)]
        lines.append(f"| {graph} | {members[1]['megabytes']:.1f} | {' | '.join(cells)} |")
    columns = (
        "same label as float",
        "same label alone as in a batch",
        "accuracy",
        "accuracy, trained on 8-bit weights",
        "accuracy, head refitted",
    )
    lines += ["", f"| task | graph | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for row in (row for row in rows if "task" in row):
        numbers = " | ".join(f"{100 * row[name]:.1f} %" for name in COLUMNS)
        lines.append(f"| {row['task']} | {row['graph']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--wall", action="store_true", help="ratios of wall time")
    args = parser.parse_args()
    rows = [row for path in args.results for row in read_lines(path)]
    clock = "wall_ratio" if args.wall else "cpu_ratio"
    batches = of_kind(rows, "batch")
    parts = [table_of_batches(batches, size, clock) for size in sorted({row["batch_size"] for row in batches})]
    if memory := of_kind(rows, "memory"):
        memory = list({row["method"]: row for row in sorted(memory, key=lambda row: row["num_adapters"])}.values())
        parts.append(table_of_memory(memory))
    if eight_bit := of_kind(rows, "eight_bit"):
        parts.append(tables_of_eight_bit(eight_bit))
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
