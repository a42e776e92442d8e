# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Compiled, exported, copied, pickled or in a pipeline, an adapted model gives the numbers of the eager one."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.support.adapted import KV_ONLY, SHALLOW, adapt, config_of, gradients, layers_of, predict, prune, trainable
from tests.support.models import BATCH, NAMES, build, output_of


pytestmark = pytest.mark.compile


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "swin": ("swin", {}),
    "shallow": ("vit", SHALLOW),
    "zeroed": ("vit", {"pruned_prompts": "zero"}),
    "kv only": ("dinov2", KV_ONLY),
    "kv across layers": ("vit", {"share_kv_prompts_across_layers": True}),
    "rows behind": ("siglip2", {"kv_prompt_position": "after"}),
    "relative bias": ("beit_relative_bias", {}),
    "shared bias": ("beit_shared_bias", {}),
    "eager attention": ("beit_relative_bias", {"attn_implementation": "eager"}),
}
cases = pytest.mark.parametrize("case", CASES)


def case_of(case: str, *, pruned: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    name, settings = CASES[case]
    model, inputs = adapt(name, **settings)
    if pruned:
        prune(model)
    return model, inputs


def used(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Leaves behind what a training step leaves behind."""
    gradients(model.train(), inputs)
    model.eval()


# ------------------------------------------------------------------------------------------------------------ compiled
@pytest.mark.parametrize("case", ["vit", "swin", "shallow"])
def test_the_compiled_model_gives_the_numbers_of_the_eager_one(case, fresh_compiler):
    name, settings = CASES[case]
    model, inputs = adapt(name, visual_prompt_dropout=0.2, **settings)
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for change in (lambda model: None, prune):  # the same compiled model has to notice other gates
        change(model)
        expected = {name: gradient.clone() for name, gradient in gradients(model, inputs).items()}
        found = gradients(compiled, inputs)
        assert {name.removeprefix("_orig_mod.") for name in found} == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name.removeprefix("_orig_mod.")])


def test_switching_off_and_between_adapters_is_noticed_by_a_compiled_model(fresh_compiler):
    model, inputs = adapt()
    model.add_adapter("other", config_of(num_visual_prompts=2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    answers = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        answers.append(predict(compiled, inputs))
        torch.testing.assert_close(answers[-1], predict(model, inputs))
    with model.disable_adapter():
        answers.append(predict(compiled, inputs))
    torch.testing.assert_close(answers[-1], predict(build("vit")[0], inputs))
    assert torch.equal(answers[0], answers[2])
    assert all((answers[0] - answer).abs().max() > 1e-2 for answer in (answers[1], answers[3]))


def test_a_compiled_model_saves_what_the_eager_one_saves(tmp_path, fresh_compiler):
    model, inputs = adapt()
    prune(model)
    compiled = torch.compile(model, backend="aot_eager")
    predict(compiled, inputs)
    compiled.save_pretrained(tmp_path / "compiled")
    model.save_pretrained(tmp_path / "eager")
    files = [(tmp_path / which / "adapter_model.safetensors").read_bytes() for which in ("compiled", "eager")]
    assert files[0] == files[1]


# ------------------------------------------------------------------------------------------------------------ exported
@pytest.mark.parametrize("pruned", [False, True])
@cases
def test_the_exported_program_gives_the_numbers_of_the_model(case, pruned):
    model, inputs = case_of(case, pruned=pruned)
    used(model, inputs)
    program = torch.export.export(model, (), inputs, strict=False)
    others = {**inputs, "pixel_values": inputs["pixel_values"].flip(0) + 0.5}
    found = output_of(program.module()(**others))
    torch.testing.assert_close(found, predict(model, others))
    assert not torch.allclose(found, predict(model, inputs), atol=1e-2)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["vit", "beit_relative_bias", "swin", "dinov3"])
def test_onnx_runtime_gives_the_numbers_of_the_model(name, merged, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, inputs = adapt(name)
    prune(model)
    if merged:
        model.merge_adapter()
    program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    others = {**inputs, "pixel_values": inputs["pixel_values"].flip(0) + 0.5}
    found = session.run(None, {node.name: others[node.name].numpy() for node in session.get_inputs()})
    expected = predict(model, others)
    torch.testing.assert_close(next(torch.from_numpy(o) for o in found if o.shape == expected.shape), expected)


# -------------------------------------------------------------------------------------------------- copied and pickled
def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


ways = pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])


@ways
@pytest.mark.parametrize(
    "name, settings",
    [*[(name, {}) for name in NAMES], ("vit", SHALLOW), ("vit", {"share_kv_prompts_across_layers": True})],
    ids=str,
)
def test_a_copy_is_equal_and_independent(name, settings, copied):
    model, inputs = adapt(name, **settings)
    prune(model)
    used(model, inputs)
    expected = predict(model, inputs)
    other = copied(model)
    assert torch.equal(predict(other, inputs), expected)

    # every trained value of the copy is in use, and none is that of the original
    found, ours = gradients(other.train(), inputs), gradients(model.train(), inputs)
    assert [key for key, gradient in ours.items() if not torch.equal(found[key], gradient)] == []
    with torch.no_grad():
        for _, parameter in trainable(other):
            parameter.zero_()
    for layer in layers_of(other):
        if "default" in layer.e2vpt_visual_prompts:
            layer.set_gates("default", torch.zeros(3), torch.zeros(3, 4))
    assert torch.equal(predict(model.eval(), inputs), expected)
    assert not torch.allclose(predict(other.eval(), inputs), expected, atol=1e-3)

    # and a copy can be taken apart like the original
    plain, _ = build(name)
    assert torch.equal(predict(other.unload(), inputs), predict(plain, inputs))
    assert torch.equal(predict(model, inputs), expected)


# ------------------------------------------------------------------------------------------------------------ pipeline
def test_a_pipeline_answers_as_the_model():
    from PIL import Image

    model, _ = adapt()
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    images = [Image.new("RGB", (40, 48), color) for color in ("red", "teal")]
    assert len(images) == BATCH
    pipeline = transformers.pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    answers = pipeline(images, top_k=5)
    scores = predict(model, processor(images, return_tensors="pt")).softmax(-1)
    for answer, expected in zip(answers, scores, strict=True):
        found = {entry["label"]: entry["score"] for entry in answer}
        assert found == pytest.approx(
            {f"LABEL_{label}": float(score) for label, score in enumerate(expected)}, rel=1e-4
        )
