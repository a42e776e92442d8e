# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What pruning candidates are compared by: what the user measures, for every task, and each candidate on its own."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from peft_e2vpt import (
    E2VPTConfig,
    ModelQuality,
    PruneRewindCallback,
    apply_gates,
    prune,
    score_prompts,
    search_pruning,
)
from peft_e2vpt.pruning.quality import is_joined
from peft_e2vpt.tuner.prompt_layers import prompt_layers

from ..support.tasks import TASKS, Task
from ..support.training import Images, Watch, adapted, arguments, trainer_for


pytestmark = pytest.mark.training


SEARCH: dict[str, Any] = {"token_ratios": [0.5], "segment_ratios": [0.5], "min_segments": 1}
CALLBACK: dict[str, Any] = {**SEARCH, "prune_after": 1, "unit": "steps"}


def task_run(task: Task, folder: Path, callback: PruneRewindCallback, **settings: Any) -> tuple[Trainer, Watch]:
    """Four optimizer steps of two samples."""
    watch = Watch()
    kind = settings.pop("trainer_class", Trainer)
    model = settings.pop("model", None) or task.adapted()
    given = {name: settings.pop(name) for name in ("compute_metrics",) if name in settings}
    args = arguments(
        folder, max_steps=4, per_device_train_batch_size=2, per_device_eval_batch_size=2, warmup_steps=0, **settings
    )
    data = task.samples(5)
    trainer = kind(
        model,
        args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=task.collate,
        callbacks=[callback, watch],
        **given,
    )
    return trainer, watch


@torch.no_grad()
def mean_loss(model: nn.Module, task: Task) -> float:
    """The evaluation loss as the Trainer counts it: the mean over batches of two, weighted by their samples."""
    data, total = task.samples(5), 0.0
    for start in range(0, 5, 2):
        samples = data[start : start + 2]
        outputs = model.eval()(**task.collate(samples))
        total += float(outputs["loss"]) * len(samples)
    return total / 5


@pytest.mark.parametrize("name", TASKS)
def test_the_default_callback_prunes_every_task_by_its_loss(name: str, tmp_path: Path) -> None:
    task, callback = TASKS[name], PruneRewindCallback(**CALLBACK)
    trainer, watch = task_run(task, tmp_path, callback)
    trainer.train()
    assert len(watch.rates) == 4 and callback.report is not None
    assert len(callback.report.candidates) == 4
    assert all(np.isfinite(candidate["quality"]) for candidate in callback.report.candidates)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "video classification"])  # by its accuracy
def test_every_candidate_measures_the_loss_of_the_model_pruned_so(name: str) -> None:
    task = TASKS[name]
    model, data = task.adapted().eval(), task.samples(5)
    batches = [task.collate(data[start : start + 2]) for start in range(0, 5, 2)]
    torch.manual_seed(0)
    scores = score_prompts(model, batches)
    search = search_pruning(model, scores, batches, **SEARCH)
    for candidate in search.candidates:
        pruned = deepcopy(model)
        apply_gates(pruned, prune(scores, candidate.token_ratio, candidate.segment_ratio, min_segments=1))
        assert candidate.quality == pytest.approx(-mean_loss(pruned, task), rel=1e-4, abs=1e-6)
    assert len({candidate.quality for candidate in search.candidates}) == 4, "equal candidates prove nothing"


@pytest.mark.parametrize("column", [False, True])
def test_a_regression_without_error_is_not_pruned(column: bool) -> None:
    """Labels (B,) and (B, 1) are numbers to predict, not several classes."""
    task = TASKS["regression"]
    model = task.adapted().eval()
    with torch.no_grad():
        inputs = task.collate(task.samples(4))["pixel_values"]
        labels = model(pixel_values=inputs).logits
    batch = {"pixel_values": inputs, "labels": labels if column else labels[:, 0]}
    moved = {**batch, "labels": batch["labels"] + 1}  # at an error of 0 the gates have no gradient
    search = search_pruning(model, score_prompts(model, [moved]), [batch], **SEARCH)
    assert search.candidates[0].quality == pytest.approx(0.0, abs=1e-10)
    assert search.chosen == 0


# ------------------------------------------------------------------------------------------- what the user measures
def test_the_metric_of_the_trainer_is_measured_over_all_predictions(tmp_path: Path) -> None:
    """A metric that no mean over samples or batches gives: the share of classes that are never predicted."""
    seen: list[int] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(len(prediction.predictions))
        return {"unused": float(len(set(range(5)) - set(prediction.predictions.argmax(-1).tolist())))}

    callback = PruneRewindCallback(**CALLBACK)
    trainer = trainer_for(
        tmp_path,
        callback,
        compute_metrics=compute_metrics,
        metric_for_best_model="unused",
        greater_is_better=False,
        max_steps=4,
    )
    trainer.train()
    assert seen == [8, *[9] * 4]  # a batch before the first step; all nine samples for each candidate
    assert callback.report is not None
    assert {candidate["quality"] for candidate in callback.report.candidates} <= {-float(n) for n in range(5)}


@pytest.mark.parametrize(("greater", "sign"), [(None, 1.0), (True, 1.0), (False, -1.0)])
def test_a_named_metric_counts_in_its_direction(greater: bool | None, sign: float, tmp_path: Path) -> None:
    numbers = iter([0.0, 0.1, 0.4, 0.2, 0.3])
    callback = PruneRewindCallback(quality="own", greater_is_better=greater, **CALLBACK)
    trainer = trainer_for(tmp_path, callback, compute_metrics=lambda p: {"own": next(numbers)}, max_steps=4)
    trainer.train()
    assert callback.report is not None
    assert [c["quality"] for c in callback.report.candidates] == [sign * n for n in (0.1, 0.4, 0.2, 0.3)]
    assert callback.report.chosen == (1 if sign > 0 else 0)


def test_the_trainers_loss_by_name_is_minus_the_default_of_a_task_without_classes(tmp_path: Path) -> None:
    task, qualities = TASKS["regression"], []
    for quality in ("loss", None):
        callback = PruneRewindCallback(quality=quality, **CALLBACK)
        task_run(task, tmp_path, callback)[0].train()
        assert callback.report is not None
        qualities.append([c["quality"] for c in callback.report.candidates])
    assert qualities[0] == pytest.approx(qualities[1], rel=1e-4)


def test_a_metric_that_needs_more_than_one_batch_is_tried_on_all(tmp_path: Path) -> None:
    def compute_metrics(prediction: Any) -> dict[str, float]:
        if len(prediction.predictions) < 9:
            raise ZeroDivisionError("a class is missing")
        return {"own": 1.0}

    callback = PruneRewindCallback(quality="own", **CALLBACK)
    trainer_for(tmp_path, callback, compute_metrics=compute_metrics, max_steps=4).train()
    assert callback.report is not None


def test_comparing_by_the_trainers_metric_leaves_its_log_and_callbacks_alone(tmp_path: Path) -> None:
    callback, watch = PruneRewindCallback(quality="own", **CALLBACK), Watch()
    trainer = trainer_for(
        tmp_path, callback, watch=watch, compute_metrics=lambda prediction: {"own": 1.0}, max_steps=4
    )
    trainer.train()
    assert watch.evaluated_at == [] and not any("eval_own" in entry for entry in trainer.state.log_history)


def test_a_loss_computed_outside_the_model_is_what_candidates_are_compared_by(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
        ) -> Any:
            target = inputs.pop("target")
            outputs = model(**inputs)
            loss = (outputs.logits.sum(-1) - target).pow(2).mean()
            return (loss, outputs) if return_outputs else loss

    class Targets(Images):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"pixel_values": self.pixels[index], "target": self.labels[index].float()}

    callback = PruneRewindCallback(**CALLBACK)
    trainer_for(
        tmp_path,
        callback,
        trainer_class=Own,
        train_dataset=Targets(),
        eval_dataset=Targets(9, seed=1),
        max_steps=4,
        remove_unused_columns=False,
    ).train()
    assert callback.report is not None and all(c["quality"] < 0 for c in callback.report.candidates)


def test_a_quality_of_the_model_is_measured_once_for_every_candidate() -> None:
    model = adapted().eval()
    scores = score_prompts(model, [Images()[:4]])
    seen: list[float] = []

    def measure(given: nn.Module) -> float:
        assert given is model and not model.training
        seen.append(float(given(pixel_values=Images().pixels[:4]).logits.sum()))
        return len(seen)

    search = search_pruning(model, scores, (), quality=ModelQuality(measure), **SEARCH)
    assert [c.quality for c in search.candidates] == [1, 2, 3, 4] and len(set(seen)) == 4
    assert search_pruning(model, scores, (), quality=ModelQuality(measure, False), **SEARCH).chosen == 0


def test_a_quality_that_is_not_a_number_is_never_chosen() -> None:
    model = adapted().eval()
    scores = score_prompts(model, [Images()[:4]])
    numbers = iter([0.5, float("nan"), 0.1, float("nan")])
    search = search_pruning(model, scores, (), quality=ModelQuality(lambda model: next(numbers)), **SEARCH)
    assert search.chosen == 0
    nothing = search_pruning(model, scores, (), quality=ModelQuality(lambda model: float("nan")), **SEARCH)
    assert nothing.chosen == 0 and nothing.gates.token.all()


# ----------------------------------------------------------------------------------------- who shares a forward pass
def retrieval(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """How well every sample finds itself among the others of its batch."""
    features = F.normalize(outputs["logits"], dim=-1)
    return F.log_softmax(features @ features.T, dim=-1).diagonal()


def test_a_quality_that_compares_samples_sees_every_candidate_alone() -> None:
    model = adapted().eval()
    batch = Images()[:4]
    scores = score_prompts(model, [batch])
    search = search_pruning(model, scores, [batch], quality=retrieval, **SEARCH)
    for candidate in search.candidates:
        pruned = deepcopy(model)
        apply_gates(pruned, prune(scores, candidate.token_ratio, candidate.segment_ratio, min_segments=1))
        with torch.no_grad():
            expected = retrieval(pruned.eval()(**batch), batch).mean()
        assert candidate.quality == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(("name", "together"), [("regression", False), ("multi-label", False), ("contrastive", False)])
def test_a_loss_of_the_whole_batch_takes_one_candidate_at_a_time(name: str, together: bool) -> None:
    task = TASKS[name]
    model = task.adapted().eval()
    batch = task.collate(task.samples(2))
    scores = score_prompts(model, [batch])
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    search_pruning(model, scores, [batch], **SEARCH)
    handle.remove()
    assert set(sizes) == {2}


def test_joined_outputs_are_told_from_those_that_depend_on_their_batch() -> None:
    one, two = torch.randn(2, 3), torch.randn(2, 3)
    assert is_joined({"logits": torch.cat([one, two])}, [{"logits": one}, {"logits": two}], 2)
    assert is_joined(
        (torch.tensor(3.0), torch.cat([one, two])), [(torch.tensor(1.0), one), (torch.tensor(2.0), two)], 2
    )
    assert not is_joined(torch.cat([one, two + 0.1]), [one, two], 2)
    similarity = [part @ part.T for part in (one, two)]
    both = torch.cat([one, two])
    assert not is_joined(both @ both.T, similarity, 2)
    assert not is_joined({"a": both}, [{"a": one, "b": one}, {"a": two, "b": two}], 2)


def test_outputs_in_a_tuple_have_their_loss_first() -> None:
    model, batch = adapted().eval(), Images()[:4]
    expected = score_prompts(model, [batch])
    bare = {**batch, "return_dict": False}
    assert isinstance(model(**bare), tuple)
    scores = score_prompts(model, [bare])
    torch.testing.assert_close(scores.token, expected.token)
    search = search_pruning(model, scores, [bare], **SEARCH)
    assert search.candidates == search_pruning(model, expected, [batch], **SEARCH).candidates


class Plain(nn.Module):
    """Answers with an ordinary dictionary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = self.model(pixel_values=pixel_values, labels=labels)
        return {"loss": outputs.loss, "logits": outputs.logits}


def test_a_plain_dictionary_with_a_loss_can_be_scored_and_searched() -> None:
    model = adapted().eval()
    batch = Images()[:4]
    scores, expected = score_prompts(Plain(model), [batch]), score_prompts(model, [batch])
    assert torch.equal(scores.token, expected.token)
    found = search_pruning(Plain(model), scores, [batch], **SEARCH)
    assert found.candidates == search_pruning(model, scores, [batch], **SEARCH).candidates
    assert all(layer.gate_override is None for layer in prompt_layers(model))


# ---------------------------------------------------------------------------------------------- how the data are read
class Mixed:
    """A collate function for training that no evaluation must see: it mixes images, and labels become soft."""

    calls = 0

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        Mixed.calls += 1
        assert len(samples) % 2 == 0, "Batch size should be even when using this"
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        labels = F.one_hot(torch.stack([sample["labels"] for sample in samples]), 5).float()
        return {"pixel_values": (pixels + pixels.flip(0)) / 2, "labels": (labels + labels.flip(0)) / 2}


def test_the_evaluation_set_is_not_mixed_as_the_training_set_is(tmp_path: Path) -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Images(21), 4, shuffle=True, collate_fn=Mixed(), drop_last=True)

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
        ) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    expected, callback = PruneRewindCallback(**CALLBACK), PruneRewindCallback(**CALLBACK)
    args: dict[str, Any] = {"max_steps": 4, "dataloader_drop_last": True, "learning_rate": 0.0}
    trainer_for(tmp_path, expected, train_dataset=Images(20), **args).train()
    trainer_for(tmp_path, callback, trainer_class=Own, **args).train()
    assert Mixed.calls and callback.report is not None and expected.report is not None
    assert callback.report.num_scored_samples == 20  # the last one is odd
    assert callback.report.candidates[0] == expected.report.candidates[0]  # nothing pruned, nothing trained


class OwnLoaders(Trainer):
    """Reads batches from dataloaders of its own, without datasets."""

    def get_train_dataloader(self) -> Any:
        return DataLoader(Images(), 4, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return DataLoader(Images(9, seed=1), 8)


def test_a_trainer_with_dataloaders_of_its_own_needs_no_datasets(tmp_path: Path) -> None:
    callback, expected = PruneRewindCallback(**CALLBACK), PruneRewindCallback(**CALLBACK)
    trainer = OwnLoaders(adapted(), arguments(tmp_path, max_steps=4, learning_rate=0.0), callbacks=[callback])
    trainer.train()
    trainer_for(tmp_path, expected, max_steps=4, learning_rate=0.0).train()
    assert callback.report is not None and callback.report.num_scored_samples == 21
    assert callback.report == expected.report


class NoIndex(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        yield from Images()


@pytest.mark.parametrize(
    ("settings", "samples"), [({"score_dataset": Images(6, seed=2)}, 6), ({"max_score_batches": 2}, 8)]
)
def test_a_stream_is_scored_on_another_set_or_so_many_batches(
    settings: dict[str, Any], samples: int, tmp_path: Path
) -> None:
    callback = PruneRewindCallback(**CALLBACK, **settings)
    trainer_for(tmp_path, callback, train_dataset=NoIndex(), max_steps=4).train()
    assert callback.report is not None and callback.report.num_scored_samples == samples


class Columns(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**Images()[index], "name": "not for the model"}


def test_another_set_is_read_without_the_columns_that_the_model_does_not_take(tmp_path: Path) -> None:
    callback = PruneRewindCallback(**CALLBACK, score_dataset=Columns(), validation_dataset=Columns())
    trainer_for(tmp_path, callback, max_steps=4).train()
    assert callback.report is not None and callback.report.num_scored_samples == 4


def test_a_whole_model_that_is_only_injected_is_searched() -> None:
    from peft import inject_adapter_in_model

    base = adapted().get_base_model()
    assert prompt_layers(base)
    model = inject_adapter_in_model(
        E2VPTConfig(num_segments=8, modules_to_save=[]),
        deepcopy(get_peft_model(deepcopy(base), E2VPTConfig()).unload()),
    )
    scores = score_prompts(model, [Images()[:4]])
    assert len(search_pruning(model, scores, [Images()[:4]], **SEARCH).candidates) == 4


def test_metrics_that_are_gathered_batch_by_batch_are_compared_too(tmp_path: Path) -> None:
    """`batch_eval_metrics`: the function sees one batch at a time and is told of the last one."""
    counts: list[int] = []
    running: list[int] = []

    def compute_metrics(prediction: Any, compute_result: bool) -> dict[str, float]:
        running.append(len(prediction.predictions))
        if not compute_result:
            return {}
        counts.append(sum(running))
        running.clear()
        return {"own": float(counts[-1])}

    callback = PruneRewindCallback(quality="own", **CALLBACK)
    trainer_for(tmp_path, callback, compute_metrics=compute_metrics, batch_eval_metrics=True, max_steps=4).train()
    assert counts == [8, 9, 9, 9, 9]


def test_labels_of_another_name_are_those_of_the_trainer(tmp_path: Path) -> None:
    """What `label_names` and `preprocess_logits_for_metrics` make of predictions is what a metric is computed from."""

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted()

        def forward(self, pixel_values: Tensor, species: Tensor) -> dict[str, Tensor]:
            outputs = self.model(pixel_values=pixel_values, labels=species)
            return {"loss": outputs.loss, "logits": outputs.logits}

    class Species(Images):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"pixel_values": self.pixels[index], "species": self.labels[index]}

    shapes: list[tuple[int, ...]] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"right": float((prediction.predictions == prediction.label_ids).mean())}

    callback = PruneRewindCallback(quality="right", **CALLBACK)
    trainer = Trainer(
        Renamed(),
        arguments(tmp_path, max_steps=4, label_names=["species"], per_device_eval_batch_size=8),
        train_dataset=Species(),
        eval_dataset=Species(9, seed=1),
        callbacks=[callback],
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    trainer.train()
    assert shapes == [(8,)] + [(9,)] * 4 and callback.report is not None
