# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt` in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from typer.testing import CliRunner, Result

from peft_e2vpt_cli.app import app
from tests.support.paths import ROOT


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments: Any) -> str:
    """The one sentence that a command fails with."""
    result = run(*arguments)
    assert result.exit_code in (1, 2) and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and "Traceback" not in result.stderr
    return last.removeprefix("Error: ")


def command_line(*arguments: str, module: str = "peft_e2vpt", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **environment},
    )
