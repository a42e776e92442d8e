# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`GraphLayout`: the inputs by which one graph of a backbone takes adapters, and which backbone it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..backbones.sites import AttentionSite, find_attention_sites
from ..tuner.config import E2VPTConfig
from ..tuner.heads import wrappers
from ..tuner.prompt_layers import CONTAINER, prompt_layers
from ..tuner.targets import choose_heads, find_targets


FORMAT = 1  # of the files of this wing


@dataclass(frozen=True)
class AttentionGroup:
    """Self-attentions whose rows are of one shape, so that a single pair of inputs holds those of all of them.

    Attributes:
        attentions: their numbers, L of them.
        heads: H.
        key_dim: the size of one head of the keys.
        value_dim: the size of one head of the values.
    """

    attentions: tuple[int, ...]
    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Head:
    """A module that every adapter brings with it.

    Attributes:
        path: of the module in the model.
        shapes: of its tensors by name, in the model that was exported.
        per_sample: whether every sample of a batch can have one of its own: a linear layer.
        any_classes: whether the first dimension may differ by adapter. Not of what the model goes on with.
    """

    path: str
    shapes: dict[str, tuple[int, ...]]
    per_sample: bool
    any_classes: bool


@dataclass(frozen=True)
class GraphLayout:
    """What an exported backbone takes besides images.

    Of A adapters with at most P rows in an attention, in the order of the inputs:

    * `adapter_index` (B,), int64: which of the A adapters every sample has;
    * `keys` (L, A, H, P, d) and `values` (L, A, H, P, d) for every group of attentions: `keys_0`, `values_0`, `keys_1`
      and so on where there are several, as in a pyramid;
    * `row_bias` (L, A, P), what is added to the attention scores of the rows: 0, and `NO_ROW` where an adapter has
      fewer than P of them. L counts the attentions of all groups;
    * `head_weight` (A, C, D) and `head_bias` (A, C) of a linear head; `head_0_weight` and so on where there are
      several. Of any other head, its tensors without the dimension A: all samples of a batch have the same one.

    Attributes:
        model: class of the model.
        fingerprint: of the frozen backbone; adapters of another one are refused.
        groups: the attentions.
        heads: the modules that adapters bring with them.
        labels: the classes of the base model, empty where it has none.
        images: the inputs of the model by name, with the shapes that the graph was exported with.
        outputs: the outputs by name.
    """

    model: str
    fingerprint: str
    groups: tuple[AttentionGroup, ...]
    heads: tuple[Head, ...]
    labels: tuple[str, ...] = ()
    images: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    @property
    def per_sample_heads(self) -> bool:
        """Whether samples of a batch may have heads of different adapters."""
        return all(head.per_sample for head in self.heads)

    def name(self, what: str, group: int) -> str:
        """The name of the input that holds the `"keys"` or `"values"` of a group."""
        return what if len(self.groups) == 1 else f"{what}_{group}"

    def head_name(self, number: int, tensor: str) -> str:
        """The name of the input that holds a tensor of a head."""
        prefix = "head" if len(self.heads) == 1 else f"head_{number}"
        return f"{prefix}_{tensor.replace('.', '_')}"

    @property
    def num_attentions(self) -> int:
        """L, over all groups."""
        return sum(len(group.attentions) for group in self.groups)

    def to_json(self) -> str:
        """The layout as it is written beside the graph."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> GraphLayout:
        """Reads what `to_json` has written.

        Raises:
            ValueError: it is no layout, or one of a later version.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("format") > FORMAT:
                raise ValueError("The exported backbone is of a later version: upgrade peft_e2vpt.")
            groups = [AttentionGroup(**{**g, "attentions": tuple(g["attentions"])}) for g in data.pop("groups")]
            heads = [
                Head(**{**h, "shapes": {name: tuple(shape) for name, shape in h["shapes"].items()}})
                for h in data.pop("heads")
            ]
            images = {name: tuple(shape) for name, shape in data.pop("images").items()}
            labels, outputs = tuple(data.pop("labels")), tuple(data.pop("outputs"))
            return cls(groups=tuple(groups), heads=tuple(heads), images=images, labels=labels, outputs=outputs, **data)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"This is not the layout of an exported backbone: {error!r}.") from error


def base_of(model: nn.Module) -> nn.Module:
    """The model itself, out of a `PeftModel`."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def class_names(base: nn.Module) -> list[str]:
    """The classes that the config of a model names now, in the order of the logits; none where it names none."""
    id2label = getattr(getattr(base, "config", None), "id2label", None) or {}
    return [id2label[number] for number in sorted(id2label)]


def tensors_of(head: nn.Module) -> dict[str, Tensor]:
    """What makes up a head: parameters and floating point buffers, by name."""
    buffers = {name: buffer for name, buffer in head.named_buffers() if buffer.is_floating_point()}
    return {name: tensor.detach() for name, tensor in (*head.named_parameters(), *buffers.items())}


def _fingerprint(base: nn.Module, heads: Sequence[str]) -> str:
    """A hash of norms and biases of the frozen backbone, which quantised and half-precision copies share.

    Names and order of parameters do not enter it: they differ between versions of transformers.
    """
    digests = []
    for name, parameter in base.named_parameters():
        name = name.replace(".original_module.", ".")
        is_adapters = name.startswith(f"{CONTAINER}.") or ".modules_to_save." in name
        if is_adapters or parameter.dim() != 1 or not parameter.is_floating_point():
            continue
        if any(name.startswith(f"{head}.") for head in heads):
            continue
        values = parameter.detach().to("cpu", torch.bfloat16).float().numpy()
        digests.append(hashlib.sha256(values.tobytes()).digest())
    return hashlib.sha256(type(base).__name__.encode() + b"".join(sorted(digests))).hexdigest()


def layout_of(model: nn.Module) -> GraphLayout:
    """The layout for a model: with adapters, that of the attentions and heads that they have; else of a new one.

    Raises:
        ValueError: the model has no self-attention that E2VPT knows, or an adapter has visual prompts in shallow mode.
    """
    base = base_of(model)
    sites: list[AttentionSite] = find_attention_sites(base)
    layers = prompt_layers(base)
    for layer in layers:
        for name, config in layer.e2vpt_config.items():
            if config.visual_prompt_mode == "shallow":
                raise ValueError(
                    f"The adapter {name!r} has visual_prompt_mode='shallow': its prompts are tokens of the sequence, "
                    "which change with the image on their way, so they are no input of a graph. Only adapters in "
                    "'deep' mode are."
                )
    by_name = {site.name: site for site in sites}
    targets = set(find_targets(base, E2VPTConfig(), by_name)) | {layer.site.name for layer in layers}
    groups: dict[tuple[int, int, int], list[int]] = {}
    for number, site in enumerate(sites):
        if site.name in targets:
            shape = site.num_key_value_heads, site.key_dim, site.value_dim
            groups.setdefault(shape, []).append(number)
    found = {path: wrapper.original_module for path, wrapper in wrappers(base)}
    if not layers:
        found = {path: base.get_submodule(path) for path in choose_heads(base, sites, None)}
    heads = []
    for path, module in found.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(module).items()}
        is_linear = type(module) is nn.Linear
        heads.append(Head(path, shapes, per_sample=is_linear, any_classes=is_linear))
    return GraphLayout(
        model=type(base).__name__,
        fingerprint=_fingerprint(base, list(found)),
        groups=tuple(AttentionGroup(tuple(numbers), *shape) for shape, numbers in groups.items()),
        heads=tuple(heads),
        labels=tuple(class_names(base)),
    )
