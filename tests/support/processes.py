# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Commands that tests start: in one process, or in two with torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tests.support.paths import ROOT


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(*command: str, env: dict[str, str] | None = None) -> str:
    """Runs a command in the root folder and returns what it prints; its errors are the test's."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(env or {})}
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends the processes that it started
        output = process.communicate()[0] + "\nended after 180 seconds"
    assert process.returncode == 0, output[-12000:]
    return output


def torchrun(*program: str, env: dict[str, str] | None = None) -> str:
    """Runs a script, or a module after `-m`, in two processes."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    return launch(*launcher, "--master_port", str(free_port()), *program, env=env)
