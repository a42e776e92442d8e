# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Adapters are data: what `SECURITY.md` promises of their files."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import peft_e2vpt
from peft_e2vpt import E2VPTConfig, PruningReport
from peft_e2vpt._compat import ways_to_match
from peft_e2vpt.hub.card import Location, write_card
from peft_e2vpt.hub.companion import facts_of
from peft_e2vpt_cli.files import printable
from tests.support.adapted import config_of, trained
from tests.support.command_line import fail, succeed
from tests.support.models import build
from tests.support.paths import ROOT


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
EVIL = 'x"><script>alert(1)</script> [a](javascript:b) | c `d` # e'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base, _ = build("vit")
    base.save_pretrained(tmp_path / "base")
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    trained(get_peft_model(base, config_of())).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Touch:
    """What a pickle can do to whoever reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


# ---------------------------------------------------------------------------------------------------- no code is run
@pytest.mark.parametrize("beside", [False, True], ids=["pickle alone", "beside safetensors"])
def test_a_pickle_is_never_read(folder: Path, tmp_path: Path, beside: bool) -> None:
    torch.save({"a": Touch(tmp_path / "touched")}, folder / "adapter_model.bin")
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    if beside:
        PeftModel.from_pretrained(base, folder)
        peft_e2vpt.load(folder)
    else:
        (folder / TENSORS).unlink()
        for load in (peft_e2vpt.load, lambda path: PeftModel.from_pretrained(base, path)):
            with pytest.raises(ValueError, match=r"adapter_model.bin, a pickle, which can run code when it is read"):
                load(folder)
        with pytest.raises(ValueError, match="a pickle"):
            base.load_adapter(str(folder))
    assert not (tmp_path / "touched").exists()


def test_a_pickle_of_a_base_model_that_a_file_names_is_not_read_unless_the_call_says_so(
    folder: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "base" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "base" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no safetensors, and a pickle is not read because a file names it"):
        peft_e2vpt.load(folder)
    for chosen in ({"use_safetensors": False}, {"base_model": tmp_path / "base"}):
        assert peft_e2vpt.load(folder, **chosen).active_adapter == "default"


@pytest.mark.parametrize("name", ["preprocessor_config.json", "config.json"])
def test_code_beside_an_adapter_or_its_base_model_is_not_run(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = folder if name == "preprocessor_config.json" else tmp_path / "base"
    (where / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    mapping = {"auto_map": {"AutoImageProcessor": "evil.Evil", "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    content = json.loads((where / name).read_text()) if (where / name).exists() else {"image_processor_type": "Evil"}
    (where / name).write_text(json.dumps({**content, **mapping}))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("the user is asked to run code"))
    change(folder / CONFIG, trust_remote_code=True, base_model_settings={"trust_remote_code": True})
    with pytest.warns(UserWarning, match="trust_remote_code"):
        peft_e2vpt.load(folder)
    with pytest.raises(ValueError, match="needs an image_processor"), pytest.warns(UserWarning):
        peft_e2vpt.pipeline("image-classification", folder)
    assert not (tmp_path / "touched").exists() and "evil" not in sys.modules


@pytest.mark.parametrize(
    "mapping",
    [
        {"base_model_class": "system", "parent_library": "os"},
        {"base_model_class": "pipeline", "parent_library": "transformers"},
        {"base_model_class": "PreTrainedModel", "parent_library": "transformers.models...os.modeling_x"},
        {"base_model_class": "__import__"},
        {},
    ],
)
def test_a_file_names_no_class_but_a_model_of_transformers(folder: Path, mapping: dict[str, str]) -> None:
    change(folder / CONFIG, auto_mapping=mapping)
    with pytest.raises(ValueError, match=r"was made for a"):
        peft_e2vpt.load(folder)


# --------------------------------------------------------------------------------------------------- memory and time
@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"hidden_size": 10**6}, r"hidden_size=1000000, and the base model 32"),
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers=1000000, and the base model 3"),
        ({"image_size": 10**9}, "image_size=1000000000"),
        ({"image_size": [10**9, 10**9]}, "image_size="),
        ({"num_attention_heads": [4] * 10**5}, "num_attention_heads="),
        ({"hidden_size": 1024}, r"has shape .* is needed"),
        ({"hidden_size": "many"}, r"make no ViTForImageClassification"),
        ({"num_attention_heads": 0}, r"make no ViTForImageClassification"),
        ({"hidden_act": "evil"}, r"make no ViTForImageClassification"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_settings_that_would_make_another_model_are_refused_before_it_is_built(
    folder: Path, stored: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder / CONFIG, base_model_settings=stored)
    monkeypatch.setattr(
        transformers.ViTForImageClassification, "from_pretrained", lambda *args, **kwargs: pytest.fail("built")
    )
    with pytest.raises(ValueError, match=message):
        peft_e2vpt.load(folder)
    assert fail("card", str(folder), "--write")


@pytest.mark.parametrize("heads", [None, []])
def test_more_labels_than_a_head_can_have_are_refused_before_it_is_built(
    folder: Path, tmp_path: Path, heads: list[str] | None
) -> None:
    if heads is not None:
        base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
        get_peft_model(base, config_of(modules_to_save=heads)).save_pretrained(folder)
    change(folder / CONFIG, labels=[str(index) for index in range(10**6)])
    with pytest.raises(ValueError, match="labels"):
        peft_e2vpt.load(folder)


def test_a_message_does_not_repeat_all_that_a_file_holds() -> None:
    with pytest.raises(ValueError, match="labels must be None or a list of names") as error:
        E2VPTConfig(labels=[0] * 10**6)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "expression", ["(a+)+$", "(.*)*x", r"(\w|\w\d)+!", "a?" * 60 + "a" * 60, ".*" * 9 + "x", "(x*)\\1+"]
)
def test_an_expression_that_may_never_end_is_refused_before_it_is_tried(expression: str) -> None:
    start = time.perf_counter()
    for name in ("target_modules", "exclude_modules"):
        with pytest.raises(ValueError, match=f"{name}=.* may never end: use at most four"):
            E2VPTConfig(**{name: expression})
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    "expression",
    [
        r".*\.attention",
        r"vit\.layers\.(0|1|2|10|11)\.attention",
        r".*encoder.*layer.*attention.*",
        r"(?:model\.)?vision_tower\.blocks\.\d+\.attn",
        r".*\.(?:[0-9]|1[01])\.(?!cross_)\w+",
    ],
)
def test_expressions_that_people_write_are_taken(expression: str) -> None:
    assert ways_to_match(expression) < 2e8
    start = time.perf_counter()
    re.fullmatch(E2VPTConfig(target_modules=expression).target_modules, "layers.0.attention." * 5 + "!")
    assert time.perf_counter() - start < 1.0


# ------------------------------------------------------------------------------------------------ where it is written
@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", "a\\b", "..", "", "a.b", "keys", "__base__"])
def test_the_name_of_an_adapter_leads_out_of_no_folder(folder: Path, tmp_path: Path, name: str) -> None:
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    before = list(base.state_dict())
    for add in (
        lambda: get_peft_model(base, config_of(), adapter_name=name),
        lambda: PeftModel.from_pretrained(base, folder, adapter_name=name),
    ):
        with pytest.raises(ValueError, match="name"):
            add()
        assert list(base.state_dict()) == before
    model = get_peft_model(base, config_of())
    with pytest.raises(ValueError, match="name"):
        model.add_adapter(name, config_of())
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("revision", ["../../../x", "/etc/passwd", "a b", "~", "", "a\\..\\b", "a\0", 3])
def test_a_revision_in_a_file_is_one_that_git_knows(folder: Path, revision: Any) -> None:
    change(folder / CONFIG, revision=revision)
    with pytest.raises(ValueError, match="revision must be None or a branch, tag or commit"):
        peft_e2vpt.load(folder)


@pytest.mark.parametrize("name", ["README.md", "pruning_report.json", "pruning.png"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_link_in_a_folder_has_no_other_file_overwritten(
    folder: Path, tmp_path: Path, name: str, exists: bool
) -> None:
    outside = tmp_path / "outside"
    if exists:
        outside.write_text((folder / "README.md").read_text() if name == "README.md" else "mine")
    before = outside.read_bytes() if exists else None
    report().save(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    if name == "pruning_report.json":
        report().save(folder)
    else:
        model = peft_e2vpt.load(folder)
        write_card(folder, facts_of(model, model.peft_config["default"], "default"))
    assert (outside.read_bytes() if outside.exists() else None) == before
    assert not (folder / name).is_symlink()


def report(**changes: Any) -> PruningReport:
    facts: dict[str, Any] = {
        "step": 3,
        "rewound_to": "init",
        "num_scored_samples": 8,
        "layers": [0, 1],
        "token_scores": [[1.0, 2.0], [3.0, 0.0]],
        "segment_scores": [[[1.0, 0.0], [1.0, 1.0]]] * 2,
        "token_gates": [[1.0, 1.0], [1.0, 0.0]],
        "segment_gates": [[[1.0, 0.0], [1.0, 1.0]]] * 2,
        "tuned_values_before": 1000,
        "tuned_values_after": 900,
        "tuned_percentage_before": 3.0,
        "tuned_percentage_after": 2.7,
    }
    return PruningReport(**{**facts, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"step": EVIL},
        {"tuned_values_before": EVIL},
        {"tuned_percentage_after": float("nan")},
        {"token_scores": EVIL},
        {"segment_gates": [[1.0]]},
        {"layers": [EVIL]},
        {"unknown": 1},
    ],
)
def test_a_report_that_is_none_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    report().save(tmp_path)
    change(tmp_path / "pruning_report.json", **changes)
    with pytest.raises(ValueError, match=r"pruning_report.json is damaged, or not the report of a pruning"):
        PruningReport.load(tmp_path)


# ---------------------------------------------------------------------------------------------- what is shown of names
def test_names_from_files_are_text_in_a_card(folder: Path) -> None:
    model = peft_e2vpt.load(folder)
    facts = facts_of(model, model.peft_config["default"], "default")
    result = EvalResult(
        task_type="image-classification",
        dataset_type="x",
        dataset_name=EVIL,
        metric_type=EVIL + "\n# heading",
        metric_value=EVIL,
    )
    earlier = ModelCardData(eval_results=[result], model_name=EVIL, datasets=[EVIL], license=f"mit\n---\n{EVIL}")
    facts = type(facts)(facts.summary, f"/somewhere/{EVIL}`</code>\n<b>", facts.task, facts.own_class)
    write_card(folder, facts, Location(f"{EVIL}\n---"), earlier=earlier)
    card = ModelCard.load(folder / "README.md")  # its metadata is YAML, and ends where it did
    assert card.data.to_dict()["datasets"] == [EVIL] and card.data.to_dict()["license"] == f"mit\n---\n{EVIL}"
    outside_code = re.sub(r"```.*?```|(?<!\\)`[^`\n]*`", "", card.text, flags=re.DOTALL)
    assert "<script" not in outside_code.replace("\\<script", "") and "<b>" not in outside_code
    assert not re.search(r"(?<!\\)\]\(javascript", outside_code) and "\n# heading" not in card.text
    (row,) = [line for line in card.text.splitlines() if line.startswith("| x")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


def test_names_from_files_are_text_in_a_terminal(folder: Path) -> None:
    change(folder / CONFIG, labels=["\x1b[31mred\x07", "b", "c", "d", "e"])
    shown = succeed("inspect", str(folder))
    assert "\x1b" not in shown and "\\x1b[31mred\\x07" in shown
    assert printable("caf\N{LATIN SMALL LETTER E WITH ACUTE}\r\n") == "caf\N{LATIN SMALL LETTER E WITH ACUTE}\\r\\n"


def test_names_from_files_are_text_in_a_figure() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from io import BytesIO

    from peft_e2vpt.plotting import plot_embeddings

    names = ["$\\frac{$", "_hidden", "cost: 5$"]
    figure = plot_embeddings({"$x^{": torch.randn(9, 4)}, torch.arange(9) % 3, names)
    figure.savefig(BytesIO())
    assert len(figure.legends[0].get_texts()) == 3


# ------------------------------------------------------------------------------------------------------- what is said
def test_every_test_that_the_security_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) >= 10
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), name
