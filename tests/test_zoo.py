# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Every tiny vision model of `zoo.py`: adapted with an effect and nothing else changed, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model
from torch import nn

from peft_e2vpt import E2VPTConfig
from peft_e2vpt.sites import find_attention_sites


CONFIG: dict[str, Any] = {"num_visual_prompts": 3, "num_kv_prompts": 2, "num_segments": 1, "modules_to_save": []}


WITHOUT_KEYS = {  # no attention over tokens, or one whose softmax does not run over keys
    *zoo.names(attention=False),
}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    missing = zoo.missing(name)
    if missing:
        pytest.skip(f"not in this environment: {missing}")
    model, inputs = zoo.build(name)
    return model.requires_grad_(False), inputs  # torch may choose another kernel for weights that need a gradient


# timm's own attentions are none that E2VPT knows, and timm needs torchvision, which the tests do without
@pytest.mark.parametrize("name", [name for name in zoo.names() if not name.startswith("timm")])
def test_a_model_of_the_zoo_takes_prompts_or_says_why_not(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    with torch.no_grad():
        base = zoo.output_of(model(**inputs))
    if name in WITHOUT_KEYS:
        with pytest.raises(ValueError, match="has no self-attention that E2VPT knows"):
            get_peft_model(model, E2VPTConfig(**CONFIG))
        return

    adapted = get_peft_model(model, E2VPTConfig(**CONFIG)).eval()
    output = zoo.output_of(adapted(**inputs))
    assert output.shape == base.shape
    assert (output - base).abs().max() > 1e-3, "the prompts have no effect"

    output.float().square().sum().backward()
    trained = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    assert all("e2vpt_" in key for key in trained)
    idle = [key for key, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle, f"without gradient: {idle}"

    if adapted.get_base_model()._supports_sdpa:
        adapted.set_attn_implementation("eager")
        with torch.no_grad():
            torch.testing.assert_close(zoo.output_of(adapted(**inputs)), output, rtol=1e-4, atol=2e-5)
        adapted.set_attn_implementation("sdpa")

    adapted.save_pretrained(tmp_path)
    with torch.no_grad(), adapted.disable_adapter():
        assert torch.equal(zoo.output_of(adapted(**inputs)), base)
    unloaded = adapted.unload()
    with torch.no_grad():
        assert torch.equal(zoo.output_of(unloaded(**inputs)), base)
        loaded = PeftModel.from_pretrained(unloaded, tmp_path).eval()
        assert torch.equal(zoo.output_of(loaded(**inputs)), output)
