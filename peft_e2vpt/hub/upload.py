# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`push_to_hub`: an adapter on the Hub with a card that tells how to load it.

`PeftModel.push_to_hub` is transformers': to a new repository it writes a template of its own over the card that saving
has made, and nothing of an adapter's method runs after that. So this is a function.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME

from ..pruning.report import PruningReport
from ..tuner.config import E2VPTConfig
from .card import BY_A_TRAINER, CARD_NAME, Location, is_replaceable, is_repo_id, write_card
from .companion import facts_of


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    processing_class: Any = None,
    report: PruningReport | None = None,
    dataset: str | None = None,
    metrics: dict[str, float] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload E2VPT adapter",
    create_pr: bool = False,
) -> CommitInfo:
    """Uploads an adapter to the Hub with a card made for it: what it is, what is kept in it, how to load it.

    ```python
    trainer.train()
    peft_e2vpt.push_to_hub(model, "me/vit-e2vpt-pets", processing_class=processor, metrics=trainer.evaluate())
    ```

    A card that somebody has written or changed on the Hub stays as it is. Of a generated one, such as a Trainer's, the
    data, results, licence and language are taken over where this call gives none.

    Args:
        model: a model with an E2VPT adapter.
        repo_id: the repository, made where there is none.
        adapter_name: the adapter to upload, by default the active one.
        base_model: name of the base model on the Hub, where it was loaded from a folder. A folder of this machine is
            not named in what is uploaded; without `base_model` the card asks its readers for one.
        processing_class: an image processor to save beside it, so that pipelines find it.
        report: of its pruning, `PruneRewindCallback.report` or `PruningReport.load(folder)`; gives the card a figure
            if matplotlib is installed.
        dataset: the Hub's name of the data that it was trained on.
        metrics: results by name, as from `Trainer.evaluate()`.
        revision: branch to upload to, made where there is none.
        subfolder: where in the repository the adapter goes; the root for the default `None`.
        private: whether a new repository is private.
        token: of the Hub, by default the one that is logged in.
        commit_message: of the upload.
        create_pr: whether to open a pull request with it.

    Raises:
        ValueError: the adapter does not exist, or is not one of E2VPT.
        LocalTokenNotFoundError: no token is given, and nobody is logged in.
    """
    adapter_name = adapter_name or model.active_adapter
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, E2VPTConfig):
        found = "none of that name" if config is None else f"one of {config.peft_type.value}"
        raise ValueError(f"push_to_hub needs an E2VPT adapter, but {adapter_name!r} is {found}.")
    api = HfApi(token=True if token is None else token)  # True: says so at once where nobody is logged in
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as root:
        folder = Path(root) if adapter_name == "default" else Path(root) / adapter_name
        model.save_pretrained(root, selected_adapters=[adapter_name])
        facts = facts_of(model, config, adapter_name)
        if base_model is not None:
            facts = replace(facts, base_model=base_model)
        _name_base_model(folder / CONFIG_NAME, facts.base_model if is_repo_id(facts.base_model) else None)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        if report is not None:
            report.save(folder)
        earlier = _card_on_the_hub(repo_id, revision, subfolder, token)
        if earlier is None or is_replaceable(earlier.content) or BY_A_TRAINER in earlier.content:
            write_card(
                folder,
                facts,
                Location(repo_id, revision, subfolder),
                dataset=dataset,
                metrics=metrics,
                earlier=None if earlier is None else earlier.data,
            )
        else:
            (folder / CARD_NAME).unlink()
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )


def _name_base_model(path: Path, name: str | None) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = name
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def _card_on_the_hub(
    repo_id: str, revision: str | None, subfolder: str | None, token: str | bool | None
) -> ModelCard | None:
    try:
        path = hf_hub_download(repo_id, CARD_NAME, revision=revision, subfolder=subfolder, token=token)
    except EntryNotFoundError:
        return None
    card: ModelCard = ModelCard.load(path, ignore_metadata_errors=True)
    return card
