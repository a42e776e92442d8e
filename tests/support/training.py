# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Short trainings of tiny models with transformers' `Trainer`, and callbacks that watch them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from peft_e2vpt import E2VPTConfig, PruneRewindCallback
from tests.support.models import NUM_LABELS, build


NUM_PROMPTS, NUM_SEGMENTS = 4, 8
SETTINGS: dict[str, Any] = {
    "num_visual_prompts": NUM_PROMPTS,
    "num_kv_prompts": 2,
    "num_segments": NUM_SEGMENTS,
    "visual_prompt_dropout": 0.1,
    "seed": 0,
}
HALF: dict[str, Any] = {"prune_tokens": 0.5, "prune_segments": 0.25}


class Images(Dataset):
    """Noise on a pattern for every label."""

    def __init__(self, count: int = 21, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        patterns = torch.randn(NUM_LABELS, 3, 32, 32, generator=torch.Generator().manual_seed(7))
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(NUM_LABELS, (count,), generator=generator)
        noise = torch.randn(count, 3, 32, 32, generator=generator)
        self.pixels = (patterns[self.labels] + 2 * noise).to(dtype)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def adapted(name: str = "vit", adapter_name: str = "default", **settings: Any) -> PeftModel:
    """The tiny model `name` with prompts at their start; `dtype` is that of the backbone."""
    of_base = {key: settings.pop(key) for key in ("dtype",) if key in settings}
    return get_peft_model(build(name, **of_base)[0], E2VPTConfig(**{**SETTINGS, **settings}), adapter_name)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """24 optimizer steps, 6 in an epoch."""
    defaults: dict[str, Any] = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.05,
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **settings})


class Watch(TrainerCallback):
    """Notes what every step begins with, and with which learning rate and weight decay it ends."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, Tensor]] = {}
        self.optimizer_states: dict[int, int] = {}
        self.rates: list[float] = []
        self.decays: list[list[float]] = []
        self.logs: list[dict[str, float]] = []
        self.evaluated_at: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.values[state.global_step] = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }
        self.optimizer_states[state.global_step] = len(kwargs["optimizer"].state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.decays.append([group["weight_decay"] for group in optimizer.param_groups])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated_at.append(state.global_step)


def trainer_for(
    folder: Path,
    callback: PruneRewindCallback | None,
    model: PeftModel | None = None,
    watch: TrainerCallback | None = None,
    trainer_class: type[Trainer] = Trainer,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    compute_metrics: Any = None,
    **settings: Any,
) -> Trainer:
    given = [one for one in (callback, *callbacks, watch) if one is not None]
    return trainer_class(
        model if model is not None else adapted(),
        arguments(folder, **settings),
        train_dataset=train_dataset if train_dataset is not None else Images(),
        eval_dataset=eval_dataset if eval_dataset is not None else Images(9, seed=1),
        callbacks=given,
        compute_metrics=compute_metrics,
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


def history_of(trainer: Trainer) -> list[dict[str, float]]:
    """The log of a training without the times that it took."""
    timed = ("runtime", "per_second", "total_flos", "train_loss")
    entries = [{k: v for k, v in e.items() if not k.endswith(timed)} for e in trainer.state.log_history]
    return [entry for entry in entries if entry.keys() - {"epoch", "step"}]


adapted("vit"), adapted("swin")
gc.freeze()  # every training collects garbage, and need not look through the modules that are loaded by now


__all__ = [
    "HALF",
    "NUM_PROMPTS",
    "NUM_SEGMENTS",
    "SETTINGS",
    "Images",
    "Watch",
    "adapted",
    "arguments",
    "assert_same_bits",
    "history_of",
    "state_of",
    "trainer_for",
]


def learning_rates(kind: str, num_steps: int, warmup_steps: int, settings: dict[str, Any] | None) -> list[float]:
    """The learning rates of a schedule, from its first step to its last."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    scheduler = get_scheduler(kind, optimizer, warmup_steps, num_steps, settings)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found
