# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What trains besides prompts: the head of the task, wherever it lies, as a copy of the adapter's own, and saved."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_e2vpt import E2VPTConfig
from tests.support import zoo
from tests.support.adapted import trainable
from tests.support.zoo import randomise_
from tests.support.zoo_marks import parameters


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VIT: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
FOUR_LAYERS = {**VIT, "num_hidden_layers": 4}
SWIN: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 2, 2],
    "window_size": 4,
}
DETR: dict[str, Any] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
}


def vit(num_labels: int = 3, **settings: Any) -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=num_labels, **settings))


def vit_backbone() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False)


def swin_config(first: int) -> Any:
    return transformers.SwinConfig(**SWIN, out_features=[f"stage{stage}" for stage in range(first, 5)])


def dpt(task: str) -> Any:
    config = transformers.DPTConfig(
        **FOUR_LAYERS,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16] * 4,
        fusion_hidden_size=16,
        num_labels=3,
    )
    return getattr(transformers, f"DPTFor{task}")(config)


def glpn() -> Any:
    config = transformers.GLPNConfig(
        num_encoder_blocks=4,
        depths=[1] * 4,
        hidden_sizes=[8, 16, 16, 32],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=8,
    )
    return transformers.GLPNForDepthEstimation(config)


def segformer() -> Any:
    config = transformers.SegformerConfig(
        depths=[1] * 4,
        hidden_sizes=[8, 16, 16, 32],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        num_labels=3,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def upernet() -> Any:
    config = transformers.UperNetConfig(
        backbone_config=swin_config(1), hidden_size=16, auxiliary_channels=8, num_labels=3
    )
    return transformers.UperNetForSemanticSegmentation(config)


def yolos(num_labels: int = 4) -> Any:
    config = transformers.YolosConfig(**{**VIT, "image_size": [32, 32]}, num_detection_tokens=3, num_labels=num_labels)
    return transformers.YolosForObjectDetection(config)


def detr(kind: str = "Detr", num_labels: int = 4, **settings: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        **DETR, backbone_config=swin_config(2), num_labels=num_labels, **settings
    )
    return getattr(transformers, f"{kind}ForObjectDetection")(config)


def deformable_detr(num_labels: int = 4) -> Any:
    """Every layer of its decoder has a class head, and weights are tied between decoder and model."""
    return detr(
        "DeformableDetr",
        num_labels,
        num_feature_levels=4,
        encoder_n_points=2,
        decoder_n_points=2,
        with_box_refine=True,
        two_stage=True,
        two_stage_num_proposals=5,
    )


def git() -> Any:
    config = transformers.GitConfig(vision_config=VIT, **SIZES, vocab_size=60, max_position_embeddings=32)
    return transformers.GitForCausalLM(config)


class Own(nn.Module):
    """A user's classifier: a backbone and a linear layer."""

    def __init__(self, backbone: nn.Module | None = None, name: str = "fc") -> None:
        super().__init__()
        self.backbone = backbone or vit_backbone()
        self.name = name
        self.add_module(name, nn.Linear(32, 3))

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden: Tensor = self.backbone(pixel_values).last_hidden_state[:, 0]
        return self.get_submodule(self.name)(hidden)  # type: ignore[no-any-return]


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"kind": nn.Linear(32, 3), "age": nn.Linear(32, 1)})
        self.backbone = vit_backbone()

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.backbone(pixel_values).last_hidden_state[:, 0]
        return torch.cat([head(hidden) for head in self.heads.values()], dim=-1)


class Classifier(transformers.PreTrainedModel):
    """A model of transformers' kind whose name does not tell its task."""

    config_class = transformers.ViTConfig
    config: transformers.ViTConfig

    def __init__(self, config: transformers.ViTConfig) -> None:
        super().__init__(config)
        self.vit = transformers.ViTModel(config, add_pooling_layer=False)
        self.layers = nn.ModuleList([nn.Linear(32, 16), nn.Linear(16, 3)])
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.vit(pixel_values).last_hidden_state[:, 0]
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Around(nn.Module):
    """A user's module around a whole model, as Lightning has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Any:
        return self.model(pixel_values)


class Tower(nn.Module):
    """An image encoder beside a text encoder, as open_clip has them: parameters where others have layers."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = vit_backbone()
        self.transformer = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.token_embedding = nn.Embedding(60, 32)
        self.ln_final = nn.LayerNorm(32)
        self.proj = nn.Parameter(torch.randn(32, 16))
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.visual(pixel_values).last_hidden_state[:, 0] @ self.proj * self.logit_scale  # type: ignore


class VisionTransformer(nn.Module):
    """As a model of timm says which layer is its classifier."""

    default_cfg = {"classifier": ("head", "head_dist")}

    def __init__(self) -> None:
        super().__init__()
        self.blocks = vit_backbone()
        self.fc_norm = nn.LayerNorm(32)
        self.head, self.head_dist = nn.Linear(32, 3), nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.fc_norm(self.blocks(pixel_values).last_hidden_state.mean(1)))  # type: ignore


HEADS: dict[str, tuple[Callable[[], Any], list[str], int]] = {  # how to build it, its heads, the size of its images
    "ViT": (vit, ["classifier"], 32),
    "DPT, segmentation": (lambda: dpt("SemanticSegmentation"), ["neck", "head.head", "auxiliary_head"], 32),
    "DPT, depth": (lambda: dpt("DepthEstimation"), ["neck", "head.head"], 32),
    "GLPN": (glpn, ["decoder", "head.head"], 64),
    "SegFormer": (segformer, ["decode_head"], 64),
    "UperNet": (upernet, ["decode_head", "auxiliary_head"], 64),
    "YOLOS": (yolos, ["class_labels_classifier", "bbox_predictor"], 32),
    "DETR": (detr, ["class_labels_classifier", "bbox_predictor"], 64),
    "Deformable DETR": (
        deformable_detr,
        [
            f"{where}{kind}_embed.{layer}"
            for where, kinds in (("model.decoder.", ("bbox", "class")), ("", ("class", "bbox")))
            for kind in kinds
            for layer in range(3)
        ],
        64,
    ),
    "own": (Own, ["fc"], 32),
    "own, ambiguous": (lambda: Own(name="q_proj"), ["q_proj"], 32),
    "own, around a task model": (lambda: Around(vit()), ["model.classifier"], 32),
    "own, module dict": (HeadFirst, ["heads.kind", "heads.age"], 32),
    "own, module list": (lambda: Classifier(transformers.ViTConfig(**VIT)), ["layers.0", "layers.1"], 32),
    "own, two towers": (Tower, [], 32),
    "timm's classifier": (VisionTransformer, ["head"], 32),
    "timm inside of an own model": (lambda: Around(VisionTransformer()), ["model.head"], 32),
    "bare": (vit_backbone, [], 32),
    "bare, with For in its name": (
        lambda: transformers.MaskFormerModel(transformers.MaskFormerConfig(backbone_config=swin_config(1))),
        [],
        64,
    ),
}
RESTING = {  # what the models themselves do not use without a loss; the first layer of DPT's has no residual at all
    "UperNet": "auxiliary_head",
    "DPT, segmentation": r"auxiliary_head|fusion_stage.layers.0.residual_layer1",
    "DPT, depth": r"fusion_stage.layers.0.residual_layer1",
    "Deformable DETR": r"_embed.[01]|model.decoder",  # inner layers
}
RESTING_IN_THE_ZOO = r"auxiliary_head|fusion_stage.layers.0.residual_layer1"
models = pytest.mark.parametrize("name", HEADS)


def build(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = HEADS[name][0]().eval()
    randomise_(model, seed)
    return model


def images(name: str) -> Tensor:
    return torch.randn(2, 3, HEADS[name][2], HEADS[name][2], generator=torch.Generator().manual_seed(3))


def wrap(model: Any, **settings: Any) -> PeftModel:
    return get_peft_model(model, E2VPTConfig(num_segments=1, seed=0, visual_prompt_dropout=0.0, **settings))


@torch.no_grad()
def predict(model: nn.Module, name: str) -> Tensor:
    return outputs(model, images(name))


def outputs(model: nn.Module, pixels: Tensor) -> Tensor:
    """All that a model puts out, in one row."""
    return everything(model(pixel_values=pixels))


def everything(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.float().flatten()
    parts = [part for part in (output.values() if isinstance(output, dict) else output) if part is not None]
    return torch.cat([everything(part) for part in parts])


def heads_of(model: PeftModel) -> list[str]:
    return model.peft_config["default"].modules_to_save


# ------------------------------------------------------------------------------------------------------- what it finds
@models
def test_the_heads_are_found_and_only_they_and_the_prompts_train(name: str) -> None:
    model = wrap(build(name))
    assert heads_of(model) == HEADS[name][1]
    base = model.get_base_model()
    wrappers = [path for path, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert sorted(wrappers) == sorted(HEADS[name][1])
    prefixes = ("e2vpt.", *(f"{path}.modules_to_save.default." for path in wrappers))
    names = [key for key, parameter in base.named_parameters() if parameter.requires_grad]
    assert all(key.startswith(prefixes) for key in names)


@models
def test_a_step_moves_every_trained_tensor(name: str) -> None:
    model = wrap(build(name))
    before = {key: parameter.detach().clone() for key, parameter in trainable(model)}
    optimizer = torch.optim.SGD([parameter for _, parameter in trainable(model)], 1.0)
    outputs(model, images(name)).square().sum().backward()
    optimizer.step()
    still = [key for key, parameter in trainable(model) if torch.equal(parameter, before[key])]
    assert [key for key in still if not re.search(RESTING.get(name, "$^"), key)] == []


@models
def test_a_saved_adapter_gives_the_same_on_a_base_with_another_head(name: str, tmp_path: Path) -> None:
    model = wrap(build(name))
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    expected = predict(model, name)
    model.save_pretrained(tmp_path)
    base = build(name)
    with torch.no_grad():
        for path in HEADS[name][1]:
            for parameter in base.get_submodule(path).parameters():
                parameter.normal_()
    again = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(predict(again.eval(), name), expected)
    values = dict(again.named_parameters())
    assert all(torch.equal(parameter, values[key]) for key, parameter in trainable(model))
    assert heads_of(again) == HEADS[name][1]


@models
def test_unload_gives_the_base_model_back(name: str) -> None:
    base = build(name)
    expected, modules = predict(base, name), [(path, id(m)) for path, m in base.named_modules()]
    model = wrap(base)
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.add_(1.0)
    assert torch.equal(predict(model.unload(), name), expected)
    assert [(path, id(m)) for path, m in base.named_modules()] == modules


@pytest.mark.parametrize(
    "name", parameters([spec.name for spec in zoo.ZOO if spec.attention and re.search("For[A-Z]", spec.model)])
)
def test_a_tiny_model_of_the_zoo_is_loaded_with_its_head(name: str, tmp_path: Path) -> None:
    if reason := zoo.missing(name):
        pytest.skip(f"not in this environment: {reason}")
    base, inputs = zoo.build(name)
    model = wrap(base)
    assert heads_of(model), "a task model without a head"
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.add_(0.1 * torch.randn(parameter.shape))
        torch.manual_seed(0)  # ViLT permutes patches
        expected = zoo.output_of(model.eval()(**inputs))
        model.save_pretrained(tmp_path)
        base, _ = zoo.build(name)
        for path in heads_of(model):
            for parameter in base.get_submodule(path).parameters():
                parameter.normal_()
        again = PeftModel.from_pretrained(base, tmp_path).eval()
        torch.manual_seed(0)
        torch.testing.assert_close(zoo.output_of(again(**inputs)), expected, atol=1e-4, rtol=1e-4)
    values = dict(again.named_parameters())
    assert all(torch.equal(parameter, values[key]) for key, parameter in trainable(model))
    everything(model(**inputs)).square().sum().backward()
    still = [key for key, parameter in trainable(model) if parameter.grad is None or not parameter.grad.any()]
    assert [key for key in still if not re.search(RESTING_IN_THE_ZOO, key)] == []


def test_output_embeddings_of_a_language_model_stay_frozen() -> None:
    model = wrap(git())
    assert heads_of(model) == []
    assert all(".e2vpt." in key for key, _ in trainable(model))


def test_layers_that_share_weights_share_them_in_the_adapter() -> None:
    model = wrap(deformable_detr()).get_base_model()
    for layer in range(3):
        outer = model.bbox_embed[layer].modules_to_save["default"].layers[0].weight
        assert outer is model.model.decoder.bbox_embed[layer].modules_to_save["default"].layers[0].weight
        assert outer is not model.bbox_embed[layer].original_module.layers[0].weight


def test_a_module_used_in_two_places_has_one_copy() -> None:
    model = Own()
    model.alias = model.fc
    adapted = wrap(model).get_base_model()
    assert adapted.alias is adapted.fc and isinstance(adapted.fc, ModulesToSaveWrapper)
    assert wrap(Own()).unload().fc.__class__ is nn.Linear


# -------------------------------------------------------------------------------------- what a checkpoint did not have
def test_a_class_head_drawn_anew_inside_a_decoder_trains(tmp_path: Path) -> None:
    deformable_detr().save_pretrained(tmp_path)
    model = transformers.DeformableDetrForObjectDetection.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    assert "model.decoder.class_embed.2" in heads_of(wrap(model))


def test_new_parts_between_encoder_and_decoder_train(tmp_path: Path) -> None:
    vit_backbone().save_pretrained(tmp_path / "vit")
    text = transformers.BertConfig(
        **{**SIZES, "hidden_size": 16}, vocab_size=50, is_decoder=True, add_cross_attention=False
    )
    transformers.BertLMHeadModel(text).save_pretrained(tmp_path / "bert")
    model = transformers.VisionEncoderDecoderModel.from_encoder_decoder_pretrained(
        str(tmp_path / "vit"), str(tmp_path / "bert")
    )
    attentions = [f"decoder.bert.encoder.layer.{layer}.crossattention" for layer in range(2)]
    assert heads_of(wrap(model)) == [*attentions, "enc_to_dec_proj"]


def test_a_pooler_that_the_checkpoint_lacks_is_no_head(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    assert heads_of(wrap(transformers.ViTModel.from_pretrained(tmp_path))) == []


# --------------------------------------------------------------------------------------------- what is told, and asked
def test_a_model_in_which_no_head_is_known_is_told_with_candidates() -> None:
    with pytest.warns(UserWarning, match=r"No head was found in Tower.*modules_to_save=\['transformer'\]"):
        assert heads_of(wrap(Tower())) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        wrap(Tower(), modules_to_save=[])
        wrap(vit_backbone())


def test_a_name_is_the_module_of_that_path_even_where_others_end_in_it() -> None:
    model = wrap(Own(name="q_proj"), modules_to_save=["q_proj"]).get_base_model()
    wrappers = [path for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert wrappers == ["q_proj"]


def test_a_name_that_several_modules_end_in_is_refused_with_their_paths() -> None:
    with pytest.raises(
        ValueError, match=r"'attention', which is the ending of 2 modules: vit.layers.0.attention, vit"
    ):
        wrap(vit(), modules_to_save=["attention"])


def test_a_name_inside_of_another_is_trained_once() -> None:
    assert heads_of(wrap(segformer(), modules_to_save=["decode_head.classifier", "decode_head"])) == ["decode_head"]


def test_a_config_is_not_written_into_and_serves_a_second_model() -> None:
    config = E2VPTConfig(num_segments=1)
    assert heads_of(get_peft_model(vit(), config)) == ["classifier"]
    assert config.modules_to_save is None
    assert heads_of(get_peft_model(yolos(), config)) == ["class_labels_classifier", "bbox_predictor"]
    text = E2VPTConfig(num_segments=1, task_type="SEQ_CLS")
    assert heads_of(get_peft_model(vit(), text)) == ["classifier"] and text.modules_to_save is None


# -------------------------------------------------------------------------------------------------- one more adapter
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
@pytest.mark.parametrize("name", ["ViT", "DPT, depth", "own"])
def test_a_second_adapter_on_the_same_base_trains_a_head_of_its_own(name: str) -> None:
    base = build(name)
    get_peft_model(base, E2VPTConfig(num_segments=1), adapter_name="f0")
    model = get_peft_model(base, E2VPTConfig(num_segments=1), adapter_name="f1")
    assert model.peft_config["f1"].modules_to_save == HEADS[name][1]
    names = [key for key, _ in trainable(model)]
    assert names and all(".modules_to_save.f1." in key or key.endswith(".f1") for key in names)
    outputs(model, images(name)).square().sum().backward()
    still = [key for key, parameter in trainable(model) if parameter.grad is None or not parameter.grad.any()]
    assert [key for key in still if not re.search(RESTING.get(name, "$^"), key)] == []


def test_an_adapter_that_is_added_trains_its_head_once_it_is_active() -> None:
    model = wrap(vit())
    model.add_adapter("b", E2VPTConfig(num_segments=1))
    assert all("default" in key for key, _ in trainable(model))
    model.set_adapter("b")
    assert {key.split(".")[4] for key, _ in trainable(model) if "classifier" in key} == {"b"}
