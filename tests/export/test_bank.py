# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A bank of adapters: which are in memory, and what threads may do to it at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from peft_e2vpt.export import AdapterBank, export_adapter, export_backbone
from tests.support.several import BASE, DIFFERENT, with_adapters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    model, _ = with_adapters("vit", DIFFERENT)
    export_backbone(model, folder, format="torch")
    for name in DIFFERENT:
        export_adapter(model, name, folder / f"{name}.safetensors")
    return folder


def bank_of(folder: Path, **settings: int) -> AdapterBank:
    bank = AdapterBank(folder, **settings)
    for name in DIFFERENT:
        bank.add(name, folder / f"{name}.safetensors")
    return bank


def test_a_batch_takes_each_of_its_adapters_once(folder: Path) -> None:
    bank = bank_of(folder)
    inputs = bank.inputs(["b", "a", "b", BASE, "a"])
    assert inputs["adapter_index"].tolist() == [0, 1, 0, 2, 1]
    assert inputs["keys"].shape == (3, 3, 4, 6, 8) and inputs["head_weight"].shape == (3, 5, 32)
    assert bank.inputs([BASE])["keys"].shape == (3, 1, 4, 0, 8)


def test_what_is_asked_for_and_not_there_is_named(folder: Path) -> None:
    bank = bank_of(folder)
    bank.remove("b")
    for ask in (lambda: bank.inputs(["a", "b"]), lambda: bank.labels("b"), lambda: bank.remove("b")):
        with pytest.raises(KeyError, match="no adapter b in the bank; it has a, pruned, kv, zeroed, __base__"):
            ask()
    with pytest.raises(ValueError, match="__base__ is the name of the model without an adapter"):
        bank.add(BASE, folder / "a.safetensors")
    assert "a" in bank and "b" not in bank and BASE in bank and len(bank) == 4


def test_memory_stays_below_its_bound_and_what_was_given_up_comes_back(folder: Path) -> None:
    free = bank_of(folder)
    bound = free.nbytes // 2
    bank = bank_of(folder, max_bytes=bound)
    for name in [*DIFFERENT, *DIFFERENT]:
        found, expected = bank.inputs([name]), free.inputs([name])
        assert all(np.array_equal(found[key], expected[key]) for key in expected)
        assert bank.nbytes <= bound
    with pytest.raises(ValueError, match="more than the 10 of the bank"):
        AdapterBank(folder, max_bytes=10).add("a", folder / "a.safetensors")


def test_threads_add_replace_remove_and_use_adapters_at_the_same_time(folder: Path) -> None:
    bank = bank_of(folder, max_bytes=bank_of(folder).nbytes // 2)
    free = bank_of(folder)
    expected = {name: free.inputs([name, BASE]) for name in DIFFERENT}

    def use(name: str) -> None:
        for _ in range(100):
            found = bank.inputs([name, BASE])
            assert all(np.array_equal(found[key], expected[name][key]) for key in found)

    def change(number: int) -> None:
        for _ in range(50):
            bank.add(f"guest{number}", folder / "a.safetensors")
            bank.add("a", folder / "a.safetensors")
            bank.remove(f"guest{number}")

    with ThreadPoolExecutor(8) as pool:
        tasks = [pool.submit(use, name) for name in DIFFERENT] + [pool.submit(change, number) for number in range(3)]
        for task in tasks:
            task.result()
    assert sorted(bank) == sorted(DIFFERENT)


def test_a_batch_is_cut_to_the_classes_that_its_adapters_had_when_it_began(folder: Path) -> None:
    bank = bank_of(folder)
    batch = bank.batch(["a", BASE])
    bank.remove("a")
    parts = batch.split(np.arange(14.0).reshape(2, 7))
    assert [len(part) for part in parts] == [len(labels) for labels in batch.labels] == [5, 5]
