# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Attentions that do their own arithmetic: rows that join while it runs are the rows that join by the interface."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.models.vit import modeling_vit

from peft_e2vpt import E2VPTConfig, score_prompts
from peft_e2vpt.attention import interface, torch_function
from peft_e2vpt.attention.rows import Rows
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support import zoo_checks as checks
from tests.support.models import NAMES, build, output_of


OWN = ["blip_vision", "sam_vision", "swinv2", "hiera", "levit", "bridgetower_vision"]
CONFIG: dict[str, Any] = {"num_visual_prompts": 3, "num_kv_prompts": 2, "num_segments": 4, "seed": 0}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------------- which path it is
def test_a_subclass_in_another_file_has_the_eager_function_of_the_model_file() -> None:
    attention = build("vit")[0].vit.layers[0].attention
    attention.__class__ = type("OwnAttention", (type(attention),), {"__module__": __name__})
    assert interface.eager_attention_of(attention, "eager_attention_forward") is modeling_vit.eager_attention_forward


def test_an_attention_without_a_config_does_not_ask_for_its_implementation() -> None:
    layer = build("vit")[0].vit.layers[0].attention
    del layer.config
    assert interface.eager_attention_of(layer, "eager_attention_forward") is None


def test_former_names_still_work_and_warn() -> None:
    model = get_peft_model(build("vit")[0], E2VPTConfig(**CONFIG))
    layer, count = prompt_layers(model)[0], model.prompt_summary().layers[0]
    with pytest.warns(DeprecationWarning, match="socket is now called attention_path"):
        assert layer.socket == count.attention_path == "interface"
    with pytest.warns(DeprecationWarning, match="socket is now called attention_path"):
        assert count.socket == "interface"
    with pytest.warns(DeprecationWarning, match="alive is now called kept"):
        assert torch.equal(layer.alive("default"), layer.kept("default"))


# ------------------------------------------------------------------------------------------- one path, the other
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_interception_equals_the_interface(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, found = [], []
    for intercepted in (False, True):
        if intercepted:
            monkeypatch.setattr(interface, "eager_attention_of", lambda attention, name: None)
        model, inputs = build(name, dtype=torch.float64, attn_implementation=implementation)
        model = get_peft_model(model, E2VPTConfig(**CONFIG, visual_prompt_dropout=0.0)).double().eval()
        assert {layer.attention_path for layer in prompt_layers(model)} == {
            "interception" if intercepted else "interface"
        }
        answers.append(output_of(model(**inputs)))
        answers[-1].square().sum().backward()
        found.append(gradients(model))
    tolerance = (
        {"rtol": 0, "atol": 1e-12} if implementation == "sdpa" else {"rtol": 0, "atol": 1e-5}
    )  # float32 softmax
    torch.testing.assert_close(answers[1], answers[0], **tolerance)
    for key, gradient in found[0].items():
        assert checks.apart(found[1][key], gradient) < (1e-11 if implementation == "sdpa" else 1e-4), key


@pytest.mark.parametrize("name", OWN)
def test_the_exact_scores_of_prompts_are_those_of_one_image_at_a_time(name: str) -> None:
    model, inputs = checks.adapt(name, torch.float64)
    model = model.double()
    (key,) = inputs
    images = torch.cat([inputs[key], inputs[key].flip(0) * 0.5])

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return checks.run(model, batch).flatten(1).square().mean()

    together = score_prompts(model, [{key: images}], loss_fn=loss)
    alone = score_prompts(model, [{key: image[None]} for image in images], loss_fn=loss)
    assert checks.apart(together.token, alone.token) < 1e-9
    assert checks.apart(together.segment, alone.segment) < 1e-9


# ------------------------------------------------------------------------------------------- copies, and no trace left
def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", OWN)
def test_a_copy_is_equal_and_independent(name: str, duplicate: Any) -> None:
    model, inputs = checks.adapt(name)
    before = checks.run(model, inputs)
    twin = duplicate(model)
    with torch.no_grad():
        for layer in prompt_layers(twin):
            layer.e2vpt_visual_prompts["default"].add_(1.0)
    assert torch.equal(checks.run(model, inputs), before)
    assert not torch.equal(checks.run(twin, inputs), before)


@pytest.mark.parametrize("name", OWN)
def test_the_forward_of_an_attention_is_its_own_again_after_unload(name: str) -> None:
    model, _ = checks.adapt(name)
    attentions = [layer.site.attention for layer in prompt_layers(model)]
    assert all("forward" in attention.__dict__ for attention in attentions)
    model.unload()
    assert not any("forward" in attention.__dict__ for attention in attentions)


def test_a_forward_that_a_hook_had_replaced_comes_back() -> None:
    model, inputs = checks.build("blip_vision")
    attention = model.encoder.layers[0].self_attn
    called = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        return type(attention).forward(attention, *args, **kwargs)

    attention.forward = forward
    adapted = get_peft_model(model, checks.config()).eval()
    checks.run(adapted, inputs)
    assert called == [True]
    adapted.unload()
    assert attention.forward is forward


# ------------------------------------------------------------------------------------------- what cannot be, or is odd
class Owner:
    """Gives one attention four rows per head, the same to every image."""

    eager_attention = None
    is_attached = True

    def __init__(self, heads: int, size: int) -> None:
        self.key, self.value = torch.randn(2, 1, heads, 4, size, dtype=torch.float64)

    def rows(self, num_sequences: int, dtype: torch.dtype) -> Rows:
        return Rows(self.key, self.value)


class Attention(nn.Module):
    """Two heads of size 4, and something that is done to the scores."""

    def __init__(self, with_scores: Any) -> None:
        super().__init__()
        self.with_scores = with_scores

    def forward(self, hidden: Tensor) -> Tensor:
        heads = hidden.unflatten(-1, (2, 4)).transpose(1, 2)
        scores = self.with_scores(heads @ heads.transpose(-2, -1) / math.sqrt(4))
        return (scores.softmax(dim=-1) @ heads).transpose(1, 2).flatten(2)


def run_with_rows(attention: nn.Module) -> tuple[Tensor, Tensor, Owner]:
    torch.manual_seed(0)
    owner, hidden = Owner(2, 4), torch.randn(3, 5, 8, dtype=torch.float64)
    torch_function.attach(attention, owner, "the attention", heads=2, one_graph=True)
    return attention(hidden), hidden, owner


def test_rows_take_part_in_the_softmax_without_position_bias_or_mask() -> None:
    bias = torch.randn(5, 5, dtype=torch.float64)
    output, hidden, owner = run_with_rows(Attention(lambda scores: scores + bias))
    heads = hidden.unflatten(-1, (2, 4)).transpose(1, 2)
    keys, values = (torch.cat([rows.expand(3, -1, -1, -1), heads], dim=2) for rows in (owner.key, owner.value))
    scores = heads @ keys.transpose(-2, -1) / 2 + torch.cat([torch.zeros(5, 4), bias], dim=1)
    expected = (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "shift",
    [
        lambda scores: scores - scores.amax(dim=-1, keepdim=True),
        lambda scores: scores + torch.arange(5.0, dtype=torch.float64)[:, None],
        lambda scores: (scores / 8 - (scores / 8).amax(dim=-1).unsqueeze(-1)) * 8,
        lambda scores: scores + 3,
    ],
    ids=["largest score", "number per query", "CogView's way", "number"],
)
def test_a_shift_of_all_scores_of_a_query_changes_nothing(shift: Any) -> None:
    plain, _, _ = run_with_rows(Attention(lambda scores: scores))
    shifted, _, _ = run_with_rows(Attention(shift))
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-13)


def test_an_attention_that_does_something_unknown_to_its_scores_is_named() -> None:
    with pytest.raises(NotImplementedError, match="the attention applies torch's cumsum.*exclude_modules"):
        run_with_rows(Attention(lambda scores: scores.cumsum(dim=-1)))


def test_a_softmax_over_queries_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="the attention applies torch's softmax"):
        run_with_rows(Attention(lambda scores: scores.softmax(dim=-2)))


def test_scores_that_are_weighted_key_by_key_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="the attention applies torch's mul"):
        run_with_rows(Attention(lambda scores: torch.mul(scores, torch.rand(5, dtype=torch.float64))))


def test_prompts_that_an_attention_has_not_used_are_an_error() -> None:
    class Pooling(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.mean(dim=1)

    with pytest.raises(RuntimeError, match="the attention .Pooling. has not used its prompts.*exclude_modules"):
        run_with_rows(Pooling())


def test_an_attention_that_leaves_the_interface_aside_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("vit")
    model = get_peft_model(model, E2VPTConfig(**CONFIG)).eval()
    attention_class = type(model.get_base_model().vit.layers[0].attention)
    monkeypatch.setattr(attention_class, "forward", lambda self, hidden, *args, **kwargs: (hidden, None))
    with pytest.raises(RuntimeError, match="vit.layers.0.attention .ViTAttention. has not used its prompts"):
        model(**inputs)


# ---------------------------------------------------------------------------------------------------- mixed precision
@pytest.mark.parametrize("name", OWN)
def test_an_autocast_forward_pass_is_close_and_gives_float32_gradients(name: str) -> None:
    model, inputs = checks.adapt(name)
    expected = checks.run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = checks.run(model, inputs)
    output.float().square().sum().backward()
    assert checks.apart(output.float(), expected) < 0.1
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", OWN)
def test_a_bfloat16_backbone_takes_float32_prompts(name: str) -> None:
    model, inputs = checks.build(name, torch.bfloat16)
    model = get_peft_model(model, checks.config()).eval()
    checks.run(model, inputs).float().square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in trained)
