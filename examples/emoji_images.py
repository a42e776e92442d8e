# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The emoji of Google and Twitter, 64 x 64 with transparency, from the npm packages `emoji-datasource-VENDOR`.

Google's drawings are licensed Apache-2.0, Twitter's CC-BY-4.0. The archives (136 MB together) are fetched once by
`npm pack` and kept in `~/.cache/peft_e2vpt/transfer`. No image is in this repository.

    python examples/emoji_images.py        # fetches the archives, says how many emoji each group has
"""

from __future__ import annotations

import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image


CACHE = Path("~/.cache/peft_e2vpt/transfer").expanduser()
EMOJI_VERSION = "16.0.0"
VENDORS = ("google", "twitter")


def archive_path(vendor: str) -> Path:
    """Where the archive of one vendor is kept."""
    return CACHE / f"emoji-datasource-{vendor}-{EMOJI_VERSION}.tgz"


def emoji_archive(vendor: str) -> Path:
    """Returns the archive of one vendor, fetched first if it is not there yet.

    Raises:
        FileNotFoundError: the archive is not there, and npm is not, or found no registry.
    """
    name = f"emoji-datasource-{vendor}"
    path = archive_path(vendor)
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:  # another process never sees half an archive
            try:
                subprocess.run(["npm", "pack", "--silent", f"{name}@{EMOJI_VERSION}"], cwd=unfinished, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise FileNotFoundError(
                    f"`npm pack {name}@{EMOJI_VERSION}` failed: install npm, or put the archive into {CACHE}."
                ) from error
            (Path(unfinished) / path.name).replace(path)
    return path


def emoji_groups() -> dict[str, str]:
    """The group of every emoji (`"Food & Drink"`, ...) by file name: those of one code point, without flags."""
    with tarfile.open(emoji_archive("google")) as archive:
        emoji = json.load(archive.extractfile("package/emoji.json"))  # type: ignore[arg-type]
    return {
        e["image"]: e["category"]
        for e in emoji
        if e["category"] not in ("Flags", "Component")
        and e["unified"].removesuffix("-FE0F").count("-") == 0
        and e["has_img_google"]
        and e["has_img_twitter"]
    }


def read_emoji(vendor: str, names: list[str]) -> list[Image.Image]:
    """The drawings of one vendor (RGBA), in the order of `names`."""
    prefix = f"package/img/{vendor}/64/"
    wanted = {prefix + name for name in names}
    drawings = {}
    with tarfile.open(emoji_archive(vendor)) as archive:
        for member in archive:
            if member.name in wanted:
                drawing = Image.open(archive.extractfile(member)).convert("RGBA")  # type: ignore[arg-type]
                drawings[member.name.removeprefix(prefix)] = drawing
    return [drawings[name] for name in names]


if __name__ == "__main__":
    groups = list(emoji_groups().values())
    for group in sorted(set(groups)):
        print(f"{group}: {groups.count(group)}")
