# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a resume promises: all that it needs lies in the checkpoint, and the rest is the straight run to the bit.

Runs have 8 steps, 6 in an epoch, are pruned after 4 of them and saved after every second, where nothing else is said.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from peft_e2vpt import PruneRewindCallback, PruningReport
from peft_e2vpt.pruning.callback import TARGET_FILE
from peft_e2vpt.pruning.run_state import OPTIMIZER_FILE
from tests.support.training import (
    HALF,
    Watch,
    adapted,
    assert_same_bits,
    history_of,
    learning_rates,
    state_of,
    trainer_for,
)


pytestmark = pytest.mark.training

SHORT: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "warmup_steps": 1}


def straight_run(folder: Path, callback: PruneRewindCallback | None = None, **settings: Any) -> Trainer:
    trainer = trainer_for(folder, callback or PruneRewindCallback(**HALF), **{**SHORT, **settings})
    trainer.train()
    return trainer


def resumed_run(
    output: Path,
    checkpoint: str | Path | bool,
    callback: PruneRewindCallback | None = None,
    watch: Watch | None = None,
    **settings: Any,
) -> Trainer:
    """Goes on from a checkpoint with a model of other prompts: all has to come from the checkpoint."""
    callback = callback or PruneRewindCallback(**HALF)
    trainer = trainer_for(output, callback, adapted(seed=99), watch, **{**SHORT, **settings})
    trainer.train(resume_from_checkpoint=checkpoint if checkpoint is True else str(checkpoint))
    return trainer


def assert_same_run(found: Trainer, expected: Trainer) -> None:
    assert_same_bits(state_of(found.model), state_of(expected.model))
    assert history_of(found) == history_of(expected)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    torch.set_num_threads(1)
    yield straight_run(tmp_path_factory.mktemp("straight") / "out")


@pytest.fixture
def output(straight: Trainer, tmp_path: Path) -> Path:
    """A copy of the output folder of the straight run; a later change of it is none of the run."""
    return Path(shutil.copytree(straight.args.output_dir, tmp_path / "out"))


# ------------------------------------------------------------------------------------------------- where a run resumes
def test_all_that_a_resume_needs_lies_in_the_checkpoint(straight: Trainer) -> None:
    folder = Path(straight.args.output_dir)
    assert sorted(p.name for p in folder.iterdir()) == [
        *(f"checkpoint-{n}" for n in (2, 4, 6, 8)),
        "pruning_report.json",
    ]
    for step in (2, 4):
        assert {TARGET_FILE, OPTIMIZER_FILE} <= {p.name for p in (folder / f"checkpoint-{step}").iterdir()}
    for step in (6, 8):
        assert not {TARGET_FILE, OPTIMIZER_FILE} & {p.name for p in (folder / f"checkpoint-{step}").iterdir()}
        assert PruningReport.load(folder / f"checkpoint-{step}") == PruningReport.load(folder)


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("restore", [False, True])
def test_a_checkpoint_resumes_where_nothing_else_is_left_of_its_run(
    straight: Trainer, output: Path, step: int, restore: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved, under another name, given by a relative path from another working directory."""
    (tmp_path / "else" / "where").mkdir(parents=True)
    (output / f"checkpoint-{step}").rename(tmp_path / "else" / "renamed")
    shutil.rmtree(output)
    monkeypatch.chdir(tmp_path / "else" / "where")
    assert_same_run(resumed_run(Path("new"), "../renamed", restore_callback_states_from_checkpoint=restore), straight)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_the_last_checkpoint_of_a_moved_output_folder_is_found(
    straight: Trainer, output: Path, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for later in range(step + 2, 10, 2):
        shutil.rmtree(output / f"checkpoint-{later}")
    moved = output.rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    (moved / "pruning_report.json").unlink()
    assert_same_run(resumed_run(Path("."), True), straight)
    assert PruningReport.load(moved).step == 4


@pytest.mark.parametrize("step", [2, 6])
def test_two_runs_in_one_folder_leave_each_other_alone(straight: Trainer, output: Path, step: int) -> None:
    """The second begins from other values, is pruned earlier, and writes over some checkpoints of the first."""
    other = PruneRewindCallback(1, "steps", prune_tokens=0.25)
    model = adapted(seed=5)
    trainer_for(output, other, model, **{**SHORT, "save_steps": 4 if step == 2 else 8}).train()
    assert_same_run(resumed_run(output, output / f"checkpoint-{step}"), straight)


def test_a_run_that_writes_over_a_checkpoint_leaves_nothing_of_the_former_there(output: Path) -> None:
    straight_run(output, PruneRewindCallback(1, "steps", **HALF))
    names = {p.name for p in (output / "checkpoint-2").iterdir()}
    assert "pruning_report.json" in names and not names & {TARGET_FILE, OPTIMIZER_FILE}
    straight_run(output, PruneRewindCallback(7, "steps", **HALF))
    names = {p.name for p in (output / "checkpoint-6").iterdir()}
    assert "pruning_report.json" not in names and names >= {TARGET_FILE, OPTIMIZER_FILE}


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_is_resumed_again(straight: Trainer, output: Path, restore: bool, tmp_path: Path) -> None:
    settings = {"restore_callback_states_from_checkpoint": restore}
    resumed_run(tmp_path / "second", output / "checkpoint-2", **settings)
    shutil.rmtree(output)
    for step in (4, 6):
        again = resumed_run(tmp_path / "third", tmp_path / "second" / f"checkpoint-{step}", **settings)
        assert_same_run(again, straight)


@pytest.mark.parametrize("target", ["init", "early"])
def test_the_best_model_of_a_moved_run_is_found(target: str, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 2}
    early = {"rewind_to": "early", "early_steps": 1} if target == "early" else {}
    expected = straight_run(tmp_path / "out", PruneRewindCallback(**HALF, **early), **settings)
    straight_run(tmp_path / "again", PruneRewindCallback(**HALF, **early), **{**settings, "save_total_limit": None})
    for step in (6, 2):
        moved = shutil.copytree(tmp_path / "again", tmp_path / f"moved{step}")
        callback = PruneRewindCallback(**HALF, **early)
        assert_same_run(resumed_run(moved, moved / f"checkpoint-{step}", callback, **settings), expected)


def test_a_trial_of_a_search_for_hyperparameters_keeps_its_own(straight: Trainer, tmp_path: Path) -> None:
    """Such a search writes the checkpoints of each trial into a folder of its own."""

    class OfTrial(Trainer):
        def _get_output_dir(self, trial: Any) -> str:
            return f"{self.args.output_dir}/run-3"

    trainer_for(tmp_path, PruneRewindCallback(**HALF), trainer_class=OfTrial, **SHORT).train()
    for step in (2, 6):
        assert_same_run(resumed_run(tmp_path / "new", tmp_path / "run-3" / f"checkpoint-{step}"), straight)


@pytest.mark.parametrize("limit", [1, 2])
def test_old_checkpoints_may_be_deleted(limit: int, tmp_path: Path) -> None:
    straight_run(tmp_path / "all")
    straight_run(tmp_path / "few", save_total_limit=limit)
    kept = sorted(p.name for p in (tmp_path / "few").glob("checkpoint-*"))
    assert kept == [f"checkpoint-{n}" for n in (6, 8)][-limit:]
    step = kept[0].removeprefix("checkpoint-")
    longer = {"max_steps": 10, "lr_scheduler_type": "constant_with_warmup"}
    resumed = [
        resumed_run(tmp_path / name, tmp_path / name / f"checkpoint-{step}", **longer) for name in ("few", "all")
    ]
    assert_same_run(*resumed)


@pytest.mark.parametrize("step", [2, 6])
def test_a_checkpoint_of_the_model_alone_goes_on_with_its_schedule(step: int, tmp_path: Path) -> None:
    watch, expected = Watch(), Watch()
    trainer_for(tmp_path / "one", PruneRewindCallback(**HALF), watch=expected, **SHORT, save_only_model=True).train()
    resumed = resumed_run(tmp_path / "two", tmp_path / "one" / f"checkpoint-{step}", watch=watch, save_only_model=True)
    assert watch.rates == expected.rates[step:]
    if step == 2:
        assert_same_bits(
            {k: v[v != 0] for k, v in watch.values[4].items()}, {k: v[v != 0] for k, v in expected.values[4].items()}
        )
    assert resumed.state.global_step == 8


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_checkpoint_is_complete_when_it_is_uploaded(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer uploads it before it tells callbacks that it has been saved."""
    uploaded: dict[int, set[str]] = {}

    class Pushing(Trainer):
        def init_hf_repo(self, token: Any = None) -> None:
            self.hub_model_id = "me/vit"

        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            uploaded[self.state.global_step] = set(os.listdir(checkpoint_folder))

        def _finish_current_push(self) -> None:
            pass

    trainer = trainer_for(
        tmp_path, PruneRewindCallback(**HALF), trainer_class=Pushing, push_to_hub=True, hub_strategy=strategy, **SHORT
    )
    trainer.train()
    for step in (2, 4):
        assert {TARGET_FILE, OPTIMIZER_FILE, "trainer_state.json"} <= uploaded[step]
    for step in (6, 8):
        assert "pruning_report.json" in uploaded[step]


def test_a_process_killed_while_it_saves_leaves_a_checkpoint_that_resumes_or_none(
    straight: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the Trainer has marked a checkpoint by its state, the files of the callback are there."""
    from transformers import TrainerState

    save = TrainerState.save_to_json

    def dies(self: TrainerState, path: str) -> None:
        save(self, path)
        if self.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainerState, "save_to_json", dies)
    with pytest.raises(KeyboardInterrupt):
        straight_run(tmp_path)
    monkeypatch.undo()
    assert_same_run(resumed_run(tmp_path, True), straight)


# ----------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("name", [TARGET_FILE, OPTIMIZER_FILE])
def test_a_missing_file_is_named_before_the_first_step(output: Path, name: str) -> None:
    (output / "checkpoint-2" / name).unlink()
    watch = Watch()
    with pytest.raises(FileNotFoundError, match=rf"checkpoint-2/{name} is missing.*copy the whole folder"):
        resumed_run(output, output / "checkpoint-2", watch=watch)
    assert not watch.values
    resumed_run(output, output / "checkpoint-6")  # needs none of them


@pytest.mark.parametrize(
    "damage", [lambda data: data[:100], lambda data: b"", lambda data: b"version https://git-lfs"]
)
def test_a_damaged_file_is_named_before_the_first_step(output: Path, damage: Any) -> None:
    path = output / "checkpoint-2" / TARGET_FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{TARGET_FILE}, which holds the values to rewind to, is damaged"):
        resumed_run(output, output / "checkpoint-2")


def test_values_of_another_model_are_refused_before_the_first_step(output: Path) -> None:
    path = output / "checkpoint-2" / TARGET_FILE
    values = load_file(path)
    name = next(name for name in values if "visual_prompts" in name)
    save_file({**values, name: values[name][:1].contiguous()}, path)
    with pytest.raises(
        ValueError, match=rf"{name} of shape \(4, 32\), but the values to rewind to are of shape \(1, 32\)"
    ):
        resumed_run(output, output / "checkpoint-2")
    save_file({n: t for n, t in values.items() if n != name}, path)
    with pytest.raises(ValueError, match=f"trains other parameters than those to rewind to: {name}"):
        resumed_run(output, output / "checkpoint-2")


def test_values_of_another_step_are_refused(output: Path) -> None:
    early = PruneRewindCallback(**HALF, rewind_to="early", early_steps=1)
    with pytest.raises(
        ValueError, match="values after step 1, but .*checkpoint-2 holds those after step 0: pass the same"
    ):
        resumed_run(output, output / "checkpoint-2", early)
    resumed_run(output, output / "checkpoint-2", PruneRewindCallback(**HALF, rewind_to="early", early_steps=3))


@pytest.mark.parametrize(("step", "when"), [(2, "before"), (4, "before"), (6, "after")])
def test_a_run_with_fewer_steps_than_lie_behind_it_is_refused(output: Path, step: int, when: str) -> None:
    with pytest.raises(
        ValueError, match=rf"is at step {step}, {when} pruning, and the run is to have 2 optimizer steps"
    ):
        resumed_run(output, output / f"checkpoint-{step}", max_steps=2)


def test_a_finished_run_is_resumed_to_its_end(straight: Trainer, output: Path) -> None:
    trainer = trainer_for(
        output, callback := PruneRewindCallback(**HALF), adapted(seed=99), **{**SHORT, "max_steps": 12}
    )
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-6"))
    done = state_of(trainer.model)
    again = resumed_run(output, output / "checkpoint-12", callback, max_steps=12)
    assert_same_bits(state_of(again.model), done)
    assert callback.report == PruningReport.load(output)


# --------------------------------------------------------------------------------------------------- older checkpoints
def made_older(output: Path, step: int, path: Path) -> None:
    """Turns a checkpoint into one of the versions that kept the values to rewind to in the output folder."""
    folder = output / f"checkpoint-{step}"
    state = json.loads((folder / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["PruneRewindCallback"]
    run = saved["attributes"]
    saved["attributes"] = {name: run[name] for name in ("_pruned", "_second_start")}
    saved["attributes"] |= {"_target_path": str(path), "_not_saved": []}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / OPTIMIZER_FILE).unlink(missing_ok=True)
    if (folder / TARGET_FILE).exists():
        (folder / TARGET_FILE).rename(path)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("step", [2, 6])
def test_an_older_checkpoint_resumes(
    straight: Trainer, output: Path, step: int, moved: bool, restore: bool, tmp_path: Path
) -> None:
    made_older(output, step, output / TARGET_FILE)
    if moved:  # another run now has the former folder
        output = Path(shutil.copytree(output, tmp_path / "moved"))
        save_file({"others": torch.zeros(2)}, tmp_path / "out" / TARGET_FILE)
    settings = {"restore_callback_states_from_checkpoint": restore}
    assert_same_run(resumed_run(tmp_path / "new", output / f"checkpoint-{step}", **settings), straight)


def test_an_older_checkpoint_without_its_file_is_refused(output: Path, tmp_path: Path) -> None:
    made_older(output, 2, tmp_path / TARGET_FILE)
    assert resumed_run(output, output / "checkpoint-2")
    (tmp_path / TARGET_FILE).unlink()
    made_older(output, 4, tmp_path / "else")
    (tmp_path / "else").unlink()
    with pytest.raises(FileNotFoundError, match=f"{TARGET_FILE} is missing"):
        resumed_run(output, output / "checkpoint-4")


# ------------------------------------------------------------------------------------------------------- more or fewer
KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "constant": {"warmup_steps": 0},
    "constant_with_warmup": {},
    "polynomial": {"lr_scheduler_kwargs": {"power": 2.0}},
    "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 2}},
    "inverse_sqrt": {},
}


def rates_of(kind: str, num_steps: int, settings: dict[str, Any]) -> list[float]:
    return learning_rates(kind, num_steps, settings.get("warmup_steps", 1), settings.get("lr_scheduler_kwargs"))


@pytest.mark.parametrize(("step", "total"), [(2, 12), (4, 12), (6, 12), (8, 12), (2, 6), (4, 6), (6, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_may_become_longer_or_shorter(kind: str, step: int, total: int, tmp_path: Path) -> None:
    """Both parts then have complete schedules, at the place where the run is in them."""
    settings = {"lr_scheduler_type": kind, **KINDS[kind]}
    straight_run(tmp_path, **settings)
    watch, callback = Watch(), PruneRewindCallback(**HALF)
    resumed_run(tmp_path, tmp_path / f"checkpoint-{step}", callback, watch, **{**settings, "max_steps": total})
    boundary = 4 if step > 4 else max(total // 2, step)  # where it was pruned stays
    expected = rates_of(kind, boundary, settings) + rates_of(kind, total - boundary, settings)
    assert watch.rates == pytest.approx(expected[step:], abs=1e-15)
    assert callback.report is not None and callback.report.step == boundary


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_made_longer_before_pruning_is_the_longer_run(step: int, tmp_path: Path) -> None:
    """With a constant learning rate the first part does not tell how long it will be."""
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    straight_run(tmp_path / "short", **settings)
    expected = straight_run(tmp_path / "long", **settings, max_steps=12)
    resumed = resumed_run(tmp_path / "new", tmp_path / "short" / f"checkpoint-{step}", **settings, max_steps=12)
    assert_same_run(resumed, expected)


def test_a_run_of_four_epochs_resumed_for_eight_trains_to_its_end(tmp_path: Path) -> None:
    settings = {"num_train_epochs": 4, "save_strategy": "epoch", "warmup_steps": 3}
    trainer_for(tmp_path, PruneRewindCallback(**HALF), **settings).train()
    watch = Watch()
    resumed = trainer_for(
        tmp_path, PruneRewindCallback(**HALF), adapted(seed=9), watch, **{**settings, "num_train_epochs": 8}
    )
    resumed.train(True)
    assert resumed.state.global_step == 48 and len(watch.rates) == 24
    assert min(watch.rates) == watch.rates[-1] == pytest.approx(1e-2 / (36 - 3))


@pytest.mark.parametrize("step", [2, 6])
def test_a_plateau_is_waited_for_in_a_longer_run_too(step: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"mode": "max", "factor": 0.5, "patience": 0},
        "metric_for_best_model": "constant",
        "compute_metrics": lambda prediction: {"constant": 1.0},
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    straight_run(tmp_path, **settings)
    watch = Watch()
    resumed_run(tmp_path, tmp_path / f"checkpoint-{step}", watch=watch, **settings, max_steps=10)
    boundary = 5 if step == 2 else 4
    fall = [1e-2 * 0.5 ** max(n - 1, 0) for n in range(10)]
    assert watch.rates == pytest.approx((fall[:boundary] + fall[: 10 - boundary])[step:])


# ----------------------------------------------------------------------------------------------------- who resumes it
class Renames(PruneRewindCallback):
    """Keeps its argument under another name, and its own idea of one of the callback's."""

    def __init__(self, tag: str, **kwargs: Any) -> None:
        super().__init__(prune_tokens=0.5, **kwargs)
        self._label = tag.upper()


class NoKeywords(PruneRewindCallback):
    def __init__(self, half: bool = False) -> None:
        super().__init__(**(HALF if half else {"prune_tokens": 0.0}))


class Deeper(Renames):
    def __init__(self, tags: list[str], *, count: int = 1, **kwargs: Any) -> None:
        super().__init__("".join(tags), **kwargs)
        self.number = count


SUBCLASSES: dict[str, Any] = {
    "renames": lambda: Renames("blue", prune_segments=0.25),
    "no keywords": lambda: NoKeywords(True),
    "deeper": lambda: Deeper(["b", "l"], count=3, prune_segments=0.25),
}


@pytest.mark.parametrize("step", [2, 6])
@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("make", SUBCLASSES.values(), ids=SUBCLASSES)
def test_a_subclass_with_arguments_of_its_own_resumes(
    straight: Trainer, make: Any, restore: bool, step: int, tmp_path: Path
) -> None:
    assert_same_run(straight_run(tmp_path, make()), straight)
    resumed = resumed_run(
        tmp_path, tmp_path / f"checkpoint-{step}", make(), restore_callback_states_from_checkpoint=restore
    )
    assert_same_run(resumed, straight)
    (running,) = (c for c in resumed.callback_handler.callbacks if isinstance(c, PruneRewindCallback))
    same = {"_label", "number", "prune_tokens", "prune_segments"} & vars(running).keys()
    assert all(getattr(running, name) == getattr(make(), name) for name in same) and len(same) >= 2


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize(
    ("first", "second"), [("no keywords", "renames"), (None, "renames"), ("deeper", None)], ids=str
)
def test_another_class_of_the_callback_resumes_and_saves(
    straight: Trainer, first: str | None, second: str | None, step: int, restore: bool, tmp_path: Path
) -> None:
    make = {**SUBCLASSES, None: lambda: PruneRewindCallback(**HALF)}
    straight_run(tmp_path, make[first]())
    settings = {"restore_callback_states_from_checkpoint": restore}
    assert_same_run(resumed_run(tmp_path, tmp_path / f"checkpoint-{step}", make[second](), **settings), straight)
    assert_same_run(resumed_run(tmp_path, tmp_path / f"checkpoint-{step + 2}", make[second](), **settings), straight)


def test_arguments_changed_after_construction_are_restored(straight: Trainer, tmp_path: Path) -> None:
    callback = PruneRewindCallback(prune_tokens=0.9)
    callback.prune_tokens, callback.prune_segments = 0.5, 0.25
    straight_run(tmp_path, callback)
    settings = {"restore_callback_states_from_checkpoint": True}
    resumed = resumed_run(tmp_path, tmp_path / "checkpoint-2", PruneRewindCallback(prune_tokens=0.9), **settings)
    assert_same_run(resumed, straight)


class Scheduled(PruneRewindCallback):
    """Takes what no checkpoint can hold."""

    def __init__(self, function: Any, *more: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function or abs


@pytest.mark.parametrize(
    ("given", "name"), [((len,), "function"), ((None, 3), r"\*more")], ids=["a function", "by position"]
)
def test_an_argument_that_a_checkpoint_cannot_hold_is_asked_for(given: Any, name: str, tmp_path: Path) -> None:
    straight_run(tmp_path, Scheduled(*given, **HALF))
    with pytest.raises(ValueError, match=f"cannot hold the {name} of PruneRewindCallback"):
        resumed_run(
            tmp_path,
            tmp_path / "checkpoint-2",
            Scheduled(*given, **HALF),
            restore_callback_states_from_checkpoint=True,
        )
    resumed_run(tmp_path, tmp_path / "checkpoint-2", Scheduled(*given, **HALF))
