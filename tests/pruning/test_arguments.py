# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What pruning is asked for in the wrong words is refused when it is asked for, with the right ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer

from peft_e2vpt import PruneRewindCallback, prune
from peft_e2vpt.pruning.importance import ImportanceScores
from peft_e2vpt.pruning.preflight import find_boundary
from tests.support.adapted import adapt, config_of
from tests.support.models import build
from tests.support.training import HALF, trainer_for


NAN = float("nan")
MISTAKES = [
    *[({name: value}, name) for name in ("prune_tokens", "prune_segments") for value in ("half", "50%", [0.5], 1j)],
    *[({name: value}, name) for name in ("prune_tokens", "prune_segments") for value in (True, NAN, -1, -0.5, 50.0)],
    *[({"prune_after": value}, "prune_after") for value in ("half", True, NAN, 0, 1.0, -1, None)],
    *[({"prune_after": value, "unit": "steps"}, "prune_after") for value in ("2", 0, NAN, float("inf"))],
    *[({"max_tuned_percentage": value}, "max_tuned_percentage") for value in ("1%", True, NAN, 0, 100, -1)],
    *[({name: value}, name) for name in ("min_tokens", "min_segments") for value in ("1", 1.5, True, -1, None)],
    *[({"early_steps": value, "rewind_to": "early"}, "early_steps") for value in ("1", 1.5, True, -1)],
    *[({"max_score_batches": value}, "max_score_batches") for value in ("1", 0, -1, 0.5, True)],
    *[
        ({name: value}, name)
        for name in ("token_ratios", "segment_ratios")
        for value in ("half", 0.5, [], ["x"], [50])
    ],
    ({"greater_is_better": "yes"}, "greater_is_better"),
    ({"unit": "percent"}, "unit"),
    ({"rewind_to": None}, "rewind_to"),
    ({"quality": 3}, "quality"),
]


@pytest.mark.parametrize(("choice", "name"), MISTAKES, ids=str)
def test_a_wrong_argument_is_refused_when_the_callback_is_made(choice: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        PruneRewindCallback(**choice)
    message = str(error.value)
    assert name in message and message.endswith(".") and "got" in message


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor])
def test_numbers_of_numpy_and_torch_are_taken(kind: Any) -> None:
    callback = PruneRewindCallback(prune_tokens=kind(0.5), prune_segments=np.int64(2), min_tokens=np.int32(1))
    assert (type(callback.prune_tokens), type(callback.prune_segments), type(callback.min_tokens)) == (float, int, int)
    assert (callback.prune_tokens, callback.prune_segments) == (0.5, 2)
    assert {"prune_tokens", "prune_segments"} <= callback.exported_arguments()[0].keys()


@pytest.mark.parametrize("amount", ["half", "", [], False, NAN, 50.0])
def test_a_wrong_amount_is_refused_by_the_function_too(amount: Any) -> None:
    scores = ImportanceScores(torch.rand(2, 4), torch.rand(2, 4, 8), 1)
    with pytest.raises((ValueError, TypeError), match="prune_tokens"):
        prune(scores, amount)


def test_a_percentage_is_recognised() -> None:
    scores = ImportanceScores(torch.rand(2, 4), torch.rand(2, 4, 8), 1)
    with pytest.raises(ValueError, match=r"Cannot prune 50 of 4 prompts.*or pass a ratio: 0.5 prunes 50 % of them"):
        prune(scores, 50)
    with pytest.raises(
        ValueError, match=r"prune_tokens.*got 20.0; pass a whole number to prune so many, or 0.2 for 20 %"
    ):
        prune(scores, 20.0)


def test_a_run_of_one_step_has_no_room_for_two_parts() -> None:
    arguments = PruneRewindCallback(**HALF)
    args: Any = SimpleNamespace(gradient_accumulation_steps=1)
    state: Any = SimpleNamespace(max_steps=1, global_step=0)
    with pytest.raises(ValueError, match=r"The run has 1 optimizer steps, and one with pruning needs at least 2"):
        find_boundary(arguments, args, state, [None])


# ---------------------------------------------------------------------------------------------------- frozen, spread
def test_a_frozen_adapter_in_training_is_warned_of_with_the_remedy(tmp_path: Any) -> None:
    adapt()[0].save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(build("vit")[0], tmp_path)
    with pytest.warns(UserWarning, match=r"the adapter 'default' is frozen.*load it with is_trainable=True"):
        frozen.train()
    frozen = get_peft_model(build("vit")[0], config_of(inference_mode=True))
    trainer = trainer_for(tmp_path, None, frozen)
    with pytest.warns(UserWarning, match="is frozen, so there is nothing to train"), pytest.raises(RuntimeError):
        trainer.train()


def test_several_gpus_in_one_process_are_refused_before_the_first_step(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path, PruneRewindCallback(**HALF))
    monkeypatch.setattr(type(trainer.args), "n_gpu", property(lambda args: 2))
    monkeypatch.setattr(Trainer, "_wrap_model", lambda self, model, *args, **kwargs: model)
    with pytest.raises(ValueError, match=r"torch.nn.DataParallel.*start one process per GPU with torchrun"):
        trainer.train()
