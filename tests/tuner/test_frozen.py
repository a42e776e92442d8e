# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Frozen means frozen: statistics stay, hooks see image tokens, and the base model comes back bit for bit."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module, remove_hook_from_submodules
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, update_bn

from peft_e2vpt.backbones.sites import find_attention_sites
from tests.support import zoo
from tests.support import zoo_checks as checks
from tests.support.adapted import adapt, checkpoint_activations, config_of, gradients, layers_of, predict
from tests.support.models import build
from tests.support.zoo_marks import ONE_OF_EACH_KIND, marks_of, parameters


TRANSFORMERS = [name for name in zoo.names(attention=True) if not zoo.is_timm(name)]


@pytest.fixture(autouse=True)
def skip_if_missing(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    reason = checks.missing(name) if name in zoo.BY_NAME else None
    if reason:
        pytest.skip(f"not in this environment: {reason}")


def buffers_of_backbone(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if ".modules_to_save." not in name and "e2vpt" not in name
    }


def moved(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    after = dict(model.named_buffers())
    return [name for name, value in before.items() if not torch.equal(after[name].nan_to_num(), value.nan_to_num())]


# ---------------------------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize("name", parameters(TRANSFORMERS))
def test_no_buffer_of_the_backbone_moves_while_prompts_train(name: str) -> None:
    model, inputs = checks.adapt(name, modules_to_save=None)
    before = buffers_of_backbone(model)
    for _ in range(2):
        checks.gradients(model.train(), inputs)
    assert moved(model, before) == []


class Average(nn.Module):
    """Keeps an average of what it sees, as modules of somebody's own do."""

    def __init__(self, name: str = "running_mean") -> None:
        super().__init__()
        self.name = name
        self.register_buffer(name, torch.zeros(32))

    def forward(self, tokens: Tensor) -> Tensor:
        average = getattr(self, self.name)
        if self.training:
            average.lerp_(tokens.detach().mean((0, 2, 3)), 0.1)
        return tokens + average[:, None, None]


class Stem(nn.Sequential):
    """A convolution and what comes after it; the model reads the type of its weight."""

    @property
    def weight(self) -> Any:
        return self[0].weight


STATISTICS: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "batch norm": lambda convolution: Stem(convolution, nn.BatchNorm2d(32)),
    "batch norm without weights": lambda convolution: Stem(convolution, nn.BatchNorm2d(32, affine=False)),
    "cumulative batch norm": lambda convolution: Stem(convolution, nn.BatchNorm2d(32, momentum=None)),
    "instance norm": lambda convolution: Stem(convolution, nn.InstanceNorm2d(32, track_running_stats=True)),
    "spectral norm by a hook": nn.utils.spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "a module of one's own": lambda convolution: Stem(convolution, Average()),
}


def with_stem(kind: Callable[[nn.Conv2d], nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A ViT with statistics in its patch embedding, in training mode."""
    model, inputs = build("vit")
    embeddings = model.vit.embeddings.patch_embeddings
    embeddings.projection = kind(embeddings.projection)
    return model.train(), inputs


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("caller", ["outermost", "tuner", "base", "part", "nobody"])
def test_statistics_of_every_kind_stay_whoever_sets_training_mode(kind: str, caller: str) -> None:
    base, inputs = with_stem(STATISTICS[kind])
    model = get_peft_model(base, config_of())
    before = buffers_of_backbone(model)
    called = {"outermost": model, "tuner": model.base_model, "base": base, "part": base.vit.embeddings}
    if caller != "nobody":
        called[caller].train()
    gradients(model, inputs)
    assert before and moved(model, before) == []
    assert model.unload() is base and all(module.training for module in base.modules())


def test_statistics_of_a_kind_that_nobody_knows_are_set_back_with_a_warning() -> None:
    base, inputs = with_stem(lambda convolution: Stem(convolution, Average("ema")))
    model = get_peft_model(base, config_of()).train()
    before = buffers_of_backbone(model)
    with pytest.warns(UserWarning, match="changes its buffer 'ema' in training mode"):
        gradients(model, inputs)
    assert moved(model, before) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model.train(), inputs)
    assert moved(model, before) == []


def test_an_average_of_weights_collects_statistics_for_the_head_alone() -> None:
    model, inputs = checks.adapt("levit", modules_to_save=None)
    average = AveragedModel(model)
    before = buffers_of_backbone(average)
    of_head = next(b for name, b in average.named_buffers() if "modules_to_save.default" in name and "mean" in name)
    head_before = of_head.clone()
    update_bn([inputs["pixel_values"]], average)
    assert before and moved(average, before) == []
    assert not torch.equal(of_head, head_before)


def test_running_statistics_can_be_reset_after_unloading() -> None:
    base, _ = with_stem(STATISTICS["batch norm"])
    norm = base.vit.embeddings.patch_embeddings.projection[1]
    norm.running_mean.fill_(3)
    model = get_peft_model(base, config_of())
    norm.reset_running_stats()
    assert (norm.running_mean == 3).all()
    model.unload()
    norm.reset_running_stats()
    assert (norm.running_mean == 0).all()


def test_batch_norms_that_are_converted_after_wrapping_stay_too() -> None:
    base, inputs = with_stem(STATISTICS["batch norm"])
    model = nn.SyncBatchNorm.convert_sync_batchnorm(get_peft_model(base, config_of())).train()
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert norms and not any(norm.training for norm in norms)


def test_a_batch_norm_whose_weights_somebody_trains_is_not_frozen() -> None:
    base, inputs = with_stem(STATISTICS["batch norm"])
    model = get_peft_model(base, config_of())
    norm = base.vit.embeddings.patch_embeddings.projection[1].requires_grad_()
    before = norm.running_mean.clone()
    gradients(model.train(), inputs)
    assert not torch.equal(norm.running_mean, before)


def test_a_trained_head_keeps_batch_norms_of_its_own_that_learn() -> None:
    model, inputs = checks.adapt("levit", modules_to_save=None)
    model.add_adapter("second", checks.config(modules_to_save=None))
    for name in ("default", "second"):
        model.set_adapter(name)
        heads = {k: b for k, b in model.named_buffers() if f"modules_to_save.{name}." in k and "running_mean" in k}
        before = {key: buffer.clone() for key, buffer in heads.items()}
        checks.gradients(model.train(), inputs)
        assert before and moved(model, before) == list(before)


def test_all_but_statistics_has_the_mode_that_it_is_given_and_the_base_model_gets_it_back() -> None:
    base, inputs = checks.build("levit")
    model = get_peft_model(base, checks.config(modules_to_save=None)).train()
    still = {type(module) for module in base.modules() if not module.training}
    assert still == {nn.BatchNorm1d, nn.BatchNorm2d}
    model.eval()
    assert not any(module.training for module in base.modules())
    model.train()
    assert all(module.training for module in model.unload().modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_statistics_of_a_copy_stay_and_those_of_the_original_know_nothing_of_it(copied: Any) -> None:
    base, inputs = with_stem(STATISTICS["batch norm"])
    model = get_peft_model(base, config_of()).eval()
    twin = copied(model)
    before = buffers_of_backbone(twin)
    gradients(twin.train(), inputs)
    assert moved(twin, before) == [] and not base.training
    assert all(module.training for module in twin.unload().modules())
    assert not any(module.training for module in model.unload().modules())


def test_a_trained_adapter_on_batch_norms_is_the_same_after_reloading(tmp_path: Path) -> None:
    model, inputs = checks.adapt("levit", modules_to_save=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        checks.gradients(model.train(), inputs)
        optimizer.step()
    expected = checks.run(model.eval(), inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(checks.build("levit")[0], tmp_path).eval()
    assert torch.equal(checks.run(loaded, inputs), expected)
    plain = checks.run(checks.build("levit")[0], inputs)
    with model.disable_adapter():
        assert torch.equal(checks.run(model, inputs), plain)
    assert torch.equal(checks.run(model.unload(), inputs), plain)


# --------------------------------------------------------------------------------------------------------------- hooks
HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")


def seen_by(model: nn.Module, base: nn.Module, inputs: dict[str, Any], register: str) -> list[str]:
    """What hooks on all modules of the base model are called with."""
    seen: list[str] = []
    handles = []
    for path, module in base.named_modules():
        if path and not path.startswith("e2vpt"):

            def note(module: nn.Module, args: Any, *rest: Any, path: str = path) -> None:
                shapes = [tuple(part.shape) for part in args if isinstance(part, Tensor)]
                seen.append(f"{path} {shapes}")

            handles.append(getattr(module, register)(note))
    torch.manual_seed(0)
    output = checks.run(model, inputs)
    if "backward" in register and output.requires_grad:
        output.sum().backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("register", HOOKS[:2])
@pytest.mark.parametrize("name", parameters(TRANSFORMERS))
def test_hooks_see_what_they_see_in_the_plain_model(name: str, register: str) -> None:
    base, inputs = checks.build(name)
    expected = seen_by(base, base, inputs, register)
    model = get_peft_model(base, checks.config()).eval()
    output = checks.run(model, inputs)
    assert seen_by(model, base, inputs, register) == expected
    assert torch.equal(checks.run(model, inputs), output)


@pytest.mark.parametrize("name", ["vit", "swin", "cvt"])
def test_backward_hooks_see_gradients_of_image_tokens(name: str) -> None:
    base, inputs = checks.build(name)
    expected = seen_by(base.requires_grad_(), base, inputs, HOOKS[2])
    model = get_peft_model(base.requires_grad_(False), checks.config()).eval()
    base.requires_grad_()
    assert sorted(seen_by(model, base, inputs, HOOKS[2])) == sorted(expected)


def test_a_lora_on_projections_acts_on_prompts_and_its_hooks_see_image_tokens() -> None:
    def with_lora() -> tuple[nn.Module, dict[str, Tensor]]:
        base, inputs = build("vit")
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["k_proj", "v_proj"], r=2, init_lora_weights=False)
        return inject_adapter_in_model(lora, base), inputs

    plain, inputs = with_lora()
    expected = seen_by(plain, plain, inputs, HOOKS[0])
    base, _ = with_lora()
    model = get_peft_model(base, config_of(modules_to_save=[])).eval()
    output = predict(model, inputs)
    site = layers_of(model)[0].site
    prompts = torch.randn(1, 3, 32)
    key, _ = site.project(prompts, torch.float32)
    whole = site.attention.k_proj(site.block.layernorm_before(prompts))
    assert torch.equal(key.transpose(1, 2).flatten(2), whole)
    assert not torch.equal(whole, site.attention.k_proj.base_layer(site.block.layernorm_before(prompts)))
    assert seen_by(model, base, inputs, HOOKS[0]) == expected
    assert torch.equal(predict(model, inputs), output)


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=lambda wrap: wrap.__name__)
def test_weights_that_a_hook_of_torch_makes_are_made_for_prompts_too(wrap: Any) -> None:
    base, inputs = build("vit")
    for site in find_attention_sites(base):
        wrap(site.attention.k_proj)
    model = get_peft_model(base, config_of()).eval()
    site = layers_of(model)[0].site
    prompts = torch.randn(1, 3, 32)
    expected = site.attention.k_proj(site.block.layernorm_before(prompts))
    site.attention.k_proj.register_forward_hook(lambda module, args, output: pytest.fail("a hook has seen prompts"))
    for part in ("weight_g", "weight_orig"):
        if hasattr(site.attention.k_proj, part):  # stale: the next call makes another
            site.attention.k_proj.weight = torch.zeros(32, 32)
    key, _ = site.project(prompts, torch.float32)
    assert torch.equal(key.transpose(1, 2).flatten(2), expected)


def test_hooks_that_put_parts_of_parameters_together_are_called_for_prompts() -> None:
    model, _ = adapt("vit")
    site = layers_of(model)[0].site
    norm, calls = site.block.layernorm_before, []
    norm.register_forward_pre_hook(lambda module, args: calls.append(len(args)))
    site.project(torch.randn(1, 3, 32), torch.float32)
    assert calls == []
    norm.weight.ds_id = 0  # as ZeRO-3 marks them
    site.project(torch.randn(1, 3, 32), torch.float32)
    assert calls == [1]


# ------------------------------------------------------------------------------------------------- the base comes back
def monkeypatched(attention: nn.Module) -> None:
    former = attention.forward

    @functools.wraps(former)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return former(*args, **kwargs)

    attention.forward = forward


def hooked(attention: nn.Module) -> None:
    add_hook_to_module(attention, ModelHook())


WRAPPED: dict[str, Callable[[PeftModel, list[nn.Module]], Any]] = {
    "hooks on attentions": lambda model, attentions: [hooked(attention) for attention in attentions],
    "two hooks": lambda model, attentions: [
        add_hook_to_module(attention, ModelHook(), append=True) for attention in attentions for _ in range(2)
    ],
    "hooks everywhere": lambda model, attentions: [hooked(module) for module in model.modules()],
    "a function around": lambda model, attentions: [monkeypatched(attention) for attention in attentions],
    "a function around a hook": lambda model, attentions: [
        wrap(attention) for attention in attentions for wrap in (hooked, monkeypatched)
    ],
    "dispatched": lambda model, attentions: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "offloaded": lambda model, attentions: cpu_offload(model, torch.device("cpu")),
}
FAILS_OFFLOADED = {  # the plain model too: it reads weights of modules that it does not call
    *("eomt", "eomt_dinov3", "siglip", "siglip_vision_head", "siglip2", "videomt", "bridgetower_vision"),
    *("mllama_vision", "phi4_multimodal_vision", "glm4v_vision", "layoutlmv3"),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=marks_of(name))
        for name in TRANSFORMERS
        for way in WRAPPED
        if not (way == "offloaded" and name in FAILS_OFFLOADED)
    ],
)
def test_the_base_model_comes_back_from_under_what_was_put_around_it(name: str, way: str) -> None:
    base, inputs = checks.build(name)
    plain = checks.run(base, inputs)
    model = get_peft_model(base, checks.config(modules_to_save=None)).eval()
    expected = checks.run(model, inputs)
    WRAPPED[way](model, [layer.site.attention for layer in layers_of(model)])
    assert torch.equal(checks.run(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(checks.run(model, inputs), plain)
    assert torch.equal(checks.run(model.unload(), inputs), plain)
    remove_hook_from_submodules(base)
    assert torch.equal(checks.run(base, inputs), plain)
    again = get_peft_model(base, checks.config(modules_to_save=None)).eval()
    assert torch.equal(checks.run(again, inputs), expected)
    assert torch.equal(checks.run(again.unload(), inputs), plain)


@torch.no_grad()
@pytest.mark.parametrize("removed", ["before unloading", "after unloading"])
@pytest.mark.parametrize("added", ["before wrapping", "after wrapping"])
@pytest.mark.parametrize("name", ["hiera", "swinv2", "sam_vision", "vit", "levit"])
def test_hooks_come_and_go_in_any_order(name: str, added: str, removed: str) -> None:
    base, inputs = checks.build(name)
    plain = checks.run(base, inputs)
    attentions = [site.attention for site in find_attention_sites(base)]
    if added == "before wrapping":
        for attention in attentions:
            hooked(attention)
    model = get_peft_model(base, checks.config()).eval()
    if added == "after wrapping":
        for attention in attentions:
            hooked(attention)
    expected = checks.run(model, inputs)
    assert not torch.equal(expected, plain)
    if removed == "before unloading":
        for attention in attentions:
            remove_hook_from_module(attention)
        assert torch.equal(checks.run(model, inputs), expected)
    model.unload()
    if removed == "after unloading":
        for attention in attentions:
            remove_hook_from_module(attention)
    assert torch.equal(checks.run(base, inputs), plain)


def test_a_forward_that_somebody_puts_back_is_an_error_and_not_a_model_without_prompts() -> None:
    base, inputs = checks.build("hiera")
    attention = find_attention_sites(base)[0].attention
    former = attention.forward
    model = get_peft_model(base, checks.config()).eval()
    attention.forward = former
    with pytest.raises(RuntimeError, match="its forward was replaced after the model was adapted"):
        checks.run(model, inputs)
    with model.disable_adapter():
        checks.run(model, inputs)


COMPILED: dict[str, Callable[[PeftModel], Any]] = {
    "base": lambda model: model.get_base_model().compile(backend="eager"),
    "blocks": lambda model: [layer.site.block.compile(backend="eager") for layer in layers_of(model)],
    "around": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.compile
@torch.no_grad()
@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize("name", ["vit", "hiera"])
def test_the_base_model_comes_back_from_what_was_compiled(name: str, way: str) -> None:
    torch._dynamo.reset()
    base, inputs = checks.build(name)
    plain = checks.run(base, inputs)
    model = get_peft_model(base, checks.config()).eval()
    expected = checks.run(model, inputs)
    compiled = COMPILED[way](model)
    runs = compiled if way == "around" else model
    assert checks.apart(checks.run(runs, inputs), expected) < 1e-6
    with model.disable_adapter():
        assert torch.equal(checks.run(runs, inputs), plain)
    assert torch.equal(checks.run(model.unload(), inputs), plain)


# --------------------------------------------------------------------------------------------------------- checkpoints
ORDERS = ("before", "after", "before, with gradients of inputs", "after, with gradients of inputs", "inputs first")
CHECKPOINTED = [name for name in TRANSFORMERS if name not in checks.WITHOUT_CHECKPOINTING]


def checkpointed(name: str, order: str, reentrant: bool) -> tuple[PeftModel, dict[str, Any]]:
    base, inputs = checks.build(name, torch.float64)
    kwargs = {"use_reentrant": reentrant}
    if order == "inputs first":
        base.enable_input_require_grads()
    if order.startswith("before"):
        checkpoint_activations(base, kwargs)
    model = get_peft_model(base, checks.config())
    if not order.startswith("before"):
        checkpoint_activations(model, kwargs)
    if order.endswith("inputs"):
        model.enable_input_require_grads()
    return model.train(), inputs


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def marks_of_order(name: str, order: str) -> list[Any]:
    """All orders for one model of each kind; for the others, those with gradients of inputs, which used to fail."""
    often = name in ONE_OF_EACH_KIND or order.endswith("gradients of inputs")
    return marks_of(name) if often else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "order"),
    [pytest.param(name, order, marks=marks_of_order(name, order)) for name in CHECKPOINTED for order in ORDERS],
)
def test_checkpoints_leave_gradients_equal_in_every_order(name: str, order: str) -> None:
    plain, inputs = checks.adapt(name, torch.float64)
    expected = checks.gradients(plain.train(), inputs)
    for reentrant in (False,) if name in checks.WITHOUT_REENTRANT else (False, True):
        model, inputs = checkpointed(name, order, reentrant)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Reentrant activation checkpoints")
            found = checks.gradients(model, inputs)
        assert expected.keys() == found.keys()
        assert max(checks.apart(found[key], expected[key]) for key in expected) < 1e-12


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", sorted(checks.WITHOUT_REENTRANT))
def test_a_model_that_loses_gradients_in_reentrant_checkpoints_is_warned_of_once(name: str) -> None:
    model, inputs = checkpointed(name, "after", reentrant=True)
    with pytest.warns(UserWarning, match="lose the gradients .* Set use_reentrant=False"):
        checks.run(model, inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Reentrant activation checkpoints")
        checks.run(model, inputs)


@pytest.mark.parametrize("module", ["vit.embeddings", "vit.embeddings.patch_embeddings"])
def test_a_module_before_the_blocks_can_be_trained_with_checkpoints(module: str) -> None:
    base, inputs = build("vit")
    model = get_peft_model(base, config_of(modules_to_save=["classifier", module]))
    wanted = gradients(model.train(), inputs)
    checkpoint_activations(model, {"use_reentrant": True})
    torch.testing.assert_close(gradients(model.train(), inputs), wanted, rtol=1e-4, atol=1e-7)
    copies = [part for name, part in model.named_modules() if f"{module}.modules_to_save" in name]
    assert copies and not any(part._forward_hooks for part in copies)


@pytest.mark.parametrize("enabled", ["never", "before wrapping", "after wrapping", "twice"])
def test_inputs_require_gradients_after_unloading_where_they_did_before_wrapping(enabled: str) -> None:
    base, inputs = checks.build("swin")
    if enabled in ("before wrapping", "twice"):
        base.enable_input_require_grads()
    model = get_peft_model(base, checks.config())
    if enabled in ("after wrapping", "twice"):
        model.enable_input_require_grads()
    found = checks.gradients(model.train(), inputs)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    model.unload()
    hooks = list(base.swin.embeddings.patch_embeddings._forward_hooks.values())
    assert [hook.__name__ for hook in hooks] == ["make_inputs_require_grads"] * (
        enabled in ("before wrapping", "twice")
    )
    base.disable_input_require_grads()
    assert not base.swin.embeddings.patch_embeddings._forward_hooks


def test_a_hook_that_a_program_copies_from_transformers_takes_tuples_too() -> None:
    def make_inputs_require_grad(module: nn.Module, args: Any, output: Any) -> None:
        output.requires_grad_(True)

    base, inputs = checks.build("swin")
    model = get_peft_model(base, checks.config())
    base.get_input_embeddings().register_forward_hook(make_inputs_require_grad)
    checks.gradients(model.train(), inputs)
