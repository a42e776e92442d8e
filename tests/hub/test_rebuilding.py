# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""An adapter tells how its model is built again: what `peft_e2vpt.load` gives answers as the model that was saved."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import AutoPeftModel, AutoPeftModelForFeatureExtraction, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import peft_e2vpt
from peft_e2vpt import E2VPTConfig
from peft_e2vpt._compat import takes_processor
from peft_e2vpt.hub.base_model import class_mapping
from peft_e2vpt.hub.pipelines import PROCESSORS
from tests.support.adapted import config_of, predict, trained
from tests.support.models import SWIN, TEXT, VIT, build


GOLDEN = Path(__file__).parents[1] / "golden" / "saved_by_0.1.0"


def pixels(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


class Task(NamedTuple):
    """A model as users build it for a task: from a checkpoint, with settings of their own."""

    model: str
    config: dict[str, Any]
    settings: dict[str, Any] = {}  # noqa: RUF012  # of from_pretrained
    inputs: Callable[[], dict[str, Tensor]] = pixels
    output: str = "logits"
    adapter: dict[str, Any] = {}  # noqa: RUF012  # of E2VPTConfig

    def build(self, folder: Path) -> Any:
        cls = getattr(transformers, self.model)
        torch.manual_seed(0)
        cls(cls.config_class(**self.config)).save_pretrained(folder)
        return cls.from_pretrained(folder, ignore_mismatched_sizes=True, **self.settings)


SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
    "num_labels": 3,
}
DPT = {
    **VIT,
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [16] * 4,
    "fusion_hidden_size": 16,
}
YOLOS = {**VIT, "image_size": [32, 32], "num_detection_tokens": 5, "num_labels": 7}
MASK2FORMER = {
    "backbone_config": transformers.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    ),
    **dict.fromkeys(("hidden_size", "feature_size", "mask_feature_size"), 32),
    **dict.fromkeys(("dim_feedforward", "encoder_feedforward_dim"), 64),
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_queries": 5,
    "num_labels": 7,
}
AST = {
    **{name: value for name, value in VIT.items() if name != "image_size"},
    "max_length": 32,
    "num_mel_bins": 16,
    "time_stride": 8,
    "frequency_stride": 8,
}
CLIP = {"text_config": TEXT, "vision_config": VIT, "projection_dim": 16}
IMAGE, THREE = "ViTForImageClassification", {**VIT, "num_labels": 3}
BOXES = "YolosForObjectDetection"


def masked() -> dict[str, Tensor]:
    return {**pixels(), "bool_masked_pos": torch.arange(32).reshape(2, 16) % 3 == 0}


def captioned() -> dict[str, Tensor]:
    return {**pixels(), "input_ids": torch.tensor([[1, 5, 2], [1, 7, 2]])}


TASKS = {
    "single-label": Task(IMAGE, THREE, {"num_labels": 5}),
    "multi-label": Task(IMAGE, THREE, {"num_labels": 4, "problem_type": "multi_label_classification"}),
    "regression": Task(IMAGE, THREE, {"num_labels": 1, "problem_type": "regression"}),
    "segmentation": Task("SegformerForSemanticSegmentation", SEGFORMER, {"num_labels": 6, "decoder_hidden_size": 24}),
    "depth": Task("DPTForDepthEstimation", DPT, output="predicted_depth", adapter={"modules_to_save": ["head.head"]}),
    "detection": Task(BOXES, YOLOS, {"num_labels": 3}),
    "boxes": Task(BOXES, YOLOS, {"num_labels": 3}, output="pred_boxes"),
    "instances": Task(
        "Mask2FormerForUniversalSegmentation",
        MASK2FORMER,
        {"num_labels": 3},
        inputs=lambda: pixels(64),
        output="class_queries_logits",
        adapter={"modules_to_save": ["class_predictor"]},
    ),
    "features": Task("ViTModel", VIT, output="last_hidden_state"),
    "pooled features": Task("ViTModel", VIT, output="pooler_output"),
    "features, named as a task": Task(
        "ViTModel", VIT, output="last_hidden_state", adapter={"task_type": "FEATURE_EXTRACTION"}
    ),
    "masked images": Task(
        "ViTForMaskedImageModeling", {**VIT, "encoder_stride": 8}, inputs=masked, output="reconstruction"
    ),
    "videos": Task(
        "VideoMAEForVideoClassification",
        {**VIT, "num_frames": 4, "tubelet_size": 2},
        {"num_labels": 5},
        inputs=lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
    ),
    "sound": Task(
        "ASTForAudioClassification",
        AST,
        {"num_labels": 5},
        inputs=lambda: {"input_values": torch.randn(2, 32, 16)},
    ),
    "zero-shot": Task("CLIPModel", CLIP, inputs=captioned, output="logits_per_image"),
    "captions": Task("GitForCausalLM", {**TEXT, "vision_config": VIT}, inputs=captioned),
    "half precision": Task(IMAGE, THREE, {"num_labels": 5, "dtype": torch.bfloat16}),
    "another image size": Task(
        BOXES, YOLOS, {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}}, inputs=lambda: pixels(48)
    ),
    "an image size of its own": Task("SwinForImageClassification", SWIN, {"num_labels": 4, "image_size": 64}),
    "a setting in a tower": Task(
        "CLIPModel", CLIP, {"vision_config": {"layer_norm_eps": 0.1}}, inputs=captioned, output="logits_per_image"
    ),
}


def adapter_for(task: Task, folder: Path, **settings: Any) -> tuple[PeftModel, Path]:
    """A trained adapter, saved in a folder beside its base model."""
    base = task.build(folder / "base")
    model = trained(get_peft_model(base, config_of(**{**task.adapter, **settings}))).eval()
    model.save_pretrained(folder / "adapter")
    return model, folder / "adapter"


@torch.no_grad()
def answer(task: Task, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    return model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})[task.output]


def settings_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def change(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**settings_in(folder), **changes}))


# ------------------------------------------------------------------------------------------------------ the same model
@pytest.mark.parametrize("name", TASKS)
def test_a_loaded_adapter_answers_as_the_one_that_was_saved(name, tmp_path):
    task = TASKS[name]
    model, folder = adapter_for(task, tmp_path)
    loaded = peft_e2vpt.load(folder)
    inputs = task.inputs()
    assert torch.equal(answer(task, loaded, inputs), answer(task, model, inputs))
    base, rebuilt = model.get_base_model(), loaded.get_base_model()
    assert type(rebuilt) is type(base) and rebuilt.dtype == base.dtype
    for setting in ("problem_type", "id2label", "num_labels"):
        assert getattr(rebuilt.config, setting) == getattr(base.config, setting)


def test_only_what_differs_from_the_checkpoint_is_stored(tmp_path):
    _, folder = adapter_for(TASKS["multi-label"], tmp_path)
    assert settings_in(folder)["base_model_settings"] == {"problem_type": "multi_label_classification"}


def test_without_its_checkpoint_a_model_is_described_in_full(tmp_path):
    model, _ = adapter_for(TASKS["regression"], tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    model.save_pretrained(tmp_path / "adapter")
    assert (
        settings_in(tmp_path / "adapter")["base_model_settings"].items()
        >= {
            "problem_type": "regression",
            "hidden_size": 32,
            "dtype": "float32",
        }.items()
    )
    loaded = peft_e2vpt.load(tmp_path / "adapter", base_model=tmp_path / "moved")
    inputs = pixels()
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


def test_a_problem_type_that_the_first_loss_has_set_is_stored(tmp_path):
    model, folder = adapter_for(TASKS["single-label"], tmp_path)
    assert model.config.problem_type is None
    model(**pixels(), labels=torch.tensor([[1.0, 0, 1, 0, 1]] * 2))
    model.save_pretrained(folder)
    assert peft_e2vpt.load(folder).config.problem_type == "multi_label_classification"


def test_what_the_call_says_comes_first(tmp_path):
    _, folder = adapter_for(TASKS["half precision"], tmp_path)
    loaded = peft_e2vpt.load(folder, dtype=torch.float32, problem_type="multi_label_classification")
    assert loaded.get_base_model().dtype == torch.float32
    assert loaded.config.problem_type == "multi_label_classification"


def test_an_adapter_saved_by_the_first_version_loads_as_before(tmp_path):
    base, inputs = build("vit")
    base.save_pretrained(tmp_path)
    loaded = peft_e2vpt.load(GOLDEN, base_model=tmp_path)
    torch.testing.assert_close(predict(loaded, inputs), load_file(GOLDEN / "expected.safetensors")["logits"])
    assert list(loaded.config.id2label.values()) == ["ash", "beech", "cedar", "dogwood", "elm"]


def test_an_adapter_in_a_subfolder_under_its_own_name_is_rebuilt_too(tmp_path):
    task = TASKS["regression"]
    model = trained(get_peft_model(task.build(tmp_path / "base"), config_of(), "sizes")).eval()
    model.save_pretrained(tmp_path / "adapters")
    loaded = peft_e2vpt.load(tmp_path / "adapters", subfolder="sizes", adapter_name="sizes")
    inputs = pixels()
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))
    assert loaded.config.problem_type == "regression"


@pytest.mark.parametrize(
    ("auto", "name"),
    [(AutoPeftModel, "features"), (AutoPeftModelForFeatureExtraction, "features, named as a task")],
    ids=["AutoPeftModel", "AutoPeftModelForFeatureExtraction"],
)
def test_the_auto_classes_of_peft_read_the_same_files(auto, name, tmp_path):
    model, folder = adapter_for(TASKS[name], tmp_path)
    inputs = pixels()
    loaded = auto.from_pretrained(folder).eval()
    assert torch.equal(answer(TASKS[name], loaded, inputs), answer(TASKS[name], model, inputs))


def test_a_tower_that_transformers_does_not_offer_by_name_is_rebuilt_too(tmp_path):
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2VisionModel

    Kosmos2VisionModel(Kosmos2VisionModel.config_class(**VIT)).save_pretrained(tmp_path / "base")
    model = trained(get_peft_model(Kosmos2VisionModel.from_pretrained(tmp_path / "base"), config_of())).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft_e2vpt.load(tmp_path / "adapter")
    inputs = pixels()
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


def test_the_class_that_fsdp_makes_of_a_model_is_not_stored():
    cls = transformers.ViTForImageClassification
    sharded = type(f"FSDP{cls.__name__}", (cls,), {"__module__": "torch.distributed.fsdp._fully_shard._fully_shard"})
    expected = {"base_model_class": "ViTForImageClassification", "parent_library": cls.__module__}
    assert class_mapping(sharded(transformers.ViTConfig(**VIT))) == expected


# ------------------------------------------------------------------------------------------------------------- classes
NAMES = ["cat", "dog", "owl"]


@pytest.mark.parametrize(
    ("id2label", "label2id"),
    [
        ({"0": "cat", "1": "dog", "2": "owl"}, None),
        ({0: "cat", 1: "dog", 2: "owl"}, None),
        ({"2": "owl", "0": "cat", "1": "dog"}, {"cat": "0", "dog": "1", "owl": "2"}),
        (None, {"cat": 0, "dog": 1, "owl": 2}),
        (None, {"cat": "0", "dog": "1", "owl": "2"}),
    ],
    ids=["string keys", "numbers", "both, in another order", "label2id only", "label2id of strings only"],
)
def test_names_of_classes_travel_however_they_were_set(id2label, label2id, tmp_path):
    base = Task(IMAGE, THREE).build(tmp_path / "base")
    model = get_peft_model(base, config_of())
    if id2label is not None:
        model.config.id2label = id2label
    if label2id is not None:
        model.config.label2id = label2id
    model.save_pretrained(tmp_path / "adapter")
    assert settings_in(tmp_path / "adapter")["labels"] == NAMES
    config = peft_e2vpt.load(tmp_path / "adapter").config
    assert config.id2label == dict(enumerate(NAMES))
    assert config.label2id == {name: index for index, name in enumerate(NAMES)}


def test_classes_that_are_no_numbers_do_not_stop_an_adapter_from_being_saved(tmp_path):
    model = get_peft_model(Task(IMAGE, THREE).build(tmp_path / "base"), config_of())
    model.config.id2label = {"cat": 0, "dog": 1, "owl": 2}  # the wrong way round
    model.save_pretrained(tmp_path / "adapter")
    assert settings_in(tmp_path / "adapter")["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_as_many_classes_are_stored_as_the_head_has(tmp_path):
    base = Task(IMAGE, THREE).build(tmp_path / "base")
    base.classifier = torch.nn.Linear(32, 4)
    model = trained(get_peft_model(base, config_of())).eval()
    model.config.id2label = {0: "cat", 1: "dog"}
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft_e2vpt.load(tmp_path / "adapter")
    assert list(loaded.config.id2label.values()) == ["cat", "dog", "LABEL_2", "LABEL_3"]
    inputs = pixels()
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


@pytest.mark.parametrize("labels", [True, False], ids=["with labels", "without"])
@pytest.mark.parametrize(("name", "rows"), [("single-label", 5), ("detection", 4)])
def test_the_advice_for_another_number_of_classes_helps_where_it_is_obeyed(name, rows, labels, tmp_path):
    task = TASKS[name]
    model, folder = adapter_for(task, tmp_path)
    if not labels:
        change(folder, labels=None)
    other = task._replace(settings={"num_labels": 9}).build(tmp_path / "base")
    with pytest.raises(ValueError, match=rf"has shape \({rows}, 32\), but .*: load the base model") as error:
        PeftModel.from_pretrained(other, folder)
    advice = int(re.search(r"num_labels=(\d+)\.$", str(error.value))[1])
    loaded = PeftModel.from_pretrained(task._replace(settings={"num_labels": advice}).build(tmp_path / "base"), folder)
    inputs = task.inputs()
    assert torch.equal(answer(task, loaded.eval(), inputs), answer(task, model, inputs))


def test_advice_that_has_been_obeyed_is_not_repeated(tmp_path):
    _, folder = adapter_for(TASKS["single-label"], tmp_path)
    base = TASKS["single-label"].build(tmp_path / "base")
    base.classifier = torch.nn.Linear(32, 6)
    with pytest.raises(
        ValueError, match=r"needs \(6, 32\): give the base model the head that the adapter was trained"
    ):
        PeftModel.from_pretrained(base, folder)


def test_an_adapter_saved_beside_another_keeps_its_own_classes_and_kind(tmp_path):
    _, first = adapter_for(Task(IMAGE, THREE, {"id2label": {0: "a", 1: "b", 2: "c"}}), tmp_path / "first")
    _, second = adapter_for(
        Task(IMAGE, THREE, {"id2label": dict(enumerate(NAMES)), "problem_type": "multi_label_classification"}),
        tmp_path / "second",
    )
    model = peft_e2vpt.load(first, adapter_name="first")
    with warnings.catch_warnings(record=True):
        model.load_adapter(second, adapter_name="second")
    model.save_pretrained(tmp_path / "both")
    settings = settings_in(tmp_path / "both" / "second")
    assert settings["labels"] == NAMES
    assert settings["base_model_settings"] == {"problem_type": "multi_label_classification"}


# ------------------------------------------------------------------------------------------------------------ warnings
def warnings_on(base: Any, folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(base, folder)
    return [str(warning.message) for warning in caught if "problem_type" in str(warning.message)]


@pytest.mark.parametrize(
    ("name", "kind"), [("regression", "regression"), ("multi-label", "multi_label_classification")]
)
def test_peft_is_told_that_a_base_model_has_another_problem_type(name, kind, tmp_path):
    task = TASKS[name]
    _, folder = adapter_for(task, tmp_path)
    plain = {key: value for key, value in task.settings.items() if key != "problem_type"}
    (message,) = warnings_on(task._replace(settings=plain).build(tmp_path / "base"), folder)
    assert message.startswith(f"The adapter was trained with problem_type={kind!r}, and the model has None")
    assert warnings_on(task.build(tmp_path / "base"), folder) == []


def test_a_classifier_that_has_not_seen_a_label_is_no_other_kind(tmp_path):
    task = TASKS["single-label"]
    model, folder = adapter_for(task, tmp_path)
    model(**pixels(), labels=torch.tensor([0, 1]))
    model.save_pretrained(folder)
    assert settings_in(folder)["base_model_settings"] == {"problem_type": "single_label_classification"}
    assert warnings_on(task.build(tmp_path / "base"), folder) == []


# ------------------------------------------------------------------------------------------------------------ security
def test_an_adapter_passes_only_settings_that_the_config_has(tmp_path):
    _, folder = adapter_for(TASKS["regression"], tmp_path)
    evil = {
        "trust_remote_code": True,
        "auto_map": {"AutoModel": "evil.Model"},
        "weights_only": False,
        "_attn_implementation": "evil/kernel",
        "quantization_config": {"quant_method": "evil"},
    }
    change(folder, base_model_settings={**evil, "problem_type": "regression"})
    with pytest.warns(UserWarning, match="has settings of its base model that ViTConfig .* does not know") as caught:
        loaded = peft_e2vpt.load(folder)
    (message,) = [str(w.message) for w in caught if "has settings of its base model" in str(w.message)]
    assert all(name in message for name in evil)
    assert loaded.config.problem_type == "regression" and not hasattr(loaded.config, "auto_map")


@pytest.mark.parametrize(
    ("name", "library", "shown"),
    [
        ("VisionTransformer", "timm.models.vision_transformer", "VisionTransformer"),
        (IMAGE, "__main__", f"__main__.{IMAGE}"),
        ("pipeline", "transformers", "transformers.pipeline"),
    ],
)
def test_a_model_that_is_not_of_transformers_is_refused_with_the_way_out(name, library, shown, tmp_path):
    _, folder = adapter_for(TASKS["regression"], tmp_path)
    change(folder, auto_mapping={"base_model_class": name, "parent_library": library}, base_model_name_or_path=None)
    with pytest.raises(
        ValueError, match=rf"made for a {shown}, which .*: build that model and load the adapter onto it"
    ):
        peft_e2vpt.load(folder)


def test_a_base_model_of_other_sizes_is_refused_where_the_adapter_does_not_bring_the_weights(tmp_path):
    _, folder = adapter_for(TASKS["single-label"], tmp_path)
    Task(IMAGE, {**THREE, "image_size": 64}).build(tmp_path / "other")
    change(folder, base_model_settings={"image_size": 32})
    with pytest.raises(
        ValueError, match=r"its vit.embeddings.position_embeddings has shape \(1, 65, 32\), and \(1, 17"
    ):
        peft_e2vpt.load(folder, base_model=tmp_path / "other")


# --------------------------------------------------------------------------------------------------------------- files
def lora_folder(folder: Path) -> Path:
    base = Task(IMAGE, THREE).build(folder / "base")
    get_peft_model(base, LoraConfig(r=32, target_modules=["q_proj"])).save_pretrained(folder / "lora")
    return folder / "lora"


def test_the_config_of_another_method_is_read_as_peft_reads_it(tmp_path):
    config = E2VPTConfig.from_pretrained(lora_folder(tmp_path))
    assert type(config) is LoraConfig and config.r == 32


def test_what_is_no_config_of_an_adapter_is_refused_as_peft_refuses_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
    for cls in (LoraConfig, E2VPTConfig):
        with pytest.raises(TypeError, match="missing required keys"):
            cls.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"adapter_config.json is not the configuration of an adapter: it has no peft"
    ):
        peft_e2vpt.load(tmp_path)


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the base model is built")


def broken_tensors(kind: str, path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    if kind == "pickle":
        torch.save({"a": torch.zeros(1)}, path.with_name("adapter_model.bin"))
    elif kind != "missing":
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "pointer": pointer}[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"There is no adapter at .*adapter: no adapter_model.safetensors was found"),
        ("empty", r"adapter_model.safetensors is damaged or incomplete: copy it again"),
        ("truncated", r"adapter_model.safetensors is damaged or incomplete: copy it again"),
        ("pointer", r"adapter_model.safetensors is a pointer of Git LFS, not the file itself: run git lfs pull"),
        ("pickle", r"adapter at .*adapter has its tensors in adapter_model.bin, a pickle, which can run code"),
    ],
)
def test_tensors_that_cannot_be_read_are_named_before_the_base_model_is_built(kind, message, tmp_path, monkeypatch):
    _, folder = adapter_for(TASKS["regression"], tmp_path)
    broken_tensors(kind, folder / "adapter_model.safetensors")
    monkeypatch.setattr(transformers.ViTForImageClassification, "from_pretrained", never)
    with pytest.raises(ValueError, match=message):
        peft_e2vpt.load(folder)


@pytest.mark.parametrize("content", ['{"peft_type": "E2', "", "[1, 2]", '{"r": 8}'])
def test_a_damaged_config_is_named(content, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/adapter_config.json is (damaged|not the configuration)"):
        peft_e2vpt.load(tmp_path)


def test_torch_device_says_where_the_whole_model_goes(tmp_path):
    _, folder = adapter_for(TASKS["regression"], tmp_path)
    loaded = peft_e2vpt.load(folder, torch_device="cpu")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match="torch_device and device_map both say where the model goes"):
        peft_e2vpt.load(folder, torch_device="cpu", device_map="cpu")


# --------------------------------------------------------------------------------------------------- local base models
def test_a_relative_base_model_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = TASKS["regression"]
    model, _ = adapter_for(task, Path())
    assert settings_in(tmp_path / "adapter")["base_model_name_or_path"] == str(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    inputs = pixels()
    assert torch.equal(predict(peft_e2vpt.load(tmp_path / "adapter"), inputs), predict(model, inputs))
    model.save_pretrained(tmp_path / "again")
    assert settings_in(tmp_path / "again")["base_model_name_or_path"] == str(tmp_path / "base")


def test_the_card_of_a_local_base_model_has_no_path_of_it(tmp_path):
    _, folder = adapter_for(TASKS["regression"], tmp_path)
    card = (folder / "README.md").read_text()
    assert "lay in a folder of the author's, `base`" in card and str(tmp_path / "base") not in card


def test_the_card_of_a_trainer_has_no_path_of_a_local_base_model(tmp_path):
    model, _ = adapter_for(TASKS["regression"], tmp_path)
    arguments = transformers.TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True)
    trainer = transformers.Trainer(model, arguments)
    trainer.save_model()
    trainer.create_model_card()
    assert str(tmp_path / "base") not in (tmp_path / "run" / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------- pipelines
def image() -> Any:
    pil = pytest.importorskip("PIL.Image")
    return pil.linear_gradient("L").convert("RGB").resize((32, 32))


def in_plain_types(found: Any) -> Any:
    """What a pipeline returns, with tensors as lists; images compare by themselves."""
    if isinstance(found, dict):
        return {name: in_plain_types(value) for name, value in found.items()}
    if isinstance(found, list):
        return [in_plain_types(value) for value in found]
    return found.tolist() if isinstance(found, Tensor) else found


def processor() -> Any:
    return transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.mark.parametrize("beside", ["adapter", "base"])
@pytest.mark.parametrize(
    ("name", "function"),
    [("single-label", torch.softmax), ("multi-label", torch.sigmoid), ("regression", None)],
)
def test_a_pipeline_reads_the_outputs_as_what_they_are(name, function, beside, tmp_path):
    picture = image()
    model, folder = adapter_for(TASKS[name], tmp_path)
    processor().save_pretrained(tmp_path / beside)
    logits = predict(model, processor()(picture, return_tensors="pt"))[0]
    expected = logits if function is None else function(logits, *([0] if function is torch.softmax else []))
    by_path = peft_e2vpt.pipeline("image-classification", folder)
    by_model = transformers.pipeline(
        "image-classification", model=peft_e2vpt.load(folder).get_base_model(), image_processor=str(tmp_path / beside)
    )
    for classify in (by_path, by_model):
        scores = {answer["label"]: answer["score"] for answer in classify(picture, top_k=9)}
        found = torch.tensor([scores[f"LABEL_{index}"] for index in range(len(expected))])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "task", "processor"),
    [
        ("segmentation", "image-segmentation", "SegformerImageProcessorPil"),
        ("detection", "object-detection", "YolosImageProcessorPil"),
        ("depth", "depth-estimation", "DPTImageProcessorPil"),
        ("features", "image-feature-extraction", "ViTImageProcessorPil"),
    ],
)
def test_pipelines_of_other_tasks_find_model_and_processor_by_the_path_of_the_adapter(name, task, processor, tmp_path):
    model, folder = adapter_for(TASKS[name], tmp_path)
    image_processor = getattr(transformers, processor)(size={"height": 32, "width": 32})
    image_processor.save_pretrained(folder)
    expected = transformers.pipeline(task, model=model.get_base_model(), image_processor=image_processor)(image())
    found = peft_e2vpt.pipeline(task, folder)(image())
    assert expected and in_plain_types(found) == in_plain_types(expected)


def test_transformers_pipelines_still_say_which_processors_they_take():
    assert all(hasattr(transformers.Pipeline, f"_load_{kind}") for kind in PROCESSORS)
    assert takes_processor(transformers.ImageClassificationPipeline, "image_processor") is True
    assert takes_processor(transformers.ImageClassificationPipeline, "tokenizer") is False


def test_a_pipeline_without_a_processor_says_what_to_do(tmp_path):
    _, folder = adapter_for(TASKS["regression"], tmp_path)
    with pytest.raises(ValueError, match=r"needs an image_processor, but none lies beside the adapter .*adapter or"):
        peft_e2vpt.pipeline("image-classification", folder)
