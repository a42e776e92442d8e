# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""No model cards in checkpoints: with their figures they take as long as these trainings, and have their own tests."""

from collections.abc import Iterator

import pytest
from peft import PeftModel

from peft_e2vpt.hub.card import AdapterFacts


@pytest.fixture(autouse=True, scope="package")
def no_model_cards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterFacts, "save", lambda self, folder: None)
        patch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: None)
        yield
