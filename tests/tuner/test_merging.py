# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Merged rows are constants: the same answers bit by bit, computed anew at known places, and fit for export."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_e2vpt import rewind, score_prompts, trained_tensors
from tests.support.adapted import (
    KV_ONLY,
    SHALLOW,
    adapt,
    config_of,
    gradients,
    layers_of,
    predict,
    prune,
    trainable,
    trained,
)
from tests.support.models import build


families = pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "clip"])
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "rows behind": {"kv_prompt_position": "after", "share_kv_prompts": False},
    "zeroed": {"pruned_prompts": "zero"},
    "kv only": KV_ONLY,
    "no kv": {"num_kv_prompts": 0},
}
cases = pytest.mark.parametrize("case", CASES)


def unmerged(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """What the model answers without constants."""
    model.unmerge_adapter()
    answer = predict(model, inputs)
    model.merge_adapter()
    return answer


# --------------------------------------------------------------------------------------------------------- the answers
@pytest.mark.parametrize("pruned", [False, True])
@cases
@families
def test_a_merged_model_gives_the_same_bits(name, case, pruned):
    model, inputs = adapt(name, **CASES[case])
    if pruned:
        prune(model)
    expected = predict(model, inputs)
    model.merge_adapter()
    assert torch.equal(predict(model, inputs), expected)
    model.unmerge_adapter()
    assert torch.equal(predict(model, inputs), expected)


def noting(module: nn.Module, calls: list[nn.Module]) -> Any:
    def forward(tokens: Tensor) -> Tensor:
        calls.append(module)
        return type(module).forward(module, tokens)

    return forward


@families
def test_norm_and_projections_run_for_the_tokens_only(name, monkeypatch):
    model, inputs = adapt(name)
    calls: list[nn.Module] = []
    for layer in layers_of(model):
        norm = getattr(layer.site.block, layer.site.backbone.norm)
        for part in (norm, layer.site.attention.k_proj, layer.site.attention.v_proj):
            monkeypatch.setattr(part, "forward", noting(part, calls))
    for merge, count in ((False, 2), (True, 1)):
        if merge:
            model.merge_adapter()
        calls.clear()
        predict(model, inputs)
        assert len(calls) == count * 3 * len(layers_of(model))


def test_key_value_prompts_of_another_layer_are_merged_too():
    model, inputs = adapt(share_kv_prompts_across_layers=True)
    expected = predict(model, inputs)
    model.merge_adapter()
    assert torch.equal(predict(model, inputs), expected)
    state = {key: value + 1.0 if "kv_prompts" in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    found = predict(model, inputs)
    assert torch.equal(found, unmerged(model, inputs)) and not torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_gives_the_same_bits(dtype):
    model, inputs = adapt(dtype=dtype)
    expected = predict(model, inputs)
    model.merge_adapter()
    assert torch.equal(predict(model, inputs), expected)


def test_a_model_merged_in_inference_mode_can_be_used_outside_of_it():
    model, inputs = adapt()
    with torch.inference_mode():
        expected = predict(model, inputs)
        model.merge_adapter()
    pixels = inputs["pixel_values"].clone().requires_grad_()
    logits = model(pixel_values=pixels).logits
    logits.sum().backward()
    assert torch.equal(logits, expected) and pixels.grad is not None


# ----------------------------------------------------------------------------------------------------------- its state
@families
def test_peft_is_told_what_is_merged(name):
    model, _ = adapt(name)
    model.add_adapter("other", config_of(seed=3))

    def merged() -> set[tuple[str, ...]]:
        return {tuple(s.merged_adapters) for s in model.get_layer_status() if s.module_type == "E2VPTLayer"}

    assert merged() == {()}
    model.merge_adapter()
    assert merged() == {("default",)} and all(layer.merged for layer in layers_of(model))
    with pytest.warns(UserWarning, match="Already following adapters were merged default.*merging other"):
        model.merge_adapter(["default", "other"])
    assert merged() == {("default", "other")} and model.active_adapters == ["default"]
    model.unmerge_adapter()
    assert merged() == {()}


def test_merging_changes_nothing_that_is_saved(tmp_path):
    model, _ = adapt()
    prune(model)
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path / "merged")
    files = [(tmp_path / which / "adapter_model.safetensors").read_bytes() for which in ("before", "merged")]
    assert files[0] == files[1]


def test_activating_or_adding_an_adapter_unmerges_with_a_warning():
    model, inputs = adapt()
    plain = predict(model, inputs)
    for change in (lambda: model.add_adapter("other", config_of(seed=3)), lambda: model.set_adapter("other")):
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"):
            change()
        assert not any(layer.merged for layer in layers_of(model))
    assert not torch.equal(predict(model, inputs), plain)
    model.set_adapter("default")
    assert torch.equal(predict(model, inputs), plain)


def test_a_merged_adapter_is_not_deleted():
    model, inputs = adapt()
    model.add_adapter("other", config_of(seed=3))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    assert layers_of(model)[0].merged_adapters == ["default"]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_nothing_merged_is_left_when_the_base_model_is_adapted_again():
    base, inputs = build("vit")
    trained(get_peft_model(base, config_of())).merge_adapter()
    with pytest.warns(UserWarning, match="for a second time"):
        again = get_peft_model(base, config_of(seed=5)).eval()
    assert torch.equal(predict(again, inputs), predict(get_peft_model(build("vit")[0], config_of(seed=5)), inputs))


def test_a_disabled_adapter_is_off_and_comes_back_merged():
    model, inputs = adapt()
    merged = predict(model, inputs)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(predict(model, inputs), predict(build("vit")[0], inputs))
    assert torch.equal(predict(model, inputs), merged) and layers_of(model)[0].merged
    assert torch.equal(predict(model.unload(), inputs), predict(build("vit")[0], inputs))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@families
def test_a_copy_is_merged_equal_and_independent(name, copied):
    model, inputs = adapt(name)
    model.merge_adapter()
    expected = predict(model, inputs)
    other = copied(model)
    assert torch.equal(predict(other, inputs), expected) and layers_of(other)[0].merged_adapters == ["default"]
    trained(other).train().eval()
    assert torch.equal(predict(other, inputs), unmerged(other, inputs))
    assert torch.equal(predict(model, inputs), expected)


# ----------------------------------------------------------------------------------------------- computed anew, or not
def other_prompts(model: PeftModel, folder: Path) -> None:
    get_peft_model(build("vit")[0], config_of(seed=9)).save_pretrained(folder)
    model.load_adapter(folder, adapter_name="default")
    model.eval()


def other_state(model: PeftModel, folder: Path, assign: bool = False) -> None:
    other = trained(get_peft_model(build("vit", seed=4)[0], config_of(seed=9)))
    model.load_state_dict(other.state_dict(), assign=assign)


@torch.no_grad()
def other_norm(model: PeftModel, folder: Path) -> None:
    model.get_base_model().vit.layers[1].layernorm_before.weight.mul_(2.0)


@torch.no_grad()
def other_projection(model: PeftModel, folder: Path) -> None:
    attention = model.get_base_model().vit.layers[1].attention
    attention.v_proj.weight = nn.Parameter(attention.v_proj.weight * 2)


def training_step(model: PeftModel, folder: Path) -> None:
    _, inputs = build("vit")
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model)], lr=0.1)
    model.train()(**inputs).logits.square().sum().backward()
    optimizer.step()
    model.eval()


def training_step_behind_autograd(model: PeftModel, folder: Path) -> None:
    """As some optimizers do: torch does not count what is written through `.data`."""
    model.train()
    for _, parameter in trainable(model):
        parameter.data.add_(0.5)
    model.eval()


@torch.no_grad()
def rewound(model: PeftModel, folder: Path) -> None:
    rewind(model, {name: torch.ones_like(tensor) for name, tensor in trained_tensors(model).items()})


NOTICED: dict[str, Callable[[PeftModel, Path], Any]] = {
    "other prompts loaded": other_prompts,
    "other state loaded": other_state,
    "other state assigned": lambda model, folder: other_state(model, folder, assign=True),
    "pruned": lambda model, folder: prune(model),
    "trained": training_step,
    "trained behind autograd": training_step_behind_autograd,
    "rewound": rewound,
    "prompts written to": lambda model, folder: trained(model),
}
NOT_NOTICED: dict[str, Callable[[PeftModel, Path], Any]] = {
    "norm written to": other_norm,
    "projection replaced": other_projection,
}
EITHER_WAY = ("trained", "rewound", "prompts written to", "projection replaced")  # with key-value prompts alone too


def changed(change: Callable[[PeftModel, Path], Any], model: PeftModel, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(model, folder)


def ids(changes: dict[str, Any]) -> list[tuple[str, str]]:
    return [("default", change) for change in changes] + [
        ("kv only", change) for change in changes if change in EITHER_WAY
    ]


@pytest.mark.parametrize("case, change", ids(NOTICED))
def test_constants_are_computed_anew(tmp_path, case, change):
    model, inputs = adapt(**CASES[case])
    model.merge_adapter()
    before = predict(model, inputs)
    changed(NOTICED[change], model, tmp_path)
    found = predict(model, inputs)
    assert torch.equal(found, unmerged(model, inputs)) and not torch.equal(found, before)


@pytest.mark.parametrize("case, change", ids(NOT_NOTICED))
def test_what_is_written_in_eval_mode_counts_after_merging_again(tmp_path, case, change):
    model, inputs = adapt(**CASES[case])
    model.merge_adapter()
    before = predict(model, inputs)
    rows = [layer.e2vpt_merged_rows["default"].clone() for layer in layers_of(model)]
    changed(NOT_NOTICED[change], model, tmp_path)
    predict(model, inputs)
    assert all(map(torch.equal, rows, [layer.e2vpt_merged_rows["default"] for layer in layers_of(model)]))
    model.unmerge_adapter()
    model.merge_adapter()
    found = predict(model, inputs)
    assert torch.equal(found, unmerged(model, inputs)) and not torch.equal(found, before)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("case", ["default", "kv only"])
def test_constants_are_cast_with_the_model(case, dtype, tolerance):
    model, inputs = adapt(**CASES[case])
    model.merge_adapter()
    model.to(dtype)
    assert all(layer.e2vpt_merged_rows["default"].dtype == dtype for layer in layers_of(model))
    inputs = {"pixel_values": inputs["pixel_values"].to(dtype)}
    found = predict(model, inputs)
    torch.testing.assert_close(found, unmerged(model, inputs), atol=tolerance, rtol=tolerance)


@families
def test_training_and_scoring_use_the_prompts_themselves(name):
    """Gradients and scores of a merged model are those of one that is not merged, dropout included."""
    model, inputs = adapt(name, visual_prompt_dropout=0.2)
    batch = {**inputs, "labels": torch.tensor([0, 3])}
    expected = {key: gradient.clone() for key, gradient in gradients(model.train(), inputs).items()}
    scores = score_prompts(model, [batch])
    model.merge_adapter()
    for key, gradient in gradients(model.train(), inputs).items():
        assert torch.equal(gradient, expected[key]), key
    assert torch.equal(score_prompts(model, [batch]).token, scores.token)


def test_scoring_after_a_change_leaves_the_constants_right():
    model, inputs = adapt()
    model.merge_adapter()
    trained(model).train().eval()
    score_prompts(model, [{**inputs, "labels": torch.tensor([0, 3])}])
    found = predict(model, inputs)
    assert torch.equal(found, unmerged(model, inputs))


def test_merging_in_training_mode_merges_without_dropout():
    model, inputs = adapt(visual_prompt_dropout=0.5)
    expected = predict(model, inputs)
    model.train().merge_adapter()
    assert torch.equal(predict(model.eval(), inputs), expected)


# ----------------------------------------------------------------------------------------------------- what it refuses
def test_what_cannot_be_merged_is_refused_and_merges_nothing():
    model, _ = adapt()
    model.add_adapter("shallow", config_of(**SHALLOW))
    with pytest.raises(ValueError, match="'shallow' has visual_prompt_mode='shallow'.*be merged"):
        model.merge_adapter(["default", "shallow"])
    with pytest.raises(ValueError, match="Adapter missing does not exist; the model has default, shallow"):
        model.merge_adapter(["default", "missing"])
    with pytest.raises(TypeError, match="adapter_names should be a list of strings, got 'default'"):
        model.merge_adapter("default")
    assert not any(layer.merged for layer in layers_of(model))


def test_a_safe_merge_finds_broken_prompts():
    model, _ = adapt()
    with torch.no_grad():
        layers_of(model)[0].e2vpt_kv_prompts["default"][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged rows of vit.layers.0.*default.*broken"):
        model.merge_adapter(safe_merge=True)
    model.merge_adapter()


# ------------------------------------------------------------------------------------------------------------ exported
class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def merged_for_export(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A pruned and merged model, its images, and three others with their logits."""
    model, inputs = adapt(name)
    prune(model)
    pixels = inputs["pixel_values"]
    others = torch.cat([pixels.flip(0) + 0.5, pixels[:1]])
    expected = predict(model, {"pixel_values": others})
    model.merge_adapter()
    return Logits(model).eval(), others, expected


@families
@pytest.mark.compile
def test_an_exported_program_reads_constants_instead_of_prompts(name):
    model, others, expected = merged_for_export(name)
    program = torch.export.export(model, (others,), strict=False)
    assert torch.equal(program.module()(others), expected)
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    read = {named[node.name] for node in program.graph.nodes if node.name in named and node.users}
    assert read and not any(".e2vpt_" in key for key in read)
    assert len(signature.inputs_to_lifted_tensor_constants) == len(layers_of(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
@families
@pytest.mark.compile
def test_onnxruntime_gives_the_logits_of_the_model(name):
    model, others, expected = merged_for_export(name)
    file = io.BytesIO()
    torch.onnx.export(
        model,
        (others[:2],),
        file,
        dynamo=False,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}},
    )
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()))
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixel_values": others.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ compiled
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.compile
def test_a_compiled_model_takes_other_prompts_without_compiling_again(tmp_path, fresh_compiler, merged):
    """Hot swapping: adapters of one shape are loaded over one another."""
    programs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        programs.append(graph)
        return graph

    folders, answers = [], []
    for seed in (1, 2, 3):
        other = trained(get_peft_model(build("vit")[0], config_of(seed=seed))).eval()
        answers.append(predict(other, build("vit")[1]))
        folders.append(tmp_path / str(seed))
        other.save_pretrained(folders[-1])
    model, inputs = adapt()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    if merged:
        model.merge_adapter()
    predict(compiled, inputs)
    for folder, expected in zip(folders, answers, strict=True):
        model.load_adapter(folder, adapter_name="default")
        torch.testing.assert_close(predict(compiled.eval(), inputs), expected)
    assert len(programs) == 1


@pytest.mark.compile
def test_a_compiled_merged_model_notices_pruning_training_and_loading(fresh_compiler):
    model, inputs = adapt()
    model.merge_adapter()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    answers = [predict(compiled, inputs)]
    for change in (lambda model, folder: prune(model), training_step, other_state):
        change(model, Path())
        answers.append(predict(compiled, inputs))
        torch.testing.assert_close(answers[-1], unmerged(model, inputs))
        assert (answers[-1] - answers[-2]).abs().max() > 1e-2
