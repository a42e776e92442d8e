# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`AdapterBank`: many exported adapters, and the inputs of a graph for any list of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..tuner.mixed_batch import BASE
from .adapter import AdapterRows, read_adapter, tables
from .backbone import BASE_FILE, LAYOUT_FILE
from .layout import GraphLayout


@dataclass
class _Entry:
    """An adapter of a bank.

    Attributes:
        path: its file.
        labels: its classes.
        rows: what is in memory of it; `None` where that was given up for others.
        last_use: a count that grows.
    """

    path: Path
    labels: tuple[str, ...]
    rows: AdapterRows | None
    last_use: int = 0


@dataclass(frozen=True)
class AdapterBatch:
    """The adapters of a batch, as the bank had them when it was asked.

    Attributes:
        inputs: those of the graph besides the images; see `GraphLayout`.
        labels: the classes of every sample's adapter, in the order of its logits.
        widths: how many logits belong to every sample; `None` for all, where one head is that of the whole batch.
    """

    inputs: dict[str, Any]
    labels: tuple[tuple[str, ...], ...]
    widths: tuple[int | None, ...]

    def split(self, logits: Any) -> list[Any]:
        """Cuts logits (B, ..., C) to the classes of every sample's adapter: B of (..., C_i)."""
        return [row[..., :width] for row, width in zip(logits, self.widths, strict=True)]


class AdapterBank:
    """Adapters for an exported backbone: loads them, and makes the inputs of the graph for a batch.

    Threads may use, add and remove adapters at the same time. A batch keeps the adapters that it began with: what
    belongs to one batch is asked for once, as an `AdapterBatch`.

    Args:
        backbone: the folder that `export_backbone` wrote.
        max_bytes: memory for adapters. Those that were not used for the longest time are given up for others, and
            read again when they are asked for. By default all stay.

    Raises:
        ValueError: the folder holds no exported backbone.
    """

    def __init__(self, backbone: str | Path, *, max_bytes: int | None = None) -> None:
        folder = Path(backbone)
        try:
            text = (folder / LAYOUT_FILE).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"{folder} holds no exported backbone ({error}): write one with export_backbone(model, path)."
            ) from error
        self.layout = GraphLayout.from_json(text)
        self.max_bytes = max_bytes
        self._base = read_adapter(self.layout, folder / BASE_FILE)
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.RLock()
        self._uses = 0

    # ------------------------------------------------------------------------------------------------------- contents
    def add(self, name: str, path: str | Path) -> None:
        """Adds an adapter, or replaces one; batches under way keep the one that they have.

        Args:
            name: what it is asked for by.
            path: the `.safetensors` file that `export_adapter` wrote. It has to stay where `max_bytes` is given.

        Raises:
            ValueError: the file is damaged or does not fit the backbone, and the bank is what it was; or the name is
                `"__base__"`.
        """
        if name == BASE:
            raise ValueError(f"{BASE} is the name of the model without an adapter: choose another one.")
        rows = read_adapter(self.layout, path)
        if self.max_bytes is not None and rows.nbytes > self.max_bytes:
            raise ValueError(f"{path} takes {rows.nbytes} bytes, more than the {self.max_bytes} of the bank.")
        with self._lock:
            self._uses += 1
            self._entries[name] = _Entry(Path(path), rows.labels, rows, self._uses)
            self._give_up_others({name})

    def remove(self, name: str) -> None:
        """Removes an adapter; batches under way keep it.

        Raises:
            KeyError: there is none of this name.
        """
        with self._lock:
            if name not in self._entries:
                raise KeyError(self._unknown([name]))
            del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name == BASE or name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._entries))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that adapters take now."""
        with self._lock:
            return sum(entry.rows.nbytes for entry in self._entries.values() if entry.rows is not None)

    def labels(self, name: str) -> tuple[str, ...]:
        """The classes of an adapter, in the order of its logits.

        Raises:
            KeyError: there is none of this name.
        """
        if name == BASE:
            return self._base.labels
        with self._lock:
            if name not in self._entries:
                raise KeyError(self._unknown([name]))
            return self._entries[name].labels

    # ------------------------------------------------------------------------------------------------------- a batch
    def batch(self, names: Sequence[str], *, library: str = "numpy") -> AdapterBatch:
        """What a batch needs besides its images.

        Args:
            names: one per sample, `"__base__"` for none.
            library: `"numpy"` for arrays, `"torch"` for tensors.

        Raises:
            KeyError: there is no adapter of a name.
            ValueError: heads that are not linear differ in the batch, an adapter that was given up for others cannot
                be read again, the list is empty or a string, or the library is another one.
        """
        if isinstance(names, str) or not names:
            raise ValueError(f"names is {names!r}: give a list with one name per sample.")
        if library not in ("numpy", "torch"):
            raise ValueError(f"library is {library!r}: choose 'numpy' or 'torch'.")
        distinct = list(dict.fromkeys(names))
        adapters = dict(zip(distinct, self._loaded(distinct), strict=True))
        number = {name: place for place, name in enumerate(distinct)}
        index = np.array([number[name] for name in names], np.int64)
        inputs: dict[str, Any] = {"adapter_index": index, **tables(self.layout, list(adapters.values()))}
        if library == "torch":
            inputs = {name: torch.from_numpy(array) for name, array in inputs.items()}
        labels = tuple(adapters[name].labels for name in names)
        per_sample = bool(self.layout.heads) and self.layout.per_sample_heads
        return AdapterBatch(inputs, labels, tuple(len(of_one) if per_sample else None for of_one in labels))

    def inputs(self, names: Sequence[str], *, library: str = "numpy") -> dict[str, Any]:
        """The inputs of the graph for a batch, besides its images: those of `batch`."""
        return self.batch(names, library=library).inputs

    def _loaded(self, names: list[str]) -> list[AdapterRows]:
        """The adapters, of which those that were given up are read again."""
        with self._lock:
            unknown = [name for name in names if name not in self]
            if unknown:
                raise KeyError(self._unknown(unknown))
            found = {}
            for name in names:
                if name == BASE:
                    found[name] = self._base
                    continue
                entry = self._entries[name]
                self._uses += 1
                entry.last_use = self._uses
                if entry.rows is None:
                    entry.rows = read_adapter(self.layout, entry.path)
                    entry.labels = entry.rows.labels
                found[name] = entry.rows
            self._give_up_others(set(names))
            return [found[name] for name in names]

    def _give_up_others(self, kept: set[str]) -> None:
        """Gives up what was not used for the longest time until the rest has room; the lock is held."""
        if self.max_bytes is None:
            return
        total = self.nbytes
        for name, entry in sorted(self._entries.items(), key=lambda item: item[1].last_use):
            if total <= self.max_bytes:
                return
            if name not in kept and entry.rows is not None:
                total -= entry.rows.nbytes
                entry.rows = None

    def _unknown(self, names: list[str]) -> str:
        known = ", ".join([*self._entries, BASE])
        return f"There is no adapter {', '.join(names)} in the bank; it has {known}."
