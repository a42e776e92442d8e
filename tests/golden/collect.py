# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Gathers what `tests/golden/test_golden.py` compares with, numbers only: `python collect.py SOURCE`.

SOURCE is the folder of all golden data, described by its README. A case is kept where the package is meant to give
the numbers of the released code; `test_golden.py` says which are not, and why. What is written beside this file:

* `inputs.safetensors`: `s{seed}/pixel_values` and `s{seed}/labels`;
* `{family}.safetensors`: the backbones, `s{seed}/{parameter}`, and the cases, `{case}/{tensor}`, where a tensor is
  `in.{name}` (float32 prompts and gates), `grad.{name}` or `logits_f64`. The metadata entry `cases` is a JSON object
  of the settings of each case; its `given` names the case that holds the same `in.` tensors, which are stored once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


FAMILIES = ("vit", "moco", "mae", "swin")
SEEDS = (0, 1)
SETTINGS = ("seed", "M", "n", "R", "batch", "SHARE_PARAM_KV", "LAYER_BEHIND", "SHARED_ACCROSS", "VIT_POOL_TYPE")
HERE = Path(__file__).parent


def is_kept(family: str, name: str, case: dict[str, Any]) -> bool:
    if family == "mae":
        return not case["DEEP_P"] or case["VIT_POOL_TYPE"] == "img_pool"
    return family != "swin" or name.endswith("_dp1_derived_patchpool_perimage")


def collect_inputs(source: Path) -> None:
    files = {seed: load_file(source / f"inputs_s{seed}.safetensors") for seed in SEEDS}
    save_file(
        {f"s{seed}/{key}": files[seed][key] for seed in SEEDS for key in files[seed]}, HERE / "inputs.safetensors"
    )


def collect_cases(source: Path, family: str) -> None:
    tensors, settings, first_with = {}, {}, {}
    for seed in SEEDS:
        for key, tensor in load_file(source / f"{family}_s{seed}_backbone.safetensors").items():
            tensors[f"s{seed}/{key}"] = tensor
    for name, case in json.loads((source / f"index_cases_{family}.json").read_text()).items():
        if not is_kept(family, name, case):
            continue
        file = load_file(source / f"{case['file']}.safetensors")
        mine = {key: tensor for key, tensor in file.items() if key.startswith(f"{name}/")}
        given = {key: tensor for key, tensor in mine.items() if "/in." in key}
        content = tuple((key.split("/")[1], given[key].numpy().tobytes()) for key in sorted(given))
        settings[name] = {key: case[key] for key in SETTINGS}
        settings[name]["given"] = first_with.setdefault(content, name)
        left_out = given if settings[name]["given"] != name else {}
        tensors.update({key: mine[key] for key in mine if key not in left_out and not key.endswith("/logits_f32")})
    save_file(tensors, HERE / f"{family}.safetensors", metadata={"cases": json.dumps(settings)})


if __name__ == "__main__":
    collect_inputs(Path(sys.argv[1]))
    for family in FAMILIES:
        collect_cases(Path(sys.argv[1]), family)
