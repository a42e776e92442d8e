# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The phases between the two parts of a run: score, choose, prune, rewind, report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..evaluation import no_trace
from ..training.trainer_data import scoring_batches, validation_batches
from ..tuner.prompt_layers import visual_prompt_layers
from ..tuner.summary import summarise
from .arguments import PruningArguments
from .importance import ImportanceScores, score_prompts
from .optimizer_start import clear_state, show_evaluated_values
from .quality import BatchQuality, ModelQuality
from .ranking import Gates, apply_gates, current_gates, prune, prune_to_percentage
from .report import PruningReport
from .rewinding import redraw, rewind
from .run_state import RunState
from .search import PruningSearch, search_pruning
from .trainer_quality import quality_of


if TYPE_CHECKING:
    from transformers import Trainer


def score(trainer: Trainer, arguments: PruningArguments, adapter_name: str) -> ImportanceScores:
    """Scores the prompts by the Trainer's loss on training data."""
    batches = scoring_batches(trainer, arguments.score_dataset)
    with no_trace(trainer.model, batches.dataloader):
        return score_prompts(
            trainer.model,
            batches,
            adapter_name=adapter_name,
            loss_fn=trainer.compute_loss,
            max_batches=arguments.max_score_batches,
            seed=trainer.args.seed,
        )


def search_amounts(
    trainer: Trainer,
    arguments: PruningArguments,
    scores: ImportanceScores,
    adapter_name: str,
    batches: Iterable[Any],
    quality: BatchQuality | ModelQuality,
    most_only: bool = False,
) -> PruningSearch:
    """Compares prunings on validation batches; `most_only` compares the most with none."""
    ratios = arguments.token_ratios, arguments.segment_ratios
    token_ratios, segment_ratios = ((max(r, default=0.0),) for r in ratios) if most_only else ratios
    return search_pruning(
        trainer.model,
        scores,
        batches,
        adapter_name=adapter_name,
        token_ratios=token_ratios,
        segment_ratios=segment_ratios,
        quality=quality,
        max_rows=max(64, trainer.args.per_device_eval_batch_size),
        seed=trainer.args.seed,
        **arguments.bounds,
    )


def choose(
    trainer: Trainer, arguments: PruningArguments, scores: ImportanceScores, adapter_name: str
) -> tuple[Gates, PruningSearch | None]:
    """The gates to prune by: searched, by amounts, or by a budget."""
    if arguments.searches:
        quality = quality_of(trainer, arguments.quality, arguments.greater_is_better, arguments.validation_dataset)
        if isinstance(quality, ModelQuality):
            search = search_amounts(trainer, arguments, scores, adapter_name, (), quality)
            return search.gates, search
        batches = validation_batches(trainer, arguments.validation_dataset)
        with no_trace(trainer.model, batches.dataloader):
            search = search_amounts(trainer, arguments, scores, adapter_name, batches, quality)
        return search.gates, search
    if arguments.max_tuned_percentage is None:
        return prune(scores, arguments.prune_tokens, arguments.prune_segments, **arguments.bounds), None
    budget = arguments.max_tuned_percentage
    return prune_to_percentage(trainer.model, scores, budget, adapter_name, **arguments.bounds), None


def prune_and_rewind(trainer: Trainer, arguments: PruningArguments, run: RunState, step: int) -> PruningReport:
    """Scores, prunes and rewinds the model of a Trainer, and makes its optimizer as it was at the start."""
    model = trainer.model
    adapter_name, layers = visual_prompt_layers(model)
    before = summarise(model, adapter_name)
    show_evaluated_values(trainer)
    scores = score(trainer, arguments, adapter_name)
    gates, search = choose(trainer, arguments, scores, adapter_name)
    gates = gates & current_gates(model, adapter_name)  # what an earlier run has pruned stays pruned
    apply_gates(model, gates, adapter_name)
    if arguments.rewind_to == "fresh":
        redraw(model, adapter_name, trainer.args.seed + 1)
    elif arguments.rewind_to != "none":
        rewind(model, run.target)
    if run.optimizer_start is not None:
        run.optimizer_start.restore(trainer)
    else:
        clear_state(trainer.optimizer)
    after = summarise(model, adapter_name)
    return PruningReport.build(
        scores=scores,
        gates=gates,
        search=search,
        step=step,
        rewound_to=arguments.rewind_to,
        layers=[layer.index for layer in layers],
        tuned_values_before=before.num_tuned_values,
        tuned_values_after=after.num_tuned_values,
        tuned_percentage_before=before.tuned_percentage,
        tuned_percentage_after=after.tuned_percentage,
    )
