# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""After rewinding an optimizer is a new one, wherever it keeps what it has learned: in `state`, in `param_groups`, in
an optimizer that it wraps, or, if it is schedule-free, in the values that it swaps for those to be evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from transformers import Trainer, TrainerCallback

from peft_e2vpt import ModelQuality, PruneRewindCallback, apply_gates, prune, rewind, score_prompts, trained_tensors
from peft_e2vpt.pruning.optimizer_start import OptimizerStart, evaluated_values
from tests.pruning.test_callback import RunsShort
from tests.support.training import HALF, Images, Watch, adapted, assert_same_bits, history_of, state_of, trainer_for


pytestmark = pytest.mark.training


class Estimating(Optimizer):
    """Like Prodigy: keeps an estimate of the step size in its groups, adds entries to them, and one is a tensor."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        start = {"lr": lr, "weight_decay": 0.0, "d": 0.5, "k": 0, "betas": (0.9, 0.99), "seen": torch.zeros(2)}
        super().__init__(params, start)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            norm = sum(float(p.grad.square().sum()) for p in group["params"] if p.grad is not None)
            group["k"] += 1
            group["d_hat"] = group.get("d_hat", 0.0) + norm
            group["d"] = group["d"] * 0.9 + 0.1 / (1 + group["d_hat"])
            group["seen"] = group["seen"] + group["k"]
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(p.grad, alpha=group["lr"] * group["d"] / (1 + float(group["seen"][0])))


class ScheduleFree(Optimizer):
    """SGD with averaging instead of a schedule (Defazio et al., 2024): trains y, evaluates x, and keeps z."""

    beta = 0.9

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "k": 0, "train_mode": False})

    @torch.no_grad()
    def _swap(self, train_mode: bool, weight: float) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = train_mode

    def train(self) -> None:
        self._swap(True, 1 - self.beta)

    def eval(self) -> None:
        self._swap(False, 1 - 1 / self.beta)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            weight = 1 / group["k"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, weight).sub_(p.grad, alpha=group["lr"] * (1 - self.beta * (1 - weight)))
                    z.sub_(p.grad, alpha=group["lr"])


class Wrapping(Optimizer):
    """Holds another optimizer, and a state and groups of its own: every second step is doubled."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        params = list(params)
        self.base = Estimating(params, lr)
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "even": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, inner in zip(self.param_groups, self.base.param_groups, strict=True):
            group["even"] = not group["even"]
            inner["lr"], inner["weight_decay"] = group["lr"] * (1 + group["even"]), group["weight_decay"]
            for p in group["params"]:
                self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
        self.base.step()


class WrappingWithState(Wrapping):
    """Says what its base holds when it is saved, so that it can be resumed."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "base": self.base.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict.pop("base"))
        super().load_state_dict(state_dict)


KINDS: dict[str, Callable[..., Optimizer]] = {
    "estimating": Estimating,
    "schedule-free": ScheduleFree,
    "wrapping": WrappingWithState,
    "momentum": lambda params, lr=1e-2: SGD(params, lr, momentum=0.9),
    "adam": lambda params, lr=1e-2: torch.optim.AdamW(params, lr, weight_decay=0.0),
    "adam with a tensor": lambda params, lr=1e-2: torch.optim.Adam(params, torch.tensor(lr)),
    "adafactor": lambda params, lr=1e-2: torch.optim.Adafactor(params, lr),
    "asgd": lambda params, lr=1e-2: torch.optim.ASGD(params, lr),
    "nadam": lambda params, lr=1e-2: torch.optim.NAdam(params, lr),
}
OWN = ("estimating", "schedule-free", "wrapping")
everything = pytest.mark.parametrize("kind", KINDS)


def trainer_of(
    kind: str, folder: Path, callback: PruneRewindCallback | None, model: Any = None, **given: Any
) -> Trainer:
    """A trainer with an optimizer in two groups, the second without weight decay."""
    model = model if model is not None else adapted()
    trainer = trainer_for(folder, callback, model, **given)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[:3], "weight_decay": 0.05}, {"params": trained[3:]}]
    trainer.optimizer = KINDS[kind](groups, lr=trainer.args.learning_rate)
    return trainer


class Groups(TrainerCallback):
    """Notes what the groups hold when a step begins."""

    def __init__(self) -> None:
        self.seen: dict[int, list[dict[str, Any]]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        inner = optimizer.optimizer
        groups = [*inner.param_groups, *(inner.base.param_groups if hasattr(inner, "base") else ())]
        left_out = ("params", "lr", "initial_lr")
        self.seen.setdefault(
            state.global_step,
            [{k: str(v) for k, v in group.items() if k not in left_out} for group in groups],
        )


def full_batch() -> dict[str, Any]:
    return {
        "train_dataset": Images(10, dtype=torch.float64),
        "per_device_train_batch_size": 10,
        "logging_steps": 100,
        "warmup_steps": 1,
    }


# ------------------------------------------------------------------------------------------------------ it starts anew
@everything
def test_the_second_part_is_a_training_of_its_own(kind: str, tmp_path: Path) -> None:
    settings = {"dtype": torch.float64, "visual_prompt_dropout": 0.0}
    model, groups = adapted(**settings), Groups()
    callback = PruneRewindCallback(4, "steps", **HALF)
    trainer_of(kind, tmp_path, callback, model, callbacks=(groups,), max_steps=9, **full_batch()).train()
    assert groups.seen[4] == groups.seen[0]
    assert (groups.seen[3] == groups.seen[0]) == (kind not in OWN)

    by_hand = adapted(**settings)
    start = trained_tensors(by_hand)
    first = trainer_of(kind, tmp_path, None, by_hand, max_steps=4, **full_batch())
    first.train()
    with evaluated_values(first):
        gates = prune(score_prompts(by_hand, [Images(10, dtype=torch.float64)[:]]), **HALF)
    apply_gates(by_hand, gates)
    rewind(by_hand, start)
    trainer_of(kind, tmp_path, None, by_hand, max_steps=5, **full_batch()).train()
    expected = trained_tensors(by_hand)
    for name, value in trained_tensors(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


@everything
def test_a_run_that_ran_out_of_memory_starts_with_a_new_optimizer(kind: str, tmp_path: Path) -> None:
    for at_step in (2, 4):
        RunsShort.at_step, RunsShort.has_failed = at_step, False
        groups, watch = Groups(), Watch()
        model = adapted()
        start = trained_tensors(model)
        trainer = trainer_of(
            kind,
            tmp_path,
            PruneRewindCallback(3, "steps", **HALF),
            model,
            watch=watch,
            callbacks=(groups,),
            trainer_class=RunsShort,
            auto_find_batch_size=True,
            max_steps=6,
        )
        begun: list[Any] = []

        class Begin(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, begun: Any = begun, **kwargs: Any) -> None:
                if state.global_step == 0:
                    again = Groups()
                    again.on_step_begin(args, state, control, **kwargs)
                    begun.append((again.seen[0], len(kwargs["optimizer"].state)))

        trainer.add_callback(Begin())
        trainer.train()
        assert RunsShort.has_failed and len(begun) == 2 and begun[0] == begun[1]
        assert_same_bits(watch.values[0], start)


# ------------------------------------------------------------------------------------------------- and resumes exactly
@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("target", ["init", "early", "none"])
@pytest.mark.parametrize("kind", OWN)
def test_a_resumed_run_equals_the_straight_run_to_the_bit(
    kind: str, target: str, evaluated: bool, tmp_path: Path
) -> None:
    """Also where checkpoints are written in the middle of training, with the values that are trained in them."""
    settings: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "warmup_steps": 1}
    if evaluated:
        settings |= {"eval_strategy": "steps", "eval_steps": 2}

    def callback() -> PruneRewindCallback:
        return PruneRewindCallback(rewind_to=target, early_steps=2 if target == "early" else 0, **HALF)

    straight = trainer_of(kind, tmp_path, callback(), **settings)
    straight.train()
    for step in (1, 2, 3, 4, 5):
        resumed = trainer_of(kind, tmp_path, callback(), adapted(seed=9), **settings)
        resumed.train(str(tmp_path / f"checkpoint-{step}"))
        assert_same_bits(state_of(resumed.model), state_of(straight.model))
        assert history_of(resumed) == history_of(straight)


# ------------------------------------------------------------------------------------------------------- schedule-free
def mean_of_z(z: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([values[name] for values in z]).mean(0) for name in z[0]}


class Positions(TrainerCallback):
    """Notes what a schedule-free optimizer has at z after each step, and what would be evaluated."""

    def __init__(self) -> None:
        self.z: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        states = kwargs["optimizer"].state
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.z.append({name: states[p]["z"].clone() for name, p in names.items()})


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("target", ["none", "early"])
def test_what_a_schedule_free_optimizer_evaluates_is_what_is_scored_and_kept(
    target: str, evaluated: bool, tmp_path: Path
) -> None:
    """With `"none"` and `"early"` the second part starts from the average of z, just evaluated or not."""
    positions, model, watch = Positions(), adapted(dtype=torch.float64), Watch()
    scored: list[dict[str, Tensor]] = []

    class Scoring(Trainer):
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not model.training and self.state.global_step == 4:
                scored.append(trained_tensors(model))
            return super().compute_loss(model, *args, **kwargs)

    given = {"rewind_to": target, "early_steps": 2 if target == "early" else 0}
    callback = PruneRewindCallback(4, "steps", prune_tokens=0.25, prune_segments=0.25, **given)
    trainer_of(
        "schedule-free",
        tmp_path,
        callback,
        model,
        callbacks=(positions,),
        watch=watch,
        trainer_class=Scoring,
        max_steps=6,
        train_dataset=Images(dtype=torch.float64),
        eval_dataset=Images(9, seed=1, dtype=torch.float64),
        **({"eval_strategy": "steps", "eval_steps": 2} if evaluated else {}),
    ).train()
    evaluated_then = mean_of_z(positions.z[:4])
    for name, value in scored[-1].items():
        torch.testing.assert_close(value, evaluated_then[name], rtol=1e-9, atol=1e-11)
    expected = mean_of_z(positions.z[: 2 if target == "early" else 4])
    for name, value in watch.values[4].items():
        torch.testing.assert_close(value[value != 0], expected[name][value != 0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("evaluated", [True, False])
def test_looking_at_evaluated_values_leaves_no_trace(evaluated: bool, tmp_path: Path) -> None:
    """Noting the values to rewind to after two steps changes no bit of the first part."""
    found = []
    for given in ({}, {"rewind_to": "early", "early_steps": 2}, {"rewind_to": "early", "early_steps": 3}):
        watch = Watch()
        settings = {"eval_strategy": "steps", "eval_steps": 2} if evaluated else {}
        callback = PruneRewindCallback(5, "steps", **given, **HALF)
        trainer_of("schedule-free", tmp_path, callback, watch=watch, max_steps=6, **settings).train()
        found.append(watch.values)
    for others in found[1:]:
        for step in range(5):
            assert_same_bits(others[step], found[0][step])


def test_a_quality_that_evaluates_leaves_no_trace_before_a_resume(tmp_path: Path) -> None:
    """The Trainer's evaluation swaps values, and swapping back would round."""
    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    settings |= {"compute_metrics": lambda prediction: {"first": float(prediction.predictions[0, 0])}}

    def callback() -> PruneRewindCallback:
        return PruneRewindCallback(quality="first", token_ratios=[0.0, 0.5], segment_ratios=[0.0])

    straight = trainer_of("schedule-free", tmp_path, callback(), **settings)
    straight.train()
    for step in (1, 2):
        resumed = trainer_of("schedule-free", tmp_path, callback(), adapted(seed=9), **settings)
        resumed.train(str(tmp_path / f"checkpoint-{step}"))
        assert_same_bits(state_of(resumed.model), state_of(straight.model))


# ---------------------------------------------------------------------------------------------- float16, evaluations
def test_the_scaler_of_float16_gradients_starts_anew(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    parameter = nn.Parameter(torch.ones(2))
    optimizer = Estimating([parameter])
    trainer: Any = SimpleNamespace(optimizer=optimizer, accelerator=SimpleNamespace(scaler=scaler))
    start = OptimizerStart.of(trainer)
    start.save(tmp_path / "start.pt")
    before = copy.deepcopy(scaler.state_dict())
    for _ in range(3):
        scaler.scale((parameter * 3).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 8192.0
    OptimizerStart.load(tmp_path / "start.pt").restore(trainer)
    assert scaler.state_dict() == before and scaler.get_scale() == 1024.0
    assert "d_hat" not in optimizer.param_groups[0] and optimizer.param_groups[0]["betas"] == (0.9, 0.99)


def test_an_own_evaluation_is_given_evaluated_values(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    positions, model = Positions(), adapted(dtype=torch.float64)

    def quality(model: Any) -> float:
        seen.append(trained_tensors(model))
        return 0.0

    callback = PruneRewindCallback(2, "steps", quality=ModelQuality(quality), token_ratios=[0.0], segment_ratios=[0.0])
    data = {"train_dataset": Images(dtype=torch.float64), "eval_dataset": Images(9, dtype=torch.float64)}
    trainer_of("schedule-free", tmp_path, callback, model, callbacks=(positions,), max_steps=4, **data).train()
    expected = mean_of_z(positions.z[:2])
    for name, value in seen[-1].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)
