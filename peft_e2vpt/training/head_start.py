# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`start_heads`: heads that start as linear probes on standardised features.

A random head sends random gradients into the prompts until it has learned something ("LP-FT": Kumar et al.,
"Fine-tuning can distort pretrained features and underperform out-of-distribution", ICLR 2022, arXiv 2202.10054).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.utils import logging

from .._compat import NormWithStatistics, device_and_dtype
from ..distributed import assign, full_shape, is_distributed, is_sharded
from ..evaluation import batches, no_trace
from .probe import Labels, fit_probe
from .standardise import fold, is_standardised, standardise


logger = logging.get_logger(__name__)

MAX_SAMPLES = 10_000
POSITIONS_PER_IMAGE = 64
LEFT_AS_IT_IS = "The head is left as it is: "


class HeadStart(NamedTuple):
    """What `start_heads` has done.

    Attributes:
        layers: paths of the layers that were started.
        num_samples: the images, or positions of maps, that they were fitted to.
        reason: why none was started; empty where one was.
    """

    layers: list[str]
    num_samples: int
    reason: str = ""


class _Call(NamedTuple):
    inputs: Tensor
    outputs: Tensor


def trained_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers and 1x1 convolutions that a model trains in full, by path; with PEFT, of `modules_to_save`.

    Args:
        model: an E2VPT model, any other model of PEFT, or a plain one, all of whose trained layers count.
    """
    copies = [
        (f"{path}.modules_to_save.{name}", module.modules_to_save[name])
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for name in module.active_adapters
        if name in module.modules_to_save
    ]
    roots = copies if copies or hasattr(model, "peft_config") else [("", model)]
    found: dict[nn.Module, str] = {}
    for prefix, root in roots:
        for path, module in root.named_modules(prefix=prefix):
            if _is_affine(module) and module.weight.requires_grad:
                found.setdefault(module, path)
    return {path: module for module, path in found.items()}


def _is_affine(module: Any) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and set(module.kernel_size) == {1}
        and set(module.stride) == {1}
        and module.padding in ((0, 0), "valid", "same")
    )


def start_heads(
    model: nn.Module,
    dataloader: Iterable[dict[str, Any]],
    weight_decay: float = 0.1,
    max_samples: int = MAX_SAMPLES,
    label_name: str = "labels",
    seed: int = 0,
) -> HeadStart:
    """Starts the heads of a model as linear probes, in one pass over training data, and standardises their features.

    The last layer of each trained head (the one that gives the logits) is fitted to the features that it gets now,
    with prompts as they are: cross-entropy for classes, binary cross-entropy for several labels, ridge regression for
    numbers; for maps the same over positions. Layers before it keep their values. Where the outputs are not those of
    such a layer, or the labels are of another kind (boxes, captions), the head is left as it is, and a log says why.

    From then on the layer learns on standardised features; files, checkpoints and `state_dict()` hold the plain layer.
    `fold_heads` makes it plain for good. The pass runs in eval mode and leaves random numbers, modes and gradients as
    they were. Of several processes, each reads its own share, and all get the same bits. A sharded head (FSDP,
    ZeRO-3) is started, but learns on raw features.

    Example:

        >>> model = get_peft_model(model, E2VPTConfig())
        >>> optimizer = create_e2vpt_optimizer(model)
        >>> start_heads(model, train_loader)
        >>> ...  # train
        >>> fold_heads(model)

    Args:
        model: an adapted model, or any other.
        dataloader: batches as the model takes them, with labels.
        weight_decay: half the factor of the squared weights (of standardised features) in the loss of the fit.
        max_samples: images, or positions of maps, to fit to in all processes; the first ones that come.
        label_name: the key of the labels in a batch.
        seed: what chooses positions of maps, and what the data draw at random.

    Returns:
        What was started.

    Raises:
        ValueError: `max_samples` or `weight_decay` is out of range, or FSDP1 shards the model.
    """
    if max_samples < 2:
        raise ValueError(f"max_samples must be at least 2, got {max_samples}.")
    if not weight_decay > 0:
        raise ValueError(f"weight_decay must be above 0, got {weight_decay}.")
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    start = _start(model, dataloader, weight_decay, max_samples, label_name, seed)
    if start.reason:
        logger.info(LEFT_AS_IT_IS + start.reason)
    return start


def fold_heads(model: nn.Module) -> None:
    """Makes the layers that `start_heads` has standardised plain for good; what they compute stays the same."""
    for module in model.modules():
        fold(module)


def standardised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that learn on standardised features, by path."""
    return {path: module for path, module in model.named_modules() if is_standardised(module)}


def _start(
    model: nn.Module,
    dataloader: Iterable[dict[str, Any]],
    weight_decay: float,
    max_samples: int,
    label_name: str,
    seed: int,
) -> HeadStart:
    candidates = trained_layers(model)
    if not candidates:
        return HeadStart([], 0, "it trains no linear layer and no 1x1 convolution.")
    fold_heads(model)
    device = device_and_dtype(model)[0] or torch.device("cpu")
    processes = torch.distributed.get_world_size() if is_distributed() else 1
    share = -(-max_samples // processes)
    collected: dict[str, list[Tensor]] = {}
    answers: list[Tensor] = []
    count, kind, reason = 0, None, "there are no data to start it with."
    chosen: dict[str, nn.Module] = {}
    with no_trace(model, dataloader, seed), torch.no_grad(), _as_in_training(model) as norms:
        positions = torch.Generator().manual_seed(seed)
        for batch in batches(dataloader, device, "Starting the head", in_step=is_sharded(model)):
            if norms and batch.size < 2:
                continue  # of a single image, batch statistics are not defined
            labels = batch.inputs.pop(label_name, None)
            with _watching(chosen or candidates) as calls:
                output = None if Labels.kind_of(labels, None) is None else model(**batch.inputs)
            if kind is None:
                logits = _logits_of(output)
                problem_type = getattr(getattr(model, "config", None), "problem_type", None)
                kind = None if logits is None else Labels.kind_of(labels, logits, problem_type)
                chosen, reason = _last_layers(candidates, calls, logits, kind)
                if not chosen:
                    break
            assert kind is not None
            if batch.counts:
                found = [_samples(calls[path], labels, kind, positions) for path in chosen]
                for path, (features, _) in zip(chosen, found, strict=True):
                    collected.setdefault(path, []).append(features)
                answers.append(found[0][1])
                count += len(found[0][1])
            if count >= share and not is_sharded(model):
                break
    parts = {path: torch.cat(features)[:share] for path, features in collected.items()}
    gathered = _gathered((kind, parts, torch.cat(answers)[:share] if answers else None, reason))
    with_data = [part for part in gathered if part[1]]
    if not with_data:
        return HeadStart([], 0, gathered[0][3])
    kind = with_data[0][0]
    labels = torch.cat([part[2] for part in with_data])
    if len(labels) < 2:
        return HeadStart([], len(labels), f"it takes two samples to standardise features, got {len(labels)}.")
    for path in with_data[0][1]:
        layer = candidates[path]
        _set(layer, torch.cat([part[1][path] for part in with_data]), labels, kind, weight_decay, device)
    return HeadStart(list(with_data[0][1]), len(labels))


def _set(layer: Any, features: Tensor, labels: Tensor, kind: Labels, weight_decay: float, device: Any) -> None:
    """Fits a layer to features `(N, D)` and labels `(N, ...)`, and lets it learn on standardised ones."""
    where = device if device.type in ("cpu", "cuda") else torch.device("cpu")  # others lack float64
    features = features.to(where, torch.float64)
    mean = features.mean(0) if layer.bias is not None else torch.zeros_like(features[0])
    square = (features - mean).square().mean(0)
    scale = (square + 1e-3 * square.mean() + torch.finfo(torch.float32).tiny).rsqrt()
    outputs = full_shape(layer.weight)[0]
    standardised = (features - mean) * scale
    weight, bias = fit_probe(standardised, labels.to(where), kind, outputs, weight_decay, layer.bias is not None)
    mean, scale, weight, bias = _of_first_process([mean.cpu(), scale.cpu(), weight.cpu(), bias.cpu()])
    plain = weight * scale
    values = [(layer.weight, plain.view(full_shape(layer.weight)))]
    if layer.bias is not None:
        values.append((layer.bias, bias - plain @ mean))
    for parameter, value in values:
        assign(parameter, value.to(parameter.device, parameter.dtype))
    if is_sharded(layer):
        logger.info("The head is sharded, so it starts as a linear probe but learns on raw features.")
    else:
        standardise(layer, mean, scale)


# ------------------------------------------------------------------------------------------------ finding the layer
@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[list[Any]]:
    """Lets batch norms that are trained use the statistics of the batch, as in training, without noting them."""
    batch_norms: list[Any] = [module for module in model.modules() if isinstance(module, NormWithStatistics)]
    norms = [norm for norm in batch_norms if any(parameter.requires_grad for parameter in norm.parameters())]
    noted = [(norm.running_mean, norm.running_var) for norm in norms]
    for norm in norms:
        norm.running_mean = norm.running_var = None  # batch statistics, in eval mode too
    try:
        yield norms
    finally:
        for norm, (mean, variance) in zip(norms, noted, strict=True):
            norm.running_mean, norm.running_var = mean, variance


@contextmanager
def _watching(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[_Call]]]:
    """Collects what layers take and give."""
    calls: dict[str, list[_Call]] = {path: [] for path in layers}

    def note(path: str) -> Any:
        return lambda layer, inputs, output: calls[path].append(_Call(inputs[0], output))

    handles = [layer.register_forward_hook(note(path)) for path, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _logits_of(output: Any) -> Tensor | None:
    """What a model answers: its logits, or the one tensor that it returns."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1 else None


def _last_layers(
    candidates: Mapping[str, nn.Module], calls: Mapping[str, list[_Call]], logits: Tensor | None, kind: Labels | None
) -> tuple[dict[str, nn.Module], str]:
    """The layers whose output the logits are, or whose mean output; or why there is none."""
    if kind is None or logits is None:
        return {}, "the labels are not classes, numbers or maps of them that go with one tensor of logits."
    outputs = {}
    for path, layer in candidates.items():
        if len(calls[path]) == 1:
            inputs, output = calls[path][0]
            as_logits = _as_logits(output, logits, isinstance(layer, nn.Conv2d))
            # a sharded weight is whole inside its layer's forward pass alone
            if as_logits is not None and (is_sharded(layer) or _is_close(output, _affine(layer, inputs))):
                outputs[path] = as_logits
    for paths in (*([path] for path in outputs), list(outputs)):
        ways = zip(*(outputs[path] for path in paths), strict=True)
        if any(_is_close(torch.stack(same).mean(0), logits) for same in ways):
            return {path: candidates[path] for path in paths}, ""
    return {}, "its logits are not the output of a linear layer or 1x1 convolution that is trained."


def _affine(layer: Any, inputs: Tensor) -> Tensor:
    inputs = inputs.to(layer.weight.dtype)
    function = F.conv2d if isinstance(layer, nn.Conv2d) else F.linear
    result: Tensor = function(inputs, layer.weight, layer.bias)
    return result


def _as_logits(output: Tensor, logits: Tensor, channels_first: bool) -> list[Tensor] | None:
    """An output in the shape of the logits, in the ways that models bring it there; `None` where it cannot be."""
    if output.shape == logits.shape:
        return [output] * 3
    if logits.dim() == 2 and output.dim() > 2:  # over tokens or positions
        output = output.flatten(2).mean(2) if channels_first else output.flatten(1, -2).mean(1)
        return [output] * 3 if output.shape == logits.shape else None
    if logits.dim() == output.dim() == 4 and logits.shape[:2] == output.shape[:2]:
        size = logits.shape[2:]
        ways: Any = (("bilinear", False), ("bilinear", True), ("bicubic", False))
        return [F.interpolate(output.float(), size, mode=mode, align_corners=corners) for mode, corners in ways]
    return None


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are the same but for the rounding of half precision."""
    if found.shape != expected.shape:
        return False
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= 0.03 * expected.float().abs().max() + 1e-6)


# -------------------------------------------------------------------------------------------------------- the samples
def _samples(calls: list[_Call], labels: Tensor, kind: Labels, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features `(N, D)` and labels of one batch, on the CPU: one row an image, or some positions of each map."""
    features = calls[-1].inputs
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if not kind.dense:
        if features.dim() > 2:
            by_channel = features.dim() == 4
            features = features.flatten(2).mean(2) if by_channel else features.flatten(1, -2).mean(1)
        return kind.without_ignored(features.cpu(), labels.cpu())
    maps = kind.resized(labels, features.shape[-2:])
    rows = features.flatten(2).transpose(1, 2)  # (B, h w, D)
    order = torch.rand(maps.shape[0], rows.shape[1], generator=generator).argsort(1)
    chosen = order[:, :POSITIONS_PER_IMAGE].to(rows.device)
    rows = rows.gather(1, chosen[..., None].expand(-1, -1, rows.shape[2]))
    return kind.without_ignored(rows.flatten(0, 1).cpu(), maps.flatten(1).gather(1, chosen).flatten().cpu())


def _gathered(part: Any) -> list[Any]:
    """What every process holds, in all of them."""
    if not is_distributed():
        return [part]
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, part)
    return found


def _of_first_process(values: list[Tensor]) -> list[Tensor]:
    """The values of the first process, in all of them: to the bit, whatever their machines."""
    if is_distributed():
        torch.distributed.broadcast_object_list(values, src=0)
    return values
