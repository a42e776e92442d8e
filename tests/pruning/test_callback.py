# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What `PruneRewindCallback` promises: the phases of a run inside one `Trainer.train()`, and what stands around them.

Runs have 24 steps, 6 in an epoch, and prune after 12 of them where nothing else is said.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from peft_e2vpt import (
    E2VPTConfig,
    ImportanceScores,
    PruneRewindCallback,
    PruningReport,
    apply_gates,
    prune,
    prune_to_budget,
    rewind,
    score_prompts,
    search_pruning,
    trained_tensors,
)
from peft_e2vpt.pruning.callback import TARGET_FILE
from peft_e2vpt.pruning.ranking import current_gates
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support.adapted import predict
from tests.support.models import build
from tests.support.training import (
    HALF,
    NUM_PROMPTS,
    SETTINGS,
    Images,
    Watch,
    adapted,
    assert_same_bits,
    history_of,
    learning_rates,
    state_of,
    trainer_for,
)


pytestmark = pytest.mark.training


BOUNDARY, STEPS = 12, 24
BACKBONES = ("vit", "dinov2", "swin", "clip")


def is_pruned(model: Any) -> bool:
    return bool((current_gates(model, model.active_adapter).token == 0).any())


# --------------------------------------------------------------------------------------------------- the learning rate
def rates(kind: str, num_steps: int, warmup: float, **settings: Any) -> list[float]:
    """The learning rates of a run of its own."""
    warmup_steps = round(warmup * num_steps) if warmup < 1 else int(warmup)
    return learning_rates(kind, num_steps, warmup_steps, settings or None)


@pytest.mark.parametrize("prune_after", [8, 12])
@pytest.mark.parametrize(
    ("kind", "warmup", "settings"),
    [
        ("linear", 3, {}),
        ("linear", 0.25, {}),
        ("cosine", 3, {}),
        ("constant", 0, {}),
        ("constant_with_warmup", 3, {}),
        ("polynomial", 3, {"power": 2.0}),
        ("cosine_with_min_lr", 2, {"min_lr": 1e-3}),
        ("warmup_stable_decay", 2, {"num_decay_steps": 4}),
    ],
)
def test_both_parts_have_a_complete_schedule_of_their_own(
    kind: str, warmup: float, settings: dict[str, Any], prune_after: int, tmp_path: Path
) -> None:
    watch = Watch()
    callback = PruneRewindCallback(prune_after, "steps", **HALF)
    given = {"lr_scheduler_type": kind, "warmup_steps": warmup, "lr_scheduler_kwargs": settings}
    trainer_for(tmp_path, callback, watch=watch, **given).train()
    expected = rates(kind, prune_after, warmup, **settings) + rates(kind, STEPS - prune_after, warmup, **settings)
    assert watch.rates == pytest.approx(expected, abs=1e-15)
    assert watch.rates[prune_after] == watch.rates[0]
    assert watch.decays == [watch.decays[0]] * STEPS and 0.05 in watch.decays[0]


def test_a_schedule_that_waits_for_a_plateau_starts_again(tmp_path: Path) -> None:
    watch = Watch()
    trainer = trainer_for(
        tmp_path,
        PruneRewindCallback(**HALF),
        watch=watch,
        compute_metrics=lambda prediction: {"constant": 1.0},
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"mode": "max", "factor": 0.5, "patience": 0},
        metric_for_best_model="constant",
        eval_strategy="steps",
        eval_steps=4,
    )
    trainer.train()
    falling = [1e-2] * 8 + [5e-3] * 4  # the first evaluation is the best so far
    assert watch.rates == pytest.approx(falling + falling)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == watch.rates


def test_a_schedule_passed_by_hand_starts_again_as_it_is(tmp_path: Path) -> None:
    watch, model = Watch(), adapted()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if p.requires_grad and "e2vpt" in n], "lr": 1e-2},
            {"params": [p for n, p in model.named_parameters() if p.requires_grad and "e2vpt" not in n], "lr": 1e-3},
        ]
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: 0.9**s, lambda s: 0.5**s])
    trainer = Trainer(
        model,
        trainer_for(tmp_path, None, model).args,
        train_dataset=Images(),
        callbacks=[PruneRewindCallback(**HALF), watch],
        optimizers=(optimizer, scheduler),
    )
    seen: list[float] = []

    class Head(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            seen.append(optimizer.param_groups[1]["lr"])

    trainer.add_callback(Head())
    trainer.train()
    assert watch.rates == pytest.approx([1e-2 * 0.9**s for s in range(12)] * 2)
    assert seen == pytest.approx([1e-3 * 0.5**s for s in range(12)] * 2)


def test_a_schedule_that_cannot_start_again_is_refused(tmp_path: Path) -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=24)
    trainer = Trainer(
        model,
        trainer_for(tmp_path, None, model).args,
        train_dataset=Images(),
        callbacks=[PruneRewindCallback(**HALF)],
        optimizers=(optimizer, scheduler),
    )
    with pytest.raises(ValueError, match="OneCycleLR cannot start again after pruning: choose a lr_scheduler_type"):
        trainer.train()


# ----------------------------------------------------------------------------------------------------------- rewinding
@pytest.mark.parametrize("target", ["init", "early", "fresh", "none"])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_second_part_starts_from_the_target(name: str, target: str, tmp_path: Path) -> None:
    watch, model = Watch(), adapted(name)
    identities = [id(p) for p in model.parameters()]
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    last: dict[str, Tensor] = {}

    class Last(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == BOUNDARY:
                last.update(trained_tensors(model))

    callback = PruneRewindCallback(rewind_to=target, early_steps=5 if target == "early" else 0, **HALF)
    trainer_for(tmp_path, callback, model, watch, callbacks=(Last(),)).train()
    values = watch.values[BOUNDARY]
    expected = {"init": watch.values[0], "early": watch.values[5], "none": last, "fresh": values}[target]
    alive = {
        f"base_model.model.e2vpt.{layer.index}.e2vpt_visual_prompts.default": layer.kept("default")
        for layer in prompt_layers(model)
    }
    assert any("classifier" in key for key in values) and len(alive) == len(prompt_layers(model))
    for key, value in values.items():
        if key in alive:
            assert 0 < int(alive[key].sum()) < value.numel()
            assert torch.equal(value, expected[key] * alive[key])
        else:
            assert torch.equal(value, expected[key])
        if not key.endswith("bias") and target == "fresh":
            kept = alive.get(key, torch.ones_like(value, dtype=torch.bool))
            for other in (watch.values[0], last):
                assert not torch.equal(value[kept], other[key][kept])
        assert not torch.equal(watch.values[0][key], last[key])
    assert [id(p) for p in model.parameters()] == identities
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("target", ["init", "none"])
def test_the_optimizer_forgets_the_first_part(target: str, tmp_path: Path) -> None:
    watch = Watch()
    trainer = trainer_for(tmp_path, PruneRewindCallback(rewind_to=target, **HALF), watch=watch)
    trainer.train()
    states = watch.optimizer_states
    assert states[0] == states[BOUNDARY] == 0
    assert all(states[step] == 8 for step in range(1, STEPS) if step != BOUNDARY)
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {STEPS - BOUNDARY}


def test_pruned_values_stay_zero_to_the_end_and_survivors_go_on_learning(tmp_path: Path) -> None:
    watch, model = Watch(), adapted()
    trainer_for(tmp_path, PruneRewindCallback(**HALF), model, watch).train()
    for layer in prompt_layers(model):
        prompts, alive = layer.e2vpt_visual_prompts["default"], layer.kept("default")
        at_boundary = watch.values[BOUNDARY][f"base_model.model.e2vpt.{layer.index}.e2vpt_visual_prompts.default"]
        assert (~alive).any() and (prompts[~alive] == 0).all()
        assert (prompts[alive] != at_boundary[alive]).all()


def full_batch(**settings: Any) -> dict[str, Any]:
    """Every step sees all images, in float64, so that their order does not matter."""
    return {
        "train_dataset": Images(10, dtype=torch.float64),
        "eval_dataset": Images(9, seed=1, dtype=torch.float64),
        "per_device_train_batch_size": 10,
        "logging_steps": 100,
        "warmup_steps": 2,
        **settings,
    }


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_run_equals_its_phases_done_by_hand(name: str, search: bool, tmp_path: Path) -> None:
    settings = {"dtype": torch.float64, "visual_prompt_dropout": 0.0}
    callback = PruneRewindCallback(9, "steps", **({} if search else HALF))
    model = adapted(name, **settings)
    trainer_for(tmp_path, callback, model, **full_batch(max_steps=20)).train()

    by_hand = adapted(name, **settings)
    start = trained_tensors(by_hand)
    trainer_for(tmp_path, None, by_hand, **full_batch(max_steps=9)).train()
    batch = Images(10, dtype=torch.float64)[:]
    scores = score_prompts(by_hand, [batch])
    gates = prune(scores, **HALF)
    if search:
        gates = search_pruning(by_hand, scores, [Images(9, seed=1, dtype=torch.float64)[:]]).gates
    apply_gates(by_hand, gates)
    rewind(by_hand, start)
    trainer_for(tmp_path, None, by_hand, **full_batch(max_steps=11)).train()

    assert callback.report is not None
    assert torch.equal(current_gates(model).segment, current_gates(by_hand).segment) and is_pruned(model)
    torch.testing.assert_close(torch.tensor(callback.report.token_scores), scores.token.float(), rtol=1e-5, atol=0)
    expected = trained_tensors(by_hand)
    for key, value in trained_tensors(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------ resuming
TARGETS: dict[str, dict[str, Any]] = {
    "init": {},
    "early": {"rewind_to": "early", "early_steps": 6},
    "fresh": {"rewind_to": "fresh"},
    "none": {"rewind_to": "none"},
}
SAVING = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}


class StraightRun:
    def __init__(self, folder: Path, target: str, **settings: Any) -> None:
        self.folder, self.target, self.settings = folder, target, {**SAVING, **settings}
        self.trainer, self.callback = self.run()
        self.state, self.history = state_of(self.trainer.model), history_of(self.trainer)

    def run(self, folder: Path | None = None, **settings: Any) -> tuple[Trainer, PruneRewindCallback]:
        amounts = {} if self.settings.get("search") else HALF
        callback = PruneRewindCallback(**TARGETS[self.target], **amounts)
        given = {key: value for key, value in self.settings.items() if key not in ("search", "name")}
        trainer = trainer_for(
            folder or self.folder, callback, adapted(self.settings.get("name", "vit")), **given, **settings
        )
        trainer.train()
        return trainer, callback

    def resume(
        self, step: int, restore: bool, folder: Path | None = None
    ) -> tuple[Trainer, PruneRewindCallback, PruningReport]:
        amounts = {} if self.settings.get("search") else HALF
        callback = PruneRewindCallback(**TARGETS[self.target], **amounts)
        given = {key: value for key, value in self.settings.items() if key not in ("search", "name")}
        trainer = trainer_for(
            folder or self.folder,
            callback,
            adapted(self.settings.get("name", "vit"), seed=99),  # other prompts: all has to come from the checkpoint
            restore_callback_states_from_checkpoint=restore,
            **given,
        )
        trainer.train(resume_from_checkpoint=str(self.folder / f"checkpoint-{step}"))
        running = next(c for c in trainer.callback_handler.callbacks if isinstance(c, PruneRewindCallback))
        assert running.report is not None
        return trainer, callback, running.report


@pytest.fixture(scope="module", params=TARGETS)
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StraightRun]:
    torch.set_num_threads(1)
    yield StraightRun(tmp_path_factory.mktemp("straight"), request.param)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("step", [20, 16, 12, 8, 4])
def test_a_resumed_run_equals_the_straight_run_to_the_bit(straight: StraightRun, step: int, restore: bool) -> None:
    trainer, _, report = straight.resume(step, restore)
    assert_same_bits(state_of(trainer.model), straight.state)
    assert history_of(trainer) == straight.history
    assert report == straight.callback.report
    assert is_pruned(trainer.model)


@pytest.mark.parametrize("step", [16, 12, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"search": True},
        {"name": "swin", "lr_scheduler_type": "cosine"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "bf16": True},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.1},
    ],
    ids=str,
)
def test_other_runs_resume_to_the_bit_too(settings: dict[str, Any], step: int, tmp_path: Path) -> None:
    straight = StraightRun(tmp_path, "init", **settings)
    trainer, _, report = straight.resume(step, restore=False)
    assert_same_bits(state_of(trainer.model), straight.state)
    assert history_of(trainer) == straight.history
    assert report == straight.callback.report


@pytest.mark.parametrize("step", [16, 8])
def test_a_run_may_be_resumed_into_another_folder(step: int, tmp_path: Path) -> None:
    straight = StraightRun(tmp_path / "one", "init")
    trainer, _, report = straight.resume(step, restore=False, folder=tmp_path / "two")
    assert_same_bits(state_of(trainer.model), straight.state)
    assert PruningReport.load(tmp_path / "two" / "checkpoint-24") == report == straight.callback.report


def test_a_run_that_is_resumed_twice_equals_the_straight_run(tmp_path: Path) -> None:
    straight = StraightRun(tmp_path, "early")
    straight.resume(8, restore=True)
    shutil.rmtree(tmp_path / "checkpoint-24")
    trainer, _, _ = straight.resume(16, restore=False)  # made by the resumed run
    assert_same_bits(state_of(trainer.model), straight.state)


def test_a_checkpoint_that_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    trainer_for(tmp_path, None, **SAVING).train()
    with pytest.raises(ValueError, match="checkpoint at step 4 was made without PruneRewindCallback"):
        trainer_for(tmp_path, PruneRewindCallback(**HALF)).train(str(tmp_path / "checkpoint-4"))
    straight = StraightRun(tmp_path / "two", "init")
    (tmp_path / "two" / "checkpoint-4" / TARGET_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"checkpoint-4/{TARGET_FILE} is missing.*copy the whole folder"):
        straight.resume(4, restore=False)
    straight.resume(16, restore=False)  # needs no target any more
    (tmp_path / "two" / "pruning_report.json").unlink()
    straight.resume(16, restore=False)  # nor anything from outside the checkpoint
    (tmp_path / "two" / "checkpoint-16" / "pruning_report.json").unlink()
    (tmp_path / "two" / "pruning_report.json").unlink()
    with pytest.raises(FileNotFoundError, match="pruning_report.json"):
        straight.resume(16, restore=False)


def test_a_validation_set_that_a_checkpoint_cannot_hold_is_asked_for(tmp_path: Path) -> None:
    own = Images(9, seed=5)
    trainer_for(tmp_path, PruneRewindCallback(validation_dataset=own), **SAVING).train()
    resumed = trainer_for(
        tmp_path, PruneRewindCallback(validation_dataset=own), restore_callback_states_from_checkpoint=True, **SAVING
    )
    with pytest.raises(ValueError, match="cannot hold the validation_dataset"):
        resumed.train(str(tmp_path / "checkpoint-4"))
    trainer_for(tmp_path, PruneRewindCallback(validation_dataset=own), **SAVING).train(str(tmp_path / "checkpoint-4"))


# -------------------------------------------------------------------------------------- best models and early stopping
class Scripted:
    """Metrics as planned: the i-th evaluation gives the i-th number."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def __call__(self, prediction: Any) -> dict[str, float]:
        return {"quality": self.numbers.pop(0)}


@pytest.mark.parametrize("first", ["stopping", "pruning"])
def test_early_stopping_sees_the_second_part_only(first: str, tmp_path: Path) -> None:
    watch, pruning, stopping = Watch(), PruneRewindCallback(**HALF), EarlyStoppingCallback(1)
    order = (stopping, pruning) if first == "stopping" else (pruning, stopping)
    trainer = trainer_for(
        tmp_path,
        None,
        callbacks=order,
        watch=watch,
        compute_metrics=Scripted(0.9, 0.8, 0.7, 0.3, 0.4, 0.2),  # after 12 steps the second part begins
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        **SAVING,
    )
    trainer.train()
    assert watch.evaluated_at == [4, 8, 12, 16, 20, 24]  # not stopped while the first part became worse
    assert trainer.state.best_metric == 0.4 and trainer.state.best_global_step == 20
    assert is_pruned(trainer.model)
    saved = load_file(tmp_path / "checkpoint-20" / "adapter_model.safetensors")
    found = trainer.model.get_base_model().classifier.modules_to_save["default"].bias
    assert torch.equal(found, saved["base_model.model.classifier.bias"])


@pytest.mark.parametrize("first", ["stopping", "pruning"])
def test_early_stopping_stops_the_second_part(first: str, tmp_path: Path) -> None:
    watch, pruning, stopping = Watch(), PruneRewindCallback(**HALF), EarlyStoppingCallback(1)
    trainer_for(
        tmp_path,
        None,
        callbacks=(stopping, pruning) if first == "stopping" else (pruning, stopping),
        watch=watch,
        compute_metrics=Scripted(0.9, 0.8, 0.7, 0.3, 0.2, 0.9),
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        **SAVING,
    ).train()
    assert watch.evaluated_at == [4, 8, 12, 16, 20]


def test_the_best_model_is_one_of_the_second_part(tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_for(
        tmp_path,
        PruneRewindCallback(**HALF),
        model,
        compute_metrics=Scripted(0.1, 0.9, 0.99, 0.5, 0.3, 0.4),
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        save_total_limit=1,
        **SAVING,
    )
    trainer.train()
    assert trainer.state.best_global_step == 16
    assert (tmp_path / "checkpoint-16").is_dir()
    other = PeftModel.from_pretrained(build("vit")[0], tmp_path / "checkpoint-16").eval()
    inputs = {"pixel_values": Images(5, seed=3).pixels}
    assert torch.equal(predict(model.eval(), inputs), predict(other, inputs))
    assert is_pruned(model)


def test_best_models_and_stopping_survive_a_resume_in_the_first_part(tmp_path: Path) -> None:
    metrics = (0.9, 0.8, 0.7, 0.3, 0.4, 0.2)
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "quality", **SAVING}
    straight = trainer_for(
        tmp_path,
        PruneRewindCallback(**HALF),
        callbacks=(EarlyStoppingCallback(1),),
        compute_metrics=Scripted(*metrics),
        **settings,
    )
    straight.train()
    for step, done in ((12, 3), (8, 2)):
        resumed = trainer_for(
            tmp_path,
            PruneRewindCallback(**HALF),
            callbacks=(EarlyStoppingCallback(1),),
            compute_metrics=Scripted(*metrics[done:]),
            restore_callback_states_from_checkpoint=True,
            **settings,
        )
        resumed.train(str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.best_global_step == 20 and resumed.state.global_step == 24
        assert_same_bits(state_of(resumed.model), state_of(straight.model))


# -------------------------------------------------------------------------------------------- when the first part ends
@pytest.mark.parametrize(
    ("prune_after", "unit", "settings", "expected"),
    [
        (0.5, "fraction", {}, 12),
        (0.25, "fraction", {"max_steps": 10}, 2),
        (7, "steps", {}, 7),
        (1, "epochs", {}, 6),
        (1.5, "epochs", {}, 9),
        (1, "epochs", {"max_steps": 20}, 6),  # 20 steps are not a whole number of epochs
        (1, "epochs", {"num_train_epochs": 2.5}, 6),
        (1, "epochs", {"gradient_accumulation_steps": 4}, 2),
    ],
)
def test_the_first_part_ends_where_it_was_asked_to(
    prune_after: float, unit: str, settings: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    watch, callback = Watch(), PruneRewindCallback(prune_after, unit, **HALF)
    trainer = trainer_for(tmp_path, callback, watch=watch, **settings)
    trainer.train()
    assert callback.report is not None and callback.report.step == expected
    assert watch.optimizer_states[expected] == 0
    entries = [entry["step"] for entry in trainer.state.log_history if "pruning_step" in entry]
    assert entries == [expected]


# -------------------------------------------------------------------------------------------- around the training loop
def test_gradient_accumulation_prunes_the_same(tmp_path: Path) -> None:
    reports, weights = [], []
    for batch_size, accumulated in ((4, 1), (2, 2), (1, 4)):
        callback = PruneRewindCallback(**HALF)
        trainer = trainer_for(
            tmp_path,
            callback,
            adapted(dtype=torch.float64, visual_prompt_dropout=0.0),
            train_dataset=Images(20, dtype=torch.float64),
            eval_dataset=Images(9, dtype=torch.float64),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
        )
        trainer.train()
        assert callback.report is not None and callback.report.num_scored_samples == 20
        reports.append(callback.report)
        weights.append(trained_tensors(trainer.model))
    for report, values in zip(reports[1:], weights[1:], strict=True):
        assert report.segment_gates == reports[0].segment_gates and report.step == reports[0].step
        for key, value in values.items():
            torch.testing.assert_close(value, weights[0][key], rtol=1e-6, atol=1e-7)


def test_scoring_leaks_no_gradient_into_the_next_step(tmp_path: Path) -> None:
    """The first step after the boundary has the gradient of a training step, clipped as asked."""
    norms = {}
    for batches in (1, None):
        trainer = trainer_for(
            tmp_path,
            PruneRewindCallback(prune_tokens=0.0, prune_segments=0.0, rewind_to="none", max_score_batches=batches),
            max_grad_norm=0.05,
        )
        trainer.train()
        norms[batches] = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        norms[batches] += [float(value.sum()) for value in trained_tensors(trainer.model).values()]
    assert norms[1] == norms[None] and len(norms[1]) == STEPS + 8


def test_prompts_are_scored_by_the_loss_that_the_trainer_computes(tmp_path: Path) -> None:
    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return 1000 * torch.nn.functional.cross_entropy(outputs.logits, labels)

    scores = {}
    for kind in ("plain", "smoothed", "own"):
        callback = PruneRewindCallback(1, "steps", **HALF)  # with a learning rate of 0: nothing is trained yet
        settings = {"label_smoothing_factor": 0.2} if kind == "smoothed" else {}
        trainer = trainer_for(tmp_path, callback, max_steps=4, **settings)
        trainer.compute_loss_func = loss_of if kind == "own" else None
        trainer.train()
        assert callback.report is not None
        scores[kind] = torch.tensor(callback.report.token_scores)
    torch.testing.assert_close(scores["own"], 1000 * scores["plain"], rtol=1e-4, atol=1e-6)
    expected = score_prompts(
        adapted(),
        [Images()[:]],
        loss_fn=lambda model, batch: torch.nn.functional.cross_entropy(
            model(pixel_values=batch["pixel_values"]).logits, batch["labels"], label_smoothing=0.2
        ),
    )
    torch.testing.assert_close(scores["smoothed"], expected.token.float(), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(scores["smoothed"], scores["plain"], rtol=1e-2)


def test_bfloat16_on_a_cpu(tmp_path: Path) -> None:
    reports = {}
    for bf16 in (False, True):
        callback = PruneRewindCallback(2, "steps", prune_tokens=0.5)
        trainer = trainer_for(tmp_path, callback, adapted(visual_prompt_dropout=0.0), bf16=bf16)
        trainer.train()
        assert callback.report is not None and is_pruned(trainer.model)
        reports[bf16] = torch.tensor(callback.report.token_scores)
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    error = (reports[True] - reports[False]).norm() / reports[False].norm()
    assert 1e-6 < error < 0.1  # autocast was on while scoring, and did little


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers scales float16 gradients on a GPU only")
def test_float16_with_scaled_gradients(tmp_path: Path) -> None:
    callback = PruneRewindCallback(**HALF)
    trainer = trainer_for(tmp_path, callback, fp16=True, use_cpu=False)
    trainer.train()
    assert callback.report is not None and is_pruned(trainer.model)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.compile
def test_a_compiled_model_prunes_the_same(tmp_path: Path) -> None:
    gates = []
    for compiled in (False, True):
        torch._dynamo.reset()
        callback = PruneRewindCallback(**HALF)
        trainer = trainer_for(
            tmp_path,
            callback,
            adapted(visual_prompt_dropout=0.0),
            torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
            max_steps=8,
        )
        trainer.train()
        assert compiled == hasattr(trainer.model_wrapped, "_orig_mod")
        assert callback.report is not None
        gates.append((callback.report.token_gates, callback.report.segment_gates))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        gates[-1] += (torch.tensor(losses),)
    assert gates[0][:2] == gates[1][:2]
    torch.testing.assert_close(gates[0][2], gates[1][2], rtol=1e-3, atol=1e-3)


class RunsShort(Trainer):
    """Runs out of memory once, at a step."""

    at_step = 0
    has_failed = False

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not RunsShort.has_failed and self.state.global_step == RunsShort.at_step:
            RunsShort.has_failed = True
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("kind", ["linear", "reduce_lr_on_plateau"])
@pytest.mark.parametrize(("at_step", "target"), [(9, "early"), (14, "init"), (14, "early")])
def test_a_run_that_ran_out_of_memory_starts_clean(at_step: int, target: str, kind: str, tmp_path: Path) -> None:
    RunsShort.at_step, RunsShort.has_failed = at_step, False
    watch, callback, model = Watch(), PruneRewindCallback(**TARGETS[target], **HALF), adapted()
    start = trained_tensors(model)
    settings = {"lr_scheduler_type": kind, "eval_strategy": "steps", "eval_steps": 2}
    if kind == "reduce_lr_on_plateau":  # falls at every evaluation
        settings |= {"lr_scheduler_kwargs": {"mode": "max", "patience": 0}, "metric_for_best_model": "constant"}
    begun: list[tuple[bool, bool, int]] = []

    class Begin(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                begun.append((is_pruned(model), callback.report is None, len(kwargs["optimizer"].state)))

    trainer = trainer_for(
        tmp_path,
        callback,
        model,
        watch,
        RunsShort,
        callbacks=(Begin(),),
        compute_metrics=lambda prediction: {"constant": 1.0},
        auto_find_batch_size=True,
        **settings,
    )
    trainer.train()
    assert RunsShort.has_failed and trainer._train_batch_size < 4
    assert begun == [(False, True, 0), (False, True, 0)]
    assert_same_bits(watch.values[0], start)
    second_try = watch.rates[at_step:]
    assert len(second_try) == trainer.state.max_steps > STEPS
    boundary = trainer.state.max_steps // 2
    assert second_try[boundary] == second_try[0] == watch.rates[0]
    assert callback.report is not None and callback.report.step == boundary
    expected = watch.values[6 if target == "early" else 0]
    for key, value in watch.values[boundary].items():
        assert torch.equal(value[value != 0], expected[key][value != 0])


def test_training_again_after_an_interruption_goes_on_from_where_it_was(tmp_path: Path) -> None:
    RunsShort.at_step, RunsShort.has_failed = 9, False
    model, watch = adapted(), Watch()
    trainer = trainer_for(tmp_path, PruneRewindCallback(**HALF), model, watch, RunsShort)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    stopped = trained_tensors(model)
    trainer.train()
    assert_same_bits(watch.values[0], stopped)


# --------------------------------------------------------------------------------------------- adapters, models, names
def test_an_adapter_of_another_name(tmp_path: Path) -> None:
    model, callback = adapted(adapter_name="birds"), PruneRewindCallback(**HALF)
    trainer = trainer_for(tmp_path, callback, model, **SAVING)
    trainer.train()
    assert is_pruned(model)
    straight = state_of(model)
    other = PeftModel.from_pretrained(build("vit")[0], tmp_path / "checkpoint-24" / "birds").eval()
    inputs = {"pixel_values": Images(5, seed=3).pixels}
    assert torch.equal(predict(other, inputs), predict(model.eval(), inputs))
    for step in (16, 4):
        again = adapted(adapter_name="birds", seed=9)
        trainer_for(tmp_path, PruneRewindCallback(**HALF), again, **SAVING).train(str(tmp_path / f"checkpoint-{step}"))
        assert_same_bits(state_of(again), straight)


def test_the_callback_of_a_finished_run_serves_another(tmp_path: Path) -> None:
    callback = PruneRewindCallback(**HALF)
    first = trainer_for(tmp_path / "first", callback)
    first.train()
    report = callback.report
    fresh = trainer_for(tmp_path / "second", callback)
    fresh.train()
    assert callback.report == report and callback.report is not report
    assert_same_bits(state_of(fresh.model), state_of(first.model))


def test_training_a_pruned_model_again_keeps_what_was_pruned(tmp_path: Path) -> None:
    watch = Watch()
    trainer = trainer_for(tmp_path, PruneRewindCallback(prune_tokens=3, prune_segments=4), watch=watch)
    trainer.train()
    gates, end = current_gates(trainer.model), trained_tensors(trainer.model)
    trainer.train()
    assert_same_bits(watch.values[0], end)
    assert torch.equal(current_gates(trainer.model).segment, gates.segment)
    trainer.callback_handler.callbacks = [
        c for c in trainer.callback_handler.callbacks if not isinstance(c, PruneRewindCallback)
    ]
    trainer.add_callback(PruneRewindCallback(prune_tokens=1, prune_segments=1))
    trainer.train()
    assert torch.equal(current_gates(trainer.model).segment, gates.segment)  # fewer: nothing comes back


def test_a_callback_added_later_works_and_is_saved(tmp_path: Path) -> None:
    straight = trainer_for(tmp_path, None, **SAVING)
    straight.add_callback(PruneRewindCallback(**HALF))
    straight.train()
    resumed = trainer_for(tmp_path, None, **SAVING)
    resumed.add_callback(PruneRewindCallback(**HALF))
    resumed.train(str(tmp_path / "checkpoint-4"))
    assert_same_bits(state_of(resumed.model), state_of(straight.model))


# ---------------------------------------------------------------------------------------------------------- the report
def test_the_report_is_an_object_a_file_and_a_line_of_the_log(tmp_path: Path) -> None:
    watch, model = Watch(), adapted()
    before = model.prompt_summary()
    callback = PruneRewindCallback(**HALF)
    trainer = trainer_for(tmp_path, callback, model, watch, **SAVING)
    trainer.train()
    report, after = callback.report, model.prompt_summary()
    assert report is not None
    assert PruningReport.load(tmp_path) == report
    assert json.loads((tmp_path / "pruning_report.json").read_text()) == asdict(report)
    for step in (16, 20, 24):
        assert PruningReport.load(tmp_path / f"checkpoint-{step}") == report
    for step in (4, 8, 12):
        assert not (tmp_path / f"checkpoint-{step}" / "pruning_report.json").exists()

    assert (report.step, report.rewound_to, report.num_scored_samples) == (BOUNDARY, "init", 21)
    assert report.layers == [0, 1, 2] and report.candidates == [] and report.chosen is None
    scores = ImportanceScores(torch.tensor(report.token_scores), torch.tensor(report.segment_scores), 21)
    gates = prune(scores, **HALF)
    assert report.token_gates == gates.token.tolist() and report.segment_gates == gates.segment.tolist()
    assert torch.equal(current_gates(model).segment, gates.segment)
    assert (report.tuned_values_before, report.tuned_values_after) == (before.num_tuned_values, after.num_tuned_values)
    assert report.tuned_percentage_after == after.tuned_percentage < before.tuned_percentage
    width, parts = 32, SETTINGS["num_segments"]
    removed = int((gates.segment == 0).sum()) * width // parts
    assert before.num_tuned_values - after.num_tuned_values == removed > 0

    numbers = report.numbers()
    assert numbers["pruning_tuned_percentage"] == after.tuned_percentage
    assert numbers["pruning_prompts_kept"] == 3 * NUM_PROMPTS / 2
    (logged,) = [entry for entry in trainer.state.log_history if "pruning_step" in entry]
    assert logged.items() >= numbers.items() and logged["step"] == BOUNDARY
    (tracked,) = [entry for entry in watch.logs if "pruning_step" in entry]
    assert tracked.items() >= numbers.items()


def test_the_report_of_a_search_holds_its_candidates(tmp_path: Path) -> None:
    callback, model = PruneRewindCallback(min_segments=2), adapted()
    trainer_for(tmp_path, callback, model).train()
    report = callback.report
    assert report is not None and report.chosen is not None
    assert len(report.candidates) > 10
    best = report.candidates[report.chosen]
    assert best["quality"] == max(c["quality"] for c in report.candidates)
    scores = ImportanceScores(torch.tensor(report.token_scores), torch.tensor(report.segment_scores), 21)
    gates = prune(scores, best["token_ratio"], best["segment_ratio"], min_segments=2)
    assert torch.equal(current_gates(model).segment, gates.segment)
    assert PruningReport.load(tmp_path) == report


def test_the_search_reads_the_set_that_was_passed(tmp_path: Path) -> None:
    class Noted(Images):
        read = 0

        def __getitem__(self, index: int) -> dict[str, Any]:
            Noted.read += 1
            return super().__getitem__(index)

    own = Noted(9, seed=1)
    with_eval_set, with_own = PruneRewindCallback(), PruneRewindCallback(validation_dataset=own)
    trainer_for(tmp_path, with_eval_set).train()
    trainer_for(tmp_path, with_own, eval_dataset={"a": Images(3), "b": Images(4)}).train()
    assert Noted.read == 8 + 9  # a batch before the first step, and then all
    assert with_own.report == with_eval_set.report


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_budget_is_kept_and_used(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    summary = model.prompt_summary()
    lowest = summary.percentage_of(summary.num_tuned_values - 300)
    callback = PruneRewindCallback(max_tuned_percentage=lowest)
    trainer_for(tmp_path, callback, model).train()
    report = callback.report
    assert report is not None
    assert model.prompt_summary().tuned_percentage == report.tuned_percentage_after <= lowest
    scores = ImportanceScores(torch.tensor(report.token_scores), torch.tensor(report.segment_scores), 21)
    widths = [layer.site.width for layer in prompt_layers(model)]
    alive = sum(int(layer.kept("default").sum()) for layer in prompt_layers(model))
    all_values = sum(NUM_PROMPTS * width for width in widths)
    gates = prune_to_budget(scores, all_values - 300, widths)
    assert gates.num_values(widths) == alive
    assert torch.equal(current_gates(model).segment, gates.segment.float())
    assert all_values - 300 - alive < 200  # not more than was needed, up to one step of the ratio


def test_pruned_values_are_neither_counted_nor_saved(tmp_path: Path) -> None:
    whole, model = adapted(), adapted()
    whole.save_pretrained(tmp_path / "whole")
    trainer = trainer_for(tmp_path, PruneRewindCallback(**HALF), model)
    trainer.train()
    trainer.save_model(str(tmp_path / "pruned"))
    sizes = {kind: (tmp_path / kind / "adapter_model.safetensors").stat().st_size for kind in ("whole", "pruned")}
    tensors = load_file(tmp_path / "pruned" / "adapter_model.safetensors")
    prompts = {key: tensor for key, tensor in tensors.items() if "visual_prompts" in key}
    summary = model.prompt_summary()
    num_kv = sum(layer.e2vpt_kv_prompts["default"].numel() for layer in prompt_layers(model))
    assert sum(tensor.numel() for tensor in prompts.values()) == summary.num_prompt_values - num_kv
    assert summary.num_prompt_values < whole.prompt_summary().num_prompt_values
    saved = whole.prompt_summary().num_prompt_values - summary.num_prompt_values
    assert sizes["whole"] - sizes["pruned"] == pytest.approx(4 * saved, abs=100)  # 4 bytes each, but for the header


@pytest.mark.parametrize("name", BACKBONES)
def test_the_saved_adapter_is_the_trained_model(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    trainer = trainer_for(tmp_path, PruneRewindCallback(**HALF), model)
    trainer.train()
    trainer.save_model()
    other = PeftModel.from_pretrained(build(name)[0], tmp_path).eval()
    inputs = {"pixel_values": Images(5, seed=3).pixels}
    assert torch.equal(predict(other, inputs), predict(model.eval(), inputs))
    assert str(other.prompt_summary()) == str(model.prompt_summary())
    assert PruningReport.load(tmp_path).token_gates == current_gates(other).token.tolist()


# ------------------------------------------------------------------------------------------------------ what cannot be
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "hours"}, "unit must be one of fraction, epochs, steps, got 'hours'"),
        ({"rewind_to": "start"}, "rewind_to must be one of init, early, fresh, none, got 'start'"),
        ({"prune_after": 1.5}, "prune_after lies between 0 and 1, got 1.5"),
        ({"rewind_to": "early"}, "rewind_to='early' and early_steps go together"),
        ({"early_steps": 3}, "rewind_to='early' and early_steps go together"),
        ({"max_tuned_percentage": 1.0, "prune_tokens": 0.5}, "either a budget, max_tuned_percentage, or amounts"),
        ({"max_tuned_percentage": 100.0}, "max_tuned_percentage lies between 0 and 100, got 100.0"),
        ({"prune_tokens": 1.5}, "pruning ratio lies between 0 and 1, got 1.5"),
        ({"prune_segments": -0.5}, "pruning ratio lies between 0 and 1, got -0.5"),
        ({"token_ratios": (0.0, 1.5)}, "pruning ratio lies between 0 and 1, got 1.5"),
        ({"segment_ratios": (2,)}, "pruning ratio lies between 0 and 1, got 2"),
    ],
)
def test_impossible_arguments_are_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneRewindCallback(**settings)


SEARCH: dict[str, Any] = {"prune_tokens": None, "prune_segments": None}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from Images()


class Unlabelled(Images):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index]}


class StreamWithLength(Stream):
    def __len__(self) -> int:
        return 21


@pytest.mark.parametrize(
    ("callback", "settings", "message"),
    [
        (
            {"prune_after": 24, "unit": "steps"},
            {},
            "24 optimizer steps, and the first part would end after 24: it has",
        ),
        ({"prune_after": 4, "unit": "epochs"}, {}, "24 optimizer steps, and the first part would end after 24"),
        ({}, {"max_steps": 1}, "1 optimizer steps, and one with pruning needs at least 2"),
        ({"rewind_to": "early", "early_steps": 13}, {}, "it has to end after step 13 to 23. Train longer or change"),
        ({"prune_tokens": 4}, {}, "Cannot prune 4 of 4 prompts: at least 1 must remain. Prune at most 3"),
        ({"prune_segments": 5}, {}, "Cannot prune 5 of 8 segments: at least 4 must remain. Prune at most 4"),
        ({"max_tuned_percentage": 0.01}, {}, "max_tuned_percentage=0.01 is too small: head and key-value prompts"),
        (
            {},
            {"train_dataset": Stream(), "max_steps": 10},
            "needs one with a length and an index, got the stream Stream",
        ),
        ({}, {"train_dataset": StreamWithLength(), "max_steps": 10}, "got the stream StreamWithLength"),
        (SEARCH, {"eval_dataset": Stream()}, "got the stream Stream: pass another as"),
        (SEARCH, {"eval_dataset": Images(0)}, "compares prunings on an evaluation set, but it is empty: pass eval_"),
        (SEARCH, {"eval_dataset": Unlabelled()}, "a validation batch holds only pixel_values: let it hold labels"),
        (
            SEARCH,
            {"eval_dataset": {"a": Images(), "b": Images()}},
            "several evaluation sets, a, b: pass the one to compare prunings on as validation_dataset",
        ),
        ({}, {"callbacks": (PruneRewindCallback(),)}, "more than one PruneRewindCallback: pass one"),
        ({}, {"model": {"num_visual_prompts": 0}}, "no visual prompts to score or prune"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_first_step(
    callback: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    amounts = {} if "max_tuned_percentage" in callback else HALF
    watch, model = Watch(), adapted(**settings.pop("model", {})) if "model" in settings else adapted()
    trainer = trainer_for(tmp_path, PruneRewindCallback(**{**amounts, **callback}), model, watch, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not watch.rates


def test_the_least_budget_that_is_named_can_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too small") as error:
        trainer_for(tmp_path, PruneRewindCallback(max_tuned_percentage=0.5)).train()
    least = float(re.search(r"Raise it to ([\d.]+) or more", str(error.value)).group(1))
    callback = PruneRewindCallback(max_tuned_percentage=least)
    trainer_for(tmp_path, callback).train()
    assert callback.report.tuned_percentage_after == pytest.approx(least, abs=2e-3)
    assert callback.report.tuned_percentage_after <= least
    with pytest.raises(ValueError, match=f"Raise it to {least:.3f} or more"):
        trainer_for(tmp_path, PruneRewindCallback(max_tuned_percentage=least - 2e-3)).train()


def test_a_transform_without_its_column_is_said_before_the_first_step(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures, watch = Images(), Watch()
    columns = {"image": pictures.pixels.tolist(), "label": pictures.labels.tolist()}
    data = datasets.Dataset.from_dict(columns).with_transform(
        lambda batch: {"pixel_values": torch.tensor(batch["image"]), "labels": batch["label"]}
    )
    message = "set failed: missing key 'image'.*pass remove_unused_columns=False to TrainingArguments"
    for callback, settings in (
        (PruneRewindCallback(**HALF), {"train_dataset": data}),
        (PruneRewindCallback(), {"eval_dataset": data}),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_for(tmp_path, callback, watch=watch, **settings).train()
    assert not watch.rates
    callback = PruneRewindCallback(max_score_batches=1, token_ratios=[0.5], segment_ratios=[0.0])
    trainer_for(tmp_path, callback, train_dataset=data, eval_dataset=data, remove_unused_columns=False).train()
    assert callback.report is not None


def test_a_frozen_adapter_is_refused_until_it_is_loaded_as_trainable(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "saved")
    model = PeftModel.from_pretrained(build("vit")[0], tmp_path / "saved")
    with pytest.raises(ValueError, match="adapter 'default' is frozen.*is_trainable=True"):
        trainer_for(tmp_path, PruneRewindCallback(**HALF), model).train()
    model = PeftModel.from_pretrained(build("vit")[0], tmp_path / "saved", is_trainable=True)
    trainer_for(tmp_path, PruneRewindCallback(**HALF), model).train()
    assert is_pruned(model)


def test_a_missing_evaluation_set_is_said_before_the_first_step(tmp_path: Path) -> None:
    args = trainer_for(tmp_path, None).args
    trainer = Trainer(adapted(), args, train_dataset=Images(), callbacks=[PruneRewindCallback()])
    with pytest.raises(
        ValueError, match="compares prunings on an evaluation set, but there is none: pass eval_dataset"
    ):
        trainer.train()
    trainer = Trainer(adapted(), args, train_dataset=Images(), callbacks=[PruneRewindCallback(**HALF)])
    trainer.train()
    assert is_pruned(trainer.model)


def test_a_model_without_adapter_is_refused(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, PruneRewindCallback(**HALF), build("vit")[0])
    with pytest.raises(
        ValueError, match="ViTForImageClassification has no E2VPT adapter: wrap it with get_peft_model"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("kind", "state", "message"),
    [
        ("fsdp", {"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "works under FSDP2, but this run uses FSDP1"),
        ("deepspeed", {"deepspeed_plugin": SimpleNamespace(zero_stage=0)}, "configuration has stage 0"),
        (
            "deepspeed",
            {
                "deepspeed_plugin": SimpleNamespace(
                    zero_stage=3, get_value=lambda key: "nvme" if "device" in key else ""
                )
            },
            "cannot be done on a disk",
        ),
    ],
)
def test_training_that_hides_the_trained_tensors_is_refused(
    kind: str, state: dict[str, Any], message: str, tmp_path: Path
) -> None:
    class Pretend(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            setattr(trainer, f"is_{kind}_enabled", True)
            trainer.accelerator.state = SimpleNamespace(**state)

    trainer = trainer_for(tmp_path, None, callbacks=(Pretend(), PruneRewindCallback(**HALF)))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_outside_of_a_trainer_the_callback_says_where_it_belongs() -> None:
    with pytest.raises(RuntimeError, match="works inside Trainer.train"):
        PruneRewindCallback().on_train_begin(None, None, None)  # type: ignore[arg-type]


def test_a_run_that_ends_before_it_prunes_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    from transformers.utils import logging

    logging.enable_propagation()
    trainer_for(tmp_path, PruneRewindCallback(**HALF), callbacks=(Stop(),)).train()
    logging.disable_propagation()
    assert "Training ended at step 5, before it was to prune at 12" in caplog.text


def test_datasets_of_hugging_face_work_and_their_streams_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = Images()
    data = datasets.Dataset.from_dict(
        {"pixel_values": pictures.pixels.tolist(), "labels": pictures.labels.tolist(), "name": ["x"] * 21}
    ).with_format("torch")
    callback, expected = PruneRewindCallback(**HALF), PruneRewindCallback(**HALF)
    trainer_for(tmp_path, callback, train_dataset=data).train()
    trainer_for(tmp_path, expected).train()
    assert callback.report == expected.report
    trainer = trainer_for(tmp_path, callback, train_dataset=data.to_iterable_dataset(), max_steps=10)
    with pytest.raises(ValueError, match="got the stream IterableDataset"):
        trainer.train()


def test_windows_and_layers_of_different_width_are_pruned_to_the_end(tmp_path: Path) -> None:
    """Swin: 4 layers of two widths; the numbers of the report are those of the model."""
    model, callback = adapted("swin"), PruneRewindCallback(prune_tokens=1, prune_segments=4)
    trainer_for(tmp_path, callback, model).train()
    summary = model.prompt_summary()
    assert [layer.num_visual_prompts for layer in summary.layers] == [3] * 4
    assert [layer.num_segments for layer in summary.layers] == [12] * 4
    assert callback.report is not None and callback.report.tuned_values_after == summary.num_tuned_values
    alive = [int((layer.e2vpt_visual_prompts["default"] != 0).sum()) for layer in prompt_layers(model)]
    assert alive == [12 * layer.site.width // 8 for layer in prompt_layers(model)]


def test_one_set_of_gates_for_the_whole_model(tmp_path: Path) -> None:
    model, callback = adapted(gate_scope="model"), PruneRewindCallback(**HALF)
    trainer_for(tmp_path, callback, model).train()
    assert callback.report is not None and len(callback.report.token_gates) == 1
    gates = [layer.e2vpt_token_gates["default"].tolist() for layer in prompt_layers(model)]
    assert gates == callback.report.token_gates * 3


def test_released_switches_run_through_all_phases(tmp_path: Path) -> None:
    parity = {
        "token_gate": "embedding",
        "segment_layout": "strided",
        "pruned_prompts": "zero",
        "gate_scope": "model",
        "visual_prompt_mode": "shallow",
    }
    base = get_peft_model(build("vit")[0], E2VPTConfig(**{**SETTINGS, **parity}))
    trainer = trainer_for(tmp_path, PruneRewindCallback(), base)
    trainer.train()
    assert is_pruned(base)
    trainer.save_model()
    other = PeftModel.from_pretrained(build("vit")[0], tmp_path).eval()
    inputs = {"pixel_values": Images(5, seed=3).pixels}
    assert torch.equal(predict(other, inputs), predict(base.eval(), inputs))
