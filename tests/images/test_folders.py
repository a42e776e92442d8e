# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Which split and class a file belongs to, and what is said of folders that are laid out in another way."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from peft_e2vpt.images import find_images


def touch(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def names(found: dict[str, dict[str, list[Path]]]) -> dict[str, dict[str, list[str]]]:
    return {split: {name: [f.name for f in files] for name, files in of.items()} for split, of in found.items()}


TWO = ("cat/1.jpg", "dog/1.jpg")


# ------------------------------------------------------------------------------------------------------------- layouts
def test_folders_are_classes_and_their_files_images(tmp_path):
    found = find_images(
        touch(tmp_path, "dog/b.PNG", "cat/2.jpg", "cat/1.JPEG", "dog/a.webp", "dog/c.tiff", "dog/d.bmp")
    )
    assert names(found.splits) == {
        "train": {"cat": ["1.JPEG", "2.jpg"], "dog": ["a.webp", "b.PNG", "c.tiff", "d.bmp"]}
    }
    assert list(found.splits["train"]) == ["cat", "dog"] and found.notes == []


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize("validation", ["val", "valid", "validation", "dev", "Val"])
def test_train_val_and_test_folders_are_splits(train, validation, tmp_path):
    files = [f"{split}/{file}" for split in (train, validation, "test") for file in TWO]
    found = find_images(touch(tmp_path, *files))
    assert list(found.splits) == ["train", "validation", "test"]
    assert found.splits["test"]["dog"] == [tmp_path / "test" / "dog" / "1.jpg"]


@pytest.mark.parametrize("files", [("train/1.jpg", "bus/1.jpg"), ("test/1.jpg", "control/1.jpg")])
def test_a_class_may_be_called_train_or_test(files, tmp_path):
    assert list(find_images(touch(tmp_path, *files)).splits) == ["train"]


def test_a_test_folder_without_classes_is_left_out_with_a_note(tmp_path):
    found = find_images(touch(tmp_path, *(f"train/{file}" for file in TWO), "test/1.jpg"))
    assert list(found.splits) == ["train"]
    assert "test is left out: its images lie in no class folders" in found.notes[0]


def test_folders_of_other_splits_can_lie_elsewhere(tmp_path):
    for part in ("a", "b", "c"):
        touch(tmp_path / part, *TWO)
    found = find_images(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert {split: of["cat"][0].parts[-3] for split, of in found.splits.items()} == {
        "train": "a", "validation": "b", "test": "c"
    }  # fmt: skip


@pytest.mark.parametrize(
    "folder", ["my images", "images [2024] (a*b?)", "каты", "猫と犬", "{a,b}", "a'b\"c", "~a", "$HOME"]
)
def test_folders_and_classes_may_be_called_anything(folder, tmp_path):
    root = touch(tmp_path / folder, f"{folder}/1 [2].jpg", "dog/*.jpg")
    assert find_images(root).splits["train"] == {
        folder: [root / folder / "1 [2].jpg"], "dog": [root / "dog" / "*.jpg"]
    }  # fmt: skip


def test_a_class_is_the_same_whichever_system_named_its_folder(tmp_path):
    here, there = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    touch(tmp_path, f"train/{here}/1.jpg", "train/dog/1.jpg", f"val/{there}/1.jpg", "val/dog/1.jpg")
    assert list(find_images(tmp_path).splits["validation"]) == [here, "dog"]


def test_what_systems_leave_behind_is_passed_over(tmp_path):
    touch(
        tmp_path, *TWO, ".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "cat/._1.jpg", "__MACOSX/cat/1.jpg",
        "cat/.hidden/2.jpg", ".git/3.png", "dog/desktop.ini", "@eaDir/x.jpg", ".ipynb_checkpoints/4.png",
    )  # fmt: skip
    found = find_images(tmp_path)
    assert names(found.splits) == {"train": {"cat": ["1.jpg"], "dog": ["1.jpg"]}} and found.notes == []


def test_links_to_folders_and_files_are_followed_and_rings_are_not(tmp_path):
    touch(tmp_path / "all", "cat/1.jpg", "2.jpg")
    root = tmp_path / "images"
    (root / "dog").mkdir(parents=True)
    (root / "cat").symlink_to(tmp_path / "all" / "cat")
    (root / "dog" / "2.jpg").symlink_to(tmp_path / "all" / "2.jpg")
    (root / "dog" / "ring").symlink_to(root)
    (root / "dog" / "here").symlink_to(root / "dog")
    assert names(find_images(root).splits) == {"train": {"cat": ["1.jpg"], "dog": ["2.jpg"]}}


def test_other_files_and_folders_without_images_are_noted(tmp_path):
    touch(tmp_path, *TWO, "README.md", "cat/notes.txt", "empty/none.txt")
    (tmp_path / "bird").mkdir()
    assert find_images(tmp_path).notes == [
        f"Left out as no images: 3 files in {tmp_path} (.md, .txt).",
        f"Folders in {tmp_path} without images are left out: bird, empty.",
    ]


def test_an_empty_class_folder_in_a_split_is_noted(tmp_path):
    touch(tmp_path, *(f"train/{file}" for file in TWO), *(f"val/{file}" for file in TWO))
    (tmp_path / "train" / "bird").mkdir()
    assert find_images(tmp_path).notes == [f"Folders in {tmp_path / 'train'} without images are left out: bird."]


def test_a_class_that_validation_lacks_is_noted(tmp_path):
    touch(tmp_path, *(f"train/{file}" for file in TWO), "val/cat/1.jpg")
    assert find_images(tmp_path).notes == [
        "There are no validation images of dog: nothing is known of the accuracy on them."
    ]


# ------------------------------------------------------------------------------------------------------------ mistakes
MISTAKES = {
    "empty": ([], "ROOT holds no images: put them into a folder per class, ROOT/CLASS/IMAGE.jpg."),
    "other files": (["cat/1.txt"], "ROOT holds no images, only .txt files: put them into a folder per class"),
    "one class": (["cat/1.jpg"], "ROOT has images of one class alone, cat: a classifier needs a folder of images per"),
    "no folders": (["1.jpg", "2.jpg"], "2 images lie in ROOT in no class folder, such as 1.jpg"),
    "loose": ([*TWO, "3.jpg"], "1 image lies in ROOT in no class folder, such as 3.jpg"),
    "nested": (
        ["cat/old/1.jpg", "dog/1.jpg"],
        "1 image lies in ROOT in a folder inside a class folder, such as cat/old",
    ),
    "one too high": (["images/cat/1.jpg", "images/dog/1.jpg"], "did you mean ROOT/images?"),
    "nested in a split": (
        ["train/cat/a/1.jpg", "train/dog/1.jpg"],
        "such as cat/a/1.jpg: move them up into the class",
    ),
    "loose in a split": (
        ["train/cat/1.jpg", "train/dog/1.jpg", "train/2.jpg"],
        "1 image lies in ROOT/train in no class",
    ),
    "no train": (["val/cat/1.jpg", "test/cat/1.jpg"], "ROOT has the splits test, val, but none called train: add one"),
    "a split twice": (
        [f"{s}/{f}" for s in ("train", "val", "valid") for f in TWO],
        "the split validation twice, as val",
    ),
    "beside splits": (
        [*TWO, *(f"train/{f}" for f in TWO)],
        "ROOT holds splits (train) and beside them other folders of",
    ),
    "extra class": (
        [*(f"train/{f}" for f in TWO), "val/bird/1.jpg"],
        "The validation images have classes without training images: bird; those of the training images are cat, dog.",
    ),
    "misspelt class": ([*(f"train/{f}" for f in TWO), "test/Dog/1.jpg"], "Dog (did you mean dog?)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_layout_gets_one_sentence(mistake, tmp_path):
    files, message = MISTAKES[mistake]
    with pytest.raises(ValueError) as error:
        find_images(touch(tmp_path, *files))
    text = str(error.value).replace(str(tmp_path), "ROOT")
    assert message in text and "\n" not in text


def test_a_folder_that_is_none_says_what_it_is(tmp_path):
    touch(tmp_path, "images.zip", "cat.jpg")
    with pytest.raises(ValueError, match=r"images\.zip is a file, not a folder of images: unpack it first\."):
        find_images(tmp_path / "images.zip")
    with pytest.raises(ValueError, match=r"cat\.jpg is a file, not a folder of images\."):
        find_images(tmp_path / "cat.jpg")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        find_images("nowhere")


def test_a_split_that_is_named_twice_or_holds_splits_itself_is_refused(tmp_path):
    touch(tmp_path / "a", *(f"{split}/{file}" for split in ("train", "val") for file in TWO))
    touch(tmp_path / "b", *TWO)
    with pytest.raises(ValueError, match=r"There are two folders of validation images, .*a/val and .*b: name one"):
        find_images(tmp_path / "a", validation=tmp_path / "b")
    with pytest.raises(ValueError, match=r"a holds splits itself \(train, val\): name one of its folders"):
        find_images(tmp_path / "b", test=tmp_path / "a")


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    import os

    touch(tmp_path, *TWO)
    scandir = os.scandir

    def refuse(place):  # a test may run as root, who reads all
        if str(place).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"The folder .*dog cannot be read \(Permission denied\)"):
        find_images(tmp_path)
