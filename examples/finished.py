# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A method that has been trained: the card beside it, and its upload to the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from torch import nn
    from transformers import TrainingArguments


METRICS = ("accuracy", "balanced_accuracy")
NOT_UPLOADED = ["checkpoint-*", "*.tmp", "training_args.bin", "trainer_state.json", "search.*"]
TITLES = {"linear": "a linear probe", "full": "full fine-tuning", "lora": "LoRA"}


@dataclass
class Finished:
    """A trained model in its folder, with what is known of it.

    Attributes:
        method: as `finetune.py` calls it.
        folder: where it has been saved.
        base_model: name or folder of the backbone.
        labels: names of the classes.
        row: of `results.json`.
        dataset: name of the images on the Hub, if they come from there.
    """

    method: str
    folder: Path
    base_model: str
    labels: list[str]
    row: dict[str, Any]
    dataset: str | None

    @property
    def metrics(self) -> dict[str, float]:
        return {name: self.row[name] for name in METRICS}

    def write_card(self, model: nn.Module) -> None:
        """Writes the card into the folder: this package's for an E2VPT adapter, a short one for another method."""
        from peft_e2vpt.hub.card import write_card
        from peft_e2vpt.hub.companion import facts_of

        if self._is_e2vpt():
            facts = facts_of(model, model.peft_config["default"], "default")
            write_card(self.folder, facts, dataset=self.dataset, metrics=self.metrics)
        else:
            self._short_card(self.method).save(self.folder / "README.md")

    def upload(self, repo_id: str, args: TrainingArguments) -> str:
        """Uploads it with its card, metrics, report and names of classes, and returns the address."""
        from huggingface_hub import HfApi
        from transformers import AutoImageProcessor

        import peft_e2vpt
        from peft_e2vpt.pruning.report import REPORT_NAME

        if self._is_e2vpt():
            pruned = (self.folder / REPORT_NAME).is_file()
            commit = peft_e2vpt.push_to_hub(
                peft_e2vpt.load(self.folder),
                repo_id,
                processing_class=AutoImageProcessor.from_pretrained(self.folder),
                report=peft_e2vpt.PruningReport.load(self.folder) if pruned else None,
                dataset=self.dataset,
                metrics=self.metrics,
                private=args.hub_private_repo,
                token=args.hub_token,
                revision=args.hub_revision,
            )
            return commit.commit_url
        api = HfApi(token=args.hub_token)
        repo_id = api.create_repo(repo_id, private=args.hub_private_repo, exist_ok=True).repo_id
        self._short_card(repo_id.split("/")[-1]).save(self.folder / "README.md")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=self.folder,
            ignore_patterns=NOT_UPLOADED,
            revision=args.hub_revision,
            commit_message=f"Upload an image classifier ({self.method})",
        )
        return commit.commit_url

    def _is_e2vpt(self) -> bool:
        return self.method not in TITLES

    def _short_card(self, title: str) -> ModelCard:
        from huggingface_hub import EvalResult, ModelCard, ModelCardData

        from peft_e2vpt.hub.card import is_repo_id

        on_the_hub = is_repo_id(self.base_model)
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=self.dataset or "images",
                dataset_name=self.dataset or "own images",
                metric_type=name,
                metric_value=value,
            )
            for name, value in self.metrics.items()
        ]
        data = ModelCardData(
            base_model=self.base_model if on_the_hub else None,
            datasets=self.dataset,
            eval_results=results,
            library_name="peft" if self.method == "lora" and on_the_hub else "transformers",
            metrics=list(self.metrics),
            model_name=title,
            pipeline_tag="image-classification",
        )
        numbers = "\n".join(f"| {name.replace('_', ' ')} | {value:.3f} |" for name, value in self.metrics.items())
        base = f"`{self.base_model}`" if on_the_hub else "a backbone from a folder"
        return ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# {title}\n\nAn image classifier: {TITLES[self.method]} on {base}, "
            f"{self.row['trained']:,} trained parameters ({self.row['percent']:.2f} % of the model).\n\n"
            f"Classes: {', '.join(self.labels)}.\n\n| metric | value |\n|---|---:|\n{numbers}\n"
        )


def check_login(args: TrainingArguments) -> None:
    """
    Makes sure, before anything is trained, that an upload will be let in.

    Raises:
        ValueError: Nobody is logged in, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        HfApi(token=args.hub_token).whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(
            "--push_to_hub needs somebody who is logged in: run hf auth login, or set HF_TOKEN."
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--push_to_hub cannot reach the Hub with this token ({reason}).") from error
