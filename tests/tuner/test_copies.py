# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A copy or an average of a model, whoever made it and by whatever way, is equal to its own reload."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

from peft_e2vpt import apply_gates, score_prompts
from peft_e2vpt.pruning.ranking import current_gates
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support import zoo, zoo_checks
from tests.support.adapted import SHALLOW, adapt, config_of, layers_of, predict, prune, trainable, trained
from tests.support.models import build
from tests.support.zoo_marks import ONE_OF_EACH_KIND, parameters


DECAY = 0.999


# ---------------------------------------------------------------------------------------------- how people copy models
def deep_copied(model: nn.Module, source: nn.Module) -> Any:
    return copy.deepcopy(source)


def pickled(model: nn.Module, source: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(source))


def saved_whole(model: nn.Module, source: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(source, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def loaded(model: nn.Module, source: nn.Module) -> Any:
    model.load_state_dict(source.state_dict())
    return model


def assigned(model: nn.Module, source: nn.Module) -> Any:
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def averaged(average: AveragedModel, source: nn.Module) -> Any:
    for _ in range(3):
        average.update_parameters(source)
    return average.module


def swa(model: nn.Module, source: nn.Module) -> Any:
    return averaged(AveragedModel(model), source)


def swa_with_buffers(model: nn.Module, source: nn.Module) -> Any:
    return averaged(AveragedModel(model, use_buffers=True), source)


def ema(model: nn.Module, source: nn.Module) -> Any:
    return averaged(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY)), source)


def ema_with_buffers(model: nn.Module, source: nn.Module) -> Any:
    """Also the averages of Lightning's `WeightAveraging`."""
    return averaged(AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY), use_buffers=True), source)


@torch.no_grad()
def as_timm_v2(model: nn.Module, source: nn.Module) -> Any:
    average = copy.deepcopy(model)
    for _ in range(3):
        for ours, theirs in zip(average.state_dict().values(), source.state_dict().values(), strict=True):
            ours.copy_(DECAY * ours + (1.0 - DECAY) * theirs)
    return average


@torch.no_grad()
def as_timm_v3(model: nn.Module, source: nn.Module) -> Any:
    average = copy.deepcopy(model)
    for _ in range(3):
        for ours, theirs in zip(average.state_dict().values(), source.state_dict().values(), strict=True):
            if ours.is_floating_point():
                ours.lerp_(theirs, weight=1.0 - DECAY)
            else:
                ours.copy_(theirs)
    return average


@torch.no_grad()
def as_diffusers(model: nn.Module, source: nn.Module) -> Any:
    """Parameters alone, kept beside the model and written back through `.data`."""
    shadow = [parameter.clone().detach() for parameter in model.parameters()]
    for ours, theirs in zip(shadow, source.parameters(), strict=True):
        ours.sub_((1.0 - DECAY) * (ours - theirs))
    for parameter, ours in zip(model.parameters(), shadow, strict=True):
        parameter.data.copy_(ours.data)
    return model.train().eval()  # torch does not count what is written through `.data`


@torch.no_grad()
def as_byol(model: nn.Module, source: nn.Module) -> Any:
    """Parameters by momentum, buffers copied."""
    for ours, theirs in zip(model.parameters(), source.parameters(), strict=True):
        ours.mul_(DECAY).add_(theirs, alpha=1.0 - DECAY)
    for ours, theirs in zip(model.buffers(), source.buffers(), strict=True):
        ours.data.copy_(theirs.data)
    return model


def soup(model: nn.Module, source: nn.Module) -> Any:
    states = [model.state_dict(), source.state_dict()]
    mean = {
        name: 0.5 * tensor + 0.5 * states[1][name] if tensor.is_floating_point() else tensor
        for name, tensor in states[0].items()
    }
    model.load_state_dict(mean)
    return model


def moved(model: nn.Module, source: nn.Module) -> Any:
    """By way of the meta device, as large models are."""
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in source.named_buffers()}  # those that are not in a state dict
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    for name, tensor in model.named_buffers():
        tensor.data.copy_(buffers[name])
    return model


Way = Callable[[nn.Module, nn.Module], Any]
WAYS: tuple[Way, ...] = (
    *(deep_copied, pickled, saved_whole, loaded, assigned, swa, swa_with_buffers, ema, ema_with_buffers),
    *(as_timm_v2, as_timm_v3, as_diffusers, as_byol, soup, moved),
)
ONE_OF_EACH_WAY = (pickled, assigned, swa, ema_with_buffers, as_timm_v2)
PRUNED: dict[str, dict[str, Any]] = {"removed": {}, "zeroed": {"pruned_prompts": "zero"}}
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


# ----------------------------------------------------------------------------------------------- what is asked of them
def reloaded(model: PeftModel) -> PeftModel:
    """The adapter of a model, saved and loaded on the base that the model has."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(copy.deepcopy(model).unload(), folder).eval()


@torch.no_grad()
def prune_first(model: nn.Module) -> None:
    """Prunes the first prompt of every layer, of any model of the zoo."""
    for layer in prompt_layers(model):
        token, segment = (gates.clone() for gates in layer.gates("default"))
        token[0] = 0
        layer.set_gates("default", token, segment)


def model_and_source(name: str, settings: dict[str, Any]) -> tuple[PeftModel, PeftModel, dict[str, Any]]:
    """A model that has run, and the same after a training that pruned it."""
    model, inputs = zoo_checks.adapt(name, **settings)
    zoo_checks.run(model, inputs)
    source, _ = zoo_checks.adapt(name, seed=1, **settings)
    prune_first(source)
    return model, source, inputs


@torch.no_grad()
def equals_its_reload(name: str, way: Way, settings: dict[str, Any], merged: bool) -> None:
    model, source, inputs = model_and_source(name, settings)
    if merged:
        model.merge_adapter()
        source.merge_adapter()
    before = zoo_checks.run(model, inputs)
    buffers = [buffer_name for buffer_name, _ in model.named_buffers()]
    assert buffers == [buffer_name for buffer_name, _ in source.named_buffers()]
    assert list(model.state_dict()) == list(source.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The visual prompts of .* have gates between 0 and 1")
        copied = way(model, source)
        found = zoo_checks.run(copied, inputs)  # without another eval(), which would look at everything anew
        assert torch.equal(zoo_checks.run(reloaded(copied), inputs), found), (way.__name__, settings, merged)
    assert not torch.equal(found, before) and not copied.training


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("pruned", PRUNED)
@ways
@pytest.mark.parametrize("name", ["vit", "swin", "hiera"])
def test_a_copy_equals_its_own_reload(name: str, way: Way, pruned: str, merged: bool) -> None:
    equals_its_reload(name, way, PRUNED[pruned], merged)


def plain_model_stands(name: str, way: Way) -> bool:
    """torch averages no boolean buffers, which some have."""
    model, _ = zoo_checks.build(name)
    try:
        way(model, copy.deepcopy(model))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("name", parameters(zoo.names(attention=True)))
def test_copies_of_every_backbone_equal_their_own_reloads(name: str) -> None:
    reason = zoo_checks.missing(name)
    if reason:
        pytest.skip(f"not in this environment: {reason}")
    if name in ONE_OF_EACH_KIND:
        for way in ONE_OF_EACH_WAY:
            equals_its_reload(name, way, {}, merged=False)
        equals_its_reload(name, swa_with_buffers, {}, merged=True)
    else:
        equals_its_reload(name, assigned, {}, merged=False)
        equals_its_reload(
            name, swa_with_buffers if plain_model_stands(name, swa_with_buffers) else swa, {}, merged=True
        )


def test_a_torch_average_of_batch_statistics_changes_nothing_where_there_are_none() -> None:
    model, inputs = adapt()
    average = AveragedModel(model)
    prune(model)
    averaged(average, model)
    before = predict(average, inputs)
    update_bn([inputs["pixel_values"]], average)
    assert torch.equal(predict(average, inputs), before)


# ---------------------------------------------------------------------------------------- names and numbers of tensors
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("settings", [{}, SHALLOW, {"pruned_prompts": "zero"}], ids=str)
def test_pruning_changes_no_name_and_no_number_of_tensors(settings: dict[str, Any], merged: bool) -> None:
    model, _ = adapt(**settings)
    if merged and settings is not SHALLOW:
        model.merge_adapter()
    before = [name for name, _ in [*model.named_parameters(), *model.named_buffers(), *model.state_dict().items()]]
    prune(model)
    assert before == [
        name for name, _ in [*model.named_parameters(), *model.named_buffers(), *model.state_dict().items()]
    ]


# ----------------------------------------------------------------------------------- what is derived follows the gates
def by_copy(gates: Tensor, values: Tensor) -> None:
    gates.copy_(values)


def through_data(gates: Tensor, values: Tensor) -> None:
    gates.data.copy_(values)


def in_inference_mode(gates: Tensor, values: Tensor) -> None:
    with torch.inference_mode():
        gates.copy_(values)


WRITES = (by_copy, through_data, in_inference_mode)


def pruned_twin(**settings: Any) -> tuple[PeftModel, dict[str, Tensor], Tensor]:
    """A model that is pruned, with its gates and its answer."""
    twin, inputs = adapt(**settings)
    prune(twin)
    gates = {name: tensor for name, tensor in twin.state_dict().items() if "_gates." in name}
    return twin, gates, predict(twin, inputs)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("settings", [{}, SHALLOW, {"pruned_prompts": "zero"}], ids=str)
def test_gates_written_into_the_tensors_of_a_state_dict_count_at_once_and_back(settings: Any, write: Any) -> None:
    model, inputs = adapt(**settings)
    before = predict(model, inputs)
    _, gates, expected = pruned_twin(**settings)
    state = model.state_dict()
    for wanted, answer in ((gates, expected), ({name: torch.ones_like(g) for name, g in gates.items()}, before)):
        for name, values in wanted.items():
            write(state[name], values)
        assert torch.equal(predict(model, inputs), answer)


def test_a_model_made_in_inference_mode_follows_its_gates() -> None:
    with torch.inference_mode():
        model, inputs = adapt()
        predict(model, inputs)
        _, gates, expected = pruned_twin()
        for name, values in gates.items():
            model.state_dict()[name].copy_(values)
        assert torch.equal(predict(model, inputs), expected)
    copied = copy.deepcopy(model)
    assert torch.equal(predict(copied, inputs), expected)


def test_what_was_worked_out_in_inference_mode_takes_part_in_training() -> None:
    model, inputs = adapt(pruned_prompts="zero")
    prune(model)
    for layer in layers_of(model):
        layer.e2vpt_token_gates["default"].mul_(1.0)
    with torch.inference_mode():
        model(**inputs)
    model.train()(**inputs).logits.sum().backward()


def test_a_functional_call_uses_the_gates_that_it_is_given() -> None:
    model, inputs = adapt()
    before = predict(model, inputs)
    twin, _, expected = pruned_twin(seed=3)
    found = functional_call(model, dict(twin.state_dict()), (), inputs).logits
    assert torch.equal(found, expected) and torch.equal(predict(model, inputs), before)


@pytest.mark.parametrize("pruned_prompts", ["remove", "zero"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_models_that_are_pruned_differently_run_as_an_ensemble(name: str, pruned_prompts: str) -> None:
    models = [adapt(name, seed=seed, dtype=torch.float64, pruned_prompts=pruned_prompts)[0] for seed in range(3)]
    _, inputs = adapt(name, dtype=torch.float64)
    prune(models[1])
    layers_of(models[2])[1].set_gates("default", torch.tensor([1.0, 0.0, 1.0]), torch.ones(3, 4))
    states = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def answer(state: Any, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = functional_call(skeleton, state, (), inputs).logits
        return logits

    found = vmap(answer, in_dims=(0, None))(states, inputs)
    for model, logits in zip(models, found, strict=True):
        torch.testing.assert_close(logits, predict(model, inputs), atol=1e-12, rtol=0)


def test_an_ensemble_of_shallow_prompts_is_refused() -> None:
    models = [adapt(seed=seed, **SHALLOW)[0] for seed in range(2)]
    _, inputs = adapt()
    with pytest.raises(ValueError, match="vmap over models needs visual_prompt_mode='deep'"):
        vmap(lambda state: functional_call(models[0], state, (), inputs).logits)(stack_module_state(models))


def test_all_threads_see_other_gates_right() -> None:
    model, inputs = adapt()
    expected = {pruned: pruned_twin()[2] if pruned else predict(model, inputs) for pruned in (False, True)}
    _, gates, _ = pruned_twin()
    state = model.state_dict()
    with ThreadPoolExecutor(8) as pool:
        for turn in range(20):
            pruned = turn % 2 == 0
            for name, values in gates.items():
                state[name].copy_(values if pruned else torch.ones_like(values))
            answers = pool.map(lambda _: predict(model, inputs), range(8))
            assert all(torch.equal(answer, expected[pruned]) for answer in answers)


@pytest.mark.compile
@pytest.mark.parametrize("settings", [{}, SHALLOW], ids=str)
def test_a_compiled_model_stays_one_graph_until_its_gates_change(
    settings: dict[str, Any], fresh_compiler: Any
) -> None:
    from torch._dynamo.testing import CompileCounter

    model, inputs = adapt(**settings)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        predict(compiled, inputs)
        model.eval()
        predict(model, inputs)
    assert counter.frame_count == 1
    _, gates, expected = pruned_twin(**settings)
    for name, values in gates.items():
        model.state_dict()[name].data.copy_(values)
    model.eval()
    for _ in range(2):
        torch.testing.assert_close(predict(compiled, inputs), expected)
    assert counter.frame_count == 2


@pytest.mark.compile
def test_a_copy_is_exported_with_the_gates_that_it_has() -> None:
    model, inputs = adapt()
    predict(model, inputs)
    _, gates, expected = pruned_twin()
    for name, values in gates.items():
        model.state_dict()[name].copy_(values)
    program = torch.export.export(copy.deepcopy(model), (), inputs, strict=False)
    assert torch.equal(program.module()(**inputs).logits, expected)


# ----------------------------------------------------------------------------------------------- gates between 0 and 1
def half_way(pruned_prompts: str, steps: int = 1) -> tuple[PeftModel, PeftModel, dict[str, Tensor]]:
    """An EMA of a model that was pruned some steps ago, and that model."""
    model, inputs = adapt(pruned_prompts=pruned_prompts)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    average.update_parameters(model)
    prune(model)
    for _ in range(steps):
        average.update_parameters(model)
    return average.module, model, inputs


@pytest.mark.parametrize("steps", [1, 700])
def test_what_the_model_has_pruned_is_pruned_in_its_average(tmp_path: Path, steps: int) -> None:
    average, model, inputs = half_way("remove", steps)
    stored = average.state_dict()["base_model.model.e2vpt.1.e2vpt_token_gates.default"]
    assert 0 < stored[0] < 1 and stored[1] == 1
    assert str(average.prompt_summary()) == str(model.prompt_summary())
    gates, expected = current_gates(average), current_gates(model)
    assert torch.equal(gates.token, expected.token) and torch.equal(gates.segment, expected.segment)
    average.save_pretrained(tmp_path / "average")
    model.save_pretrained(tmp_path / "model")
    found, wanted = (saved_gates(tmp_path / name) for name in ("average", "model"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
    batch = {**inputs, "labels": torch.tensor([0, 3])}
    scores, reference = (score_prompts(reload, [batch]) for reload in (average, reloaded(average)))
    assert torch.equal(scores.token, reference.token) and torch.equal(scores.segment, reference.segment)


def saved_gates(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "_gates" in name}


def test_factors_between_0_and_1_are_warned_of_once_a_copy_brings_them() -> None:
    average, model, inputs = half_way("zero")
    with pytest.warns(UserWarning, match=r"have gates between 0 and 1.*apply_gates\(average, gates\)"):
        predict(average, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(average, inputs)
        predict(copy.deepcopy(average), inputs)
    apply_gates(average, current_gates(model))
    assert torch.equal(current_gates(average).token, current_gates(model).token)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_rounding_of_a_weighted_sum_prunes_nothing(dtype: torch.dtype) -> None:
    model, _ = adapt()
    model.to(dtype)
    prune(model)
    state = model.state_dict()
    for weights in ([0.1] * 10, [1 / 3] * 3, [0.7, 0.2, 0.1], [1 / 7] * 7):
        soup = {name: sum(weight * tensor for weight in weights) for name, tensor in state.items()}
        mixed, _ = adapt()
        mixed.to(dtype).load_state_dict(soup)
        assert torch.equal(current_gates(mixed).segment, current_gates(model).segment)


# -------------------------------------------------------------------------------- one base and one config, many models
def a_few_steps(model: PeftModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Trains a little, prunes, saves, merges; the losses tell what it started from."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model)], lr=0.01)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=torch.tensor([0, 3])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.eval()
    prune(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
    model.merge_adapter()
    return [*losses, predict(model, inputs)]


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("name", ["vit", "swin", "dinov2"])
def test_every_fold_on_one_base_is_that_of_a_fresh_model(name: str, init_weights: bool) -> None:
    base, inputs = build(name)
    config = config_of(visual_prompt_dropout=0.1, init_weights=init_weights)
    expected = a_few_steps(get_peft_model(build(name)[0], config_of(visual_prompt_dropout=0.1)), inputs)
    for _ in range(3):
        model = get_peft_model(base, config)
        found = a_few_steps(model, inputs)
        assert all(map(torch.equal, found, expected))
        base = model.unload()


def test_one_config_is_never_changed_by_the_models_that_it_is_given_to() -> None:
    config = config_of()
    before, fields = copy.deepcopy(vars(config)), config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT would warn of another base model in the config
        warnings.filterwarnings("ignore", "Unable to fetch remote file|Could not find a config file")
        for name in ("vit", "swin", "dinov2", "clip", "vit"):
            base, inputs = build(name)
            base.name_or_path = f"me/{name}"
            model = get_peft_model(base, config)
            model.add_adapter("other", config)
            own = model.peft_config["default"]
            assert own is not config and own.base_model_name_or_path == f"me/{name}"
            if name != "clip":
                a_few_steps(model, inputs)
            copy.deepcopy(model)
            assert vars(config) == before and config.to_dict() == fields


def test_the_config_of_a_model_serves_another_and_stays_as_it_is() -> None:
    base, _ = build("vit")
    base.name_or_path = "me/vit"
    own = get_peft_model(base, config_of()).peft_config["default"]
    before = copy.deepcopy(vars(own))
    other, _ = build("vit")
    other.name_or_path = "me/vit"
    get_peft_model(other, own)
    assert vars(own) == before


def test_trials_with_other_settings_leave_nothing_behind() -> None:
    base, inputs = build("vit")
    settings: list[dict[str, Any]] = [{}, {"num_visual_prompts": 5}, {"num_kv_prompts": 0}, SHALLOW, {}]
    answers = []
    for trial in settings:
        config = config_of(**trial)
        fresh = predict(get_peft_model(build("vit")[0], config).eval(), inputs)
        model = get_peft_model(base, config).eval()
        answers.append(predict(model, inputs))
        assert torch.equal(answers[-1], fresh)
        trained(model)
        base = model.unload()
    assert torch.equal(answers[0], answers[-1])


def test_prompts_without_init_weights_are_those_with_them() -> None:
    models = [get_peft_model(build("vit")[0], config_of(init_weights=choice)) for choice in (True, False)]
    for one, other in zip(*(trainable(model) for model in models), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])


# --------------------------------------------------------------------------------------- an adapter in another's place
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_an_adapter_added_after_all_were_deleted_is_as_the_first(name: str) -> None:
    model, inputs = adapt(name)
    prune(model)
    model.add_adapter("second", config_of(num_visual_prompts=2))
    model.delete_adapter("default")
    model.add_adapter("default", config_of())
    model.set_adapter("default")
    fresh = get_peft_model(build(name)[0], config_of()).eval()
    model.eval()
    assert torch.equal(predict(model, inputs), predict(fresh, inputs))
    assert str(model.prompt_summary()).splitlines()[:-1] == str(fresh.prompt_summary()).splitlines()[:-1]
    batch = {**inputs, "labels": torch.tensor([0, 3])}
    assert torch.equal(score_prompts(model, [batch]).token, score_prompts(fresh, [batch]).token)


def test_an_adapter_added_after_the_last_was_deleted_is_summed_up_and_scored() -> None:
    model, inputs = adapt()
    prune(model)
    model.delete_adapter("default")
    model.add_adapter("default", config_of())
    fresh = get_peft_model(build("vit")[0], config_of())
    assert str(model.prompt_summary()) == str(fresh.prompt_summary())
    batch = {**inputs, "labels": torch.tensor([0, 3])}
    with pytest.raises(
        ValueError, match=r"'default' is not the active one: call model.set_adapter\('default'\) first"
    ):
        score_prompts(model, [batch])  # PEFT leaves that choice to its user
    model.set_adapter("default")
    assert torch.equal(score_prompts(model, [batch]).token, score_prompts(fresh, [batch]).token)
