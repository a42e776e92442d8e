# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Times batches that mix adapters: this package beside LoRA, in PyTorch and in onnxruntime, all in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.serving --output serving.jsonl    # ViT-S/16 at 224 pixels, M=10, n=5
    OMP_NUM_THREADS=1 python -m benchmarks.serving --full                    # a batch of 64 too
    python -m benchmarks.serving --device cuda                               # float only; needs onnxruntime-gpu
    python -m benchmarks.serving_table serving.jsonl                         # the tables

| method | what it is |
|---|---|
| plain, onnx | the exported backbone without adapters: what all ratios refer to |
| plain, torch | the same in PyTorch |
| plain, onnx int8 | the same, quantised dynamically by onnxruntime |
| e2vpt, torch | `model(adapter_names=...)` with constants (`merge_adapter`) |
| e2vpt, onnx; e2vpt, onnx int8 | `export_backbone` and an `AdapterBank` |
| lora, torch | PEFT's mixed batch, `model(adapter_names=...)`, r=8 on queries and values |
| lora, onnx inputs | a graph that takes the matrices A and B of every sample as inputs, as ours takes rows |
| lora, onnx merged | a model of its own for every task, and a run for every adapter in the batch |

Every round has other adapters out of all, and making the inputs of the graph from their names is part of the time. The
merged models are in truth one, run several times: their time is that of many, their memory is counted as that of many.
Weights are random, heads have 100 classes. Answers in float are compared with those of PyTorch before anything is
timed.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from benchmarks.baselines import build
from benchmarks.mixed_batches import add_adapters
from benchmarks.timing import machine, make_batch, parser_of, print_ratios, records, take_turns, use_smallest, write
from examples.quantize_backbone import quantize
from peft_e2vpt.export import AdapterBank, export_adapter, export_backbone


REFERENCE = "plain, onnx"
RANK, SCALE = 8, 1.0  # of LoRA: PEFT's defaults
Array = np.ndarray[Any, Any]
Answer = Callable[[Tensor, list[str]], Array]


@dataclass
class System:
    """A way to serve.

    Attributes:
        answer: runs a batch of images (B, 3, S, S) with one adapter name for each; returns logits (B, 100).
        adapter_bytes: memory that one more adapter takes.
        backbone_bytes: memory that the backbone takes.
        add: adds an adapter, from its file to ready.
    """

    answer: Answer
    backbone_bytes: int
    adapter_bytes: int = 0
    add: Callable[[], Any] | None = None


# --------------------------------------------------------------------------------------------------------- onnxruntime
def session_of(path: Path, args: Namespace) -> ort.InferenceSession:
    """Opens a graph, on as many threads as PyTorch has."""
    providers = ["CPUExecutionProvider"]
    if torch.device(args.device).type == "cuda":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise SystemExit("onnxruntime has no CUDA here: pip install onnxruntime-gpu in place of onnxruntime.")
        providers.insert(0, "CUDAExecutionProvider")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return ort.InferenceSession(path, options, providers=providers)


def answer_of(session: ort.InferenceSession, inputs: Callable[[list[str]], dict[str, Array]]) -> Answer:
    """Answers by a graph, whose inputs besides the images come from names."""

    def answer(pixels: Tensor, names: list[str]) -> Array:
        [logits] = session.run(["logits"], {"pixel_values": pixels.numpy(), **inputs(names)})
        return np.asarray(logits)

    return answer


class Logits(nn.Module):
    """A model whose answer is a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns logits."""
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits


class GivenMatrices(nn.Module):
    """A linear layer with LoRA, whose matrices (B, D, r) and (B, r, D) are set from outside for every sample."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.matrices: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Adds both products."""
        assert self.matrices is not None
        product: Tensor = self.linear(hidden) + hidden @ self.matrices[0] @ self.matrices[1]
        return product


class LoraGraph(nn.Module):
    """A plain ViT that takes LoRA as inputs, in tables like those of `GraphLayout`.

    Args:
        model: a ViT with a linear head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.vit: Any = model.vit
        self.adapted: list[GivenMatrices] = []
        for name, module in list(self.vit.named_modules()):
            if name.endswith(("q_proj", "v_proj")):
                self.adapted.append(GivenMatrices(module))
                self.vit.set_submodule(name, self.adapted[-1])

    def forward(self, pixels: Tensor, index: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Runs a batch; `index` (B,), `a` (L, A, D, r), `b` (L, A, r, D), `weight` (A, C, D), `bias` (A, C)."""
        a, b, weight, bias = a[:, index], b[:, index], weight[index], bias[index]
        for number, module in enumerate(self.adapted):
            module.matrices = a[number], b[number]
        hidden: Tensor = self.vit(pixels).last_hidden_state[:, 0]
        return torch.einsum("bcd,bd->bc", weight, hidden) + bias


def write_graph(model: nn.Module, inputs: dict[str, Tensor], dynamic: dict[str, dict[int, str]], path: Path) -> Path:
    """Exports a module to ONNX."""
    dims = {name: torch.export.Dim(name, min=1) for name in {d for shape in dynamic.values() for d in shape.values()}}
    shapes = tuple({place: dims[name] for place, name in dynamic[key].items()} for key in inputs)
    with torch.no_grad():
        program = torch.onnx.export(
            model.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path)
    return path


def write_plain(model: nn.Module, pixels: Tensor, path: Path) -> Path:
    """Exports a model that takes images alone."""
    return write_graph(Logits(model), {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}, path)


# ------------------------------------------------------------------------------------------------------------- systems
def torch_answer(model: nn.Module, device: str) -> Answer:
    """Answers by a model in PyTorch; one without adapters takes no names."""

    @torch.no_grad()
    def answer(pixels: Tensor, names: list[str]) -> Array:
        kwargs = {"adapter_names": names} if isinstance(model, PeftModel) else {}
        return np.asarray(model(pixel_values=pixels.to(device), **kwargs).logits.cpu())

    return answer


def bytes_of(tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def loader_of(model: PeftModel, name: str, folder: Path) -> Callable[[], Any]:
    """Loads a saved adapter into a model in PyTorch, under another name each time."""
    model.save_pretrained(str(folder), selected_adapters=[name])
    number = itertools.count()

    def load() -> None:
        model.load_adapter(str(folder / name), adapter_name=f"added{next(number)}")

    return load


def e2vpt_systems(args: Namespace, names: list[str], folder: Path) -> dict[str, System]:
    """This package, with adapters of the given names."""
    sizes = (args.backbone, args.image_size, args.num_visual_prompts, args.num_kv_prompts)
    model = build("e2vpt", *sizes).eval()
    assert isinstance(model, PeftModel)
    add_adapters(model, "task", len(names))
    exported = folder / "e2vpt"
    export_backbone(model, exported)
    files = {name: export_adapter(model, name, folder / "adapters" / f"{name}.safetensors") for name in names}
    model.eval().merge_adapter(names)
    prompts = [p for name, p in model.named_parameters() if f".{names[0]}" in f"{name}."]
    folders = {"e2vpt, onnx": exported}
    if torch.device(args.device).type == "cpu":
        quantize(exported, folder / "e2vpt-int8")
        folders["e2vpt, onnx int8"] = folder / "e2vpt-int8"
    systems = {}
    for kind in folders:
        bank = AdapterBank(folders[kind])
        for name, file in files.items():
            bank.add(name, file)
        systems[kind] = System(
            answer_of(session_of(folders[kind] / "backbone.onnx", args), bank.inputs),
            (folders[kind] / "backbone.onnx").stat().st_size,
            bank.nbytes // len(bank),
            lambda bank=bank, file=files[names[0]]: bank.add("added", file),
        )
    model.to(args.device)
    backbone = bytes_of(p for name, p in model.named_parameters() if "e2vpt" not in name and "modules" not in name)
    answer = torch_answer(model, args.device)
    systems["e2vpt, torch"] = System(
        answer, backbone, bytes_of(prompts), loader_of(model, names[0], folder / "e2vpt-saved")
    )
    return systems


def lora_systems(args: Namespace, names: list[str], folder: Path) -> dict[str, System]:
    """LoRA as PEFT mixes it, as inputs of a graph, and merged."""
    model: Any = build("lora", args.backbone, args.image_size, 0, 0).eval()
    for name in names:
        config = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        model.add_adapter(name, config)
    state = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in state.items():
            if "lora_B" in key:
                parameter.normal_(std=0.02)
    (folder / "lora").mkdir()
    files, pixels = {}, make_batch(2, args.image_size)["pixel_values"]
    for name in names:
        a = [p.detach().T for key, p in state.items() if f"lora_A.{name}." in key]
        b = [
            p.detach().T * model.base_model.model.vit.layers[0].attention.q_proj.scaling[name]
            for key, p in state.items()
            if f"lora_B.{name}." in key
        ]
        weight, bias = (
            state[f"base_model.model.classifier.modules_to_save.{name}.{kind}"] for kind in ("weight", "bias")
        )
        tensors = {"lora_a": torch.stack(a), "lora_b": torch.stack(b), "head_weight": weight, "head_bias": bias}
        files[name] = folder / "lora" / f"{name}.safetensors"
        save_file({k: np.ascontiguousarray(t.detach().numpy()) for k, t in tensors.items()}, files[name])
    store = {name: load_file(file) for name, file in files.items()}
    axes = {"lora_a": 1, "lora_b": 1, "head_weight": 0, "head_bias": 0}

    def inputs(wanted: list[str]) -> dict[str, Array]:
        distinct = list(dict.fromkeys(wanted))
        place = {name: number for number, name in enumerate(distinct)}
        tables = {key: np.stack([store[name][key] for name in distinct], axis) for key, axis in axes.items()}
        return {"adapter_index": np.array([place[name] for name in wanted]), **tables}

    example = {key: torch.from_numpy(value) for key, value in inputs(names[:2]).items()}
    example["adapter_index"] = torch.tensor([0, 1])
    dynamic = {"pixel_values": {0: "batch"}, "adapter_index": {0: "batch"}}
    dynamic |= {key: {axis: "adapters"} for key, axis in axes.items()}
    graph = LoraGraph(build("plain", args.backbone, args.image_size, 0, 0))
    path = write_graph(graph, {"pixel_values": pixels, **example}, dynamic, folder / "lora.onnx")
    merged = write_plain(build("plain", args.backbone, args.image_size, 0, 0), pixels, folder / "merged.onnx")
    each = session_of(merged, args)

    def answer_merged(pixels: Tensor, wanted: list[str]) -> Array:
        logits = np.empty((len(wanted), 100), np.float32)
        for name in dict.fromkeys(wanted):
            rows = [number for number, other in enumerate(wanted) if other == name]
            [logits[rows]] = each.run(["logits"], {"pixel_values": pixels[rows].numpy()})
        return logits

    model.to(args.device)
    lora = [p for key, p in model.named_parameters() if f".{names[0]}." in key]
    backbone = bytes_of(p for key, p in model.named_parameters() if "lora" not in key and "modules" not in key)
    load = loader_of(model, names[0], folder / "lora-saved")
    return {
        "lora, torch": System(torch_answer(model, args.device), backbone, bytes_of(lora), load),
        "lora, onnx inputs": System(
            answer_of(session_of(path, args), inputs),
            path.stat().st_size,
            sum(array.nbytes for array in store[names[0]].values()),
            lambda: store.update(added=load_file(files[names[0]])),
        ),
        "lora, onnx merged": System(answer_merged, 0, merged.stat().st_size, lambda: session_of(merged, args)),
    }


def plain_systems(args: Namespace, folder: Path) -> dict[str, System]:
    """The backbone without adapters."""
    model = build("plain", args.backbone, args.image_size, 0, 0).eval()
    exported = folder / "plain"
    exported.mkdir()
    paths = {REFERENCE: write_plain(model, make_batch(2, args.image_size)["pixel_values"], exported / "backbone.onnx")}
    if torch.device(args.device).type == "cpu":
        paths["plain, onnx int8"] = quantize(exported, folder / "plain-int8")
    systems = {
        name: System(answer_of(session_of(path, args), lambda names: {}), path.stat().st_size)
        for name, path in paths.items()
    }
    answer = torch_answer(model.to(args.device), args.device)
    return {**systems, "plain, torch": System(answer, bytes_of(model.parameters()))}


# ---------------------------------------------------------------------------------------------------------------- runs
def check(systems: dict[str, System], pixels: Tensor, names: list[str]) -> None:
    """Compares the graphs in float with PyTorch."""
    for one, other in (
        ("e2vpt, onnx", "e2vpt, torch"),
        ("lora, onnx inputs", "lora, torch"),
        (REFERENCE, "plain, torch"),
    ):
        ours, theirs = (systems[name].answer(pixels, names) for name in (one, other))
        difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if not difference < 1e-3:
            raise SystemExit(f"{one} and {other} differ by {difference:.1e}: their times tell nothing.")


def rounds_of(answer: Answer, pixels: Tensor, names: list[str]) -> Callable[[], None]:
    """A run of one batch; every call takes the next adapters."""
    next_name = itertools.cycle(names)

    def run() -> None:
        answer(pixels, [next(next_name) for _ in range(len(pixels))])

    return run


def milliseconds(add: Callable[[], Any], times: int) -> float:
    """Median of the time to add an adapter, after one that does not count."""
    measured = []
    for _ in range(times + 1):
        start = time.perf_counter()
        add()
        measured.append(1000 * (time.perf_counter() - start))
    return statistics.median(measured[1:])


def points(args: Namespace) -> Iterator[tuple[int, int]]:
    """Numbers of adapters and batch sizes."""
    yield from itertools.product(args.num_adapters, args.batch_sizes)


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(backbone="vit-s", batch_sizes=[1, 8, 32], rounds=5)
    parser.add_argument("--num_adapters", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--methods", nargs="+", help="time these alone, and the plain backbone. Default: all")
    parser.add_argument("--full", action="store_true", help="with a batch of 64")
    args = parser.parse_args()
    if args.smoke:
        use_smallest(args)
        args.num_adapters = [1, 3]
    if args.full:
        args.batch_sizes = [*args.batch_sizes, 64]
    if args.dtype != "float32" or args.compile:
        parser.error("--dtype and --compile are not for this benchmark: graphs are in float32 or in 8 bit.")
    print(
        f"{args.backbone}, {args.image_size} px, M={args.num_visual_prompts}, n={args.num_kv_prompts}, {machine(args)}"
    )
    names = [f"task{number}" for number in range(max(args.num_adapters))]
    with tempfile.TemporaryDirectory() as folder:
        systems = plain_systems(args, Path(folder))
        systems |= e2vpt_systems(args, names, Path(folder))
        systems |= lora_systems(args, names, Path(folder))
        check(systems, make_batch(4, args.image_size)["pixel_values"], [names[n % len(names)] for n in range(4)])
        timed = {name: systems[name] for name in dict.fromkeys([REFERENCE, *(args.methods or systems)])}
        for count, size in points(args):
            pixels = make_batch(size, args.image_size)["pixel_values"]
            runs = {name: rounds_of(system.answer, pixels, names[:count]) for name, system in timed.items()}
            seconds = take_turns(runs, args.rounds)
            print_ratios(f"{count} adapters, batch {size}", seconds, REFERENCE)
            write(records(seconds, REFERENCE), args, measured="batch", num_adapters=count, batch_size=size)
        sizes = []
        print("\n| | backbone MB | an adapter kB | to add one, ms |\n|---|---:|---:|---:|")
        for name, system in timed.items():
            took = None if system.add is None else milliseconds(system.add, 1 if args.smoke else 5)
            size = {"backbone_bytes": system.backbone_bytes, "adapter_bytes": system.adapter_bytes, "add_ms": took}
            sizes.append({"method": name, **size})
            cell = "" if took is None else f"{took:.1f}"
            print(f"| {name} | {system.backbone_bytes / 1e6:.1f} | {system.adapter_bytes / 1e3:.0f} | {cell} |")
        write(sizes, args, measured="memory", num_adapters=len(names))


if __name__ == "__main__":
    main()
