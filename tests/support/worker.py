# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What every process of `test_processes.py` does: `torchrun --nproc_per_node 2 -m tests.support.worker OUT`.

Every process writes `OUT/rank{rank}.pt`, a dictionary of what it found.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from transformers import Trainer

from peft_e2vpt import (
    PruneRewindCallback,
    RecipeCallback,
    apply_gates,
    cache_frozen_prefix,
    fold_heads,
    prune,
    rewind,
    score_prompts,
    search_pruning,
    start_heads,
    trained_tensors,
)
from peft_e2vpt.training.head_start import trained_layers
from tests.support.training import HALF, Images, Watch, adapted, history_of, state_of, trainer_for


PLAIN: dict[str, Any] = {
    "train_dataset": Images(21, dtype=torch.float64),
    "eval_dataset": Images(9, seed=4, dtype=torch.float64),
    "dataloader_drop_last": True,  # as many samples in every step as in one process
}
SAVING = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}


def shares(dataset: Any, rank: int, size: int, batch_size: int = 4) -> DataLoader:
    """The samples of one process, some in a smaller batch; the first may have one more."""
    return DataLoader(Subset(dataset, range(rank, len(dataset), size)), batch_size)


def scores_and_search(rank: int, size: int, wrap: Any = lambda model: model) -> dict[str, Any]:
    model = wrap(adapted("swin", dtype=torch.float64))
    scores = score_prompts(model, shares(PLAIN["train_dataset"], rank, size))
    signed = score_prompts(model, shares(PLAIN["train_dataset"], rank, size), signed=True)
    search = search_pruning(model, scores, shares(PLAIN["eval_dataset"], rank, size))
    nothing: list[Any] = [] if rank else list(shares(PLAIN["train_dataset"], 0, 1))
    alone = score_prompts(model, nothing)  # the second process has no samples
    return {
        "scores": (scores.token, scores.segment, scores.num_samples),
        "signed": signed.token,
        "alone": (alone.token, alone.num_samples),
        "search": (search.candidates, search.chosen, search.gates.segment),
    }


def sharded(rank: int, size: int) -> dict[str, Any]:
    """The functions on a model whose parameters FSDP2 shards; the first process has more batches than the second."""
    training, validation = Images(20, dtype=torch.float64), Images(9, seed=4, dtype=torch.float64)
    model = adapted("swin", dtype=torch.float64, visual_prompt_dropout=0.0)
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for module in list(model.modules()):
            if type(module).__name__ == "SwinLayer":
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    start = trained_tensors(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, weight_decay=0.1, momentum=0.9)

    def train() -> None:
        for batch in shares(training, rank, size, 10 // size):
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
            optimizer.step()

    train()
    scores = score_prompts(model, shares(Images(21, dtype=torch.float64), rank, size, 5))
    search = search_pruning(model, scores, shares(validation, rank, size))
    model.eval()(**next(iter(shares(validation, rank, size))))  # leaves gathered parameters behind
    apply_gates(model, prune(scores, 0.5, 0.25))
    with torch.no_grad():
        model.eval()(**next(iter(shares(validation, rank, size))))
    rewind(model, start)
    optimizer.state.clear()
    train()
    trained_values = trained_tensors(model)
    refusal = ""
    try:
        score_prompts(model, [] if rank == size - 1 else shares(training, 0, 1))
    except ValueError as error:
        refusal = str(error)
    return {
        "scores": scores,
        "search": (search.candidates, search.chosen),
        "trained": trained_values,
        "without data": refusal,
    }


def heads(rank: int, size: int, shard: bool) -> dict[str, Any]:
    """What trains after `start_heads`; the first process has more images than the second."""
    model = adapted("swin", dtype=torch.float64, visual_prompt_dropout=0.0)
    if shard and size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for layer in trained_layers(model).values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    start = start_heads(model, shares(PLAIN["train_dataset"], rank, size))
    fold_heads(model)
    return {"start": start, "trained": trained_tensors(model)}


def recipe(folder: Path, processes: int, resume: int | None = None) -> dict[str, Any]:
    """A pruned run whose head starts as a linear probe."""
    pruning = PruneRewindCallback(**HALF)
    return run(folder, processes, pruning, resume, callbacks=(RecipeCallback(),), **SAVING)


def last_layer(folder: Path, processes: int, cached: bool) -> dict[str, Any]:
    """A pruned run with prompts in the last layer; hidden states before it are written by one process, read by all."""
    model = adapted(dtype=torch.float64, visual_prompt_dropout=0.0, layers_to_transform=[1])
    found = {name: PLAIN[name] for name in ("train_dataset", "eval_dataset")}
    if cached:
        with PartialState().main_process_first():
            found = {n: cache_frozen_prefix(model, images, folder=folder / n) for n, images in found.items()}
    return run(folder / "run", processes, PruneRewindCallback(**HALF), model=model, **found)


def run(
    folder: Path,
    processes: int,
    callback: PruneRewindCallback,
    resume: int | None = None,
    dropout: float = 0.0,
    model: PeftModel | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """A training with 4 samples a step, whatever the number of processes; pruned after 10 of 20 steps."""
    watch = Watch()
    if model is None:
        model = adapted(dtype=torch.float64, visual_prompt_dropout=dropout, **({"seed": 9} if resume else {}))
    distributed = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False} if processes > 1 else {}
    trainer: Trainer = trainer_for(
        folder,
        callback,
        model,
        watch,
        per_device_train_batch_size=4 // processes,
        **{**PLAIN, **distributed, **settings},
    )
    assert trainer.args.world_size == processes, trainer.args.world_size
    trainer.train(f"{folder}/checkpoint-{resume}" if resume else None)
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (processes > 1)
    return {
        "state": state_of(trainer.model),
        "boundary": watch.values.get(10),
        "history": history_of(trainer),
        "report": callback.report,
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    found["search_run"] = run(out / "search", 2, PruneRewindCallback())  # starts the process group, too
    rank = dist.get_rank()
    assert dist.get_world_size() == 2 and dist.get_backend() == "gloo" and os.environ["WORLD_SIZE"] == "2"
    found["functions"] = scores_and_search(rank, 2)
    found["wrapped"] = scores_and_search(rank, 2, DistributedDataParallel)
    found["sharded"] = sharded(rank, 2)
    found["straight"] = run(out / "straight", 2, PruneRewindCallback(**HALF), dropout=0.1, **SAVING)
    for step in (15, 10, 5):
        dist.barrier()
        callback = PruneRewindCallback(**HALF)
        found[f"resumed{step}"] = run(out / "straight", 2, callback, step, dropout=0.1, **SAVING)
    found["heads"], found["sharded heads"] = heads(rank, 2, shard=False), heads(rank, 2, shard=True)
    found["recipe"] = recipe(out / "recipe", 2)
    dist.barrier()
    found["recipe resumed"] = recipe(out / "recipe", 2, 5)
    found["cached"] = last_layer(out / "cached", 2, cached=True)
    bare = PruneRewindCallback(5, "steps", prune_tokens=1.0, min_tokens=0)
    found["bare"] = run(out / "bare", 2, bare, max_steps=8)
    torch.save(found, out / f"rank{rank}.pt")
    gc.collect()  # a DDP model that is alive when its process group is destroyed may hang
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
