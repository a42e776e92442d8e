# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Loads the adapter of an image classifier with its image processor, for the commands that look at images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from peft import PeftModel


class Classifier(NamedTuple):
    """An adapter on its base model.

    Attributes:
        model: in eval mode.
        labels: names of its classes.
        processor: what turns images into its inputs.
    """

    model: PeftModel
    labels: list[str]
    processor: Any


def load_classifier(adapter: str, revision: str | None, subfolder: str | None, base: str | None) -> Classifier:
    """Loads an adapter with its base model and its image processor.

    Raises:
        ValueError: as `peft_e2vpt.load`; or it belongs to no image classifier, or there is no image processor.
    """
    from transformers.utils import logging

    from peft_e2vpt import load
    from peft_e2vpt.hub.card import task_of

    logging.disable_progress_bar()  # of the loading alone, which is over before a bar could be read
    try:
        model = load(adapter, revision=revision, subfolder=subfolder, base_model=base)
    finally:
        logging.enable_progress_bar()
    config, base_model = model.peft_config["default"], model.get_base_model()
    problem, task = getattr(base_model.config, "problem_type", None), task_of(base_model)
    if task != "image-classification" or not config.labels:
        what = f"one for {task}" if task not in (None, "image-classification") else type(base_model).__name__
        raise ValueError(
            f"This command measures the accuracy of image classifiers, and the model of {adapter} is {what}: measure "
            "it in Python, where peft_e2vpt.search_pruning takes a quality of your own."
        )
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"This command measures the accuracy of classifiers with one class per image, and the adapter {adapter} "
            f"was trained with problem_type={problem!r}: measure it in Python."
        )
    name = base or config.base_model_name_or_path
    return Classifier(model, config.labels, _processor_of(adapter, revision, subfolder, name))


def _processor_of(adapter: str, revision: str | None, subfolder: str | None, base: str | None) -> Any:
    """The image processor beside an adapter, else that of its base model."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            adapter, revision=revision or "main", subfolder=subfolder or "", trust_remote_code=False
        )
    except OSError:
        pass  # most adapters are saved without one
    try:
        return AutoImageProcessor.from_pretrained(base, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"Neither the adapter {adapter} nor its base model {base} has an image processor: save one beside the "
            "adapter with processor.save_pretrained(...)."
        ) from error
