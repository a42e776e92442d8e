# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Writes `docs/backbones.md`: what was measured on every tiny model of `tests/support/zoo.py`.

    python -m docs.backbones

It takes about ten minutes on two cores. The timm models need torchvision (see `CONTRIBUTING.md`); without it their
lines say so.
"""

from __future__ import annotations

import datetime
import warnings
from pathlib import Path

import torch
import transformers

from docs import task_heads
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support import zoo
from tests.support import zoo_checks as checks
from tests.support.torchvision import declare_missing_operators


DOCS = Path(__file__).parent
COLUMNS = {
    "effect": checks.prompts_have_an_effect,
    "gradient": checks.every_prompt_has_a_gradient,
    "eager = sdpa": checks.eager_equals_sdpa,
    "= insertion": checks.rows_equal_inserted_tokens,
    "disabled = base": checks.disabled_equals_the_base_model,
    "saved = loaded": checks.saved_equals_loaded,
    "checkpointing": checks.checkpointing_leaves_gradients_equal,
    "compiled": checks.compiled_equals_uncompiled,
}
INTRODUCTION = """# Backbones

Written by `python -m docs.backbones` with transformers {transformers}, torch {torch}, on {date}; every line is a tiny
model with random weights. The same statements are tests (`tests/backbones/test_zoo.py`).

* **attention path**: how rows reach the attention. *interface*: it asks transformers for its attention, and gets ours.
  *interception*: it does its own arithmetic, and the rows join in while it runs.
* **effect**: by how much the prompts change the output. **gradient**: the smallest of the largest entries of the
  gradients of all prompt tensors. The output always has the shape of the plain model's.
* **eager = sdpa**, **= insertion** (float64: the same prompts put into the sequence before each block and taken out
  after it), **checkpointing** (gradients, reentrant and not), **compiled**: largest relative difference.
* **disabled = base** and **saved = loaded** are bit by bit: 0.
* **-**: does not apply. The attention knows one implementation; insertion is impossible (windows, maps, position
  biases, packed sequences) or another function (a causal order); there is no checkpointing.

"""


def measure(name: str) -> list[str]:
    reason = checks.missing(name)
    if reason is not None:
        return [name, f"*{reason}*"] + [""] * (len(COLUMNS) + 1)
    model, _ = checks.adapt(name)
    attentions = sorted({type(layer.site.attention).__name__ for layer in prompt_layers(model)})
    paths = sorted({layer.attention_path for layer in prompt_layers(model)})
    cells = [name, ", ".join(f"`{attention}`" for attention in attentions), ", ".join(paths)]
    for statement in COLUMNS.values():
        cells.append(f"{statement(name):.1g}" if checks.applies(statement, name) else "-")
    return cells


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    declare_missing_operators()
    names = zoo.names(attention=True)
    lines = []
    for name in transformers.utils.logging.tqdm(names, desc="models"):
        lines.append(measure(name))
    heading = ["model", "attention", "attention path", *COLUMNS]
    text = INTRODUCTION.format(
        transformers=transformers.__version__, torch=torch.__version__, date=datetime.date.today()
    )
    text += f"| {' | '.join(heading)} |\n|{'---|' * len(heading)}\n"
    text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
    refused = ", ".join(zoo.names(attention=False))
    text += (
        "\n## Refused\n\nModels without attention over tokens get a `ValueError` that names what they have instead: "
    )
    text += f"{refused}. So do attentions that are linear, additive or over channels, and neighbourhood attention.\n"
    (DOCS / "backbones.md").write_text(f"{text}\n{task_heads.section()}")


if __name__ == "__main__":
    main()
