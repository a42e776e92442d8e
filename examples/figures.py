"""Draw every figure of a run of `finetune.py`: prompts, attention, training, methods, embeddings.

```bash
python examples/finetune.py --prune --eval_strategy epoch   # accuracies during the run are drawn if there are any
python examples/figures.py runs/finetune                    # writes runs/finetune/figures/*.png
```

| file | what it shows |
|---|---|
| `methods.png` | accuracy of the methods against their trained parameters |
| `METHOD-run.png` | loss, accuracy and learning rate, with the phases of pruning |
| `METHOD-pruning.png` | importance of every prompt, and what was pruned |
| `METHOD-prompt_attention.png` | attention that the class token and the patches give to prompts, layer by layer |
| `METHOD-attention_maps.png` | where in a few images attention goes, with and without prompts |
| `embeddings.png` | class tokens of the images, without prompts and with those of each method |

The images are those of the run, which `results.json` notes, from the split that `finetune.py` reports. If they lie
elsewhere now, say where: `--train_dir`, `--dataset_name`, ... as to `finetune.py`; others than those of the run are
refused. `peft_e2vpt.plotting` has the functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comparison import read_results
from finetune import collate, image_transform, load_processor, load_task, reported_split
from finetune_options import DataArguments
from progress import be_quiet, in_one_sentence, quiet_files
from transformers import HfArgumentParser


# peft_e2vpt and PIL are imported where they are used: `--help` should not wait for them.
if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure
    from peft import PeftModel
    from transformers import BaseImageProcessor


LIMITS = ("max_train_samples", "max_eval_samples")


@dataclass
class FigureArguments:
    """What is drawn, and where it goes."""

    figures_dir: str | None = field(default=None, metadata={"help": "Where figures go. Default: RUN/figures."})
    dpi: int = field(default=120, metadata={"help": "Dots per inch."})
    colours: int | None = field(
        default=None, metadata={"help": "Colours of a figure, for small files, at most 256. Default: all."}
    )
    num_images: int = field(default=200, metadata={"help": "Images to measure attention and embeddings on."})
    num_maps: int = field(default=3, metadata={"help": "Images to draw attention maps of."})
    maps_of: list[str] | None = field(
        default=None, metadata={"help": "Files to draw attention maps of, instead of images of the dataset."}
    )
    maps_size: int | None = field(
        default=None, metadata={"help": "Side of the images of attention maps in pixels. Default: as in the run."}
    )
    dark: bool = field(default=False, metadata={"help": "Also draw every figure for dark pages: NAME-dark.png."})
    seed: int = field(default=0, metadata={"help": "Of the choice of images."})


def load_tested(args: FigureArguments, data_args: DataArguments, results: dict[str, Any]) -> Dataset:
    """
    Loads the split that `finetune.py` reports, in an order of its own.

    Args:
        data_args (`DataArguments`): Where they lie, as far as it is not where `results` says.
        results (`dict[str, Any]`): What `results.json` of the run holds.

    Raises:
        ValueError: The images are not those of the run.
    """
    places = {**results.get("data", {})}
    seed = places.pop("seed", args.seed)
    given = {name: value for name, value in asdict(data_args).items() if value != getattr(DataArguments(), name)}
    if "dataset_name" in given or "train_dir" in given:  # then all of it lies elsewhere
        places = {name: places[name] for name in ("train_val_split", "skip_bad_images", *LIMITS) if name in places}
    splits, _, fingerprint = load_task(DataArguments(**{**places, **given}), seed)
    if fingerprint != results.get("fingerprint", fingerprint):
        counts = ", ".join(f"{len(dataset):,} {name}" for name, dataset in splits.items())
        of_run = ", ".join(f"{count:,} {name}" for name, count in results["images"].items())
        raise ValueError(
            f"These are not the images of the run ({counts}; the run had {of_run}, from "
            f"{results['data'].get('train_dir') or results['data'].get('dataset_name') or 'elpv-dataset'}): pass the "
            "options for images that finetune.py was given, or none."
        )
    return splits[reported_split(splits)].shuffle(seed=args.seed)


def load_images_of_maps(args: FigureArguments, images: Dataset, folder: Path) -> dict[str, torch.Tensor]:
    """Loads the images to draw attention maps of, from files or among those of the dataset, as a batch."""
    from peft_e2vpt.images import read_image

    transform = image_transform(load_processor(str(folder), args.maps_size))
    if args.maps_of:
        shown = [read_image(path) for path in args.maps_of]
        return {"pixel_values": transform({"image": shown, "label": []})["pixel_values"]}
    few = images.select(range(min(args.num_maps, len(images))))
    return collate(list(few.with_transform(transform)))


def draw_run(folder: Path) -> Iterator[tuple[str, Figure]]:
    """Draws what a method's folder says without its model: the training, and the pruning if there was one."""
    from transformers import TrainerState

    from peft_e2vpt import PruningReport
    from peft_e2vpt.plotting import plot_pruning, plot_run
    from peft_e2vpt.pruning.report import REPORT_NAME

    report = PruningReport.load(folder) if (folder / REPORT_NAME).exists() else None
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    if any("loss" in entry for entry in state.log_history):  # a run of less than --logging_steps has none
        yield "run", plot_run(state.log_history, report)
    if report is not None:
        yield "pruning", plot_pruning(report)


def draw_attention(
    model: PeftModel,
    batch: dict[str, torch.Tensor],
    of_maps: dict[str, torch.Tensor],
    processor: BaseImageProcessor,
    answers: bool,
) -> Iterator[tuple[str, Figure]]:
    """Draws how much attention prompts get, and where in images the rest goes."""
    from peft_e2vpt.attention_maps import prompt_attention
    from peft_e2vpt.plotting import plot_attention_maps, plot_prompt_attention

    yield "prompt_attention", plot_prompt_attention(prompt_attention(model, batch))
    yield "attention_maps", plot_attention_maps(model, of_maps, processing_class=processor, answers=answers)


def is_e2vpt(folder: Path) -> bool:
    """Whether a method's folder holds an adapter of this package."""
    config = folder / "adapter_config.json"
    return config.exists() and json.loads(config.read_text())["peft_type"] == "E2VPT"


def draw(run: Path, args: FigureArguments, data_args: DataArguments) -> Iterator[tuple[str, Figure]]:
    """Yields the name of every figure, and the figure."""
    import peft_e2vpt
    from peft_e2vpt.embeddings import class_token_embeddings
    from peft_e2vpt.plotting import plot_embeddings, plot_methods

    results = read_results(run)
    rows = results["methods"]
    folders = {row["method"]: run / row["method"] for row in rows}
    adapted = {method: folder for method, folder in folders.items() if is_e2vpt(folder)}
    tested = load_tested(args, data_args, results) if adapted else None  # before anything is drawn: they may be wrong
    yield "methods", plot_methods(rows, num_images=None if tested is None else len(tested))
    for method, folder in folders.items():
        for name, figure in draw_run(folder):
            yield f"{method}-{name}", figure
    if tested is None:
        return
    images = tested.select(range(min(args.num_images, len(tested))))
    first = next(iter(adapted.values()))
    transform = image_transform(load_processor(str(first), image_size=None))
    pixels = {"pixel_values": collate(list(images.with_transform(transform)))["pixel_values"]}
    of_maps = load_images_of_maps(args, images, first)
    processor = load_processor(str(first), args.maps_size)
    embeddings = {}
    for method, folder in adapted.items():
        with quiet_files():
            model = peft_e2vpt.load(folder)
        for name, figure in draw_attention(model, pixels, of_maps, processor, answers=not args.maps_of):
            yield f"{method}-{name}", figure
        if not embeddings:
            with model.disable_adapter():
                embeddings["without prompts"] = class_token_embeddings(model, pixels)
        embeddings[method] = class_token_embeddings(model, pixels)
    yield "embeddings", plot_embeddings(embeddings, images["label"], images.features["label"].names)


def main() -> None:
    from PIL import Image

    parser = HfArgumentParser((FigureArguments, DataArguments), description=__doc__.split("\n")[0])
    parser.add_argument(
        "run", nargs="?", type=Path, default=Path("runs/finetune"), help="Output folder of finetune.py."
    )
    be_quiet(verbose=False)
    with in_one_sentence(verbose=False):
        args, data_args, others = parser.parse_args_into_dataclasses()
        target = Path(args.figures_dir or others.run / "figures")
        from matplotlib import rc_context

        from peft_e2vpt.plotting import DARK

        for suffix, style in (("", nullcontext()), *([("-dark", rc_context(DARK))] if args.dark else [])):
            with style:
                for name, figure in draw(others.run, args, data_args):
                    path = target / f"{name}{suffix}.png"
                    target.mkdir(parents=True, exist_ok=True)
                    figure.savefig(path, dpi=args.dpi)
                    if args.colours is not None:
                        Image.open(path).convert("RGB").quantize(args.colours).save(path, optimize=True)
                    print(path)


if __name__ == "__main__":
    main()
