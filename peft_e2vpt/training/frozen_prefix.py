# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`cache_frozen_prefix`: the frozen layers before the first one that trains run once an image, not once an epoch."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import default_data_collator
from transformers.utils import logging

from .._compat import device_and_dtype, keeps_statistics, offload_device
from ..backbones.sites import find_attention_sites
from ..distributed import is_sharded, refuse_flat_parameters
from ..evaluation import batches, no_trace
from ..tuner.layer import E2VPTLayer
from ..tuner.prompt_layers import PromptLayers
from .prefix_pass import FrozenPrefix, prefix_of, what_changes
from .prefix_storage import CachedDataset, Store, stored
from .prefix_trace import NoCut, Reached, calls_of, cuts_before, first_trained, leaves_of, modules_in
from .trainer_data import is_stream


logger = logging.get_logger(__name__)

NUM_TRIED = 32  # images that are read twice, and that the prefix sees twice in training mode
NUM_COMPARED = 4  # images whose loss and gradients are compared
LABELS = ("labels", "label", "label_ids")
FORMAT = 1
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}


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
    data = _Data(base, dataset, data_collator)
    with no_trace(model, ()), torch.no_grad():
        device, _ = device_and_dtype(base)
        tried = data.read_twice(device)
        before = prefix_of(base)
        prefix = before if before is not None else _find(model, base, data, tried)
        try:
            if before is not None:
                _check_the_same(prefix, data, tried, model)
            like = prefix.hidden_states(partial(model, **data.for_model(tried)))
            if before is None:
                _refuse_random(model, prefix, data, tried, like)
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


# ---------------------------------------------------------------------------------------------------------------- data
class _Data:
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
        return _on(first, device)

    def fingerprint(self, tried: dict[str, Any]) -> str:
        """Tells the images, by some of them, and by what `datasets` notes of where they come from."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(tried[self.name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        for label in LABELS:
            if isinstance(tried.get(label), Tensor):
                digest.update(repr(tried[label].tolist()).encode())
        return f"{getattr(self.dataset, '_fingerprint', '')}:{digest.hexdigest()}"


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _part(batch: dict[str, Any], count: int) -> dict[str, Any]:
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


# ----------------------------------------------------------------------------------------------------- finding the cut
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


def _find(model: nn.Module, base: nn.Module, data: _Data, tried: dict[str, Any]) -> FrozenPrefix:
    """Cuts a model at the last place where it can be cut.

    Raises:
        ValueError: there is none.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("Nothing of the model trains, so there is nothing to cache for: freeze less of it.")
    some = data.for_model(_part(tried, 2))
    calls = calls_of(base, lambda: model(**some))
    first = first_trained(base, calls)
    if first is None:
        raise ValueError("No module that the model calls trains, so it cannot be told which run before.")
    paths = {module: path for path, module in base.named_modules()}
    place = paths[first.module] or type(base).__name__

    def on_noise(count: int) -> Any:
        inputs = data.for_model(_part(tried, count))
        generator = torch.Generator().manual_seed(count)
        noise = torch.randn(inputs[data.name].shape, generator=generator)
        inputs[data.name] = inputs[data.name] + noise.to(inputs[data.name])
        try:
            return model(**inputs)
        except Reached:
            raise
        except Exception as error:  # of whatever kind a model makes
            raise NoCut(f"it does not run on {count} other images ({type(error).__name__}: {error})") from error

    compared = _part(tried, min(NUM_COMPARED, len(tried[data.name])))
    raw = _loss_and_gradients(model, data.for_model(compared, with_labels=True))
    reasons: list[str] = []
    attentions = _attentions_of(base)
    try:
        for cut in cuts_before(base, first, calls, on_noise, not attentions.isdisjoint(first.module.modules())):
            if attentions and attentions.isdisjoint(modules_in(cut.skipped)):
                continue  # embeddings alone are not worth it
            changing = what_changes(base, list(cut.skipped))
            if changing is not None:
                reasons.append(changing)
                continue
            prefix = FrozenPrefix(base, data.name, data.position, cut, compared[data.name])
            reason = _why_wrong(model, prefix, data, compared, raw)
            if reason is None:
                return prefix
            prefix.remove()
            reasons.append(reason)
    except NoCut as error:
        reasons.append(str(error))
    if not reasons:
        raise ValueError(
            f"Nothing worth caching runs before {place}, the first module that trains. Train later layers alone, as "
            "with layers_to_transform=[6, 7, 8, 9, 10, 11], or train on the images."
        )
    raise ValueError(f"{type(base).__name__} cannot begin behind a cache, before {place}: {reasons[-1]}.")


def _attentions_of(base: nn.Module) -> set[nn.Module]:
    """The self-attentions of a model; none where it has none."""
    try:
        return {site.attention for site in find_attention_sites(base)}
    except ValueError:
        return set()


def _loss_and_gradients(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """All numbers that a model gives, and the gradient of their loss for everything that trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        outputs = [x for x in leaves_of(model(**inputs)) if isinstance(x, Tensor) and x.is_floating_point()]
        losses = [
            x.to(torch.promote_types(x.dtype, torch.float32)).square().mean() for x in outputs if x.requires_grad
        ]
        if not losses:
            raise ValueError("Nothing that the model gives depends on what trains, so there is nothing to cache for.")
        gradients = torch.autograd.grad(losses, trained, allow_unused=True)
    return [x.detach() for x in outputs], list(gradients)


def _why_wrong(
    model: nn.Module, prefix: FrozenPrefix, data: _Data, images: dict[str, Any], raw: tuple[list[Tensor], list[Any]]
) -> str | None:
    """Runs a model on hidden states; why it does not do what it does on images, if it does not."""
    try:
        hidden = prefix.hidden_states(lambda: model(**data.for_model(images)))
    except NoCut as reason:
        return str(reason)
    shape, raw_shape = tuple(hidden.shape[1:]), prefix.raw_shape
    if hidden.dim() < 2 or len(hidden) != len(images[data.name]):
        return f"what {prefix.last_module} gives has no entry an image"
    if len(shape) == len(raw_shape) and shape[0] == raw_shape[0]:
        return f"hidden states of shape {list(shape)} could be taken for images, which are {list(raw_shape)}"
    before, prefix.shape = prefix.shape, shape
    try:
        outputs, gradients = _loss_and_gradients(
            model, data.for_model({**images, data.name: hidden}, with_labels=True)
        )
    except Exception as error:  # of whatever kind a model makes from numbers that are not there
        return f"without the modules before it fails ({type(error).__name__}: {error})"
    finally:
        prefix.shape = before
    if len(outputs) != len(raw[0]):
        return "it gives other outputs"
    for one, other in zip(outputs, raw[0], strict=True):
        if one.shape != other.shape or (one.isnan() & ~other.isnan()).any():
            return "it reads what earlier modules give, beside the hidden states before the first that trains"
        if not _close(one, other, [other]):
            return f"outputs differ by {float((one - other).abs().max()):.1e}"
    given = [gradient for gradient in raw[1] if gradient is not None]
    for gradient, expected in zip(gradients, raw[1], strict=True):
        if (gradient is None) != (expected is None):
            return "something trains before"
        if gradient is not None and not _close(gradient, expected, given):
            return f"gradients differ by {float((gradient - expected).abs().max()):.1e}"
    return None


def _close(one: Tensor, other: Tensor, scale: list[Tensor], factor: float = 1.0) -> bool:
    """Whether numbers are equal but for rounding, of the size of all the others."""
    if torch.equal(one, other):
        return True
    largest = max(float(tensor.detach().nan_to_num().abs().max()) for tensor in scale if tensor.numel())
    tolerance = factor * TOLERANCES.get(one.dtype, 3e-2)
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


# -------------------------------------------------------------------------------------------------------------- checks
def _check_the_same(prefix: FrozenPrefix, data: _Data, tried: dict[str, Any], model: nn.Module) -> None:
    """Refuses a dataset that does not fit the prefix that a model is cut at.

    Raises:
        ValueError: it does not.
    """
    advice = "Call uncache_frozen_prefix(model) first; what was cached before is then of no use."
    size = tuple(tried[data.name].shape[1:])
    if data.name != prefix.name or size != prefix.raw_shape:
        raise ValueError(
            f"The model has a cache already, for images of shape {list(prefix.raw_shape)}, and the dataset has images "
            f"of shape {list(size)}. {advice}"
        )
    compared = _part(tried, min(NUM_COMPARED, len(tried[data.name])))
    reason = what_changes(_base_of(model), prefix.skipped)
    reason = reason or _why_wrong(
        model, prefix, data, compared, _loss_and_gradients(model, data.for_model(compared, with_labels=True))
    )
    if reason is not None:
        raise ValueError(f"The model has a cache already, which does not fit any more: {reason}. {advice}")


def _refuse_random(model: nn.Module, prefix: FrozenPrefix, data: _Data, tried: dict[str, Any], plain: Tensor) -> None:
    """Refuses a prefix that is another for the same image while training.

    Raises:
        ValueError: it has dropout, or statistics of batches, or whatever else changes.
    """
    paths = {module: path for path, module in model.named_modules()}
    parts = modules_in(prefix.skipped)
    rates = {
        part: getattr(part, "p", getattr(part, "drop_prob", 0.0)) for part in parts if "Drop" in type(part).__name__
    }
    dropping = [f"{paths[part]} ({rate:g})" for part, rate in rates.items() if rate]
    if dropping:
        raise ValueError(
            f"{len(dropping)} modules before the first that trains drop values at random while training, such as "
            f"{dropping[0]}: set their rates to 0, for instance in the config that the model is loaded with "
            "(hidden_dropout_prob=0.0, drop_path_rate=0.0), or train on the images."
        )
    inputs = data.for_model(tried)
    _train_all_but_prompts(model)
    try:
        counting = [paths[part] for part in parts if part.training and keeps_statistics(part)]
        if counting:
            raise ValueError(
                f"{counting[0]} comes before the first module that trains and computes statistics of each batch while "
                "training, so an image has no hidden states of its own: keep it in eval mode, or train on the images."
            )
        for _ in range(2):
            if not torch.equal(prefix.hidden_states(lambda: model(**inputs)), plain):
                raise ValueError(
                    f"What comes before the first module that trains, up to {prefix.last_module}, is random while "
                    "training (attention dropout, layer dropout, shifted positions, masks): switch that off in the "
                    "config that the model is loaded with, or train on the images."
                )
    finally:
        model.eval()


def _train_all_but_prompts(model: nn.Module) -> None:
    """Training mode for all that may come before the first trained module; prompt layers would count a pass."""
    ours = {part for module in model.modules() if isinstance(module, PromptLayers) for part in module.modules()}
    for module in model.modules():
        if module not in ours and not isinstance(module, E2VPTLayer):
            if "train" in module.__dict__:  # stays in eval mode whoever trains the model
                continue
            module.training = True


# ------------------------------------------------------------------------------------------------------------- caching
def _note(prefix: FrozenPrefix, data: _Data, tried: dict[str, Any], like: Tensor) -> dict[str, Any]:
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
    data: _Data,
    like: Tensor,
    note: dict[str, Any],
    batch_size: int,
    folder: Path | None,
) -> CachedDataset:
    """The cached dataset, from the folder where it lies there already; `like` are hidden states of some images."""
    found = None if folder is None else stored(folder, data.name, note, like)
    cached = _fill(model, prefix, data, like, note, batch_size, folder) if found is None else found
    same = torch.stack([cached[place][data.name] for place in data.places(NUM_TRIED)]).to(like)
    if not _close(same, like, [like], factor=100.0 if like.dtype.itemsize > 2 else 4.0):
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
    data: _Data,
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
            inputs = _part(batch.inputs, len(images))
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
