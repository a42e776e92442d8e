# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`finetune.py` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.own_images import draw_images, save_tiny_vit
from tests.support.paths import EXAMPLES


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"), 6)


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory) -> Path:
    return save_tiny_vit(tmp_path_factory.mktemp("vit"))


def finetune(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / "finetune.py"), *map(str, arguments)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


METHODS = ["linear", "e2vpt", "e2vpt-pruned", "vpt-deep", "vpt-shallow", "lora", "full"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images, tiny_vit) -> tuple[Path, str]:
    """The folder and the printed text of a run with all methods, two steps each."""
    output = tmp_path_factory.mktemp("runs")
    run = finetune(
        "--model_name_or_path", tiny_vit, "--train_dir", images, "--output_dir", output, "--method", "all",
        "--max_steps", 2, "--per_device_train_batch_size", 4, "--train_val_split", 0.34, "--use_cpu",
        "--save_strategy", "steps", "--save_steps", 1,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    noise = ("LOAD REPORT", "{'loss'", "{'eval", "train_runtime", "FutureWarning", "Writing model shards", "Traceback")
    assert not [word for word in noise if word in run.stdout + run.stderr]
    return output, run.stdout


@pytest.mark.processes
def test_verbose_brings_back_what_the_libraries_log(images, tiny_vit, tmp_path):
    run = finetune(
        "--model_name_or_path", tiny_vit, "--train_dir", images, "--output_dir", tmp_path, "--method", "linear",
        "--max_steps", 1, "--use_cpu", "--verbose",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "LOAD REPORT" in run.stderr and "train_runtime" in run.stdout + run.stderr


@pytest.mark.processes
def test_finetune_prints_and_saves_the_table(finished):
    output, printed = finished
    results = json.loads((output / "results.json").read_text())
    rows = {row["method"]: row for row in results["methods"]}

    assert list(rows) == METHODS and results["split"] == "validation"
    assert all(f"| {method} |" in printed for method in METHODS)
    head, width, layers = 2 * 32 + 2, 32, 2
    assert rows["linear"]["trained"] == head
    assert rows["vpt-shallow"]["trained"] == head + 10 * width
    assert rows["vpt-deep"]["trained"] == head + 10 * width * layers
    assert rows["e2vpt"]["trained"] == head + (10 + 5) * width * layers
    assert rows["e2vpt-pruned"]["trained"] <= rows["e2vpt"]["trained"]
    assert rows["lora"]["trained"] == head + 2 * 2 * 8 * width * layers
    assert rows["full"]["percent"] == 100
    for method in ("e2vpt", "e2vpt-pruned", "vpt-deep", "vpt-shallow"):
        card = (output / method / "README.md").read_text()
        assert f"**{rows[method]['trained']:,} parameters, {rows[method]['percent']:.3f} % of the model**" in card
    assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 for row in rows.values())


@pytest.mark.processes
def test_finetuned_adapter_loads_into_a_new_base(finished, tiny_vit):
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    import peft_e2vpt  # noqa: F401

    output, _ = finished
    base = AutoModelForImageClassification.from_pretrained(tiny_vit, num_labels=2)
    pixel_values = torch.ones(1, 3, 32, 32)
    before = base.eval()(pixel_values).logits
    model = PeftModel.from_pretrained(base, str(output / "e2vpt")).eval()
    assert not torch.equal(model(pixel_values).logits, before)
    assert (output / "e2vpt" / "preprocessor_config.json").is_file()


@pytest.mark.processes
def test_finetune_resumes_to_the_same_weights(finished, images, tiny_vit, tmp_path):
    from safetensors.torch import load_file

    output, _ = finished
    run = finetune(
        "--model_name_or_path", tiny_vit, "--train_dir", images, "--output_dir", tmp_path, "--method", "e2vpt",
        "--max_steps", 2, "--per_device_train_batch_size", 4, "--train_val_split", 0.34, "--use_cpu",
        "--resume_from_checkpoint", output / "e2vpt" / "checkpoint-1",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    straight = load_file(output / "e2vpt" / "adapter_model.safetensors")
    resumed = load_file(tmp_path / "e2vpt" / "adapter_model.safetensors")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


@pytest.mark.processes
def test_every_figure_of_a_run_is_drawn_with_one_command(finished, images, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import figures as script

    output, _ = finished
    arguments = [output, "--train_dir", images, "--train_val_split", 0.34, "--figures_dir", tmp_path, "--dpi", 30]
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, arguments)])
    script.main()
    prompted = ["e2vpt", "e2vpt-pruned", "vpt-deep", "vpt-shallow"]
    expected = {"methods", "embeddings", "e2vpt-pruned-pruning", *(f"{method}-run" for method in METHODS)}
    expected |= {f"{method}-{name}" for method in prompted for name in ("prompt_attention", "attention_maps")}
    assert {path.stem for path in tmp_path.iterdir()} == expected


@pytest.mark.processes
def test_attention_maps_can_be_drawn_of_files(finished, images):
    pytest.importorskip("matplotlib")
    import figures as script

    output, _ = finished
    files = sorted((images / "dark").iterdir())[:2]
    args = script.FigureArguments(maps_of=[str(file) for file in files], maps_size=64)
    batch = script.load_images_of_maps(args, None, output / "e2vpt")
    assert batch["pixel_values"].shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_dir", "nowhere"], "--train_dir nowhere is not a folder"),
        (["--train_dir", "PICTURES", "--dataset_name", "beans"], "either --dataset_name or --train_dir, not both"),
        (["--validation_dir", "PICTURES"], "--validation_dir needs --train_dir"),
        (["--method", "linear", "e2vpt", "--push_to_hub"], "need a single --method"),
        (["--method", "adapterfusion"], "invalid choice: 'adapterfusion'"),
        (["--train_dir", "PICTURES/dark", "--model_name_or_path", "VIT"], "in no class folder, such as 0.png"),
    ],
)
def test_wrong_arguments_get_one_clear_sentence(arguments, message, images, tiny_vit, monkeypatch, capsys):
    import finetune as script

    places = {"PICTURES": str(images), "VIT": str(tiny_vit)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
    with pytest.raises((ValueError, SystemExit)) as error:
        script.main()
    assert message in str(error.value) + capsys.readouterr().err
