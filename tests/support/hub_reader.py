# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What users do who download, in a process of their own.

`python -m tests.support.hub_reader OUT` runs with `HF_ENDPOINT` set.

`OUT/read_{name}.pt` holds what the loaded models answer, `OUT/read.json` the rest of what was found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

import peft_e2vpt
from tests.support.adapted import predict


def message_of(repo_id: str, **settings: Any) -> str:
    try:
        peft_e2vpt.load(repo_id, **settings)
    except ValueError as error:
        return str(error)
    return "no error"


def main(out: Path) -> None:
    inputs = torch.load(out / "inputs.pt")
    found: dict[str, Any] = {}

    def keep(name: str, model: Any) -> None:
        torch.save(predict(model, inputs), out / f"read_{name}.pt")

    model = peft_e2vpt.load("tester/many", revision="v2", subfolder="oak", adapter_name="again")
    keep("load", model)
    found["training"] = model.training
    found["labels"] = list(model.config.id2label.values())

    def base(num_labels: int = 5) -> Any:
        return AutoModelForImageClassification.from_pretrained(
            "tester/vit", num_labels=num_labels, ignore_mismatched_sizes=True
        )

    keep("peft", PeftModel.from_pretrained(base(), "tester/many", revision="v2", subfolder="oak"))
    keep("auto_peft", AutoPeftModel.from_pretrained("tester/pruned", num_labels=5, ignore_mismatched_sizes=True))
    keep(
        "auto_model",
        AutoModelForImageClassification.from_pretrained("tester/trees", num_labels=5, ignore_mismatched_sizes=True),
    )
    plain = base()
    plain.load_adapter("tester/trees")
    keep("load_adapter", plain)
    image = Image.effect_noise((40, 40), 90).convert("RGB")
    loaded = peft_e2vpt.load("tester/trees")
    answers = [
        pipeline("image-classification", model=one, image_processor="tester/trees")(image)
        for one in (loaded, loaded.get_base_model())
    ]
    found["answers"] = answers

    lora = get_peft_model(base(3), LoraConfig(target_modules=["q_proj"]))
    lora.push_to_hub("tester/lora")
    found["messages"] = {
        "no adapter": message_of("tester/vit"),
        "no repository": message_of("tester/nothing"),
        "no such folder": message_of("tester/many", revision="v2", subfolder="birch"),
        "lora": message_of("tester/lora"),
        "no base": message_of("tester/trees", base_model="tester/gone"),
        "classes": message_of("tester/trees", num_labels=7),
    }
    (out / "read.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
