# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`Trainer.hyperparameter_search` with the callbacks of this package, and Trainers that train more than once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import Trainer, TrainerCallback

from peft_e2vpt import PruneRewindCallback, PruningReport, RecipeCallback, trained_tensors
from peft_e2vpt.training.head_start import standardised_layers
from peft_e2vpt.training.optimizer import part_of_parameters
from tests.support.training import HALF, Images, Watch, adapted, arguments, assert_same_bits, history_of, state_of


optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)

pytestmark = pytest.mark.training

CALLBACKS: dict[str, Callable[[], list[TrainerCallback]]] = {
    "recipe": lambda: [RecipeCallback()],
    "recipe, pruning": lambda: [RecipeCallback(), PruneRewindCallback(**HALF)],
    "pruning, recipe": lambda: [PruneRewindCallback(**HALF), RecipeCallback()],
}
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 12}


class Fails(TrainerCallback):
    """Ends a training at a step with an error."""

    def __init__(self, step: int, error: type[BaseException] = OSError) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and state.trial_params in (None, {"fate": "fails"}):
            raise self.error("a full disk")


class Rates(TrainerCallback):
    """Notes the learning rates by part that every training begins with."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parts = part_of_parameters(kwargs["model"])
        groups = kwargs["optimizer"].param_groups
        self.seen.append({parts[p]: group.get("initial_lr", group["lr"]) for group in groups for p in group["params"]})


class PrunedByFate(optuna.pruners.BasePruner):
    """Prunes the trials that are to be pruned, when they report for the second time."""

    def prune(self, study: Any, trial: Any) -> bool:
        return trial.params.get("fate") == "is pruned" and len(trial.intermediate_values) == 2


def trainer_for(folder: Path, *callbacks: TrainerCallback, model_init: Any = None, **settings: Any) -> Trainer:
    """A Trainer that makes its models, the same every time."""
    init = model_init or (lambda: adapted())
    return Trainer(
        model_init=init,
        args=arguments(folder, **{**EVALUATED, **settings}),
        train_dataset=Images(),
        eval_dataset=Images(9, seed=1),
        callbacks=list(callbacks),
    )


def drawing(**choices: list[Any]) -> Callable[[Any], dict[str, Any]]:
    """A space of which the arguments of the Trainer get nothing."""

    def space(trial: Any) -> dict[str, Any]:
        for name, values in choices.items():
            trial.suggest_categorical(name, values)
        return {}

    return space


def search(
    trainer: Trainer, space: Callable[[Any], dict[str, Any]], trials: list[dict[str, Any]], **settings: Any
) -> Any:
    """Searches exactly these trials, and returns the study."""
    study = optuna.create_study(study_name="search", storage=(storage := optuna.storages.InMemoryStorage()))
    for trial in trials:
        study.enqueue_trial(trial)
    trainer.hyperparameter_search(
        space,
        backend="optuna",
        n_trials=len(trials),
        study_name="search",
        storage=storage,
        load_if_exists=True,
        **settings,
    )
    return study


# ------------------------------------------------------------------------------------------------------ a fresh start
@pytest.mark.parametrize("callbacks", list(CALLBACKS))
def test_a_trial_is_the_run_that_it_would_be_alone_whatever_became_of_those_before(tmp_path, callbacks):
    class Ends(TrainerCallback):
        """Notes the model and the log of trainings that come to their end."""

        def __init__(self) -> None:
            self.seen: list[tuple[dict[str, Tensor], list[dict[str, float]], list[str]]] = []

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == state.max_steps:
                self.seen.append((state_of(model), history_of(trainer), list(standardised_layers(model))))

    ends = Ends()
    trainer = trainer_for(tmp_path / "alone", *CALLBACKS[callbacks](), ends)
    trainer.train()
    trainer = trainer_for(tmp_path / "search", *CALLBACKS[callbacks](), ends, Fails(3))
    fates = ["ends", "is pruned", "ends", "fails", "ends"]
    study = search(
        trainer,
        drawing(fate=["ends", "is pruned", "fails"]),
        [{"fate": fate} for fate in fates],
        pruner=PrunedByFate(),
        catch=(OSError,),
    )
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE", "FAIL", "COMPLETE"]
    (state, history, standardised), *others = ends.seen
    assert len(others) == 3 and not standardised
    for other in others:
        assert_same_bits(other[0], state)
        assert other[1:] == (history, [])


def test_a_trial_that_optuna_ends_before_it_was_pruned_is_no_warning(tmp_path, caplog):
    trainer = trainer_for(tmp_path, PruneRewindCallback(prune_after=0.75, **HALF))
    with pytest.raises(ValueError, match="No trials are completed"):
        search(trainer, drawing(fate=["is pruned"]), [{"fate": "is pruned"}], pruner=PrunedByFate())
    assert "before it was to prune" not in caplog.text


def test_every_trial_leaves_its_own_pruning_report(tmp_path):
    def run_name(trial: Any) -> str:
        return f"decay-{trial.params['weight_decay']}"

    def space(trial: Any) -> dict[str, Any]:
        return {"weight_decay": trial.suggest_categorical("weight_decay", [0.0, 0.5])}

    callback = PruneRewindCallback(**HALF)
    trials = [{"weight_decay": 0.0}, {"weight_decay": 0.5}]
    search(trainer_for(tmp_path, callback), space, trials, hp_name=run_name)
    reports = [PruningReport.load(tmp_path / f"decay-{decay}") for decay in (0.0, 0.5)]
    assert reports[0] != reports[1] == callback.report
    assert not (tmp_path / "pruning_report.json").exists()


# ------------------------------------------------------------------------------------------------- what trials choose
SEARCHED = [
    # of the trial, of the callback: visual prompts, key-value prompts, head
    ({"learning_rate": 0.25}, {}, (0.25, 0.25, 3e-4)),
    ({"learning_rate": 5e-5}, {}, (5e-5, 5e-5, 3e-4)),  # the Trainer's default, but chosen
    ({"learning_rate": 0.25}, {"learning_rate": 0.5, "kv_learning_rate": 0.125}, (0.25, 0.125, 3e-4)),
    ({"head_learning_rate": 0.5}, {"learning_rate": 0.25, "head_learning_rate": 0.125}, (0.25, 0.25, 0.5)),
    ({"kv_learning_rate": 0.5, "learning_rate": 0.25}, {}, (0.25, 0.5, 3e-4)),
]


@pytest.mark.parametrize(("trial", "callback", "expected"), SEARCHED)
def test_the_rates_of_a_trial_are_those_of_its_training(tmp_path, trial, callback, expected):
    rates = Rates()
    trainer = trainer_for(tmp_path, RecipeCallback(**callback), rates, max_steps=1)

    def space(drawn: Any) -> dict[str, Any]:
        values = {name: drawn.suggest_float(name, 1e-5, 1, log=True) for name in trial}
        return {name: value for name, value in values.items() if name == "learning_rate"}

    search(trainer, space, [trial])
    assert [tuple(seen.values()) for seen in rates.seen] == [pytest.approx(expected)]
    assert list(rates.seen[0]) == ["visual_prompts", "kv_prompts", "head"]


def test_after_a_search_the_callback_has_its_own_rates_again(tmp_path):
    rates = Rates()
    trainer = trainer_for(tmp_path, RecipeCallback(0.5, head_learning_rate=0.25), rates, max_steps=1)
    search(trainer, drawing(head_learning_rate=[0.125]), [{"head_learning_rate": 0.125}])
    trainer.train()
    assert [seen["head"] for seen in rates.seen] == [0.125, 0.25]


def test_a_trial_can_choose_the_number_of_prompts_and_their_layers(tmp_path):
    found = []

    def space(trial: Any) -> dict[str, Any]:
        count = trial.suggest_categorical("num_visual_prompts", [2, 3])
        layers = trial.suggest_categorical("layers", ["all", "last"])
        return {"num_visual_prompts": count, "layers_to_transform": None if layers == "all" else [1]}

    class Shape(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            config = model.peft_config["default"]
            found.append((config.num_visual_prompts, config.layers_to_transform))

    trainer = trainer_for(
        tmp_path,
        RecipeCallback(),
        Shape(),
        model_init=lambda trial: adapted(**({} if trial is None else space(trial))),
        max_steps=1,
    )
    trials = [{"num_visual_prompts": 2, "layers": "last"}, {"num_visual_prompts": 3, "layers": "all"}]
    search(trainer, drawing(num_visual_prompts=[2, 3], layers=["all", "last"]), trials)
    assert found == [(2, [1]), (3, None)]


def test_a_rate_of_nothing_in_a_trial_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, RecipeCallback(), max_steps=1)
    with pytest.raises(ValueError, match="head_learning_rate must be above 0, got 0"):
        search(trainer, drawing(head_learning_rate=[0.0]), [{"head_learning_rate": 0.0}])


# --------------------------------------------------------------------------------------------- trainings after another
@pytest.mark.parametrize(
    ("callbacks", "error"),
    [*((name, KeyboardInterrupt) for name in CALLBACKS), ("recipe", OSError), ("pruning, recipe", None)],
)
def test_a_training_after_one_that_ended_in_any_way_is_the_same_as_the_first(tmp_path, callbacks, error):
    straight = trainer_for(tmp_path / "straight", *CALLBACKS[callbacks]())
    straight.train()
    trainer = trainer_for(tmp_path / "again", *CALLBACKS[callbacks]())
    if error is None:
        trainer.train()
    else:
        trainer.add_callback(fails := Fails(5, error))
        with pytest.raises(error):
            trainer.train()
        trainer.remove_callback(fails)
    trainer.train()
    assert_same_bits(state_of(trainer.model), state_of(straight.model))
    assert history_of(trainer) == history_of(straight)
    assert not standardised_layers(trainer.model)


@pytest.mark.parametrize(("callbacks", "step"), [("recipe", 4), ("recipe, pruning", 4), ("pruning, recipe", 8)])
def test_a_trainer_resumes_what_was_stopped_in_it_to_the_bit(tmp_path, callbacks, step):
    saving = {"save_strategy": "steps", "save_steps": 4}
    straight = trainer_for(tmp_path / "straight", *CALLBACKS[callbacks](), **saving)
    straight.train()
    trainer = trainer_for(tmp_path / "again", *CALLBACKS[callbacks](), Fails(step + 2, KeyboardInterrupt), **saving)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Fails)
    trainer.train(str(tmp_path / "again" / f"checkpoint-{step}"))
    assert_same_bits(state_of(trainer.model), state_of(straight.model))
    assert history_of(trainer) == history_of(straight)


def test_the_head_of_a_model_that_goes_on_after_a_stop_starts_again_and_ends_plain(tmp_path):
    model, recipe = adapted(), RecipeCallback()
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=4),
        train_dataset=Images(),
        callbacks=[recipe, Fails(2, KeyboardInterrupt)],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    first = recipe.head_start
    trainer.remove_callback(Fails)
    trainer.train()
    assert first is not None and recipe.head_start is not first
    assert not standardised_layers(model)


def test_a_retry_with_smaller_batches_has_the_start_of_the_first_try(tmp_path):
    class RunsShort(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self._train_batch_size == 4 and self.state.global_step == 8:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return super().training_step(*args, **kwargs)

    watch = Watch()
    trainer = RunsShort(
        adapted(),
        arguments(tmp_path, auto_find_batch_size=True, max_steps=12),
        train_dataset=Images(),
        callbacks=[RecipeCallback(), PruneRewindCallback(**HALF), watch],
    )
    first: list[dict[str, Tensor]] = []
    watch.on_train_begin = lambda *_, model, **__: first.append(trained_tensors(model))
    trainer.train()
    assert trainer._train_batch_size < 4 and len(first) == 2
    assert_same_bits(first[1], first[0])
    assert not standardised_layers(trainer.model)
