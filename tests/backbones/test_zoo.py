# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Every tiny model of `zoo.py`: adapted with an effect and nothing else changed, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from peft import get_peft_model

from tests.support import zoo
from tests.support import zoo_checks as checks
from tests.support.zoo_marks import ONE_OF_EACH_KIND, marks_of, parameters


NAMES = zoo.names(attention=True)


def cases(statements: tuple[checks.Statement, ...], names: list[str]) -> list[Any]:
    """Every statement with every model that it applies to."""
    return [
        pytest.param(name, statement, marks=marks_of(name), id=f"{name}-{statement.__name__}")
        for name in names
        for statement in statements
        if checks.applies(statement, name)
    ]


@pytest.fixture(autouse=True)
def skip_if_missing(name: str) -> None:
    reason = checks.missing(name)
    if reason:
        pytest.skip(f"not in this environment: {reason}")


@pytest.mark.parametrize(("name", "statement"), cases(checks.STATEMENTS, NAMES))
def test_a_model_with_attention_takes_prompts(name: str, statement: checks.Statement) -> None:
    statement(name)


@pytest.mark.parametrize(
    ("name", "statement"), cases(checks.ABOUT_HEADS, [name for name in NAMES if checks.has_a_head(name)])
)
def test_a_model_with_a_head_takes_prompts_and_trains_its_head(name: str, statement: checks.Statement) -> None:
    statement(name, modules_to_save=None)


@pytest.mark.parametrize("name", parameters([name for name in NAMES if not checks.has_a_head(name)]))
def test_a_backbone_without_a_head_trains_prompts_alone(name: str) -> None:
    model, _ = checks.adapt(name, modules_to_save=None)
    assert model.peft_config["default"].modules_to_save == []


def one_of_each_kind_or_slow(names: Iterable[str], always: Iterable[str] = ONE_OF_EACH_KIND) -> list[Any]:
    return [pytest.param(name, marks=[] if name in always else [*marks_of(name), pytest.mark.slow]) for name in names]


@pytest.mark.compile
@pytest.mark.parametrize(
    "name", one_of_each_kind_or_slow(name for name in NAMES if checks.applies(checks.compiled_equals_uncompiled, name))
)
def test_a_compiled_model_gives_the_same(name: str) -> None:
    checks.compiled_equals_uncompiled(name)


@pytest.mark.compile
@pytest.mark.parametrize(
    "name",
    one_of_each_kind_or_slow(
        (name for name in NAMES if checks.applies(checks.compiled_equals_uncompiled_pruned_and_merged, name)),
        always=(),
    ),
)
def test_a_compiled_model_gives_the_same_pruned_and_merged(name: str) -> None:
    checks.compiled_equals_uncompiled_pruned_and_merged(name)


@pytest.mark.compile
@pytest.mark.parametrize(
    "name",
    one_of_each_kind_or_slow(
        (name for name in NAMES if checks.applies(checks.exported_equals_eager, name)),
        always=("vit", "beit_shared_bias", "hiera"),
    ),
)
def test_an_exported_model_gives_the_same(name: str) -> None:
    checks.exported_equals_eager(name)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("name", checks.WITHOUT_EXPORT)
def test_a_model_that_is_not_exported_cannot_be_without_prompts_either(name: str) -> None:
    model, inputs = checks.build(name)
    try:
        program = checks.export(model, inputs)
    except Exception:  # torch has many
        return
    assert checks.apart(checks.run(program.module(), inputs), checks.run(model, inputs)) > 0.1


@pytest.mark.parametrize("name", parameters(sorted(checks.WITHOUT_DYNAMIC_QUANTISATION)))
def test_a_model_that_is_not_quantised_cannot_be_without_prompts_either(name: str) -> None:
    model, inputs = checks.build(name)
    with pytest.raises((AttributeError, TypeError), match="function|method"):
        checks.run(checks.quantise(model), inputs)


@pytest.mark.parametrize("name", parameters(sorted(checks.WITH_ONE_IMPLEMENTATION)))
def test_a_model_whose_implementations_are_not_compared_has_one(name: str) -> None:
    assert not checks.has_two_implementations(name)


@pytest.mark.parametrize("name", parameters(sorted(checks.WITHOUT_CHECKPOINTING)))
def test_a_model_that_is_not_checkpointed_cannot_be(name: str) -> None:
    assert not checks.has_checkpointing(name)


@pytest.mark.parametrize("name", parameters(zoo.names(attention=False)))
def test_a_model_without_attention_over_tokens_is_refused_in_a_sentence(name: str) -> None:
    model, _ = checks.build(name)
    with pytest.raises(ValueError, match="has no self-attention that E2VPT knows"):
        get_peft_model(model, checks.config())
