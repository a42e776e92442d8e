# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The private names of PEFT, transformers and torch that this package relies on, in one place."""

from __future__ import annotations

import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Container, Iterator
from itertools import chain
from types import FrameType, MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_module
from peft import PeftModel, PeftType
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch._subclasses import FakeTensor
from torch.nn.modules.batchnorm import _NormBase as NormWithStatistics
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from transformers.integrations.peft import PeftAdapterMixin


if sys.version_info >= (3, 11):
    from re import _constants as regex_codes  # type: ignore[attr-defined]
    from re import _parser as regex_parser  # type: ignore[attr-defined]
else:
    import sre_constants as regex_codes
    import sre_parse as regex_parser


__all__ = [
    "METHOD",
    "BufferDict",
    "ExcludedModule",
    "NormWithStatistics",
    "Origin",
    "bring_back",
    "device_and_dtype",
    "forward_slot",
    "has_packed_layers",
    "has_values",
    "is_batched",
    "is_for_inference",
    "is_quantised",
    "is_watched",
    "keeps_statistics",
    "loaded_from",
    "offload_device",
    "owners_of_hooks",
    "packed_weights",
    "peft_type",
    "remove_hooks",
    "remove_hooks_of",
    "running_calls",
    "stops_gradients",
    "takes_processor",
    "unwatched",
    "ways_to_match",
    "with_packed_layers",
]

METHOD = "E2VPT"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module


def takes_processor(pipeline_class: type, kind: str) -> bool | None:
    """Whether a pipeline of transformers needs a processor, such as an `"image_processor"`; `None`: it can use one."""
    flag: bool | None = getattr(pipeline_class, f"_load_{kind}", False)
    return flag


def _load_peft_type(name: str) -> PeftType:
    """Unpickles a `PeftType` member in a process that may not have imported this package yet."""
    return peft_type(name)


def peft_type(name: str = METHOD) -> PeftType:
    """Returns the member `name` of `peft.PeftType`, adding it first where it does not exist.

    PEFT has no plug-in mechanism that adds one, and an enum with members cannot be subclassed. So the member is added
    to the enum itself, in the way `enum.EnumMeta` would have done it; from Python 3.12 on the class attribute has to
    be set as well.
    """
    existing = PeftType.__members__.get(name)
    if existing is not None:
        return existing
    enum: Any = PeftType
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member.__reduce_ex__ = lambda protocol: (_load_peft_type, (name,))
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a forward pass in training mode changes buffers of a module: running statistics, or singular vectors."""
    return (
        isinstance(module, (NormWithStatistics, _SpectralNorm))
        or any(name.startswith("running_") for name in module._buffers)
        or any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    )


def is_watched(module: nn.Module) -> bool:
    """Whether a call of a module, or of a part of it, does more than its forward."""
    return (
        any(getattr(module, kind) for kind in HOOKS)
        or (module.training and keeps_statistics(module))
        or any(part is not None and is_watched(part) for part in module._modules.values())
    )


def unwatched(module: nn.Module) -> nn.Module:
    """A view of a module, with the same parameters, that nobody's hooks watch and that keeps no statistics."""
    view: nn.Module = module.__new__(type(module))
    parts = {name: part if part is None else unwatched(part) for name, part in module._modules.items()}
    unhooked: dict[str, Any] = {kind: OrderedDict() for kind in HOOKS}
    training = module.training and not keeps_statistics(module)
    changes = {"_modules": parts, "_compiled_call_impl": None, "training": training}
    view.__dict__ = {**module.__dict__, **unhooked, **changes}
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):  # computes a weight: weight_norm, spectral_norm, prune
            hook(view, ())
    return view


def forward_slot(module: nn.Module) -> str:
    """The attribute of a module with its forward: what a hook of Accelerate's calls, where there is one."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def offload_device(module: nn.Module) -> torch.device | None:
    """Where Accelerate runs a module whose weights it has offloaded, `None` where it has offloaded none."""
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        if getattr(hook, "offload", False):
            return torch.device(hook.execution_device)
    return None


def bring_back(module: nn.Module) -> None:
    """Takes the weights of a module and of its parts back from Accelerate's offloading, to where they are used."""
    device = offload_device(module)
    if device is not None:
        remove_hook_from_module(module, recurse=True)
        module.to(device)


def packed_weights(module: nn.Module) -> Iterator[Tensor]:
    """The weights and biases in the layers of `torch.ao.nn.quantized`, which are neither parameters nor buffers."""
    return (tensor for part in module.modules() for tensor in _packed_weights(part))


def _packed_weights(layer: nn.Module) -> list[Tensor]:
    methods = [getattr(layer, name, None) for name in ("weight", "bias")]
    found = [method() for method in methods if isinstance(method, MethodType)]
    return [tensor for tensor in found if tensor is not None]


def remove_hooks(module: nn.Module, functions: Container[Any]) -> None:
    """Removes the forward and state-dict hooks that are among some functions; a copy of a module knows no handles."""
    for hooks in (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in functions:  # torch wraps some
                del hooks[key]


def owners_of_hooks(module: nn.Module, kind: type) -> list[Any]:
    """The objects of a class whose bound methods are hooks before the forward of a module."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, kind)]


def remove_hooks_of(module: nn.Module, owner: Any) -> None:
    """Removes the hooks around the forward of a module that are methods of an object, in a copy of a module too."""
    before = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
    behind = (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    for hooks, *flags in (before, behind):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[key]
            for flag in flags:
                flag.pop(key, None)


def has_packed_layers(module: nn.Module) -> bool:
    """Whether a module has layers of `torch.ao.nn.quantized`."""
    return any(isinstance(getattr(part, "weight", None), MethodType) for part in module.modules())


def with_packed_layers(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Part of a state dict, and what the layers of `torch.ao.nn.quantized` in a model cannot load without: their own.

    Args:
        model: the model that is about to load them.
        tensors: tensors by their names in the model.
    """
    if not has_packed_layers(model):
        return tensors
    layers = tuple(f"{path}." for path, module in model.named_modules() if _packed_weights(module))
    state: Any = model.state_dict()
    found: Any = OrderedDict({**tensors, **{key: value for key, value in state.items() if key.startswith(layers)}})
    found._metadata = state._metadata  # the versions of the layers
    return found  # type: ignore[no-any-return]


def is_quantised(module: nn.Module) -> bool:
    """Whether a module has weights in less than 16 bits; as a whole or wrapped, like torchao's, they cannot train."""
    return has_packed_layers(module) or any(map(_is_quantised, module.parameters()))


def _is_quantised(tensor: Any) -> bool:
    if hasattr(tensor, "__tensor_flatten__"):  # one made of others
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return any(_is_quantised(part) for part in parts if isinstance(part, Tensor))  # a DTensor names its mesh too
    return not _is_full(tensor.dtype)


def is_for_inference(module: nn.Module) -> bool:
    """Whether layers have 4-bit weights of bitsandbytes in a layout that has no derivative.

    On some CPUs they are brought into it by the first forward pass in eval mode, for good.
    """
    weights: Any = (getattr(part, "weight", None) for part in module.modules())
    states = (getattr(weight, "quant_state", None) for weight in weights)
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def stops_gradients(module: nn.Module) -> bool:
    """Whether a layer is quantised, its inputs too, by arithmetic that has no derivative."""
    if not any(True for _ in module.children()) and is_for_inference(module):
        return True
    if isinstance(getattr(module, "weight", None), MethodType):
        return True
    weight: Any = getattr(module, "weight", None)
    of_others: bool = isinstance(module, nn.Linear) and hasattr(weight, "__tensor_flatten__") and not weight.is_meta
    if not of_others or not _is_quantised(weight):
        return False
    with torch.enable_grad():
        probe = torch.ones(1, weight.shape[-1], dtype=weight.dtype, device=weight.device, requires_grad=True)
        return not F.linear(probe, weight).requires_grad


def _is_full(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where a module runs, and the type of the numbers that it computes with, quantised or not.

    Returns:
        The device, that of its weights or the one to which Accelerate loads them, and the type of its first weight
        that has at least 16 bits. torch's own quantised layers take float32. `None` where no weight tells the type.
    """
    tensors = chain(module.parameters(), module.buffers(), packed_weights(module))
    first = next(tensors, None)  # often enough: a forward pass asks
    if first is None:
        return torch.get_default_device(), None
    device = first.device
    if device.type == "meta":
        device = offload_device(module) or device
    dtype = next((tensor.dtype for tensor in chain((first,), tensors) if _is_full(tensor.dtype)), None)
    return device, torch.float32 if dtype is None and has_packed_layers(module) else dtype


def is_batched(tensor: Tensor) -> bool:
    """Whether `torch.func.vmap` has put several tensors into this one, so that no number can be read from it."""
    return bool(is_batchedtensor(tensor))


def has_values(tensor: Tensor) -> bool:
    """Whether there is anything to read from a tensor: not on the meta device, nor while torch only infers shapes."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


class Origin(NamedTuple):
    """Where an adapter is loaded from.

    Attributes:
        where: a repository of the Hub, or a folder.
        download: `revision`, `subfolder` and the settings of a download.
        by_transformers: whether transformers itself loads it, which knows nothing of the method.
    """

    where: str
    download: dict[str, Any]
    by_transformers: bool


DOWNLOAD_ARGUMENTS = (
    "revision",
    "subfolder",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "proxies",
)


def running_calls() -> Iterator[FrameType]:
    """The frames of the function calls that are running, the innermost first, without that of the function that asks.

    The locals of a function that keeps its own frame would be a cycle, and with it everything that its callers hold.
    """
    frame = sys._getframe(1).f_back
    while frame is not None:
        yield frame
        frame = frame.f_back


def _code_of(function: Any) -> Any:
    return inspect.unwrap(getattr(function, "__func__", function)).__code__


_FROM_PRETRAINED = _code_of(PeftModel.from_pretrained)
_LOAD_ADAPTER = _code_of(PeftModel.load_adapter)
_LOAD_ADAPTER_OF_TRANSFORMERS = _code_of(PeftAdapterMixin.load_adapter)


def loaded_from() -> Origin | None:
    """What PEFT or transformers is loading an adapter from right now; `None` where a new adapter is made.

    Both make the adapter first and look for its tensors afterwards, and tell a tuner of neither. So this looks at
    their local variables, which are the arguments of their public methods.
    """
    for frame in running_calls():
        code = frame.f_code
        if code is _FROM_PRETRAINED or code is _LOAD_ADAPTER:
            found = frame.f_locals
            settings = {**found.get("hf_hub_download_kwargs", {}), **found.get("kwargs", {})}
            return _origin(found["model_id"], settings, by_transformers=False)
        if code is _LOAD_ADAPTER_OF_TRANSFORMERS:
            found = frame.f_locals
            if found.get("adapter_state_dict") is not None or found.get("peft_model_id") is None:
                return None
            settings = getattr(found.get("load_config"), "download_kwargs", None) or {}
            return _origin(found["peft_model_id"], settings, by_transformers=True)
    return None


def _origin(where: Any, settings: dict[str, Any], by_transformers: bool) -> Origin:
    download = {name: settings[name] for name in DOWNLOAD_ARGUMENTS if settings.get(name) is not None}
    return Origin(str(where), download, by_transformers)


def ways_to_match(pattern: str, length: int = 100) -> float:
    """An upper bound of the ways in which a regular expression can match a text, which is what backtracking may try.

    Args:
        pattern: the expression.
        length: of the text.

    Raises:
        re.error: it is no regular expression.
    """
    return _ways(regex_parser.parse(pattern), length)


def _ways(sequence: Any, length: int) -> float:
    ways = 1.0
    for code, argument in sequence:
        if code is regex_codes.BRANCH:
            ways *= sum(_ways(branch, length) for branch in argument[1])
        elif code is regex_codes.SUBPATTERN:
            ways *= _ways(argument[-1], length)
        elif str(code).endswith("_REPEAT"):
            least, most, repeated = argument
            inner, width = _ways(repeated, length), repeated.getwidth()[0]
            most = min(int(most), length)
            if most <= 1:
                ways *= 1 + inner
            elif inner == 1 and width:
                ways *= max(1, most // width - least + 1)
            else:
                ways = math.inf
        elif code in (regex_codes.ASSERT, regex_codes.ASSERT_NOT):
            ways *= _ways(argument[1], length)
        elif str(code) == "ATOMIC_GROUP":
            ways *= _ways(argument, length)
        elif str(code) == "GROUPREF_EXISTS":
            ways *= sum(_ways(branch, length) for branch in argument[1:] if branch is not None)
    return ways
