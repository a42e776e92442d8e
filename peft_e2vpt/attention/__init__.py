# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How rows reach an attention: through transformers' attention interface, or by watching its calls of torch."""

from .interface import attend_with_rows
from .rows import MixedBatch, RowOwner, Rows, join_rows, one_per_sample, side_by_side


__all__ = [
    "MixedBatch",
    "RowOwner",
    "Rows",
    "attend_with_rows",
    "join_rows",
    "one_per_sample",
    "side_by_side",
]
