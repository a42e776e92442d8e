# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Builds the tables of the transfer suite from its result lines, and an image: accuracy against trained parameters.

    python -m benchmarks.transfer_table outputs/transfer.jsonl [--methods linear e2vpt] [--figure transfer.png]
    python -m benchmarks.transfer_table outputs/transfer.jsonl --reference e2vpt         # differences, for ablations

Accuracies are per cent on test images: mean over the seeds, each with the learning rate that was best on validation
images with seed 0. A method is in the means of groups and tasks only where it has run on every task of the table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.transfer import chosen_rate, read_lines
from peft_e2vpt.plotting import plot_methods


Row = dict[str, Any]
GROUPS = ("natural", "specialised", "structured")


def chosen_rows(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The lines that count, per task and method: one per seed, with the rate chosen on validation with seed 0."""
    of_cell: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        of_cell.setdefault((row["task"], row["method"]), []).append(row)
    chosen = {}
    for cell, members in of_cell.items():
        first = [row for row in members if row["seed"] == 0]
        if first:
            rate = chosen_rate(first)
            chosen[cell] = [row for row in members if row["learning_rate"] == rate]
    return chosen


def mean_accuracy(rows: Sequence[Row]) -> float:
    """Mean test accuracy in per cent."""
    return 100 * statistics.mean(row["test_accuracy"] for row in rows)


def cell(rows: Sequence[Row] | None) -> str:
    """Mean and, in brackets, the standard deviation over seeds."""
    if not rows:
        return ""
    if len(rows) == 1:
        return f"{mean_accuracy(rows):.1f} (one seed)"
    return f"{mean_accuracy(rows):.1f} ({statistics.stdev(100 * row['test_accuracy'] for row in rows):.1f})"


def table_of_tasks(chosen: dict[tuple[str, str], list[Row]], tasks: list[str], methods: list[str]) -> str:
    """A line per method, a column per task."""
    lines = ["| method | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    for method in methods:
        lines.append(f"| {method} | " + " | ".join(cell(chosen.get((task, method))) for task in tasks) + " |")
    return "\n".join(lines)


def summaries(chosen: dict[tuple[str, str], list[Row]], tasks: list[str], methods: list[str]) -> dict[str, Row]:
    """Means of the methods that have run on all tasks: per group, of groups, of tasks; trained %, CPU seconds."""
    found: dict[str, Row] = {}
    for method in methods:
        if any((task, method) not in chosen for task in tasks):
            continue
        of_task = {task: mean_accuracy(chosen[task, method]) for task in tasks}
        rows = [row for task in tasks for row in chosen[task, method]]
        groups = {
            group: statistics.mean(of_task[task] for task in tasks if chosen[task, method][0]["group"] == group)
            for group in GROUPS
            if any(chosen[task, method][0]["group"] == group for task in tasks)
        }
        found[method] = {
            "groups": groups,
            "mean_of_groups": statistics.mean(groups.values()),
            "mean_of_tasks": statistics.mean(of_task.values()),
            "trained": statistics.mean(row["trained"] for row in rows),
            "percent": statistics.mean(100 * row["trained"] / row["parameters"] for row in rows),
            "cpu_seconds": statistics.mean(row["cpu_seconds"] for row in rows),
        }
    return found


def table_of_means(found: dict[str, Row]) -> str:
    """A line per method."""
    groups = list(next(iter(found.values()))["groups"])
    lines = [
        f"| method | {' | '.join(groups)} | mean of groups | mean of tasks | trained | % of the model | CPU seconds |",
        "|---|" + "---:|" * (len(groups) + 5),
    ]
    for method, row in found.items():
        means = [*row["groups"].values(), row["mean_of_groups"], row["mean_of_tasks"]]
        lines.append(
            f"| {method} | {' | '.join(f'{mean:.1f}' for mean in means)} | {row['trained']:,.0f} "
            f"| {row['percent']:.2f} | {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def difference_of_groups(
    chosen: dict[tuple[str, str], list[Row]], tasks: list[str], first: str, second: str
) -> str | None:
    """By how much the mean of groups of two methods differs on every seed that both have run on all tasks."""

    gaps = []
    for seed in sorted({row["seed"] for rows in chosen.values() for row in rows}):
        of_seed = {cell: part for cell, rows in chosen.items() if (part := [r for r in rows if r["seed"] == seed])}
        found = summaries(of_seed, tasks, [first, second])
        if len(found) == 2:
            gaps.append(found[first]["mean_of_groups"] - found[second]["mean_of_groups"])
    if len(gaps) < 2:
        return None
    return (
        f"{first} minus {second}: {statistics.mean(gaps):+.1f} points of the mean of groups "
        f"(by seed {', '.join(f'{gap:+.1f}' for gap in gaps)})"
    )


def difference(chosen: dict[tuple[str, str], list[Row]], tasks: list[str], first: str, second: str) -> str | None:
    """The mean difference of two methods over the tasks that both have run, and its standard error over the tasks."""
    both = [task for task in tasks if (task, first) in chosen and (task, second) in chosen]
    if len(both) < 2:
        return None
    gaps = [mean_accuracy(chosen[task, first]) - mean_accuracy(chosen[task, second]) for task in both]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    ahead = sum(gap > 0 for gap in gaps)
    return (
        f"{first} minus {second}: {statistics.mean(gaps):+.1f} points "
        f"(standard error over {len(both)} tasks {error:.1f}; ahead on {ahead})"
    )


def table_of_changes(
    chosen: dict[tuple[str, str], list[Row]], tasks: list[str], methods: list[str], reference: str
) -> str:
    """A line per method: its points above the reference over the seeds that both have run, per task and on average."""
    shown = [task for task in tasks if any((task, method) in chosen for method in methods if method != reference)]
    lines = [f"| minus {reference} | " + " | ".join(shown) + " | mean | standard error |"]
    lines.append("|---|" + "---:|" * (len(shown) + 2))
    for method in methods:
        if method == reference:
            continue
        changes = {task: change(chosen.get((task, method)), chosen.get((task, reference))) for task in shown}
        known = [value for value in changes.values() if value is not None]
        if not known:
            continue
        error = f"{statistics.stdev(known) / len(known) ** 0.5:.1f}" if len(known) > 1 else ""
        cells = ["" if value is None else f"{value:+.1f}" for value in changes.values()]
        lines.append(f"| {method} | {' | '.join(cells)} | {statistics.mean(known):+.1f} | {error} |")
    return "\n".join(lines)


def change(rows: list[Row] | None, reference: list[Row] | None) -> float | None:
    """The mean difference of test accuracies in points over the seeds that both have run."""
    accuracies = [{row["seed"]: 100 * row["test_accuracy"] for row in part or []} for part in (rows, reference)]
    seeds = set(accuracies[0]) & set(accuracies[1])
    return statistics.mean(accuracies[0][seed] - accuracies[1][seed] for seed in seeds) if seeds else None


def chosen_rates(chosen: dict[tuple[str, str], list[Row]], rows: list[Row]) -> list[str]:
    """Says how often each method chose each learning rate of its grid."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        grid = sorted({row["learning_rate"] for row in rows if row["method"] == method})
        rates = [members[0]["learning_rate"] for (_, name), members in chosen.items() if name == method]
        counts = ", ".join(f"{rate:g}: {rates.count(rate)}" for rate in grid)
        lines.append(f"{method}: {counts}")
    return lines


def conditions(rows: list[Row]) -> str:
    """What the trainings have run on and with, in a sentence; several values are all named."""

    def values(name: str) -> str:
        return " or ".join(dict.fromkeys(str(row[name]) for row in rows))

    versions = " or ".join(
        dict.fromkeys(", ".join(f"{name} {number}" for name, number in row["versions"].items()) for row in rows)
    )
    dates = sorted({row["date"] for row in rows})
    return (
        f"{len(rows)} trainings, {len({row['seed'] for row in rows})} seeds, {values('image_size')} px, "
        f"{values('epochs')} epochs, batches of {values('batch_size')}, {values('dtype')}; {values('machine')}; "
        f"{versions}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--figure", type=Path, help="Write the figure to this file.")
    parser.add_argument("--methods", nargs="+", help="Methods to show. Default: all.")
    parser.add_argument("--reference", help="Show the differences to this method, seed by seed, and nothing else.")
    parser.add_argument("--against", nargs="+", default=["vpt-deep", "full", "linear", "lora"])
    args = parser.parse_args()
    rows = [row for row in read_lines(args.results) if args.methods is None or row["method"] in args.methods]
    if not rows:
        raise SystemExit(f"{args.results} has no results: run `python -m benchmarks.transfer` first.")
    chosen = chosen_rows(rows)
    tasks, methods = (list(dict.fromkeys(key[i] for key in chosen)) for i in (0, 1))
    if args.methods:
        methods.sort(key=args.methods.index)
    tasks.sort(key=lambda task: GROUPS.index(next(row["group"] for row in rows if row["task"] == task)))
    print(conditions(rows), end="\n\n")
    if args.reference:
        print(table_of_changes(chosen, tasks, methods, args.reference))
        return
    print(table_of_tasks(chosen, tasks, methods), end="\n\n")
    found = summaries(chosen, tasks, methods)
    if found:
        print(table_of_means(found), end="\n\n")
        if args.figure:
            drawn = [{"method": name, **row, "accuracy": row["mean_of_groups"] / 100} for name, row in found.items()]
            plot_methods(drawn).savefig(args.figure, dpi=120)
    for first in (method for method in methods if method.startswith("e2vpt")):
        for second in (method for method in args.against if method != first):
            for line in (difference(chosen, tasks, first, second), difference_of_groups(chosen, tasks, first, second)):
                if line:
                    print(f"* {line}")
    print("\nLearning rates chosen (times):\n" + "\n".join(f"* {line}" for line in chosen_rates(chosen, rows)))


if __name__ == "__main__":
    main()
