# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Settings of the whole test run: no network, one thread, one seed per test, the mark `quick`."""

import os
from collections.abc import Iterator


os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.support.torchvision import declare_missing_operators  # noqa: E402


THOROUGH = ("compile", "processes", "packaging", "browser", "deepspeed", "timm", "slow", "thorough", "training")
"""Marks of tests that `pytest -m quick` leaves out."""

declare_missing_operators()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(item.get_closest_marker(name) for name in THOROUGH):
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
