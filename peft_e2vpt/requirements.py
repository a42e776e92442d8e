# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The lowest versions of other packages that this one works with, checked before any of them is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import Version


PACKAGE = "peft_e2vpt"


def check_requirements() -> None:
    """Compares the installed versions with those that `setup.cfg` asks for; a pre-release counts as its release.

    The list is that of the installed package. A source tree that is only on the path has none, and is not checked.

    Raises:
        ImportError: packages are missing or too old; the message names all of them.
    """
    try:
        needed = [Requirement(text) for text in requires(PACKAGE) or []]
    except PackageNotFoundError:
        return
    always = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [(one, found) for one in always if not _fits(one, found := _version_of(one.name))]
    if wrong:
        raise ImportError(
            f"{PACKAGE} needs {', '.join(f'{one.name}{one.specifier}' for one, _ in wrong)}, but found "
            f"{', '.join(f'{one.name} {found}' if found else f'no {one.name}' for one, found in wrong)}: run "
            f"pip install --upgrade {' '.join(one.name for one, _ in wrong)}."
        )


def _version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _fits(needed: Requirement, found: str | None) -> bool:
    return found is not None and Version(found).base_version in needed.specifier
