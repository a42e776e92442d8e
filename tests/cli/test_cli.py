# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt`: what each command prints and writes, and how it fails."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification, ViTImageProcessor
from typer.testing import CliRunner, Result

import peft_e2vpt
from peft_e2vpt import PruningReport
from peft_e2vpt._compat import METHOD
from peft_e2vpt.hub import card, loading
from peft_e2vpt.images import accuracy, load_images
from peft_e2vpt.tuner.config import FORMAT_VERSION
from peft_e2vpt_cli import files
from peft_e2vpt_cli.app import app
from peft_e2vpt_cli.content import inspect_adapter
from tests.golden.test_golden import stored
from tests.hub.test_conversion import ONE
from tests.support.adapted import config_of
from tests.support.models import build
from tests.support.released import base_of, checkpoint_of


COLOURS = ["red", "green", "blue"]


def draw_images(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for channel, name in enumerate(COLOURS):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 160, (32, 32, 3), dtype=np.uint8)
            pixels[..., channel] += 60
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, an adapter that knows colours, and images."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    base, _ = build("vit")
    base.classifier = torch.nn.Linear(32, 3)
    base.config.id2label = dict(enumerate(COLOURS))
    base.config.label2id = {name: index for index, name in enumerate(COLOURS)}
    base.save_pretrained(folder / "base")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "base")
    draw_images(folder / "images", 20)
    model = get_peft_model(
        ViTForImageClassification.from_pretrained(folder / "base"), config_of(num_visual_prompts=4, num_segments=8)
    )
    images = load_images(str(folder / "images"), COLOURS, processor)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(20):
        for batch in images.training:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert accuracy(model, images.validation) > 0.8
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments: Any) -> str:
    """The one sentence that a command fails with."""
    result = run(*arguments)
    assert result.exit_code in (1, 2) and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and "Traceback" not in result.stderr
    return last.removeprefix("Error: ")


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(peft_e2vpt.__file__).parents[1])}


def command_line(*arguments: str, module: str = "peft_e2vpt", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **environment},
    )


# ------------------------------------------------------------------------------------------------------------- inspect
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


# --------------------------------------------------------------------------------------------------------------- prune
def test_prune_searches_saves_and_tells_before_and_after(in_place: Path, tmp_path: Path) -> None:
    shown = succeed("prune", "adapter", "--data", "images", "--output", tmp_path / "p")
    model = peft_e2vpt.load(tmp_path / "p")
    before, after = peft_e2vpt.load("adapter").prompt_summary(), model.prompt_summary()
    row = next(line.split() for line in shown.splitlines() if line.startswith("trained parameters"))
    assert row[-2:] == [f"{before.num_tuned_values:,}", f"{after.num_tuned_values:,}"]
    assert "chosen" in shown and "not trained again" in shown and "PruneRewindCallback" in shown
    processor = ViTImageProcessor.from_pretrained(tmp_path / "p")
    found = accuracy(model, load_images("images", COLOURS, processor).validation)
    row = next(line.split() for line in shown.splitlines() if line.startswith("accuracy on 12 images"))
    assert float(row[-1]) == pytest.approx(found, abs=5e-4)
    assert f"| accuracy | {found:.4g} |" in (tmp_path / "p" / "README.md").read_text()


def test_prune_keeps_a_budget(in_place: Path, tmp_path: Path) -> None:
    succeed("prune", "adapter", "--data", "images", "--output", tmp_path / "p", "--max-tuned-percentage", 1.5)
    before, after = (peft_e2vpt.load(path).prompt_summary() for path in ("adapter", tmp_path / "p"))
    assert after.tuned_percentage <= 1.5 < before.tuned_percentage


def test_labels_are_matched_by_name(in_place: Path) -> None:
    processor = ViTImageProcessor.from_pretrained("base")
    batch = next(iter(load_images("images", ["green", "blue", "x", "red"], processor, max_samples=12).validation))
    own = next(iter(load_images("images", None, processor, max_samples=12).validation))
    # a folder's classes are in alphabetical order: blue, green, red
    assert torch.equal(batch["labels"], torch.tensor([1, 0, 3])[own["labels"]])


# ------------------------------------------------------------------------------------------------------------- convert
def test_convert_gives_an_adapter_with_the_released_logits(tmp_path: Path) -> None:
    base_of(ONE).save_pretrained(tmp_path / "base")
    torch.save({"model": checkpoint_of(ONE)}, tmp_path / "last_model.pth")
    shown = succeed(
        "convert", tmp_path / "last_model.pth", "--base", tmp_path / "base", "--output", tmp_path / "adapter"
    )
    assert "prompts 156 + head 198 = 354 " in shown
    base = base_of(ONE)
    base.classifier = torch.nn.Linear(32, 6)
    model = PeftModel.from_pretrained(base.double(), tmp_path / "adapter").eval()
    pixels = stored("inputs")[f"s{ONE.settings['seed']}/pixel_values"][: ONE.settings["batch"]].double()
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels).logits, ONE.logits, rtol=0, atol=1e-12)
    loaded = peft_e2vpt.load(tmp_path / "adapter")
    assert loaded.prompt_summary() == model.prompt_summary()


# ---------------------------------------------------------------------------------------------------------------- card
def test_card_prints_what_is_written_and_keeps_results(in_place: Path, tmp_path: Path) -> None:
    peft_e2vpt.load("adapter").save_pretrained(tmp_path / "a")
    card = tmp_path / "a" / "README.md"
    printed = succeed("card", tmp_path / "a")
    assert printed.strip() == card.read_text().strip()
    card.write_text(
        card.read_text().replace("## What", "## Results\n\n| metric | value |\n|---|---:|\n| f1 | 0.5 |\n\n## What")
    )
    card.write_text(card.read_text().replace("library_name: peft\n", "library_name: peft\nlicense: mit\n", 1))
    assert "Wrote" in succeed("card", tmp_path / "a", "--write")
    assert "| f1 | 0.5 |" in card.read_text() and "license: mit" in card.read_text()


def test_results_are_read_back_from_the_metadata_of_a_card(in_place: Path, tmp_path: Path) -> None:
    succeed("prune", "adapter", "--data", "images", "--output", tmp_path / "p", "--tokens", 1)
    card = tmp_path / "p" / "README.md"
    (result,) = ModelCard.load(card).data.eval_results
    assert (result.task_type, result.dataset_name, result.metric_type) == (
        "image-classification",
        "Unknown",
        "accuracy",
    )
    row = f"| accuracy | {result.metric_value:.4g} |"
    card.write_text(card.read_text().replace(row, ""))
    assert row in succeed("card", tmp_path / "p")


def test_card_needs_the_config_of_the_base_model_only(in_place: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((in_place / "base" / "config.json").read_bytes())
    printed = succeed("card", "adapter", "--base", tmp_path)
    assert f"**{inspect_adapter('adapter').num_tuned_values:,} parameters, " in printed


def test_a_card_with_broken_metadata_is_named(in_place: Path, tmp_path: Path) -> None:
    peft_e2vpt.load("adapter").save_pretrained(tmp_path / "a")
    card = tmp_path / "a" / "README.md"
    card.write_text(card.read_text().replace("library_name: peft\n", "library_name: peft\n- x\n", 1))
    assert "metadata" in fail("card", tmp_path / "a", "--write") and "- x" in card.read_text()


def test_a_card_that_somebody_has_edited_stays(in_place: Path, tmp_path: Path) -> None:
    peft_e2vpt.load("adapter").save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("# Mine\n")
    assert "Somebody has edited the card" in fail("card", tmp_path / "a", "--write")
    assert (tmp_path / "a" / "README.md").read_text() == "# Mine\n"


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["inspect", "nowhere"],
            "The adapter nowhere is neither in a folder here nor in the cache, and the Hub was not",
        ),
        (["inspect", "base"], "There is no adapter at base: no adapter_config.json was found."),
        (["inspect", "adapter", "--base", "somebody/away"], "The config of the base model 'somebody/away' cannot"),
        (["card", "base"], "There is no adapter at base"),
        (["card", "somebody/away", "--write"], "is no folder to write a card into"),
        (["convert", "none.pth", "--base", "base", "--output", "new"], "No such file or directory: 'none.pth'"),
        (["prune", "adapter", "--data", "base", "--output", "new"], "The dataset base has no Image column"),
        (["prune", "adapter", "--data", "empty", "--output", "new"], "The images empty cannot be loaded"),
        (["prune", "adapter", "--data", "images", "--output", "adapter"], "There is an adapter in adapter already"),
        (["prune", "adapter", "--data", "images", "--output", "new", "--tokens", "9"], "Of 4, 0 to 3 can be pruned"),
        (["prune", "adapter", "--data", "images", "--output", "new", "--tokens", "x"], "is neither a ratio"),
        (["prune", "adapter", "--data", "others", "--output", "new"], "classes that the adapter does not know: cat"),
        (
            ["prune", "adapter", "--data", "images", "--output", "new", "--max-tuned-percentage", "0.1"],
            "max_tuned_percentage=0.1 is too small: head and key-value prompts alone take",
        ),
        (
            ["prune", "adapter", "--data", "p", "--output", "n", "--tokens", "1", "--max-tuned-percentage", "1"],
            "pass either --max-tuned-percentage or --tokens and --segments",
        ),
        (["prune", "adapter"], "Missing option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_goes_wrong_is_one_sentence(in_place: Path, arguments: list[str], message: str) -> None:
    (in_place / "empty").mkdir(exist_ok=True)
    for name in ("cat", "dog"):
        if not (in_place / "others" / name).exists():
            (in_place / "others" / name).mkdir(parents=True)
            for index in range(5):
                Image.new("RGB", (32, 32)).save(in_place / "others" / name / f"{index}.png")
    assert message in fail(*arguments)
    assert not (in_place / "new").exists()


def test_data_need_the_package_datasets(in_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in fail("prune", "adapter", "--data", "images", "--output", "new")


# ----------------------------------------------------------------------------------------------------- a real process
def test_the_command_works_in_a_process_of_its_own_and_without_unicode(in_place: Path) -> None:
    done = command_line("inspect", "adapter", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == ""
    assert "3: red, green, blue" in done.stdout and "    0  ######## ########" in done.stdout


def test_an_error_in_a_process_has_no_traceback() -> None:
    done = command_line("inspect", ".")
    assert done.returncode == 1 and done.stderr.splitlines() == [
        "Error: There is no adapter at .: no adapter_config.json was found."
    ]


def processor_time_of(*arguments: str) -> float:
    """Least seconds of CPU of three runs of `peft-e2vpt`."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert command_line(*arguments, module="peft_e2vpt_cli").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


@pytest.mark.parametrize(("arguments", "seconds"), [(["--help"], 0.5), (["inspect", "adapter"], 2.0)])
def test_a_command_without_a_model_starts_at_once(in_place: Path, arguments: list[str], seconds: float) -> None:
    assert processor_time_of(*arguments) < seconds


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["prune", "--help"], ["inspect", "adapter"]])
def test_a_command_without_a_model_imports_no_library_for_models(in_place: Path, arguments: list[str]) -> None:
    heavy = {"torch", "transformers", "peft", "accelerate", "peft_e2vpt"}
    program = (
        "import sys\nfrom peft_e2vpt_cli.app import main\n"
        f"try: main()\nfinally: assert not sys.modules.keys() & {heavy}"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and done.stdout and not done.stderr


def test_the_version_is_that_of_the_package() -> None:
    assert command_line("--version", module="peft_e2vpt_cli").stdout == f"{peft_e2vpt.__version__}\n"


@pytest.mark.parametrize("arguments", ["--help", "inspect adapter", "inspect adapter --json"])
def test_a_pipe_that_is_closed_ends_a_command_quietly(in_place: Path, arguments: str) -> None:
    command = [sys.executable, "-m", "peft_e2vpt_cli", *arguments.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


# ----------------------------------------------------------------------------------------------- what is written twice
def test_the_light_package_has_the_constants_of_the_heavy_one() -> None:
    assert (files.METHOD, files.FORMAT_VERSION) == (METHOD, FORMAT_VERSION)
    assert (files.CONFIG_NAME, files.WEIGHTS_NAME) == (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    assert (files.CARD_NAME, files.METADATA_KEY) == (card.CARD_NAME, card.METADATA_KEY)


@pytest.mark.parametrize("settings", [{"peft_type": "LORA"}, {"format_version": 99}, None])
def test_both_packages_refuse_an_adapter_in_the_same_words(
    in_place: Path, tmp_path: Path, settings: dict[str, Any] | None
) -> None:
    if settings is not None:
        config = json.loads((in_place / "adapter" / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(ValueError) as light:
        files.read_config(str(tmp_path))
    with pytest.raises(ValueError) as heavy:
        loading.read_config(str(tmp_path))
    assert str(light.value) == str(heavy.value)


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
