# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Adapters as data: one exported graph of the frozen backbone, and adapters that are its inputs."""

from .adapter import AdapterRows, export_adapter, read_adapter
from .backbone import BackboneGraph, export_backbone
from .bank import AdapterBank, AdapterBatch
from .layout import GraphLayout


__all__ = [
    "AdapterBank",
    "AdapterBatch",
    "AdapterRows",
    "BackboneGraph",
    "GraphLayout",
    "export_adapter",
    "export_backbone",
    "read_adapter",
]
