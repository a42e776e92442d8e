# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt convert` makes adapters of checkpoints of the released code."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

import peft_e2vpt
from tests.golden.test_golden import stored
from tests.hub.test_conversion import ONE
from tests.support.command_line import succeed
from tests.support.released import base_of, checkpoint_of


def test_convert_gives_an_adapter_with_the_released_logits(tmp_path: Path) -> None:
    base_of(ONE).save_pretrained(tmp_path / "base")
    torch.save({"model": checkpoint_of(ONE)}, tmp_path / "last_model.pth")
    shown = succeed(
        "convert", tmp_path / "last_model.pth", "--base", tmp_path / "base", "--output", tmp_path / "adapter"
    )
    assert "prompts 156 + head 198 = 354 " in shown
    base = base_of(ONE)
    base.classifier = torch.nn.Linear(32, 6)
    model = PeftModel.from_pretrained(base.double(), tmp_path / "adapter").eval()
    pixels = stored("inputs")[f"s{ONE.settings['seed']}/pixel_values"][: ONE.settings["batch"]].double()
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels).logits, ONE.logits, rtol=0, atol=1e-12)
    loaded = peft_e2vpt.load(tmp_path / "adapter")
    assert loaded.prompt_summary() == model.prompt_summary()
