# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""An empty figure, from a matplotlib that is imported when the first figure is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure


VISUAL_COLOUR, KEY_VALUE_COLOUR = "tab:blue", "tab:orange"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose parts keep clear of each other; no window and no pyplot state belong to it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'peft_e2vpt[plot]'.") from error
    return Figure(figsize=(width, height), layout="constrained")


def literal(text: str) -> str:
    """A name as matplotlib draws it letter by letter: no formula between dollars, and never left out of a legend."""
    text = text.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text
