# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`export_adapter`: an adapter as the rows and the head that an exported backbone takes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..tuner.heads import HeadWrapper, classes_shown, wrappers
from ..tuner.prompt_layers import prompt_layers
from ..tuner.prompts import as_scored, rows_of_constants
from .layout import FORMAT, GraphLayout, base_of, class_names, layout_of, tensors_of


KIND = "peft_e2vpt exported adapter"
NO_ROW = -1e4  # bias of a row that is not there: its weight is exactly 0, in half precision too
Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class AdapterRows:
    """An adapter, of P rows in its fullest attention.

    Attributes:
        name: its name where it was exported.
        labels: its classes, in the order of the logits.
        keys: (L, H, P, d) for every group of attentions.
        values: (L, H, P, d) for every group.
        bias: (L, P) over the attentions of all groups.
        heads: the tensors of every head by name.
    """

    name: str
    labels: tuple[str, ...]
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    bias: Array
    heads: tuple[dict[str, Array], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        arrays = (*self.keys, *self.values, self.bias, *(array for head in self.heads for array in head.values()))
        return sum(array.nbytes for array in arrays)


@torch.no_grad()
def _tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Rows (H, P, d) and biases (P,) by the number of the attention, and the tensors of the heads."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in prompt_layers(model):
        if adapter_name not in layer.e2vpt_config or not layer.num_rows(adapter_name):
            continue
        constants = rows_of_constants(layer, adapter_name, layer.computed_rows(adapter_name))
        rows = as_scored(layer.site, constants)
        tensors[f"rows.{layer.index}.keys"], tensors[f"rows.{layer.index}.values"] = rows.key[0], rows.value[0]
        if rows.score_bias is not None:
            tensors[f"rows.{layer.index}.bias"] = rows.score_bias[0]
    for path, wrapper in wrappers(base_of(model)):
        assert isinstance(wrapper, HeadWrapper)
        head = wrapper.of_adapter(adapter_name)
        tensors.update({f"head.{path}.{name}": tensor for name, tensor in tensors_of(head).items()})
    return tensors


def write_adapter(
    path: Path, layout: GraphLayout, name: str, labels: list[str], tensors: dict[str, torch.Tensor]
) -> None:
    """Writes what `read_adapter` reads, in float32; classes without a name each get their number."""
    count = _num_classes(layout, tensors)
    if count is not None and len(labels) != count:
        labels = [str(number) for number in range(count)]
    metadata = {
        "kind": KIND,
        "format": str(FORMAT),
        "name": name,
        "fingerprint": layout.fingerprint,
        "labels": json.dumps(labels),
    }
    save_file(_in_float32(tensors), path, metadata)


def _num_classes(layout: GraphLayout, tensors: Mapping[str, torch.Tensor | Array]) -> int | None:
    """The classes of the first head, where samples have heads of their own."""
    if not layout.heads or not layout.per_sample_heads:
        return None
    return len(tensors[f"head.{layout.heads[0].path}.weight"])


def _in_float32(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cpu", torch.float32).contiguous().clone() for name, tensor in tensors.items()}


def export_adapter(model: nn.Module, adapter_name: str, path: str | Path) -> Path:
    """Writes an adapter as data for an exported backbone: its key and value rows, and its head, in float32.

    Rows do not depend on the image, so the norms and projections between prompts and rows are not needed to serve an
    adapter. Pruned prompts are left out. See `export_backbone` for the graph, `AdapterBank` for many adapters.

    Args:
        model: a PEFT model with E2VPT.
        adapter_name: an adapter of it in deep mode.
        path: of a `.safetensors` file; or of an `.onnx_adapter` file, ONNX Runtime's own format, which
            `RunOptions.add_active_adapter` takes for all samples of a run (needs onnxruntime): in C, C++, C# and Java.
            `InferenceSession.run` of Python asks for these inputs all the same; give it those of an `AdapterBank`.

    Returns:
        The path.

    Raises:
        ValueError: the adapter does not exist, is in shallow mode or has values that are not finite, or the ending of
            the path is neither.
    """
    path = Path(path)
    layout = layout_of(model)
    known = sorted({name for layer in prompt_layers(model) for name in layer.e2vpt_config})
    if adapter_name not in known:
        raise ValueError(f"Adapter {adapter_name} does not exist; the model has {', '.join(known) or 'none'}.")
    if path.suffix not in (".safetensors", ".onnx_adapter"):
        raise ValueError(f"An adapter is written as .safetensors or .onnx_adapter, got {path.name}.")
    tensors = _tensors(model, adapter_name)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"The adapter {adapter_name!r} has values that are not finite, in {broken[0]}.")
    with classes_shown(model, adapter_name):
        labels = class_names(base_of(model))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".onnx_adapter":
        arrays = {name: tensor.numpy() for name, tensor in _in_float32(tensors).items()}
        _write_for_onnxruntime(layout, arranged(layout, arrays, adapter_name, labels), path)
        return path
    write_adapter(path, layout, adapter_name, labels, tensors)
    return path


def _write_for_onnxruntime(layout: GraphLayout, adapter: AdapterRows, path: Path) -> None:
    import onnxruntime as ort

    parameters = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in tables(layout, [adapter]).items()}
    file = ort.AdapterFormat()
    file.set_adapter_version(FORMAT)
    file.set_model_version(zlib.crc32(layout.fingerprint.encode()) >> 1)
    file.set_parameters(parameters)
    file.export_adapter(str(path))


def read_adapter(layout: GraphLayout, path: str | Path) -> AdapterRows:
    """Reads what `export_adapter` has written as `.safetensors`, and checks it against a backbone.

    Raises:
        ValueError: the file is damaged, is no exported adapter, or does not fit the backbone.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise ValueError(
                    f"{path} is not an exported adapter: write one with peft_e2vpt.export.export_adapter(model, "
                    "name, path)."
                )
            if metadata["format"] != str(FORMAT):
                raise ValueError(f"{path} is of another version, {metadata['format']}: upgrade peft_e2vpt.")
            if metadata["fingerprint"] != layout.fingerprint:
                raise ValueError(
                    f"{path} was trained on another backbone than the exported one: export it from a model on the "
                    "same checkpoint."
                )
            _check_shapes(layout, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, path)
            for name in file.keys():
                if file.get_slice(name).get_dtype() != "F32":
                    raise ValueError(f"{path}: {name} is of {file.get_slice(name).get_dtype()} instead of F32.")
            arrays: dict[str, Array] = {name: file.get_tensor(name) for name in file.keys()}
            labels = json.loads(metadata["labels"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as an exported adapter: {error}.") from error
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"{path}: {broken[0]} has values that are not finite.")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: labels is not a list of names.")
    if _num_classes(layout, arrays) not in (None, len(labels)):
        raise ValueError(f"{path} names {len(labels)} classes, but its head has {_num_classes(layout, arrays)}.")
    return arranged(layout, arrays, metadata["name"], labels)


def _check_shapes(layout: GraphLayout, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Checks, before anything is read, that an adapter's tensors are those of the backbone, and of its sizes."""
    expected: dict[str, tuple[int | None, ...]] = {}
    for group in layout.groups:
        for number in group.attentions:
            expected[f"rows.{number}.keys"] = (group.heads, None, group.key_dim)
            expected[f"rows.{number}.values"] = (group.heads, None, group.value_dim)
            expected[f"rows.{number}.bias"] = (None,)
    heads: dict[str, tuple[int | None, ...]] = {}
    for head in layout.heads:
        names = {f"head.{head.path}.{name}": shape for name, shape in head.shapes.items()}
        if head.per_sample and len({shapes[name][:1] for name in names if name in shapes}) > 1:
            raise ValueError(f"{path}: weight and bias of the head {head.path} are not of as many classes.")
        heads.update({name: (None, *shape[1:]) if head.any_classes else shape for name, shape in names.items()})
    expected.update(heads)
    for name, shape in shapes.items():
        wanted = expected.get(name)
        if (
            wanted is None
            or len(wanted) != len(shape)
            or any(w not in (None, s) for w, s in zip(wanted, shape, strict=True))
        ):
            needed = "no such tensor" if wanted is None else f"({', '.join(str(w or 'any') for w in wanted)})"
            raise ValueError(f"{path}: {name} has shape {shape}, but the backbone takes {needed}.")
    missing = sorted(heads.keys() - shapes.keys())
    if missing:
        raise ValueError(f"{path} has no {missing[0]}, which the backbone takes from every adapter.")
    for name, shape in shapes.items():
        parts = [shapes.get(name.rpartition(".")[0] + f".{kind}") for kind in ("keys", "values")]
        if name.startswith("rows.") and {p and p[1] for p in parts} != {shape[0] if len(shape) == 1 else shape[1]}:
            raise ValueError(f"{path}: {name} has another number of rows than the keys or values of its attention.")


def arranged(layout: GraphLayout, arrays: dict[str, Any], name: str, labels: list[str]) -> AdapterRows:
    """The tensors of an adapter in the order of the inputs of a graph."""
    counts = {int(key.split(".")[1]): array.shape[1] for key, array in arrays.items() if key.endswith(".keys")}
    most = max(counts.values(), default=0)
    keys, values, biases = [], [], []
    for group in layout.groups:
        size = len(group.attentions), group.heads, most
        key, value = np.zeros((*size, group.key_dim), np.float32), np.zeros((*size, group.value_dim), np.float32)
        bias = np.full((len(group.attentions), most), NO_ROW, np.float32)
        for place, number in enumerate(group.attentions):
            count = counts.get(number, 0)
            if count:
                key[place, :, :count] = arrays[f"rows.{number}.keys"]
                value[place, :, :count] = arrays[f"rows.{number}.values"]
                bias[place, :count] = arrays.get(f"rows.{number}.bias", 0.0)
        keys.append(key)
        values.append(value)
        biases.append(bias)
    heads = tuple({kind: arrays[f"head.{head.path}.{kind}"] for kind in head.shapes} for head in layout.heads)
    return AdapterRows(name, tuple(labels), tuple(keys), tuple(values), np.concatenate(biases), heads)


def _filled_up(arrays: list[Array], axis: int, size: int, value: float) -> Array:
    """Arrays side by side in a new second or first dimension, each filled up to a size along an axis."""
    widths = [[(0, size - array.shape[axis] if a == axis else 0) for a in range(array.ndim)] for array in arrays]
    padded = [
        np.pad(a, w, constant_values=value) if any(map(any, w)) else a for a, w in zip(arrays, widths, strict=True)
    ]
    return np.stack(padded)


def tables(layout: GraphLayout, adapters: list[AdapterRows]) -> dict[str, Array]:
    """The inputs of a graph for A adapters, without `adapter_index`; see `GraphLayout`.

    Raises:
        ValueError: the heads of the adapters are not linear, and there are several.
    """
    most = max(adapter.bias.shape[1] for adapter in adapters)
    inputs: dict[str, Array] = {}
    for number in range(len(layout.groups)):
        for what in ("keys", "values"):
            parts = [getattr(adapter, what)[number] for adapter in adapters]
            inputs[layout.name(what, number)] = _filled_up(parts, 2, most, 0.0).swapaxes(0, 1)
    inputs["row_bias"] = _filled_up([adapter.bias for adapter in adapters], 1, most, NO_ROW).swapaxes(0, 1)
    for number, head in enumerate(layout.heads):
        for name in head.shapes:
            parts = [adapter.heads[number][name] for adapter in adapters]
            if head.per_sample:
                widest = max(len(part) for part in parts)
                fill = 0.0 if name == "weight" else -np.inf
                inputs[layout.head_name(number, name)] = _filled_up(parts, 0, widest, fill)
            elif len(parts) == 1:
                inputs[layout.head_name(number, name)] = parts[0]
            else:
                raise ValueError(
                    f"The head {head.path} is not a linear layer, so all samples of a batch have the same: run one "
                    f"batch for each of {', '.join(adapter.name for adapter in adapters)}."
                )
    return {name: np.ascontiguousarray(array) for name, array in inputs.items()}
