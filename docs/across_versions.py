# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Checks that an adapter saved under one version of transformers gives the same under another.

In an environment with the one version, then in an environment with the other:

    python -m docs.across_versions save folder
    python -m docs.across_versions load folder
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model

from peft_e2vpt import E2VPTConfig, Gates, apply_gates
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support.models import build, output_of


FAMILIES = ("vit", "deit", "msn", "ijepa", "dinov2", "dinov2_with_registers", "beit_relative_bias", "clip", "swin")


def save(name: str, folder: Path) -> None:
    model, inputs = build(name)
    model.save_pretrained(folder / name)
    adapted = get_peft_model(model, E2VPTConfig(num_segments=4, seed=0)).eval()
    count = len(prompt_layers(adapted))
    apply_gates(adapted, Gates(torch.tensor([[1.0] * 6 + [0.0] * 4] * count), torch.ones(count, 10, 4)))
    adapted.save_pretrained(folder / name / "adapter")
    torch.save({"inputs": inputs, "output": output_of(adapted(**inputs)).detach()}, folder / name / "answers.pt")


def load(name: str, folder: Path) -> float:
    fresh, _ = build(name, seed=1)
    model, info = type(fresh).from_pretrained(folder / name, output_loading_info=True)
    missing = [key for key in info["missing_keys"] if not key.endswith("relative_position_index")]  # is computed
    assert not missing, f"transformers does not find {missing}"
    adapted = PeftModel.from_pretrained(model, folder / name / "adapter").eval()
    answers = torch.load(folder / name / "answers.pt")
    return float((output_of(adapted(**answers["inputs"])) - answers["output"]).abs().max())


def main() -> None:
    warnings.simplefilter("ignore")
    command, folder = sys.argv[1], Path(sys.argv[2])
    for name in FAMILIES:
        if command == "save":
            save(name, folder)
        else:
            difference = load(name, folder)
            print(f"{name:24} {difference:.1e}")
            assert difference < 1e-5, "the outputs differ"
    print(f"{'saved' if command == 'save' else 'loaded'} under transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
