# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The file `results.json` of a comparison of methods: a row as soon as a method is finished, so that a run that was
stopped goes on; and checkpoints that know which settings they belong to.

A row counts for the very settings and images that it was made with. With others, methods are trained anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


RESULTS = "results.json"
SETTINGS = "finetune_settings.json"
SAVED = ("adapter_config.json", "config.json")


class Comparison:
    """Rows of methods, and what they have in common.

    Attributes:
        path: of `results.json`.
        facts: what the rows have in common: `settings` (options that change them), `data` (where the images came
            from), `fingerprint` (of the images), `images` (how many), `classes`, `split`.
        rows: of the finished methods, each with its `method`.
        news: a sentence on what was found in the file, for the user; empty where there was none.
    """

    def __init__(self, folder: str | Path, facts: dict[str, Any], overwrite: bool = False) -> None:
        self.path = Path(folder) / RESULTS
        self.facts: dict[str, Any] = json.loads(json.dumps(facts))
        self.rows: list[dict[str, Any]] = []
        self.news = ""
        if overwrite or not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            rows = {row["method"]: row for row in found["methods"]}
        except (ValueError, KeyError, TypeError):
            self.news = f"{self.path} is damaged: all methods are trained anew."
            return
        different = differences(found, self.facts)
        if different:
            self.news = f"The results in {self.path} were made otherwise, so methods are trained anew: {different}."
            return
        kept = {name: row for name, row in rows.items() if self._is_saved(name)}
        self.rows = list(kept.values())
        if kept:
            self.news = (
                f"Finished already, with the same settings and images: {', '.join(kept)} (--overwrite trains anew)."
            )

    def __contains__(self, method: str) -> bool:
        return any(row["method"] == method for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Adds the row of a finished method and writes the file, in one piece."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Writes the file so that a run killed meanwhile leaves the earlier one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".tmp")
        written.write_text(json.dumps({**self.facts, "methods": self.rows}, indent=2) + "\n", encoding="utf-8")
        os.replace(written, self.path)

    def checkpoint(self, method: str) -> str | None:
        """The last complete checkpoint of a method that was made with these settings."""
        folders = sorted(
            (path.parent for path in (self.path.parent / method).glob(f"checkpoint-*/{SETTINGS}")),
            key=lambda folder: int(folder.name.rpartition("-")[2]),
        )
        fitting = [folder for folder in folders if json.loads((folder / SETTINGS).read_text()) == essence(self.facts)]
        return str(fitting[-1]) if fitting else None

    def _is_saved(self, method: str) -> bool:
        return any((self.path.parent / method / name).is_file() for name in SAVED)


class NoteSettings(TrainerCallback):
    """Writes into every checkpoint, once it is complete, which settings it belongs to."""

    def __init__(self, comparison: Comparison) -> None:
        self.facts = essence(comparison.facts)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / SETTINGS).write_text(json.dumps(self.facts))


def read_results(folder: str | Path) -> dict[str, Any]:
    """
    Reads what a run has found.

    Raises:
        ValueError: There is no run in the folder, or none of its methods is finished, or the file is damaged.
    """
    path = Path(folder) / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        finished = len(results["methods"])
    except OSError as error:
        raise ValueError(f"There is no run in {folder}: {path} was not found. finetune.py makes one.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: run the command of finetune.py again.") from error
    if not finished:
        raise ValueError(f"No method of the run in {folder} is finished: run the command of finetune.py again.")
    return results


def essence(facts: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for rows to be comparable: images may lie elsewhere, as long as they are the same."""
    return {name: value for name, value in facts.items() if name not in ("data", "methods")}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Names what differs between the facts of a file and those of a run; empty if nothing does."""
    if essence(found) == essence(wanted):
        return ""
    if found.get("settings") is None:
        return "they do not say with which settings"
    changed = []
    for part in ("settings", "data") if found.get("fingerprint") != wanted["fingerprint"] else ("settings",):
        before, now = found.get(part) or {}, wanted[part]
        changed += [
            f"{name} was {before.get(name, 'the default')} and is {now.get(name, 'the default')}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
    return "; ".join(changed) or "the images, their classes or their splits have changed"
