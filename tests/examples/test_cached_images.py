# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What `finetune.py` computes once gives what computing it in every epoch gives."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import cached_images
import finetune
import pytest
import torch
from cached_images import BothWays, HiddenStates, ReadOnce, read_once
from torch import nn

from tests.support.models import build
from tests.support.training import Images, adapted, arguments, history_of, trainer_for


class Counted(Images):
    """Images that count how often each is read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reads = [0] * len(self)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads[index] += 1
        item = super().__getitem__(index)
        return {**item, "labels": int(item["labels"])}


def splits() -> dict[str, Counted]:
    return {
        "train": Counted(21, dtype=torch.float64),
        "validation": Counted(9, seed=1, dtype=torch.float64),
        "test": Counted(5, seed=2, dtype=torch.float64),
    }


def hidden_states(folder: Path) -> HiddenStates:
    return HiddenStates(arguments(folder, remove_unused_columns=False), finetune.collate)


def test_images_that_fit_into_memory_are_read_once():
    images = splits()
    once = read_once(images)
    for _ in range(3):
        assert len([once["train"][index] for index in range(21)]) == 21
    assert images["train"].reads[0] <= 2 and set(images["train"].reads[1:]) == {1}


def test_more_images_are_read_when_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(cached_images, "MOST_IN_MEMORY", 1000)
    images = splits()
    assert read_once(images) == images


@pytest.mark.training
@pytest.mark.parametrize("method", ["e2vpt", "linear"])
def test_a_training_that_mirrors_has_the_losses_of_one_on_images(tmp_path, method):
    found = []
    for cached in (False, True):
        images: Any = splits()
        model: nn.Module
        if method == "e2vpt":
            model = adapted("vit", layers_to_transform=[1], dtype=torch.float64)
        else:
            model = build("vit", dtype=torch.float64)[0].requires_grad_(False)
            model.get_submodule("classifier").requires_grad_(True)
        if cached:
            store = hidden_states(tmp_path)
            images = store.of(model, read_once(images), ["train", "validation"], "layers")
            assert isinstance(images["train"], BothWays) and isinstance(images["test"], ReadOnce)
        trainer = trainer_for(
            tmp_path / str(cached),
            None,
            model,
            trainer_class=finetune.ImageTrainer,
            train_dataset=images["train"],
            eval_dataset=images["validation"],
            remove_unused_columns=False,
            eval_strategy="epoch",
            num_train_epochs=2,
        )
        trainer.data_collator = finetune.collate
        trainer.train()
        history = history_of(trainer)
        found.append([[entry[key] for key in ("loss", "eval_loss") if key in entry] for entry in history])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


def test_methods_with_the_same_frozen_layers_share_hidden_states(tmp_path):
    store, images = hidden_states(tmp_path), splits()
    written = []
    for prompts in (2, 0):
        model = adapted("vit", layers_to_transform=[1], num_kv_prompts=prompts, dtype=torch.float64)
        store.of(model, images, ["train", "test"], "layers")
        written.append({path: path.stat().st_mtime_ns for path in store.folder.rglob("*.bin")})
    assert len(written[0]) == 3 and written[0] == written[1]


def test_models_that_train_their_first_layer_keep_their_images(tmp_path):
    images = splits()
    assert hidden_states(tmp_path).of(adapted("vit", dtype=torch.float64), images, ["train"], "layers") is images


def test_hidden_states_leave_room_on_the_disk_and_are_deleted_in_the_end(tmp_path, monkeypatch):
    store, images = hidden_states(tmp_path), splits()
    model = adapted("vit", layers_to_transform=[1], dtype=torch.float64)
    assert store.of(model, images, ["train"], "layers") is not images
    assert store.folder.is_dir()
    store.clear()
    assert not store.folder.exists()
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(cached_images.shutil, "disk_usage", lambda folder: usage(1000))
    assert (
        store.of(adapted("vit", layers_to_transform=[1], dtype=torch.float64), images, ["train"], "layers") is images
    )
