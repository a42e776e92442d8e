"""Drop an image, choose an adapter: a web page that shows what it answers and how much attention it gives to prompts.

```bash
pip install -e ".[examples,demo]"
python examples/finetune.py --prune              # makes adapters under runs/finetune
python examples/demo.py                          # those adapters
python examples/demo.py ADAPTER [ADAPTER ...]    # or any: folders of adapters, or of runs
```

All adapters are loaded on one backbone, so they need the same base model and equally many classes. The page runs on
this machine, at the address that is printed, loads nothing from elsewhere, and sends nothing anywhere.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import gradio
import torch
from matplotlib.figure import Figure
from peft import PeftConfig, PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor

from peft_e2vpt import E2VPTConfig
from peft_e2vpt.attention_maps import prompt_attention
from peft_e2vpt.hub.card import plain_text
from peft_e2vpt.images import read_image
from peft_e2vpt.plotting import plot_attention_maps, plot_prompt_attention
from peft_e2vpt_cli.files import adapters_below, read_method


DEFAULT_FOLDER = Path("runs/finetune")
HINT = "python examples/finetune.py --prune"
METHODS = {"E2VPT": "E2VPT", "LORA": "LoRA", "LN_TUNING": "LayerNorm tuning", "IA3": "IA3", "BOFT": "BOFT"}
STYLE = """<style>
.figure { overflow-x: auto }  /* on a phone a figure is swiped, not shrunk until nobody can read it */
.figure img { min-width: 600px }
@media (max-width: 700px) {
  .figure div { align-items: flex-start !important; justify-content: flex-start !important }
}
#shares img { min-width: 480px }
#message:not(:empty), #note:not(:empty) { border-left: 4px solid #c2410c; padding-left: 12px }
#adapter label { max-width: 100%; overflow-wrap: anywhere }
</style>"""
THEME = gradio.themes.Default(primary_hue="blue")  # its fonts come with Gradio


class Served(NamedTuple):
    """Several adapters on one backbone.

    Attributes:
        model (`PeftModel`): In eval mode; its adapters have the names of `processors`.
        processors (`dict[str, BaseImageProcessor]`): Of every adapter, what it was trained with.
    """

    model: PeftModel
    processors: dict[str, BaseImageProcessor]


# ---------------------------------------------------------------------------------------------------------- adapters


class Found(NamedTuple):
    """Adapters in folders.

    Attributes:
        adapters (`list[Path]`): Folders of E2VPT adapters.
        notes (`list[str]`): Sentences on what has been left out.
    """

    adapters: list[Path]
    notes: list[str]


def find_adapters(folders: list[Path]) -> Found:
    """
    Finds the E2VPT adapters that `folders` are, or that lie in them, as in the folder of a run.

    Checkpoints of a run are passed over where the finished adapter lies beside them.

    Raises:
        ValueError: A folder has none.
    """
    adapters, notes = [], []
    for folder in folders:
        if (folder / "adapter_config.json").is_file() or not folder.is_dir():
            adapters.append(folder)
            continue
        inside = adapters_below(folder)
        finished = [path for path in inside if not path.name.startswith("checkpoint-")] or inside[-1:]
        methods = {path: read_method(path) for path in finished}
        others = {path: METHODS.get(method, method) for path, method in methods.items() if method not in ("E2VPT", "")}
        kept = [path for path in finished if path not in others]
        listed = ", ".join(f"{path.name} ({method})" for path, method in others.items())
        if not kept:
            instead = f", only adapters of other methods: {listed}" if listed else ""
            raise ValueError(
                f"There is no E2VPT adapter in {folder}{instead}. Name the folders of adapters, or make some: {HINT}"
            )
        if listed:
            notes.append(f"Left out, as this page shows E2VPT adapters: {listed}.")
        adapters += kept
    return Found(adapters, notes)


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
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder  # as in what was typed
    if folder.is_file():
        raise ValueError(f"There is no adapter at {folder}, which is a file: name the folder that it lies in.")
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"There is no adapter at {folder}: no adapter_config.json was found. To make one: {HINT}")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, E2VPTConfig):
        method = read_method(folder)
        raise ValueError(
            f"The adapter at {folder} is one of {METHODS.get(method, method)}; this page shows those of E2VPT."
        )
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
    name, *others = adapters
    model = PeftModel.from_pretrained(base, str(adapters[name]), adapter_name=name)
    for other in others:
        model.load_adapter(str(adapters[other]), adapter_name=other)
    processors = {}
    for name, folder in adapters.items():
        has_own = (folder / "preprocessor_config.json").is_file()
        processors[name] = AutoImageProcessor.from_pretrained(folder if has_own else first.base_model_name_or_path)
    return Served(model.eval(), processors)


# ----------------------------------------------------------------------------------------------------------- answers


@torch.no_grad()
def classify(served: Served, image: Image.Image, name: str) -> dict[str, float]:
    """Returns the probability of every class of the adapter `name`."""
    served.model.set_adapter(name, inference_mode=True)
    logits = served.model(**served.processors[name](image, return_tensors="pt")).logits
    return dict(zip(served.model.peft_config[name].labels, logits.softmax(-1)[0].tolist(), strict=True))


def attend(served: Served, image: Image.Image, name: str) -> tuple[Figure, Figure]:
    """
    Draws how much attention each layer gives to prompts, and where in the image the rest of it goes.

    Raises:
        ValueError: The attentions of this backbone return no weights, or see windows of the image.
    """
    served.model.set_adapter(name, inference_mode=True)
    inputs = served.processors[name](image, return_tensors="pt")
    return plot_prompt_attention(prompt_attention(served.model, inputs)), plot_attention_maps(served.model, inputs)


# -------------------------------------------------------------------------------------------------------------- page


def open_image(path: str | None) -> tuple[Image.Image | None, str]:
    """Reads what was dropped as a viewer shows it; if it is no image, the second says why, in one sentence."""
    if path is None:
        return None, ""
    try:
        return read_image(path, name=Path(path).name), ""
    except ValueError as error:
        return None, f"{plain_text(error).rstrip('.')}. Choose another image."


def build_page(served: Served) -> gradio.Blocks:
    """Lays out the page and connects it with the model."""
    names = list(served.processors)

    # Gradio would open the file itself, so what was dropped comes as it is: a dictionary with its path.
    def answer(dropped: dict[str, Any] | None, name: str) -> tuple[dict[str, float] | None, str]:
        image, message = open_image(dropped and dropped["path"])
        return None if image is None else classify(served, image, name), message

    def show(dropped: dict[str, Any] | None, name: str) -> tuple[Figure | None, Figure | None, str]:
        image, _ = open_image(dropped and dropped["path"])
        if image is None:
            return None, None, ""
        try:
            return *attend(served, image, name), ""
        except ValueError as error:  # of a backbone without maps
            return None, None, f"There are no maps of this backbone. {plain_text(error)}"

    with gradio.Blocks(title="E2VPT adapters", analytics_enabled=False) as page:
        gradio.HTML(STYLE, padding=False)
        gradio.Markdown("# One backbone, many adapters\nDrop an image, then choose which adapter judges it.")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(
                    type="filepath", sources=["upload", "clipboard"], buttons=["fullscreen"], label="Image", height=386
                )
                message = gradio.Markdown(elem_id="message")
            with gradio.Column():
                name = gradio.Radio(names, value=names[0], label="Adapter", elem_id="adapter")
                probabilities = gradio.Label(num_top_classes=5, label="Answer", elem_id="answer")
        with gradio.Row():
            with gradio.Column(scale=2):
                gradio.Markdown("### Attention to prompts, layer by layer")
                shares = gradio.Plot(show_label=False, format="png", elem_id="shares", elem_classes="figure")
            with gradio.Column(scale=3):
                gradio.Markdown("### Attention to the image, without prompts and with them")
                maps = gradio.Plot(show_label=False, format="png", elem_id="maps", elem_classes="figure")
                note = gradio.Markdown(elem_id="note")
        # One at a time: both choose the model's active adapter.
        changes = [image.change, name.change]
        inputs = [image, name]
        settings = {"preprocess": False, "concurrency_limit": 1, "concurrency_id": "model"}
        gradio.on(changes, answer, inputs, [probabilities, message], **settings)
        gradio.on(changes, show, inputs, [shares, maps, note], **settings)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "adapter", nargs="*", type=Path, help=f"Folder of an adapter or a run. Default: {DEFAULT_FOLDER}."
    )
    parser.add_argument("--port", type=int, help="Port of the page. Default: the first free one from 7860.")
    args = parser.parse_args()
    try:
        found = find_adapters(args.adapter or [DEFAULT_FOLDER])
        for note in found.notes:
            print(note, file=sys.stderr)
        served = load_adapters(name_adapters(found.adapters))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    build_page(served).launch(server_port=args.port, show_error=True, footer_links=[], theme=THEME)


if __name__ == "__main__":
    main()
