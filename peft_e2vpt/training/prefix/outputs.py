# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What skipped modules return in a pass with hidden states: trees of leaves, learnt from two batches of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import ModelOutput


class NoCut(Exception):  # noqa: N818  (another place may do)
    """Why a model cannot be cut at a place."""


def leaves_of(tree: Any) -> list[Any]:
    """The tensors and other values in nested tuples, lists, dictionaries and outputs of transformers."""
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in leaves_of(part)]
    if isinstance(tree, (tuple, list)) and not isinstance(tree, torch.Size):
        return [leaf for part in tree for leaf in leaves_of(part)]
    return [tree]


def with_leaves(tree: Any, leaves: Iterator[Any]) -> Any:
    """The same tree with other leaves, in the order of `leaves_of`."""
    if isinstance(tree, ModelOutput):
        return type(tree)(**{name: with_leaves(part, leaves) for name, part in tree.items()})
    if isinstance(tree, dict):
        return {name: with_leaves(part, leaves) for name, part in tree.items()}
    if isinstance(tree, (tuple, list)) and not isinstance(tree, torch.Size):
        parts = [with_leaves(part, leaves) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return next(leaves)


class HiddenStates(NamedTuple):
    """Stands, among the leaves of what a skipped call returns, for what the cache holds."""

    def of_batch(self, hidden: Tensor) -> Tensor:
        return hidden

    def stands_for(self, leaf: Any) -> bool:
        """Whether a call that does run gives what this stands for."""
        return isinstance(leaf, Tensor)


class Filler(NamedTuple):
    """A tensor that a skipped call returns without having computed it.

    Attributes:
        offsets, slopes: its shape for a batch of B images, `offset + slope * B`.
        value: what it is filled with: NaN, or what it is for every image.
    """

    offsets: tuple[int, ...]
    slopes: tuple[int, ...]
    value: Tensor

    @property
    def depends_on_images(self) -> bool:
        return self.value.dim() == 0 and self.value.is_floating_point() and bool(self.value.isnan())

    def of_batch(self, hidden: Tensor) -> Tensor:
        size = [offset + slope * len(hidden) for offset, slope in zip(self.offsets, self.slopes, strict=True)]
        return self.value.to(hidden.device).expand(size).detach()

    def stands_for(self, leaf: Any) -> bool:
        if not isinstance(leaf, Tensor) or leaf.dim() != len(self.offsets):
            return False
        if self.depends_on_images:
            return True
        fits = all(n == m or slope for n, m, slope in zip(leaf.shape, self.value.shape, self.slopes, strict=True))
        return fits and bool((leaf == self.value.to(leaf.device)).all())


class Fixed(NamedTuple):
    """What is no tensor, and the same in every batch."""

    value: Any

    def of_batch(self, hidden: Tensor) -> Any:
        return self.value

    def stands_for(self, leaf: Any) -> bool:
        return isinstance(leaf, PLAIN) and bool(leaf == self.value)


Leaf = HiddenStates | Filler | Fixed
PLAIN = (int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device)


def _leaf(one: Any, other: Any, sizes: tuple[int, int]) -> Leaf:
    """What a leaf is, by its values for two batches of other images."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        if not isinstance(one, PLAIN) or one != other:
            raise NoCut(f"a module before gives a {type(one).__name__} that a cache cannot give")
        return Fixed(one)
    if one.dim() != other.dim():
        raise NoCut("a module before gives tensors of changing dimensions")
    few, many = sizes
    slopes = [(n - m) // (many - few) for m, n in zip(one.shape, other.shape, strict=True)]
    offsets = [m - few * slope for m, slope in zip(one.shape, slopes, strict=True)]
    one, other = one.detach(), other.detach()
    if not any(slopes) and one.equal(other):
        return Filler(tuple(offsets), tuple(slopes), one.clone())
    batched = [dim for dim, slope in enumerate(slopes) if slope]
    if len(batched) == 1 and offsets[batched[0]] == 0:
        first = one.narrow(batched[0], 0, 1)
        if bool((one == first).all()) and bool((other == first).all()):
            return Filler(tuple(offsets), tuple(slopes), first.clone())
    if not one.is_floating_point():
        raise NoCut(f"a module before gives numbers of type {one.dtype} that depend on the image")
    if any(offset + slope * few != m for offset, slope, m in zip(offsets, slopes, one.shape, strict=True)):
        raise NoCut("a module before gives tensors whose size does not grow with the batch")
    return Filler(tuple(offsets), tuple(slopes), torch.full((), torch.nan, dtype=one.dtype, device=one.device))


class Returned(NamedTuple):
    """What a skipped call returns: its tree, and what stands for each leaf."""

    tree: Any
    leaves: tuple[Leaf, ...]

    @classmethod
    def like(cls, one: Any, other: Any, sizes: tuple[int, int]) -> Returned:
        leaves, others = leaves_of(one), leaves_of(other)
        if len(leaves) != len(others):
            raise NoCut("a module before gives outputs of changing structure")
        templates = tuple(_leaf(a, b, sizes) for a, b in zip(leaves, others, strict=True))
        return cls(with_leaves(one, iter([...] * len(leaves))), templates)  # outputs of transformers drop what is None

    @property
    def of_images(self) -> list[int]:
        """Numbers of the leaves that depend on the images."""
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Filler) and leaf.depends_on_images]

    def with_hidden_states(self, number: int) -> Returned:
        """The same with the cached tensor as one of the leaves."""
        return self._replace(leaves=(*self.leaves[:number], HiddenStates(), *self.leaves[number + 1 :]))

    def stands_for(self, output: Any) -> bool:
        """Whether a call that does run gives this but for what depends on images."""
        leaves = leaves_of(output)
        return len(leaves) == len(self.leaves) and all(
            template.stands_for(leaf) for template, leaf in zip(self.leaves, leaves, strict=True)
        )

    def of_batch(self, hidden: Tensor) -> Any:
        return with_leaves(self.tree, iter([leaf.of_batch(hidden) for leaf in self.leaves]))
