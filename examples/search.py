# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`finetune.py --search N`: searches the settings of a method with Optuna, through `Trainer.hyperparameter_search`.

A trial trains the method as it is trained afterwards, with the same seed, and is judged by the accuracy of its last
epoch on the validation images; none sees a test image. One that falls behind half of the others after an epoch is
ended. The first trial has the settings of a run without a search, so that nothing worse than these is chosen.

Trials lie in `OUTPUT_DIR/METHOD/search.log`, a journal of Optuna (`optuna-dashboard` opens it), from which a search
that was stopped goes on to the same trials as without the stop; `search.json` beside it is for reading.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from comparison import essence
from finetune_options import RECIPES, ModelArguments
from progress import MethodProgress, show_progress
from transformers import TrainerCallback, set_seed
from transformers.utils import logging


if TYPE_CHECKING:
    import optuna
    from datasets import Dataset
    from torch import nn
    from transformers import Trainer, TrainingArguments


class Range(NamedTuple):
    """The values between two, evenly over decades."""

    low: float
    high: float


PROMPTS = Range(3e-5, 1e-1)
"""Rates of prompts: tasks near the backbone want the lowest, tasks far from it the highest (docs/settings.md)."""
HEAD_RATES = Range(3e-5, 3e-3)
RATES = {
    "e2vpt": PROMPTS,
    "vpt-deep": PROMPTS,
    "vpt-shallow": PROMPTS,
    "lora": Range(1e-4, 1e-2),
    "full": Range(3e-6, 3e-4),
}
NUM_PROMPTS = {"num_visual_prompts": Range(2, 50), "num_kv_prompts": Range(1, 20)}
WORDS = {
    "learning_rate": "rate {:.1e}",
    "head_learning_rate": "head's rate {:.1e}",
    "num_visual_prompts": "{} visual prompts",
    "num_kv_prompts": "{} key-value prompts",
    "layers": "layers: {}",
}
TRIALS, RESULT = "search.log", "search.json"
JUDGED_FROM = 4  # finished trials before one is ended early


def searched_method(method: str) -> str:
    """The method whose search another takes its settings from: pruned or not, prompts are the same."""
    return "e2vpt" if method == "e2vpt-pruned" else method


def free_settings(method: str, model_args: ModelArguments, args: TrainingArguments) -> list[str]:
    """What a search may change: what the method has and the user has left at its default."""
    usual, found = ModelArguments(), []
    if method in RATES and args.learning_rate is None:
        found.append("learning_rate")
    if args.head_learning_rate is None:
        found.append("head_learning_rate")
    if method in ("e2vpt", "vpt-deep", "vpt-shallow") and model_args.num_visual_prompts == usual.num_visual_prompts:
        found.append("num_visual_prompts")
    if method == "e2vpt" and model_args.num_kv_prompts == usual.num_kv_prompts:
        found.append("num_kv_prompts")
    if method in ("e2vpt", "vpt-deep") and model_args.layers_to_transform is None:
        found.append("layers")
    return found


def layer_choices(count: int) -> dict[str, list[int] | None]:
    """The layers that deep prompts may stand in, by name."""
    starts = {"all": 0, "last three quarters": count // 4, "last half": count // 2, "last quarter": count - count // 4}
    found: dict[str, list[int] | None] = {}
    for name, start in starts.items():
        layers = None if start == 0 else list(range(start, count))
        if layers not in found.values() and layers != []:
            found[name] = layers
    return found


def check_search(validation: Dataset, args: TrainingArguments) -> str:
    """
    Makes sure that validation images can tell settings apart, and says how well they can.

    Raises:
        ValueError: They cannot, or the run is of a kind that cannot be searched.
    """
    labels = validation["label"]
    if len(set(labels)) < 2:
        name = validation.features["label"].int2str(labels[0])
        raise ValueError(
            f"--search compares settings on the validation images, which are all of the class {name}: give it some of "
            "every class (--validation_dir, or a larger --train_val_split)."
        )
    if args.world_size > 1:
        raise ValueError(
            "--search runs in one process: search without torchrun, then pass the settings that it prints to a run "
            "of several."
        )
    if args.load_best_model_at_end:
        raise ValueError("--search judges the last epoch of every trial: leave --load_best_model_at_end out.")
    return f"Settings are searched on the {len(labels):,} validation images, of which one is {1 / len(labels):.1%}."


def forget_searches(folder: str | Path, methods: Iterable[str]) -> None:
    """Removes the trials of methods."""
    for method in methods:
        for name in (TRIALS, RESULT):
            (Path(folder) / method / name).unlink(missing_ok=True)


@dataclass
class Chosen:
    """The settings that a search has chosen.

    Attributes:
        settings: by name, for `finetune.py`; layers by what they are called.
        accuracy: on the validation images, after the last epoch of the trial.
        trials: how many there were.
        pruned: how many of them were ended early.
    """

    settings: dict[str, Any]
    accuracy: float
    trials: int
    pruned: int


class Search:
    """The search of one method.

    Args:
        method: whose settings are searched.
        model_args: the model's settings, and as `search` how many trials there are in the end.
        args: the training arguments of the method (`recipe_of`), changed as trials need them.
        free: names of the settings that are searched (`free_settings`).
        facts: of the comparison; trials count for the very settings and images that they were made with.
        num_layers: layers that deep prompts may stand in.

    Attributes:
        count: how many trials there are in the end, those that are kept included.
    """

    def __init__(
        self,
        method: str,
        model_args: ModelArguments,
        args: Any,
        free: list[str],
        facts: dict[str, Any],
        num_layers: int,
    ) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(
            optuna.logging.INFO if logging.get_verbosity() < logging.WARNING else optuna.logging.ERROR
        )
        assert model_args.search is not None
        self.method, self.count = method, model_args.search
        self.model_args, self.args, self.free = model_args, args, free
        self.layers = layer_choices(num_layers)
        self.folder = Path(args.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / TRIALS
        self.storage = JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
        self.facts = {**essence(facts), "settings": {n: v for n, v in facts["settings"].items() if n != "search"}}
        made_with = json.dumps([self.facts, free, self.layers], sort_keys=True)
        self.name = f"{method}, {hashlib.sha256(made_with.encode()).hexdigest()[:12]}"
        self.study = optuna.create_study(
            storage=self.storage, study_name=self.name, direction="maximize", load_if_exists=True
        )

    # -------------------------------------------------------------------------------------------------------- settings
    def usual(self) -> dict[str, Any]:
        """The settings of a run without a search."""
        recipe = RECIPES[self.method]
        prompts = {name: getattr(self.model_args, name) for name in NUM_PROMPTS}
        mine = next((n for n, layers in self.layers.items() if layers == self.model_args.layers_to_transform), "all")
        usual = {**recipe._asdict(), **prompts, "layers": mine}
        return {name: usual[name] for name in self.free}

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """The settings of a trial, the same however often they are asked for."""
        found: dict[str, Any] = {}
        for name in self.free:
            if name == "layers":
                found[name] = trial.suggest_categorical(name, list(self.layers))
            elif name in NUM_PROMPTS:
                found[name] = trial.suggest_int(name, *map(int, NUM_PROMPTS[name]), log=True)
            else:
                span = RATES[self.method] if name == "learning_rate" else HEAD_RATES
                found[name] = trial.suggest_float(name, *span, log=True)
        return found

    def with_settings(self, settings: dict[str, Any]) -> ModelArguments:
        """The model's settings with those of a trial."""
        changed = {name: value for name, value in settings.items() if name in NUM_PROMPTS}
        if "layers" in settings:
            changed["layers_to_transform"] = self.layers[settings["layers"]]
        return replace(self.model_args, **changed)

    # ---------------------------------------------------------------------------------------------------------- trials
    @property
    def finished(self) -> list[optuna.trial.FrozenTrial]:
        """The trials that have an accuracy, those that were ended early included, in their order."""
        return [trial for trial in self.study.trials if trial.state.name in ("COMPLETE", "PRUNED")][: self.count]

    def run(
        self,
        make_trainer: Callable[[Callable[[Any], nn.Module], TrainingArguments], Trainer],
        make_model: Callable[[ModelArguments], nn.Module],
        tell: Callable[[str], None],
    ) -> Chosen:
        """Runs the trials that are missing, writes them down, and chooses.

        Args:
            make_trainer: of a `model_init` and training arguments; shows no bar of its own.
            make_model: the model of a method with settings of its own.
            tell: prints a line.
        """
        from optuna.pruners import MedianPruner
        from optuna.samplers import TPESampler

        kept = len(self.finished)
        if kept:
            tell(f"{kept} of {self.count} trials of {self.method} kept, from {self.folder / TRIALS}.")
        if kept < self.count:
            self.args.eval_strategy, self.args.save_strategy = "epoch", "no"

            def model_init(trial: optuna.Trial | None) -> nn.Module:
                settings = self.usual() if trial is None else self.draw(trial)
                model = make_model(self.with_settings(settings))
                set_seed(self.args.seed)  # from here on the random numbers are those of the training afterwards
                return model

            trainer = make_trainer(model_init, self.args)
            trainer.add_callback(KeepRandomNumbers())
            steps = -(-len(trainer.get_train_dataloader()) // self.args.gradient_accumulation_steps)
            if not kept and not any(trial.state.name == "WAITING" for trial in self.study.trials):
                self.study.enqueue_trial(self.usual())
            while len(self.finished) < self.count:
                number = len(self.finished)
                trainer.remove_callback(MethodProgress)
                show_progress(trainer, f"search of {self.method}, trial {number + 1} of {self.count}")
                trainer.hyperparameter_search(
                    lambda trial: {n: v for n, v in self.draw(trial).items() if n == "learning_rate"},
                    compute_objective=lambda metrics: metrics["eval_accuracy"],
                    n_trials=1,
                    direction="maximize",
                    backend="optuna",
                    storage=self.storage,
                    study_name=self.name,
                    load_if_exists=True,
                    # a seed for every trial: with one for all, a search that goes on would draw the same again
                    sampler=TPESampler(seed=self.args.seed + number, n_startup_trials=max(4, self.count // 3)),
                    pruner=MedianPruner(n_startup_trials=JUDGED_FROM, n_warmup_steps=steps + 1),
                )
                self.write()
                tell(self.line(number))
        chosen = self.write()
        tell(
            f"Chosen for {self.method}: {in_words(chosen.settings)}; validation accuracy {chosen.accuracy:.3f}, "
            f"with the usual settings {self.finished[0].value:.3f}. All trials are in {self.folder / RESULT}."
        )
        return chosen

    def line(self, number: int) -> str:
        """What is printed of a finished trial."""
        trial = self.finished[number]
        best = max(other.value for other in self.finished if other.state.name == "COMPLETE")
        accuracy = f"{trial.value:.3f}" + ("" if trial.state.name == "COMPLETE" else ", ended early")
        label = f"{self.method}, trial {number + 1} of {self.count}"
        return f"{label}: {in_words(trial.params)}: {accuracy} (best {best:.3f})"

    def write(self) -> Chosen:
        """Writes all trials and the best of them, in one piece, and returns that; of equal ones, the earliest."""
        trials = self.finished
        best = max((t for t in trials if t.state.name == "COMPLETE"), key=lambda trial: (trial.value, -trial.number))
        pruned = sum(trial.state.name == "PRUNED" for trial in trials)
        chosen = Chosen(best.params, best.value, len(trials), pruned)
        content = {
            **self.facts,
            "method": self.method,
            "chosen": asdict(chosen),
            "layers": {name: layers or "all" for name, layers in self.layers.items()},
            "trials": [
                {
                    "trial": number,
                    "settings": trial.params,
                    "accuracy": trial.value,
                    "state": "finished" if trial.state.name == "COMPLETE" else "ended early",
                    "accuracies": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
                    "seconds": trial.duration.total_seconds(),
                }
                for number, trial in enumerate(trials, 1)
            ],
        }
        written = self.folder / f"{RESULT}.tmp"
        written.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(written, self.folder / RESULT)
        return chosen


class KeepRandomNumbers(TrainerCallback):
    """Evaluations draw no random numbers from training, so that a trial trains as a run that is not evaluated."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = torch.get_rng_state()

    on_epoch_end = on_train_begin

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.set_rng_state(self.before)


def in_words(settings: dict[str, Any]) -> str:
    """Settings as they are printed."""
    return ", ".join(WORDS[name].format(value).replace("e-0", "e-") for name, value in settings.items())
