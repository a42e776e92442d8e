# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The tasks of the small transfer suite: three groups as in VTAB-1k, images from packages or drawn here.

    python -m benchmarks.transfer_tasks tasks.png        # how the images look

| task | group | images | licence | install |
|---|---|---|---|---|
| digits | natural | handwritten digits, 8x8 | BSD | `pip install scikit-learn` |
| fashion | natural | Fashion-MNIST, 28x28 | MIT | `apt install dataset-fashion-mnist` (Debian) |
| emoji | natural | emoji in 8 groups, drawn by two vendors | Apache-2.0, CC-BY-4.0 | npm, automatically |
| solar | specialised | photographs of solar cells | CC-BY-NC-SA-4.0 | `pip install elpv-dataset` |
| textile | specialised | weave: nominal, local or global defect | MIT | `pip install conformal-clip-data` |
| count | structured | 1 to 6 discs | drawn | |
| orientation | structured | an arrow in 8 directions | drawn | |
| x_position | structured | a square in 8 columns, among discs | drawn | |
| distance | structured | two discs, 6 distances | drawn | |

Every task has 800 images to train on, 200 to choose the learning rate on, and at most 1,000 of the rest to test on.
The split is fixed. Emoji are learned as Google draws them, and tested on others as Twitter does. No image is in this
repository.
"""

from __future__ import annotations

import gzip
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_LABELS = "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
SIZES = (800, 200, 1000)

Images = list[Image.Image]


@dataclass(frozen=True)
class Split:
    """Images (RGB) and their classes, numbers from 0."""

    images: Images
    labels: list[int]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        group: `"natural"`, `"specialised"` or `"structured"`.
        load: reads or draws its images: training, validation, test, and the names of the classes.
    """

    group: str
    load: Callable[[], tuple[Split, Split, Split, list[str]]]


def deal(images: Images, labels: list[int]) -> tuple[Split, Split, Split]:
    """Shuffles with a fixed seed, and deals out training, validation and test images."""
    order = np.random.RandomState(0).permutation(len(labels))
    bounds = np.cumsum((0, *SIZES))
    parts = [order[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    train, validation, test = (Split([images[i] for i in p], [labels[i] for i in p]) for p in parts)
    return train, validation, test


def package_folder(package: str, folder: str) -> Path:
    """A folder of an installed package, which is not imported."""
    try:
        return Path(str(distribution(package).locate_file(folder)))
    except PackageNotFoundError:
        raise ImportError(f"The images come with the package `{package}`: pip install {package}") from None


def load_digits() -> tuple[Split, Split, Split, list[str]]:
    """Handwritten digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Image.fromarray((image * 255 / 16).astype(np.uint8)).convert("RGB") for image in digits.images]
    return *deal(images, digits.target.tolist()), [str(digit) for digit in range(10)]


def load_fashion() -> tuple[Split, Split, Split, list[str]]:
    """Clothes: training and validation images from the training set, test images from the test set."""
    if not FASHION_FOLDER.is_dir():
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {FASHION_FOLDER}: `apt install dataset-fashion-mnist` (Debian), or put the four "
            "`*-ubyte.gz` files there."
        )

    def read(name: str, count: int) -> tuple[Images, list[int]]:
        images = np.frombuffer(gzip.open(FASHION_FOLDER / f"{name}-images-idx3-ubyte.gz").read(), np.uint8, offset=16)
        labels = np.frombuffer(gzip.open(FASHION_FOLDER / f"{name}-labels-idx1-ubyte.gz").read(), np.uint8, offset=8)
        order = np.random.RandomState(0).permutation(len(labels))[:count]
        return [Image.fromarray(images.reshape(-1, 28, 28)[i]).convert("RGB") for i in order], labels[order].tolist()

    images, labels = read("train", SIZES[0] + SIZES[1])
    test = Split(*read("t10k", SIZES[2]))
    return *deal(images, labels)[:2], test, FASHION_LABELS


def load_emoji() -> tuple[Split, Split, Split, list[str]]:
    """Emoji of one code point, without flags; those to test on are others, and drawn by another vendor."""
    from examples.emoji_images import emoji_groups, read_emoji

    group_of = emoji_groups()
    groups = sorted(set(group_of.values()))
    labels = [groups.index(group) for group in group_of.values()]
    train, validation, _ = deal(on_white(read_emoji("google", list(group_of))), labels)
    test = deal(on_white(read_emoji("twitter", list(group_of))), labels)[2]
    return train, validation, test, groups


def on_white(drawings: Images) -> Images:
    """Lays drawings with transparency on white."""
    white = Image.new("RGBA", drawings[0].size, "white")
    return [Image.alpha_composite(white, drawing).convert("RGB") for drawing in drawings]


def load_solar() -> tuple[Split, Split, Split, list[str]]:
    """Solar cells, as many functional as defective ones."""
    from examples.solar_cells import LABELS, find_data_folder, read_cells, split_cells

    dealt = split_cells(read_cells(find_data_folder()), seed=0)
    cells = [cell for part in dealt.values() for cell in part]
    images = [Image.open(cell["image"]).convert("RGB") for cell in cells]
    return *deal(images, [LABELS.index(cell["label"]) for cell in cells]), LABELS


def load_textile() -> tuple[Split, Split, Split, list[str]]:
    """Weave without defect, with a local or with a global one."""
    folder = package_folder("conformal-clip-data", "conformal_clip_data/data/textile_images/simulated")
    names = ["nominal", "local", "global"]
    images, labels = [], []
    for label, name in enumerate(names):
        for file in sorted((folder / name).glob("*.jp*g")):
            images.append(Image.open(file).convert("RGB"))
            labels.append(label)
    return *deal(images, labels), names


class Canvas:
    """A noisy ground to draw on, finer than the image it gives; positions and sizes are parts of its side."""

    side = 64
    finer = 4

    def __init__(self, random: np.random.RandomState) -> None:
        self.random = random
        self.dark = bool(random.rand() < 0.5)
        self.image = Image.new("RGB", (self.side * self.finer,) * 2, self.colour(ground=True))
        self.draw = ImageDraw.Draw(self.image)

    def colour(self, ground: bool = False) -> tuple[int, int, int]:
        """A random colour of the ground, or one that stands out from it."""
        low, high = (0, 90) if self.dark == ground else (150, 256)
        red, green, blue = self.random.randint(low, high, 3)
        return int(red), int(green), int(blue)

    def polygon(self, points: list[tuple[float, float]]) -> None:
        """Fills a polygon."""
        scale = self.side * self.finer
        self.draw.polygon([(x * scale, y * scale) for x, y in points], fill=self.colour())

    def disc(self, x: float, y: float, radius: float) -> None:
        """Fills a disc."""
        scale = self.side * self.finer
        self.draw.ellipse([scale * v for v in (x - radius, y - radius, x + radius, y + radius)], fill=self.colour())

    def finished(self) -> Image.Image:
        """The image, with noise."""
        image = np.asarray(self.image.resize((self.side, self.side), Image.Resampling.BOX), float)
        noisy = image + self.random.normal(0, 12, image.shape)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def scatter(random: np.random.RandomState, count: int, gap: float) -> list[tuple[float, float]]:
    """Random points, at least `gap` apart and from the border half of that."""
    points: list[tuple[float, float]] = []
    while len(points) < count:
        x, y = random.uniform(gap / 2, 1 - gap / 2, 2)
        if all(math.dist((x, y), other) > gap for other in points):
            points.append((x, y))
    return points


def draw_count(canvas: Canvas, label: int) -> None:
    """So many discs, plus one."""
    for x, y in scatter(canvas.random, label + 1, gap=0.27):
        canvas.disc(x, y, canvas.random.uniform(0.07, 0.12))


def draw_orientation(canvas: Canvas, label: int) -> None:
    """An arrow that points in one of eight directions, up to 12 degrees off."""
    angle = 2 * math.pi * (label + canvas.random.uniform(-0.27, 0.27)) / 8
    x, y = canvas.random.uniform(0.35, 0.65, 2)
    size = canvas.random.uniform(0.22, 0.32)
    corners = [(1.0, 0.0), (0.1, 0.6), (0.1, 0.2), (-1.0, 0.2), (-1.0, -0.2), (0.1, -0.2), (0.1, -0.6)]
    cosine, sine = size * math.cos(angle), size * math.sin(angle)
    canvas.polygon([(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in corners])


def draw_x_position(canvas: Canvas, label: int) -> None:
    """A square in one of eight columns, among three discs."""
    x = 0.1 + 0.8 * (label + canvas.random.uniform(0.1, 0.9)) / 8
    y, half = canvas.random.uniform(0.1, 0.9), canvas.random.uniform(0.06, 0.1)
    for disc_x, disc_y in canvas.random.uniform(0.1, 0.9, (3, 2)):
        if math.dist((x, y), (disc_x, disc_y)) > 0.25:
            canvas.disc(disc_x, disc_y, canvas.random.uniform(0.05, 0.1))
    canvas.polygon([(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)])


def draw_distance(canvas: Canvas, label: int) -> None:
    """Two discs, a sixth of the side or more apart."""
    distance = 0.2 + 0.6 * (label + canvas.random.uniform(0.1, 0.9)) / 6
    while True:
        x, y = canvas.random.uniform(0.1, 0.9, 2)
        angle = canvas.random.uniform(0, 2 * math.pi)
        far_x, far_y = x + distance * math.cos(angle), y + distance * math.sin(angle)
        if 0.1 < far_x < 0.9 and 0.1 < far_y < 0.9:
            break
    for position in ((x, y), (far_x, far_y)):
        canvas.disc(*position, canvas.random.uniform(0.06, 0.09))


def drawn(draw: Callable[[Canvas, int], None], names: list[str]) -> Task:
    """A task whose images are drawn, equally many of every class; the same ones on every machine."""

    def load() -> tuple[Split, Split, Split, list[str]]:
        random = np.random.RandomState(0)
        images, labels = [], []
        for index in range(sum(SIZES)):
            canvas = Canvas(random)
            draw(canvas, index % len(names))
            images.append(canvas.finished())
            labels.append(index % len(names))
        return *deal(images, labels), names

    return Task("structured", load)


TASKS = {
    "digits": Task("natural", load_digits),
    "fashion": Task("natural", load_fashion),
    "emoji": Task("natural", load_emoji),
    "solar": Task("specialised", load_solar),
    "textile": Task("specialised", load_textile),
    "count": drawn(draw_count, [str(count) for count in range(1, 7)]),
    "orientation": drawn(draw_orientation, [f"{45 * step} degrees" for step in range(8)]),
    "x_position": drawn(draw_x_position, [f"column {column}" for column in range(8)]),
    "distance": drawn(draw_distance, [f"distance {step}" for step in range(6)]),
}


def main() -> None:
    """Writes eight training images of every task into one file."""
    side = 96
    sheet = Image.new("RGB", (8 * side, len(TASKS) * side), "white")
    for row, (name, task) in enumerate(TASKS.items()):
        train, validation, test, names = task.load()
        print(f"{name:>12}: {[len(part.labels) for part in (train, validation, test)]}, {len(names)} classes: {names}")
        for column in range(8):
            sheet.paste(train.images[column].resize((side, side)), (column * side, row * side))
    sheet.save(sys.argv[1])


if __name__ == "__main__":
    main()
