# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`cache_frozen_prefix`: the frozen layers before the first one that trains run once an image, not once an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers.utils import logging

from ..._compat import device_and_dtype, offload_device
from ...distributed import is_sharded, refuse_flat_parameters
from ...evaluation import batches, no_trace
from ..trainer_data import is_stream
from .data import NUM_TRIED, Data, part
from .outputs import NoCut
from .passing import FrozenPrefix, prefix_of
from .proof import check_that_it_fits, close
from .randomness import refuse_random
from .search import find_prefix
from .storage import CachedDataset, Store, stored


logger = logging.get_logger(__name__)

FORMAT = 1


def cache_frozen_prefix(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 64,
    data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    folder: str | Path | None = None,
) -> CachedDataset:
    """Runs the frozen layers before the first one that trains once an image, and returns a dataset of what they give.

    Train on that dataset as on the images: it has the hidden states under the key of the images, and labels and
    other inputs as they are. Losses and gradients are those of training on the images, and no epoch runs those layers
    again, nor reads and resizes images. What is saved of the model does not change. The model still takes images:
    batches of hidden states are told by their shape. Several datasets of a model, such as one to train on and one to
    validate on, can be cached. `uncache_frozen_prefix` ends it.

    What trains tells where the prefix ends: with prompts or LoRA in the last layers before the first of these, with a
    head alone before the head. It works for E2VPT, other methods of PEFT and plain models. The loss and all gradients
    are compared on a few images before anything is cached, and whatever would make hidden states wrong is refused.

    Hidden states are computed in the precision of the context: for a Trainer with `bf16=True`, call this under
    `torch.autocast("cuda", torch.bfloat16)`. The call leaves modes, gradients and random number generators as they
    were. Of several processes, let one write to a folder that the others then read: `with args.main_process_first():`.

    Example:

        >>> model = get_peft_model(model, E2VPTConfig(layers_to_transform=[6, 7, 8, 9, 10, 11]))
        >>> train = cache_frozen_prefix(model, train)
        >>> Trainer(model, args, train_dataset=train, eval_dataset=validation).train()

    Args:
        model: what will be trained, with everything frozen that stays so.
        dataset: images with a length and an index, as the model takes them: dictionaries such as
            `{"pixel_values": ..., "labels": ...}`, each image the same whenever it is read, all of one size.
        batch_size: images that the prefix runs on at once.
        data_collator: makes a batch of several entries of the dataset, by default as a Trainer does.
        folder: where hidden states go instead of into memory. They are read from there while training, and a later
            call for the same weights and images reads them again.

    Returns:
        A dataset whose entries are dictionaries.

    Raises:
        ValueError: the prefix is not the same for an image in every epoch (random augmentation, dropout, statistics of
            batches), nothing is worth caching, the model reads the hidden states of earlier layers or is sharded,
            images differ in size, hidden states could be taken for images, or the folder holds something else.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if is_stream(dataset):
        raise ValueError(
            f"cache_frozen_prefix needs a dataset with a length and an index, got the stream {type(dataset).__name__}."
        )
    if not len(dataset):
        raise ValueError("cache_frozen_prefix got a dataset without images.")
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    _refuse_spread(model)
    base = _base_of(model)
    data = Data(base, dataset, data_collator)
    with no_trace(model, ()), torch.no_grad():
        device, _ = device_and_dtype(base)
        tried = data.read_twice(device)
        before = prefix_of(base)
        prefix = before if before is not None else find_prefix(model, base, data, tried)
        try:
            if before is not None:
                check_that_it_fits(prefix, model, data, tried)
            like = prefix.hidden_states(partial(model, **data.for_model(tried)))
            if before is None:
                refuse_random(model, prefix, data, tried, like)
            note = _note(prefix, data, tried, like)
            cached = _cache(model, prefix, data, like, note, batch_size, None if folder is None else Path(folder))
        except BaseException as error:
            if before is None:
                prefix.remove()
            if isinstance(error, NoCut):
                raise ValueError(f"{type(base).__name__} cannot begin behind a cache: {error}.") from error
            raise
    size = cached.hidden_states.numel() * cached.hidden_states.element_size()
    logger.info(
        f"Cached {len(cached):,} images behind {prefix.last_module}: {size / 2**20:,.1f} MiB "
        f"{'in memory' if folder is None else f'in {folder}'}, each {list(cached.hidden_states.shape[1:])} "
        f"{str(cached.hidden_states.dtype).removeprefix('torch.')}."
    )
    return cached


def uncache_frozen_prefix(model: nn.Module) -> None:
    """Lets a model take images alone again, as before `cache_frozen_prefix`; without effect on any other model."""
    for module in model.modules():
        prefix = prefix_of(module)
        if prefix is not None:
            prefix.remove()


def _refuse_spread(model: nn.Module) -> None:
    refuse_flat_parameters(model)
    if is_sharded(model):
        raise ValueError("The model is sharded (FSDP, ZeRO-3): call cache_frozen_prefix before that.")
    if offload_device(model) is not None:
        raise ValueError("Accelerate has offloaded weights of the model, so its layers cannot be cached.")


def _base_of(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's, which takes the images."""
    get = getattr(model, "get_base_model", None)
    base: nn.Module = model if get is None else get()
    return base


def _note(prefix: FrozenPrefix, data: Data, tried: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """What hidden states belong to."""
    prefix.note_weights()
    return {
        "format": FORMAT,
        "weights": prefix.checksum,
        "place": prefix.last_module,
        "images": len(data.dataset),
        "fingerprint of images": data.fingerprint(tried),
        "shape": list(like.shape[1:]),
        "type": str(like.dtype),
    }


def _cache(
    model: nn.Module,
    prefix: FrozenPrefix,
    data: Data,
    like: Tensor,
    note: dict[str, Any],
    batch_size: int,
    folder: Path | None,
) -> CachedDataset:
    """The cached dataset, from the folder where it lies there already; `like` are hidden states of some images."""
    found = None if folder is None else stored(folder, data.name, note, like)
    cached = _fill(model, prefix, data, like, note, batch_size, folder) if found is None else found
    same = torch.stack([cached[place][data.name] for place in data.places(NUM_TRIED)]).to(like)
    if not close(same, like, [like], factor=100.0 if like.dtype.itemsize > 2 else 4.0):
        raise ValueError(
            "Hidden states of the same images differ from batch to batch, so they depend on other images of the batch."
            if found is None
            else f"{folder} does not hold the hidden states of these images: pass another folder, or delete this one."
        )
    prefix.shape = tuple(like.shape[1:])
    return cached


def _fill(
    model: nn.Module,
    prefix: FrozenPrefix,
    data: Data,
    like: Tensor,
    note: dict[str, Any],
    batch_size: int,
    folder: Path | None,
) -> CachedDataset:
    count = len(data.dataset)
    store = Store(count, like, folder)
    try:
        others: dict[str, list[Any]] = {}
        done = 0
        loader = DataLoader(Subset(data.dataset, range(count)), batch_size, collate_fn=data.collate)
        for batch in batches(loader, like.device, "Caching the frozen prefix"):
            images = batch.inputs[data.name]
            if tuple(images.shape[1:]) != prefix.raw_shape:
                raise ValueError(
                    f"Images of different sizes cannot be cached, got {list(images.shape[1:])} and "
                    f"{list(prefix.raw_shape)}: bring them to one size."
                )
            inputs = part(batch.inputs, len(images))
            hidden = prefix.hidden_states(partial(model, **data.for_model(inputs)))
            if hidden.shape[1:] != like.shape[1:] or hidden.dtype != like.dtype:
                raise ValueError(
                    f"Images whose hidden states differ in shape cannot be cached together, got "
                    f"{list(hidden.shape[1:])} and {list(like.shape[1:])}."
                )
            store.values[done : done + len(hidden)].copy_(hidden)
            done += len(hidden)
            for key, values in inputs.items():
                if key != data.name:
                    others.setdefault(key, []).extend(_entries(values))
        return store.finish(data.name, {key: _joined(values) for key, values in others.items()}, note)
    except BaseException:
        store.give_up()
        raise


def _entries(values: Any) -> Iterator[Any]:
    for value in values:
        yield value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _joined(values: list[Any]) -> Tensor | list[Any]:
    """One tensor, where all images have one of the same shape and type."""
    same = all(isinstance(v, Tensor) and v.shape == values[0].shape and v.dtype == values[0].dtype for v in values)
    return torch.stack(values) if same else values
