# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Uploaded over HTTP with the real client, an adapter has a card that tells how to load it, and what it tells works.

The client reads its endpoint when it is imported, so everything runs in processes of its own: one uploads
(`hub_worker.py`), one downloads (`hub_reader.py`), and every snippet of a card has one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.hub_server import HubServer
from tests.support.hub_worker import LABELS


pytestmark = pytest.mark.processes


# adapters by the name of their answers: repository, revision, subfolder
UPLOADED = {
    "plain": ("tester/trees", "main", ""),
    "pruned": ("tester/many", "v2", "oak/"),
    "trained": ("tester/trained", "main", ""),
}
SAVE = """
import sys as _sys, torch as _torch
with _torch.no_grad():
    _torch.save(model(**_torch.load(_sys.argv[1])).logits, _sys.argv[2])
"""
CLASSIFY = """
import json as _json, pathlib as _pathlib, PIL.Image as _image
_labels = sorted(answer["label"] for answer in classifier(_image.new("RGB", (40, 40))))
_pathlib.Path(_sys.argv[2]).with_suffix(".json").write_text(_json.dumps(_labels))
"""


class Hub:
    """The server, and the folder in which processes leave what they found."""

    def __init__(self, server: HubServer, out: Path) -> None:
        self.server, self.out = server, out

    def python(self, *command: str) -> None:
        environment = self.server.environment(self.out / "home")
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    def answers(self, name: str) -> torch.Tensor:
        return torch.load(self.out / f"{name}.pt")

    def card(self, repo_id: str, revision: str = "main", folder: str = "") -> str:
        return self.server.files(repo_id, revision)[f"{folder}README.md"].decode()


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def snippets_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    with HubServer() as server:
        hub = Hub(server, out)
        hub.python("-m", "tests.support.hub_worker", str(out))
        yield hub


@pytest.fixture(scope="module")
def read(hub):
    hub.python("-m", "tests.support.hub_reader", str(hub.out))
    return json.loads((hub.out / "read.json").read_text())


# ----------------------------------------------------------------------------------------------------------- the cards
def test_a_card_has_what_the_hub_sorts_adapters_by(hub):
    text = hub.card("tester/trees")
    card = metadata_of(text)
    results, counts = card.pop("model-index"), card.pop("e2vpt")
    assert f"**{counts['trained_parameters']:,} parameters, {counts['tuned_percentage']:.3f} % of the model**" in text
    assert card == {
        "library_name": "peft",
        "base_model": "tester/vit",
        "pipeline_tag": "image-classification",
        "tags": ["peft", "e2vpt", "visual-prompt-tuning", "transformers", "base_model:adapter:tester/vit"],
        "datasets": ["tester/leaves"],
        "metrics": ["accuracy"],
    }
    (result,) = results[0]["results"]
    assert results[0]["name"] == "trees" and result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"name": "tester/leaves", "type": "tester/leaves"}
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert metrics == {"loss": 0.5, "accuracy": 0.875}


def test_a_card_tells_how_much_was_tuned_and_what_is_left_in_every_layer(hub):
    card = hub.card("tester/pruned")
    assert "vit.layers.1.attention" in card
    rows = [line.split() for line in card.splitlines() if line.endswith(".attention")]
    assert [row[:3] for row in rows] == [["0", "0", "0"], ["1", "3", "11"], ["2", "3", "11"]]
    assert "**533 parameters, " in card
    assert "| accuracy | 0.875 |" in hub.card("tester/trees") and "runtime" not in hub.card("tester/trees")


@pytest.mark.parametrize("name", UPLOADED)
def test_the_snippets_of_a_card_run_as_they_are_and_give_the_same_answers(hub, name):
    snippets = snippets_of(hub.card(*UPLOADED[name]))
    assert snippets[0].startswith("import peft_e2vpt\n")
    with_processor = name == "plain"
    assert len(snippets) == 1 + with_processor
    program, out = hub.out / f"snippet_{name}.py", hub.out / f"snippet_{name}.pt"
    program.write_text("\n".join([*snippets, SAVE, CLASSIFY if with_processor else ""]))
    hub.python(str(program), str(hub.out / "inputs.pt"), str(out))
    assert torch.equal(torch.load(out), hub.answers(name))
    if with_processor:
        assert json.loads(out.with_suffix(".json").read_text()) == sorted(LABELS)


def test_an_adapter_of_a_local_base_model_says_so_and_names_no_folder_of_its_author(hub):
    files, card = hub.server.files("tester/local"), hub.card("tester/local")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert not any(str(hub.out).encode() in content for content in files.values())
    assert "base_model" not in metadata_of(card) and "folder of the author's, `vit_of_mine`" in card
    (snippet,) = snippets_of(card)
    assert 'peft_e2vpt.load("tester/local", base_model="...")' in snippet
    program, out = hub.out / "snippet_local.py", hub.out / "snippet_local.pt"
    program.write_text(snippet.replace('"..."', '"tester/vit"') + SAVE)
    hub.python(str(program), str(hub.out / "inputs.pt"), str(out))
    assert torch.equal(torch.load(out), hub.answers("local"))


def test_a_local_base_model_can_be_given_its_name_on_the_hub(hub):
    files, card = hub.server.files("tester/named"), hub.card("tester/named")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tester/vit"
    assert metadata_of(card)["base_model"] == "tester/vit" and 'peft_e2vpt.load("tester/named")\n' in card


def test_an_adapter_in_a_subfolder_of_a_branch_leaves_the_rest_of_the_repository_alone(hub):
    assert hub.server.files("tester/many", "main") == {}
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.server.files("tester/many", "v2").keys() == {f"oak/{name}" for name in files}


def test_what_a_trainer_uploads_has_the_tags_and_its_card_gives_its_data_to_ours(hub):
    by_trainer = metadata_of((hub.out / "trainer_card.md").read_text())
    assert by_trainer["library_name"] == "peft" and by_trainer["base_model"] == "tester/vit"
    assert {"peft", "e2vpt", "visual-prompt-tuning"} <= set(by_trainer["tags"])
    card = metadata_of(hub.card("tester/trained"))
    assert card["datasets"] == by_trainer["datasets"] == ["tester/leaves"]
    assert card["pipeline_tag"] == "image-classification"


def test_a_pruned_adapter_has_the_figure_of_its_pruning(hub):
    files = hub.server.files("tester/trained")
    assert "](pruning.png)" in files["README.md"].decode()
    assert files["pruning.png"].startswith(b"\x89PNG") and "pruning_report.json" in files
    assert "pruning.png" not in hub.card("tester/trees")


def test_the_method_of_peft_models_leaves_a_template(hub):
    """Why there is `peft_e2vpt.push_to_hub`; where this fails, transformers has begun to keep PEFT's card."""
    card = hub.card("tester/by_peft")
    assert metadata_of(card) == {"library_name": "transformers", "tags": []} and "peft_e2vpt" not in card


def test_a_template_is_replaced_a_card_of_ours_kept_by_peft_and_one_by_hand_kept_by_us(hub):
    assert "by_peft_then_us" in hub.card("tester/by_peft_then_us") and "peft_e2vpt.load" in hub.card(
        "tester/by_peft_then_us"
    )
    assert hub.card("tester/us_then_peft").count('peft_e2vpt.load("tester/us_then_peft")') == 1
    assert hub.card("tester/by_hand") == "---\nlicense: mit\n---\n\n# Mine\n"


def test_the_server_knew_every_request(hub, read):
    assert set(hub.server.unknown) <= {"GET /api/agent-harnesses"}  # asked of servers that have it


# ------------------------------------------------------------------------------------------------------------- loading
@pytest.mark.parametrize(
    "way, name",
    [
        ("load", "pruned"),
        ("peft", "pruned"),
        ("auto_peft", "pruned"),
        ("auto_model", "plain"),
        ("load_adapter", "plain"),
    ],
)
def test_every_way_of_loading_gives_the_same_answers(hub, read, way, name):
    assert torch.equal(hub.answers(f"read_{way}"), hub.answers(name))


def test_a_loaded_model_is_ready_and_knows_its_classes(read):
    assert read["training"] is False and read["labels"] == LABELS


def test_a_pipeline_names_the_classes(read):
    wrapped, inside = read["answers"]
    assert wrapped == inside
    assert {answer["label"] for answer in inside} == set(LABELS)
    assert sum(answer["score"] for answer in inside) == pytest.approx(1)


@pytest.mark.parametrize(
    "case, words",
    [
        ("no adapter", "There is no adapter at tester/vit: no adapter_config.json was found."),
        (
            "no repository",
            "There is no adapter at tester/nothing: no adapter_config.json was found. If the repository is private",
        ),
        ("no such folder", "There is no adapter at tester/many/birch: no adapter_config.json was found."),
        ("lora", "The adapter at tester/lora is one of LORA, not of E2VPT: load it with PEFT alone."),
        ("no base", "The base model 'tester/gone' of the adapter tester/trees cannot be loaded"),
        ("classes", "num_labels=7 contradicts the adapter tester/trees, which has 5 classes"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_sentence(read, case, words):
    assert read["messages"][case].startswith(words)
    assert "\n" not in read["messages"][case]
