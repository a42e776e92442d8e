# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a user does who uploads, in a process of its own.

`python -m tests.support.hub_worker OUT` runs with `HF_ENDPOINT` set.

`OUT/{name}.pt` holds what every uploaded adapter answers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard, create_repo
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, ViTForImageClassification, ViTImageProcessorPil

import peft_e2vpt
from peft_e2vpt import PruneRewindCallback
from tests.support.adapted import config_of, predict, prune, trained
from tests.support.models import build
from tests.support.training import Images


BASE = "tester/vit"
LABELS = ["ash", "beech", "cedar", "dogwood", "elm"]


def adapted(adapter_name: str = "default", **settings: object) -> PeftModel:
    """An adapter on the base model from the Hub, with a head for other classes than the base model's three."""
    names = dict(enumerate(LABELS))
    base = ViTForImageClassification.from_pretrained(
        BASE, id2label=names, label2id={name: index for index, name in names.items()}, ignore_mismatched_sizes=True
    )
    return trained(get_peft_model(base, config_of(**settings), adapter_name)).eval()


def main(out: Path) -> None:
    base, inputs = build("vit")
    base.config.id2label, base.config.label2id = {0: "x", 1: "y", 2: "z"}, {"x": 0, "y": 1, "z": 2}
    base.classifier = torch.nn.Linear(32, 3)
    base.push_to_hub(BASE)
    torch.save(inputs, out / "inputs.pt")

    def keep(name: str, model: PeftModel) -> None:
        torch.save(predict(model.eval(), inputs), out / f"{name}.pt")

    model = adapted()
    keep("plain", model)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    peft_e2vpt.push_to_hub(
        model,
        "tester/trees",
        processing_class=processor,
        dataset="tester/leaves",
        metrics={"eval_accuracy": 0.875, "eval_loss": 0.5, "eval_runtime": 3.0},
    )

    base.save_pretrained(out / "vit_of_mine")
    local = trained(get_peft_model(ViTForImageClassification.from_pretrained(out / "vit_of_mine"), config_of())).eval()
    keep("local", local)
    peft_e2vpt.push_to_hub(local, "tester/local")
    peft_e2vpt.push_to_hub(local, "tester/named", base_model=BASE)

    model = adapted("oak", num_visual_prompts=4)
    prune(model, "oak")
    keep("pruned", model)
    peft_e2vpt.push_to_hub(model, "tester/pruned")
    peft_e2vpt.push_to_hub(model, "tester/many", revision="v2", subfolder="oak")

    arguments = TrainingArguments(
        output_dir=str(out / "trees-trained"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id="tester/trained",
    )
    model = adapted(visual_prompt_dropout=0.0)
    callback = PruneRewindCallback(prune_tokens=0.34, prune_segments=0.25)
    trainer = Trainer(model, arguments, train_dataset=Images(8), eval_dataset=Images(4), callbacks=[callback])
    trainer.train()
    keep("trained", model)
    trainer.push_to_hub(tags="trees", dataset_tags="tester/leaves", dataset="leaves", tasks="image-classification")
    (out / "trees-trained" / "README.md").rename(out / "trainer_card.md")
    peft_e2vpt.push_to_hub(model, "tester/trained", report=callback.report)

    model.push_to_hub("tester/by_peft")
    model.push_to_hub("tester/by_peft_then_us")
    peft_e2vpt.push_to_hub(model, "tester/by_peft_then_us")
    peft_e2vpt.push_to_hub(model, "tester/us_then_peft")
    model.push_to_hub("tester/us_then_peft")
    ModelCard("---\nlicense: mit\n---\n\n# Mine\n").push_to_hub(create_repo("tester/by_hand").repo_id)
    peft_e2vpt.push_to_hub(model, "tester/by_hand")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
