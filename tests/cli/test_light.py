# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Commands without a model start at once, because their package imports no library for models."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

import peft_e2vpt
from peft_e2vpt._compat import METHOD
from peft_e2vpt.hub import card, loading
from peft_e2vpt.tuner.config import FORMAT_VERSION
from peft_e2vpt_cli import files
from tests.support.command_line import ENVIRONMENT, command_line


@pytest.mark.processes
def test_the_command_works_in_a_process_of_its_own_and_without_unicode(in_place: Path) -> None:
    done = command_line("inspect", "adapter", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == ""
    assert "3: red, green, blue" in done.stdout and "    0  ######## ########" in done.stdout


@pytest.mark.processes
def test_an_error_in_a_process_has_no_traceback() -> None:
    done = command_line("inspect", "docs")
    assert done.returncode == 1 and done.stderr.splitlines() == [
        "Error: There is no adapter at docs: no adapter_config.json was found."
    ]


def processor_time_of(*arguments: str) -> float:
    """Least seconds of CPU of three runs of `peft-e2vpt`."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert command_line(*arguments, module="peft_e2vpt_cli").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [(["--help"], 0.5), (["inspect", "adapter"], 2.0), (["inspect", "."], 2.0), (["card", "adapter"], 2.0)],
)
@pytest.mark.processes
def test_a_command_without_a_model_starts_at_once(in_place: Path, arguments: list[str], seconds: float) -> None:
    assert processor_time_of(*arguments) < seconds


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["prune", "--help"],
        ["evaluate", "--help"],
        ["inspect", "adapter"],
        ["inspect", "."],
        ["card", "adapter"],
    ],
)
@pytest.mark.processes
def test_a_command_without_a_model_imports_no_library_for_models(in_place: Path, arguments: list[str]) -> None:
    heavy = {"torch", "transformers", "peft", "accelerate", "peft_e2vpt"}
    program = (
        "import sys\nfrom peft_e2vpt_cli.app import main\n"
        f"try: main()\nfinally: assert not sys.modules.keys() & {heavy}"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and done.stdout and not done.stderr


def test_the_version_is_that_of_the_package() -> None:
    assert command_line("--version", module="peft_e2vpt_cli").stdout == f"{peft_e2vpt.__version__}\n"


@pytest.mark.parametrize(
    "arguments", ["--help", "inspect adapter", "inspect adapter --json", "inspect .", "card adapter"]
)
@pytest.mark.processes
def test_a_pipe_that_is_closed_ends_a_command_quietly(in_place: Path, arguments: str) -> None:
    command = [sys.executable, "-m", "peft_e2vpt_cli", *arguments.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


# ----------------------------------------------------------------------------------------------- what is written twice
def test_the_light_package_has_the_constants_of_the_heavy_one() -> None:
    assert (files.METHOD, files.FORMAT_VERSION) == (METHOD, FORMAT_VERSION)
    assert (files.CONFIG_NAME, files.WEIGHTS_NAME) == (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    assert (files.CARD_NAME, files.METADATA_KEY) == (card.CARD_NAME, card.METADATA_KEY)
    assert files.CARD_MARKER == card.MARKER


@pytest.mark.parametrize("settings", [{"peft_type": "LORA"}, {"format_version": 99}, None])
def test_both_packages_refuse_an_adapter_in_the_same_words(
    in_place: Path, tmp_path: Path, settings: dict[str, Any] | None
) -> None:
    if settings is not None:
        config = json.loads((in_place / "adapter" / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(ValueError) as light:
        files.read_config(str(tmp_path))
    with pytest.raises(ValueError) as heavy:
        loading.read_config(str(tmp_path))
    assert str(light.value) == str(heavy.value)
