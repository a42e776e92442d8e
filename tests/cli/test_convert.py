# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt convert` makes adapters of checkpoints of the released code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import peft_e2vpt
from tests.golden.test_golden import stored
from tests.hub.test_conversion import ONE
from tests.support.command_line import fail, succeed
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


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"\x80\x02cos\nsystem\n."],
    ids=["empty", "truncated", "pointer", "page", "code"],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.pth").write_bytes(content)
    message = fail("convert", tmp_path / "last.pth", "--base", tmp_path, "--output", tmp_path / "new")
    assert f"{tmp_path}/last.pth is no file of tensors" in message and not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [[], {"model": 3}, {"model": {"head.last_layer.weight": torch.zeros(1)}}, {}])
def test_a_file_of_other_tensors_is_named(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "last.pth")
    message = fail("convert", tmp_path / "last.pth", "--base", tmp_path, "--output", tmp_path / "new")
    assert str(tmp_path / "last.pth") in message
