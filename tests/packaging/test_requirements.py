# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Old versions of what the package stands on are refused when it is imported."""

import subprocess
import sys
from configparser import ConfigParser

import pytest

from peft_e2vpt import requirements
from tests.support.paths import ROOT


def test_the_versions_are_those_that_pip_installs():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    installed = setup["options"]["install_requires"].split()
    of_command_line = {"rich", "typer"}  # imported by `python -m peft_e2vpt` alone
    imported = [entry for entry in installed if entry.split(">=")[0] not in of_command_line]
    assert imported == [f"{name}>={oldest}" for name, oldest in requirements.OLDEST.items()]


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


def test_they_are_refused_before_anything_else_is_imported():
    code = (
        "import importlib.metadata, sys; importlib.metadata.version = lambda name: '0.1'\n"
        "try: import peft_e2vpt\n"
        "except ImportError as error: print(error, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.startswith("peft_e2vpt needs torch>=2.6, ") and run.stdout.endswith(" False False\n")
