# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Quantised backbones: prompts train where gradients pass, are served everywhere, and what cannot be says so.

`tests/backbones/test_zoo.py` serves every model of the zoo quantised; `test_other_methods.py` trains on bitsandbytes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.ao import quantization

from peft_e2vpt import score_prompts
from tests.support.adapted import KV_ONLY, SHALLOW, adapt, config_of, predict, prune, trainable, trained
from tests.support.models import build


LABELS = torch.tensor([1, 3])


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def without_head(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "classifier" not in name


# ---------------------------------------------------------------------------------------------------- ways to quantise
def dynamic(model: Any) -> Any:
    return quantization.quantize_dynamic(model, {nn.Linear})


def half_dynamic(model: Any) -> Any:
    return quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.float16)


def static(model: Any) -> Any:
    """Weights and activations, with ranges that a calibration has seen."""
    quantised = copy.deepcopy(model)
    for name, module in list(quantised.named_modules()):
        if type(module) is nn.Linear:
            wrapped = quantization.QuantWrapper(module)
            for part in wrapped.modules():
                part.qconfig = quantization.get_default_qconfig("onednn")
            quantised.set_submodule(name, wrapped)
    quantization.prepare(quantised, inplace=True)
    inputs = build("vit")[1]
    predict(quantised, inputs)
    if isinstance(quantised, PeftModel):
        with quantised.disable_adapter():
            predict(quantised, inputs)
    return quantization.convert(quantised, inplace=True)


def by_torchao(name: str, keep: Callable[[nn.Module, str], bool] | None = None, **settings: Any) -> Any:
    def quantise(model: Any) -> Any:
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        quantised = copy.deepcopy(model)
        torchao.quantize_(quantised, getattr(torchao, name)(**settings), filter_fn=keep)
        return quantised

    return quantise


def by_quanto(model: Any) -> Any:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    quantised = copy.deepcopy(model)
    quanto.quantize(quantised, weights=quanto.qint8)
    quanto.freeze(quantised)
    return quantised


SERVING = {
    "dynamic": dynamic,
    "float16": half_dynamic,
    "static": static,
    "torchao int8": by_torchao("Int8WeightOnlyConfig"),
    "torchao dynamic": by_torchao("Int8DynamicActivationInt8WeightConfig"),
    "quanto": by_quanto,
}
serving = pytest.mark.parametrize("quantise", SERVING.values(), ids=SERVING)


# ------------------------------------------------------------------------------------------------------------- serving
@serving
def test_an_adapted_model_serves_quantised_with_its_head(quantise):
    model, inputs = adapt()
    prune(model)
    expected, quantised = predict(model, inputs), quantise(model)
    found = predict(quantised, inputs)
    assert 0 < apart(found, expected) < 0.1
    assert quantised.prompt_summary() == model.prompt_summary()
    with quantised.disable_adapter(), model.disable_adapter():
        assert apart(predict(quantised, inputs), predict(model, inputs)) < 0.1
    quantised.merge_adapter()
    assert apart(predict(quantised, inputs), expected) < 0.1
    quantised.unmerge_adapter()
    assert torch.equal(predict(quantised, inputs), found)


@serving
def test_constants_of_a_merged_adapter_stay_what_they_are(quantise):
    model, inputs = adapt()
    expected = predict(model, inputs)
    model.merge_adapter()
    rows = model.base_model.model.e2vpt["0"].e2vpt_merged_rows["default"]
    quantised = quantise(model)
    assert torch.equal(quantised.base_model.model.e2vpt["0"].e2vpt_merged_rows["default"], rows)
    assert apart(predict(quantised, inputs), expected) < 0.1


@pytest.mark.parametrize("settings", [SHALLOW, KV_ONLY, {"share_kv_prompts_across_layers": True}], ids=str)
def test_all_kinds_of_prompts_serve_quantised(settings):
    model, inputs = adapt(**settings)
    assert apart(predict(dynamic(model), inputs), predict(model, inputs)) < 0.1


def test_a_batch_of_several_adapters_is_served_quantised():
    model, inputs = adapt()
    model.add_adapter("other", config_of(num_visual_prompts=2, seed=3))
    model.eval()
    quantised = dynamic(model)
    for names in (["default", "other"], ["__base__", "other"]):
        with torch.no_grad():
            found, expected = (m(**inputs, adapter_names=names).logits for m in (quantised, model))
        assert apart(found, expected) < 0.1
        for name, logits in zip(names, found, strict=True):
            alone = [name] * len(names)
            with torch.no_grad():
                same = quantised(**inputs, adapter_names=alone).logits[names.index(name)]
            assert apart(logits, same) < 0.1  # ranges are those of the batch


def test_a_quantised_model_is_unloaded_as_the_quantised_base_model():
    model, inputs = adapt()
    expected = predict(dynamic(build("vit")[0]), inputs)
    assert torch.equal(predict(dynamic(model).unload(), inputs), expected)


@pytest.mark.compile
def test_an_exported_program_is_quantised():
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model, inputs = adapt()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    program = pt2e.prepare_pt2e(torch.export.export(model, (), inputs, strict=False).module(), quantizer)
    program(**inputs)
    assert 0 < apart(pt2e.convert_pt2e(program)(**inputs).logits, predict(model, inputs)) < 0.1


# ------------------------------------------------------------------------------------------------------------ training
def of_transformers(config: str, **settings: Any) -> Any:
    def quantise(model: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return (
                type(model)
                .from_pretrained(
                    folder, quantization_config=getattr(transformers, config)(**settings), device_map="cpu"
                )
                .eval()
            )

    return quantise


def torchao_config(name: str, **settings: Any) -> Any:
    def quantise(model: Any) -> Any:
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        config = getattr(torchao, name)(**settings)
        return of_transformers("TorchAoConfig", quant_type=config, modules_to_not_convert=["classifier"])(model)

    return quantise


def quanto_config(weights: str) -> Any:
    def quantise(model: Any) -> Any:
        pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        return of_transformers("QuantoConfig", weights=weights, modules_to_not_convert=["classifier"])(model)

    return quantise


TRAINING = {
    "torchao int8": by_torchao("Int8WeightOnlyConfig", keep=without_head),
    "torchao int4": by_torchao("IntxWeightOnlyConfig", keep=without_head, weight_dtype=torch.int4),
    "torchao float8": by_torchao("Float8WeightOnlyConfig", keep=without_head),
    "TorchAoConfig": torchao_config("Int8WeightOnlyConfig"),
    "QuantoConfig int8": quanto_config("int8"),
    "QuantoConfig int4": quanto_config("int4"),
}


@pytest.mark.parametrize("quantise", TRAINING.values(), ids=TRAINING)
def test_prompts_train_on_quantised_weights_and_are_loaded_there(quantise, tmp_path):
    plain, inputs = build("vit")
    base = quantise(plain)
    expected = predict(base, inputs)
    model = trained(get_peft_model(base, config_of()))
    assert model.prompt_summary() == adapt()[0].prompt_summary()
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model.train())], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(**inputs).logits, LABELS)
        loss.backward()
        for name, parameter in trainable(model):
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    answers = predict(model.eval(), inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantise(plain), tmp_path).eval()
    assert torch.equal(predict(loaded, inputs), answers)
    loaded.merge_adapter()
    assert torch.equal(predict(loaded, inputs), answers)
    assert torch.equal(predict(model.unload(), inputs), expected)


def with_dynamic_backbone() -> Any:
    base, _ = build("vit")
    base.vit = dynamic(base.vit)
    return base


def test_an_adapter_is_loaded_into_layers_that_torch_has_quantised(tmp_path):
    model, inputs = adapt()
    prune(model)
    model.save_pretrained(tmp_path / "float")
    loaded = PeftModel.from_pretrained(with_dynamic_backbone(), tmp_path / "float").eval()
    assert apart(predict(loaded, inputs), predict(model, inputs)) < 0.1
    assert loaded.prompt_summary() == model.prompt_summary()
    loaded.save_pretrained(tmp_path / "quantised")
    names = ("float", "quantised")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names]
    assert files[0] == files[1]
    loaded.load_adapter(str(tmp_path / "float"), "other")
    loaded.set_adapter("other", inference_mode=True)
    assert apart(predict(loaded, inputs), predict(model, inputs)) < 0.1


def test_quantised_arithmetic_is_refused_before_it_stops_a_gradient():
    arithmetic = r"no gradient passes through vit\.layers\.0\.attention\.q_proj \(Linear\).*quantise afterwards"
    with pytest.raises(ValueError, match=arithmetic):
        get_peft_model(with_dynamic_backbone(), config_of())
    by_ao = by_torchao("Int8DynamicActivationInt8WeightConfig", keep=without_head)
    with pytest.raises(ValueError, match=arithmetic):
        get_peft_model(by_ao(build("vit")[0]), config_of())


@pytest.mark.parametrize("name", ["dynamic", "torchao dynamic"])
def test_training_and_scoring_after_quantising_are_refused(name):
    model, inputs = adapt()
    quantised = SERVING[name](model)
    with pytest.raises(RuntimeError, match=r"no gradient passes through the projections of vit\.layers\.0\.attention"):
        quantised.train()(**inputs)
    with pytest.raises(ValueError, match="neither train nor be scored"):
        score_prompts(quantised.eval(), [{**inputs, "labels": LABELS}])
    quantised(**inputs)  # serving without no_grad


# --------------------------------------------------------------------------------------------------------------- heads
@serving
def test_a_quantised_head_is_neither_saved_nor_combined(quantise, tmp_path):
    model, _ = adapt()
    model.add_adapter("other", config_of(seed=3))
    quantised = quantise(model)
    with pytest.raises(ValueError, match="The head 'classifier' of the adapter 'default' is quantised.*save"):
        quantised.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="classifier is quantised: combine adapters before"):
        quantised.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["dynamic", "torchao int8"])
def test_no_adapter_gets_a_copy_of_a_quantised_head(name, tmp_path):
    model, _ = adapt()
    model.save_pretrained(tmp_path)
    base = SERVING[name](build("vit")[0])
    refused = r"weights of 'classifier' are quantised.*modules_to_not_convert=\['classifier'\].*after the adapter"
    with pytest.raises(ValueError, match=refused):
        PeftModel.from_pretrained(base, tmp_path)
