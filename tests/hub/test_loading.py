# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft_e2vpt.load` builds what an adapter was trained on; names of classes, versions and cards travel with it."""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers.integrations.peft import MIN_PEFT_VERSION

import peft_e2vpt
from peft_e2vpt import E2VPTConfig, PruningReport
from peft_e2vpt.hub.card import Location, write_card
from peft_e2vpt.hub.companion import facts_of
from tests.support.adapted import config_of, predict, prune, trained
from tests.support.models import VIT, build


LABELS = ["ash", "beech", "cedar", "dogwood", "elm"]
NO_MATPLOTLIB = "peft_e2vpt.hub.card.find_spec"


def name_classes(model: Any, labels: list[str]) -> None:
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A base model with three classes, as one that was trained for something else."""
    folder = tmp_path_factory.mktemp("base")
    base, _ = build("vit")
    base.classifier = torch.nn.Linear(32, 3)
    name_classes(base, ["x", "y", "z"])
    base.save_pretrained(folder)
    return folder


def base_model(folder: Path, labels: list[str] | None = LABELS, **settings: Any) -> Any:
    settings = {"num_labels": 5, "ignore_mismatched_sizes": True, **settings}
    model = transformers.ViTForImageClassification.from_pretrained(folder, **settings)
    name_classes(model, labels or [f"LABEL_{index}" for index in range(model.config.num_labels)])
    return model


def saved(base_folder: Path, out: Path, pruned: bool = False, **settings: Any) -> PeftModel:
    model = trained(get_peft_model(base_model(base_folder), config_of(**settings))).eval()
    if pruned:
        prune(model)
    model.save_pretrained(out)
    return model


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def change_settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**settings_of(folder), **changes}))


@pytest.fixture
def inputs():
    return build("vit")[1]


# --------------------------------------------------------------------------------------------------------------- load
@pytest.mark.parametrize("pruned", [False, True])
def test_load_builds_base_model_head_and_adapter(base_folder, tmp_path, inputs, pruned):
    model = saved(base_folder, tmp_path, pruned)
    loaded = peft_e2vpt.load(tmp_path)
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert loaded.config.label2id == {label: index for index, label in enumerate(LABELS)}


def test_load_takes_settings_of_the_base_model_and_of_peft(base_folder, tmp_path):
    saved(base_folder, tmp_path / "adapter")
    base_folder.rename(tmp_path / "moved")
    try:
        loaded = peft_e2vpt.load(
            tmp_path,
            subfolder="adapter",
            base_model=tmp_path / "moved",
            adapter_name="trees",
            is_trainable=True,
            dtype=torch.bfloat16,
            attn_implementation="eager",
        )
    finally:
        (tmp_path / "moved").rename(base_folder)
    assert loaded.active_adapter == "trees" and loaded.config._attn_implementation == "eager"
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in loaded.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize(
    "settings",
    [{"num_labels": 7}, {"id2label": {0: "oak"}}, {"label2id": {"oak": 0}}],
    ids=["num_labels", "id2label", "label2id"],
)
def test_other_classes_than_the_adapters_are_refused(base_folder, tmp_path, settings):
    saved(base_folder, tmp_path)
    with pytest.raises(
        ValueError, match=rf"{next(iter(settings))}=.* contradicts the adapter .*, which has 5 classes"
    ):
        peft_e2vpt.load(tmp_path, **settings)
    assert peft_e2vpt.load(tmp_path, num_labels=5).config.num_labels == 5


def test_without_a_head_of_its_own_an_adapter_keeps_that_of_the_base_model(base_folder, tmp_path, inputs):
    base = transformers.ViTForImageClassification.from_pretrained(base_folder)
    model = trained(get_peft_model(base, config_of(modules_to_save=[]))).eval()
    model.save_pretrained(tmp_path)
    loaded = peft_e2vpt.load(tmp_path)
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))
    assert list(loaded.config.id2label.values()) == ["x", "y", "z"]
    change_settings(tmp_path, labels=LABELS)  # a random head in its place would be a silent error
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        peft_e2vpt.load(tmp_path)


def test_a_model_without_classes_loads_too(tmp_path, inputs):
    base = transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False)
    base.save_pretrained(tmp_path / "base")
    base = transformers.ViTModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    model = trained(get_peft_model(base, config_of())).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert settings_of(tmp_path / "adapter")["labels"] is None
    loaded = peft_e2vpt.load(tmp_path / "adapter", add_pooling_layer=False)
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


def test_a_folder_without_an_e2vpt_adapter_is_refused(base_folder, tmp_path):
    with pytest.raises(ValueError, match=r"There is no adapter at .*: no adapter_config.json was found\."):
        peft_e2vpt.load(tmp_path)
    get_peft_model(base_model(base_folder), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"The adapter at .* is one of LORA, not of E2VPT"):
        peft_e2vpt.load(tmp_path)


def test_a_base_model_that_is_not_named_or_not_there_is_asked_for(base_folder, tmp_path):
    saved(base_folder, tmp_path)
    change_settings(tmp_path, base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"names no base model: pass base_model="):
        peft_e2vpt.load(tmp_path)
    change_settings(tmp_path, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"The base model '.*gone' of the adapter .* cannot be loaded"):
        peft_e2vpt.load(tmp_path)


def test_a_class_from_elsewhere_is_never_imported(base_folder, tmp_path):
    saved(base_folder, tmp_path)
    change_settings(tmp_path, auto_mapping={"base_model_class": "Evil", "parent_library": "os"})
    with pytest.raises(ValueError, match=r"was made for a Evil, which transformers .* does not have"):
        peft_e2vpt.load(tmp_path)


# ------------------------------------------------------------------------------------------------------------- classes
def test_names_of_classes_survive_a_base_model_without_names(base_folder, tmp_path):
    saved(base_folder, tmp_path / "first")
    assert settings_of(tmp_path / "first")["labels"] == LABELS
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The adapter's class")
        model = PeftModel.from_pretrained(base_model(base_folder, labels=None), tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert settings_of(tmp_path / "second")["labels"] == LABELS
    name_classes(model, ["a", "b", "c", "d", "e"])
    model.save_pretrained(tmp_path / "third")
    assert settings_of(tmp_path / "third")["labels"] == ["a", "b", "c", "d", "e"]


def test_classes_in_another_order_are_warned_of(base_folder, tmp_path):
    saved(base_folder, tmp_path)
    swapped = [LABELS[0], LABELS[2], LABELS[1], *LABELS[3:]]
    with pytest.warns(UserWarning, match=r"The adapter's class 1 is 'beech', the model's is 'cedar'"):
        PeftModel.from_pretrained(base_model(base_folder, swapped), tmp_path)


# ------------------------------------------------------------------------------------------------------------ versions
WAYS = {
    "E2VPTConfig": E2VPTConfig.from_pretrained,
    "PeftConfig": PeftConfig.from_pretrained,
    "load": peft_e2vpt.load,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_newer_format_is_refused_with_the_way_out(base_folder, tmp_path, way):
    saved(base_folder, tmp_path)
    assert settings_of(tmp_path)["format_version"] == 1
    change_settings(tmp_path, format_version=2, prompt_rotation=True)
    with pytest.raises(ValueError, match=r"format_version=2, and this version of peft_e2vpt reads up to 1: pip inst"):
        WAYS[way](str(tmp_path))


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_setting_of_the_same_format_is_left_out_with_a_warning_that_names_it(base_folder, tmp_path, way):
    saved(base_folder, tmp_path)
    change_settings(tmp_path, prompt_rotation=True)
    with pytest.warns(UserWarning, match="prompt_rotation"):
        WAYS[way](str(tmp_path))


def test_an_adapter_from_before_versions_is_of_the_first(base_folder, tmp_path, inputs):
    model = saved(base_folder, tmp_path)
    settings = settings_of(tmp_path)
    del settings["format_version"], settings["labels"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    loaded = PeftModel.from_pretrained(base_model(base_folder), tmp_path).eval()
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


# --------------------------------------------------------------------------------------------------------------- cards
def test_a_saved_adapter_has_a_card_that_says_how_to_load_it(base_folder, tmp_path):
    saved(base_folder, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f'import peft_e2vpt\n\nmodel = peft_e2vpt.load("{tmp_path}")\n' in card
    assert "base_model:" not in card.split("---\n")[1]  # a folder of this machine is nothing that the Hub can link to


def test_a_card_that_somebody_has_changed_is_left_alone(base_folder, tmp_path):
    model = saved(base_folder, tmp_path)
    card = tmp_path / "README.md"
    generated = card.read_text()
    model.save_pretrained(tmp_path)
    assert card.read_text() == generated
    lines = [line for line in generated.splitlines() if not line.startswith("<!-- Written by peft_e2vpt")]
    card.write_text("\n".join([*lines, "My own words."]))
    model.save_pretrained(tmp_path)
    assert "My own words." in card.read_text()


def report() -> PruningReport:
    return PruningReport(
        step=3,
        rewound_to="init",
        num_scored_samples=8,
        layers=[0, 1],
        token_scores=[[1.0, 2.0], [3.0, 0.0]],
        segment_scores=[[[1.0, 0.0], [1.0, 1.0]]] * 2,
        token_gates=[[1.0, 1.0], [1.0, 0.0]],
        segment_gates=[[[1.0, 0.0], [1.0, 1.0]]] * 2,
        tuned_values_before=1000,
        tuned_values_after=900,
        tuned_percentage_before=3.0,
        tuned_percentage_after=2.7,
    )


@pytest.mark.parametrize("has_matplotlib", [False, True])
def test_a_report_beside_the_adapter_goes_into_its_card_with_a_picture_where_there_is_matplotlib(
    base_folder, tmp_path, monkeypatch, has_matplotlib
):
    if has_matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setattr(NO_MATPLOTLIB, lambda name: None)
    report().save(tmp_path)
    saved(base_folder, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Pruned after step 3, from 1,000 trained parameters (3.000 %) to 900 (2.700 %)." in card
    assert ("](pruning.png)" in card) == (tmp_path / "pruning.png").exists() == has_matplotlib


def test_a_new_card_takes_data_and_results_of_an_earlier_one_unless_it_has_its_own(base_folder, tmp_path):
    model = saved(base_folder, tmp_path)
    facts = facts_of(model, model.peft_config["default"], "default")
    write_card(tmp_path, facts, Location("me/trees"), dataset="me/leaves", metrics={"eval_accuracy": 0.5})
    earlier = ModelCard.load(tmp_path / "README.md").data
    write_card(tmp_path, facts, Location("me/trees"), earlier=earlier)
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == earlier.to_dict()
    write_card(tmp_path, facts, Location("me/trees"), dataset="me/bark", metrics={"accuracy": 0.75}, earlier=earlier)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.datasets == ["me/bark"] and [result.metric_value for result in data.eval_results] == [0.75]


def test_a_base_model_carries_the_tags_while_it_is_adapted(base_folder):
    base = base_model(base_folder)
    base.add_model_tags("trees")
    model = get_peft_model(base, config_of())
    assert base.model_tags == ["trees", "peft", "e2vpt", "visual-prompt-tuning"]
    assert model.unload().model_tags == ["trees"]
    other = base_model(base_folder)
    assert get_peft_model(other, config_of()).unload().model_tags is None


# ------------------------------------------------------------------------------------------- transformers' own loading
@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_transformers_refuses_a_pruned_adapter_with_the_way_out(
    base_folder, tmp_path, inputs, ignore_mismatched_sizes
):
    """It compares shapes before anything of ours runs, and would go on with untrained prompts."""
    expected = predict(saved(base_folder, tmp_path, pruned=True), inputs)
    with pytest.raises(ValueError, match=r"use peft_e2vpt\.load\(\.\.\.\)\.get_base_model\(\)"):
        base_model(base_folder).load_adapter(str(tmp_path), ignore_mismatched_sizes=ignore_mismatched_sizes)
    assert torch.equal(predict(peft_e2vpt.load(tmp_path).get_base_model(), inputs), expected)


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} wants peft {MIN_PEFT_VERSION} for it",
)
def test_transformers_adds_sets_and_disables_adapters(base_folder, inputs):
    model = base_model(base_folder).eval()
    before = predict(model, inputs)
    model.add_adapter(config_of(), "trees")
    trained(model)
    adapted = predict(model, inputs)
    assert not torch.equal(adapted, before)
    model.disable_adapters()
    assert torch.equal(predict(model, inputs), before)
    model.enable_adapters()
    model.set_adapter("trees")
    assert model.active_adapters() == ["trees"]
