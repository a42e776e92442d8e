# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a pruned run has to tell: `PruningReport`, an object and a JSON file beside the adapter."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .importance import ImportanceScores
from .ranking import Gates
from .search import PruningSearch


REPORT_NAME = "pruning_report.json"


def own_file(path: Path) -> Path:
    """A path to write to, which is no link: a folder of somebody else's cannot have another file overwritten."""
    if path.is_symlink():
        path.unlink()
    return path


@dataclass(frozen=True)
class PruningReport:
    """Scores, gates and choice of one pruning.

    Attributes:
        step: optimizer step after which the model was pruned; `None` where its training was over.
        rewound_to: `"init"`, `"early"`, `"fresh"` or `"none"`.
        num_scored_samples: samples that the scores average over.
        layers: numbers of the prompted self-attentions.
        token_scores: importance of every prompt, (L, M).
        segment_scores: importance of every segment, (L, M, R).
        token_gates: 1 for prompts that stay, (L, M).
        segment_gates: 1 for segments that stay, (L, M, R).
        tuned_values_before: trained values with the head, before pruning.
        tuned_values_after: the same after.
        tuned_percentage_before: trained parameters in percent of the model, before pruning.
        tuned_percentage_after: the same after.
        candidates: where prunings were searched, each with its ratios, values and quality.
        chosen: index of the chosen candidate.
    """

    step: int | None
    rewound_to: str
    num_scored_samples: int
    layers: list[int]
    token_scores: list[list[float]]
    segment_scores: list[list[list[float]]]
    token_gates: list[list[float]]
    segment_gates: list[list[list[float]]]
    tuned_values_before: int
    tuned_values_after: int
    tuned_percentage_before: float
    tuned_percentage_after: float
    candidates: list[dict[str, Any]] = field(default_factory=list)
    chosen: int | None = None

    @classmethod
    def build(
        cls,
        *,
        scores: ImportanceScores,
        gates: Gates,
        search: PruningSearch | None,
        **facts: Any,
    ) -> PruningReport:
        """Makes a report from the objects of a pruning and the remaining `facts`."""
        return cls(
            num_scored_samples=scores.num_samples,
            token_scores=scores.token.tolist(),
            segment_scores=scores.segment.tolist(),
            token_gates=gates.token.tolist(),
            segment_gates=gates.segment.tolist(),
            candidates=[asdict(candidate) for candidate in search.candidates] if search else [],
            chosen=search.chosen if search else None,
            **facts,
        )

    def save(self, folder: str | Path) -> Path:
        """Writes the report into a folder as `pruning_report.json` and returns its path."""
        path = Path(folder) / REPORT_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        own_file(path).write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> PruningReport:
        """Reads the report of a folder.

        Raises:
            FileNotFoundError: the folder has none.
            ValueError: it is damaged.
        """
        path = Path(folder) / REPORT_NAME
        try:
            report = cls(**json.loads(path.read_text(encoding="utf-8")))
            report._check()
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged, or not the report of a pruning: copy it again, or delete it ({error})."
            ) from error
        return report

    def _check(self) -> None:
        """Checks the types of what has been read from a file.

        Raises:
            ValueError: scores and gates are no tables of numbers of one shape.
            TypeError: a number is none.
        """
        tables = ((self.token_scores, self.segment_scores), (self.token_gates, self.segment_gates))
        for tokens, segments in tables:
            if torch.tensor(segments).shape[:2] != torch.tensor(tokens).shape:
                raise ValueError("numbers of prompts and of segments differ")
        numbers = (
            *(self.tuned_values_before, self.tuned_values_after, self.tuned_percentage_before),
            *(self.tuned_percentage_after, self.num_scored_samples, *self.layers),
            *(() if self.step is None else (self.step,)),
        )
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise TypeError("a number is expected")

    @property
    def when(self) -> str:
        """When the model was pruned, in words."""
        return "after training" if self.step is None else f"after step {self.step}"

    def numbers(self) -> dict[str, float]:
        """The figures that go to the Trainer's log."""
        return {
            **({} if self.step is None else {"pruning_step": self.step}),
            "pruning_prompts_kept": sum(sum(row) for row in self.token_gates),
            "pruning_segments_kept": sum(sum(sum(prompt) for prompt in row) for row in self.segment_gates),
            "pruning_tuned_values": self.tuned_values_after,
            "pruning_tuned_percentage": self.tuned_percentage_after,
        }
