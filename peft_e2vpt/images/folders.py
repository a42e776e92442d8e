# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Folders of images: which split and which class each file belongs to. Needs neither torch nor `datasets`."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple


SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Splits by the names that folders of them have, in capitals or not."""
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
SUFFIXES = frozenset(
    (
        ".apng .avif .bmp .dib .gif .heic .heif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .jxl .pbm .pgm .png .pnm .ppm "
        ".tga .tif .tiff .webp"
    ).split()
)
"""Files that are meant as images. One of them that cannot be read is an error, any other file is left out."""
NO_FOLDERS_OF_USERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information"}
NO_FILES_OF_USERS = {"thumbs.db", "desktop.ini"}

Classes = dict[str, list[Path]]


class FolderImages(NamedTuple):
    """The images of a task.

    Attributes:
        splits: the files of every class, by the name of the split: `train`, and `validation` and `test` if there are
            any. Classes are in the order of their names, files too.
        notes: sentences on what has been left out, and on what the reader of an accuracy should know.
    """

    splits: dict[str, Classes]
    notes: list[str]


def find_images(
    folder: str | Path, validation: str | Path | None = None, test: str | Path | None = None
) -> FolderImages:
    """Finds the images of a task, `FOLDER/CLASS/IMAGE.jpg`, or with splits `FOLDER/train/CLASS/IMAGE.jpg`,
    `FOLDER/val/CLASS/IMAGE.jpg`, `FOLDER/test/CLASS/IMAGE.jpg`.

    Links are followed. Hidden files, and those that systems leave behind, are passed over.

    Args:
        folder: of the training images, or of all splits.
        validation: of the validation images, a folder per class.
        test: of the test images, a folder per class.

    Raises:
        ValueError: a folder is empty, cannot be read, or is laid out in another way; there is one class alone; or a
            class is not among those of the training images.
    """
    notes: list[str] = []
    root = Path(folder)
    found = _Found.in_folder(root)
    tops = found.splits_at_top()
    if tops:
        splits = {
            split: classes
            for split, top in sorted(tops.items(), key=lambda item: list(SPLITS).index(item[0]))
            if (classes := _classes_of_split(found, root / top, split, notes)) is not None
        }
        notes.extend(found.notes(below={*tops.values()}))
    else:
        splits = {"train": found.classes(hint=True)}
        notes.extend(found.notes())
    for split, place in (("validation", validation), ("test", test)):
        if place is None:
            continue
        if split in splits:
            raise ValueError(f"There are two folders of {split} images, {root / tops[split]} and {place}: name one.")
        further = _Found.in_folder(Path(place))
        if further.splits_at_top():
            raise ValueError(f"{place} holds splits itself ({', '.join(further.tops())}): name one of its folders.")
        splits[split] = further.classes()
        notes.extend(further.notes())
    if len(splits["train"]) < 2:
        only = next(iter(splits["train"]))
        raise ValueError(
            f"{root} has images of one class alone, {only}: a classifier needs a folder of images per class, "
            f"{root}/CLASS/IMAGE.jpg, and two classes or more."
        )
    for split, classes in splits.items():
        _compare_classes(split, list(classes), list(splits["train"]), notes)
    return FolderImages(splits, notes)


def check_place(folder: str | Path) -> Path:
    """Makes sure that a folder exists.

    Raises:
        ValueError: it does not, or is a file.
    """
    path = Path(folder)
    if path.is_file():
        advice = ": unpack it first" if path.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar") else ""
        raise ValueError(f"{folder} is a file, not a folder of images{advice}.")
    if not path.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    return path


class _Found:
    """What lies in a folder, at any depth.

    Attributes:
        root: the folder.
        images: paths of images, relative to it.
        others: how many other files there are of every suffix.
    """

    def __init__(self, root: Path, images: list[Path], others: Counter[str]) -> None:
        self.root, self.images, self.others = root, images, others

    @classmethod
    def in_folder(cls, root: Path) -> _Found:
        """Looks through a folder.

        Raises:
            ValueError: it is none, holds no image, or a folder in it may not be read.
        """
        check_place(root)
        images, others = [], Counter[str]()
        for path in _files(root):
            if path.suffix.lower() in SUFFIXES:
                images.append(path.relative_to(root))
            elif path.name.lower() not in NO_FILES_OF_USERS:
                others[path.suffix.lower() or path.name] += 1
        if not images:
            instead = f", only {_list([*others])} files" if others else ""
            raise ValueError(
                f"{root} holds no images{instead}: put them into a folder per class, {root}/CLASS/IMAGE.jpg."
            )
        return cls(root, images, others)

    def below(self, top: Path) -> _Found:
        """The part of it that lies in a folder directly inside."""
        inside = [path.relative_to(top.name) for path in self.images if path.parts[0] == top.name]
        return _Found(top, inside, Counter())

    def tops(self) -> list[str]:
        """Folders directly inside that hold images."""
        return sorted({path.parts[0] for path in self.images if len(path.parts) > 1})

    def splits_at_top(self) -> dict[str, str]:
        """Folders directly inside that are splits, by the split; none where they are classes.

        `train` is a split if it holds folders of images; otherwise it may well be a class, as in train, bus, car.

        Raises:
            ValueError: there are splits but not `train`, one twice, or folders of images beside them.
        """
        named = {top: SPLIT_OF[top.lower()] for top in self.tops() if top.lower() in SPLIT_OF}
        with_classes = {path.parts[0] for path in self.images if len(path.parts) > 2} & named.keys()
        if not with_classes:
            return {}
        if "train" not in {named[top] for top in with_classes}:
            raise ValueError(
                f"{self.root} has the splits {_list(sorted(with_classes))}, but none called train: add one, or name "
                "the folder to train on."
            )
        beside = [top for top in self.tops() if top not in named]
        if beside:
            raise ValueError(
                f"{self.root} holds splits ({_list(list(named))}) and beside them other folders of images "
                f"({_list(beside)}): move one of the two elsewhere."
            )
        twice = [split for split, count in Counter(named.values()).items() if count > 1]
        if twice:
            folders = [top for top, split in named.items() if split == twice[0]]
            raise ValueError(f"{self.root} has the split {twice[0]} twice, as {' and '.join(folders)}: keep one.")
        return {split: top for top, split in named.items()}

    def classes(self, hint: bool = False) -> Classes:
        """The files of every class.

        Args:
            hint: whether to look for a folder further in that may be meant.

        Raises:
            ValueError: images lie in no folder, or in a folder inside that of their class.
        """
        loose = [path for path in self.images if len(path.parts) == 1]
        nested = [path for path in self.images if len(path.parts) > 2]
        if loose:
            raise ValueError(
                f"{_count(loose, 'image')} in {self.root} in no class folder, such as {loose[0]}: put each into the "
                f"folder of its class, {self.root}/CLASS/IMAGE.jpg."
            )
        if nested:
            tops = self.tops()
            meant = hint and len(tops) == 1 and len({path.parts[1] for path in nested}) > 1
            advice = f"did you mean {self.root / tops[0]}?" if meant else "move them up into the class folder."
            raise ValueError(
                f"{_count(nested, 'image')} in {self.root} in a folder inside a class folder, such as {nested[0]}: "
                f"{advice}"
            )
        classes: Classes = {}
        for path in sorted(self.images):
            # a Mac writes é as e and an accent: the same class, whichever system has named its folder
            classes.setdefault(unicodedata.normalize("NFC", path.parts[0]), []).append(self.root / path)
        return dict(sorted(classes.items()))

    def notes(self, below: set[str] | None = None) -> list[str]:
        """Sentences on files and folders that are left out.

        Args:
            below: the folders directly inside whose own folders are classes, where they are splits.
        """
        notes = []
        if self.others:
            count, kinds = sum(self.others.values()), _list([*self.others])
            files = "1 file" if count == 1 else f"{count:,} files"
            notes.append(f"Left out as no images: {files} in {self.root} ({kinds}).")
        used = {self.root.joinpath(path).parent for path in self.images}
        for place in [self.root / top for top in sorted(below)] if below else [self.root]:
            empty = [
                folder.name
                for folder in sorted(place.iterdir())
                if folder.is_dir() and not _is_hidden(folder.name) and not any(folder in (u, *u.parents) for u in used)
            ]
            if empty:
                notes.append(f"Folders in {place} without images are left out: {_list(empty)}.")
        return notes


def _classes_of_split(found: _Found, top: Path, split: str, notes: list[str]) -> Classes | None:
    """The classes of a split; none where its images are not sorted into classes, as in tests of competitions."""
    inside = found.below(top)
    if split != "train" and all(len(path.parts) == 1 for path in inside.images):
        notes.append(f"{top} is left out: its images lie in no class folders, so nothing can be measured on them.")
        return None
    return inside.classes()


def _compare_classes(split: str, classes: list[str], of_train: list[str], notes: list[str]) -> None:
    extra = [name for name in classes if name not in of_train]
    if extra:
        near = get_close_matches(extra[0].lower(), [name.lower() for name in of_train], n=1, cutoff=0.8)
        meant = next((name for name in of_train if near and name.lower() == near[0]), None)
        hint = f" (did you mean {meant}?)" if meant else ""
        raise ValueError(
            f"The {split} images have classes without training images: {_list(extra)}{hint}; those of the training "
            f"images are {_list(of_train)}."
        )
    missing = [name for name in of_train if name not in classes]
    if missing:
        notes.append(f"There are no {split} images of {_list(missing)}: nothing is known of the accuracy on them.")


def _files(root: Path) -> Iterator[Path]:
    """Files at any depth, through links to folders, in order, without what is hidden."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"The folder {error.filename} cannot be read ({error.strerror}).") from error

    for place, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        outer = [os.path.realpath(place), *map(str, Path(os.path.realpath(place)).parents)]
        folders[:] = sorted(
            folder
            for folder in folders
            if not _is_hidden(folder) and os.path.realpath(os.path.join(place, folder)) not in outer  # else a ring
        )
        yield from (Path(place, file) for file in sorted(files) if not _is_hidden(file))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in NO_FOLDERS_OF_USERS


def _list(names: list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _count(paths: list[Path], noun: str) -> str:
    return f"1 {noun} lies" if len(paths) == 1 else f"{len(paths):,} {noun}s lie"
