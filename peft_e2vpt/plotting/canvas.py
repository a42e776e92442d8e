# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What all figures share: an empty one, colours on light and dark ground, markers, and labels beside what they name.

matplotlib is imported when the first figure is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox


# Colours that people tell apart whatever their colour vision (Okabe and Ito, 2008), in the order of their use
ON_LIGHT = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#6B6B6B", "#000000")
ON_DARK = ("#56B4E9", "#E69F00", "#2CC7A0", "#F0714A", "#CC79A7", "#F0E442", "#A8A8A8", "#FFFFFF")
VISUAL, KEY_VALUE, TEST, PRUNED = range(4)  # places of colours that mean something
MARKERS = "osD^vP*Xphd<>"

DARK = {
    "figure.facecolor": "#131416",
    "axes.facecolor": "#131416",
    "savefig.facecolor": "#131416",
    "text.color": "#E4E6EB",
    "axes.edgecolor": "#A9ADB5",
    "axes.labelcolor": "#E4E6EB",
    "axes.titlecolor": "#E4E6EB",
    "xtick.color": "#C9CCD2",
    "ytick.color": "#C9CCD2",
    "grid.color": "#5C6068",
    "legend.edgecolor": "#5C6068",
}
"""Settings of matplotlib for figures on dark pages, `with matplotlib.rc_context(DARK): ...`; other styles work too."""


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


# ------------------------------------------------------------------------------------------------------------ colours
def is_dark() -> bool:
    """Whether figures have a dark ground, by the settings of matplotlib."""
    from matplotlib import rcParams
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(rcParams["figure.facecolor"])
    return bool(0.3 * red + 0.59 * green + 0.11 * blue < 0.5)


def colours() -> tuple[str, ...]:
    """Eight colours for the ground that figures have."""
    return ON_DARK if is_dark() else ON_LIGHT


def ink() -> str:
    """The colour of text."""
    from matplotlib import rcParams

    return str(rcParams["text.color"])


def quiet() -> str:
    """A grey for what stands behind the rest."""
    return colours()[6]


def of_text(colour: str) -> str:
    """A colour as text can have it: on light ground light colours are darkened, which marks need not be."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = to_rgb(colour)
    if is_dark() or 0.3 * red + 0.59 * green + 0.11 * blue < 0.5:
        return colour
    return to_hex((0.65 * red, 0.65 * green, 0.65 * blue))


def amounts() -> Colormap:
    """From the colour of the ground to a full blue, for amounts from 0 on."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = ["#1d1f23", "#1f5f8b", "#8fd0f5"] if is_dark() else ["#f3f7fb", "#6aaed6", "#08407a"]
    return LinearSegmentedColormap.from_list("amounts", ends)


# ------------------------------------------------------------------------------------------------------------- labels
def quieten(axes: Axes) -> None:
    """Leaves the frame of a panel where its scales are."""
    axes.spines[["top", "right"]].set_visible(False)


class Label(NamedTuple):
    """A name for a point of a panel, in the colour of what it names."""

    x: float
    y: float
    text: str
    colour: str


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes labels to the right of a panel, each at the height of its point, and apart where points are close."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # lays the panels out
    height = axes.get_window_extent().height * 72 / figure.dpi
    step = 12 / max(height, 1)
    lowest = -1.0
    heights = {label: float(axes.transLimits.transform((label.x, label.y))[1]) for label in labels}
    for label in sorted(labels, key=heights.__getitem__):
        lowest = max(heights[label], lowest + step)
        axes.annotate(
            label.text,
            (1.01, lowest),
            xycoords="axes fraction",
            color=of_text(label.colour),
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def label_points(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes labels beside their points, where they cover no other label and no point."""
    from matplotlib.text import Text

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    taken: list[Bbox] = []
    points = [axes.transData.transform((label.x, label.y)) for label in labels]
    places = [(dx, dy, h, v) for (dy, v), (dx, h) in product(_ROWS, _COLUMNS) if (dx, dy) != (0, 0)]
    places.sort(key=lambda place: place[0] ** 2 + place[1] ** 2)
    frame = axes.get_window_extent()
    for label in labels:
        tried: list[tuple[float, int, Any, Bbox]] = []
        for dx, dy, horizontal, vertical in places:
            text = axes.annotate(
                label.text,
                (label.x, label.y),
                (dx, dy),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                color=of_text(label.colour),
                fontsize=9,
                arrowprops={"arrowstyle": "-", "color": quiet(), "linewidth": 0.7}
                if max(abs(dx), abs(dy)) > 9
                else None,
            )
            text.get_window_extent()  # puts it into its place
            box = Text.get_window_extent(text)  # without its line
            outside = max(0.0, box.x1 - frame.x1) + max(0.0, frame.x0 - box.x0) + max(0.0, box.y1 - frame.y1)
            covered = sum(box.overlaps(other) for other in taken) + sum(box.padded(3).contains(*p) for p in points)
            tried.append((covered + outside / 20, len(tried), text, box))
            if not covered and not outside:
                break
        best = min(tried, key=lambda one: one[:2])
        for one in tried:
            if one is not best:
                one[2].remove()
        taken.append(best[3])


_COLUMNS = ((9, "left"), (-9, "right"), (0, "center"), (36, "left"), (-36, "right"), (80, "left"), (-80, "right"))
_ROWS = ((0, "center"), (9, "bottom"), (-9, "top"), (26, "bottom"), (-26, "top"), (48, "bottom"), (-48, "top"))
