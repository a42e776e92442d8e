# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Damaged files by the hundred: each ends in an error of Python's own that says what is wrong, or in the right model.

Configs are a real one with fields replaced, removed or cut off; files of tensors are a real one with another header,
other bytes or another length. A further model of the same base is loaded between, so nothing is left behind.
"""

from __future__ import annotations

import json
import resource
import string
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

import peft_e2vpt
from peft_e2vpt import E2VPTConfig
from peft_e2vpt_cli.content import inspect_adapter
from tests.support.adapted import predict, save_with_base


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CLEAR = (ValueError, TypeError, OSError)
FUZZ = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FEW = settings(FUZZ, max_examples=100)
# what a config says of the base model, which is at hand where PEFT loads an adapter
NEEDED_BY_LOAD = ("base_model", "base model", "labels", "was made for", "dtype", "revision")
MEMORY = 512 * 2**20  # a bad file of some kilobytes may not have more than this allocated


class Good(NamedTuple):
    folder: Path
    config: dict[str, Any]
    tensors: bytes
    base: Any
    inputs: dict[str, Tensor]
    answer: Tensor
    state: dict[str, Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    folder = tmp_path_factory.mktemp("fuzz")
    base, model, inputs = save_with_base(folder, target_modules=r".*\.attention")
    content = json.loads((folder / "adapter" / CONFIG).read_text())
    state = {name: value.clone() for name, value in base.state_dict().items()}
    answer = predict(model.eval(), inputs)
    return Good(folder, content, (folder / "adapter" / TENSORS).read_bytes(), base.eval(), inputs, answer, state)


# ----------------------------------------------------------------------------------------------------- what is damaged
HUGE = st.sampled_from([10**6, 10**9, 2**31, 2**63, 2**64, 10**30, -1, -(2**63), 0])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | HUGE
    | st.integers(-3, 40)
    | st.floats()
    | st.text(string.printable, max_size=12)
    | st.sampled_from(["(a+)+$", "(.*)*x", "../../x", "/etc/passwd", "deep", "zero", "E2VPT", "LORA", "os", "\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
IN_SETTINGS = st.dictionaries(
    st.sampled_from(
        [
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size"),
            *("patch_size", "num_channels", "hidden_act", "layer_norm_eps", "problem_type", "dtype", "auto_map"),
            *("trust_remote_code", "_name_or_path", "quantization_config", "num_labels", "id2label", "foo"),
        ]
    ),
    VALUES,
    max_size=3,
)


@st.composite
def configs(draw: st.DrawFn, content: dict[str, Any]) -> str:
    """The text of a config with one to three fields that are not what they were."""
    changed = dict(content)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(content)))
        kind = draw(st.sampled_from(["replace", "replace", "settings", "remove", "unknown"]))
        if kind == "replace":
            changed[name] = draw(VALUES)
        elif kind == "settings":
            changed["base_model_settings"] = draw(IN_SETTINGS)
        elif kind == "remove":
            changed.pop(name, None)
        else:
            changed[draw(st.text(max_size=8))] = draw(VALUES)
    text = json.dumps(changed)
    if draw(st.integers(0, 9)) == 9:
        text = text[: draw(st.integers(0, len(text)))]
    return text


@st.composite
def tensor_files(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a file of tensors with another header, length or content."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = draw(st.sampled_from(["header", "header", "header", "bytes", "length", "size", "noise"]))
    if kind == "noise":
        return draw(st.binary(max_size=64))
    if kind == "length":
        return content[: draw(st.integers(0, len(content)))]
    if kind == "size":
        return draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    if kind == "bytes":  # of the header
        place = draw(st.integers(0, 8 + size - 1))
        return content[:place] + draw(st.binary(min_size=1, max_size=3)) + content[place + 1 :]
    name = draw(st.sampled_from([name for name in sorted(header) if name != "__metadata__"]))
    entry = dict(header[name])
    what = draw(st.sampled_from(["dtype", "shape", "same size", "offsets", "rename", "remove"]))
    if what == "dtype":
        entry["dtype"] = draw(st.sampled_from(["F16", "F64", "I32", "I64", "BOOL", "U8", "C64", "F8_E4M3", "X"]))
    elif what == "shape":
        entry["shape"] = draw(st.lists(st.integers(-1, 64) | HUGE, max_size=5))
    elif what == "same size":
        entry["shape"] = draw(st.permutations([*entry["shape"], 1]))
    elif what == "offsets":
        entry["data_offsets"] = draw(st.lists(st.integers(0, len(data)) | HUGE, max_size=3))
    header[name] = entry
    if what in ("rename", "remove"):
        entry = header.pop(name)
    if what == "rename":
        header[draw(st.text(max_size=12)) if draw(st.booleans()) else name.replace("e2vpt_", "e2vqt_")] = entry
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# ----------------------------------------------------------------------------------------------------- what it ends in
def outcome_of_loading(good: Good, folder: Path) -> str:
    """How the two ways of loading end; the base model is the same afterwards."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = PeftModel.from_pretrained(good.base, folder)
        except (*CLEAR, KeyError) as error:
            # PEFT alone has read the config until its method is known: its errors have its words
            assert not isinstance(error, KeyError) or not is_of_e2vpt(folder), repr(error)
            assert str(error)
            ended = type(error).__name__
        else:
            ended = "loaded"
            answer = predict(model.eval(), good.inputs)
            model.unload()
            assert answer.shape[0] == good.answer.shape[0]
        try:
            peft_e2vpt.load(folder)
        except CLEAR as error:
            assert str(error)
            assert ended != "loaded" or any(word in str(error) for word in NEEDED_BY_LOAD), str(error)
        try:
            inspect_adapter(folder)
        except CLEAR as error:
            assert str(error)
    after = good.base.state_dict()
    assert after.keys() == good.state.keys()
    assert all(torch.equal(after[name], value) for name, value in good.state.items())
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
    return ended


def is_of_e2vpt(folder: Path) -> bool:
    try:
        content = json.loads((folder / CONFIG).read_text())
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("peft_type") == "E2VPT"


def outcomes_of(good: Good, files: st.SearchStrategy[tuple[str, bytes]]) -> dict[str, int]:
    """How often loading ended in what way, for many pairs of a config and a file of tensors."""
    outcomes: dict[str, int] = {}

    @FUZZ
    @given(files)
    def load(content: tuple[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / CONFIG).write_text(content[0])
            (folder / TENSORS).write_bytes(content[1])
            ended = outcome_of_loading(good, folder)
        outcomes[ended] = outcomes.get(ended, 0) + 1

    load()
    return outcomes


def test_a_config_with_other_fields_ends_in_a_clear_error_or_a_model(good: Good) -> None:
    outcomes = outcomes_of(good, configs(good.config).map(lambda text: (text, good.tensors)))
    assert sum(outcomes.values()) - outcomes.get("loaded", 0) >= 100, outcomes


def test_a_file_of_tensors_with_another_header_ends_in_a_clear_error_or_the_right_model(good: Good) -> None:
    config = json.dumps(good.config)
    outcomes = outcomes_of(good, tensor_files(good.tensors).map(lambda content: (config, content)))
    assert sum(outcomes.values()) - outcomes.get("loaded", 0) >= 200, outcomes


@FEW
@given(st.sampled_from(sorted(E2VPTConfig().to_dict().keys() - {"peft_type"})), VALUES)
def test_a_field_of_another_type_is_refused_when_the_config_is_made(name: str, value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = E2VPTConfig(**{name: value})
        except (ValueError, TypeError) as error:
            assert name.split("_")[0] in str(error).lower()
        else:
            assert json.dumps(config.to_dict(), default=str)
