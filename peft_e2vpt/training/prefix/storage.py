# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Where hidden states of a frozen prefix lie: in memory, or in a folder with a note on what they belong to."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


NOTE, VALUES, OTHERS = "frozen_prefix.json", "hidden_states.bin", "other_inputs.pt"
ADVICE = "Pass another folder, or delete this one."


class CachedDataset(Dataset[dict[str, Any]]):
    """A dataset with the hidden states of a frozen prefix in place of images; see `cache_frozen_prefix`.

    Attributes:
        name: the key of the hidden states, that of the images.
        hidden_states: of all images, `(N, ...)`; those in a folder are read when they are asked for.
        others: what else an image has, such as its label, by key: a tensor or list with an entry an image.
    """

    def __init__(self, name: str, hidden_states: Tensor, others: dict[str, Tensor | list[Any]]) -> None:
        self.name = name
        self.hidden_states = hidden_states
        self.others = others

    def __len__(self) -> int:
        return len(self.hidden_states)

    def __getitem__(self, index: int) -> dict[str, Any]:
        others = {key: values[index] for key, values in self.others.items()}
        return {self.name: self.hidden_states[index].clone(), **others}  # nobody changes the cache in place


class Store:
    """Hidden states while they are being written.

    Args:
        count: of images.
        like: hidden states of some of them.
        folder: where they go, by default into memory.
    """

    def __init__(self, count: int, like: Tensor, folder: Path | None) -> None:
        self.folder = folder
        size = (count, *like.shape[1:])
        self._unfinished: dict[str, Path] = {}
        if folder is None:
            self.values = torch.empty(size, dtype=like.dtype)
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._unfinished = {name: folder / f"{name}.{os.getpid()}.tmp" for name in (VALUES, OTHERS, NOTE)}
        self.values = _mapped(self._unfinished[VALUES], size, like.dtype)

    def finish(self, name: str, others: dict[str, Tensor | list[Any]], note: dict[str, Any]) -> CachedDataset:
        """Gives the dataset; in a folder, the note comes last: without it, nothing there is complete."""
        if self.folder is not None:
            torch.save(others, self._unfinished[OTHERS])
            self._unfinished[NOTE].write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
            for target in (VALUES, OTHERS, NOTE):
                os.replace(self._unfinished[target], self.folder / target)
        return CachedDataset(name, self.values, others)

    def give_up(self) -> None:
        """Leaves nothing behind."""
        for path in self._unfinished.values():
            path.unlink(missing_ok=True)


def _mapped(path: Path, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=math.prod(size), dtype=dtype).view(size)


def stored(folder: Path, name: str, note: dict[str, Any], like: Tensor) -> CachedDataset | None:
    """What lies in a folder, if it is complete; `None` where nothing is.

    Args:
        folder: where it lies.
        name: the key of the images.
        note: what it has to belong to.
        like: hidden states of some of the images.

    Raises:
        ValueError: it belongs to something else, or is damaged.
    """
    path = folder / NOTE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). {ADVICE}") from error
    if found != note:
        different = [key for key in note if not isinstance(found, dict) or found.get(key) != note[key]]
        raise ValueError(
            f"{folder} holds the hidden states of another model or dataset (other {', '.join(different)}). {ADVICE}"
        )
    size = (int(note["images"]), *like.shape[1:])
    expected = math.prod(size) * like.element_size()
    values = folder / VALUES
    length = values.stat().st_size if values.exists() else 0
    if length != expected or not (folder / OTHERS).exists():
        raise ValueError(f"{values} has {length:,} of {expected:,} bytes, or {OTHERS} beside it is missing. {ADVICE}")
    others = torch.load(folder / OTHERS, weights_only=True)
    return CachedDataset(name, _mapped(values, size, like.dtype), others)
