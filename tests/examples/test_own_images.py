# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`finetune.py` with a user's own images: what it says, what it refuses, and how it goes on after a stop."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.utils import logging

from tests.support.own_images import draw_images, save_tiny_vit, script_runner
from tests.support.paths import EXAMPLES


pytest.importorskip("datasets")
import figures as figures_script  # noqa: E402
import finetune as script  # noqa: E402


pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory) -> Path:
    return save_tiny_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def images(tmp_path) -> Path:
    return draw_images(tmp_path / "images", 6)


@pytest.fixture(autouse=True)
def quiet_again():
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture
def run(tiny_vit, images, tmp_path, monkeypatch, capsys):
    """Runs the script in this process and returns what it prints; options given here replace the usual ones."""

    usual = {
        "model_name_or_path": tiny_vit, "train_dir": images, "output_dir": tmp_path / "run",
        "method": "linear e2vpt", "max_steps": 2, "per_device_train_batch_size": 4, "train_val_split": 0.34,
    }  # fmt: skip
    return script_runner(script, usual, monkeypatch, capsys)


def methods(folder: Path) -> list[str]:
    return [row["method"] for row in json.loads((folder / "results.json").read_text())["methods"]]


class StopAt(TrainerCallback):
    """Presses Ctrl-C in a step of an E2VPT run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if Path(args.output_dir).name == "e2vpt" and state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def stop(monkeypatch):
    """A function that lets E2VPT be stopped at a step, or not any more."""
    usual = script.show_progress

    def at(step: int | None) -> None:
        def show(trainer, label):
            usual(trainer, label)
            if step is not None:
                trainer.add_callback(StopAt(step))

        monkeypatch.setattr(script, "show_progress", show)

    return at


# ------------------------------------------------------------------------------------------------------- what it says
def test_it_says_what_it_does_and_where_it_saved(run, tmp_path):
    text = run()
    assert "Images: 8 to train on; 4 for validation, of which accuracies are reported." in text
    assert "Classes: 2 (bright, dark)." in text
    for number, method in ((1, "linear"), (2, "e2vpt")):
        assert f"{number} of 2, {method}: accuracy " in text and f"saved in {tmp_path / 'run' / method}" in text
    assert f"The table is in {tmp_path / 'run' / 'results.json'}" in text


def test_a_bar_for_each_method_is_labelled(run, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    bars = []
    monkeypatch.setattr("progress.tqdm", lambda **settings: bars.append(_Bar(settings["desc"])) or bars[-1])
    run()
    assert [bar.shown for bar in bars] == [
        [f"{label}, starting the head", label, 2, 1, 2, "closed"] for label in ("1 of 2, linear", "2 of 2, e2vpt")
    ]


class _Bar:
    """A bar that notes what it would show."""

    n = 0
    disable = False

    def __init__(self, label):
        self.shown = [label]

    def set_description(self, label, refresh):
        self.shown.append(label)

    def reset(self, total):
        self.shown.append(total)

    def update(self, steps):
        self.n += steps
        self.shown += [self.n] if self.n else []

    def set_postfix(self, numbers):
        assert set(numbers) <= {"loss", "validation accuracy"}

    def close(self):
        self.shown.append("closed")


def test_new_weights_in_the_backbone_are_said(tmp_path, tiny_vit):
    from safetensors.torch import save_file

    place = shutil.copytree(tiny_vit, tmp_path / "vit")
    weights = load_file(place / "model.safetensors")
    lost = next(name for name in weights if "layernorm_before" in name or "norm1" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, place / "model.safetensors")
    with pytest.warns(UserWarning, match="1 weights of the backbone, such as .*, are not in .* and start at random"):
        script.load_base_model(str(place), ["a", "b"])


@pytest.mark.processes
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_has_own_options_first_and_examples_without_waiting_for_torch(flag):
    def once() -> tuple[float, str]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "finetune.py"), flag], capture_output=True, text=True, env=os.environ
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and not done.stderr
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout

    seconds, text = min(once() for _ in range(2))
    assert seconds < 2
    assert text.index("--train_dir") < text.index("--num_train_epochs") < text.index("examples:")
    assert "--adam_beta1" not in text and "--help_all" in text


def test_all_options_of_transformers_are_listed_on_request(run):
    text = run("--help_all", method="linear")
    assert run.code == 0 and "--adam_beta1" in text and "--skip_bad_images" in text


# ------------------------------------------------------------------------------------------------------------- splits
def test_accuracies_are_of_the_test_images_where_there_are_any(run, images, tmp_path):
    further = draw_images(tmp_path / "further", 3, seed=1)
    text = run(method="linear", test_dir=further)
    assert "6 to test on, of which accuracies are reported" in text and "\ntest: 6 images" in text
    assert json.loads((tmp_path / "run" / "results.json").read_text())["split"] == "test"


def test_folders_of_splits_are_splits(run, images, tmp_path):
    for split, seed in (("train", 0), ("val", 1), ("test", 2)):
        draw_images(tmp_path / "all" / split, 4, seed)
    text = run(method="linear", train_dir=tmp_path / "all")
    assert "Images: 8 to train on; 8 for validation; 8 to test on, of which accuracies are reported." in text


def test_a_pruning_that_was_chosen_on_the_images_of_its_accuracy_is_said(run, images, tmp_path):
    said = "The pruning is chosen on the same images that its accuracy is reported of"
    assert said in run(method="e2vpt-pruned")
    row = json.loads((tmp_path / "run" / "results.json").read_text())["methods"][0]
    assert row["chosen_on_these_images"]
    further = draw_images(tmp_path / "further", 3, seed=1)
    assert said not in run(method="e2vpt-pruned", test_dir=further)
    assert not json.loads((tmp_path / "run" / "results.json").read_text())["methods"][0]["chosen_on_these_images"]


# --------------------------------------------------------------------------------------------------------- bad images
def test_odd_images_are_trained_on_and_bad_ones_are_named_first(run, images, tmp_path):
    noise = np.random.default_rng(0)
    Image.fromarray(noise.integers(0, 65535, (40, 40), dtype=np.uint16)).save(images / "dark" / "grey16.png")
    Image.new("CMYK", (40, 40), (0, 9, 9, 0)).save(images / "bright" / "print.JPG")
    Image.new("LA", (40, 40), (0, 0)).save(images / "bright" / "alpha.png")
    frames = [Image.new("P", (40, 40), colour) for colour in (1, 2)]
    frames[0].save(images / "dark" / "moving.GIF", save_all=True, append_images=frames[1:])
    (images / "dark" / ".DS_Store").write_bytes(b"\0")
    (images / "dark" / "zero.jpg").write_bytes(b"")
    text = run(method="linear")
    assert run.code == 1 and "1 of 17 images cannot be read" in text and "dark/zero.jpg is empty (0 bytes)" in text
    assert not (tmp_path / "run" / "linear").exists()
    text = run("--skip_bad_images", method="linear")
    assert run.code == 0 and "1 of 17 images cannot be read and are left out" in text and "saved in" in text


# ----------------------------------------------------------------------------------------------- stopped, and going on
def test_a_stopped_comparison_keeps_what_is_finished_and_goes_on(run, stop, tmp_path):
    stop(1)
    text = run()
    assert run.code == 130
    assert "Stopped in e2vpt. To go on, run the same command again: linear kept, e2vpt starts again" in text
    assert "--save_strategy epoch" in text
    assert methods(tmp_path / "run") == ["linear"]
    before = (tmp_path / "run" / "linear" / "model.safetensors").stat().st_mtime_ns
    stop(None)
    text = run()
    assert run.code == 0 and "Finished already, with the same settings and images: linear" in text
    assert methods(tmp_path / "run") == ["linear", "e2vpt"]
    assert (tmp_path / "run" / "linear" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("flags", [[], ["--resume_from_checkpoint"]], ids=["same command", "resume"])
def test_a_method_goes_on_from_its_last_checkpoint_to_the_same_weights(flags, run, stop, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "method": "e2vpt"}
    run(**saving, output_dir=tmp_path / "straight")
    stop(3)
    text = run(**saving)
    last = tmp_path / "run" / "e2vpt" / "checkpoint-2"
    assert f"e2vpt goes on from {last}." in text and run.code == 130
    (tmp_path / "run" / "e2vpt" / "checkpoint-3").mkdir()  # one that a kill has left incomplete
    stop(None)
    assert f"e2vpt goes on from {last}." in run(*flags, **saving)
    straight, resumed = (
        load_file(tmp_path / place / "e2vpt" / "adapter_model.safetensors") for place in ("straight", "run")
    )
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


def test_everything_is_trained_anew_on_request(run, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "method": "linear"}
    run(**saving)
    before = (tmp_path / "run" / "linear" / "model.safetensors").stat().st_mtime_ns
    text = run("--overwrite", **saving)
    assert "Finished already" not in text and "goes on from" not in text
    assert (tmp_path / "run" / "linear" / "model.safetensors").stat().st_mtime_ns != before


def test_a_stop_before_training_leaves_no_traceback(run, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "load_task", stop)
    assert "Stopped before anything was trained." in run() and run.code == 130


def test_there_must_be_something_to_resume_from(run):
    text = run("--resume_from_checkpoint")
    assert run.code == 1 and "--resume_from_checkpoint found nothing in" in text


def test_checkpoints_of_other_settings_are_not_taken(run, stop, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "method": "e2vpt"}
    stop(2)
    run(**saving)
    stop(None)
    assert "goes on from" not in run(**saving, learning_rate=0.01)


def test_other_settings_are_trained_anew_with_a_word(run, tmp_path):
    run(method="linear")
    text = run(method="linear", num_visual_prompts=3)
    assert "were made otherwise, so methods are trained anew: num_visual_prompts was 10 and is 3." in text


def test_options_without_effect_on_results_keep_them(run):
    run(method="linear")
    text = run("--disable_tqdm=true", method="linear e2vpt", logging_steps=1, save_strategy="epoch")
    assert "Finished already, with the same settings and images: linear" in text


def test_images_may_move_but_not_change(run, images, tmp_path):
    run(method="linear")
    moved = images.rename(tmp_path / "moved")
    assert "Finished already" in run(method="linear", train_dir=moved)
    draw_images(tmp_path / "other", 6, seed=9)
    assert "trained anew: train_dir was" in run(method="linear", train_dir=tmp_path / "other")
    Image.new("RGB", (40, 40)).save(tmp_path / "other" / "dark" / "0.png")
    text = run(method="linear", train_dir=tmp_path / "other")
    assert "trained anew: the images, their classes or their splits have changed" in text


@pytest.mark.parametrize("content", ['{"split": "validation", "methods": [{"meth', "[]", '{"methods": 3}'])
def test_a_damaged_table_is_made_anew_with_a_word(content, run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(content)
    assert "is damaged: all methods are trained anew" in run(method="linear")
    assert methods(tmp_path / "run") == ["linear"]


def test_a_row_whose_model_is_gone_does_not_count(run, tmp_path):
    run(method="linear")
    shutil.rmtree(tmp_path / "run" / "linear")
    assert "Finished already" not in run(method="linear")
    assert (tmp_path / "run" / "linear" / "model.safetensors").is_file()


def test_a_model_is_saved_before_it_is_evaluated(run, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(script.ImageTrainer, "evaluate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(method="e2vpt")
    assert (tmp_path / "run" / "e2vpt" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "e2vpt" / "preprocessor_config.json").is_file()


def test_the_card_beside_a_method_has_its_results(run, tmp_path):
    run()
    rows = {row["method"]: row for row in json.loads((tmp_path / "run" / "results.json").read_text())["methods"]}
    for method, row in rows.items():
        card = (tmp_path / "run" / method / "README.md").read_text()
        results = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"][0]["metrics"]
        assert {result["type"]: result["value"] for result in results} == {
            name: pytest.approx(row[name], abs=1e-6) for name in ("accuracy", "balanced_accuracy")
        }


# ------------------------------------------------------------------------------------------------------------- figures
@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    def figures(*arguments: object) -> str:
        command = ["figures.py", tmp_path / "run", "--dpi", 30, *arguments]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in command])
        capsys.readouterr()
        try:
            figures_script.main()
        except SystemExit as stop:
            return str(stop.code)
        return capsys.readouterr().out

    return figures


def test_figures_of_a_run_are_of_its_own_images_wherever_it_is_called(run, draw, images, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run(train_dir="images", method="e2vpt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "embeddings.png" in draw()
    moved = images.rename(tmp_path / "moved")
    assert f"--train_dir {tmp_path / 'images'} is not a folder" in draw()
    assert "embeddings.png" in draw("--train_dir", moved)


def test_figures_refuse_images_that_are_not_those_of_the_run(run, draw, images, tmp_path):
    pytest.importorskip("matplotlib")
    run(method="e2vpt")
    other = draw_images(tmp_path / "other", 5, seed=1)
    text = draw("--train_dir", other)
    assert "These are not the images of the run" in text and "the run had 8 train, 4 validation" in text
    assert not (tmp_path / "run" / "figures").exists()


def test_figures_of_no_run_say_so(draw, tmp_path):
    assert "There is no run in" in draw()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{")
    assert "results.json is damaged" in draw()
    (tmp_path / "run" / "results.json").write_text('{"methods": []}')
    assert "No method of the run in" in draw()


# ------------------------------------------------------------------------------------------------------------ mistakes
def bad(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(folder / file)
    folder.mkdir(exist_ok=True)
    return folder


MISTAKES = {
    "no such folder": ({"train_dir": "nowhere"}, "--train_dir nowhere is not a folder."),
    "empty folder": ({"train_dir": []}, "holds no images: put them into a folder per class"),
    "no class folders": ({"train_dir": ["1.png"]}, "1 image lies in"),
    "one class": ({"train_dir": ["a/1.png", "a/2.png"]}, "has images of one class alone, a: a classifier needs"),
    "one image": ({"train_dir": ["a/1.png", "a/2.png", "b/1.png"]}, "The class b has one image alone"),
    "nested": ({"train_dir": ["a/x/1.png", "b/1.png"]}, "in a folder inside a class folder, such as a/x/1.png"),
    "no train": ({"train_dir": ["val/a/1.png", "val/b/1.png"]}, "has the splits val, but none called train: add one"),
    "extra class": ({"validation_dir": ["dark/1.png", "grey/1.png"]}, "classes without training images: grey"),
    "misspelt class": ({"test_dir": ["Dark/1.png", "bright/1.png"]}, "Dark (did you mean dark?)"),
    "share": ({"train_val_split": 15}, "The share of training images for validation lies between 0 and 1, got 15.0."),
    "limit": ({"max_train_samples": 0}, "--max_train_samples is at least 1, got 0."),
    "two sources": ({"dataset_name": "beans"}, "either --dataset_name or --train_dir, not both"),
    "test alone": ({"train_dir": None, "test_dir": ["a/1.png"]}, "--test_dir needs --train_dir"),
    "image size": ({"image_size": 64}, "cannot take images of 64 x 64 pixels (Input image size (64*64) doesn't match"),
    "no image size": ({"image_size": -1}, "--image_size is a number of pixels, got -1."),
    "no such backbone": ({"model_name_or_path": "nobody/no-such-vit"}, "There is no backbone nobody/no-such-vit"),
    "layers": ({"layers_to_transform": 99, "method": "linear e2vpt"}, "e2vpt does not work on"),
    "misspelt option": ({"trian_dir": "images"}, "There is no option --trian_dir: did you mean --train_dir?"),
    "unknown option": ({"zzz": 1}, "There is no option --zzz: --help lists those that there are."),
    "checkpoint": ({"resume_from_checkpoint": "somewhere"}, "need a single --method"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_before_anything_is_trained(mistake, run, tmp_path, monkeypatch):
    options, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    options = {name: bad(tmp_path / name, *v) if isinstance(v, list) else v for name, v in options.items()}
    monkeypatch.setattr(script.ImageTrainer, "train", lambda trainer, **settings: pytest.fail("trained"))
    text = run(**options)
    assert run.code == 1
    assert message in text and text.startswith("Error: ") and len(text.strip().splitlines()) == 1


def test_a_backbone_that_is_no_image_classifier_is_refused(run, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    text = run(model_name_or_path=tmp_path / "bert")
    assert "is a bert model, of which transformers has no image classifier" in text


def test_a_method_that_does_not_fit_the_backbone_is_named_with_those_that_do(run, tmp_path):
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=32, patch_size=2, window_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    SwinForImageClassification(config).save_pretrained(tmp_path / "swin")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "swin" / "preprocessor_config.json").write_text(json.dumps(processor))
    text = run(model_name_or_path=tmp_path / "swin", method="linear vpt-shallow e2vpt")
    assert "vpt-shallow does not work on" in text and text.strip().endswith("These work: --method linear e2vpt.")
