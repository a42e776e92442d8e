# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Emoji laid over photographs of solar cells: images whose masks, boxes, labels and motion are known exactly.

    python examples/recipes/scenes.py scenes.png        # eight scenes with boxes, two pairs and a clip, in one file

Training, validation and test use different emoji and different photographs. Each image depends on its number only.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import common  # noqa: F401  (makes the modules of examples/ importable)
import numpy as np
from emoji_images import VENDORS, emoji_groups, read_emoji
from PIL import Image, ImageDraw
from solar_cells import find_data_folder


CLASSES = {"nature": "Animals & Nature", "food": "Food & Drink", "object": "Objects", "smiley": "Smileys & Emotion"}
PARTS = {"train": (0.0, 0.6), "validation": (0.6, 0.7), "test": (0.7, 1.0)}
# shift in x and y, and growth, from the first frame of a clip to the last
MOTIONS = {
    "left": (-1, 0, 1),
    "right": (1, 0, 1),
    "up": (0, -1, 1),
    "down": (0, 1, 1),
    "nearer": (0, 0, 2),
    "farther": (0, 0, 0.5),
}


@dataclass(frozen=True)
class Scene:
    """
    Attributes:
        image: RGB.
        mask: `(side, side)`, 0 on the ground and `class + 1` on an emoji.
        labels: the class of each emoji.
        boxes: centre, width and height of what can be seen of each, as shares of the side, `(number, 4)`.
    """

    image: Image.Image
    mask: np.ndarray
    labels: list[int]
    boxes: np.ndarray


class Emoji(NamedTuple):
    """The class of an emoji, and how each vendor draws it (RGBA)."""

    label: int
    drawings: dict[str, Image.Image]


@functools.cache
def read_all() -> list[Emoji]:
    """The emoji of all four classes, in the order of the package."""
    names_of_groups = list(CLASSES.values())
    groups = {name: group for name, group in emoji_groups().items() if group in names_of_groups}
    drawn = {vendor: read_emoji(vendor, list(groups)) for vendor in VENDORS}
    return [
        Emoji(names_of_groups.index(group), {vendor: drawn[vendor][index] for vendor in VENDORS})
        for index, group in enumerate(groups.values())
    ]


@functools.cache
def read_part(part: str) -> tuple[list[Emoji], list[str]]:
    """The emoji and the files of the photographs that belong to `"train"`, `"validation"` or `"test"`."""

    def share(items: list[Any]) -> list[Any]:
        order = np.random.RandomState(0).permutation(len(items))
        start, end = (round(bound * len(items)) for bound in PARTS[part])
        return [items[index] for index in order[start:end]]

    return share(read_all()), share(sorted(map(str, (find_data_folder() / "images").glob("*.png"))))


def ground(part: str, random: np.random.RandomState, side: int) -> Image.Image:
    """A photograph of a solar cell, tinted."""
    photograph = Image.open(random.choice(read_part(part)[1])).convert("L").resize((side, side))
    tint = random.uniform(0.5, 1.0, 3)
    return Image.fromarray((np.asarray(photograph)[..., None] * tint).astype(np.uint8))


def lay(image: Image.Image, emoji: Image.Image, x: float, y: float, size: float) -> np.ndarray:
    """Draws an emoji of `size` around `(x, y)`, all in shares of the side; returns where it covers the image."""
    side = image.width
    pixels = max(round(size * side), 1)
    corner = (round(x * side - pixels / 2), round(y * side - pixels / 2))
    layer = Image.new("RGBA", image.size)
    layer.paste(emoji.resize((pixels, pixels)), corner)
    image.paste(layer, mask=layer)
    return np.asarray(layer)[..., 3] > 127


def make_scene(part: str, number: int, side: int) -> Scene:
    """One to three emoji, which may hide parts of each other."""
    random = np.random.RandomState([list(PARTS).index(part), number])
    image, mask = ground(part, random, side), np.zeros((side, side), np.int64)
    owner = np.full((side, side), -1)
    chosen = [read_part(part)[0][index] for index in random.choice(len(read_part(part)[0]), random.randint(1, 4))]
    for index, emoji in enumerate(chosen):
        size = random.uniform(0.3, 0.5)
        x, y = random.uniform(size / 2, 1 - size / 2, 2)
        covered = lay(image, emoji.drawings["google"], x, y, size)
        mask[covered], owner[covered] = emoji.label + 1, index
    seen = [index for index in range(len(chosen)) if (owner == index).mean() > 0.02]
    return Scene(image, mask, [chosen[i].label for i in seen], np.stack([box_of(owner == i) for i in seen]))


def box_of(covered: np.ndarray) -> np.ndarray:
    """The box around what is covered: centre, width and height as shares of the side."""
    y, x = np.nonzero(covered)
    left, top, right, bottom = x.min(), y.min(), x.max() + 1, y.max() + 1
    return np.array([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]) / len(covered)


def make_pair(part: str, number: int, side: int) -> tuple[Image.Image, Image.Image, int]:
    """The same emoji by two vendors on two grounds, and its class; `number` counts the emoji of the part."""
    random = np.random.RandomState([7, list(PARTS).index(part), number])
    emoji = read_part(part)[0][number]
    images = []
    for vendor in VENDORS:
        image = ground(part, random, side)
        size = random.uniform(0.6, 0.9)
        lay(image, emoji.drawings[vendor], *random.uniform(size / 2, 1 - size / 2, 2), size)
        images.append(image)
    return images[0], images[1], emoji.label


def make_clip(part: str, number: int, side: int, frames: int) -> tuple[list[Image.Image], int]:
    """The frames of an emoji that moves over a photograph, and the number of its motion."""
    random = np.random.RandomState([9, list(PARTS).index(part), number])
    label = number % len(MOTIONS)
    shift_x, shift_y, growth = list(MOTIONS.values())[label]
    still, emoji = ground(part, random, side), read_part(part)[0][random.randint(len(read_part(part)[0]))]
    size = random.uniform(0.3, 0.45)
    x, y = random.uniform(0.35, 0.65, 2)
    far = random.uniform(0.3, 0.6)
    clip = []
    for time in np.linspace(-0.5, 0.5, frames):
        image = still.copy()
        lay(image, emoji.drawings["google"], x + far * shift_x * time, y + far * shift_y * time, size * growth**time)
        clip.append(image)
    return clip, label


def main() -> None:
    side = 112
    sheet = Image.new("RGB", (8 * side, 2 * side), "white")
    for column in range(8):
        scene = make_scene("train", column, side)
        for x, y, width, height in scene.boxes * side:
            box = (x - width / 2, y - height / 2, x + width / 2 - 1, y + height / 2 - 1)
            ImageDraw.Draw(scene.image).rectangle(box, outline="yellow")
        sheet.paste(scene.image, (column * side, 0))
    others = [*make_pair("train", 0, side)[:2], *make_pair("train", 1, side)[:2], *make_clip("train", 4, side, 4)[0]]
    for column, image in enumerate(others):
        sheet.paste(image, (column * side, side))
    sheet.save(sys.argv[1])


if __name__ == "__main__":
    main()
