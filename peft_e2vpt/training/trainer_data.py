# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The data that the phases of a Trainer run read, as the Trainer itself reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderStateMixin
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..evaluation import no_trace


if TYPE_CHECKING:
    from transformers import Trainer


logger = logging.get_logger(__name__)


class PreparedBatches:
    """Batches as the Trainer gives them to the model: on its device, and under DeepSpeed in its type.

    Attributes:
        dataloader: what the batches are read from.
    """

    def __init__(self, trainer: Trainer, dataloader: Any) -> None:
        self.dataloader = dataloader
        self._prepare = trainer._prepare_inputs

    def __iter__(self) -> Iterator[Any]:
        return map(self._prepare, self.dataloader)


class SizedBatches(PreparedBatches):
    """The same, of a dataloader that has a length."""

    def __len__(self) -> int:
        return len(self.dataloader)


class OneBatch(DataLoaderStateMixin):
    """A dataloader with a single batch, which Accelerate knows to be the last."""

    def __init__(self, batch: Any) -> None:
        from accelerate.state import GradientState

        self.gradient_state = GradientState()
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        self.begin()
        self.end_of_dataloader = True
        try:
            yield self.batch
        finally:
            self.end()


def is_stream(dataset: Any) -> bool:
    """Whether a dataset has no length or cannot be read at an index."""
    return isinstance(dataset, torch.utils.data.IterableDataset) or not has_length(dataset)


def _is_overridden(trainer: Trainer, name: str) -> bool:
    from transformers import Trainer

    return getattr(getattr(trainer, name), "__func__", None) is not getattr(Trainer, name)


def _batch_sampler_of(dataloader: Any) -> Any:
    """What cuts a dataset into batches, below what Accelerate shares out."""
    sampler = getattr(dataloader, "batch_sampler", None)
    return getattr(sampler, "batch_sampler", sampler)


def _share_of(trainer: Trainer, dataloader: Any, indices: Sequence[int] | None = None) -> DataLoader[Any]:
    """Reads this process's share of the dataset behind a dataloader, in order, without padding and to the end.

    With `indices`, its share of those.

    An incomplete batch at the end is left out where the dataloader drops it and it cannot be collated: a function that
    mixes images in pairs refuses an odd one.
    """
    args, dataset, collate = trainer.args, dataloader.dataset, dataloader.collate_fn
    indices = range(len(dataset)) if indices is None else indices
    share = Subset(dataset, indices[args.process_index :: args.world_size])
    batch_sampler = _batch_sampler_of(dataloader)
    size = batch_sampler.batch_size
    tail = range(len(share) - len(share) % size, len(share))
    drops = batch_sampler.drop_last and len(share) > len(tail) > 0 and not _can_collate(trainer, share, tail, collate)
    return DataLoader(
        share, batch_size=size, collate_fn=collate, num_workers=args.dataloader_num_workers, drop_last=drops
    )


def _can_collate(trainer: Trainer, dataset: Any, indices: range, collate: Any) -> bool:
    # without the model: only some processes have a tail, and those that share a model must treat it alike
    with no_trace(nn.Module(), (), trainer.args.seed):
        try:
            collate([dataset[i] for i in indices])
        except (AssertionError, RuntimeError, ValueError) as error:
            logger.info(f"The last batch to score on is left out, since it cannot be collated: {error}")
            return False
    return True


def _prepared(trainer: Trainer, dataloader: Any) -> PreparedBatches:
    return (SizedBatches if has_length(dataloader) else PreparedBatches)(trainer, dataloader)


def has_share(dataloader: Any) -> bool:
    """Whether a process can read its share of a dataloader's dataset in order."""
    dataset = getattr(dataloader, "dataset", None)
    return dataset is not None and not is_stream(dataset) and type(_batch_sampler_of(dataloader)) is BatchSampler


def scoring_batches(trainer: Trainer, score_dataset: Any = None) -> PreparedBatches:
    """What prompts are scored on.

    A dataset with a length and an index is read in order, each process its share, in the batches of training. Any
    other training dataloader is read as it is.

    Args:
        trainer: a Trainer that trains.
        score_dataset: a dataset in place of the training set.
    """
    dataloader = trainer.callback_handler.train_dataloader
    if score_dataset is not None:
        dataloader = trainer.get_test_dataloader(score_dataset)  # not kept, as that of an evaluation set may be
    if has_share(dataloader):
        dataloader = _share_of(trainer, dataloader)
    return _prepared(trainer, dataloader)


def training_batches(trainer: Trainer, max_samples: int) -> PreparedBatches:
    """Samples of the training set, in the batches of training: all, or so many drawn with the seed of the run.

    A stream, or a dataloader that a user has made in another way, is read as it is.
    """
    dataloader = trainer.callback_handler.train_dataloader
    if has_share(dataloader):
        count = len(dataloader.dataset)
        generator = torch.Generator().manual_seed(trainer.args.seed)
        drawn = torch.randperm(count, generator=generator)[:max_samples].sort().values
        dataloader = _share_of(trainer, dataloader, drawn.tolist())
    return _prepared(trainer, dataloader)


def validation_dataset_of(trainer: Trainer, validation_dataset: Any) -> Any:
    """The set to compare prunings on, by default the Trainer's; `None` where its dataloader needs none.

    Raises:
        ValueError: there is none, or several, or it is empty or a stream.
    """
    data = validation_dataset if validation_dataset is not None else trainer.eval_dataset
    if data is None and _is_overridden(trainer, "get_eval_dataloader"):
        return None
    if isinstance(data, dict):
        raise ValueError(
            f"The Trainer has several evaluation sets, {', '.join(data)}: pass the one to compare prunings on as "
            "validation_dataset."
        )
    if data is not None and is_stream(data):
        raise ValueError(
            "PruneRewindCallback compares prunings on a set with a length and an index, got the stream "
            f"{type(data).__name__}: pass another as validation_dataset."
        )
    if data is None or not len(data):
        found = "there is none" if data is None else "it is empty"
        raise ValueError(
            f"PruneRewindCallback compares prunings on an evaluation set, but {found}: pass eval_dataset to the "
            "Trainer or validation_dataset to the callback, or say what to prune (prune_tokens, prune_segments or "
            "max_tuned_percentage)."
        )
    return data


def validation_dataloader(trainer: Trainer, validation_dataset: Any = None) -> Any:
    """The Trainer's own evaluation dataloader, of its evaluation set or another one.

    Raises:
        ValueError: see `validation_dataset_of`.
    """
    data = validation_dataset_of(trainer, validation_dataset)
    kept = trainer.args.dataloader_persistent_workers and not _is_overridden(trainer, "get_eval_dataloader")
    if data is not None and data is not trainer.eval_dataset and kept:
        return trainer.get_test_dataloader(data)  # the other would be that of the Trainer's own set
    return trainer.get_eval_dataloader() if data is None else trainer.get_eval_dataloader(data)


def validation_batches(trainer: Trainer, validation_dataset: Any = None) -> PreparedBatches:
    """What prunings are compared on: the Trainer's evaluation dataloader; of several processes, each reads its share.

    Raises:
        ValueError: see `validation_dataset_of`.
    """
    dataloader = validation_dataloader(trainer, validation_dataset)
    if has_share(dataloader):
        in_order = isinstance(_batch_sampler_of(dataloader).sampler, SequentialSampler)
        if in_order or trainer.args.world_size > 1:  # Accelerate would repeat samples to fill the last batch
            dataloader = _share_of(trainer, dataloader)
    return _prepared(trainer, dataloader)
