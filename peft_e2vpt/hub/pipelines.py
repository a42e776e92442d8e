# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`pipeline`: transformers' pipeline for an adapter.

`transformers.pipeline(task, model=<adapter>)` builds the base model with the classes of its checkpoint and knows
nothing of what an adapter says of its model, so this is a function.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from .._compat import takes_processor
from .files import read_config
from .loading import DOWNLOAD_SETTINGS, load


if TYPE_CHECKING:  # transformers imports its pipelines, and much with them, when they are needed
    from transformers import Pipeline


# what transformers' pipelines are given besides a model, and what loads it
PROCESSORS = {
    "tokenizer": "AutoTokenizer",
    "image_processor": "AutoImageProcessor",
    "feature_extractor": "AutoFeatureExtractor",
    "video_processor": "AutoVideoProcessor",
    "processor": "AutoProcessor",
}


def pipeline(
    task: str,
    adapter: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    base_model: str | Path | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **settings: Any,
) -> Pipeline:
    """A pipeline of transformers with the model that `load` gives, and with the processors that belong to it.

    ```python
    classify = peft_e2vpt.pipeline("image-classification", "me/vit-e2vpt-pets")
    classify("cat.jpg")
    ```

    Args:
        task: as `transformers.pipeline` calls it, such as `"image-classification"` or `"depth-estimation"`.
        adapter: a repository of the Hub, or a folder. Image processor, tokenizer and the like are those that lie
            beside it; where there are none, those of the base model.
        revision: branch, tag or commit of the repository.
        subfolder: where in the repository or folder the adapter lies.
        base_model: name or path of the base model where it is not the one that the adapter names.
        model_kwargs: further arguments of `load`.
        settings: for `transformers.pipeline`; `dtype`, `device_map`, `token`, `cache_dir` and the like go to `load`.

    Raises:
        ValueError: as `load`, or a processor that the task needs is neither beside the adapter nor the base model.
    """
    of_model = {
        name: settings.pop(name) for name in ("dtype", "device_map", *DOWNLOAD_SETTINGS) if name in settings
    } | (model_kwargs or {})
    download = {name: of_model[name] for name in DOWNLOAD_SETTINGS if name in of_model}
    model = load(adapter, revision=revision, subfolder=subfolder, base_model=base_model, **of_model).get_base_model()
    config = read_config(str(adapter), revision, subfolder, **download)
    places = [
        (str(adapter), {"revision": revision, "subfolder": subfolder or ""}),
        (str(base_model or config.base_model_name_or_path), {"revision": None if base_model else config.revision}),
    ]
    for kind, is_required in _processors_of(task).items():
        if settings.get(kind) is None:
            processor = _processor(kind, places, is_required, download)
            if processor is not None:
                settings[kind] = processor
    return transformers.pipeline(task, model=model, **settings)


def _processors_of(task: str) -> dict[str, bool]:
    """The processors that the pipeline of a task takes, and whether it cannot do without."""
    from transformers.pipelines import check_task

    _, of_task, _ = check_task(task)
    cls = of_task["impl"]
    if isinstance(cls, str):  # its path, in newer versions of transformers
        cls = getattr(transformers, cls.rsplit(".", 1)[-1])
    flags = {kind: takes_processor(cls, kind) for kind in PROCESSORS}
    return {kind: bool(flag) for kind, flag in flags.items() if flag is not False}


def _processor(
    kind: str, places: list[tuple[str, dict[str, Any]]], is_required: bool, download: dict[str, Any]
) -> Any:
    reasons = []
    for place, settings in places:
        try:
            # a file beside the adapter may name code to run: transformers would ask on the terminal
            return getattr(transformers, PROCESSORS[kind]).from_pretrained(
                place, trust_remote_code=False, **settings, **download
            )
        except (ImportError, OSError, ValueError) as error:
            reasons.append(error)
    if not is_required:
        return None
    raise ValueError(
        f"The pipeline needs {'an' if kind[0] in 'aeiou' else 'a'} {kind}, but none lies beside the adapter "
        f"{places[0][0]} or its base model {places[1][0]}: save one into the adapter's folder with "
        f"save_pretrained, or pass {kind}=..."
    ) from reasons[0]
