# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Trainings in which two processes share out the model.

`torchrun --nproc_per_node 2 -m tests.support.sharded_worker KIND OUT`: KIND is `zero2` or `zero3`, DeepSpeed's, or
`fsdp2`. Every process writes `OUT/rank{rank}.pt`, a dictionary of what it found. `run` with the kind `alone` is the
same training in one process.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback

from peft_e2vpt import E2VPTConfig, PruneRewindCallback, trained_tensors
from peft_e2vpt.distributed import assign, is_sharded, whole
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support.models import build
from tests.support.training import HALF, SETTINGS, Images, adapted, arguments, history_of, trainer_for


SAVING = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
OWN_OPTIMIZER = {  # DeepSpeed's engine then steps the scheduler, and decays biases too
    "type": "AdamW",
    "params": {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto", "torch_adam": True},
}


class ShardingTrainer(Trainer):
    """Lets FSDP2 shard on CPUs, where Accelerate falls back to DDP, by telling it of another kind of processor."""

    def create_accelerator_and_postprocess(self) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        super().create_accelerator_and_postprocess()


class Boundary(TrainerCallback):
    """Keeps what the second part starts with."""

    trained: dict[str, Tensor]

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 10:
            self.trained = trained_tensors(model)


def settings_of(kind: str, **deepspeed: Any) -> dict[str, Any]:
    """The training arguments of a kind; ZeRO-3 shares out parameters of any size, by default only large ones."""
    if kind == "alone":
        return {}
    if kind == "fsdp2":
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["ViTLayer"], "state_dict_type": "FULL_STATE_DICT"}
        return {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": config}
    zero = {
        "stage": int(kind[-1]),
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    sizes = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    return {"ddp_backend": "gloo", "deepspeed": {"zero_optimization": zero, **sizes, **deepspeed}}


@torch.no_grad()
def pruned_values_have_no_effect(model: PeftModel) -> bool:
    """Whether the model gives the same bits when its pruned values are others."""
    images = Images(4, seed=2).pixels
    before = model.eval()(pixel_values=images).logits
    layers = prompt_layers(model)
    for layer in layers:
        prompts, alive = layer.e2vpt_visual_prompts["default"], layer.kept("default")
        values = whole(prompts)
        assert 0 < int(alive.sum()) < alive.numel() and (values[~alive] == 0).all()
        assign(prompts, values + (~alive).to(values) * 100)
        assert (whole(prompts)[~alive] == 100).all()
    return torch.equal(model(pixel_values=images).logits, before)


def run(
    folder: Path,
    kind: str,
    callback: PruneRewindCallback,
    model: PeftModel | None = None,
    resume: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """A training with 4 samples a step, pruned after 10 of 20 steps, scored on 21 images; the adapter is saved."""
    boundary = Boundary()
    processes = 1 if kind == "alone" else 2
    trainer = trainer_for(
        folder,
        callback,
        model if model is not None else adapted(visual_prompt_dropout=0.0, seed=9 if resume else 0),
        boundary,
        ShardingTrainer if kind == "fsdp2" else Trainer,
        train_dataset=Images(21),
        eval_dataset=Images(9, seed=4),
        dataloader_drop_last=True,  # as many samples in every step as in one process
        per_device_train_batch_size=4 // processes,
        **{**settings_of(kind), **settings},
    )
    assert trainer.args.world_size == processes, trainer.args.world_size
    trainer.train(f"{folder}/checkpoint-{resume}" if resume else None)
    wrapper = {"alone": "PeftModel", "fsdp2": "FSDPPeftModel"}.get(kind, "DeepSpeedEngine")
    assert type(trainer.model_wrapped).__name__ == wrapper
    assert is_sharded(trainer.model) == (kind in ("zero3", "fsdp2"))
    trainer.save_model(str(folder / "adapter"))
    return {
        "start": boundary.trained if resume != 15 else None,
        "end": trained_tensors(trainer.model),
        "history": history_of(trainer),
        "report": callback.report,
        "best step": trainer.state.best_global_step,
        "summary": str(trainer.model.prompt_summary()),
        "model": trainer.model,
    }


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compares gates exactly and weights to 1e-5: ZeRO trains in float32. The largest difference seen is 1.3e-7."""
    for name in ("token_gates", "segment_gates", "candidates", "chosen", "num_scored_samples", "step"):
        assert getattr(found["report"], name) == getattr(expected["report"], name)
    scores, others = (torch.tensor(entry["report"].token_scores) for entry in (found, expected))
    torch.testing.assert_close(scores, others, rtol=1e-4, atol=1e-6)
    for when in ("start", "end"):
        assert found[when].keys() == expected[when].keys()
        for name, tensor in expected[when].items():
            torch.testing.assert_close(
                found[when][name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert found["summary"] == expected["summary"]


def loaded_in_parts(folder: Path, kind: str) -> PeftModel:
    """A model whose backbone is shared out when it is loaded, as it is where TrainingArguments come first."""
    args = arguments(folder, **settings_of(kind))
    if dist.get_rank() == 0:
        build("vit")[0].save_pretrained(folder / "base")
    dist.barrier()
    base = AutoModelForImageClassification.from_pretrained(folder / "base")
    assert args.deepspeed is not None and base.classifier.weight.shape == (0,)
    return get_peft_model(base, E2VPTConfig(**{**SETTINGS, "visual_prompt_dropout": 0.0}))


def saved_by_hand(folder: Path, model: PeftModel) -> dict[str, Tensor]:
    """What another model holds that has read a pruned one's sharded checkpoint, without the Trainer."""
    other = adapted(visual_prompt_dropout=0.0, seed=5)
    fully_shard(other, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    read = {"model": get_model_state_dict(other)}
    checkpoint.load(read, checkpoint_id=folder)
    set_model_state_dict(other, read["model"])
    assert pruned_values_have_no_effect(other)
    return trained_tensors(other)


def main(kind: str, out: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"search": run(out / "search", kind, PruneRewindCallback(), **SAVING)}
    rank = dist.get_rank()
    assert dist.get_world_size() == 2 and dist.get_backend() == "gloo" and os.environ["WORLD_SIZE"] == "2"
    if kind == "zero3":
        assert all(parameter.shape == (0,) for parameter in found["search"]["model"].parameters())
    found["no effect"] = pruned_values_have_no_effect(found["search"]["model"])
    for step in (15, 5):
        dist.barrier()
        found[f"resumed{step}"] = run(out / "search", kind, PruneRewindCallback(), resume=step, **SAVING)
    best = {"load_best_model_at_end": True, "label_names": ["labels"], "per_device_eval_batch_size": 4}
    found["best"] = run(out / "best", kind, PruneRewindCallback(), **best, **SAVING)
    fresh = PruneRewindCallback(**HALF, rewind_to="fresh")
    found["fresh"] = run(out / "fresh", kind, fresh)
    if kind == "fsdp2":
        settings = settings_of(kind)
        settings["fsdp_config"]["state_dict_type"] = "SHARDED_STATE_DICT"
        given = {**SAVING, **settings}
        found["parts"] = run(out / "parts", kind, PruneRewindCallback(**HALF), **given)
        (out / "parts" / "pruning_report.json").unlink(missing_ok=True)  # no resume needs it
        for step in (15, 10, 5):
            dist.barrier()
            found[f"parts{step}"] = run(out / "parts", kind, PruneRewindCallback(**HALF), resume=step, **given)
        found["own files"] = saved_by_hand(out / "by hand", found["parts"]["model"])
    else:
        settings = settings_of(kind, optimizer=OWN_OPTIMIZER)
        del settings["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"]
        early = PruneRewindCallback(**HALF, rewind_to="early", early_steps=2)
        found["own optimizer"] = run(out / "optimizer", kind, early, weight_decay=0.0, **settings)
        settings = settings_of(kind, bf16={"enabled": True})
        swin = adapted("swin", visual_prompt_dropout=0.0)
        found["bf16"] = run(out / "bf16", kind, PruneRewindCallback(), swin, bf16=True, **settings)
    if kind == "zero3":
        (out / "parts").mkdir(exist_ok=True)
        model = loaded_in_parts(out / "parts", kind)
        found["loaded in parts"] = run(out / "parts", kind, PruneRewindCallback(), model)
    for entry in found.values():
        if isinstance(entry, dict):
            entry.pop("model", None)
    torch.save(found, out / f"rank{rank}.pt")
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
