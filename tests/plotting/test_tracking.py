# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Figures stand where a Trainer reports its numbers: in TensorBoard's files and in Weights & Biases."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate
from transformers.integrations import WandbCallback
from transformers.utils import logging

from peft_e2vpt import PruneRewindCallback
from peft_e2vpt.plotting import FiguresCallback
from tests.support.training import HALF, Images, Watch, adapted, trainer_for


pytest.importorskip("matplotlib")
BATCH = default_collate([Images()[index] for index in range(2)])


def run(folder: Path, figures: FiguresCallback | None = None, **settings: Any) -> Watch:
    watch = Watch()
    trainer = trainer_for(
        folder,
        PruneRewindCallback(**HALF),
        watch=watch,
        callbacks=() if figures is None else (figures,),
        num_train_epochs=2,
        eval_strategy="epoch",
        **settings,
    )
    trainer.train()
    return watch


# -------------------------------------------------------------------------------------------------------- TensorBoard
def images_in(folder: Path) -> dict[str, list[tuple[int, Image.Image]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    files = accumulator.EventAccumulator(str(folder), {accumulator.IMAGES: 0}).Reload()
    return {
        name: [(event.step, Image.open(BytesIO(event.encoded_image_string))) for event in files.Images(name)]
        for name in files.Tags()["images"]
    }


def test_tensorboard_has_the_figures_of_pruning_and_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run(tmp_path, FiguresCallback(BATCH), report_to="tensorboard")
    found = images_in(tmp_path / "events")
    assert [step for step, _ in found["figures/pruning"]] == [6]
    assert [step for step, _ in found["figures/prompt_attention"]] == [0, 6, 12]  # the start, and two evaluations
    assert [step for step, _ in found["figures/attention_maps"]] == [0, 6, 12]
    for name, ((_, image), *_) in found.items():
        assert image.width > 300 and len(set(image.convert("L").tobytes())) > 20, name  # no empty square


# --------------------------------------------------------------------------------------------------- Weights & Biases
@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module of that name, with what transformers and this package call of it."""
    logged: list[dict[str, Any]] = []
    module = SimpleNamespace(run=None, logged=logged, log=logged.append, Image=lambda pixels: ("image", pixels.shape))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


class Wandb(WandbCallback):
    """transformers' callback, on a module that is a stub."""

    def __init__(self, module: SimpleNamespace) -> None:
        self._wandb = module
        self._initialized = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._wandb.run = SimpleNamespace(summary={})
        self._initialized = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._wandb.run = None


def test_weights_and_biases_has_the_figure_of_a_pruning_at_its_step(tmp_path: Path, wandb: SimpleNamespace) -> None:
    trainer = trainer_for(tmp_path, PruneRewindCallback(**HALF), num_train_epochs=2)
    trainer.add_callback(Wandb(wandb))
    trainer.train()
    ((kind, shape), step) = next(
        (entry["figures/pruning"], entry["train/global_step"]) for entry in wandb.logged if "figures/pruning" in entry
    )
    assert (kind, shape[2], step) == ("image", 3, 6)
    assert any("train/pruning_prompts_kept" in entry for entry in wandb.logged)  # the numbers, as before


# ------------------------------------------------------------------------------------------------------------- always
def test_drawing_leaves_no_trace_in_a_run(tmp_path: Path) -> None:
    plain, drawn = run(tmp_path / "plain"), run(tmp_path / "drawn", FiguresCallback(BATCH))
    for step, values in plain.values.items():
        assert all(torch.equal(value, drawn.values[step][name]) for name, value in values.items())


def test_a_model_whose_attention_cannot_be_drawn_is_refused_before_the_first_step(tmp_path: Path) -> None:
    watch = Watch()
    trainer = trainer_for(tmp_path, None, adapted("swin"), watch=watch, callbacks=(FiguresCallback(BATCH),))
    with pytest.raises(ValueError, match="no map over the whole image"):
        trainer.train()
    assert not watch.values
    trainer = trainer_for(
        tmp_path, None, adapted("swin"), callbacks=(FiguresCallback(BATCH, maps=False),), max_steps=1
    )
    trainer.train()


def test_without_matplotlib_a_run_reports_the_numbers_of_its_pruning_and_says_why_no_figure(
    tmp_path: Path, wandb: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer = trainer_for(tmp_path, PruneRewindCallback(**HALF), num_train_epochs=2)
    trainer.add_callback(Wandb(wandb))
    logging.enable_propagation()
    trainer.train()
    logging.disable_propagation()
    assert not any("figures/pruning" in entry for entry in wandb.logged)
    assert any("train/pruning_prompts_kept" in entry for entry in wandb.logged)
    assert "only its numbers. Figures need matplotlib: pip install 'peft_e2vpt[plot]'" in caplog.text
