# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The private names of other packages that this one relies on: each exists, with the signature that is used."""

from __future__ import annotations

import ast
import inspect
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import AttentionInterface, ImageClassificationPipeline, Pipeline, PreTrainedModel, Trainer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import peft_e2vpt
from peft_e2vpt import E2VPTLayer, E2VPTModel
from peft_e2vpt._compat import (
    BufferDict,
    ExcludedModule,
    bring_back,
    device_and_dtype,
    forward_slot,
    has_packed_layers,
    has_values,
    is_batched,
    is_quantised,
    is_watched,
    keeps_statistics,
    offload_device,
    packed_weights,
    stops_gradients,
    takes_processor,
    unwatched,
    with_packed_layers,
)
from peft_e2vpt.tuner.prompts import Prompts
from tests.support.models import build


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


# ------------------------------------------------------------------------------------------------------ imported names
def test_a_buffer_dict_holds_buffers_that_are_saved_if_it_is_persistent() -> None:
    for persistent in (True, False):
        module = BufferDict(persistent=persistent)
        module["one"] = torch.ones(2)
        assert dict(module.named_buffers()).keys() == {"one"} == set(module.keys())
        assert ("one" in module.state_dict()) is persistent
        del module["one"]
        assert "one" not in module
        module["two"] = torch.ones(1)
        module.clear()
        assert not list(module.buffers())


def test_tensors_without_values_of_their_own_are_known() -> None:
    assert has_values(torch.ones(2)) and not has_values(torch.ones(2, device="meta"))
    with FakeTensorMode():
        assert not has_values(torch.ones(2))
    found = []
    torch.func.vmap(lambda row: found.append(is_batched(row)) or row)(torch.ones(2, 3))
    assert found == [True] and not is_batched(torch.ones(2))


def test_an_excluded_module_counts_as_no_target() -> None:
    assert not ExcludedModule()


def with_running_mean() -> nn.Module:
    module = nn.Module()
    module.register_buffer("running_mean", torch.zeros(1))
    return module


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(2),
        nn.SyncBatchNorm(2),
        nn.InstanceNorm2d(2, track_running_stats=True),
        nn.utils.spectral_norm(nn.Linear(2, 2)),
        parametrizations.spectral_norm(nn.Linear(2, 2)).parametrizations.weight[0],
        with_running_mean(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_with_statistics_are_known(module: nn.Module) -> None:
    assert keeps_statistics(module) and not keeps_statistics(nn.LayerNorm(2))


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_view_of_a_module_has_its_weights_and_none_of_its_hooks(register: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert not is_watched(module.eval())
    calls: list[nn.Module] = []
    for part in (module, module[0]):
        getattr(part, register)(lambda module, *args: calls.append(module))
    assert is_watched(module)
    tokens = torch.randn(3, 2, requires_grad=True)
    view = unwatched(module)
    output = view(tokens)
    output.sum().backward()
    assert not calls and module[0].weight.grad is not None
    assert torch.equal(output, module(tokens)) and list(view.parameters())[0] is module[0].weight


def test_accelerate_calls_the_former_forward_of_a_module_with_a_hook() -> None:
    module = nn.Linear(2, 2)
    assert forward_slot(module) == "forward"
    add_hook_to_module(module, ModelHook())
    assert forward_slot(module) == "_old_forward" and hasattr(module, "_old_forward")
    remove_hook_from_module(module)
    assert forward_slot(module) == "forward"


def test_offloaded_weights_are_taken_back() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    weights = {name: value.clone() for name, value in module[0].state_dict().items()}
    add_hook_to_module(module[0], AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights))
    bring_back(module)
    assert torch.equal(module[0].weight, weights["weight"]) and offload_device(module) is None


def test_an_offloaded_module_tells_where_it_runs() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    assert offload_device(module) is None
    weights = {name: value.clone() for name, value in module[0].state_dict().items()}
    add_hook_to_module(module[0], AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights))
    assert next(module.parameters()).is_meta and offload_device(module) == torch.device("cpu")

    assert device_and_dtype(module) == (torch.device("cpu"), torch.float32)


class Packed(torch.Tensor):
    """A tensor made of others, as torchao makes them."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None


def in_bits(dtype: torch.dtype) -> nn.Module:
    module = nn.Linear(2, 2, bias=False)
    module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    return module


def of_integers() -> nn.Module:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.ones(2, 2).as_subclass(Packed), requires_grad=False)
    module.weight.values = torch.ones(2, 2, dtype=torch.int8)
    return module


@pytest.mark.parametrize(
    ("module", "dtype", "quantised", "stops"),
    [
        (in_bits(torch.float32), torch.float32, False, False),
        (in_bits(torch.bfloat16), torch.bfloat16, False, False),
        (in_bits(torch.int8), None, True, False),
        (in_bits(torch.float8_e4m3fn), None, True, False),
        (nn.Sequential(in_bits(torch.uint8), nn.BatchNorm1d(2).half()), torch.float16, True, False),
        (nn.ReLU(), None, False, False),
        (of_integers(), torch.float32, True, False),
        (torch.ao.nn.quantized.dynamic.Linear(2, 3), torch.float32, True, True),
        (torch.ao.nn.quantized.Linear(2, 3), torch.float32, True, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_module_tells_where_and_with_what_it_computes_quantised_or_not(module, dtype, quantised, stops) -> None:
    assert device_and_dtype(module) == (torch.device("cpu"), dtype)
    assert (is_quantised(module), stops_gradients(module)) == (quantised, stops)
    packed = list(packed_weights(module))
    assert bool(packed) is has_packed_layers(module) is stops
    assert [tensor.shape for tensor in packed] == ([(3, 2), (3,)] if stops else [])


def test_part_of_a_state_dict_is_loaded_beside_packed_layers() -> None:
    model = nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(2, 3), nn.Linear(3, 1))
    before, part = model[0].weight(), {"1.bias": torch.ones(1)}
    with pytest.raises(KeyError):
        model.load_state_dict(part, strict=False)
    model.load_state_dict(with_packed_layers(model, part), strict=False)
    assert torch.equal(model[0].weight().int_repr(), before.int_repr()) and model[1].bias == 1
    assert with_packed_layers(model[1], part) is part


def test_pipelines_say_which_processors_they_take() -> None:
    assert takes_processor(ImageClassificationPipeline, "image_processor") is True
    assert takes_processor(ImageClassificationPipeline, "tokenizer") is False
    assert hasattr(Pipeline, "_load_feature_extractor")


# ---------------------------------------------------------------------------------------------- methods and attributes
OVERRIDDEN = [  # (class of another package, ours, method)
    *[
        (BaseTuner, E2VPTModel, name)
        for name in (
            "_cast_adapter_dtype",
            "_check_target_module_exists",
            "_check_tied_modules",
            "_create_and_replace",
            "_get_adapter_state_dict",
            "_pre_injection_hook",
            "_prepare_adapter_config",
            "_remap_adapter_state_dict_for_load",
            "_remove_adapter_name_from_key",
            "_unload_and_optionally_merge",
        )
    ],
    (PeftModel, E2VPTModel, "_enable_peft_forward_hooks"),  # calls that of the tuner
    (BaseTunerLayer, E2VPTLayer, "_get_base_layer_device_and_dtype"),
    (BaseTunerLayer, E2VPTLayer, "_move_adapter_to_device_of_base_layer"),
    (nn.Module, Prompts, "_apply"),
    (nn.Module, E2VPTLayer, "_apply"),
    (nn.Module, E2VPTLayer, "_replicate_for_data_parallel"),
]


@pytest.mark.parametrize(("theirs", "ours", "name"), OVERRIDDEN, ids=lambda part: getattr(part, "__name__", part))
def test_an_overridden_method_exists_and_takes_the_same_arguments(theirs: type, ours: type, name: str) -> None:
    expected = [p for p in inspect.signature(getattr(theirs, name)).parameters if p not in ("self", "args", "kwargs")]
    parameters = inspect.signature(getattr(ours, name)).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    found = [p for p in parameters if p not in ("self", "args", "kwargs")]
    assert found == expected[: len(found)] and (takes_any or found == expected)


def test_every_override_is_known() -> None:
    private = {
        (ours, name)
        for ours, bases in ((E2VPTModel, (BaseTuner, PeftModel)), (E2VPTLayer, (BaseTunerLayer, nn.Module)))
        for name in vars(ours)
        if is_private(name) and name != "_abc_impl" and any(hasattr(base, name) for base in bases)
    }
    assert private <= {(ours, name) for _, ours, name in OVERRIDDEN}


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def _loaded_parameter() -> nn.Parameter:
    with TemporaryDirectory() as folder:
        model, _ = build("vit")
        model.save_pretrained(folder)
        return next(type(model).from_pretrained(folder).parameters())


ATTRIBUTES: dict[str, Any] = {  # where each private attribute that is read or set comes from
    "_apply": lambda: nn.Module,
    "_buffers": lambda: nn.Module(),
    "_attn_implementation": lambda: build("vit")[0].config,
    "_cast_adapter_dtype": lambda: BaseTuner,
    "_created_lr_scheduler": lambda: inspect.getsource(Trainer.__init__),
    "_forward_hooks": nn.Module,
    "_forward_hooks_always_called": nn.Module,
    "_forward_hooks_with_kwargs": nn.Module,
    "_forward_pre_hooks": nn.Module,
    "_forward_pre_hooks_with_kwargs": nn.Module,
    "_get_adapter_state_dict": lambda: BaseTuner,
    "_get_output_dir": lambda: Trainer,
    "_gradient_checkpointing_func": lambda: inspect.getsource(transformers.modeling_utils),
    "_hf_hook": lambda: add_hook_to_module(nn.Linear(1, 1), AlignDevicesHook()),
    "_init_weights": lambda: PreTrainedModel,
    "_is_hf_initialized": _loaded_parameter,
    "_last_lr": lambda: LambdaLR(_optimizer(), lambda step: 1.0),
    "_load_state_dict_pre_hooks": nn.Module,
    "_load_from_state_dict": lambda: nn.Module,
    "_modules": lambda: nn.Module(),
    "_parameters": lambda: nn.Module(),
    "_prepare_inputs": lambda: Trainer,
    "_remap_adapter_state_dict_for_load": lambda: BaseTuner,
    "_state_dict_hooks": nn.Module,
    "_remove_adapter_name_from_key": lambda: BaseTuner,
    "_require_grads_hook": lambda: inspect.getsource(PreTrainedModel.enable_input_require_grads),
    "_require_grads_hooks": lambda: inspect.getsource(PreTrainedModel.enable_input_require_grads),
    "_reset": lambda: ReduceLROnPlateau(_optimizer()),
    "_train_batch_size": lambda: inspect.getsource(Trainer.__init__),
    "_trial": lambda: inspect.getsource(Trainer),
    "_version": lambda: torch.ones(1),
}
OF_DEEPSPEED = {"_hp_mapping", "_z3_optimizer"}
OF_PYTHON = {
    "_fields",
    "_getframe",
    "_replace",
    "_name_",
    "_value_",
    "_member_names_",
    "_member_map_",
    "_value2member_map_",
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_private_attribute_exists(name: str) -> None:
    owner = ATTRIBUTES[name]()
    assert f"self.{name}" in owner if isinstance(owner, str) else hasattr(owner, name)


def test_deepspeed_marks_its_parameters() -> None:
    spec = find_spec("deepspeed")
    if spec is None or spec.origin is None:
        pytest.skip("DeepSpeed is not installed")
    package = Path(spec.origin).parent
    sources = "".join(file.read_text() for part in ("runtime", "utils") for file in (package / part).rglob("*.py"))
    assert all(f".{name} = " in sources for name in OF_DEEPSPEED)


def test_the_attention_interface_is_asked_by_name() -> None:
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] and "e2vpt" in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert list(inspect.signature(AttentionInterface.register).parameters) == ["key", "value"]


# -------------------------------------------------------------------------------------------------------- nothing else
ROOT = Path(peft_e2vpt.__file__).parent
TREES = {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text("utf-8")) for file in ROOT.rglob("*.py")}


def own_names() -> set[str]:
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    functions = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return functions | {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("self._")
    }


def test_private_names_are_imported_in_compat_alone() -> None:
    imported = {
        file
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level and node.module != "__future__"
        if any(map(is_private, [*str(node.module).split("."), *(alias.name for alias in node.names)]))
    }
    assert imported == {"_compat.py"}


def test_every_private_attribute_of_another_package_is_known() -> None:
    read = {
        node.attr
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr)
    }
    asked = {
        node.args[1].value
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")
        if isinstance(node.args[1], ast.Constant) and is_private(node.args[1].value)
    }
    assert (read | asked) - own_names() - ATTRIBUTES.keys() - OF_DEEPSPEED - OF_PYTHON == set()
