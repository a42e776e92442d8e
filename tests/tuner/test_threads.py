# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Threads share an adapted model: each gets the answers that it would get alone, bit for bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_e2vpt._compat import BufferDict
from peft_e2vpt.tuner.layer import E2VPTLayer
from peft_e2vpt.tuner.mixed_batch import active_adapters_kept, current_choice, one_adapter_per_sample
from peft_e2vpt.tuner.prompt_layers import PromptLayers
from tests.support import zoo_checks as checks
from tests.support.adapted import SHALLOW, adapt, config_of, layers_of, predict, prune
from tests.support.models import output_of
from tests.support.several import ALIKE, BASE, DIFFERENT, one_by_one, with_adapters


THREADS = 8


def in_threads(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Runs tasks at the same time; an error in one of them is raised here."""
    together = threading.Barrier(len(tasks))

    def start(task: Callable[[], Any]) -> Any:
        together.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        running = [pool.submit(start, task) for task in tasks]
    return [task.result() for task in running]


def batches(pixels: Tensor) -> list[Tensor]:
    """Batches of other images and sizes."""
    return [pixels.roll(number, -1)[: 1 + number % len(pixels)] + number / 10 for number in range(THREADS)]


# ------------------------------------------------------------------------------------------------------ one adapter
KINDS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "plain": lambda: adapt("vit"),
    "windowed": lambda: adapt("swin"),
    "merged": lambda: merged("vit"),
    "pruned": lambda: pruned("dinov2"),
    "shallow": lambda: adapt("vit", **SHALLOW),
    "two towers": lambda: adapt("clip"),
    "intercepted": lambda: checks.adapt("hiera"),
    "intercepted in windows": lambda: checks.adapt("sam_vision"),
}


def merged(name: str) -> tuple[PeftModel, dict[str, Any]]:
    model, inputs = adapt(name)
    model.merge_adapter()
    return model, inputs


def pruned(name: str) -> tuple[PeftModel, dict[str, Any]]:
    model, inputs = adapt(name)
    prune(model)
    return model, inputs


@pytest.mark.parametrize("kind", KINDS)
def test_every_thread_gets_the_answers_of_a_single_one(kind):
    model, inputs = KINDS[kind]()
    model.eval()

    def answers(number: int) -> list[Tensor]:
        shifted = {**inputs, "pixel_values": inputs["pixel_values"] + number}
        with torch.no_grad():
            return [output_of(model(**shifted)) for _ in range(10)]

    expected = [answers(number)[0] for number in range(THREADS)]
    found = in_threads([lambda number=number: answers(number) for number in range(THREADS)])
    for number in range(THREADS):
        assert all(torch.equal(answer, expected[number]) for answer in found[number])


def contents(modules: list[nn.Module]) -> list[dict[str, Any]]:
    hidden = ("_parameters", "_buffers", "_modules")
    return [{**vars(module), **{k: dict(vars(module)[k]) for k in hidden}} for module in modules]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_writes_nothing_on_a_module(kind):
    model, inputs = KINDS[kind]()
    predict(model.eval(), inputs)  # the first one proves that the attentions ask for their rows
    modules = list(model.modules())
    before = contents(modules)

    def check(module: nn.Module, args: Any, output: Any) -> None:
        for one, other in zip(before, contents(modules), strict=True):
            assert one.keys() == other.keys() and all(one[key] is other[key] or one[key] == other[key] for key in one)

    hook = torch.nn.modules.module.register_module_forward_hook(check)
    try:
        predict(model, inputs)
    finally:
        hook.remove()
    check(model, (), None)


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["plain", "windowed", "merged", "intercepted"])
def test_threads_share_a_compiled_model(kind, fresh_compiler):
    model, inputs = KINDS[kind]()
    compiled = torch.compile(model.eval(), backend="eager")
    expected = predict(compiled, inputs)
    found = in_threads([lambda: [predict(compiled, inputs) for _ in range(5)]] * THREADS)
    assert all(torch.equal(answer, expected) for answers in found for answer in answers)


# ---------------------------------------------------------------------------------------------------- mixed batches
@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("adapters", [ALIKE, DIFFERENT], ids=["alike", "different"])
def test_every_thread_has_the_adapters_of_its_own_batch(name, adapters):
    model, pixels = with_adapters(name, adapters)
    names = [*adapters, BASE]
    work = []
    for number, batch in enumerate(batches(pixels)):
        adapter_names = [names[(number + sample) % len(names)] for sample in range(len(batch))]
        work.append((batch, adapter_names))

    def answers(batch: Tensor, adapter_names: list[str]) -> list[Tensor]:
        with torch.no_grad():
            return [model(pixel_values=batch, adapter_names=adapter_names).logits for _ in range(8)]

    expected = [answers(*item)[0] for item in work]
    found = in_threads([lambda item=item: answers(*item) for item in work])
    for number, item in enumerate(work):
        assert all(torch.equal(answer, expected[number]) for answer in found[number])
        torch.testing.assert_close(expected[number], one_by_one(model, *item), atol=1e-5, rtol=1e-5)


def test_a_mixed_batch_in_one_thread_leaves_the_plain_passes_of_another_alone():
    model, pixels = with_adapters("swin", DIFFERENT)
    plain = predict(model, {"pixel_values": pixels})
    with one_adapter_per_sample(model, [BASE] * len(pixels)):
        [found] = in_threads([lambda: predict(model, {"pixel_values": pixels})])
        here = predict(model.get_base_model(), {"pixel_values": pixels})
    assert torch.equal(found, plain)
    assert not torch.allclose(here, plain, atol=1e-2)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_a_mixed_batch_goes_through_a_base_model_that_was_compiled_in_place(name, fresh_compiler):
    model, pixels = with_adapters(name, DIFFERENT)
    adapter_names = [*DIFFERENT, BASE]
    expected = one_by_one(model, pixels, adapter_names)
    model.get_base_model().compile(backend="eager")
    plain = predict(model, {"pixel_values": pixels})
    inputs = {"pixel_values": pixels, "adapter_names": adapter_names}
    turned = {"pixel_values": pixels.flip(0), "adapter_names": adapter_names[::-1]}
    torch.testing.assert_close(predict(model, inputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predict(model, turned), expected.flip(0), atol=1e-5, rtol=1e-5)
    assert torch.equal(predict(model, {"pixel_values": pixels}), plain)


# ------------------------------------------------------------------------------------------------ changes meanwhile
def while_it_runs(model: PeftModel, inputs: dict[str, Any], change: Callable[[], None]) -> list[Tensor]:
    """Answers of forward passes during which, between two blocks, another thread makes a change."""
    blocks = [layer.site.block for layer in layers_of(model)]

    def let_the_other_thread_work(module: nn.Module, args: Any, output: Any) -> None:
        in_threads([change])

    hook = blocks[len(blocks) // 2].register_forward_hook(let_the_other_thread_work)
    try:
        return [predict(model, inputs)]
    finally:
        hook.remove()


def unmerged_meanwhile(model: PeftModel) -> None:
    model.unmerge_adapter()


CHANGES: dict[str, Callable[[PeftModel], None]] = {
    "another adapter is activated": lambda model: model.set_adapter("b"),
    "adapters are switched off": lambda model: model.base_model.disable_adapter_layers(),
    "an adapter is added": lambda model: model.add_adapter("new", config_of(seed=9)),
    "another adapter is deleted": lambda model: model.delete_adapter("b"),
    "the adapter is merged": lambda model: model.merge_adapter(),
    "its constants are dropped": lambda model: model.unmerge_adapter(),
}


@pytest.mark.parametrize("is_merged", [False, True], ids=["rows computed", "rows constant"])
@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_keeps_the_adapter_that_it_began_with(change, name, is_merged):
    model, pixels = with_adapters(name, ALIKE)
    if is_merged:
        model.merge_adapter()
    inputs = {"pixel_values": pixels}
    expected = predict(model, inputs)
    if (change, is_merged) in (("the adapter is merged", True), ("another adapter is deleted", True)):
        model.unmerge_adapter()  # PEFT refuses both of a merged one
    assert torch.equal(*while_it_runs(model, inputs, lambda: CHANGES[change](model)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_walks_through_nothing_that_another_thread_may_be_adding_to(kind, monkeypatch):
    model, inputs = KINDS[kind]()
    ours = (PromptLayers, E2VPTLayer, BufferDict, nn.ParameterDict)
    walked: list[str] = []

    def note_walks(walk: str) -> None:
        walks = getattr(nn.Module, walk)

        def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if isinstance(module, ours):
                walked.append(walk)
            return walks(module, *args, **kwargs)

        monkeypatch.setattr(nn.Module, walk, noted)

    for walk in ("named_parameters", "named_buffers", "named_modules", "named_children"):
        note_walks(walk)
    predict(model, inputs)
    assert not walked
    list(model.parameters())
    assert walked


def test_layers_that_differ_in_what_is_active_go_by_their_own():
    model, pixels = with_adapters("vit", ALIKE)
    layers_of(model)[1].enable_adapters(False)
    with active_adapters_kept(layers_of(model)):
        assert current_choice() is None
    one_off = predict(model, {"pixel_values": pixels})
    layers_of(model)[1].enable_adapters(True)
    assert not torch.allclose(predict(model, {"pixel_values": pixels}), one_off, atol=1e-3)


def test_answers_of_an_adapter_that_was_deleted_meanwhile_are_dropped():
    model, pixels = with_adapters("vit", ALIKE)
    inputs = {"pixel_values": pixels[:2], "adapter_names": ["b", "c"]}
    with pytest.raises(RuntimeError, match="b was deleted or replaced while a batch ran with it.*run the batch again"):
        while_it_runs(model, inputs, lambda: model.delete_adapter("b"))


def test_an_adapter_answers_when_its_values_are_there(tmp_path, monkeypatch):
    model, pixels = with_adapters("vit", ALIKE)
    inputs = {"pixel_values": pixels[:2], "adapter_names": ["a", "new"]}
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    found = []
    from peft import peft_model

    read = peft_model.load_peft_weights

    def look_meanwhile(*args: Any, **kwargs: Any) -> Any:
        with pytest.raises(ValueError, match="values of adapter.s. new are yet to be loaded"):
            in_threads([lambda: predict(model, inputs)])
        found.append(True)
        return read(*args, **kwargs)

    monkeypatch.setattr(peft_model, "load_peft_weights", look_meanwhile)
    model.load_adapter(tmp_path / "b", "new")
    assert found and torch.equal(predict(model, inputs), predict(model, {**inputs, "adapter_names": ["a", "b"]}))


# ------------------------------------------------------------------------------------------------------- interception
@pytest.mark.parametrize("name", ["blip_vision", "levit", "glpn", "swinv2"])
def test_interception_keeps_no_scores_beyond_their_use(name):
    """What lives while the values are summed up is what lives there in the plain model, and the scores of the rows."""
    import weakref

    from peft_e2vpt.attention.torch_function import PRODUCTS

    def scores_alive(name: str, adapted: bool) -> list[int]:
        model, inputs = checks.adapt(name) if adapted else checks.build(name)
        alive: list[Any] = []
        counts: list[int] = []

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                name = getattr(func, "__name__", "")
                if isinstance(result, Tensor) and result.dim() >= 3 and result.shape[-1] == result.shape[-2]:
                    alive.append(weakref.ref(result))
                if name in PRODUCTS:
                    counts.append(sum(reference() is not None for reference in alive))
                return result

        with torch.no_grad(), Watch():
            model.eval()(**inputs)
        return counts

    assert max(scores_alive(name, True)) <= max(scores_alive(name, False)) + 1


# ----------------------------------------------------------------------------------------------------- for ten minutes
@pytest.mark.slow
def test_ten_minutes_of_threads_and_changes_give_no_wrong_answer_and_cost_no_memory(tmp_path):
    import os

    import psutil

    seconds = float(os.environ.get("E2VPT_STRESS_SECONDS", "600"))
    model, pixels = with_adapters("swin", DIFFERENT)
    model.save_pretrained(tmp_path)
    names = [*DIFFERENT, BASE]
    work = []
    for number, batch in enumerate(batches(pixels)):
        adapter_names = [names[(number + sample) % len(names)] for sample in range(len(batch))]
        work.append({"pixel_values": batch, "adapter_names": adapter_names})
    expected = [predict(model, inputs) for inputs in work]
    whole = {"pixel_values": pixels}
    single = {}
    for name in DIFFERENT:
        model.set_adapter(name)
        single[name] = predict(model, whole)
    end, done = time.monotonic() + seconds, [0] * THREADS
    process, memory = psutil.Process(), []

    def ask(number: int) -> None:
        while time.monotonic() < end:
            if number % 2:
                assert torch.equal(predict(model, work[number]), expected[number])
            else:
                found = predict(model, whole)
                assert any(torch.equal(found, answer) for answer in single.values())
            done[number] += 1

    def change() -> None:
        rounds = 0
        while time.monotonic() < end:
            kept = list(DIFFERENT)[rounds % len(DIFFERENT)]
            model.set_adapter(kept)
            model.merge_adapter()
            model.load_adapter(tmp_path / "pruned", "guest")
            found = predict(model, {"pixel_values": pixels, "adapter_names": ["guest"] * len(pixels)})
            assert torch.equal(found, single["pruned"])
            model.unmerge_adapter()
            model.delete_adapter("guest")
            rounds += 1
            memory.append(process.memory_info().rss)

    in_threads([*[lambda number=number: ask(number) for number in range(THREADS)], change])
    assert min(done) > 0
    early, late = memory[len(memory) // 5], memory[-1]
    print(
        f"{sum(done)} batches, {len(memory)} rounds of changes, memory {early / 2**20:.0f} to {late / 2**20:.0f} MiB"
    )
    assert late < 1.05 * early
