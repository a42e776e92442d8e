# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`import peft_e2vpt` makes E2VPT a method of PEFT like those that PEFT brings along."""

import copy
import importlib
import json
import multiprocessing
import pickle
import subprocess
import sys

import peft
import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_e2vpt
from peft_e2vpt import E2VPTConfig, E2VPTModel, registration
from tests.support.adapted import adapt


MAPPINGS = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)


def test_the_member_is_found_by_name_by_value_and_as_attribute():
    assert PeftType("E2VPT") is PeftType["E2VPT"] is PeftType.E2VPT is registration.peft_type()
    assert PeftType.E2VPT in list(PeftType)
    assert vars(PeftType)["E2VPT"] is PeftType.E2VPT  # from Python 3.12 on attributes are looked up nowhere else
    assert (PeftType.E2VPT.name, PeftType.E2VPT.value) == ("E2VPT", "E2VPT")
    assert json.loads(json.dumps({"peft_type": PeftType.E2VPT})) == {"peft_type": "E2VPT"}


def test_member_and_string_find_config_tuner_and_prefix():
    for key in (PeftType.E2VPT, "E2VPT"):
        assert [mapping[key] for mapping in MAPPINGS] == [E2VPTConfig, E2VPTModel, "e2vpt_"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_copies_of_the_member_are_the_member(protocol):
    assert pickle.loads(pickle.dumps(PeftType.E2VPT, protocol)) is PeftType.E2VPT
    assert copy.copy(PeftType.E2VPT) is copy.deepcopy(PeftType.E2VPT) is PeftType.E2VPT


def test_registering_twice_changes_nothing():
    before = [dict(mapping) for mapping in MAPPINGS]
    registration.register(E2VPTConfig, E2VPTModel)
    importlib.reload(peft_e2vpt)
    assert [dict(mapping) for mapping in MAPPINGS] == before


def reload_all() -> None:
    old, member = E2VPTConfig, PeftType.E2VPT
    for module in (registration, peft_e2vpt.tuner.config, peft_e2vpt.tuner.model, peft_e2vpt):
        importlib.reload(module)
    assert PeftType.E2VPT is member and list(PeftType).count("E2VPT") == 1
    new = PEFT_TYPE_TO_CONFIG_MAPPING[member]
    assert new is peft_e2vpt.E2VPTConfig and new is not old
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is peft_e2vpt.E2VPTModel


def test_reloading_every_module_registers_the_reloaded_classes():
    child = multiprocessing.get_context("fork").Process(target=reload_all)  # reloaded classes are other classes
    child.start()
    child.join()
    assert child.exitcode == 0


def test_another_method_of_the_same_name_is_an_error_that_names_it(monkeypatch):
    other = type("OtherConfig", (PeftConfig,), {"__module__": "vision_prompts.e2vpt"})
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.E2VPT, other)
    with pytest.raises(RuntimeError, match=r"called E2VPT: vision_prompts\.e2vpt\.OtherConfig"):
        registration.register(E2VPTConfig, E2VPTModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.E2VPT] is other


def test_peft_reports_the_method_in_the_status_of_a_model():
    model, _ = adapt()
    status = model.get_model_status()
    assert (status.peft_types, status.active_adapters, status.enabled) == ({"default": "E2VPT"}, ["default"], True)
    assert status.requires_grad == {"default": True}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------- a process that has imported only PEFT
IN_A_FRESH_PROCESS = """
import json, pickle, sys, peft
found = {"members before": [member.value for member in peft.PeftType]}
try:
    peft.PeftConfig.from_pretrained(sys.argv[1])
except KeyError as error:
    found["error before"] = repr(error)
member = pickle.load(open(sys.argv[1] + "/member", "rb"))
found["member"] = member is peft.PeftType.E2VPT
found["imported"] = "peft_e2vpt" in sys.modules
found["members after"] = [member.value for member in peft.PeftType]
found["config"] = peft.PeftConfig.from_pretrained(sys.argv[1]).to_dict()
found["pickled config"] = pickle.load(open(sys.argv[1] + "/config", "rb")).to_dict()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    config = E2VPTConfig(seed=3)
    config.save_pretrained(folder)
    (folder / "member").write_bytes(pickle.dumps(PeftType.E2VPT))
    (folder / "config").write_bytes(pickle.dumps(config))
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.processes
def test_without_the_import_peft_does_not_know_the_method(fresh):
    """Why every model card has to begin with `import peft_e2vpt`."""
    assert "E2VPT" not in fresh["members before"]
    assert fresh["error before"] == "KeyError('E2VPT')"


@pytest.mark.processes
def test_unpickling_the_member_imports_the_package(fresh):
    assert fresh["member"] is True and fresh["imported"] is True


@pytest.mark.processes
def test_the_other_methods_of_peft_stay_as_they_were(fresh):
    assert len(fresh["members before"]) == len(peft.PeftType) - 1
    assert fresh["members after"] == [*fresh["members before"], "E2VPT"]


@pytest.mark.processes
def test_configs_arrive_whole_in_another_process(fresh):
    config = json.loads(json.dumps(E2VPTConfig(seed=3).to_dict()))
    assert fresh["config"] == fresh["pickled config"] == config
