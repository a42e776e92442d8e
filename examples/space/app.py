"""`demo.py` as a Space of the Hub: adapters lie in `adapters/` beside this file, or `adapters.txt` names them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import gradio
from huggingface_hub import snapshot_download


HERE = Path(__file__).resolve().parent
if not (HERE / "demo.py").exists():  # in a clone, where it lies one folder up
    sys.path.append(str(HERE.parent))

import demo  # noqa: E402


def find_adapters(folder: Path) -> dict[str, Path]:
    """
    Finds the adapters of a Space, by the names they are shown under.

    Raises:
        ValueError: There are none.
    """
    found = {path.parent.name: path.parent for path in sorted(folder.glob("adapters/*/adapter_config.json"))}
    listed = folder / "adapters.txt"
    names = listed.read_text(encoding="utf-8").split() if listed.exists() else []
    found |= {name: Path(snapshot_download(name)) for name in names}
    if not found:
        raise ValueError(
            f"Put adapters into {folder / 'adapters'}, a folder each, or their names on the Hub into {listed}."
        )
    return {re.sub(r"[./\\]", "-", name): path for name, path in found.items()}  # as PEFT wants names


def build(folder: Path = HERE) -> gradio.Blocks:
    """Builds the page of a Space."""
    return demo.build_page(demo.load_adapters(find_adapters(folder)))


if __name__ == "__main__":
    build().launch(theme=demo.THEME)
