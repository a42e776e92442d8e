# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The oldest versions of other packages that this one works with, checked before any of them is imported."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version


OLDEST = {  # as install_requires in setup.cfg
    "torch": "2.6",
    "transformers": "5.0",
    "peft": "0.21",
    "accelerate": "1.10",
    "huggingface_hub": "1.3",
    "Jinja2": "3.1",
}


def check_requirements() -> None:
    """Checks the versions that are installed; a pre-release counts as its release.

    Raises:
        ImportError: a package is missing or too old; the message names all that are too old.
    """
    found = {name: version(name) for name in OLDEST}
    old = [name for name in OLDEST if Version(Version(found[name]).base_version) < Version(OLDEST[name])]
    if old:
        raise ImportError(
            f"peft_e2vpt needs {', '.join(f'{name}>={OLDEST[name]}' for name in old)}, but found "
            f"{', '.join(f'{name} {found[name]}' for name in old)}: run pip install --upgrade "
            f"{' '.join(old)}."
        )
