# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""No run fails after its first step for a reason known before: every phase is tried on one batch, without a trace."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_e2vpt import E2VPTConfig, ImportanceScores, ModelQuality, PruneRewindCallback, prune
from peft_e2vpt.pruning.ranking import current_gates
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from peft_e2vpt.tuner.summary import summarise

from ..support.models import build
from ..support.training import HALF, SETTINGS, Images, Watch, adapted, arguments, state_of, trainer_for


pytestmark = pytest.mark.training


SEARCH: dict[str, Any] = {"token_ratios": [0.5], "segment_ratios": [0.5]}


def failing(outputs: Any, batch: Any) -> Any:
    raise KeyError("masks")


def no_number(prediction: Any) -> dict[str, float]:
    raise ZeroDivisionError("no class at all")


class NoReset(nn.Module):
    """A head with weights that does not know how to draw them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 32))

    def forward(self, states: Tensor) -> Tensor:
        return states @ self.weight.T


def with_own_head() -> PeftModel:
    base, _ = build("vit")
    base.classifier = NoReset()
    return get_peft_model(base, E2VPTConfig(**SETTINGS, modules_to_save=["classifier"]))


def with_two_active() -> PeftModel:
    model = adapted(modules_to_save=[])
    model.add_adapter("other", E2VPTConfig(**SETTINGS, modules_to_save=[]))
    model.base_model.set_adapter(["default", "other"])
    return model


class Unlabelled(Images):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index]}


@pytest.mark.parametrize(
    ("callback", "settings", "message"),
    [
        (
            {"quality": failing},
            {},
            "tried to compare prunings on one batch before training, and got KeyError: 'masks'",
        ),
        ({"quality": lambda outputs, batch: outputs.logits}, {}, "tried to compare prunings .* one number per sample"),
        ({"quality": "mean_iou"}, {}, "compared by eval_mean_iou, but the Trainer's evaluation gives only eval_loss"),
        ({"quality": ModelQuality(lambda model: model.no_such)}, {}, "tried to measure the quality .* AttributeError"),
        (
            {},
            {"compute_metrics": no_number, "metric_for_best_model": "iou"},
            "tried to measure the quality .* ZeroDivisionError: no class at all",
        ),
        ({}, {"eval_dataset": Unlabelled()}, "a validation batch holds only pixel_values: let it hold labels"),
        ({"rewind_to": "fresh", **HALF}, {"model": with_own_head}, "cannot be drawn anew: rewind to 'init' instead"),
        ({**HALF}, {"model": with_two_active}, r"Several adapters are active \(default, other\)"),
        ({"prune_tokens": 50}, {}, "Cannot prune 50 of 4 prompts: at least 1 must remain.*or pass a ratio"),
        ({"score_dataset": iter([])}, {}, "score_dataset is a set with a length and an index, got the stream"),
        ({"score_dataset": Unlabelled(), **HALF}, {}, "returned no loss|did not return a loss"),
    ],
)
def test_what_a_phase_cannot_do_is_said_before_the_first_step(
    callback: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    watch, given = Watch(), dict(settings)
    model = given.pop("model", adapted)()
    trainer = trainer_for(tmp_path, PruneRewindCallback(**SEARCH, **callback), model, watch, **given)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not watch.rates


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_tokens": "half"}, "prune_tokens is a ratio such as 0.5 .* or how many to prune .*, got 'half'"),
        ({"prune_segments": True}, "prune_segments is a ratio such as 0.5 .*, got True"),
        ({"quality": 3}, "quality is the name of a metric of the Trainer's evaluation, a function .*, got 3"),
        ({"prune_tokens": 0.5, "tokens": 0.5}, "tokens is the former name of prune_tokens: pass prune_tokens alone"),
    ],
)
def test_wrong_types_are_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PruneRewindCallback(**settings)


def test_numbers_of_numpy_are_numbers() -> None:
    callback = PruneRewindCallback(prune_tokens=np.int64(2), prune_segments=np.float32(0.5))
    assert type(callback.prune_tokens) is int and type(callback.prune_segments) is float


def test_the_former_names_of_amounts_are_accepted_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="tokens is now called prune_tokens") as warnings:
        callback = PruneRewindCallback(tokens=0.5)
    assert callback.prune_tokens == 0.5 and warnings[0].filename == __file__
    scores = ImportanceScores(torch.rand(2, 4), torch.rand(2, 4, 8), 1)
    with pytest.warns(DeprecationWarning, match="segments is now called prune_segments") as warnings:
        gates = prune(scores, segments=2)
    assert torch.equal(gates.segment, prune(scores, prune_segments=2).segment) and warnings[0].filename == __file__


# ------------------------------------------------------------------------------------------------------------ no trace
@pytest.mark.parametrize(
    "callback",
    [{**HALF}, {**SEARCH}, {**SEARCH, "quality": "own"}, {"rewind_to": "fresh", **HALF}],
    ids=["amounts", "search", "metric", "fresh"],
)
def test_trying_leaves_no_trace(callback: dict[str, Any], tmp_path: Path) -> None:
    """The first part of a run is that of a run without the callback, to the bit."""
    values = []
    for given in (PruneRewindCallback(**callback), None):
        watch, model = Watch(), adapted()
        trainer_for(
            tmp_path, given, model, watch, compute_metrics=lambda prediction: {"own": 1.0}, max_steps=8
        ).train()
        values.append([watch.values[step] for step in range(4)])
    for with_callback, without in zip(*values, strict=True):
        assert all(torch.equal(with_callback[name], without[name]) for name in without)


def test_trying_changes_neither_generators_nor_modes_nor_gradients(tmp_path: Path) -> None:
    states: list[Any] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            numpy_state = np.random.get_state()
            states.append(
                (
                    random.getstate(),
                    str(numpy_state[1]),
                    torch.get_rng_state().tolist(),
                    [module.training for module in kwargs["model"].modules()],
                    [p.grad is None for p in kwargs["model"].parameters()],
                )
            )

    trainer = trainer_for(tmp_path, None, max_steps=2)
    trainer.callback_handler.callbacks += [Look(), PruneRewindCallback(**SEARCH), Look()]
    trainer.train()
    before, after = states
    assert before == after


# -------------------------------------------------------------------------------------------------- whoever is trained
def injected() -> nn.Module:
    base, _ = build("vit")
    return inject_adapter_in_model(E2VPTConfig(**SETTINGS, modules_to_save=["classifier"]), base)


class Around(nn.Module):
    """An own module around an adapted model."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = adapted()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = self.backbone(pixel_values=pixel_values, labels=labels)
        return {"loss": outputs.loss, "logits": outputs.logits}


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(
    "make", [injected, lambda: adapted().get_base_model(), Around], ids=["injected", "base model", "own module"]
)
def test_adapted_models_that_are_no_peft_model_are_pruned(make: Any, search: bool, tmp_path: Path) -> None:
    model, callback = make(), PruneRewindCallback(**(SEARCH if search else HALF))
    trainer_for(tmp_path, callback, model, max_steps=4).train()
    assert callback.report is not None
    assert callback.report.tuned_values_after == summarise(model, "default").num_tuned_values
    if not search:
        assert (current_gates(model).token == 0).any()
    assert prompt_layers(model)


@pytest.mark.parametrize("make", [injected, Around], ids=["injected", "own module"])
def test_they_are_saved_and_resumed_too(make: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    straight = trainer_for(tmp_path, PruneRewindCallback(**HALF), make(), **settings)
    straight.train()
    expected = state_of(straight.model)
    for step in (1, 3):
        resumed = trainer_for(tmp_path, PruneRewindCallback(**HALF), make(), **settings)
        resumed.train(f"{tmp_path}/checkpoint-{step}")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(resumed.model).items())


# --------------------------------------------------------------------------------------------- the Trainer, subclasses
def test_the_trainer_may_be_passed_or_set(tmp_path: Path) -> None:
    trainer, other = (trainer_for(tmp_path, None, max_steps=4) for _ in range(2))
    first, second = PruneRewindCallback(**HALF, trainer=trainer), PruneRewindCallback(**HALF)
    second.trainer = trainer
    for callback in (first, second):
        trainer.callback_handler.callbacks = [callback]
        trainer.train()
        assert callback.report is not None
    assert not (current_gates(other.model).token == 0).any()


class Tagged(PruneRewindCallback):
    """A subclass with an argument of its own."""

    def __init__(self, tag: str = "none", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tag = tag


@pytest.mark.parametrize("restore", [False, True])
def test_a_subclass_with_arguments_of_its_own_resumes(restore: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    straight = trainer_for(tmp_path, Tagged("blue", **HALF), **settings)
    straight.train()
    expected = state_of(straight.model)
    for step in (2, 6):
        resumed = trainer_for(
            tmp_path,
            Tagged("blue", **HALF),
            adapted(seed=9),
            restore_callback_states_from_checkpoint=restore,
            **settings,
        )
        resumed.train(f"{tmp_path}/checkpoint-{step}")
        (running,) = (c for c in resumed.callback_handler.callbacks if isinstance(c, Tagged))
        assert running.tag == "blue" and running.prune_tokens == 0.5
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(resumed.model).items())


def test_what_a_checkpoint_cannot_hold_is_asked_for(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    given: dict[str, Any] = {"quality": lambda outputs, batch: -outputs.logits.abs().mean(1), **SEARCH}
    trainer_for(tmp_path, PruneRewindCallback(**given), **settings).train()
    restore = {"restore_callback_states_from_checkpoint": True}
    with pytest.raises(ValueError, match="cannot hold the quality of PruneRewindCallback"):
        trainer_for(tmp_path, PruneRewindCallback(**given), **settings, **restore).train(f"{tmp_path}/checkpoint-1")
    trainer_for(tmp_path, PruneRewindCallback(**given), **settings).train(f"{tmp_path}/checkpoint-1")


def test_an_adapter_put_in_place_of_a_deleted_one_is_counted_and_pruned(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", E2VPTConfig(**SETTINGS))
    model.delete_adapter("default")
    model.add_adapter("third", E2VPTConfig(**SETTINGS))
    assert model.prompt_summary().num_prompt_values == model.prompt_summary("other").num_prompt_values
    model.set_adapter("third")
    callback = PruneRewindCallback(**HALF)
    trainer_for(tmp_path, callback, model, max_steps=4).train()
    assert callback.report is not None
    assert (current_gates(model, "third").token == 0).any() and not (current_gates(model, "other").token == 0).any()


def test_the_arguments_of_a_run_are_left_as_they_were(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=4)
    before = copy.deepcopy(args.to_dict())
    Trainer(adapted(), args, train_dataset=Images(), callbacks=[PruneRewindCallback(**HALF)]).train()
    assert args.to_dict() == before and isinstance(args, TrainingArguments)
