"""Photographs of solar cells, functional or defective, as `datasets` splits.

The 2,624 electroluminescence photographs (300 x 300, grey) come with the Python package `elpv-dataset`:

```bash
pip install elpv-dataset
python examples/solar_cells.py              # prints what is in the splits
```

```python
from solar_cells import load_solar_cells

splits = load_solar_cells()     # train, validation, test; columns image (RGB), label, cell_type
```

Every photograph carries the probability, judged by an expert, that the cell is defective: 0, 1/3, 2/3 or 1. Here

* *functional* is probability 0 and *defective* is 2/3 ("likely defective") or 1;
* the 295 cells of probability 1/3 ("functional, but not sure") are left out: they have no reliable answer;
* as many functional as defective cells are kept in each cell type (369 monocrystalline, 452 polycrystalline), so that
  guessing is right half of the time, the cell type tells nothing, and accuracy is a fair measure.

That makes 1,642 photographs, split 50 / 10 / 40 % with equal shares of label and cell type in each part. Cells of one
solar module may fall into different parts (the package does not tell modules apart): the task is easier than to judge
an unseen module, equally so for every method.

The photographs are licensed CC-BY-NC-SA-4.0 (non-commercial use). They are read from the installed package and never
copied. Cite Deitsch et al., Solar Energy 185 (2019), doi:10.1016/j.solener.2019.02.067.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import DatasetDict


INSTALL_HINT = "pip install elpv-dataset"
LABELS = ["functional", "defective"]
CELL_TYPES = ["mono", "poly"]
SPLITS = {"train": (0.0, 0.5), "validation": (0.5, 0.6), "test": (0.6, 1.0)}


def load_solar_cells(seed: int = 0) -> DatasetDict:
    """
    Loads the balanced solar-cell task.

    Args:
        seed (`int`, *optional*, defaults to 0):
            Decides which functional cells are kept and which cell goes into which split. Equal seeds give equal splits
            on every machine.

    Returns:
        `DatasetDict`: Splits `train` (820), `validation` (164) and `test` (658) with the columns `image` (decoded as
        RGB when read), `label` and `cell_type`.

    Raises:
        ImportError: `elpv-dataset` is not installed.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    features = Features(
        {"image": Image(mode="RGB"), "label": ClassLabel(names=LABELS), "cell_type": ClassLabel(names=CELL_TYPES)}
    )
    cells = read_cells(find_data_folder())
    splits = {}
    for name, rows in split_cells(cells, seed).items():
        columns = {column: [row[column] for row in rows] for column in features}
        splits[name] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def find_data_folder() -> Path:
    """Finds the photographs of the installed package without importing it."""
    try:
        installed = distribution("elpv-dataset")
    except PackageNotFoundError:
        raise ImportError(f"The solar-cell photographs come with the package `elpv-dataset`: {INSTALL_HINT}") from None
    return Path(str(installed.locate_file("elpv_dataset/data")))


def read_cells(folder: Path) -> list[dict]:
    """Reads `labels.csv` without the doubtful cells: one `dict` a cell with `image`, `label` and `cell_type`."""
    cells = []
    for line in (folder / "labels.csv").read_text().splitlines():
        file_name, probability, cell_type = line.split()
        if float(probability) == 0 or float(probability) > 0.5:
            label = "functional" if float(probability) == 0 else "defective"
            cells.append({"image": str(folder / file_name), "label": label, "cell_type": cell_type})
    return cells


def split_cells(cells: list[dict], seed: int) -> dict[str, list[dict]]:
    """Draws equally many cells of both labels from each cell type and deals them out to the splits."""
    import numpy as np

    # RandomState: NumPy guarantees the same numbers in all versions for this generator only.
    random = np.random.RandomState(seed)
    splits: dict[str, list[dict]] = {name: [] for name in SPLITS}
    for cell_type in CELL_TYPES:
        groups = [[c for c in cells if (c["label"], c["cell_type"]) == (label, cell_type)] for label in LABELS]
        size = min(map(len, groups))
        for group in groups:
            drawn = [group[index] for index in random.permutation(len(group))[:size]]
            for name, (start, end) in SPLITS.items():
                splits[name] += drawn[round(start * size) : round(end * size)]
    return splits


if __name__ == "__main__":
    print(load_solar_cells())
