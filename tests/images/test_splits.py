# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Labelled images in splits, every one read before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


pytest.importorskip("datasets")

from peft_e2vpt.images import check_images, load_images, load_splits  # noqa: E402
from tests.support.own_images import draw_images  # noqa: E402


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return draw_images(tmp_path / "images", 10)


def counts(splits) -> dict[str, list[int]]:
    return {name: [dataset["label"].count(label) for label in (0, 1)] for name, dataset in splits.items()}


# ------------------------------------------------------------------------------------------------------------- loading
def test_without_validation_images_the_same_share_of_every_class_is_set_aside(images):
    splits, notes = load_splits(str(images), validation_share=0.2)
    assert counts(splits) == {"train": [8, 8], "validation": [2, 2]} and notes == []
    assert splits["train"].features["label"].names == ["bright", "dark"]
    files = [{image.filename for image in dataset["image"]} for dataset in splits.values()]
    assert not files[0] & files[1] and len(files[0] | files[1]) == 20


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_however_small_or_large_leaves_an_image_of_every_class_on_both_sides(images, share):
    assert all(min(of_class) >= 1 for of_class in counts(load_splits(str(images), validation_share=share)[0]).values())


def test_a_seed_chooses_the_validation_images(images):
    def chosen(seed: int) -> list[str]:
        return [image.filename for image in load_splits(str(images), seed=seed).splits["validation"]["image"]]

    assert chosen(0) == chosen(0) != chosen(1)


def test_a_class_of_one_image_needs_validation_images_of_its_own(images, tmp_path):
    for index in range(1, 10):
        (images / "dark" / f"{index}.png").unlink()
    with pytest.raises(ValueError, match="The class dark has one image alone, so none is left to validate with"):
        load_splits(str(images))
    further = draw_images(tmp_path / "further", 3)
    assert counts(load_splits(str(images), validation=str(further)).splits) == {"train": [10, 1], "validation": [3, 3]}


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, 15.0])
def test_a_share_lies_between_0_and_1(images, share):
    with pytest.raises(ValueError, match="for validation lies between 0 and 1"):
        load_splits(str(images), validation_share=share)


@pytest.mark.parametrize("name", ["images [1]", "my images", "*?", "{a,b}", "ünï"])
def test_any_name_of_a_folder_does_for_script_and_command(images, tmp_path, name):
    place = images.rename(tmp_path / name)
    assert counts(load_splits(str(place), validation_share=0.5).splits)["train"] == [5, 5]

    def processor(images, return_tensors):
        import torch

        return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}

    assert sum(len(batch["labels"]) for batch in load_images(str(place), None, processor).training) == 16


def test_a_folder_with_splits_is_read_with_its_splits(images, tmp_path):
    root = tmp_path / "all"
    for split in ("Train", "valid", "TEST"):
        shutil.copytree(images, root / split)
    assert counts(load_splits(str(root)).splits) == {name: [10, 10] for name in ("train", "validation", "test")}


def test_a_folder_with_a_table_of_its_images_is_left_to_datasets(images):
    files = sorted(path.relative_to(images) for path in images.rglob("*.png"))
    rows = [f"{file},{number}" for number, file in enumerate(files)]
    (images / "metadata.csv").write_text("\n".join(["file_name,number", *rows]))
    with pytest.raises(ValueError, match="has no ClassLabel column, only image, number"):
        load_splits(str(images))


@pytest.mark.parametrize(
    ("name", "message"),
    [("none/of/these", "The images none/of/these cannot be loaded"), ("empty", "empty holds no images")],
)
def test_what_cannot_be_loaded_is_one_sentence(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message) as error:
        load_splits(name)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ every image is read
def test_bad_images_are_all_named_with_the_reason(images):
    (images / "dark" / "3.png").write_bytes(b"")
    whole = (images / "bright" / "4.png").read_bytes()
    (images / "bright" / "4.png").write_bytes(whole[:700])
    with pytest.raises(ValueError) as error:
        check_images(load_splits(str(images)).splits)
    first, *named = str(error.value).splitlines()
    assert first.startswith("2 of 20 images cannot be read: replace or remove them, or leave them out with skip_bad")
    assert {line.strip() for line in named} == {
        f"{images}/dark/3.png is empty (0 bytes)",
        f"{images}/bright/4.png is damaged (image file is truncated)",
    }


def test_of_very_many_bad_images_twenty_are_named(tmp_path):
    images = draw_images(tmp_path / "images", 15)
    for path in images.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"30 of 30 images cannot be read") as error:
        check_images(load_splits(str(images)).splits)
    assert len(str(error.value).splitlines()) == 22 and str(error.value).endswith("and 10 more")


def test_bad_images_can_be_left_out(images):
    (images / "dark" / "3.png").write_bytes(b"")
    checked = check_images(load_splits(str(images)).splits, skip_bad_images=True)
    assert sum(map(sum, counts(checked.splits).values())) == 19
    assert "1 of 20 images cannot be read and are left out" in checked.notes[0] and "dark/3.png" in checked.notes[0]


def test_a_class_without_good_images_is_an_error(images, tmp_path):
    for path in (images / "dark").iterdir():
        path.write_bytes(b"")
    validation = draw_images(tmp_path / "further", 2)
    with pytest.raises(ValueError, match="Without the bad images no training image of the class dark is left"):
        check_images(load_splits(str(images), validation=str(validation)).splits, skip_bad_images=True)


def test_images_of_a_dataset_without_files_are_named_by_their_number(images):
    import datasets

    splits = load_splits(str(images)).splits
    features = splits["train"].features
    rows = [{"image": {"path": None, "bytes": b"no image"}, "label": 0}, {"image": None, "label": 1}]
    splits["validation"] = datasets.Dataset.from_list(rows, features=features)
    with pytest.raises(ValueError) as error:
        check_images(splits)
    assert "Image 0 of validation is no image\n  Image 1 of validation is missing" in str(error.value)


def test_images_that_are_in_two_splits_are_noted(images, tmp_path):
    further = draw_images(tmp_path / "further", 4, seed=1)
    shutil.copy(images / "dark" / "0.png", further / "dark" / "copy.png")
    assert check_images(load_splits(str(images), validation=str(further)).splits).notes == [
        "1 of the 9 validation images are also training images: an accuracy on them says little of new images."
    ]
    same = check_images(load_splits(str(images), test=str(images)).splits).notes
    assert any(note.startswith("16 of the 20 test images are also training images") for note in same)


def test_the_fingerprint_is_that_of_the_contents_wherever_they_lie(images, tmp_path):
    def fingerprint(folder: Path) -> str:
        return check_images(load_splits(str(folder)).splits).fingerprint

    before = fingerprint(images)
    moved = images.rename(tmp_path / "moved")
    assert fingerprint(moved) == before
    shutil.copy(moved / "dark" / "0.png", moved / "dark" / "1.png")
    assert fingerprint(moved) != before


def test_an_error_of_the_command_names_the_bad_image(images):
    for path in (images / "dark").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"dark/\d\.png is empty \(0 bytes\)"):
        list(load_images(str(images), None, None).training)
