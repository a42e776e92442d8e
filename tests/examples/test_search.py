# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`finetune.py --search`: trials that measure what is trained afterwards, on validation images, and that go on."""

from __future__ import annotations

import gc
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback
from transformers.utils import logging

from tests.support.own_images import draw_images, save_tiny_vit, script_runner


pytest.importorskip("datasets")
optuna = pytest.importorskip("optuna")
import finetune as script  # noqa: E402
import finetune_options as options_of_script  # noqa: E402
import search as search_script  # noqa: E402


pytestmark = pytest.mark.training

EVERY_E2VPT = ["learning_rate", "head_learning_rate", "num_visual_prompts", "num_kv_prompts", "layers"]


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory) -> Path:
    return save_tiny_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Training, validation and test images of two classes that are hard to tell apart."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 10), ("test", 3)):
        for label, level in (("dim", 0), ("light", 12)):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = 90 + level + torch.randint(0, 150, (8, 8, 3), generator=generator)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / split / label / f"{index}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Every trial collects garbage three times, and need not look through the modules that are loaded by now."""
    import peft_e2vpt.plotting  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def as_before():
    verbosity, of_optuna = logging.get_verbosity(), optuna.logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    optuna.logging.set_verbosity(of_optuna)


class Watch(TrainerCallback):
    """Notes losses and evaluated images of every training, and presses Ctrl-C in one of them."""

    def __init__(self) -> None:
        self.trainings: list[list[float]] = []
        self.evaluated: list[int] = []
        self.stop_in: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainings.append([])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if len(self.trainings) == self.stop_in:
            raise KeyboardInterrupt

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.trainings[-1] += [logs["loss"]] if "loss" in logs else []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append(len(kwargs["eval_dataloader"].dataset))


@pytest.fixture
def watch(monkeypatch) -> Watch:
    watched, usual = Watch(), script.make_trainer

    def make_trainer(run: Any, args: Any, callbacks: list[Any], **model: Any) -> Any:
        return usual(run, args, [*callbacks, watched], **model)

    monkeypatch.setattr(script, "make_trainer", make_trainer)
    return watched


@pytest.fixture
def run(tiny_vit, images, tmp_path, monkeypatch, capsys):
    """Runs the script in this process and returns what it prints; options given here replace the usual ones."""

    usual = {
        "model_name_or_path": tiny_vit, "train_dir": images, "output_dir": tmp_path / "run", "method": "e2vpt",
        "num_train_epochs": 2, "per_device_train_batch_size": 8, "search": 3, "logging_steps": 1,
    }  # fmt: skip
    return script_runner(script, usual, monkeypatch, capsys)


def found(folder: Path, method: str = "e2vpt") -> dict[str, Any]:
    return json.loads((folder / "run" / method / "search.json").read_text())


def trials(folder: Path, method: str = "e2vpt") -> list[dict[str, Any]]:
    return [{n: v for n, v in trial.items() if n != "seconds"} for trial in found(folder, method)["trials"]]


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in json.loads((folder / "run" / "results.json").read_text())["methods"]}


# ------------------------------------------------------------------------------------------------- what trials measure
def test_a_method_is_trained_as_in_its_best_trial_to_the_bit_and_the_first_trial_is_the_usual_run(
    run, watch, tmp_path
):
    text = run()
    assert run.code == 0, text
    result = found(tmp_path)
    best = result["trials"].index(max(result["trials"], key=lambda trial: trial["accuracy"]))
    assert result["chosen"]["settings"] == result["trials"][best]["settings"]
    *of_trials, afterwards = watch.trainings
    assert len(of_trials) == 3 and of_trials[best] == afterwards
    row = rows(tmp_path)["e2vpt"]
    assert row["search"] == result["chosen"] and row["search"]["trials"] == 3
    assert f"| {search_script.in_words(row['search']['settings'])} |" in text

    shutil.rmtree(tmp_path / "run")
    assert "searched" not in run(search=None)
    assert watch.trainings[-1] == of_trials[0]
    assert list(result["trials"][0]["settings"]) == EVERY_E2VPT
    assert set(result["trials"][0]["settings"].values()) == {6e-3, 3e-4, 10, 5, "all"}


def test_a_search_sees_validation_images_alone_and_says_each_trial_on_a_line(run, watch):
    text = run(method="lora", search=2)
    assert watch.evaluated == [20] * 4 + [6]  # two epochs of two trials, and the test images once
    assert "Settings are searched on the 20 validation images, of which one is 5.0%." in text
    lines = [line for line in text.splitlines() if line.startswith("lora, trial ")]
    number = r"\d\.\de-\d, head's rate \d\.\de-\d: \d\.\d{3} \(best \d\.\d{3}\)"
    assert [bool(re.fullmatch(f"lora, trial {i} of 2: rate {number}", lines[i - 1])) for i in (1, 2)] == [True] * 2


def test_the_pruned_method_takes_the_settings_of_the_unpruned_ones_search(run, watch, tmp_path):
    text = run(method="e2vpt e2vpt-pruned", search=2)
    assert len(watch.trainings) == 4 and "2 of 2 trials of e2vpt kept" in text
    assert rows(tmp_path)["e2vpt"]["search"] == rows(tmp_path)["e2vpt-pruned"]["search"]
    assert not (tmp_path / "run" / "e2vpt-pruned" / "search.json").exists()
    config = json.loads((tmp_path / "run" / "e2vpt-pruned" / "adapter_config.json").read_text())
    assert config["num_visual_prompts"] == found(tmp_path)["chosen"]["settings"]["num_visual_prompts"]


def test_a_trial_that_falls_behind_is_ended_early_and_never_chosen(run, watch, tmp_path, monkeypatch):
    class EndsTheSecond(optuna.pruners.BasePruner):
        def __init__(self, **settings: Any) -> None:
            pass

        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number == 1

    monkeypatch.setattr(optuna.pruners, "MedianPruner", EndsTheSecond)
    text = run(method="linear")
    states = [(trial["state"], len(trial["accuracies"])) for trial in trials(tmp_path, "linear")]
    assert states == [("finished", 2), ("ended early", 1), ("finished", 2)]
    assert ", ended early (best " in text and found(tmp_path, "linear")["chosen"]["pruned"] == 1


# -------------------------------------------------------------------------------------------------- what is searched
@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("e2vpt", {}, EVERY_E2VPT),
        ("e2vpt", {"learning_rate": 1e-3, "num_kv_prompts": 2, "layers_to_transform": [1]}, EVERY_E2VPT[1:3]),
        ("vpt-deep", {}, [*EVERY_E2VPT[:3], "layers"]),
        ("vpt-shallow", {"num_visual_prompts": 5}, EVERY_E2VPT[:2]),
        ("lora", {"num_visual_prompts": 5}, EVERY_E2VPT[:2]),
        ("full", {"head_learning_rate": 1e-3}, EVERY_E2VPT[:1]),
        ("linear", {}, EVERY_E2VPT[1:2]),
        ("linear", {"head_learning_rate": 1e-3}, []),
    ],
)
def test_each_method_has_a_space_of_its_own_without_what_is_given(method, given, expected, tmp_path):
    rates = {name: given.pop(name, None) for name in EVERY_E2VPT[:2]}
    args = script.RecipeArguments(output_dir=str(tmp_path), use_cpu=True, **rates)
    assert search_script.free_settings(method, script.ModelArguments(**given), args) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, {"all": None}),
        (2, {"all": None, "last half": [1]}),
        (4, {"all": None, "last three quarters": [1, 2, 3], "last half": [2, 3], "last quarter": [3]}),
    ],
)
def test_layers_are_those_nearest_the_head(count, expected):
    assert search_script.layer_choices(count) == expected


def test_a_method_of_which_all_is_given_is_trained_without_a_search(run, watch, tmp_path):
    text = run(method="linear", head_learning_rate=1e-3)
    assert len(watch.trainings) == 1 and "search" not in rows(tmp_path)["linear"]
    assert "trial" not in text


# ------------------------------------------------------------------------------------------------------------ going on
@pytest.mark.parametrize("way", ["Ctrl-C", "killed"])
def test_a_search_that_was_stopped_goes_on_to_the_trials_that_it_would_have_had(run, watch, way, tmp_path):
    run(method="linear", search=3)
    straight = trials(tmp_path, "linear")
    shutil.rmtree(tmp_path / "run")
    watch.trainings, watch.stop_in = [], 3
    text = run(method="linear", search=3)
    assert run.code == 130
    assert "Stopped in the search for linear. To go on, run the same command again: 2 of 3 trials kept." in text
    assert "Traceback" not in text
    if way == "killed":  # a trial that nobody has ended
        path = str(tmp_path / "run" / "linear" / "search.log")
        backend = optuna.storages.journal.JournalFileBackend(path, optuna.storages.journal.JournalFileOpenLock(path))
        storage = optuna.storages.JournalStorage(backend)
        (name,) = (study.study_name for study in storage.get_all_studies())
        optuna.load_study(study_name=name, storage=storage).ask()
    watch.trainings, watch.stop_in = [], None
    text = run(method="linear", search=3)
    assert "2 of 3 trials of linear kept, from" in text and len(watch.trainings) == 2
    assert trials(tmp_path, "linear") == straight


def test_a_search_that_was_stopped_in_its_first_trial_begins_with_the_usual_settings(run, watch, tmp_path):
    watch.stop_in = 1
    assert "0 of 1 trials kept" in run(method="linear", search=1)
    watch.stop_in = None
    run(method="linear", search=1)
    assert trials(tmp_path, "linear")[0]["settings"] == {"head_learning_rate": 3e-4}


def test_more_trials_go_on_and_other_settings_or_overwriting_start_again(run, watch, tmp_path):
    run(method="linear", search=1)
    first = trials(tmp_path, "linear")
    text = run(method="linear", search=2)
    assert "1 of 2 trials of linear kept" in text and trials(tmp_path, "linear")[:1] == first
    assert "kept" not in run(method="linear", search=2, num_train_epochs=1)
    assert len(trials(tmp_path, "linear")[0]["accuracies"]) == 1
    assert "kept" not in run("--overwrite", method="linear", search=2, num_train_epochs=1)


# ------------------------------------------------------------------------------------------------------------ mistakes
def one_class(folder: Path) -> dict[str, Any]:
    draw_images(folder / "images", 4)
    draw_images(folder / "of one", 2)
    shutil.rmtree(folder / "of one" / "dark")
    return {"train_dir": folder / "images", "validation_dir": folder / "of one"}


MISTAKES = {
    "none": ({"search": 0}, "--search is a number of trials, at least 1, got 0."),
    "one class": (one_class, "compares settings on the validation images, which are all of the class bright"),
    "best": (
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        "--search judges the last epoch of every trial: leave --load_best_model_at_end out.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_before_anything_is_trained(mistake, run, watch, tmp_path):
    options, message = MISTAKES[mistake]
    text = run(**(options(tmp_path) if callable(options) else options))
    assert run.code == 1 and not watch.trainings
    assert message in text and text.startswith("Error: ") and len(text.strip().splitlines()) == 1


def test_without_optuna_it_says_what_to_install_before_anything_is_loaded(run, monkeypatch):
    monkeypatch.setattr(options_of_script, "find_spec", lambda name: None)
    monkeypatch.setattr(script, "load_task", lambda *_: pytest.fail("loaded images"))
    assert "Error: --search needs Optuna: pip install optuna" in run()
    assert run.code == 1


def test_help_lists_it_with_an_example():
    text = options_of_script.own_help("")
    assert "--search N" in text and "--method e2vpt --search 20" in text
