# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What can be chosen is kept through every way of storing it; what cannot is refused in one clear sentence."""

import copy
import dataclasses
import json
import pickle
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftType, get_peft_config, get_peft_model

from peft_e2vpt import E2VPTConfig
from peft_e2vpt.tuner.config import CHOICES
from tests.support.models import build


# ------------------------------------------------------------------------------------------------------- valid choices
NAMES = st.lists(st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9_]{1,8})?", fullmatch=True), min_size=1, max_size=3)
FREE = {
    "share_kv_prompts": st.booleans(),
    "share_kv_prompts_across_layers": st.booleans(),
    "visual_prompt_dropout": st.floats(0, 0.99),
    "seed": st.none() | st.integers(0, 2**40),
    "num_segments": st.integers(1, 64),
    "target_modules": st.none() | NAMES | st.just(r".*\.attention"),
    "exclude_modules": st.none() | NAMES | st.just(r".*\.0\.attention"),
    "modules_to_save": st.none() | st.just([]) | NAMES,
    "init_weights": st.booleans(),
    "labels": st.none() | NAMES,
    "base_model_settings": st.none() | st.just({"problem_type": None, "vision_config": {"image_size": [32, 48]}}),
    "format_version": st.just(1),
    "inference_mode": st.booleans(),
    "revision": st.none() | st.just("main"),
}
DEEP = {
    "visual_prompt_mode": st.just("deep"),
    "num_visual_prompts": st.integers(0, 200),
    "num_kv_prompts": st.integers(1, 200),
    "token_gate": st.sampled_from([None, *CHOICES["token_gate"]]),
    "layers_to_transform": st.none() | st.integers(0, 40) | st.lists(st.integers(0, 40), min_size=1),
}
SHALLOW = {
    "visual_prompt_mode": st.just("shallow"),
    "num_visual_prompts": st.integers(1, 200),
    "num_kv_prompts": st.integers(0, 200),
    "token_gate": st.sampled_from([None, "embedding"]),
}
OTHER_CHOICES = {name: st.sampled_from(CHOICES[name]) for name in CHOICES.keys() - DEEP.keys()}


def configs() -> st.SearchStrategy:
    return st.one_of([st.builds(E2VPTConfig, **{**FREE, **OTHER_CHOICES, **special}) for special in (DEEP, SHALLOW)])


def saved_and_loaded(config: E2VPTConfig, cls: type[PeftConfig]) -> PeftConfig:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return cls.from_pretrained(folder)


@settings(deadline=None, max_examples=200)
@given(configs())
def test_every_valid_config_survives_every_way_of_storing_it(config):
    assert saved_and_loaded(config, E2VPTConfig) == config
    assert saved_and_loaded(config, PeftConfig) == config
    from_json = json.loads(json.dumps(config.to_dict()))
    assert get_peft_config(dict(from_json)) == config
    assert E2VPTConfig.from_peft_type(**from_json) == config
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_every_field_has_a_test_value_a_default_and_a_line_of_help():
    fields = {f.name: f for f in dataclasses.fields(E2VPTConfig)}
    own = fields.keys() - {f.name for f in dataclasses.fields(PeftConfig)}
    assert own <= FREE.keys() | DEEP.keys() | OTHER_CHOICES.keys()
    for name in own:
        assert fields[name].default is not dataclasses.MISSING
        assert fields[name].metadata["help"].endswith(".")
        assert f"        {name} (`" in E2VPTConfig.__doc__, name


def test_the_defaults_are_those_of_the_paper():
    config = E2VPTConfig()
    assert config.peft_type is PeftType.E2VPT
    assert (config.num_visual_prompts, config.num_kv_prompts, config.num_segments) == (10, 5, 8)
    assert (config.visual_prompt_mode, config.share_kv_prompts, config.visual_prompt_dropout) == ("deep", True, 0.1)
    assert (config.gate_scope, config.segment_layout, config.pruned_prompts) == ("layer", "contiguous", "remove")


def test_the_token_gate_follows_the_mode_unless_it_is_given():
    assert E2VPTConfig().token_gate == "attention"
    assert E2VPTConfig(visual_prompt_mode="shallow").token_gate == "embedding"
    assert E2VPTConfig(token_gate="embedding").token_gate == "embedding"


@pytest.mark.parametrize("names", [{"q", "p"}, ("q", "p")])
def test_names_may_come_in_any_container(names):
    config = E2VPTConfig(target_modules=names, exclude_modules=names, modules_to_save=names)
    assert config.target_modules == config.exclude_modules == config.modules_to_save == ["p", "q"]


def test_one_layer_may_be_given_as_a_number():
    assert E2VPTConfig(layers_to_transform=2).layers_to_transform == [2]
    assert E2VPTConfig(layers_to_transform=range(2)).layers_to_transform == [0, 1]


def test_a_config_written_by_a_later_version_loads_with_a_warning_that_names_what_is_unknown(tmp_path):
    config = E2VPTConfig(num_visual_prompts=7)
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prompt_shape": "round"}))
    with pytest.warns(UserWarning, match="prompt_shape"):
        assert E2VPTConfig.from_pretrained(tmp_path) == config


# ------------------------------------------------------------------------------------------------------------ mistakes
MISTAKES = [
    *[({name: value}, name) for name in ("num_visual_prompts", "num_kv_prompts") for value in (-1, 1.5, "3", True)],
    *[({"num_segments": value}, "num_segments") for value in (0, 2.0, None)],
    *[({name: 10**9}, name) for name in ("num_visual_prompts", "num_kv_prompts", "num_segments")],
    *[({"seed": value}, "seed") for value in (-1, 0.5, "0", True, 2**64)],
    *[({"visual_prompt_dropout": value}, "visual_prompt_dropout") for value in (-0.1, 1.0, float("nan"), "0.1", True)],
    *[({name: "both"}, name) for name in CHOICES],
    *[({name: [CHOICES[name][0]]}, name) for name in CHOICES],
    *[({name: None}, name) for name in CHOICES if name != "token_gate"],
    *[
        ({name: value}, name)
        for name in ("share_kv_prompts", "share_kv_prompts_across_layers", "init_weights", "inference_mode")
        for value in ("False", None, 1)
    ],
    *[
        ({name: value}, name)
        for name in ("target_modules", "exclude_modules", "modules_to_save")
        for value in (3, [3], [None])
    ],
    *[({name: "(attention"}, name) for name in ("target_modules", "exclude_modules")],
    *[({"labels": value}, "labels") for value in ("cat", 3, [1, 2], {"0": "cat"})],
    *[({"base_model_settings": value}, "base_model_settings") for value in ("x", [1], {"eps": float("nan")})],
    *[({"auto_mapping": value}, "auto_mapping") for value in ("x", ["y"], {"base_model_class": 3})],
    *[({"base_model_name_or_path": value}, "base_model_name_or_path") for value in (3, ["x"])],
    *[({"revision": value}, "revision") for value in (3, "../x", "")],
    *[({"format_version": value}, "format_version") for value in (0, "1", 1.0, True, None)],
    ({"peft_version": 3}, "peft_version"),
    ({"target_modules": "all-linear"}, "target_modules"),
    ({"modules_to_save": "classifier"}, "modules_to_save"),
    *[({"layers_to_transform": value}, "layers_to_transform") for value in ([], -1, [0, -1], "0", [0.5], True)],
    ({"visual_prompt_mode": "shallow", "num_visual_prompts": 0}, "num_visual_prompts"),
    ({"visual_prompt_mode": "shallow", "token_gate": "attention"}, "token_gate"),
    ({"visual_prompt_mode": "shallow", "layers_to_transform": [0]}, "layers_to_transform"),
]


@pytest.mark.parametrize("choice, field", MISTAKES, ids=lambda value: str(value))
def test_a_mistake_is_refused_in_one_sentence_that_names_the_field_and_the_value(choice, field):
    with pytest.raises(ValueError) as error:
        E2VPTConfig(**choice)
    message = str(error.value)
    assert field in message
    value = choice[field]
    assert any(str(part) in message for part in (value if isinstance(value, list) and value else [value]))
    assert message.endswith((".", "].")) and "\n" not in message


@pytest.mark.parametrize("number", [np.int64, np.int32, torch.tensor])
def test_numbers_of_numpy_and_torch_are_taken_as_pythons_own(number):
    config = E2VPTConfig(
        num_visual_prompts=number(4),
        layers_to_transform=[number(1)],
        visual_prompt_dropout=np.float32(0.5),
        share_kv_prompts=np.bool_(False),
    )
    assert config == E2VPTConfig(
        num_visual_prompts=4, layers_to_transform=[1], visual_prompt_dropout=0.5, share_kv_prompts=False
    )
    assert {type(value) for value in vars(config).values()} & {np.bool_, np.float32, np.int64, torch.Tensor} == set()
    json.dumps(config.to_dict())


def test_thousands_of_prompts_are_asked_after():
    with pytest.warns(UserWarning, match=r"num_visual_prompts=2000 .* the paper has 10 to 100. Is it meant"):
        E2VPTConfig(num_visual_prompts=2000)


def test_a_field_that_is_changed_afterwards_is_checked_when_a_model_is_adapted():
    config = E2VPTConfig()
    config.num_visual_prompts = "many"
    model, _ = build("vit")
    with pytest.raises(ValueError, match="num_visual_prompts must be a whole number of at least 0, got 'many'"):
        get_peft_model(model, config)


def test_no_prompts_at_all_are_refused():
    with pytest.raises(ValueError, match="num_visual_prompts and num_kv_prompts are both 0"):
        E2VPTConfig(num_visual_prompts=0, num_kv_prompts=0)


@pytest.mark.parametrize("name", CHOICES)
def test_a_wrong_choice_is_answered_with_the_right_ones(name):
    with pytest.raises(ValueError) as error:
        E2VPTConfig(**{name: "both"})
    assert all(choice in str(error.value) for choice in CHOICES[name])
