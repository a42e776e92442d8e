# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Old versions of what the package stands on are refused when it is imported."""

import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError

import pytest

from peft_e2vpt import requirements
from tests.support.paths import ROOT


def test_the_versions_are_those_of_the_installed_package(monkeypatch):
    seen = []
    monkeypatch.setattr(requirements, "version", lambda name: seen.append(name) or "99")
    requirements.check_requirements()
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert seen == [entry.split(">=")[0] for entry in setup["options"]["install_requires"].split()]


def test_what_an_extra_needs_is_not_asked_for(monkeypatch):
    needed = ["peft>=0.21", 'matplotlib>=3.8; extra == "plot"', 'tomli>=2; python_version < "3"']
    monkeypatch.setattr(requirements, "requires", lambda name: needed)
    monkeypatch.setattr(requirements, "version", lambda name: {"peft": "0.21"}[name])
    requirements.check_requirements()


def test_a_source_tree_that_is_not_installed_is_not_checked(monkeypatch):
    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "requires", none)
    monkeypatch.setattr(requirements, "version", lambda name: "0.1")
    requirements.check_requirements()


def test_a_missing_package_is_named(monkeypatch):
    def found(name):
        if name == "accelerate":
            raise PackageNotFoundError(name)
        return "99"

    monkeypatch.setattr(requirements, "version", found)
    with pytest.raises(ImportError, match="needs accelerate>=1.10, but found no accelerate: run pip install"):
        requirements.check_requirements()


@pytest.mark.parametrize("found", ["0.21", "0.21.0", "0.22.0.dev0", "0.21.0rc1", "0.21.2+cu130", "1.0"])
def test_this_version_and_newer_ones_are_fine(monkeypatch, found):
    monkeypatch.setattr(requirements, "version", lambda name: found if name == "peft" else "99")
    requirements.check_requirements()


@pytest.mark.parametrize("found", ["0.9", "0.20.1", "0.20.1.dev0"])
def test_older_ones_are_refused(monkeypatch, found):
    monkeypatch.setattr(requirements, "version", lambda name: found if name == "peft" else "99")
    with pytest.raises(ImportError, match=f"needs peft>=0.21, but found peft {found}: run pip install --upgrade peft"):
        requirements.check_requirements()


def test_all_that_are_too_old_are_named(monkeypatch):
    monkeypatch.setattr(requirements, "version", lambda name: "0.1")
    with pytest.raises(ImportError, match="needs torch>=2.6, .* pip install --upgrade torch transformers peft accel"):
        requirements.check_requirements()


@pytest.mark.packaging
def test_they_are_refused_before_anything_else_is_imported():
    code = (
        "import importlib.metadata, sys; importlib.metadata.version = lambda name: '0.1'\n"
        "try: import peft_e2vpt\n"
        "except ImportError as error: print(error, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.startswith("peft_e2vpt needs torch>=2.6, ") and run.stdout.endswith(" False False\n")
