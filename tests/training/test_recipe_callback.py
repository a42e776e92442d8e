# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`RecipeCallback` inside a Trainer: rates by part, heads that start and are saved plain, resuming, rewinding."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging

from peft_e2vpt import PruneRewindCallback, RecipeCallback, create_e2vpt_optimizer
from peft_e2vpt.training.callback import HEADS_FILE
from peft_e2vpt.training.head_start import standardised_layers
from peft_e2vpt.training.optimizer import part_of_parameters
from tests.support.models import build
from tests.support.training import HALF, Images, Watch, adapted, arguments, assert_same_bits, history_of, state_of
from tests.support.training import trainer_for as make_trainer


pytestmark = pytest.mark.training

HEAD = "base_model.model.classifier.modules_to_save.default"
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}


def trainer_for(folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    return make_trainer(folder, None, callbacks=callbacks, **settings)


def rates_of(trainer: Trainer) -> dict[str, set[float]]:
    parts, rates = part_of_parameters(trainer.model), {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates.setdefault(parts[parameter], set()).add(group["lr"])
    return rates


@pytest.fixture
def messages(caplog):
    transformers_logging.get_logger("peft_e2vpt").warning_once.__wrapped__  # noqa: B018  (a cache of its own)
    type(logging.getLogger("peft_e2vpt")).warning_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="peft_e2vpt"):
        yield caplog


# ------------------------------------------------------------------------------------------------------ learning rates
@pytest.mark.parametrize(
    ("settings", "learning_rate", "prompts", "kv_prompts", "head"),
    [
        ({}, 5e-5, 6e-3, 6e-3, 3e-4),  # the Trainer's default is for weights
        ({}, 0.5, 0.5, 0.5, 3e-4),
        ({"learning_rate": 0.25}, 0.5, 0.25, 0.25, 3e-4),
        ({"kv_learning_rate": 0.125, "head_learning_rate": 0.25}, 0.5, 0.5, 0.125, 0.25),
    ],
)
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_prompts_and_head_have_rates_of_their_own(tmp_path, settings, learning_rate, prompts, kv_prompts, head, optim):
    trainer = trainer_for(tmp_path, RecipeCallback(**settings), learning_rate=learning_rate, optim=optim)
    trainer.create_optimizer()
    assert rates_of(trainer) == {"visual_prompts": {prompts}, "kv_prompts": {kv_prompts}, "head": {head}}
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {*map(id, trained)} == {*map(id, held)} and len(trained) == len(held)


def test_weight_decay_is_the_trainers(tmp_path):
    decays = []
    for callbacks in ((), (RecipeCallback(),)):
        trainer = trainer_for(tmp_path, *callbacks, weight_decay=0.1)
        trainer.create_optimizer()
        names = {parameter: name for name, parameter in trainer.model.named_parameters()}
        groups = trainer.optimizer.param_groups
        decays.append({names[p]: group["weight_decay"] for group in groups for p in group["params"]})
    loop = create_e2vpt_optimizer(trainer.model, weight_decay=0.1)
    decays.append({names[p]: group["weight_decay"] for group in loop.param_groups for p in group["params"]})
    assert decays[0] == decays[1] == decays[2] and set(decays[0].values()) == {0.0, 0.1}


def test_the_schedule_scales_all_alike(tmp_path):
    seen = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append({part: rates.copy().pop() for part, rates in rates_of(trainer).items()})

    trainer = trainer_for(tmp_path, RecipeCallback(learning_rate=0.01), Rates(), warmup_steps=3)
    trainer.train()
    ratios = {round(rates["visual_prompts"] / rates["head"], 9) for rates in seen[1:]}
    assert ratios == {round(0.01 / 3e-4, 9)}
    assert max(rates["head"] for rates in seen) == pytest.approx(3e-4)


def test_a_plain_model_has_a_rate_for_its_head(tmp_path):
    model, _ = build("vit")
    trainer = Trainer(model, arguments(tmp_path, learning_rate=1e-4), callbacks=[RecipeCallback()])
    trainer.create_optimizer()
    assert rates_of(trainer) == {"others": {1e-4}, "head": {3e-4}}


@pytest.mark.parametrize(
    "callbacks",
    [(), (RecipeCallback(learning_rate=5e-5),), (PruneRewindCallback(**HALF),)],
    ids=["none", "recipe", "pruning"],
)
def test_prompts_that_train_with_the_trainers_default_warn(tmp_path, messages, callbacks):
    trainer_for(tmp_path, *callbacks, learning_rate=5e-5).train()
    assert sum("the Trainer's default, which is for weights" in text for text in messages.messages) == 1


def test_a_chosen_rate_and_a_loop_do_not_warn(tmp_path, messages):
    trainer_for(tmp_path, max_steps=1, learning_rate=1e-3).train()
    adapted().train()(**{key: value[None] for key, value in Images(1)[0].items()}).loss.backward()
    assert not any("the Trainer's default" in text for text in messages.messages)


def test_the_recipe_itself_does_not_warn(tmp_path, messages):
    trainer_for(tmp_path, RecipeCallback(), PruneRewindCallback(**HALF), learning_rate=5e-5).train()
    assert not [record for record in messages.records if record.levelno >= logging.WARNING]


def test_an_optimizer_that_was_made_without_the_callback_keeps_its_rates_and_says_so(tmp_path, messages):
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=1, lr_scheduler_type="constant", warmup_steps=0),
        train_dataset=Images(),
        optimizers=(optimizer, None),
        callbacks=[RecipeCallback()],
    )
    trainer.train()
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert any("made without the learning rates of RecipeCallback" in text for text in messages.messages)


@pytest.mark.parametrize("name", ["learning_rate", "kv_learning_rate", "head_learning_rate"])
def test_a_rate_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be above 0"):
        RecipeCallback(**{name: 0.0})


# --------------------------------------------------------------------------------------------------------------- heads
def test_training_begins_with_the_probe_and_ends_with_a_plain_head(tmp_path):
    first: list[float] = []

    class First(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not first:
                first.append(trainer.evaluate(Images(64))["eval_loss"])
                assert list(standardised_layers(trainer.model)) == [HEAD]

    callback = RecipeCallback()
    trainer = trainer_for(tmp_path, callback, First(), train_dataset=Images(64))
    random_head = trainer.evaluate(Images(64))["eval_loss"]
    trainer.train()
    assert callback.head_start.layers == [HEAD] and callback.head_start.num_samples == 64
    assert first[0] < 0.5 * random_head
    assert not standardised_layers(trainer.model)


def test_the_draw_of_batches_is_the_same_as_without_the_callback(tmp_path):
    read = []

    class Noting(Images):
        def __getitem__(self, index):
            read[-1].append(index)
            return super().__getitem__(index)

    for callbacks in ((), (RecipeCallback(),)):
        read.append([])
        trainer_for(tmp_path, *callbacks, train_dataset=Noting()).train()
    start, training = read[1][:21], read[1][21:]
    assert sorted(start) == list(range(21)) and training == read[0]


@pytest.mark.parametrize("max_samples", [8, 1000])
def test_the_images_to_start_with_are_drawn_from_all(tmp_path, max_samples):
    callback = RecipeCallback(max_samples=max_samples)
    trainer_for(tmp_path, callback, max_steps=1).train()
    assert callback.head_start.num_samples == min(max_samples, 21)


def test_checkpoints_hold_the_plain_head(tmp_path):
    trainer = trainer_for(tmp_path, RecipeCallback(), **SAVING)
    trainer.train()
    for entry in (entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] % 5 == 0):
        folder = tmp_path / f"checkpoint-{entry['step']}"
        assert {path.name for path in folder.glob("*.safetensors")} == {HEADS_FILE, "adapter_model.safetensors"}
        loaded = PeftModel.from_pretrained(build("vit")[0], folder)
        again = Trainer(loaded, arguments(tmp_path / "again"))
        assert again.evaluate(Images(9, seed=1))["eval_loss"] == pytest.approx(entry["eval_loss"], rel=1e-4)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = trainer_for(tmp_path, RecipeCallback(learning_rate=0.5), **SAVING, load_best_model_at_end=True)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)
    assert not standardised_layers(trainer.model)


def run(folder: Path, pruned: str, resume: int | None = None, **settings: Any) -> dict[str, Any]:
    pruning = PruneRewindCallback(**HALF)
    callbacks = {"no": [RecipeCallback()], "after": [RecipeCallback(), pruning], "before": [pruning, RecipeCallback()]}
    watch = Watch()
    trainer = trainer_for(
        folder,
        *callbacks[pruned],
        watch,
        model=adapted(**({"seed": 9} if resume else {})),
        **{**SAVING, **settings},
    )
    trainer.train(str(folder / f"checkpoint-{resume}") if resume else None)
    return {"state": state_of(trainer.model), "history": history_of(trainer), "watch": watch}


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize(("pruned", "resume"), [("no", 5), ("no", 20), ("after", 5), ("before", 10), ("after", 15)])
def test_a_resumed_run_equals_the_straight_run(tmp_path, pruned, resume, restored):
    straight = run(tmp_path, pruned)
    resumed = run(tmp_path, pruned, resume, restore_callback_states_from_checkpoint=restored)
    assert_same_bits(resumed["state"], straight["state"])
    assert resumed["history"] == straight["history"]


@pytest.mark.parametrize("pruned", ["after", "before"])
def test_rewinding_returns_to_the_start_of_the_head(tmp_path, pruned):
    values = run(tmp_path, pruned)["watch"].values
    kept = [name for name in values[0] if "modules_to_save" in name]
    assert kept and all(torch.equal(values[0][name], values[12][name]) for name in kept)
    assert not all(torch.equal(values[0][name], values[11][name]) for name in kept)


def test_a_checkpoint_without_the_head_says_what_to_do(tmp_path):
    run(tmp_path, "no")
    (tmp_path / "checkpoint-5" / HEADS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"resume without it, or with RecipeCallback\(start_head=False\)"):
        run(tmp_path, "no", 5)


def test_a_damaged_file_says_what_to_do(tmp_path):
    run(tmp_path, "no")
    (tmp_path / "checkpoint-5" / HEADS_FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged .*: resume from another checkpoint"):
        run(tmp_path, "no", 5)


def test_without_a_start_only_the_rates_are_set(tmp_path):
    trainer = trainer_for(tmp_path, RecipeCallback(start_head=False), **SAVING)
    trainer.train()
    assert not standardised_layers(trainer.model)
    assert not (tmp_path / "checkpoint-5" / HEADS_FILE).exists()


def test_a_compiled_name_and_a_second_training_do_no_harm(tmp_path):
    trainer = trainer_for(tmp_path, RecipeCallback(), max_steps=3)
    trainer.train()
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first + 1
    assert not standardised_layers(trainer.model)


def test_the_file_of_the_adapter_has_the_format_of_one_trained_without(tmp_path):
    shapes = []
    for callbacks in ((), (RecipeCallback(),)):
        trainer = trainer_for(tmp_path / str(len(callbacks)), *callbacks, max_steps=1)
        trainer.train()
        trainer.save_model()
        tensors = load_file(tmp_path / str(len(callbacks)) / "adapter_model.safetensors")
        shapes.append({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    assert shapes[0] == shapes[1]


def test_a_callback_that_is_added_later_starts_the_head_and_warns_of_the_rates(tmp_path, messages):
    trainer = trainer_for(tmp_path, max_steps=1)
    callback = RecipeCallback()
    trainer.add_callback(callback)
    trainer.train()
    assert callback.head_start.layers
    assert any("pass it as Trainer(callbacks=[...])" in text for text in messages.messages)


def test_a_loop_needs_two_functions():
    from peft_e2vpt import fold_heads, start_heads

    torch.manual_seed(0)
    model = adapted()
    loader = torch.utils.data.DataLoader(Images(), batch_size=7, shuffle=True)
    optimizer = create_e2vpt_optimizer(model, torch.optim.SGD, momentum=0.9)
    start_heads(model, loader)
    for batch in loader:
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    fold_heads(model)
    assert isinstance(model, nn.Module) and not standardised_layers(model)
