# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A learning rate schedule in two parts, each with a warm-up and decay of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import TrainingArguments, get_scheduler
from transformers.utils import logging


logger = logging.get_logger(__name__)


class TwoPartSchedule:
    """Lets the scheduler of a running `Trainer` start again, at its first learning rate, for a second part.

    The scheduler object stays the one that the Trainer steps and saves. What it loses when it is saved, the function
    of the step, is built again here from the training arguments.

    Args:
        scheduler: the Trainer's scheduler.
        args: the training arguments.
        made_by_trainer: whether the Trainer built the scheduler from `args`, not the user.
        first_steps: optimizer steps of the first part.
        second_steps: optimizer steps of the second part.
        second_start: the scheduler's step at which the second part began, where it has begun.
        done: optimizer steps of the run so far; a checkpoint may hold the model only (`save_only_model`), and no
            scheduler that counts them.

    Raises:
        ValueError: the scheduler is of a kind that cannot start again.
    """

    def __init__(
        self,
        scheduler: Any,
        args: TrainingArguments,
        made_by_trainer: bool,
        first_steps: int,
        second_steps: int,
        second_start: int | None = None,
        done: int = 0,
    ) -> None:
        self.scheduler = scheduler
        self.second_start = second_start
        if isinstance(scheduler, ReduceLROnPlateau):
            for group in scheduler.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])  # as other schedulers do; a checkpoint keeps it
            if scheduler.last_epoch == 0:
                self._first_rates()
            return
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"The learning rate scheduler {type(scheduler).__name__} cannot start again after pruning: choose a "
                "lr_scheduler_type of TrainingArguments such as 'linear' or 'cosine', and leave the scheduler out of "
                "a DeepSpeed configuration."
            )
        if scheduler.last_epoch == 0:
            scheduler.last_epoch = done
        if made_by_trainer:
            first, second = self._rebuild(args, first_steps), self._rebuild(args, second_steps)
            scheduler.lr_lambdas = [self._join(first, second)] * len(scheduler.lr_lambdas)
        else:
            logger.warning(
                "The learning rate scheduler was passed to the Trainer by hand: after pruning it starts again as it "
                f"is, so it should be made for the {second_steps} steps of the second part."
            )
            scheduler.lr_lambdas = [self._join(function, function) for function in scheduler.lr_lambdas]
        self._apply()

    @staticmethod
    def _rebuild(args: TrainingArguments, num_steps: int) -> Any:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        return schedule.lr_lambdas[0]

    def _join(self, first: Any, second: Any) -> Any:
        def factor(step: int) -> float:
            if self.second_start is None or step < self.second_start:
                return float(first(step))
            return float(second(step - self.second_start))

        return factor

    def restart(self) -> None:
        """Begins the second part: the next optimizer step has the schedule's first learning rate."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler._reset()
            self._first_rates()
            return
        self.second_start = self.scheduler.last_epoch
        self._apply()

    def _first_rates(self) -> None:
        groups = self.scheduler.optimizer.param_groups
        for group in groups:
            group["lr"] = group["initial_lr"]
        self.scheduler._last_lr = [group["lr"] for group in groups]

    def _apply(self) -> None:
        scheduler = self.scheduler
        rates = [
            base * function(scheduler.last_epoch)
            for base, function in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
