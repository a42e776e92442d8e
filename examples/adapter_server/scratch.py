# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A folder for one process, which goes with it, killed or not."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO


OWN = "served-adapters-"
_locks: list[IO[str]] = []  # held while this process lives


def own_folder() -> Path:
    """Makes a folder for this process, and removes those of processes that were killed: nobody locks them any more."""
    for lock in Path(tempfile.gettempdir()).glob(f"{OWN}*/lock"):
        with suppress(OSError), lock.open() as file:  # locked by a process that lives, or removed meanwhile
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
    folder = Path(tempfile.mkdtemp(prefix=OWN))
    _locks.append((folder / "new").open("w"))
    fcntl.flock(_locks[-1], fcntl.LOCK_EX)
    (folder / "new").rename(folder / "lock")  # only now can others see it
    return folder
