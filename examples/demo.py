"""Drop a picture, choose an adapter: a web page that shows what it answers and how much attention it gives to prompts.

```bash
pip install -e ".[examples,demo]"
python examples/finetune.py --prune              # makes adapters under runs/finetune
python examples/demo.py                          # those adapters
python examples/demo.py ADAPTER [ADAPTER ...]    # or any: folders with adapter_config.json
```

All adapters are loaded on one backbone, so they need the same base model and equally many classes. The page runs on
this machine, at the address that is printed, loads nothing from elsewhere, and sends nothing anywhere.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import gradio
import numpy
import pandas
import torch
from matplotlib import colormaps
from peft import PeftConfig, PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor

from peft_e2vpt import E2VPTConfig
from peft_e2vpt.attending import KINDS, TOKEN, attention_maps, prompt_attention


DEFAULT_FOLDER = Path("runs/finetune")
HINT = "python examples/finetune.py --prune"
SIDE = 448  # pixels of the attention picture on the page


class Served(NamedTuple):
    """Several adapters on one backbone.

    Attributes:
        model (`PeftModel`): In eval mode; its adapters have the names of `processors`.
        processors (`dict[str, BaseImageProcessor]`): Of every adapter, what it was trained with.
    """

    model: PeftModel
    processors: dict[str, BaseImageProcessor]


# ---------------------------------------------------------------------------------------------------------- adapters


def find_adapters(folder: Path = DEFAULT_FOLDER) -> list[Path]:
    """
    Finds the E2VPT adapters in the folders inside `folder`.

    Raises:
        ValueError: There are none.
    """
    found = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    adapters = [path for path in found if isinstance(PeftConfig.from_pretrained(str(path)), E2VPTConfig)]
    if not adapters:
        raise ValueError(f"There is no E2VPT adapter in {folder}. Name the folders of adapters, or make some: {HINT}")
    return adapters


def name_adapters(folders: list[Path]) -> dict[str, Path]:
    """Names every folder by that part of its path which differs; PEFT wants names without dots."""
    resolved = list(dict.fromkeys(folder.resolve() for folder in folders))
    common = os.path.commonpath([folder.parent for folder in resolved])
    return {folder.relative_to(common).as_posix().replace(".", "_"): folder for folder in resolved}


def read_config(folder: Path) -> E2VPTConfig:
    """
    Reads the configuration of an adapter.

    Raises:
        ValueError: The folder has no adapter, or one of another method, or one without names of classes.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"There is no adapter at {folder}: no adapter_config.json was found. To make one: {HINT}")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, E2VPTConfig):
        raise ValueError(f"The adapter at {folder} is one of {config.peft_type}; this page shows those of E2VPT.")
    if not config.labels:
        raise ValueError(f"The adapter at {folder} names no classes: it belongs to a model that is no classifier.")
    return config


def load_adapters(adapters: dict[str, Path]) -> Served:
    """
    Loads adapters on one backbone.

    Args:
        adapters (`dict[str, Path]`): Folders by the name that the adapter gets.

    Raises:
        ValueError: A folder has no E2VPT adapter of a classifier, or the adapters differ in their base model or in
            their number of classes.
    """
    configs = {name: read_config(folder) for name, folder in adapters.items()}
    for what, found in (
        ("base model", {name: config.base_model_name_or_path for name, config in configs.items()}),
        ("number of classes", {name: len(config.labels) for name, config in configs.items()}),
    ):
        if len(set(found.values())) > 1:
            raise ValueError(f"All adapters need the same {what}, found {found}: show them in several pages.")

    first = next(iter(configs.values()))
    # With as many nameless classes: every adapter brings its own head and its own names.
    base = AutoModelForImageClassification.from_pretrained(
        first.base_model_name_or_path, num_labels=len(first.labels), ignore_mismatched_sizes=True
    )
    base.config.id2label = {index: f"LABEL_{index}" for index in range(len(first.labels))}
    model: PeftModel | None = None
    processors = {}
    for name, folder in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
        else:
            model.load_adapter(str(folder), adapter_name=name)
        own = (folder / "preprocessor_config.json").is_file()
        processors[name] = AutoImageProcessor.from_pretrained(folder if own else first.base_model_name_or_path)
    return Served(model.eval(), processors)


# ----------------------------------------------------------------------------------------------------------- answers


@torch.no_grad()
def classify(served: Served, picture: Image.Image, name: str) -> dict[str, float]:
    """Returns the probability of every class of the adapter `name`."""
    served.model.set_adapter(name, inference_mode=True)
    logits = served.model(**served.processors[name](picture, return_tensors="pt")).logits
    return dict(zip(served.model.peft_config[name].labels, logits.softmax(-1)[0].tolist(), strict=True))


def attend(served: Served, picture: Image.Image, name: str) -> tuple[Image.Image, pandas.DataFrame]:
    """
    Returns where the class token of the last layer looks, and how much each layer looks at prompts.

    Returns:
        `tuple[Image.Image, pandas.DataFrame]`: The picture as the model sees it under its attention map, mean over
        heads; and rows `layer`, `keys` (visual or key-value prompts), `attention` in percent.

    Raises:
        ValueError: The backbone has no class token, or attentions that return no weights.
    """
    served.model.set_adapter(name, inference_mode=True)
    processor = served.processors[name]
    inputs = processor(picture, return_tensors="pt")
    found = prompt_attention(served.model, inputs)
    if found.class_token is None:
        raise ValueError("This backbone has no class token, so there is no attention of it to show.")
    rows = [
        {"layer": str(layer), "keys": KINDS[kind], "attention": 100 * shares[kind].item()}
        for layer, shares in zip(found.layers, found.class_token[:, 0], strict=True)
        for kind in range(TOKEN)
    ]
    last = attention_maps(served.model, inputs)[-1]
    looks = last.between_tokens()[0, :, 0, last.num_prefix_tokens :].mean(0)
    seen = processor(picture, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"][0]
    return lay_over(seen.transpose(1, 2, 0), looks), pandas.DataFrame(rows)


def lay_over(pixels: numpy.ndarray, looks: torch.Tensor) -> Image.Image:
    """
    Lays an attention map over a picture.

    Args:
        pixels (`numpy.ndarray`): (height, width, 3), 0 to 255.
        looks (`torch.Tensor`): (patches,), row by row.
    """
    height, width, _ = pixels.shape
    rows = round((len(looks) * height / width) ** 0.5)
    size = (SIDE * width // max(height, width), SIDE * height // max(height, width))
    looks = looks.reshape(rows, -1)
    heat = Image.fromarray(((looks - looks.min()) / (looks.max() - looks.min())).numpy())
    heat = numpy.asarray(heat.resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    picture = Image.fromarray(pixels.round().astype("uint8")).resize(size, Image.Resampling.BICUBIC)
    grey = numpy.asarray(picture.convert("L").convert("RGB"))
    strength = 0.15 + 0.5 * heat[..., None]
    mixed = (1 - strength) * grey + strength * 255 * colormaps["inferno"](heat)[..., :3]
    return Image.fromarray(mixed.astype("uint8"))


# -------------------------------------------------------------------------------------------------------------- page


def build_page(served: Served) -> gradio.Blocks:
    """Lays out the page and connects it with the model."""
    names = list(served.processors)

    def answer(picture: Image.Image | None, name: str) -> dict[str, float] | None:
        return None if picture is None else classify(served, picture, name)

    def show(picture: Image.Image | None, name: str) -> tuple[Image.Image | None, pandas.DataFrame | None]:
        return (None, None) if picture is None else attend(served, picture, name)

    with gradio.Blocks(title="E2VPT adapters", analytics_enabled=False) as page:
        gradio.Markdown("# One backbone, many adapters\nDrop a picture, then choose which adapter judges it.")
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(type="pil", sources=["upload", "clipboard"], label="Picture", height=360)
                name = gradio.Radio(names, value=names[0], label="Adapter", elem_id="adapter")
                probabilities = gradio.Label(num_top_classes=5, label="Answer", elem_id="answer")
            with gradio.Column():
                seen = gradio.Image(
                    label="Where the class token looks in the last layer",
                    format="png",
                    height=360,
                    interactive=False,
                    elem_id="attention",
                )
                shares = gradio.BarPlot(
                    x="layer",
                    y="attention",
                    color="keys",
                    x_title="layer",
                    y_title="% of the class token's attention",
                    color_title=" ",
                    label="Attention to prompts",
                    height=260,
                    elem_id="shares",
                )
        # One at a time: both choose the model's active adapter.
        changes = [picture.change, name.change]
        inputs = [picture, name]
        gradio.on(changes, answer, inputs, probabilities, concurrency_limit=1, concurrency_id="model")
        gradio.on(changes, show, inputs, [seen, shares], concurrency_limit=1, concurrency_id="model")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "adapter", nargs="*", type=Path, help=f"Folder of an adapter. Default: those in {DEFAULT_FOLDER}."
    )
    parser.add_argument("--port", type=int, help="Port of the page. Default: the first free one from 7860.")
    args = parser.parse_args()
    try:
        served = load_adapters(name_adapters(args.adapter or find_adapters()))
    except ValueError as error:
        parser.error(str(error))
    build_page(served).launch(server_port=args.port, show_error=True, footer_links=[])


if __name__ == "__main__":
    main()
