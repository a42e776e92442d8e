# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The images of the recipes: the same everywhere, with masks, boxes and motion that say what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import scenes
from PIL import Image

from tests.support.optional import needs_emoji, needs_solar_cells


pytestmark = [needs_emoji, needs_solar_cells]


def test_a_scene_depends_on_its_number_only():
    first, again, other = (scenes.make_scene("train", number, side=56) for number in (3, 3, 4))
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))


@pytest.mark.parametrize("number", range(8))
def test_every_pixel_of_an_emoji_lies_in_a_box_of_its_class(number):
    side = 56
    scene = scenes.make_scene("train", number, side)
    y, x = np.mgrid[:side, :side] + 0.5
    for label, (centre_x, centre_y, width, height) in zip(scene.labels, scene.boxes * side, strict=True):
        inside = (abs(x - centre_x) < width / 2) & (abs(y - centre_y) < height / 2)
        assert (scene.mask[inside] == label + 1).any()
    seen = set(np.unique(scene.mask)) - {0}
    assert seen >= {label + 1 for label in scene.labels}


def test_emoji_and_photographs_of_the_parts_are_different_ones():
    drawn, photographs = [], []
    for part in scenes.PARTS:
        emoji, files = scenes.read_part(part)
        drawn += [one.drawings["google"].tobytes() for one in emoji]
        photographs += files
    assert len(set(drawn)) > 0.99 * len(drawn)  # two emoji may look the same
    assert len(set(photographs)) == len(photographs)


@pytest.mark.parametrize("number", range(len(scenes.MOTIONS)))
def test_a_clip_moves_and_grows_as_its_label_says(number, monkeypatch):
    side = 56
    monkeypatch.setattr(scenes, "ground", lambda *_: Image.new("RGB", (side, side)))
    clip, label = scenes.make_clip("train", number, side, frames=4)
    shift_x, shift_y, growth = list(scenes.MOTIONS.values())[label]
    covered = [np.argwhere(np.asarray(frame).any(axis=-1)) for frame in (clip[0], clip[-1])]
    (first_y, first_x), (last_y, last_x) = (points.mean(axis=0) for points in covered)
    assert np.sign(round((last_x - first_x) / side, 1)) == shift_x
    assert np.sign(round((last_y - first_y) / side, 1)) == shift_y
    assert np.sign(round(np.log(len(covered[1]) / len(covered[0])))) == np.sign(growth - 1)
