# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`examples/space` becomes a Space of the Hub by its own commands."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import RepoCard
from peft import get_peft_model
from transformers import ViTForImageClassification, ViTImageProcessorPil

from tests.support.adapted import config_of, trained
from tests.support.models import build
from tests.support.paths import EXAMPLES, ROOT


gradio = pytest.importorskip("gradio", reason="needs the extra `demo`")
SPACE = EXAMPLES / "space"


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Two adapters of one backbone, in folders of their own."""
    build("vit")[0].save_pretrained(tmp_path / "base")
    folders = []
    for name, classes in (("trees", ["ash", "beech"]), ("birds", ["auk", "crane"])):
        labels = dict(enumerate(classes))
        base = ViTForImageClassification.from_pretrained(
            tmp_path / "base",
            id2label=labels,
            label2id={label: index for index, label in labels.items()},
            ignore_mismatched_sizes=True,
        )
        trained(get_peft_model(base, config_of())).save_pretrained(tmp_path / name)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    return folders


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """The folder that the copying command of the page makes."""
    (command,) = re.findall(r"^mkdir.*$", (SPACE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    subprocess.run(command.replace("my-space", str(tmp_path / "my-space")), shell=True, check=True, cwd=ROOT)
    return tmp_path / "my-space"


def app_of(space: Path) -> Any:
    spec = importlib.util.spec_from_file_location("space_app", space / "app.py")
    assert spec is not None and spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


def test_a_space_shows_the_adapters_beside_it_and_those_it_names(
    space: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trees, birds = adapters
    shutil.copytree(trees, space / "adapters" / "trees")
    (space / "adapters.txt").write_text("me/vit-e2vpt-birds\n")
    app = app_of(space)
    monkeypatch.setattr(app, "snapshot_download", {"me/vit-e2vpt-birds": str(birds)}.__getitem__)
    choices = [block.choices for block in app.build(space).blocks.values() if isinstance(block, gradio.Radio)]
    assert [[name for name, _ in names] for names in choices] == [["trees", "me-vit-e2vpt-birds"]]


def test_a_space_without_adapters_says_where_they_go(space: Path) -> None:
    with pytest.raises(ValueError, match=r"Put adapters into .*adapters, a folder each, or their names on the Hub"):
        app_of(space).build(space)


def test_the_front_matter_names_what_the_folder_has() -> None:
    settings = RepoCard.load(SPACE / "README.md").data.to_dict()
    assert settings["sdk"] == "gradio" and (SPACE / settings["app_file"]).is_file()
    required = (SPACE / "requirements.txt").read_text(encoding="utf-8").split()
    extra = re.search(r"^demo =\n((?:    .+\n)+)", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    assert extra is not None and set(required) <= set(extra[1].split())
    lowest = next(line.split(">=")[1] for line in required if line.startswith("gradio"))
    assert [int(part) for part in settings["sdk_version"].split(".")] >= [int(part) for part in lowest.split(".")]
