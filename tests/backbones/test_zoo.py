# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Every tiny model of `zoo.py`: adapted with an effect and nothing else changed, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from peft import get_peft_model

from tests.support import zoo
from tests.support import zoo_checks as checks


STATEMENTS = (
    checks.prompts_have_an_effect,
    checks.every_prompt_has_a_gradient,
    checks.eager_equals_sdpa,
    checks.rows_equal_inserted_tokens,
    checks.disabled_equals_the_base_model,
    checks.saved_equals_loaded,
    checks.checkpointing_leaves_gradients_equal,
)
COMPILED = ("vit", "swin", "sam_vision", "hiera", "vitdet", "cvt", "levit", "bridgetower_vision")  # one of each kind


def skip_if_missing(name: str) -> None:
    reason = checks.missing(name)
    if reason:
        pytest.skip(f"not in this environment: {reason}")


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda statement: statement.__name__)
@pytest.mark.parametrize("name", zoo.names(attention=True))
def test_a_model_with_attention_takes_prompts(name: str, statement: Callable[[str], float | None]) -> None:
    skip_if_missing(name)
    if statement(name) is None:
        pytest.skip("the statement does not apply to this model")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in COMPILED else pytest.mark.slow) for n in zoo.names(attention=True)]
)
def test_a_compiled_model_gives_the_same(name: str) -> None:
    skip_if_missing(name)
    if checks.compiled_equals_uncompiled(name) is None:
        pytest.skip("the statement does not apply to this model")


@pytest.mark.parametrize("name", zoo.names(attention=False))
def test_a_model_without_attention_over_tokens_is_refused_in_a_sentence(name: str) -> None:
    skip_if_missing(name)
    model, _ = checks.build(name)
    with pytest.raises(ValueError, match="has no self-attention that E2VPT knows"):
        get_peft_model(model, checks.config())
