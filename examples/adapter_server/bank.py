# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The adapters of one replica, which follow a store."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from peft_e2vpt.export import AdapterBank

from .options import BASE, NAME, log
from .store import SUFFIX, Store


def version_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


class FollowingBank:
    """
    The adapters of one replica, which follow a store.

    Each version of a file is copied to a folder of the replica's own before it is read, so that nothing changes under
    a version that is in use. A damaged file is refused, and the former version stays. Only one thread may use it.

    Args:
        backbone (`Path`): Folder that `export_backbone` wrote.
        store (`Store`): Where adapters come from.
        own (`Path`): A folder for copies.
        max_bytes (`int`): Memory for adapters.
        max_file (`int`): Size of a file, beyond which it is refused.

    Attributes:
        adapters (`AdapterBank`): What is loaded.
        versions (`dict[str, str]`): A hash of the file of each adapter.
        refused (`dict[str, str]`): Why a file was not taken, by its name.
    """

    def __init__(self, backbone: Path, store: Store, own: Path, *, max_bytes: int, max_file: int) -> None:
        self.adapters = AdapterBank(backbone, max_bytes=max_bytes)
        self.store, self._own, self._max_file = store, own, max_file
        self.versions: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self._seen: dict[str, tuple[int, ...]] = {}
        self._is_there = True

    def follow(self, names: Iterable[str] | None = None) -> None:
        """Brings adapters to what the store has now: those of some names, or all."""
        folder = self.store.folder
        is_there = folder.is_dir()
        if not is_there and self._is_there:
            log.error("The folder of adapters %s is gone; those that are loaded stay.", folder)
        self._is_there = is_there
        if not is_there:
            return
        if names is None:
            found = {path.name.removesuffix(SUFFIX) for path in folder.glob(f"[!.]*{SUFFIX}")}
            names = found | self._seen.keys()
        for name in sorted(names):
            if name != BASE:
                self._follow(name, folder / f"{name}{SUFFIX}")

    def _follow(self, name: str, path: Path) -> None:
        try:
            status = path.stat()
            seen = (status.st_ino, status.st_size, status.st_mtime_ns)
            if seen == self._seen.get(name):
                return
            self._take(name, path, status.st_size)
        except FileNotFoundError:
            self._forget(name)
            return
        except (OSError, ValueError) as error:
            former = "the former one stays" if name in self.versions else "there is no former one"
            log.warning("The adapter %s is refused, %s: %s", name, former, error)
            self.refused[name] = str(error).replace(str(self._own), str(path.parent))
        else:
            self.refused.pop(name, None)
        self._seen[name] = seen

    def _take(self, name: str, path: Path, size: int) -> None:
        if not re.fullmatch(NAME, name):
            raise ValueError(f"{name!r} is no name of an adapter: use letters, digits, '.', '_' and '-', at most 64.")
        if size > self._max_file:
            raise ValueError(f"{path.name} has {size:,} bytes, more than the {self._max_file:,} of an adapter.")
        data = path.read_bytes()
        version = version_of(data)
        if version == self.versions.get(name):
            return
        copy = self._own / f"{name}.{version}{SUFFIX}"
        try:
            copy.write_bytes(data)
            self.adapters.add(name, copy)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
        self._drop_copy(name)
        self.versions[name] = version
        log.info("The adapter %s is loaded, version %s.", name, version)

    def _forget(self, name: str) -> None:
        self._seen.pop(name, None)
        self.refused.pop(name, None)
        if name in self.versions:
            self.adapters.remove(name)
            self._drop_copy(name)
            del self.versions[name]
            log.info("The adapter %s is removed.", name)

    def _drop_copy(self, name: str) -> None:
        if name in self.versions:
            (self._own / f"{name}.{self.versions[name]}{SUFFIX}").unlink(missing_ok=True)

    def known(self, name: str) -> bool:
        return name == BASE or name in self.versions
