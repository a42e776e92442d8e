# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt inspect` shows what is in the files of an adapter, and reads nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import peft_e2vpt
from peft_e2vpt import PruningReport
from peft_e2vpt_cli.content import inspect_adapter
from tests.cli.conftest import COLOURS
from tests.support.command_line import fail, succeed


def test_inspect_shows_counts_labels_and_base_model(in_place: Path) -> None:
    shown = succeed("inspect", "adapter")
    summary = peft_e2vpt.load("adapter").prompt_summary()
    assert f"{in_place / 'base'}" in shown and "3: red, green, blue" in shown and "version 1" in shown
    assert f"{(in_place / 'adapter' / 'adapter_model.safetensors').stat().st_size:,} bytes" in shown
    assert (
        f"= {summary.num_tuned_values:,} ({summary.tuned_percentage:.3f} % of the model, according to its card"
        in shown
    )
    for layer in summary.layers:
        row = [layer.index, layer.num_visual_prompts, layer.num_segments, layer.num_kv_prompts, layer.num_values]
        assert [str(number) for number in row] in [line.split() for line in shown.splitlines()]


def test_inspect_counts_what_the_model_counts(in_place: Path, tmp_path: Path) -> None:
    succeed("prune", "adapter", "--data", "images", "--output", tmp_path / "p", "--tokens", 2, "--segments", 0.25)
    content, summary = inspect_adapter(tmp_path / "p"), peft_e2vpt.load(tmp_path / "p").prompt_summary()
    assert content.num_prompt_values == summary.num_prompt_values
    assert content.num_head_values == summary.num_head_values
    for ours, theirs in zip(content.layers, summary.layers, strict=True):
        assert (ours.index, ours.num_values) == (theirs.index, theirs.num_values)
        assert (ours.num_visual_prompts, ours.num_segments) == (theirs.num_visual_prompts, theirs.num_segments)


def test_inspect_reads_nothing_but_the_adapter(in_place: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((in_place / "adapter" / name).read_bytes())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "somebody/who-is-away"
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    shown = succeed("inspect", tmp_path)
    assert "the percentage needs --base MODEL" in shown and "somebody/who-is-away" in shown
    percentage = peft_e2vpt.load("adapter").prompt_summary().tuned_percentage
    assert f"({percentage:.3f} % of the model, of base)" in succeed("inspect", tmp_path, "--base", "base")


def test_a_card_of_another_adapter_gives_no_percentage(in_place: Path, tmp_path: Path) -> None:
    peft_e2vpt.load("adapter").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    counted = f"trained_parameters: {inspect_adapter(tmp_path).num_tuned_values}"
    assert counted in text and inspect_adapter(tmp_path).tuned_percentage is not None
    (tmp_path / "README.md").write_text(text.replace(counted, "trained_parameters: 7"))
    assert inspect_adapter(tmp_path).tuned_percentage is None


def test_a_card_of_before_the_counts_were_in_its_metadata_gives_the_percentage(in_place: Path, tmp_path: Path) -> None:
    peft_e2vpt.load("adapter").save_pretrained(tmp_path)
    count = inspect_adapter(tmp_path).num_tuned_values
    (tmp_path / "README.md").write_text(
        f"---\nlibrary_name: peft\n---\n\n**{count:,} values, 1.234 % of the model**.\n"
    )
    assert inspect_adapter(tmp_path).tuned_percentage == 1.234


@pytest.mark.parametrize("text", ["---\n- x: [\n---\n", "---\n- x\n---\n", "# Mine\n", ""])
def test_a_card_that_somebody_has_edited_gives_no_percentage(in_place: Path, tmp_path: Path, text: str) -> None:
    peft_e2vpt.load("adapter").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(text)
    assert inspect_adapter(tmp_path).tuned_percentage is None


def test_inspect_draws_the_segments_that_are_kept(in_place: Path, tmp_path: Path) -> None:
    succeed("prune", "adapter", "--data", "images", "--output", tmp_path / "p", "--tokens", 1, "--segments", 0.5)
    shown = succeed("inspect", tmp_path / "p")
    drawn = [line for line in shown.splitlines() if "█" in line]
    report = PruningReport.load(tmp_path / "p")
    expected = [
        " ".join("".join("█" if gate else "·" for gate in prompt) for prompt in layer)
        for layer in report.segment_gates
    ]
    assert [line[5:].strip() for line in drawn] == expected
    assert all(line.count("█") == 12 for line in drawn)


def test_inspect_draws_a_character_per_prompt_where_the_terminal_is_narrow(
    in_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed("prune", "adapter", "--data", "images", "--output", tmp_path / "p", "--tokens", 1, "--segments", 0.5)
    monkeypatch.setenv("COLUMNS", "30")
    drawn = [line[5:].strip() for line in succeed("inspect", tmp_path / "p").splitlines() if "▄" in line]
    assert [sorted(line) for line in drawn] == [["·", "▄", "▄", "▄"]] * 3


def test_inspect_prints_json(in_place: Path) -> None:
    told = json.loads(succeed("inspect", "adapter", "--json"))
    summary = peft_e2vpt.load("adapter").prompt_summary()
    assert told["labels"] == COLOURS and told["tuned_values"] == summary.num_tuned_values
    assert [layer["segments"] for layer in told["layers"]] == [32, 32, 32]


def test_tensors_of_any_type_are_read_without_torch(in_place: Path, tmp_path: Path) -> None:
    succeed("prune", "adapter", "--data", "images", "--output", tmp_path / "p", "--tokens", 1, "--segments", 0.5)
    before = inspect_adapter(tmp_path / "p")
    path = tmp_path / "p" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    assert inspect_adapter(tmp_path / "p").layers == before.layers


def test_the_first_half_of_a_file_is_refused(in_place: Path, tmp_path: Path) -> None:
    shutil.copytree(in_place / "adapter", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "adapter_model.safetensors is damaged: " in fail("inspect", tmp_path / "a")


# --------------------------------------------------------------------------------------------------------- a whole run
@pytest.fixture
def a_run(in_place: Path, tmp_path: Path) -> Path:
    for name in ("e2vpt", "e2vpt/checkpoint-9", "e2vpt/checkpoint-10", "broken"):
        shutil.copytree(in_place / "adapter", tmp_path / "run" / name)
    (tmp_path / "run" / "lora").mkdir()
    (tmp_path / "run" / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "run" / "linear").mkdir()
    (tmp_path / "run" / "broken" / "adapter_model.safetensors").write_bytes(b"")
    return tmp_path / "run"


def test_the_adapters_of_a_run_are_listed(a_run: Path) -> None:
    lines = succeed("inspect", a_run).splitlines()
    content = inspect_adapter(a_run / "e2vpt")
    assert "5 adapters" in lines[0]
    cells = [line.split() for line in lines[2:]]
    assert [row[0] for row in cells[1:6]] == ["broken", "e2vpt", "e2vpt/checkpoint-9", "e2vpt/checkpoint-10", "lora"]
    assert cells[2][1:] == [
        "E2VPT",
        "12",
        "96",
        "6",
        f"{content.num_tuned_values:,}",
        f"{content.tuned_percentage:.3f}",
    ]
    assert cells[5][1:] == ["LORA"]
    assert lines[-1].startswith("broken: ") and "adapter_model.safetensors is damaged" in lines[-1]


def test_the_adapters_of_a_run_are_listed_as_json(a_run: Path) -> None:
    told = {entry["adapter"]: entry for entry in json.loads(succeed("inspect", a_run, "--json"))}
    assert told["e2vpt"]["labels"] == COLOURS and told["lora"] == {"adapter": "lora", "method": "LORA"}
    assert "damaged" in told["broken"]["error"]


def test_adapters_inside_of_an_adapter_are_named(a_run: Path) -> None:
    assert "Further adapters inside: checkpoint-9, checkpoint-10." in succeed("inspect", a_run / "e2vpt")
    assert "Further adapters" not in succeed("inspect", a_run / "e2vpt" / "checkpoint-9")
