# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The dataset whose hidden states are cached, as batches that the model takes."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import default_data_collator

from .weights import bytes_of


NUM_TRIED = 32  # images that are read twice, and that the prefix sees twice in training mode
LABELS = ("labels", "label", "label_ids")


class Data:
    """The dataset, as batches that the model takes."""

    def __init__(self, base: nn.Module, dataset: Any, collate: Callable[[list[Any]], dict[str, Any]] | None) -> None:
        self.dataset = dataset
        self._collate = collate
        parameters = inspect.signature(base.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._names = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        self._takes_any = takes_any and not self._names
        named = getattr(base, "main_input_name", None)
        first = self._names[0] if self._names else "pixel_values"
        found = self.collate([dataset[0]])
        self.name = next((name for name in (named, "pixel_values", first) if name in found), "")
        if not self.name or not isinstance(found[self.name], Tensor):
            raise ValueError(
                f"The batches hold no tensor {named or first!r}, which {type(base).__name__} takes its images by, but "
                f"{', '.join(found) or 'nothing'}: pass the data_collator that makes batches for the model."
            )
        self.position = self._names.index(self.name) if self.name in self._names else len(self._names)

    def collate(self, items: list[Any]) -> dict[str, Any]:
        """A batch with what the model takes, and labels."""
        kept = {*self._names, *LABELS}
        if self._collate is None:
            if not self._takes_any:
                items = [{key: value for key, value in item.items() if key in kept} for item in items]
            batch = default_data_collator(items)
        else:
            batch = self._collate(items)
        return {key: value for key, value in batch.items() if self._takes_any or key in kept}

    def for_model(self, batch: dict[str, Any], with_labels: bool = False) -> dict[str, Any]:
        """What of a batch the model takes; without labels no loss is computed."""
        taken = {key: value for key, value in batch.items() if self._takes_any or key in self._names}
        return taken if with_labels else {key: value for key, value in taken.items() if key not in LABELS}

    def places(self, count: int) -> list[int]:
        """So many places in the dataset, from its first to its last."""
        last, count = len(self.dataset) - 1, min(count, len(self.dataset))
        return sorted({round(last * step / max(count - 1, 1)) for step in range(count)})

    def read_twice(self, device: torch.device) -> dict[str, Any]:
        """Some images from all over the dataset.

        Raises:
            ValueError: they are others when they are read again, or have different sizes.
        """
        places = self.places(NUM_TRIED)
        try:
            first = self.collate([self.dataset[place] for place in places])
        except RuntimeError as error:
            raise ValueError(
                f"Images of different sizes cannot be cached: bring them to one size ({error})."
            ) from error
        for _ in range(math.ceil(NUM_TRIED / len(places))):
            again = self.collate([self.dataset[place] for place in places])
            if not torch.equal(first[self.name], again[self.name]):
                raise ValueError(
                    "An image of the dataset is another whenever it is read, as with random crops or mirroring: a "
                    "cache would keep one version of it. Leave the augmentation out, or cache fixed versions, each as "
                    "a dataset of its own (torch.utils.data.ConcatDataset joins them)."
                )
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in first.items()}

    def fingerprint(self, tried: dict[str, Any]) -> str:
        """Tells the images, by some of them, and by what `datasets` notes of where they come from."""
        digest = hashlib.blake2b(bytes_of(tried[self.name]), digest_size=16)
        for label in LABELS:
            if isinstance(tried.get(label), Tensor):
                digest.update(repr(tried[label].tolist()).encode())
        return f"{getattr(self.dataset, '_fingerprint', '')}:{digest.hexdigest()}"


def part(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """The first images of a batch, repeated where it has fewer."""
    size = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    order = [index % size for index in range(count)]
    parts: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.dim() and len(value) == size:
            parts[key] = value[order]
        elif isinstance(value, list) and len(value) == size:
            parts[key] = [value[index] for index in order]
        else:
            raise ValueError(
                f"{key!r} has no entry an image in a batch of {size}, so it cannot be cached: let the data_collator "
                "leave it out."
            )
    return parts
