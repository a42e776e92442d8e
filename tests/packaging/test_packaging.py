# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A wheel holds what the package needs and works in an environment of its own; importing it adds little."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT


pytestmark = pytest.mark.packaging


PACKAGES = ("peft_e2vpt", "peft_e2vpt_cli")
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
# what is imported is compiled once, as it is for users
NOT_OURS = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in NOT_OURS}


def output_of(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    output_of(*pip, "--wheel-dir", "dist", ".", cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """Python in a new environment with the wheel; all else is that of the running environment."""
    folder = wheel.parents[1] / "environment"
    output_of(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    output_of(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", own, wheel, cwd=wheel.parent)
    others = sysconfig.get_path("purelib")
    # without the .pth files there, one of which may name the checkout
    (own / "others.pth").write_text(f"{others}\n")
    return folder / "bin" / "python"


def test_a_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.partition("/")[0] in PACKAGES}
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == files and {"peft_e2vpt/hub/card_template.md", "peft_e2vpt/py.typed"} <= held


def test_the_installed_wheel_is_imported_and_not_the_checkout(environment: Path) -> None:
    code = "import peft_e2vpt, peft; print(peft_e2vpt.__file__, peft.PeftType('E2VPT').value)"
    path, method = output_of(environment, "-c", code, cwd=environment.parent).split()
    assert Path(path).is_relative_to(environment.parents[1]) and method == "E2VPT"


def test_the_installed_command_line_runs(environment: Path) -> None:
    (script,) = environment.parents[1].rglob("bin/peft-e2vpt")
    for command in ([script], ["-m", "peft_e2vpt"]):
        assert "inspect" in output_of(environment, *command, "--help", cwd=environment.parent)


COST = """
import time, warnings
warnings.simplefilter("ignore")
import transformers, peft
from transformers import ViTConfig, ViTForImageClassification
sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8, "patch_size": 8}
model = ViTForImageClassification(ViTConfig(**sizes))
peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "query"]))  # brings what any use of PEFT needs
start = time.process_time()
import peft_e2vpt
print(time.process_time() - start)
"""


def test_importing_costs_less_than_a_tenth_of_a_second_beyond_transformers_and_peft() -> None:
    costs: list[float] = []
    while len(costs) < 3 and not (costs and costs[-1] < 0.1):  # a busy machine gets two more tries
        costs.append(float(output_of(sys.executable, "-c", COST, cwd=ROOT)))
    assert min(costs) < 0.1, costs


def test_importing_brings_neither_the_trainer_nor_datasets_nor_figures() -> None:
    heavy = ("transformers.trainer", "datasets", "pandas", "matplotlib", "sklearn", "typer", "rich.table")
    code = f"import sys, peft_e2vpt; print([name for name in {heavy} if name in sys.modules])"
    assert output_of(sys.executable, "-c", code, cwd=ROOT) == "[]\n"
