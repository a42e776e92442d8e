# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`export_backbone`: one graph of a frozen backbone that takes adapters as inputs."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from ..attention.rows import Rows
from ..backbones.sites import find_attention_sites
from ..tuner.config import E2VPTConfig
from ..tuner.layer import E2VPTLayer
from ..tuner.mixed_batch import BASE
from ..tuner.prompt_layers import prompt_layers
from .adapter import write_adapter
from .layout import GraphLayout, Head, base_of, layout_of, tensors_of


LAYOUT_FILE, BASE_FILE = "backbone.json", "base.safetensors"
GRAPH_FILES = {"onnx": "backbone.onnx", "torch": "backbone.pt2"}


class _Adapters:
    """What the graph has got of adapters in the pass that is being traced.

    Attributes:
        index: (B,), which adapter every sample has.
        rows: (B, H, P, d) of every attention by its number.
        heads: the tensors of every head by its path.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Rows] = {}
        self.heads: dict[str, dict[str, Tensor]] = {}


def _given_rows(adapters: _Adapters, layer: E2VPTLayer) -> Callable[[int, torch.dtype], Rows]:
    """Gives an attention the rows that the graph has got for it."""

    def rows(num_sequences: int, dtype: torch.dtype) -> Rows:
        given = adapters.rows[layer.index]
        if not layer.site.backbone.windows:
            return given
        # by number and not by repeating, so that the graph takes a single sample and no rows at all
        samples = torch.arange(num_sequences, device=given.key.device) // (num_sequences // given.key.shape[0])
        assert given.score_bias is not None
        key, value, bias = (tensor.index_select(0, samples) for tensor in (given.key, given.value, given.score_bias))
        return Rows(key, value, score_bias=bias)

    return rows


class _GivenHead(nn.Module):
    """A head whose tensors the graph has got: for every sample its own where it is linear, else one for all."""

    def __init__(self, adapters: _Adapters, path: str, head: nn.Module, per_sample: bool) -> None:
        super().__init__()
        self._adapters, self._path, self._per_sample = adapters, path, per_sample
        self._original = (head,)  # in a tuple, it is no child: its weights are no weights of the graph

    @property
    def original(self) -> nn.Module:
        """The head that the model had."""
        return self._original[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = self._adapters.heads[self._path]
        if not self._per_sample:
            return functional_call(self.original, tensors, args, kwargs)
        [hidden] = (*args, *kwargs.values())
        product = torch.einsum("bcd,b...d->b...c", tensors["weight"], hidden)
        if "bias" not in tensors:
            return product
        bias = tensors["bias"]
        return product + bias.view(bias.shape[0], *[1] * (hidden.dim() - 2), bias.shape[1])


class BackboneGraph(nn.Module):
    """A copy of a model whose adapters come with the images.

    Args:
        model: with or without adapters; it stays as it is.
        layout: that of the model.
    """

    def __init__(self, model: nn.Module, layout: GraphLayout) -> None:
        super().__init__()
        base = copy.deepcopy(model)
        if isinstance(base, PeftModel):
            base = base.unload()
        self._layout, self._adapters = layout, _Adapters()
        sites = find_attention_sites(base)
        numbers = [number for group in layout.groups for number in group.attentions]
        targets = "|".join(re.escape(sites[number].name) for number in numbers)
        config = E2VPTConfig(num_visual_prompts=0, num_kv_prompts=1, target_modules=targets, modules_to_save=[])
        self.base = get_peft_model(base, config).get_base_model().eval().requires_grad_(False)
        for layer in prompt_layers(self.base):
            layer.take_rows_from(_given_rows(self._adapters, layer))
        for head in layout.heads:
            module = self.base.get_submodule(head.path)
            self.base.set_submodule(head.path, _GivenHead(self._adapters, head.path, module, head.per_sample))

    def forward(self, images: dict[str, Tensor], adapter: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs a batch of images.

        Args:
            images: the inputs of the model, (B, ...) each.
            adapter: `adapter_index` and the tables of `GraphLayout`.

        Returns:
            The tensors of the model's output by name.
        """
        index, first = adapter["adapter_index"], 0
        for number, group in enumerate(self._layout.groups):
            names = [self._layout.name(what, number) for what in ("keys", "values")]
            keys, values = (adapter[name].index_select(1, index) for name in names)
            for place, attention in enumerate(group.attentions):
                bias = adapter["row_bias"][first + place].index_select(0, index)
                self._adapters.rows[attention] = Rows(keys[place], values[place], score_bias=bias)
            first += len(group.attentions)
        for number, head in enumerate(self._layout.heads):
            tensors = {name: adapter[self._layout.head_name(number, name)] for name in head.shapes}
            if head.per_sample:
                tensors = {name: tensor.index_select(0, index) for name, tensor in tensors.items()}
            self._adapters.heads[head.path] = tensors
        try:
            output = self.base(**images)
        finally:
            self._adapters.rows, self._adapters.heads = {}, {}
        return outputs_by_name(output)


def outputs_by_name(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name; those of a tuple are numbered."""
    if isinstance(output, Tensor):  # of a model of timm
        return {"logits": output}
    tensors: dict[str, Tensor] = {}
    for name, value in output.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, (list, tuple)):
            tensors.update({f"{name}_{i}": part for i, part in enumerate(value) if isinstance(part, Tensor)})
    return tensors


def _example_images(base: nn.Module) -> dict[str, Tensor]:
    config: Any = getattr(base, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if size is None:
        raise ValueError(
            f"{type(base).__name__} does not say how large its images are: pass "
            "example_inputs={'pixel_values': torch.zeros(2, 3, height, width)}."
        )
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {"pixel_values": torch.zeros(2, getattr(config, "num_channels", 3), height, width)}


def _example_adapter(layout: GraphLayout, batch: int, one_class_more: Sequence[Head] = ()) -> dict[str, Tensor]:
    """Inputs of three adapters with five rows, and the classes of the base model, in some heads one more."""
    adapters, rows = 3, 5
    inputs = {"adapter_index": torch.arange(batch) % adapters}
    for number, group in enumerate(layout.groups):
        size = len(group.attentions), adapters, group.heads, rows
        inputs[layout.name("keys", number)] = torch.zeros(*size, group.key_dim)
        inputs[layout.name("values", number)] = torch.zeros(*size, group.value_dim)
    inputs["row_bias"] = torch.zeros(layout.num_attentions, adapters, rows)
    for number, head in enumerate(layout.heads):
        for name, shape in head.shapes.items():
            if head in one_class_more:
                shape = (shape[0] + 1, *shape[1:])
            inputs[layout.head_name(number, name)] = torch.zeros(*([adapters] if head.per_sample else []), *shape)
    return inputs


def _with_fixed_heads(graph: BackboneGraph, layout: GraphLayout, images: dict[str, Tensor]) -> GraphLayout:
    """The layout, in which a linear head whose output the model goes on with has a fixed size: tried, not guessed."""
    heads, batch = list(layout.heads), len(next(iter(images.values())))
    for size in {_size_of(head) for head in heads if head.any_classes}:
        alike = [head for head in heads if head.any_classes and _size_of(head) == size]
        try:
            graph(images, _example_adapter(layout, batch, one_class_more=alike))
        except RuntimeError:  # of shapes that do not fit
            heads = [dataclasses.replace(head, any_classes=False) if head in alike else head for head in heads]
    return dataclasses.replace(layout, heads=tuple(heads))


def _size_of(head: Head) -> int:
    return next(iter(head.shapes.values()))[0]


def _dynamic(layout: GraphLayout, images: dict[str, Tensor], adapter: dict[str, Tensor]) -> dict[str, Any]:
    """Which dimensions of the inputs may have any size: images, adapters, rows, and classes of linear heads."""
    batch, adapters, rows = (torch.export.Dim(name, min=0) for name in ("batch", "adapters", "rows"))
    shapes: dict[str, dict[int, Any]] = {"adapter_index": {0: batch}, "row_bias": {1: adapters, 2: rows}}
    for number in range(len(layout.groups)):
        for what in ("keys", "values"):
            shapes[layout.name(what, number)] = {1: adapters, 3: rows}
    classes: dict[int, Any] = {}  # heads with as many classes keep to that: DeiT averages two
    for number, head in enumerate(layout.heads):
        of_head = {0: adapters} if head.per_sample else {}
        if head.any_classes:
            of_head[1] = classes.setdefault(_size_of(head), torch.export.Dim(f"classes_{_size_of(head)}", min=0))
        shapes.update({layout.head_name(number, name): of_head for name in head.shapes})
    return {"images": {name: {0: batch} for name in images}, "adapter": {name: shapes[name] for name in adapter}}


def export_backbone(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "onnx",
    example_inputs: dict[str, Tensor] | None = None,
) -> GraphLayout:
    """Writes the frozen backbone as one graph that takes adapters as inputs, another one for every sample.

    The graph is in float32 and holds no adapter. Beside it lie `backbone.json`, the `GraphLayout`, and
    `base.safetensors`, the head of the model as it was before adapters (`"__base__"`). Where heads are linear layers,
    as in classification, samples have heads of their own too. Other heads (maps, boxes) are part of the graph with
    their weights as inputs, the same for all samples of a batch.

    ```python
    export_backbone(model, "exported")
    export_adapter(model, "pets", "exported/pets.safetensors")
    bank = AdapterBank("exported")
    bank.add("pets", "exported/pets.safetensors")
    session = onnxruntime.InferenceSession("exported/backbone.onnx")
    [logits] = session.run(["logits"], {"pixel_values": pixels, **bank.inputs(["pets", "__base__"])})
    ```

    Args:
        model: a PEFT model with E2VPT, or a model without adapters; it stays as it is.
        path: folder to write to.
        format: `"onnx"`, or `"torch"` for a program of `torch.export`.
        example_inputs: inputs of the model, (2, ...) each, where images alone are not enough. Their first dimension
            may have any size in the graph, all others are fixed.

    Returns:
        The layout of the graph.

    Raises:
        ValueError: the model cannot take prompts, an adapter is in shallow mode, the format is unknown, or the size of
            the images is.
    """
    if format not in GRAPH_FILES:
        raise ValueError(f"format is {format!r}: choose one of {', '.join(map(repr, GRAPH_FILES))}.")
    folder = Path(path)
    layout = layout_of(model)
    images = example_inputs if example_inputs is not None else _example_images(base_of(model))
    graph = BackboneGraph(model, layout).float().cpu()
    images = {name: value.float() if value.is_floating_point() else value for name, value in images.items()}
    batch = len(next(iter(images.values())))
    if batch < 2:
        raise ValueError("example_inputs hold a single sample: pass two or more, so that their number stays free.")
    adapter = _example_adapter(layout, batch)
    with torch.no_grad():
        outputs = tuple(graph(images, adapter))
        layout = _with_fixed_heads(graph, layout, images)
    layout = dataclasses.replace(layout, images={k: tuple(v.shape[1:]) for k, v in images.items()}, outputs=outputs)
    dynamic = _dynamic(layout, images, adapter)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        program = torch.export.export(
            graph,
            (images, adapter),
            dynamic_shapes=dynamic,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    if format == "onnx":
        names = [*images, *adapter]
        written = torch.onnx.export(
            program, (), input_names=names, output_names=list(outputs), dynamo=True, verbose=False
        )
        assert written is not None
        written.save(folder / GRAPH_FILES[format])
    else:
        torch.export.save(program, folder / GRAPH_FILES[format])
    (folder / LAYOUT_FILE).write_text(layout.to_json(), encoding="utf-8")
    write_adapter(folder / BASE_FILE, layout, BASE, list(layout.labels), _heads_of_base(graph, layout))
    return layout


def _heads_of_base(graph: BackboneGraph, layout: GraphLayout) -> dict[str, Tensor]:
    """The tensors of the heads that the model had without adapters, by their names in an adapter's file."""
    tensors = {}
    for head in layout.heads:
        given: Any = graph.base.get_submodule(head.path)
        tensors.update({f"head.{head.path}.{name}": tensor for name, tensor in tensors_of(given.original).items()})
    return tensors
