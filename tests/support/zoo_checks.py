# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What must hold for every model of `zoo.py`, one function a statement, for `test_zoo.py` and `docs.backbones`.

Every function takes the name of a model, raises an `AssertionError` where the statement is false, and returns what it
measured. `applies` says to which models a statement applies.
"""

from __future__ import annotations

import gc
import re
import tempfile
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_e2vpt import E2VPTConfig
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support import zoo


AT_ODDS_WITH_ITSELF = {"phi4_multimodal_vision"}  # the plain model is causal under sdpa, not under eager and compiled

# They give hidden states to blocks by name, or blocks give them back inside a tuple in a tuple: reentrant checkpoints
# pass neither on, whatever is trained.
WITHOUT_REENTRANT = {"llama4_vision", "maskformer_swin", "pvt_v2", "pvt_v2_linear"}

# Models in which prompts can be put into the sequence of tokens and taken out again, block by block, and the attention
# treats the place behind the first token as no special one.
WITH_INSERTION = (
    *("vit", "vit_mim", "deit", "deit_teacher", "vit_msn", "vit_mae", "ijepa", "dinov2", "dinov2_swiglu"),
    *("dinov2_with_registers", "pixio", "radio", "tipsv2", "yolos", "aimv2", "clip", "metaclip_2", "siglip"),
    *("siglip_vision_head", "beit_abs_pos", "data2vec_vision_abs_pos", "dinov3_vit", "sapiens2", "mobilevit"),
    *("videomae", "vivit", "timesformer_joint", "videoprism", "videomt", "ast", "altclip_vision"),
    *("chinese_clip_vision", "clipseg_vision", "owlvit_vision", "owlv2_vision", "git_vision", "blip_vision"),
    *("blip_2_vision", "instructblip_vision", "flava_image", "kosmos2_vision", "internvl_vision", "janus_vision"),
    *("ovis2_vision", "mgp_str", "timm_vit_base", "timm_vit_base_qknorm", "timm_deit3_base"),
    *("timm_vit_base_siglip", "timm_vit_base_reg4_dinov2", "timm_cait_xxs24_224", "timm_xcit_nano_12_p16_224"),
)
IN_FLOAT32 = {  # norms or softmax, whatever the weights
    *("aimv2", "sapiens2", "videoprism", "git_vision", "ovis2_vision"),
}

# Their attention calls one implementation, or does its own arithmetic; so do all of timm's.
WITH_ONE_IMPLEMENTATION = {
    *("data2vec_vision", "data2vec_vision_abs_pos", "swinv2", "donut_swin", "maskformer_swin", "swin2sr", "hiera"),
    *("vitdet", "sam_vision", "sam_hq_vision", "got_ocr2_vision", "pvt", "pvt_v2", "pvt_v2_linear", "glpn", "cvt"),
    *("levit", "mobilevit", "perceiver", "imagegpt", "timesformer", "timesformer_joint", "blip_vision", "flava_image"),
    *("groupvit_vision", "bridgetower_vision", "kosmos2_5_vision", "mgp_str", "vilt", "seggpt", "depth_anything"),
    *("videoprism", "git_vision", "dinat"),
}
WITHOUT_CHECKPOINTING = {
    *("eomt", "eomt_dinov3", "sam2_hiera", "sam3_vit", "florence2_vision", "pvt", "glpn", "cvt", "levit", "perceiver"),
    *("videomt", "bridgetower_vision", "mgp_str", "layoutlmv3"),
}

# Parts of their decoders of maps are for losses alone, or take part only if there are more layers.
WITH_IDLE_PARTS = {"dpt", "depth_anything"}


# Their plain versions are not exported by torch, or what is exported gives other numbers.
WITHOUT_EXPORT = {
    **dict.fromkeys(("eomt", "eomt_dinov3"), "reads from a buffer whether blocks are masked"),
    **dict.fromkeys(("pixtral", "vilt"), "the number of tokens depends on values"),
    **dict.fromkeys(("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision", "glm4v_vision"), "packed sequences"),
    "imagegpt": "returns a cache",
    "phi4_multimodal_vision": "causal without a mask, which transformers gives it while it exports",
}
# Their plain versions are not quantised by torch.ao: they read the weight of a linear layer themselves.
WITHOUT_DYNAMIC_QUANTISATION = {
    *("siglip2", "gemma4_vision", "layoutlmv3", "timm_beit_base", "timm_swinv2_tiny_window8_256"),
}
WITH_JUMPS = {"groupvit_vision"}  # gives every token to one group: little changes can move it to another


def config(**changes: Any) -> E2VPTConfig:
    settings = {"num_visual_prompts": 3, "num_kv_prompts": 2, "num_segments": 1, "modules_to_save": [], "seed": 0}
    return E2VPTConfig(**{**settings, "visual_prompt_dropout": 0.0, **changes})


def missing(name: str) -> str | None:
    """Why a model cannot be built here."""
    try:
        return zoo.missing(name)
    except ModuleNotFoundError as error:  # older transformers import torchvision for some models
        return str(error)


def build(name: str, dtype: torch.dtype | None = None) -> tuple[Any, dict[str, Any]]:
    model, inputs = zoo.build(name, dtype=dtype)
    return model.requires_grad_(False), inputs  # torch may choose another kernel for weights that need a gradient


def adapt(name: str, dtype: torch.dtype | None = None, **changes: Any) -> tuple[PeftModel, dict[str, Any]]:
    model, inputs = build(name, dtype)
    return get_peft_model(model, config(**changes)).eval(), inputs


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)  # ViLT draws the patches that it reads
    return zoo.output_of(model(**inputs))


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value; of zeros, 0."""
    if torch.equal(one, other):
        return 0.0
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All that a model gives: logits, boxes, masks, hidden states."""
    if isinstance(output, Tensor):
        yield from [output] if output.is_floating_point() else []
    elif isinstance(output, (dict, tuple, list)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors_in(part)


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of a loss that reads the whole output; zeros for what has none."""
    model.zero_grad()
    torch.manual_seed(0)  # ViLT draws the patches that it reads
    loss = sum(tensor.float().square().sum() for tensor in tensors_in(model(**inputs)) if tensor.requires_grad)
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def disturb_heads(model: PeftModel) -> None:
    """Gives the heads other values than those of the base model, as a training does."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "e2vpt_" not in name:
            parameter.add_(0.1 * torch.randn_like(parameter))


@torch.no_grad()
def prompts_have_an_effect(name: str, **changes: Any) -> float:
    model, inputs = build(name)
    base = run(model, inputs)
    output = run(get_peft_model(model, config(**changes)).eval(), inputs)
    assert output.shape == base.shape
    effect = float((output - base).abs().max())
    assert effect > 1e-3, f"the prompts change the output by {effect}"
    return effect


def every_prompt_has_a_gradient(name: str, **changes: Any) -> float:
    """Every prompt and every part of the heads, where there are any; and nothing else."""
    model, inputs = adapt(name, **changes)
    found = gradients(model, inputs)
    prompts = {key: gradient for key, gradient in found.items() if "e2vpt_" in key}
    heads = {key: gradient for key, gradient in found.items() if key not in prompts}
    assert prompts and bool(heads) == bool(model.peft_config["default"].modules_to_save)
    assert all(".modules_to_save.default." in key for key in heads)
    idle = {key for key, gradient in found.items() if not gradient.abs().sum() > 0}
    if name in WITH_IDLE_PARTS and idle < heads.keys():
        idle = set()
    assert not idle, f"without gradient: {idle}"
    return min(float(gradient.abs().max()) for gradient in prompts.values())


@torch.no_grad()
def eager_equals_sdpa(name: str) -> float:
    model, inputs = adapt(name)
    output = run(model, inputs)
    model.set_attn_implementation("eager")
    difference = apart(run(model, inputs), output)
    assert difference < 1e-4
    return difference


def rows_equal_inserted_tokens(name: str) -> float:
    model, inputs = adapt(name, torch.float64, num_kv_prompts=0)
    output = run(model, inputs)
    layers = prompt_layers(model)
    output.float().square().sum().backward()
    reference, inputs = build(name, torch.float64)
    modules = dict(reference.named_modules())
    paths = {module: path for path, module in model.get_base_model().named_modules()}
    tokens = []
    for layer in layers:
        prompts = layer.e2vpt_visual_prompts["default"].detach().clone().requires_grad_()
        block = modules[paths[layer.site.block]]
        block.register_forward_pre_hook(_putting_in(prompts), with_kwargs=True)
        block.register_forward_hook(_cutting_out(len(prompts)))
        tokens.append(prompts)
    expected = run(reference, inputs)
    expected.float().square().sum().backward()
    difference = apart(output, expected)
    assert difference < (1e-5 if name in IN_FLOAT32 else 1e-12)
    for layer, prompts in zip(layers, tokens, strict=True):
        assert apart(layer.e2vpt_visual_prompts["default"].grad, prompts.grad) < 1e-5
    return difference


def _putting_in(prompts: Tensor) -> Any:
    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = torch.cat([hidden[:, :1], prompts.expand(len(hidden), -1, -1), hidden[:, 1:]], dim=1)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return hook


def _cutting_out(count: int) -> Any:
    def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] > count:  # class attention gives the class token alone
            hidden = torch.cat([hidden[:, :1], hidden[:, 1 + count :]], dim=1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook


@torch.no_grad()
def disabled_equals_the_base_model(name: str, **changes: Any) -> float:
    model, inputs = build(name)
    base = run(model, inputs)
    adapted = get_peft_model(model, config(**changes)).eval()
    disturb_heads(adapted)
    with adapted.disable_adapter():
        assert torch.equal(run(adapted, inputs), base)
    assert torch.equal(run(adapted.unload(), inputs), base)
    return 0.0


@torch.no_grad()
def saved_equals_loaded(name: str, **changes: Any) -> float:
    model, inputs = adapt(name, **changes)
    disturb_heads(model)
    output = run(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(build(name)[0], folder, is_trainable=True).eval()
    assert torch.equal(run(loaded, inputs), output)
    return 0.0


def checkpointing_leaves_gradients_equal(name: str, **changes: Any) -> float:
    model, inputs = adapt(name, **changes)
    base = model.get_base_model()
    model.train()
    expected = gradients(model, inputs)
    worst = 0.0
    for use_reentrant in (False,) if name in WITHOUT_REENTRANT else (False, True):
        base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        found = gradients(model, inputs)
        differences = {key: apart(found[key], expected[key]) for key in expected}
        wrong = {key: difference for key, difference in differences.items() if not difference < 1e-4}
        assert not wrong, f"with use_reentrant={use_reentrant}: {wrong}"
        worst = max(worst, *differences.values())
    return worst


def _prune(model: PeftModel) -> None:
    """Prunes the first prompt of every attention, and all of the first."""
    for index, layer in enumerate(prompt_layers(model)):
        token = torch.tensor([0.0, 0.0, 0.0] if index == 0 else [0.0, 1.0, 1.0])
        layer.set_gates("default", token, torch.ones(3, 1))


def _states(model: PeftModel) -> Iterator[str]:
    """An adapted model as it is, then pruned, then merged."""
    yield "adapted"
    _prune(model)
    yield "pruned"
    model.merge_adapter()
    yield "merged"


def _compiled(model: PeftModel, inputs: dict[str, Any]) -> float:
    output = run(model, inputs)
    torch._dynamo.reset()
    difference = apart(run(torch.compile(model, backend="eager"), inputs), output)
    assert difference < 1e-4
    return difference


@torch.no_grad()
def compiled_equals_uncompiled(name: str) -> float:
    return _compiled(*adapt(name))


@torch.no_grad()
def compiled_equals_uncompiled_pruned_and_merged(name: str) -> float:
    model, inputs = adapt(name)
    return max(_compiled(model, inputs) for state in _states(model) if state != "adapted")


def export(model: nn.Module, inputs: dict[str, Any]) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(model, (), inputs, strict=False)


@torch.no_grad()
def exported_equals_eager(name: str) -> float:
    model, inputs = adapt(name)
    worst = 0.0
    for state in _states(model):
        output, program = run(model, inputs), export(model, inputs)
        for what, found in (("", program), (" and decomposed", program.run_decompositions())):
            difference = apart(run(found.module(), inputs), output)
            assert difference < 1e-4, f"{state}{what}: {difference}"
            worst = max(worst, difference)
    return worst


def quantise(model: nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@torch.no_grad()
def quantised_stays_close(name: str) -> float:
    """Served with torch's dynamic quantisation, heads included; without adapter it is the quantised base model."""
    model, inputs = adapt(name, modules_to_save=None)
    output, quantised = run(model, inputs), quantise(model)
    assert quantised.prompt_summary() == model.prompt_summary()
    differences = [apart(run(quantised, inputs), output)]
    base = run(quantise(build(name)[0]), inputs)
    with quantised.disable_adapter():
        assert torch.equal(run(quantised, inputs), base)
    quantised.merge_adapter()
    differences.append(apart(run(quantised, inputs), output))
    assert max(differences) < (0.6 if name in WITH_JUMPS else 0.2)
    assert torch.equal(run(quantised.unload(), inputs), base)
    return max(differences)


def threads_get_the_answers_of_one(name: str, **changes: Any) -> float:
    model, inputs = adapt(name, **changes)
    model.eval()

    @torch.no_grad()
    def run_three_times() -> list[Tensor]:
        return [run(model, inputs) for _ in range(3)]

    expected = run_three_times()[0]
    with ThreadPoolExecutor(8) as pool:
        passes = [pool.submit(run_three_times) for _ in range(8)]
    assert all(torch.equal(answer, expected) for found in passes for answer in found.result())
    return 0.0


def memory_is_freed_with_the_model(name: str, **changes: Any) -> float:
    def lives_on(make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> bool:
        gc.collect()
        gc.disable()
        try:
            model, inputs = make()
            run(model.eval(), inputs)
            reference = weakref.ref(next(model.parameters()))
            del model
            return reference() is not None
        finally:
            gc.enable()

    assert lives_on(lambda: adapt(name, **changes)) == lives_on(lambda: build(name))
    return 0.0


Statement = Callable[..., float]
STATEMENTS: tuple[Statement, ...] = (
    prompts_have_an_effect,
    every_prompt_has_a_gradient,
    eager_equals_sdpa,
    rows_equal_inserted_tokens,
    disabled_equals_the_base_model,
    saved_equals_loaded,
    checkpointing_leaves_gradients_equal,
    threads_get_the_answers_of_one,
    memory_is_freed_with_the_model,
    quantised_stays_close,
)
ABOUT_HEADS: tuple[Statement, ...] = (  # they hold for a head that trains, too
    prompts_have_an_effect,
    every_prompt_has_a_gradient,
    disabled_equals_the_base_model,
    saved_equals_loaded,
    checkpointing_leaves_gradients_equal,
)


def has_a_head(name: str) -> bool:
    """Whether a model is one for a task, by the name of its class, and not a bare backbone."""
    return bool(re.search("For[A-Z]", zoo.BY_NAME[name].model))


def applies(statement: Statement, name: str) -> bool:
    """Whether a statement applies to a model. That the lists are right is a test of its own."""
    if statement is eager_equals_sdpa:
        return name not in WITH_ONE_IMPLEMENTATION | AT_ODDS_WITH_ITSELF and not zoo.is_timm(name)
    if statement is rows_equal_inserted_tokens:
        return name in WITH_INSERTION
    if statement is threads_get_the_answers_of_one:
        return name != "vilt"  # draws the patches that it looks at from torch's random numbers, which threads share
    if statement is checkpointing_leaves_gradients_equal:
        return name not in WITHOUT_CHECKPOINTING
    if statement is exported_equals_eager:
        return name not in WITHOUT_EXPORT
    if statement is quantised_stays_close:
        return name not in WITHOUT_DYNAMIC_QUANTISATION
    if statement in (compiled_equals_uncompiled, compiled_equals_uncompiled_pruned_and_merged):
        return name not in AT_ODDS_WITH_ITSELF
    return True


def has_two_implementations(name: str) -> bool:
    model, _ = adapt(name)
    interface = any(layer.eager_attention is not None for layer in prompt_layers(model))
    return interface and bool(model.get_base_model()._supports_sdpa)


def has_checkpointing(name: str) -> bool:
    return bool(build(name)[0].supports_gradient_checkpointing)
