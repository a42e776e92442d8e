# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Training on the hidden states of a frozen prefix is training on the images, or it is refused."""

from __future__ import annotations

import copy
import gc
import io
import json
import logging
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import DPTConfig, DPTForSemanticSegmentation, SegformerConfig, SegformerForSemanticSegmentation

from peft_e2vpt import E2VPTConfig, PruneRewindCallback, RecipeCallback, cache_frozen_prefix, uncache_frozen_prefix
from peft_e2vpt.training.prefix import passing
from peft_e2vpt.training.prefix.storage import NOTE, VALUES
from tests.support import zoo
from tests.support import zoo_checks as checks
from tests.support.models import NUM_LABELS, VIT, build
from tests.support.training import HALF, Images, adapted, history_of, trainer_for


LAST = {"layers_to_transform": [1], "dtype": torch.float64}


class Items(Dataset):
    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def images(count: int = 6) -> Images:
    return Images(count, dtype=torch.float64)


def batch_of(dataset: Any) -> dict[str, Tensor]:
    items = [dataset[index] for index in range(len(dataset))]
    return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}


def outputs_of(model: nn.Module, dataset: Any) -> dict[str, Tensor]:
    """Logits, loss and the gradients of everything that trains, in training mode with equal random numbers."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    output = model(**batch_of(dataset))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **gradients}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def head_alone(name: str) -> nn.Module:
    model, _ = build(name, dtype=torch.float64)
    model.requires_grad_(False)
    model.get_submodule("classifier").requires_grad_(True)
    return model


def lora(**settings: Any) -> PeftModel:
    config = LoraConfig(r=2, layers_to_transform=[1], modules_to_save=["classifier"], **settings)
    model = get_peft_model(build("vit", dtype=torch.float64)[0], config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def biases_of_the_last_layer() -> nn.Module:
    model, _ = build("vit", dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias") and ("layers.1." in name or "classifier" in name)
    return model


def swin() -> PeftModel:
    return adapted("swin", target_modules=r".*layers\.1\.blocks.*", dtype=torch.float64)


MODELS = {
    "E2VPT, ViT": lambda: adapted("vit", **LAST),
    "E2VPT, DINOv2": lambda: adapted("dinov2", **LAST),
    "E2VPT, CLIP": lambda: adapted("clip", **LAST),
    "E2VPT, BEiT": lambda: adapted("beit_relative_bias", **LAST),
    "E2VPT, last stage of Swin": swin,
    "E2VPT, shared key-value prompts": lambda: adapted("vit", share_kv_prompts_across_layers=True, **LAST),
    "LoRA of queries": lambda: lora(target_modules=["q_proj", "v_proj"]),
    "LoRA of the MLP": lambda: lora(target_modules=["fc1"]),
    "biases": biases_of_the_last_layer,
    "head alone, ViT": lambda: head_alone("vit"),
    "head alone, DINOv2": lambda: head_alone("dinov2"),
    "head alone, Swin": lambda: head_alone("swin"),
}
THOROUGH = {"E2VPT, CLIP", "E2VPT, BEiT", "LoRA of the MLP", "head alone, DINOv2", "E2VPT, shared key-value prompts"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] if name in THOROUGH else []) for name in MODELS]
)
def test_logits_and_gradients_are_those_of_the_images(name):
    model, data = MODELS[name](), images()
    expected = outputs_of(model, data)
    cached = cache_frozen_prefix(model, data)
    assert batch_of(cached)["pixel_values"].shape[1:] != batch_of(data)["pixel_values"].shape[1:]
    assert_close(outputs_of(model, cached), expected)
    assert_close(outputs_of(model, data), expected)  # it still takes images


def test_a_head_alone_needs_no_more_than_its_input():
    cached = cache_frozen_prefix(head_alone("vit"), images())
    assert cached.hidden_states.shape == (6, VIT["hidden_size"])


def test_the_cached_layers_do_not_run():
    model = adapted("vit", **LAST)
    cached = cache_frozen_prefix(model, images())
    layers = model.get_base_model().vit.layers
    ran = []
    for index, layer in enumerate(layers):
        layer.layernorm_before.register_forward_hook(lambda *_, index=index: ran.append(index))
    outputs_of(model, cached)
    assert set(ran) == {1, 2}


def test_rotary_positions_stay_with_the_layers_that_train():
    model, inputs = checks.build("dinov3_vit", torch.float64)
    model.config.pos_embed_rescale = None  # drawn for each step otherwise
    for module in model.modules():
        if hasattr(module, "pos_embed_rescale") or "Rope" in type(module).__name__:
            module.config.pos_embed_rescale = None
    model = get_peft_model(model, checks.config(layers_to_transform=[1])).eval()
    expected = checks.gradients(model, inputs)
    cached = cache_frozen_prefix(model, Items([{"pixel_values": image} for image in inputs["pixel_values"]]))
    found = checks.gradients(model, {"pixel_values": cached.hidden_states})
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_a_dense_head_trains_on_the_cache_with_its_maps_of_labels():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [1, 2]}
    stages: dict[str, Any] = {"num_encoder_blocks": 2, "sr_ratios": [1, 1], "patch_sizes": [7, 3], "strides": [4, 2]}
    rates: dict[str, Any] = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    config = SegformerConfig(**sizes, **stages, **rates, mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3)
    model = SegformerForSemanticSegmentation(config).double().requires_grad_(False)
    model.decode_head.requires_grad_(True)
    data = Items([{"pixel_values": torch.randn(3, 32, 32).double(), "labels": torch.randint(3, (32, 32))}] * 2)
    with pytest.raises(ValueError, match="cannot begin behind a cache, before decode_head"):
        cache_frozen_prefix(model, data)  # the head takes the maps of all stages


def test_a_dense_head_behind_one_map():
    class Dense(nn.Module):
        main_input_name = "pixel_values"

        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 8, 1)).requires_grad_(False)
            self.head = nn.Conv2d(8, 3, 1)

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.head(self.backbone(pixel_values))
            logits = nn.functional.interpolate(logits, pixel_values.shape[-2:])
            loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
            return {"logits": logits, **loss}

    torch.manual_seed(0)
    model = Dense().double()
    items = [{"pixel_values": torch.randn(3, 32, 32).double(), "labels": torch.randint(3, (32, 32))} for _ in range(3)]
    cached = cache_frozen_prefix(model, Items(items))
    assert cached.hidden_states.shape == (3, 8, 8, 8) and cached.others["labels"].shape == (3, 32, 32)
    images_and_cache = [{**batch_of(data)} for data in (Items(items), cached)]
    one, other = (torch.autograd.grad(model(**batch)["loss"], model.head.weight) for batch in images_and_cache)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_half_precision_hidden_states_keep_their_type():
    model = adapted("vit", layers_to_transform=[1], dtype=torch.bfloat16)
    cached = cache_frozen_prefix(model, Images(6, dtype=torch.bfloat16))
    assert cached.hidden_states.dtype == torch.bfloat16
    model.eval()
    expected = model(**batch_of(Images(6, dtype=torch.bfloat16))).logits
    torch.testing.assert_close(model(**batch_of(cached)).logits, expected, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------------------- in a training
def losses_of(trainer: Any) -> list[list[float]]:
    kept = ("loss", "grad_norm", "eval_loss", "pruning_prompts_kept")
    return [[entry[key] for key in kept if key in entry] for entry in history_of(trainer)]


@pytest.mark.training
@pytest.mark.parametrize("with_pruning", [False, True])
def test_a_training_has_the_losses_of_one_on_images(tmp_path, with_pruning):
    found = []
    for cached in (False, True):
        model = adapted("vit", **LAST)
        train, validation = Images(dtype=torch.float64), Images(9, seed=1, dtype=torch.float64)
        if cached:
            train = cache_frozen_prefix(model, train)
            validation = cache_frozen_prefix(model, validation) if with_pruning else validation
        trainer = trainer_for(
            tmp_path / str(cached),
            PruneRewindCallback(**HALF) if with_pruning else None,
            model,
            train_dataset=train,
            eval_dataset=validation,
            callbacks=(RecipeCallback(),) if with_pruning else (),
            eval_strategy="epoch",
        )
        trainer.train()
        found.append((losses_of(trainer), {n: p.detach().clone() for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints_leave_gradients_as_they_are(use_reentrant):
    model, data = adapted("vit", **LAST), images()
    expected = outputs_of(model, data)
    cached = cache_frozen_prefix(model, data)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_close(outputs_of(model, cached), expected)


def test_caching_leaves_no_trace():
    model, data = adapted("vit", **LAST), images()
    model.train()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    cache_frozen_prefix(model, data)
    assert torch.equal(torch.get_rng_state(), random) and [m.training for m in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_threads_with_images_and_with_hidden_states_do_not_see_each_other():
    model, data = adapted("vit", **LAST).eval(), images()
    cached = cache_frozen_prefix(model, data)
    batches = [batch_of(data), batch_of(cached)]
    with torch.no_grad():
        expected = model(**batches[0]).logits

        def run(index: int) -> Tensor:
            with torch.no_grad():
                return model(**batches[index % 2]).logits

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(run, range(24)))
    torch.testing.assert_close(found, [expected] * 24, rtol=1e-11, atol=1e-12)


def test_a_failed_pass_leaves_nothing():
    model, data = adapted("vit", **LAST).eval(), images()
    expected = model(**batch_of(data)).logits
    cached = batch_of(cache_frozen_prefix(model, data))
    with pytest.raises(ValueError):
        model(pixel_values=cached["pixel_values"], labels=torch.zeros(5, dtype=torch.long))
    assert not passing._passes.running and not passing._running.any
    assert torch.equal(model(**batch_of(data)).logits, expected)


def test_images_in_the_middle_of_a_pass_with_hidden_states_run_from_the_start():
    model, data = adapted("vit", **LAST).eval(), images()
    base = model.get_base_model()
    expected = model(**batch_of(data)).logits
    cached = batch_of(cache_frozen_prefix(model, data))
    seen = []

    def evaluate(*_: Any) -> None:
        if not seen:
            seen.append(None)
            seen[0] = model(**batch_of(data)).logits

    base.vit.layers[1].register_forward_hook(evaluate)
    torch.testing.assert_close(model(**cached).logits, expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(seen[0], expected)


# ---------------------------------------------------------------------------------- copies, saving, undoing, unloading
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_take_hidden_states_alone(copied):
    model, data = adapted("vit", **LAST), images()
    cached = cache_frozen_prefix(model, data)
    expected = outputs_of(model, data)
    twin = copied(model)
    uncache_frozen_prefix(model)
    assert_close(outputs_of(twin, cached), expected)
    assert_close(outputs_of(twin, data), expected)
    assert_close(outputs_of(model, data), expected)


def test_what_is_saved_does_not_change(tmp_path):
    model = adapted("vit", **LAST)
    model.save_pretrained(tmp_path / "before")
    cache_frozen_prefix(model, images())
    model.save_pretrained(tmp_path / "after")
    torch.save(model, io.BytesIO())
    name = "adapter_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_unloaded_and_merged_models_go_on(tmp_path):
    data = images()
    model = adapted("vit", **LAST)
    cached = cache_frozen_prefix(model, data)
    base = model.unload()
    expected = build("vit", dtype=torch.float64)[0].eval()(**batch_of(data)).logits
    with pytest.raises(RuntimeError, match="no longer those of the model: vit.embeddings.cls_token trains"):
        base(**batch_of(cached))  # as it did before the adapter
    for dataset in (data, cached):
        with torch.no_grad():
            torch.testing.assert_close(base.eval()(**batch_of(dataset)).logits, expected, rtol=1e-11, atol=1e-12)
    model = lora(target_modules=["q_proj"])
    cached = cache_frozen_prefix(model, data)
    expected = model.eval()(**batch_of(data)).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch_of(cached)).logits, expected, rtol=1e-9, atol=1e-10)


def test_uncaching_leaves_the_modules_as_they_were():
    model = adapted("vit", **LAST)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    cached = cache_frozen_prefix(model, images())
    uncache_frozen_prefix(model)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(ValueError):
        model(**batch_of(cached))
    uncache_frozen_prefix(model)


def test_memory_is_freed_with_the_model():
    model = adapted("vit", **LAST)
    cache_frozen_prefix(model, images())
    weight = weakref.ref(model.get_base_model().vit.layers[0].mlp.fc1.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------------------- on disk
def test_a_folder_is_read_again_by_a_later_run(tmp_path, monkeypatch, caplog):
    data = images()
    first = cache_frozen_prefix(adapted("vit", **LAST), data, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [NOTE, VALUES, "other_inputs.pt"]
    monkeypatch.setattr("peft_e2vpt.training.prefix.caching._fill", lambda *_: pytest.fail("computed again"))
    model = adapted("vit", **LAST)
    with caplog.at_level(logging.INFO, logger="peft_e2vpt"):
        second = cache_frozen_prefix(model, data, folder=tmp_path)
    assert_close(batch_of(second), batch_of(first))
    assert_close(outputs_of(model, second), outputs_of(model, data))


def other_weights(data: Images) -> tuple[nn.Module, Any]:
    model = adapted("vit", **LAST)
    with torch.no_grad():
        model.get_base_model().vit.layers[0].mlp.fc1.bias.add_(1e-3)
    return model, data


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (other_weights, "weights"),
        (lambda data: (adapted("vit", **LAST), Images(6, seed=1, dtype=torch.float64)), "fingerprint of images"),
        (lambda data: (adapted("vit", **LAST), images(7)), "images, fingerprint of images"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path, other, what):
    cache_frozen_prefix(adapted("vit", **LAST), images(), folder=tmp_path)
    model, data = other(images())
    with pytest.raises(ValueError, match=rf"other {what}\). Pass another folder, or delete this one"):
        cache_frozen_prefix(model, data, folder=tmp_path)


def test_an_interrupted_write_does_not_look_complete(tmp_path):
    class Broken(Images):
        def __getitem__(self, index: int) -> dict[str, Any]:
            self.reads = getattr(self, "reads", 0) + 1
            if self.reads > 90:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    model = adapted("vit", **LAST)
    with pytest.raises(KeyboardInterrupt):
        cache_frozen_prefix(model, Broken(40, dtype=torch.float64), folder=tmp_path, batch_size=4)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError):  # and the model takes images alone
        model(pixel_values=torch.zeros(1, 17, 32).double())


@pytest.mark.parametrize("damage", ["note", "values"])
def test_a_damaged_folder_is_refused(tmp_path, damage):
    cache_frozen_prefix(adapted("vit", **LAST), images(), folder=tmp_path)
    if damage == "note":
        (tmp_path / NOTE).write_text(json.dumps({})[:1])
    else:
        (tmp_path / VALUES).write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged|of 26,112 bytes"):
        cache_frozen_prefix(adapted("vit", **LAST), images(), folder=tmp_path)


# ---------------------------------------------------------------------------------------------------- refused, and why
class Mirrored(Images):
    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "pixel_values": item["pixel_values"].flip(-1)} if torch.rand(()) < 0.5 else item


class OtherSizes(Images):
    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "pixel_values": item["pixel_values"][:, : 32 - 8 * (index % 2)]}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


def with_dropout(**settings: Any) -> PeftModel:
    model, _ = build("vit")
    for module in model.vit.layers[0].modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
        for name, value in settings.items():
            if hasattr(module, name):
                setattr(module, name, value)
    return model


def prompts_on(model: nn.Module, layers: list[int] | None = None) -> PeftModel:
    return get_peft_model(model, E2VPTConfig(num_visual_prompts=4, num_segments=8, layers_to_transform=layers or [1]))


def with_random_attention() -> PeftModel:
    model, _ = build("vit")
    for name in ("dropout_prob", "attention_dropout"):
        if hasattr(model.vit.layers[0].attention, name):
            setattr(model.vit.layers[0].attention, name, 0.1)
    return prompts_on(model)


def with_batch_norm() -> nn.Module:
    head = nn.Linear(8, NUM_LABELS)
    body = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(body.requires_grad_(False), head)


def reading_all_layers() -> PeftModel:
    sizes = {key: VIT[key] for key in ("hidden_size", "num_attention_heads", "image_size", "patch_size")}
    necks = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}
    config = DPTConfig(**sizes, num_hidden_layers=4, intermediate_size=32, backbone_out_indices=[0, 1, 2, 3], **necks)
    return prompts_on(DPTForSemanticSegmentation(config), [3])


class LikeImages(nn.Module):
    """A backbone whose maps have the channels of images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 4, 4).requires_grad_(False)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.body(pixel_values))


def frozen() -> nn.Module:
    return build("vit")[0].requires_grad_(False)


def two_adapters() -> PeftModel:
    model = adapted("vit", adapter_name="all")
    model.add_adapter("last", E2VPTConfig(num_visual_prompts=4, num_segments=8, layers_to_transform=[1]))
    model.set_adapter("last")
    return model


REFUSED = {
    "augmentation": (
        lambda: adapted("vit", layers_to_transform=[1]),
        Mirrored(),
        "An image of the dataset is another",
    ),
    "sizes": (lambda: adapted("vit", layers_to_transform=[1]), OtherSizes(), "Images of different sizes"),
    "stream": (lambda: adapted("vit", layers_to_transform=[1]), Stream(), "got the stream Stream"),
    "empty": (lambda: adapted("vit", layers_to_transform=[1]), Images(0), "without images"),
    "dropout": (
        lambda: prompts_on(with_dropout()),
        Images(),
        r"drop values at random while training, such as .* \(0.1",
    ),
    "attention dropout": (with_random_attention, Images(), "is random while training"),
    "batch norm": (with_batch_norm, Items([{"input": torch.randn(3, 32, 32)}] * 3), "statistics of each batch"),
    "first layer trains": (lambda: adapted("vit"), Images(), "Nothing worth caching runs before vit.layers.0"),
    "embeddings train": (lambda: build("vit")[0], Images(), "Nothing worth caching"),
    "nothing trains": (frozen, Images(), "Nothing of the model trains"),
    "all layers are read": (
        reading_all_layers,
        Items([{"pixel_values": torch.randn(3, 32, 32)}] * 2),
        "it reads what",
    ),
    "maps like images": (
        LikeImages,
        Items([{"pixel_values": torch.randn(3, 32, 32)}] * 2),
        "could be taken for images",
    ),
    "another adapter": (two_adapters, Images(), "it has layers of an adapter"),
    "no images": (
        lambda: adapted("vit", layers_to_transform=[1]),
        Items([{"image": 1}]),
        "hold no tensor 'pixel_values'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_or_useless_is_refused(name):
    make, data, message = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=message):
        cache_frozen_prefix(model, data)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_depends_on_another_input_of_few_images_is_refused():
    class Mask(nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            return mask[:, None, None].double()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask, self.body, self.head = Mask(), nn.Conv2d(3, 8, 8, 8).requires_grad_(False), nn.Conv2d(8, 2, 1)

        def forward(self, pixel_values: Tensor, mask: Tensor) -> Tensor:
            mask = self.mask(mask)
            return self.head(self.body(pixel_values)) * mask.mean((1, 2, 3))[:, None, None, None]

    items = [{"pixel_values": torch.randn(3, 32, 32).double(), "mask": torch.ones(4)} for _ in range(70)]
    model = Masked().double()
    assert cache_frozen_prefix(model, Items(items)).hidden_states.shape == (70, 8, 4, 4)
    uncache_frozen_prefix(model)
    items[11]["mask"] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="mask gives more than hidden states that depends on the image"):
        cache_frozen_prefix(model, Items(items))


def test_a_batch_size_is_at_least_1():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        cache_frozen_prefix(adapted("vit", layers_to_transform=[1]), Images(), batch_size=0)


def load(model: nn.Module) -> None:
    layer = model.get_base_model().vit.layers[0]
    layer.load_state_dict({name: tensor + 1 for name, tensor in layer.state_dict().items()})


def train(model: nn.Module) -> None:
    model.get_base_model().vit.layers[0].mlp.requires_grad_(True)


def adapt(model: nn.Module) -> None:
    model.add_adapter("all", E2VPTConfig(num_visual_prompts=4, num_segments=8))


@pytest.mark.parametrize(
    ("change", "reason"), [(load, "weights are others"), (train, "mlp.* trains"), (adapt, "layers of an adapter")]
)
def test_a_prefix_that_has_changed_is_noticed(change, reason):
    model, data = adapted("vit", **LAST), images()
    cached = cache_frozen_prefix(model, data)
    change(model)
    with pytest.raises(RuntimeError, match=f"no longer those of the model: .*{reason}"):
        model(**batch_of(cached))
    assert not passing._passes.running and not passing._running.any
    model(**batch_of(data))


def test_the_same_weights_loaded_again_are_no_change():
    model, data = adapted("vit", **LAST), images()
    cached = cache_frozen_prefix(model, data)
    model.load_state_dict(model.state_dict())
    assert_close(outputs_of(model, cached), outputs_of(model, data))


def test_a_second_dataset_has_images_of_the_same_size():
    model = adapted("vit", **LAST)
    cache_frozen_prefix(model, images())
    small = Items([{"pixel_values": torch.randn(3, 24, 32).double()}] * 2)
    with pytest.raises(ValueError, match=r"a cache already, for images of shape \[3, 32, 32\]"):
        cache_frozen_prefix(model, small)


def test_a_second_dataset_is_refused_where_the_first_one_is_stale():
    model, data = adapted("vit", **LAST), images()
    cache_frozen_prefix(model, data)
    load(model)
    with pytest.raises(ValueError, match="a cache already, which does not fit any more: its weights are others now"):
        cache_frozen_prefix(model, data)


def test_a_search_that_is_interrupted_leaves_nothing(monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model = adapted("vit", **LAST)
    monkeypatch.setattr("peft_e2vpt.training.prefix.proof.Proof.why_wrong", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache_frozen_prefix(model, images())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.compile
def test_a_compiled_model_takes_images_in_one_graph_and_hidden_states_in_several():
    model, data = adapted("vit", **LAST).eval(), images()
    cached, expected = cache_frozen_prefix(model, data), model(**batch_of(data)).logits
    one_graph = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(one_graph(**batch_of(data)).logits, expected, rtol=1e-11, atol=1e-12)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for dataset in (data, cached, data):
        torch.testing.assert_close(compiled(**batch_of(dataset)).logits, expected, rtol=1e-11, atol=1e-12)


# ------------------------------------------------------------------------------------------------- every architecture
CACHED = 71  # of those with attention; all others refuse


@pytest.mark.slow
def test_every_architecture_is_cached_exactly_or_refused():
    """Prompts in the last layer; float64, gradients included."""
    cached, refused = [], []
    for name in zoo.names(attention=True):
        if zoo.is_timm(name) or checks.missing(name):
            continue
        model, inputs = checks.adapt(name, torch.float64)
        last = max(int(path) for path in model.get_base_model().e2vpt if path.isdigit())
        try:
            model, inputs = checks.adapt(name, torch.float64, layers_to_transform=[last])
        except ValueError:
            continue  # a model whose layers have no numbers
        sizes = {len(value) for value in inputs.values()}
        if len(sizes) > 1:
            continue  # packed sequences have no entry an image
        items = [{key: value[index] for key, value in inputs.items()} for index in range(sizes.pop())]
        expected = checks.gradients(model, inputs)
        try:
            data = cache_frozen_prefix(model, Items(items))
        except ValueError:
            refused.append(name)
            continue
        found = checks.gradients(model, {**inputs, data.name: data.hidden_states})
        worst = max(float((found[key] - expected[key]).abs().max()) for key in expected)
        scale = max(float(gradient.abs().max()) for gradient in expected.values())
        assert worst <= (1e-5 if name in checks.IN_FLOAT32 else 1e-10) * scale, name
        cached.append(name)
    print(f"cached: {', '.join(cached)}\nrefused: {', '.join(refused)}")
    assert len(cached) >= CACHED
