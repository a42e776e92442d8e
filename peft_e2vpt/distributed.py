# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Several processes: sums over all, and trained tensors as wholes, whatever spreads them (FSDP2, DeepSpeed's ZeRO).

FSDP2 makes a parameter a `DTensor`. ZeRO-3 leaves every process an empty parameter, with a part of the values as its
`ds_tensor`. ZeRO of each stage trains float32 copies, the master weights, and overwrites the parameters with them
after every step. `whole` and `assign` are collective: all processes call them, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn


def is_distributed() -> bool:
    """Whether several processes work together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh")


def _is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO-3 holds the values of a parameter in parts."""
    return hasattr(tensor, "ds_id")


def _has_master_weights(tensor: Any) -> bool:
    """Whether a ZeRO optimizer trains a copy of a parameter."""
    return tensor.requires_grad and (hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping"))


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass in one process needs one in all others."""
    return any(_is_dtensor(parameter) or _is_partitioned(parameter) for parameter in model.parameters())


def refuse_flat_parameters(model: nn.Module) -> None:
    """Refuses FSDP1, whose processes hold empty or flat tensors in place of parameters.

    Raises:
        ValueError: FSDP1 shards the model.
    """
    for module in model.modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                "The model is wrapped in FullyShardedDataParallel (FSDP1), which hides single parameters in flat "
                "ones: shard it with torch.distributed.fsdp.fully_shard (FSDP2)."
            )


def reshard(model: nn.Module) -> None:
    """Puts sharded parameters back in place that a forward or backward pass has left gathered.

    FSDP2 would lose a change in place with the gathered copies; ZeRO-3 would refuse it.

    Raises:
        ValueError: FSDP1 shards the model.
    """
    refuse_flat_parameters(model)
    for module in model.modules():
        if hasattr(type(module), "reshard"):
            module.reshard()  # type: ignore[operator]
    for optimizer in {p._z3_optimizer for p in model.parameters() if hasattr(p, "_z3_optimizer")}:
        optimizer.empty_partition_cache()


def numel(parameter: Any) -> int:
    """How many values a parameter has, in all processes together and however they are packed (4 bit)."""
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return int(packed.shape.numel())
    return int(parameter.ds_numel if _is_partitioned(parameter) else parameter.numel())


def full_shape(tensor: Any) -> torch.Size:
    """The shape of a parameter or buffer, however it is spread."""
    shape: torch.Size = tensor.ds_shape if _is_partitioned(tensor) else tensor.shape
    return shape


def whole(tensor: Any) -> Tensor:
    """Copies a parameter or buffer in its full shape; of a parameter with master weights, copies those."""
    if _is_dtensor(tensor):
        # values that are offloaded travel through the device of the mesh
        full: Tensor = tensor.detach().to(tensor.device_mesh.device_type).full_tensor().clone()
        return full
    if _has_master_weights(tensor):
        import deepspeed

        master: Tensor = deepspeed.utils.safe_get_full_fp32_param(tensor)
        return master.detach().clone()
    if _is_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            gathered: Tensor = tensor.detach().clone()
        return gathered
    copy: Tensor = tensor.detach().clone()
    return copy


@torch.no_grad()
def assign(tensor: Any, values: Tensor) -> None:
    """Gives a parameter or buffer new values in place, and its master weights too.

    Args:
        tensor: the parameter or buffer.
        values: in the full shape, the same in every process.
    """
    if _is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh = tensor.device_mesh
        tensor.copy_(distribute_tensor(values.to(mesh.device_type), mesh, tensor.placements, src_data_rank=None))
    elif _is_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            tensor.copy_(values)
    else:
        tensor.copy_(values)
    if _has_master_weights(tensor):
        _assign_master_weights(tensor, values)


def _assign_master_weights(tensor: Any, values: Tensor) -> None:
    import deepspeed

    if not _is_partitioned(tensor):
        deepspeed.utils.safe_set_full_fp32_param(tensor, values)
        return
    # safe_set_full_fp32_param fails under ZeRO-3 where the parts are padded, as those of a bias of odd length are
    size, group = deepspeed.utils.safe_get_local_fp32_param(tensor).numel(), tensor.ds_process_group
    padding = size * torch.distributed.get_world_size(group) - values.numel()
    start = size * torch.distributed.get_rank(group)
    part = F.pad(values.flatten(), (0, padding))[start : start + size]
    deepspeed.utils.safe_set_local_fp32_param(tensor, part)


def sum_over_processes(tensor: Tensor, device: torch.device) -> Tensor:
    """Adds up what all processes hold; every process gets the same bits.

    `accelerate.utils.reduce` would add nothing up in a process group that was made without Accelerate's launchers.
    """
    if not is_distributed():
        return tensor
    summed = tensor.to(device)
    torch.distributed.all_reduce(summed)
    return summed.cpu()
