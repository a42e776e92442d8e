# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Writes, into `docs/backbones.md`, which head is trained for which task.

    python -m docs.task_heads

Every model of transformers' auto classes for images, video and sound is built on the meta device, in its default size,
and adapted. It takes about three minutes. `python -m docs.backbones` writes it too.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from pathlib import Path

import transformers
from peft import get_peft_model

from peft_e2vpt import E2VPTConfig
from tests.support import auto_models


PAGE = Path(__file__).parent / "backbones.md"
HEADING = "## Heads"
INTRODUCTION = """
What `E2VPTConfig(modules_to_save=None)` trains besides prompts, for every model of transformers {version}'s auto
classes that sees or hears and has a self-attention that takes prompts; models of default size. **trained** is the
share of the base model that is trained, head and prompts together. *prompts only*: the model needs no new head, as a
language model, whose output embeddings stay as they are, or two towers that are compared. What `from_pretrained` draws
anew outside the backbone is trained as well. `tests/backbones/test_every_task.py` holds this.

In a model of timm the head is its classifier, in a model of your own what lies beside the backbone (`self.fc`), other
encoders left out; where none is found, a warning names candidates. `modules_to_save=[...]` chooses otherwise: full
paths, or endings of paths that belong to one module. PEFT matches endings anywhere in a model; here a name stands for
one module, and a module list for its parts. Parts that share weights share them in the adapter too.

"""


def _shortened(names: list[str]) -> str:
    """Names of heads, those of equal layers as one."""
    groups: dict[str, int] = defaultdict(int)
    for name in names:
        groups[re.sub(r"\.\d+", ".*", name)] += 1
    shown = [f"`{name}`" + (f" ({number})" if number > 1 else "") for name, number in groups.items()]
    return ", ".join(shown) or "*prompts only*"


def section() -> str:
    """The section of the page, in Markdown."""
    lines, refused, missing = [], [], []
    for name in transformers.utils.logging.tqdm(auto_models.MODELS, desc="tasks"):
        if name in auto_models.BROKEN:
            missing.append(f"* `{name}`: {auto_models.BROKEN[name]}\n")
            continue
        try:
            model = auto_models.build(name)
        except ImportError as error:
            needed = re.search(r"requires the (\w+) library", str(error))
            missing.append(f"* `{name}`: needs {needed[1] if needed else 'a package that is not installed'}\n")
            continue
        try:
            adapted = get_peft_model(model, E2VPTConfig(num_segments=1))
        except ValueError as error:
            if "has no self-attention that E2VPT knows" not in str(error):
                raise
            refused.append(f"`{name}`")
            continue
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        share = 100 * trained / sum(p.numel() for p in adapted.parameters() if not p.requires_grad)
        heads = _shortened(adapted.peft_config["default"].modules_to_save)
        lines.append(f"| {', '.join(auto_models.MODELS[name][1])} | `{name}` | {heads} | {share:.2g} % |\n")
    return (
        f"{HEADING}\n{INTRODUCTION.format(version=transformers.__version__)}"
        f"| task | model | head | trained |\n|---|---|---|---|\n{''.join(lines)}"
        f"\n**Not built here**:\n\n{''.join(missing)}"
        f"\n**Refused in a sentence**, as the default config has no self-attention that takes prompts: "
        f"{', '.join(refused)}.\n"
    )


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    before = PAGE.read_text(encoding="utf-8").split(f"\n{HEADING}\n")[0]
    PAGE.write_text(f"{before.rstrip()}\n\n{section()}", encoding="utf-8")


if __name__ == "__main__":
    main()
