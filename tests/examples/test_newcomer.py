# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The first hour: an own folder of images with bad files in it, the documented commands, figures, the adapter in a
pipeline, and its upload to the Hub. Every step is a process of its own, as in a terminal."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.hub_server import HubServer, Repository
from tests.support.own_images import LEVELS, draw_images, save_tiny_vit
from tests.support.paths import ROOT


pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.processes

BACKBONE = "tester/vit"
PAGES = (ROOT / "README.md", ROOT / "docs" / "own_images.md", ROOT / "examples" / "README.md")
USE = """
import json, re, sys
from huggingface_hub import hf_hub_download
import peft_e2vpt
local = peft_e2vpt.pipeline("image-classification", "runs/finetune/e2vpt-pruned")
uploaded = peft_e2vpt.pipeline("image-classification", "tester/finetune-e2vpt-pruned")
files = sys.argv[1:]
card = open(hf_hub_download("tester/finetune-e2vpt-pruned", "README.md")).read()
names = {}
for block in re.findall("```python\\n(.*?)```", card, re.DOTALL):
    exec(block, names)
print(json.dumps([[pipe(file) for file in files] for pipe in (local, uploaded, names["classifier"])]))
model = peft_e2vpt.load("runs/finetune/e2vpt-pruned")
print(json.dumps(sorted(model.get_base_model().config.id2label.values())))
"""
AGAIN = """
sys.path.insert(0, "examples")
sys.argv = sys.argv[:1] + OPTIONS
import finetune
finetune.main()
"""


COMMAND = re.compile(r"(?:^|&& )\S*(python examples/finetune\.py [^`#&]*--train_dir[^`#&]*)", re.MULTILINE)


def documented_commands() -> list[str]:
    """The commands of the pages that train on a user's own images, README's first."""
    return list(dict.fromkeys(found.strip() for page in PAGES for found in COMMAND.findall(page.read_text())))


class Terminal:
    """A shell in a folder with the project's examples, a folder of images and a Hub."""

    def __init__(self, place: Path, hub: HubServer) -> None:
        self.place, self.hub = place, hub

    def type(self, command: str, fails: bool = False) -> str:
        environment = self.hub.environment(self.place / "home")
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        done = subprocess.run(words, cwd=self.place, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr[-3000:]
        assert not re.search("Traceback|LOAD REPORT|FutureWarning", "" if "-c" in words else done.stderr), done.stderr
        return done.stdout + (done.stderr if fails else "")


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """What every step has printed, the folder that it leaves, and the Hub."""
    place = tmp_path_factory.mktemp("newcomer")
    (place / "examples").symlink_to(ROOT / "examples")
    images = draw_images(place / "images", 8)
    (images / "dark" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    (images / "bright" / "zero.png").write_bytes(b"")
    (images / "notes.txt").write_text("taken in May")
    (images / ".DS_Store").write_bytes(b"\0")
    vit = save_tiny_vit(place / "vit")
    with HubServer() as hub:
        hub.repositories[BACKBONE] = Repository(BACKBONE)
        hub.repositories[BACKBONE].commit("main", {path.name: path.read_bytes() for path in vit.iterdir()})
        terminal = Terminal(place, hub)
        command = f"{documented_commands()[0]} --model_name_or_path {BACKBONE} --use_cpu --num_train_epochs 2"
        printed = {
            "bad": terminal.type(command, fails=True),
            "train": terminal.type(f"{command} --skip_bad_images"),
            "push": terminal.type(f"{command} --skip_bad_images --method e2vpt-pruned --push_to_hub"),
            "figures": terminal.type("python examples/figures.py runs/finetune --dpi 40"),
        }
        # a finished method is uploaded in the process that uses the adapter, which saves the time of one more start
        options = shlex.split(f"{command} --skip_bad_images --method linear --push_to_hub")[2:]
        program = USE + AGAIN.replace("OPTIONS", repr(options))
        used = terminal.type(f"python -c {shlex.quote(program)} images/dark/0.png images/bright/0.png")
        printed["use"], printed["push again"] = used.split("Images:")
        yield printed, place, hub


def test_every_documented_command_is_one_that_the_script_takes(monkeypatch, tmp_path):
    import finetune as script

    commands = documented_commands()
    assert commands and "--train_dir images" in commands[0]
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        _, data_args, _ = script.parse_arguments()
        assert data_args.train_dir == "images"


def test_bad_files_are_named_before_anything_is_trained(hour):
    text = hour[0]["bad"]
    assert "Error: 2 of 18 images cannot be read" in text
    assert "dark/cut.jpg is damaged" in text and "bright/zero.png is empty (0 bytes)" in text


def test_the_table_has_a_row_for_each_method(hour):
    text = hour[0]["train"]
    assert "Images: 14 to train on; 2 for validation" in text and "Left out as no images: 1 file" in text
    for method in ("linear", "e2vpt"):
        assert f"\n| {method} | " in text


def test_figures_are_drawn(hour):
    text, place = hour[0]["figures"], hour[1]
    drawn = {path.name for path in (place / "runs" / "finetune" / "figures").iterdir()}
    assert {
        "methods.png",
        "embeddings.png",
        "e2vpt-run.png",
        "e2vpt-pruned-pruning.png",
        "e2vpt-attention_maps.png",
    } <= drawn
    assert all(name in text for name in drawn)


def test_the_pipeline_answers_the_same_from_the_folder_from_the_hub_and_as_the_card_is_written(hour):
    answers, labels = (json.loads(line) for line in hour[0]["use"].splitlines() if line.startswith("["))
    assert answers[0] == answers[1] == answers[2] and labels == sorted(LEVELS)
    assert [answer[0]["label"] for answer in answers[0]] == ["dark", "bright"]


def test_the_uploaded_adapter_has_a_card_its_report_its_classes_and_no_traces_of_this_machine(hour):
    printed, place, hub = hour
    files = hub.files("tester/finetune-e2vpt-pruned")
    assert {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json",
        "pruning_report.json", "pruning.png",
    } <= files.keys()  # fmt: skip
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    row = next(
        r for r in json.loads((place / "runs/finetune/results.json").read_text())["methods"] if "pruned" in r["method"]
    )
    results = {metric["type"]: metric["value"] for metric in metadata["model-index"][0]["results"][0]["metrics"]}
    assert results == {name: pytest.approx(row[name], abs=1e-4) for name in ("accuracy", "balanced_accuracy")}
    assert metadata["base_model"] == BACKBONE and "e2vpt" in metadata["tags"]
    assert "trained from scratch" not in card and 'peft_e2vpt.load("tester/finetune-e2vpt-pruned")' in card
    assert json.loads(files["adapter_config.json"])["labels"] == sorted(LEVELS)
    assert str(place).encode() not in b"".join(files.values())
    assert "Uploaded with its card: " in printed["push"]


def test_a_finished_method_is_uploaded_without_training_it_again(hour):
    printed, _, hub = hour
    assert "Finished already" in printed["push again"]
    files = hub.files("tester/finetune-linear")
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} == files.keys() - {
        ".gitattributes"
    }
    card = files["README.md"].decode()
    assert "a linear probe on `tester/vit`" in card and "Classes: bright, dark." in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == BACKBONE
