# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Gathers the pruning numbers that the tests compare with: `python pruning_collect.py SOURCE`.

SOURCE is the folder of all golden data, described by its README; the backbone is that of `vit.safetensors`. Written
beside this file are:

* `pruning.safetensors`: `pixel_values` and `labels` of ten images and, for every set `M{M}_{variant}`, what the
  released code starts from, `{set}/in.{name}`, and its scores, `{set}/token_scores` and `{set}/piece_scores`, both
  float64, of a run that scores without a training step in between;
* `pruning.json`: for every set its schedule at 10 to 90 percent, `tokens` and `pieces` pruned in all, and the masks
  that a rewound model of the released code reads from its files, `rewound`; `reverse` is the schedule that prunes the
  highest scores first; `increments` holds the number pruned at each percentage for many M and R.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


HERE = Path(__file__).parent
VARIANTS = ("deep_init", "deep_big", "deep_realmask", "shallow_big", "shallow_init")


def steps_of(schedule: dict[str, Any]) -> dict[str, Any]:
    by_prompt = [step["pieces"] for step in schedule["piece_steps"]]
    return {
        "tokens": [step["tokens"] for step in schedule["token_steps"]],
        "pieces": [[pieces[key] for key in sorted(pieces, key=int)] for pieces in by_prompt],
    }


def collect(source: Path) -> None:
    tensors = load_file(source / "pruning_inputs.safetensors")
    sequences = json.loads((source / "pruning_sequences.json").read_text())
    numbers: dict[str, Any] = {
        "increments": {
            "tokens": sequences["token_mask_sequence_by_M"],
            "pieces": sequences["piece_mask_sequence_by_R"],
        },
        "sets": {},
    }
    for count in (5, 10):
        for variant in VARIANTS:
            name = f"M{count}_{variant}"
            file = load_file(source / f"pruning_{name}.safetensors")
            tensors.update({f"{name}/{key}": tensor for key, tensor in file.items() if key.startswith("in.")})
            for kind in ("token", "piece"):
                tensors[f"{name}/{kind}_scores"] = file[f"nostep/{kind}_scores_f64"]
            facts = json.loads((source / f"pruning_{name}.json").read_text())
            schedule = facts["schedule"]["nostep_f64"]
            numbers["sets"][name] = {
                "percents": facts["percents"],
                "batch_sizes": facts["batch_sizes"],
                **steps_of(schedule),
                "reverse": steps_of(facts["schedule"]["nostep_f64_reverse"]),
                "rewound": {
                    key: {"token_mask": masks["token_mask"], "piece_mask_zeros": masks["piece_mask_zeros"]}
                    for key, masks in schedule["rewound"].items()
                },
            }
    save_file(tensors, HERE / "pruning.safetensors")
    (HERE / "pruning.json").write_text(json.dumps(numbers, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    collect(Path(sys.argv[1]))
