# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The paper's experiments: what the protocol promises."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fgvc
import paper_protocol as protocol
import pytest
import stand_ins
import torch
import vtab1k
import yaml

from tests.support.paper_programs import BACKBONES, METHODS, trainings
from tests.support.paths import EXAMPLES


VTAB1K, FGVC = (yaml.safe_load((EXAMPLES / "presets" / f"{name}.yaml").read_text()) for name in ("vtab1k", "fgvc"))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """A tiny ViT, and one task of VTAB-1k in the Hub's archive."""
    folder = tmp_path_factory.mktemp("stand_in")
    stand_ins.make_backbones(folder / "backbones", {"vit": None})
    vtab1k.make_data(folder / "data", {"cifar": None})
    return folder


@pytest.fixture
def experiment(stand_in: Path, tmp_path: Path) -> Any:
    """Makes an experiment with ViT, E2VPT and `cifar`, that reads the finished trainings again every time."""

    def make(**training: Any) -> protocol.Experiment:
        presets = yaml.safe_load((EXAMPLES / "presets" / "vtab1k.yaml").read_text())
        presets["training"] |= {"image_size": 32, "epochs": 1, "seeds": [3, 4], **training}
        presets["methods"]["e2vpt"] |= {"learning_rates": [2.5, 1], "weight_decays": [0.01, 0.0]}
        args = protocol.ProtocolArguments(data_root=str(stand_in / "data"))
        training_args = protocol.PaperTrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True)
        splits = vtab1k.read_splits(presets["data"], {"name": "cifar"}, args)
        results = protocol.Results(tmp_path / "results.jsonl", writes=True)
        names, model = ("vit", "e2vpt", "cifar"), str(stand_in / "backbones" / "vit")
        return protocol.Experiment(vtab1k.VTAB1K, presets, names, model, splits, args, training_args, results)

    return make


def watch(monkeypatch, accuracies: dict[tuple[float, float], float] | None = None) -> list[tuple[Any, ...]]:
    """Records the trainings that are run, in place of running them."""
    ran: list[tuple[Any, ...]] = []

    def instead(self, phase, learning_rate, weight_decay, seed, pruning):
        ran.append((phase, learning_rate, weight_decay, seed, pruning and pruning["phase"]))
        return {"accuracy": (accuracies or {}).get((learning_rate, weight_decay), 0.5), "percent": 1.0}

    monkeypatch.setattr(protocol.Experiment, "train_and_evaluate", instead)
    return ran


def test_the_best_point_is_pruned_once_and_trained_with_every_seed(experiment, monkeypatch):
    ran = watch(monkeypatch, {(2.5, 0.0): 0.75})
    experiment().run()
    grid = [("grid", rate, decay, 3, None) for rate in (2.5, 1) for decay in (0.01, 0.0)]
    final = [("final", 2.5, 0.0, seed, "prune") for seed in (3, 4)]
    assert ran == [*grid, ("prune", 2.5, 0.0, 3, None), *final]


def test_of_equally_good_points_the_smaller_rate_is_chosen(experiment, monkeypatch):
    ran = watch(monkeypatch, {(2.5, 0.0): 0.75, (1, 0.01): 0.75})
    experiment().run()
    assert {(rate, decay) for phase, rate, decay, *_ in ran if phase != "grid"} == {(1, 0.01)}


def test_finished_trainings_do_not_run_again(experiment, monkeypatch, tmp_path):
    ran = watch(monkeypatch)
    experiment().run()
    assert len(ran) == 7
    experiment().run()
    assert len(ran) == 7

    file = tmp_path / "results.jsonl"
    file.write_bytes(file.read_bytes()[:-5])  # killed while it wrote
    with pytest.warns(UserWarning, match=r"Line 7 of .*results\.jsonl is incomplete"):
        again = experiment()
    again.run()
    assert len(ran) == 8 and ran[-1] == ran[-2]
    with pytest.warns(UserWarning, match="Line 7"):
        assert len(trainings(tmp_path)) == 7


def test_results_of_other_settings_are_refused(experiment, monkeypatch):
    watch(monkeypatch)
    experiment().run()
    with pytest.raises(ValueError, match=r"'epochs': 1.*'epochs': 2.*choose another --output_dir"):
        experiment(epochs=2).run()


def test_after_pruning_training_starts_from_the_same_values_on_all_images(experiment, monkeypatch):
    """Rewinding: the final training is the pruning training's start, without what was pruned."""
    from peft_e2vpt import trained_tensors

    starts, images = [], []
    train = protocol.Trainer.train

    def watched(trainer):
        starts.append(trained_tensors(trainer.model))
        images.append((len(trainer.train_dataset), len(trainer.eval_dataset)))
        return train(trainer)

    monkeypatch.setattr(protocol.Trainer, "train", watched)
    run = experiment()
    prune = run.training_of("prune", 1, 0.01, 3)
    prune["token_gates"][0][0], prune["segment_gates"][0][0] = 0, 8 * [0]
    run.training_of("final", 1, 0.01, 3, prune)

    assert images == [(12, 6), (18, 8)]
    assert starts[0].keys() == starts[1].keys()
    for name, start in starts[0].items():
        gates = torch.ones_like(start)
        if "visual_prompts" in name:
            layer = 0 if "e2vpt.0" in name or "layers.0" in name else 1
            gates = torch.tensor(prune["segment_gates"][layer], dtype=start.dtype).repeat_interleave(4, dim=1)
        assert torch.equal(starts[1][name], start * gates), name
    assert any((tensor == 0).any() for name, tensor in starts[1].items() if "visual_prompts" in name)


def test_prompts_train_with_momentum_and_a_rate_that_grows_with_the_batch(experiment):
    run = experiment()
    run.grid["optimizer"] = "sgd"
    args = run.trainer_args(2.5, 0.01, seed=3)
    optimizer = protocol.Trainer(torch.nn.Linear(2, 2), args).create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    decays = sorted(group["weight_decay"] for group in optimizer.param_groups)
    assert decays == [0.0, 0.01]  # of the bias, and of the weight
    assert all(group["momentum"] == 0.9 and group["lr"] == 2.5 * 64 / 256 for group in optimizer.param_groups)
    assert args.get_warmup_steps(1000) == 100 and args.lr_scheduler_type == "cosine" and args.max_grad_norm == 0

    run.grid["optimizer"] = "adamw"
    optimizer = protocol.Trainer(torch.nn.Linear(2, 2), run.trainer_args(0.001, 0.01, seed=3)).create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)


def test_presets_are_those_of_the_paper():
    groups = protocol.groups_of(VTAB1K)
    assert {name: len(tasks) for name, tasks in groups.items()} == {"Natural": 7, "Specialized": 4, "Structured": 8}
    assert list(FGVC["tasks"]) == ["cub", "nabirds", "flowers", "dogs", "cars"]
    for presets in (VTAB1K, FGVC):
        assert list(presets["backbones"]) == BACKBONES and list(presets["methods"]) == METHODS
        assert all(len(task[name]) == 2 for task in presets["tasks"].values() for name in BACKBONES)
        for name, method in presets["methods"].items():
            assert len(method["weight_decays"]) == 4 and len(method["learning_rates"]) == (4 if name == "full" else 10)


def test_means_are_of_all_tasks_or_left_open():
    def record(task: str, accuracy: float, seed: int) -> dict[str, Any]:
        names = {"backbone": "vit", "method": "e2vpt", "task": task}
        return {**names, "phase": "final", "seed": seed, "accuracy": accuracy, "percent": 0.5}

    right = {"Natural": 0.9, "Specialized": 0.6, "Structured": 0.3}
    records = [
        record(task, right[preset["group"]] + shift, seed)
        for task, preset in VTAB1K["tasks"].items()
        for seed, shift in ((1, -0.1), (2, 0.1))
    ]
    of_tasks = (7 * 90 + 4 * 60 + 8 * 30) / 19
    table = protocol.format_tables(records, VTAB1K)
    assert f"| vit | e2vpt | here | 90.00 | 60.00 | 30.00 | 60.00 | {of_tasks:.2f} | 0.500 |" in table
    assert "| vit | e2vpt | eurosat | 2 | 60.00 (14.14) | 0.500 |" in table

    without_cifar = [record for record in records if record["task"] != "cifar"]
    assert "| vit | e2vpt | here | - | 60.00 | 30.00 | - | - | 0.500 |" in protocol.format_tables(
        without_cifar, VTAB1K
    )


# -------------------------------------------------------------------------------------------------------- the images


def test_a_tenth_is_cut_off_for_validation_the_same_every_time():
    entries = {f"{index}.jpg": index % 7 for index in range(200)}
    train, validation = fgvc.cut(entries, 0.1, seed=0)
    assert (len(train), len(validation)) == (180, 20)
    assert train | validation == entries and not train.keys() & validation.keys()
    assert fgvc.cut(entries, 0.1, seed=0) == (train, validation) != fgvc.cut(entries, 0.1, seed=1)


def test_crops_show_a_part_of_the_image():
    import numpy as np
    from PIL import Image

    x = np.tile(np.linspace(0, 250, 96), (64, 1)).astype("uint8")
    image = Image.fromarray(np.stack([x] * 3, axis=-1))
    middle = np.asarray(fgvc.centre_crop(image, 32))[..., 0].astype(float)
    assert middle.shape == (32, 32)
    assert abs(middle[0, 0] - 52) < 3 and abs(middle[0, -1] - 198) < 3  # 20 and 76 of 96, half a pixel further in

    crops = [np.asarray(fgvc.random_resized_crop(image, 32))[0, :, 0].astype(float) for _ in range(40)]
    assert all(len(crop) == 32 for crop in crops)
    shares = [abs(crop[-1] - crop[0]) / 250 for crop in crops]
    assert min(shares) < 0.5 and 0.15 < min(shares) and max(shares) <= 1
    assert {crop[0] < crop[-1] for crop in crops} == {True, False}  # some are mirrored


def test_the_head_has_as_many_classes_as_the_data(tmp_path):
    for index in range(3):
        stand_ins.write_image(tmp_path / f"{index}.png", index, index)
    lists = {"train": {"0.png": 7}, "validation": {"1.png": 30}, "test": {"2.png": 9, "0.png": 7}}
    placed = {
        name: {str(tmp_path / path): label for path, label in entries.items()} for name, entries in lists.items()
    }
    splits = protocol.make_splits(placed)
    assert splits.train.features["label"].names == ["7", "9", "30"]
    assert [data["label"] for data in splits] == [[0], [2], [1, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "vtab-1k.zip").unlink(), "neither the folder vtab-1k nor the archive vtab-1k.zip"),
        (lambda folder: (folder / "vtab-1k/cifar/val200.txt").unlink(), r"cifar has no val200\.txt"),
        (lambda folder: (folder / "vtab-1k/cifar/test.txt").write_text("images/a.png\n"), "Line 1 .* `PATH CLASS`"),
        (
            lambda folder: (folder / "vtab-1k/cifar/test.txt").write_text("a.png 1\n"),
            r"begins with .*a\.png: not there",
        ),
    ],
)
def test_data_that_is_not_there_is_named(change, message, tmp_path):
    vtab1k.make_data(tmp_path, {"cifar": None})
    if "folder vtab-1k nor" not in message:
        shutil.unpack_archive(tmp_path / "vtab-1k.zip", tmp_path)
    change(tmp_path)
    args = protocol.ProtocolArguments(data_root=str(tmp_path))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        vtab1k.read_splits(VTAB1K["data"], {"name": "cifar"}, args)


@pytest.mark.parametrize(
    ("kind", "known"), [("backbone", "vit, swin"), ("method", "e2vpt, vpt-deep"), ("task", "cifar")]
)
def test_unknown_names_are_answered_with_the_known(kind, known, tmp_path):
    args = protocol.ProtocolArguments(**{kind: ["nothing"]})
    training_args = protocol.PaperTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=f"No {kind} nothing: choose from {known}"):
        protocol.run(vtab1k.VTAB1K, VTAB1K, args, training_args, tmp_path)
