# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a method is worth without a search: one learning rate, chosen on three tasks, on the other tasks.

    python -m benchmarks.fixed_rate_table benchmarks/results/transfer.jsonl [--figure docs/rates.png]

The first table: for each method the rate of the grid with the highest mean validation accuracy on `--chosen_on`, one
task of each group, and the test accuracy with it on every other task. "lost" is what the same trainings lose against
the rate that each task would have chosen for itself on validation images. The second table is the curve behind it: the
mean test accuracy over all tasks at each rate of the grid. Seed 0, the only one for which all rates are run.

`--figure` draws that curve, for light and for dark pages. Dotted lines lead to rates at which a method was not
run on every task, since it had lost ten points of validation accuracy there at a smaller rate: such a task counts with
the last rate that was run.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.json_lines import read_lines
from peft_e2vpt.plotting import DARK
from peft_e2vpt.plotting.canvas import MARKERS, Label, colours, label_ends, new_figure, quieten


if TYPE_CHECKING:
    from matplotlib.figure import Figure


Row = dict[str, Any]
Runs = dict[float, dict[str, Row]]  # by learning rate and task


def runs_of(rows: list[Row], method: str) -> Runs:
    """The trainings of a method with seed 0."""
    runs: Runs = {}
    for row in rows:
        if row["method"] == method and row["seed"] == 0:
            runs.setdefault(row["learning_rate"], {})[row["task"]] = row
    return dict(sorted(runs.items()))


def searches(runs: Runs, tasks: list[str]) -> bool:
    """Whether a method has tried two rates or more on every task."""
    return all(sum(task in of_rate for of_rate in runs.values()) > 1 for task in tasks)


def chosen_rate(runs: Runs, tasks: list[str]) -> float:
    """The rate with the highest mean validation accuracy on some tasks, among those that were run on all of them."""
    complete = [rate for rate, of_rate in runs.items() if all(task in of_rate for task in tasks)]
    return max(complete, key=lambda rate: statistics.mean(runs[rate][task]["validation_accuracy"] for task in tasks))


def own_accuracy(runs: Runs, task: str) -> float:
    """Test accuracy at the rate that a task chooses for itself."""
    rows = [of_rate[task] for of_rate in runs.values() if task in of_rate]
    best: Row = max(rows, key=lambda row: row["validation_accuracy"])
    return 100 * float(best["test_accuracy"])


def fixed_table(rows: list[Row], methods: list[str], chosen_on: list[str], others: list[str]) -> str:
    """A line per method: its rate, and the test accuracy on tasks that had no say in it, in per cent."""
    lines = [
        f"| method | rate | {' | '.join(others)} | mean | lost to a search |",
        "|---|" + "---:|" * (len(others) + 3),
    ]
    for method in methods:
        runs = runs_of(rows, method)
        rate = chosen_rate(runs, chosen_on)
        values = [100 * runs[rate][task]["test_accuracy"] if task in runs[rate] else None for task in others]
        cells = ["not run" if value is None else f"{value:.1f}" for value in values]
        found = [value for value in values if value is not None]
        lost = statistics.mean(own_accuracy(runs, t) - v for t, v in zip(others, values, strict=True) if v is not None)
        mean = f"{statistics.mean(found):.1f}" if len(found) == len(others) else ""
        lines.append(f"| {method} | {rate:g} | {' | '.join(cells)} | {mean} | {lost:.1f} |")
    return "\n".join(lines)


def curve(runs: Runs, tasks: list[str]) -> list[tuple[float, float, bool]]:
    """Rates, mean test accuracies in per cent, and whether all tasks were run; others count with the rate before."""
    last: dict[str, float] = {}
    points = []
    for rate, of_rate in runs.items():
        last |= {task: 100 * row["test_accuracy"] for task, row in of_rate.items()}
        if all(task in last for task in tasks):
            complete = all(task in of_rate for task in tasks)
            points.append((rate, statistics.mean(last[task] for task in tasks), complete))
    return points


def curve_table(rows: list[Row], methods: list[str], tasks: list[str]) -> str:
    """A line per method: the mean test accuracy over all tasks at each rate, where all were run."""
    rates = sorted({rate for method in methods for rate in runs_of(rows, method)})
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---|" + "---:|" * len(rates)]
    for method in methods:
        values = {rate: f"{value:.1f}" for rate, value, complete in curve(runs_of(rows, method), tasks) if complete}
        lines.append(f"| {method} | {' | '.join(values.get(rate, '') for rate in rates)} |")
    return "\n".join(lines)


def plot_curves(rows: list[Row], methods: list[str], tasks: list[str]) -> Figure:
    """The mean test accuracy of every method at each rate."""
    figure = new_figure(7.5, 4)
    axes = figure.subplots()
    labels = []
    for method, colour, marker in zip(methods, colours(), MARKERS, strict=False):
        points = curve(runs_of(rows, method), tasks)
        complete = [point for point in points if point[2]]
        width = 2.5 if method == "e2vpt" else 1.2
        rates, values, _ = zip(*complete, strict=True)
        axes.plot(rates, values, color=colour, marker=marker, linewidth=width)
        if len(points) > len(complete):
            rates, values, _ = zip(*points[len(complete) - 1 :], strict=True)
            axes.plot(rates, values, color=colour, marker=marker, linewidth=width, linestyle=":", fillstyle="none")
        labels.append(Label(*points[-1][:2], method, colour))
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    quieten(axes)
    axes.set(xlabel="one learning rate for all tasks", ylabel=f"accuracy, mean of {len(tasks)} tasks (%)")
    label_ends(axes, labels)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--chosen_on", nargs="+", default=["digits", "solar", "count"])
    parser.add_argument("--figure", type=Path, help="Draw the curve into this file and, for dark pages, NAME-dark.")
    args = parser.parse_args(arguments)
    rows = read_lines(args.results)
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["method"] == "e2vpt"))
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if searches(runs_of(rows, m), tasks)]
    print(fixed_table(rows, methods, args.chosen_on, [task for task in tasks if task not in args.chosen_on]))
    print()
    print(curve_table(rows, methods, tasks))
    if args.figure is not None:
        from matplotlib import rc_context

        for suffix, style in (("", nullcontext()), ("-dark", rc_context(DARK))):
            with style:
                figure = plot_curves(rows, methods, tasks)
                figure.savefig(args.figure.with_stem(args.figure.stem + suffix), dpi=120)


if __name__ == "__main__":
    main()
