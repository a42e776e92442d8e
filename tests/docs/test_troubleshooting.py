# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Every error on the page `docs/troubleshooting.md` is made here, and says what the page says that it says.

A function makes one error, and the heading that it stands under on the page is its label. A message of another library
is compared only where that has the version of `requirements.txt`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import peft_e2vpt
from peft_e2vpt import (
    PruneRewindCallback,
    RecipeCallback,
    cache_frozen_prefix,
    requirements,
    score_prompts,
    search_pruning,
    trained_tensors,
)
from peft_e2vpt.backbones.sites import find_attention_sites
from peft_e2vpt.images import check_images, find_images, load_splits
from peft_e2vpt.pruning.callback import TARGET_FILE
from peft_e2vpt.training.callback import HEADS_FILE
from tests.cli.conftest import draw_images
from tests.support import zoo_checks as checks
from tests.support.adapted import checkpoint_activations, config_of
from tests.support.command_line import fail
from tests.support.models import VIT
from tests.support.paths import ROOT
from tests.support.training import HALF, Images, adapted, trainer_for


PAGE = ROOT / "docs" / "troubleshooting.md"
ERROR = re.compile(r"^### (?P<heading>.+)\n+```text\n(?P<message>(?:.+\n)+)```\n+(?=[^#\s])", re.MULTILINE)
PINNED = dict(re.findall(r"^(\w+)==(.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
HERE = Path()  # every case runs in an empty folder


class Case(NamedTuple):
    """What makes an error, and the library other than this one that words it."""

    function: Callable[..., Any]
    of: str | None


CASES: dict[str, Case] = {}


def under(heading: str, of: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Says under which heading of the page the error of a function stands, and which other library words it."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        assert heading not in CASES
        CASES[heading] = Case(function, of)
        return function

    return add


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def messages_on_the_page() -> dict[str, str]:
    return {found["heading"]: in_one_line(found["message"]) for found in ERROR.finditer(PAGE.read_text())}


def test_every_heading_of_the_page_has_a_message_advice_and_a_case() -> None:
    headings = re.findall(r"^### (.+)$", PAGE.read_text(), re.MULTILINE)
    assert headings == list(messages_on_the_page()) == list(CASES)


@pytest.mark.parametrize("heading", CASES)
def test_the_page_has_the_message(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, library = CASES[heading]
    if library is not None and version(library).split("+")[0] != PINNED[library]:
        pytest.skip(f"a message of {library}, of another version than that of the page")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as error:
        function(monkeypatch) if "monkeypatch" in signature(function).parameters else function()
    assert in_one_line(f"{error.typename}: {error.value}") == messages_on_the_page()[heading]


# --------------------------------------------------------------------------------------------------------------- tools
class Without(Dataset):
    """Images without one of their entries."""

    def __init__(self, missing: str) -> None:
        self.images, self.missing = Images(), missing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value for name, value in self.images[index].items() if name != self.missing}


class WithOtherLabels(Images):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "labels": torch.tensor(5)}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from Images()


def images() -> Any:
    """A dataset of Hugging Face with the columns image and label, and a transform that reads them."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": Images().pixels.tolist(), "label": Images().labels.tolist()})
    return data.with_transform(
        lambda batch: {"pixel_values": [torch.tensor(image) for image in batch["image"]], "labels": batch["label"]}
    )


def train(callback: PruneRewindCallback | None = None, model: Any = None, **settings: Any) -> None:
    trainer_for(HERE, callback, model, **settings).train()


def batch(**changes: Any) -> dict[str, Tensor]:
    images = Images(4)
    return {"pixel_values": images.pixels, "labels": images.labels, **changes}


def saved(model: PeftModel | None = None) -> str:
    (adapted() if model is None else model).save_pretrained("trees")
    return "trees"


def change(**settings: Any) -> None:
    """Changes the configuration of the saved adapter."""
    path = Path("trees/adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def vit(**settings: Any) -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**{**VIT, "num_labels": 5, **settings}))


# --------------------------------------------------------------------------------------------- installing, importing
@under("A package is too old")
def too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"peft": "0.17.0", "transformers": "4.57.1"}
    monkeypatch.setattr(requirements, "version", lambda name: versions.get(name, "99"))
    requirements.check_requirements()


@under("`peft_e2vpt` is not imported")
def not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    saved()
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "E2VPT")
    PeftModel.from_pretrained(vit(), "trees")


# --------------------------------------------------------------------------------------------------- adapting a model
@under("The backbone has no attention that takes prompts")
def no_attention() -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    get_peft_model(transformers.ResNetForImageClassification(config), config_of())


@under("The width is not divisible by the number of segments", of="transformers")
def segments() -> None:
    get_peft_model(vit(), config_of(num_segments=7))


@under("A field of the config is impossible")
def impossible_field() -> None:
    peft_e2vpt.E2VPTConfig(num_visual_prompts="ten")


@under("A regular expression could be tried forever")
def endless_expression() -> None:
    peft_e2vpt.E2VPTConfig(target_modules=r"(.*\.)*attention")


@under("The name of an adapter is a path")
def adapter_name_is_a_path() -> None:
    adapted(adapter_name="runs/flowers")


@under("A name in `modules_to_save` is the ending of several modules")
def several_endings() -> None:
    get_peft_model(vit(), config_of(modules_to_save=["layernorm_before"]))


@under("`modules_to_save` names something that the model does not have")
def unknown_head() -> None:
    get_peft_model(vit(), config_of(modules_to_save=["head"]))


@under("The model is adapted already")
def twice() -> None:
    get_peft_model(adapted(), config_of())


@under("transformers' own `add_adapter` asks for another PEFT", of="transformers")
def add_adapter_of_transformers() -> None:
    vit().add_adapter(config_of())


@under("The base model has a head of another size", of="transformers")
def head_of_the_checkpoint() -> None:
    vit(num_labels=3).save_pretrained("vit")
    AutoModelForImageClassification.from_pretrained("vit", num_labels=5)


def quantised(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@under("No gradient passes through the backbone")
def without_gradient() -> None:
    get_peft_model(quantised(vit()), config_of())


@under("The head is quantised")
def quantised_head() -> None:
    adapted().save_pretrained("adapter")
    PeftModel.from_pretrained(quantised(vit()), "adapter")


# --------------------------------------------------------------------------------------------------------------- data
@under("A label is larger than the number of classes", of="torch")
def label_out_of_range() -> None:
    train(train_dataset=WithOtherLabels())


@under("The images have another size than the model", of="transformers")
def image_size() -> None:
    adapted()(pixel_values=torch.randn(1, 3, 64, 64))


@under("The Trainer has removed the column that a transform needs")
def removed_column() -> None:
    train(train_dataset=images())


@under("The same, with `PruneRewindCallback`")
def removed_column_with_callback() -> None:
    train(PruneRewindCallback(**HALF), train_dataset=images())


@under("The training set has no pixel values", of="transformers")
def no_pixels() -> None:
    train(train_dataset=Without("pixel_values"))


@under("The training set has no labels", of="transformers")
def no_labels() -> None:
    train(train_dataset=Without("labels"))


@under("The training set is empty", of="torch")
def empty_training_set() -> None:
    train(train_dataset=Images(0))


@under("There is no evaluation set to evaluate on", of="transformers")
def no_set_to_evaluate() -> None:
    args = trainer_for(HERE, None, eval_strategy="epoch").args
    Trainer(adapted(), args, train_dataset=Images())


@under("There is no accuracy to choose the best model by", of="transformers")
def no_metric() -> None:
    train(metric_for_best_model="accuracy", eval_strategy="steps", eval_steps=1, save_strategy="best")


# ---------------------------------------------------------------------------------------------------------- own images
def files(*names: str, content: bytes | None = None) -> None:
    """Writes small images, or other files, into `images`."""
    pil = pytest.importorskip("PIL.Image")
    for name in names:
        path = Path("images") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            pil.new("RGB", (8, 8)).save(path)
        else:
            path.write_bytes(content)


def finetune(*options: str) -> None:
    """What `examples/finetune.py` does before it trains, on `images`."""
    import finetune

    parser = transformers.HfArgumentParser((finetune.ModelArguments, finetune.DataArguments, finetune.RecipeArguments))
    finetune.prepare_run(*parser.parse_args_into_dataclasses(["--train_dir", "images", "--use_cpu", *options]))


def saved_vit() -> str:
    """A backbone for images of 32 pixels."""
    vit().save_pretrained("vit")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    Path("vit/preprocessor_config.json").write_text(json.dumps(settings))
    return "vit"


TWO_CLASSES = tuple(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3))


@under("The folder of images is empty")
def no_images() -> None:
    Path("images").mkdir()
    find_images("images")


@under("There are archives or other files in place of images")
def no_images_but_files() -> None:
    files("cats.zip", "notes.txt", content=b"...")
    find_images("images")


@under("Images lie in no class folder")
def loose_images() -> None:
    files(*TWO_CLASSES, "new.jpg")
    find_images("images")


@under("Images lie too deep")
def nested_images() -> None:
    files("cat/kittens/1.png", "dog/1.png")
    find_images("images")


@under("The folder above the images was given")
def one_folder_too_high() -> None:
    files("photos/cat/1.png", "photos/dog/1.png")
    find_images("images")


@under("There is one class alone")
def one_class() -> None:
    files("cat/1.png", "cat/2.png")
    find_images("images")


@under("A class has one image")
def one_image() -> None:
    pytest.importorskip("datasets")
    files(*TWO_CLASSES, "bird/1.png")
    load_splits("images")


@under("A class is named otherwise in another split")
def misspelt_class() -> None:
    files(*(f"train/{name}" for name in TWO_CLASSES), "val/Cat/1.png", "val/dog/1.png")
    find_images("images")


@under("There are splits, but none to train on")
def no_training_split() -> None:
    files("val/cat/1.png", "test/cat/1.png")
    find_images("images")


@under("A split lies beside classes")
def split_beside_classes() -> None:
    files(*TWO_CLASSES, "train/cat/1.png", "train/dog/1.png")
    find_images("images")


@under("Images cannot be read")
def bad_images() -> None:
    pytest.importorskip("datasets")
    files(*TWO_CLASSES)
    files("cat/1.png", content=b"")
    files("dog/0.png", content=b"<!doctype html>")
    check_images(load_splits("images").splits)


@under("The backbone takes no images of this size")
def wrong_image_size() -> None:
    pytest.importorskip("datasets")
    files(*TWO_CLASSES)
    finetune("--model_name_or_path", saved_vit(), "--image_size", "64")


@under("A method does not work on the backbone")
def method_that_does_not_work() -> None:
    pytest.importorskip("datasets")
    files(*TWO_CLASSES)
    finetune("--model_name_or_path", saved_vit(), "--method", "linear", "e2vpt", "--layers_to_transform", "7")


@under("There is nothing to search with")
def no_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_options.find_spec", lambda name: None)
    files(*TWO_CLASSES)
    finetune("--model_name_or_path", saved_vit(), "--search", "20")


@under("The validation images cannot tell settings apart")
def searched_on_one_class() -> None:
    pytest.importorskip("optuna")
    files(*TWO_CLASSES, "../others/cat/1.png")
    finetune("--model_name_or_path", saved_vit(), "--validation_dir", "others", "--search", "20")


@under("An upload needs somebody who is logged in")
def nobody_to_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    files(*TWO_CLASSES)
    finetune("--model_name_or_path", saved_vit(), "--method", "e2vpt", "--push_to_hub")


@under("The figures are to be drawn of other images")
def figures_of_other_images() -> None:
    pytest.importorskip("datasets")
    import figures
    from finetune_options import DataArguments

    files(*TWO_CLASSES)
    run = {"fingerprint": "0123456789abcdef", "images": {"train": 820, "validation": 164}}
    run["data"] = {"train_dir": "/home/me/cells", "seed": 42}
    figures.load_tested(figures.FigureArguments(), DataArguments(train_dir="images"), run)


# ------------------------------------------------------------------------------------------------------------ training
@under("The adapter is frozen", of="torch")
def frozen() -> None:
    train(model=PeftModel.from_pretrained(vit(), saved()))


@under("The adapter is frozen, with `PruneRewindCallback`")
def frozen_with_callback() -> None:
    train(PruneRewindCallback(**HALF), PeftModel.from_pretrained(vit(), saved()))


@under("FSDP1 hides the parameters")
def fsdp1() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        trained_tensors(FullyShardedDataParallel(adapted(), device_id=torch.device("cpu"), use_orig_params=True))
    finally:
        torch.distributed.destroy_process_group()


@under("The model was quantised after it was adapted")
def quantised_before_training() -> None:
    quantised(adapted()).train()(**batch())


def as_errors(model: torch.nn.Module, inputs: dict[str, Any]) -> None:
    """Runs a model that warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Reentrant activation checkpoints|.* changes its buffer")
        model(**inputs)


@under("Activation checkpoints lose gradients")
def lost_gradients() -> None:
    model, inputs = checks.adapt("llama4_vision")
    checkpoint_activations(model.train(), {"use_reentrant": True})
    as_errors(model, inputs)


@under("A module of the backbone changes its buffers")
def changing_buffer() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", torch.zeros(1))

        def forward(self, tokens: Tensor) -> Tensor:
            self.average += tokens.mean()
            return tokens

    model = adapted()
    model.get_base_model().vit.layernorm = Average()
    as_errors(model.train(), batch())


@under("The forward of an attention was replaced")
def replaced_forward() -> None:
    model, inputs = checks.build("hiera")
    attention = find_attention_sites(model)[0].attention
    forward = attention.forward
    model = get_peft_model(model, checks.config())
    attention.forward = forward
    model(**inputs)


@under("Several GPUs are used by one process")
def data_parallel() -> None:
    for module in adapted().modules():  # as torch.nn.DataParallel does for every GPU
        module._replicate_for_data_parallel()


# ----------------------------------------------------------------------------------------------- PruneRewindCallback
@under("The checkpoint misses the head as it learns")
def checkpoint_without_head() -> None:
    trainer_for(HERE, None, callbacks=(RecipeCallback(),), **SAVED).train()
    (HERE / "checkpoint-1" / HEADS_FILE).unlink()
    again = trainer_for(HERE, None, callbacks=(RecipeCallback(),), **SAVED)
    again.train(resume_from_checkpoint="checkpoint-1")


class Mirrored(Images):
    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "pixel_values": torch.where(torch.rand(()) < 0.5, item["pixel_values"], 0.0)}


@under("An image cannot be cached: it changes")
def cached_augmentation() -> None:
    cache_frozen_prefix(adapted(layers_to_transform=[1]), Mirrored())


@under("Nothing is worth caching")
def cached_first_layer() -> None:
    cache_frozen_prefix(adapted(), Images())


@under("The frozen layers have dropout")
def cached_dropout() -> None:
    model = get_peft_model(
        ViTForImageClassification(ViTConfig(**VIT, hidden_dropout_prob=0.1, num_labels=5)),
        config_of(layers_to_transform=[1]),
    )
    cache_frozen_prefix(model, Images())


@under("A model cannot begin behind a cache")
def cached_dense() -> None:
    model, _ = checks.adapt("dpt", layers_to_transform=[3])
    cache_frozen_prefix(model, [{"pixel_values": torch.randn(3, 32, 32)}])


@under("The cached hidden states are out of date")
def cached_other_weights() -> None:
    model = adapted(layers_to_transform=[1])
    cached = cache_frozen_prefix(model, Images())
    with torch.no_grad():
        model.get_base_model().vit.layers[0].mlp.fc1.bias += 1
    model(cached[0]["pixel_values"][None])


@under("A folder holds the cache of something else")
def cached_elsewhere() -> None:
    cache_frozen_prefix(adapted(layers_to_transform=[1]), Images(), folder="cache")
    cache_frozen_prefix(adapted(layers_to_transform=[1]), Images(seed=1), folder="cache")


@under("There is no evaluation set to compare prunings on")
def no_evaluation_set() -> None:
    args = trainer_for(HERE, None).args
    Trainer(adapted(), args, train_dataset=Images(), callbacks=[PruneRewindCallback()]).train()


@under("The evaluation set is empty")
def empty_evaluation_set() -> None:
    train(PruneRewindCallback(), eval_dataset=Images(0))


@under("The evaluation set has no labels")
def evaluation_without_labels() -> None:
    train(PruneRewindCallback(), eval_dataset=Without("labels"))


@under("There are several evaluation sets")
def several_evaluation_sets() -> None:
    train(PruneRewindCallback(), eval_dataset={"birds": Images(), "trees": Images()})


@under("The training set is a stream")
def stream() -> None:
    train(PruneRewindCallback(**HALF), train_dataset=Stream(), max_steps=4)


@under("The run is too short for two parts")
def too_short() -> None:
    train(PruneRewindCallback(prune_after=4, unit="epochs", **HALF))


@under("The run has a single step")
def single_step() -> None:
    train(PruneRewindCallback(**HALF), max_steps=1)


@under("The budget is too small")
def budget() -> None:
    train(PruneRewindCallback(max_tuned_percentage=0.5))


@under("A ratio is larger than 1")
def ratio() -> None:
    PruneRewindCallback(prune_tokens=20.0)


@under("An amount to prune is neither a ratio nor a number")
def amount() -> None:
    PruneRewindCallback(prune_tokens="half")


@under("Too many prompts are to be pruned")
def too_many() -> None:
    train(PruneRewindCallback(prune_tokens=50))


@under("The model has no adapter")
def no_adapter() -> None:
    train(PruneRewindCallback(**HALF), vit())


@under("The adapter has no visual prompts")
def no_visual_prompts() -> None:
    train(PruneRewindCallback(**HALF), adapted(num_visual_prompts=0))


@under("A phase of pruning fails on its first batch")
def failing_quality() -> None:
    train(PruneRewindCallback(quality=lambda outputs, batch: batch["masks"]))


@under("The metric to compare prunings by is missing")
def missing_metric() -> None:
    train(PruneRewindCallback(quality="mean_iou"))


@under("The callback was passed twice")
def two_callbacks() -> None:
    train(PruneRewindCallback(**HALF), callbacks=(PruneRewindCallback(**HALF),))


@under("The learning rate schedule cannot start again")
def schedule() -> None:
    trainer = trainer_for(HERE, PruneRewindCallback(**HALF))
    optimizer = torch.optim.AdamW(trainer.model.parameters())
    trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 5)
    trainer.train()


@under("The checkpoint was made without the callback")
def foreign_checkpoint() -> None:
    train(max_steps=2, save_strategy="steps", save_steps=1)
    trainer_for(HERE, PruneRewindCallback(**HALF), max_steps=4).train(resume_from_checkpoint="checkpoint-2")


SAVED: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}


@under("The checkpoint misses the values to rewind to")
def incomplete_checkpoint() -> None:
    train(PruneRewindCallback(**HALF), **SAVED)
    (HERE / "checkpoint-1" / TARGET_FILE).unlink()
    trainer_for(HERE, PruneRewindCallback(**HALF), **SAVED).train(resume_from_checkpoint="checkpoint-1")


@under("The values to rewind to are those of another step")
def another_target() -> None:
    train(PruneRewindCallback(**HALF), **SAVED)
    early = PruneRewindCallback(**HALF, rewind_to="early", early_steps=1)
    trainer_for(HERE, early, **SAVED).train(resume_from_checkpoint="checkpoint-2")


@under("The checkpoint has more steps behind it than the run is to have")
def nothing_left() -> None:
    train(PruneRewindCallback(**HALF), **SAVED)
    shorter = {**SAVED, "max_steps": 3}
    trainer_for(HERE, PruneRewindCallback(**HALF), **shorter).train(resume_from_checkpoint="checkpoint-4")


# --------------------------------------------------------------------------------------------- scoring and searching
@under("Batches are not dictionaries")
def tuples() -> None:
    images = Images()
    score_prompts(adapted(), DataLoader(TensorDataset(images.pixels, images.labels), 4))


@under("The batches to score with have no labels")
def scoring_without_labels() -> None:
    score_prompts(adapted(), [{"pixel_values": batch()["pixel_values"]}])


@under("There is nothing to score with")
def empty_scoring() -> None:
    score_prompts(adapted(), [])


@under("There is nothing to compare prunings on")
def empty_search() -> None:
    model = adapted()
    search_pruning(model, score_prompts(model, [batch()]), [])


@under("A gradient is not finite")
def not_finite() -> None:
    score_prompts(adapted(), [batch(pixel_values=torch.full((4, 3, 32, 32), torch.nan))])


@under("Another adapter is active")
def not_active() -> None:
    model = adapted()
    model.add_adapter("flowers", config_of())
    score_prompts(model, [batch()], adapter_name="flowers")


# ------------------------------------------------------------------------------------------------- several adapters
@under("The model has no adapter of this name: `set_adapter`", of="peft")
def set_unknown() -> None:
    adapted().set_adapter("flowers")


@under("The model has no adapter of this name: `delete_adapter`", of="peft")
def delete_unknown() -> None:
    adapted().delete_adapter("flowers")


@under("The model has no adapter of this name: `prompt_summary`, `score_prompts`, `apply_gates`")
def summary_of_unknown() -> None:
    adapted().prompt_summary("flowers")


@under("A batch names an adapter that the model does not have")
def unknown_in_a_batch() -> None:
    adapted().eval()(pixel_values=batch()["pixel_values"], adapter_names=["default", "flowers"] * 2)


@under("A batch names adapters while the model trains")
def mixed_training() -> None:
    adapted().train()(pixel_values=batch()["pixel_values"], adapter_names=["default"] * 4)


@under("The heads of the adapters in a batch give outputs of different shapes")
def different_heads() -> None:
    model = adapted()
    model.add_adapter("flowers", config_of())
    head = model.get_base_model().classifier
    head.modules_to_save["flowers"] = nn.Sequential(nn.Linear(32, 6), nn.Unflatten(1, (2, 3)))
    model.eval()(pixel_values=batch()["pixel_values"], adapter_names=["default", "flowers"] * 2)


@under("`merge_and_unload` is not possible")
def merge() -> None:
    adapted().merge_and_unload()


# -------------------------------------------------------------------------------------------------- saving and loading
@under("The head to save is quantised")
def save_quantised() -> None:
    quantised(adapted()).save_pretrained("adapter")


@under("There is no adapter to load: PEFT", of="peft")
def nothing_to_load() -> None:
    adapted().load_adapter("flowers", adapter_name="flowers")


@under("There is no adapter to load: `peft_e2vpt.load`")
def nothing_for_load() -> None:
    Path("flowers").mkdir()
    peft_e2vpt.load("flowers")


TENSORS = Path("trees/adapter_model.safetensors")


@under("The adapter has no tensors")
def no_tensors() -> None:
    saved()
    TENSORS.unlink()
    peft_e2vpt.load("trees")


@under("A file of the adapter is damaged")
def damaged() -> None:
    saved()
    TENSORS.write_bytes(TENSORS.read_bytes()[:-1])
    peft_e2vpt.load("trees")


@under("The config is cut off: PEFT")
def truncated_config() -> None:
    saved()
    Path("trees/adapter_config.json").write_text('{"peft_type": "E2V')
    PeftModel.from_pretrained(vit(), "trees")


@under("A file of the adapter is a pointer of Git LFS")
def pointer() -> None:
    saved()
    TENSORS.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    peft_e2vpt.load("trees")


@under("The adapter is a pickle")
def pickled() -> None:
    adapted().save_pretrained("trees", safe_serialization=False)
    peft_e2vpt.load("trees")


@under("A gate is neither 0 nor 1")
def damaged_gate() -> None:
    saved()
    tensors = load_file(TENSORS)
    tensors["base_model.model.e2vpt.0.e2vpt_token_gates"].fill_(0.5)
    save_file(tensors, TENSORS)
    PeftModel.from_pretrained(vit(), "trees")


@under("The config and the tensors do not belong together")
def another_config() -> None:
    saved()
    change(num_kv_prompts=3)
    PeftModel.from_pretrained(vit(), "trees")


@under("A field of `adapter_config.json` is impossible")
def impossible_field_in_a_file() -> None:
    saved()
    change(num_visual_prompts=10**9)
    peft_e2vpt.load("trees")


@under("There are more labels than the head can tell apart")
def more_labels() -> None:
    saved()
    change(labels=[f"tree {index}" for index in range(1000)])
    peft_e2vpt.load("trees")


@under("The folder holds something else")
def something_else() -> None:
    Path("trees").mkdir()
    Path("trees/adapter_config.json").write_text('{"foo": "bar"}')
    peft_e2vpt.load("trees")


@under("A file is named instead of its folder")
def file_instead_of_folder() -> None:
    saved()
    peft_e2vpt.load(TENSORS)


@under("PEFT does not know the method")
def unknown_method() -> None:
    saved()
    change(peft_type="E3VPT")
    peft_e2vpt.load("trees")


@under("The Hub is not reached")
def no_hub() -> None:
    peft_e2vpt.load("me/vit-e2vpt-flowers")


@under("The adapter is one of another method")
def another_method() -> None:
    get_peft_model(vit(), peft.LoraConfig(target_modules="all-linear")).save_pretrained("trees")
    peft_e2vpt.load("trees")


@under("The adapter was made for a model of another library", of="transformers")
def of_another_library() -> None:
    saved()
    library = {"base_model_class": "VisionTransformer", "parent_library": "timm.models.vision_transformer"}
    change(auto_mapping=library)
    peft_e2vpt.load("trees")


@under("The adapter names no base model")
def no_base_model() -> None:
    peft_e2vpt.load(saved())  # of a model that was built, not loaded


@under("The base model is gone")
def base_model_gone() -> None:
    saved()
    change(base_model_name_or_path="me/vit")
    peft_e2vpt.load("trees")


@under("The base model is another one")
def another_base_model() -> None:
    vit(image_size=64).save_pretrained("vit_64")
    peft_e2vpt.load(saved(), base_model="vit_64")


@under("The base model would be far larger than its checkpoint")
def far_larger() -> None:
    vit().save_pretrained("base")
    saved()
    change(base_model_name_or_path="base", base_model_settings={"image_size": 10**6})
    peft_e2vpt.load("trees")


@under("The base model has no safetensors")
def base_model_is_a_pickle() -> None:
    vit().save_pretrained("base")
    torch.save(load_file("base/model.safetensors"), "base/pytorch_model.bin")
    Path("base/model.safetensors").unlink()
    saved()
    change(base_model_name_or_path="base")
    peft_e2vpt.load("trees")


@under("The base model has another number of classes")
def other_classes() -> None:
    PeftModel.from_pretrained(vit(num_labels=3), saved())


@under("The base model has another head")
def other_head() -> None:
    model = vit()
    model.classifier = nn.Linear(32, 6)
    PeftModel.from_pretrained(model, saved())


@under("The base model has another width")
def other_width() -> None:
    PeftModel.from_pretrained(vit(hidden_size=64), saved())


@under("The base model has other layers")
def other_layers() -> None:
    PeftModel.from_pretrained(vit(num_hidden_layers=2), saved())


@under("The place of the model is given twice")
def placed_twice() -> None:
    peft_e2vpt.load(saved(), torch_device="cpu", device_map="auto")


@under("A pipeline has no processor")
def no_processor() -> None:
    vit().save_pretrained("base")
    peft_e2vpt.pipeline("image-classification", saved(), base_model="base")


@under("Nobody is logged in to upload")
def not_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    peft_e2vpt.push_to_hub(adapted(), "me/vit-e2vpt-trees")


# ---------------------------------------------------------------------------------------------------- the command line
Error = type("Error", (Exception,), {})
ErrorOfDemo = type("demo.py: error", (Exception,), {})


def command(*arguments: str) -> None:
    """Raises what `peft-e2vpt` prints."""
    raise Error(fail(*arguments))


def with_base() -> None:
    """An adapter `trees` on a folder `base`, and images `cells` of other classes."""
    vit().save_pretrained("base")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("base")
    saved()
    change(base_model_name_or_path="base", labels=["ash", "beech", "cedar", "elm", "oak"])
    draw_images(Path("cells"), 2)


@under("Command line: there is no adapter")
def command_without_adapter() -> None:
    Path("flowers").mkdir()
    command("inspect", "flowers")


@under("Command line: a file is named instead of its folder")
def command_with_file() -> None:
    saved()
    command("inspect", str(TENSORS))


@under("Command line: the adapter is one of another method")
def command_with_another_method() -> None:
    another_adapter()
    command("inspect", "trees")


@under("Command line: a file of the adapter is a pointer of Git LFS")
def command_with_pointer() -> None:
    saved()
    TENSORS.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    command("card", "trees")


@under("Command line: the output folder holds an adapter")
def command_with_taken_output() -> None:
    saved()
    command("prune", "trees", "--data", "cells", "--output", "trees")


@under("Command line: an amount is neither a ratio nor a number")
def command_with_word() -> None:
    command("prune", "trees", "--data", "cells", "--output", "pruned", "--tokens", "half")


@under("Command line: a budget and amounts are given")
def command_with_both() -> None:
    amounts = ("--tokens", "0.5", "--max-tuned-percentage", "1")
    command("prune", "trees", "--data", "cells", "--output", "pruned", *amounts)


@under("Command line: the folder of images is empty")
def command_without_images() -> None:
    with_base()
    Path("leaves").mkdir()
    command("evaluate", "trees", "--data", "leaves")


@under("Command line: the adapter does not know a class of the images")
def command_with_other_classes() -> None:
    with_base()
    command("evaluate", "trees", "--data", "cells")


@under("Command line: an image cannot be read")
def command_with_bad_image() -> None:
    with_base()
    change(labels=["blue", "green", "red", "cyan", "teal"])
    Path("cells/blue/9.png").touch()
    command("evaluate", "trees", "--data", "cells")


@under("Command line: the images have no such split")
def command_with_another_split() -> None:
    with_base()
    command("evaluate", "trees", "--data", "cells", "--split", "test")


@under("Command line: the adapter names no base model")
def command_without_base() -> None:
    saved()
    draw_images(Path("cells"), 2)
    command("evaluate", "trees", "--data", "cells")


@under("Command line: somebody has edited the card")
def command_with_edited_card() -> None:
    saved()
    Path("trees/README.md").write_text("# Mine\n")
    command("card", "trees", "--write")


@under("Command line: the checkpoint is another file")
def command_with_text() -> None:
    Path("notes.pth").write_text("a text")
    vit().save_pretrained("base")
    command("convert", "notes.pth", "--base", "base", "--output", "adapter")


# ------------------------------------------------------------------------------------------------------------ the demo
def start_demo(*folders: str) -> None:
    """Raises what `examples/demo.py` says when it is started with folders."""
    demo = pytest.importorskip("demo", reason="needs the extra `demo`")
    with pytest.raises(ValueError) as error:
        demo.load_adapters(demo.name_adapters(demo.find_adapters([Path(folder) for folder in folders]).adapters))
    raise ErrorOfDemo(error.value)


def drop(content: bytes) -> None:
    """Raises what the page says of a file."""
    demo = pytest.importorskip("demo", reason="needs the extra `demo`")
    Path("cat.png").write_bytes(content)
    raise Error(demo.open_image("cat.png")[1])


def with_labels(folder: str, *labels: str, base: str = "base") -> str:
    saved()
    change(base_model_name_or_path=base, labels=list(labels) or None)
    return str(Path("trees").rename(folder))


def another_adapter() -> None:
    get_peft_model(vit(), peft.LoraConfig(target_modules="all-linear")).save_pretrained("trees")


@under("Demo: there is no adapter")
def demo_without_adapter() -> None:
    Path("runs").mkdir()
    start_demo("runs")


@under("Demo: there is no such folder")
def demo_without_folder() -> None:
    start_demo("flowers")


@under("Demo: a file is named instead of its folder")
def demo_with_file() -> None:
    saved()
    start_demo(str(TENSORS))


@under("Demo: the adapter is one of another method")
def demo_with_another_method() -> None:
    another_adapter()
    start_demo("trees")


@under("Demo: all adapters of a run are of other methods")
def demo_with_other_methods() -> None:
    another_adapter()
    Path("run").mkdir()
    Path("trees").rename("run/trees")
    start_demo("run")


@under("Demo: the model is no classifier")
def demo_without_classes() -> None:
    start_demo(with_labels("a"))


@under("Demo: the adapters have different base models")
def demo_with_two_bases() -> None:
    start_demo(with_labels("a", "ash", "oak"), with_labels("b", "ash", "oak", base="other"))


@under("Demo: the adapters have different numbers of classes")
def demo_with_other_classes() -> None:
    start_demo(with_labels("a", "ash", "oak"), with_labels("b", "ash", "oak", "elm"))


@under("Demo: the file is empty")
def demo_with_empty_file() -> None:
    drop(b"")


@under("Demo: the file is no image")
def demo_with_text() -> None:
    drop(b"a text")


@under("Demo: the file is a pointer of Git LFS")
def demo_with_pointer() -> None:
    drop(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
