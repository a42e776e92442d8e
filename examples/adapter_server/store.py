# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Where adapters come from: a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .options import HUB, log


SUFFIX = ".safetensors"


class FolderStore:
    """A folder with a file `NAME.safetensors` for each adapter, on this machine or shared by many."""

    writable = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pull(self, *, asked: bool = False) -> None:
        """Brings what is new: a folder is always up to date."""

    def put(self, name: str, data: bytes, check: Callable[[Path], object]) -> bool:
        """
        Writes an adapter, of which nobody sees a part.

        Args:
            name (`str`): Of the adapter; a former one is replaced.
            data (`bytes`): What `export_adapter` wrote.
            check (`Callable`): Raises for a file that must not enter.

        Returns:
            `bool`: Whether the name is new.
        """
        path = self.folder / f"{name}{SUFFIX}"
        part = self.folder / f".{name}.{uuid.uuid4().hex}.part"
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            check(part)
            is_new = not path.exists()
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return is_new

    def delete(self, name: str) -> bool:
        """Deletes an adapter; returns whether there was one."""
        try:
            (self.folder / f"{name}{SUFFIX}").unlink()
        except FileNotFoundError:
            return False
        return True


class HubStore:
    """The files `NAME.safetensors` of a repository of the Hugging Face Hub."""

    writable = False

    def __init__(self, repo_id: str, revision: str | None, poll_s: float) -> None:
        self.repo_id, self.revision, self._poll_s = repo_id, revision, poll_s
        self._lock = threading.Lock()
        self._pulled_at = -np.inf
        self.folder = Path()
        self.pull()

    def pull(self, *, asked: bool = False) -> None:
        """Brings what is new, at most every 60 polls, or every 10 when asked; without a connection, all stays."""
        from huggingface_hub import snapshot_download

        with self._lock:
            if time.monotonic() - self._pulled_at < self._poll_s * (10 if asked else 60):
                return
            try:
                folder = snapshot_download(self.repo_id, revision=self.revision, allow_patterns=f"*{SUFFIX}")
                self.folder = Path(folder)
            except Exception as error:  # of the network, the Hub or the disk; those of a first pull are the caller's
                if self.folder == Path():
                    raise ValueError(f"The adapters of {HUB}{self.repo_id} cannot be read: {error}") from error
                log.warning("%s%s cannot be reached, its adapters stay: %s", HUB, self.repo_id, error)
            self._pulled_at = time.monotonic()


Store = FolderStore | HubStore


def open_store(address: str, poll_s: float) -> Store:
    """
    Opens a folder, or the repository in `hf://OWNER/NAME[@REVISION]`.

    Raises:
        ValueError: There is none.
    """
    if address.startswith(HUB):
        repo_id, _, revision = address.removeprefix(HUB).partition("@")
        return HubStore(repo_id, revision or None, poll_s)
    if not Path(address).is_dir():
        raise ValueError(f"There is no folder {address} of adapters: make it, or name a repository, {HUB}OWNER/NAME.")
    return FolderStore(Path(address).resolve())
