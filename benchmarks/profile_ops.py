# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Counts the operations of a forward pass and of a training step, and lists the tensors that a step saves.

    python -m benchmarks.profile_ops              # ViT-B/16 at 224 pixels, batches of 1 and 8, M=10, n=5
    python -m benchmarks.profile_ops --image_size 32 --batch_sizes 1        # the same operations, in less time

Counts do not depend on what else the machine does. An operation is what torch dispatches: views count, and so does
each of those that a backward pass consists of. Saved tensors are those that autograd keeps from forward to backward,
each storage once, without the parameters and buffers.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.baselines import METHODS
from benchmarks.timing import build_on, forward_pass, make_batch, parser_of, training_step, use_smallest, write


MATRIX_PRODUCTS = ("addmm", "mm", "bmm")
COPIES = ("cat", "clone", "copy_", "_to_copy", "index_select", "slice_backward")


class _Log(TorchDispatchMode):
    """Counts the operations that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], None]) -> Counter[str]:
    """The operations of a run by name; the run before it, which makes an optimizer's state, is not counted."""
    run()
    with _Log() as log:
        run()
    return log.count


def saved_tensors(model: nn.Module, batch: dict[str, Tensor]) -> dict[tuple[str, tuple[int, ...]], list[int]]:
    """What the forward pass of a step saves: by the node that made it and shape, bytes of each storage."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch.values())}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            found.setdefault(pointer, tensor)
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    sizes: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for tensor in found.values():
        made_by = tensor.grad_fn.name().removesuffix("0") if tensor.grad_fn is not None else "no gradient"
        sizes.setdefault((made_by, tuple(tensor.shape)), []).append(tensor.untyped_storage().nbytes())
    loss.backward()  # frees them
    return sizes


def _print_saved(method: str, size: int, sizes: dict[tuple[str, tuple[int, ...]], list[int]]) -> float:
    total = sum(sum(storages) for storages in sizes.values()) / 2**20
    print(f"\nSaved by a training step, {method}, batch {size}: {total:.1f} MiB\n\n| made by | shape | number | MiB |")
    print("|---|---|---:|---:|")
    for (made_by, shape), storages in sorted(sizes.items(), key=lambda item: -sum(item[1]))[:12]:
        print(f"| {made_by} | {shape} | {len(storages)} | {sum(storages) / 2**20:.1f} |")
    return total


def _print_operations(work: str, size: int, counts: dict[str, Counter[str]]) -> None:
    print(f"\nOperations, {work}, batch {size}\n\n| | all | matrix products | copies |\n|---|---:|---:|---:|")
    for method, count in counts.items():
        products, copies = (sum(count[name] for name in names) for names in (MATRIX_PRODUCTS, COPIES))
        print(f"| {method} | {count.total():,} | {products} | {copies} |")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "e2vpt merged"], default=[*METHODS, "e2vpt merged"])
    args: argparse.Namespace = parser.parse_args()
    if args.smoke:
        use_smallest(args)
    for size in args.batch_sizes:
        batch = make_batch(size, args.image_size, args.device)
        trained = [name for name in args.methods if name not in ("plain", "e2vpt merged")]
        forwards = {name: operations(forward_pass(build_on(name, args), batch, args)) for name in args.methods}
        _print_operations("forward pass", size, forwards)
        steps = {name: operations(training_step(build_on(name, args), batch, args)) for name in trained}
        _print_operations("training step", size, steps)
        saved = {name: _print_saved(name, size, saved_tensors(build_on(name, args), batch)) for name in trained}
        results = [
            {"method": name, "forward": forwards[name].total()}
            | ({"step": steps[name].total(), "saved_mib": saved[name]} if name in trained else {})
            for name in args.methods
        ]
        write(results, args, measured="operations", batch_size=size)


if __name__ == "__main__":
    main()
