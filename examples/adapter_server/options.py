# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a server is told, and what it refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


log = logging.getLogger("ray.serve")  # Serve writes it to the files of the replica, and to the driver's output
BASE = "__base__"  # the model without an adapter
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of an adapter
HUB = "hf://"
GRAPHS = {"onnx": "backbone.onnx", "torch": "backbone.pt2"}
PROCESSOR = "preprocessor_config.json"


class Options(BaseModel):
    """What the command line takes, and `serve run examples.serve:build NAME=VALUE ...`."""

    model_config = ConfigDict(extra="forbid")

    backbone: str = Field(description="folder that export_backbone wrote")
    adapters: str = Field("adapters", description="folder of exported adapters, or hf://OWNER/NAME[@REVISION]")
    backend: Literal["onnx", "torch"] = Field("onnx", description="what runs the backbone: onnx or torch")
    replicas: int = Field(1, ge=1, description="copies of the backbone")
    ingresses: int = Field(1, ge=1, description="processes that take requests")
    threads: int = Field(1, ge=1, description="CPU threads of a replica, which reserves as many CPUs")
    max_batch: int = Field(32, ge=1, description="images in a batch")
    batch_wait_ms: float = Field(5.0, ge=0, description="how long a batch waits for more images")
    max_queued: int = Field(256, ge=1, description="waiting requests, beyond which the answer is 503")
    max_image_mb: float = Field(16.0, gt=0, description="size of an uploaded image, beyond which the answer is 413")
    max_adapter_mb: float = Field(64.0, gt=0, description="size of an adapter's file")
    read_only: bool = Field(False, description="refuse changes of adapters over HTTP")
    max_pixels: int = Field(50_000_000, ge=1, description="pixels of an image, beyond which the answer is 413")
    adapter_memory_mb: float = Field(1024.0, gt=0, description="memory of a replica for adapters, which come and go")
    poll_s: float = Field(1.0, gt=0, description="how often a replica looks at the folder; at the Hub, 60 times that")
    timeout_s: float = Field(60.0, gt=0, description="for one request, and for those under way when the server ends")


class Refusal(Exception):
    """An answer that is no prediction."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(status, detail)
        self.status, self.detail = status, detail


def check_files(options: Options) -> None:
    """
    Checks what can be checked without loading anything.

    Raises:
        ValueError: A file or the folder of adapters is missing.
    """
    folder = Path(options.backbone)
    graph = GRAPHS[options.backend]
    for name, hint in (
        ("backbone.json", f"write one with peft_e2vpt.export.export_backbone(model, {str(folder)!r})"),
        (graph, f"write it with export_backbone(model, {str(folder)!r}, format={options.backend!r})"),
        (PROCESSOR, f"write it with AutoImageProcessor.from_pretrained(MODEL).save_pretrained({str(folder)!r})"),
    ):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: {hint}.")
    if not options.adapters.startswith(HUB) and not Path(options.adapters).is_dir():
        raise ValueError(
            f"There is no folder {options.adapters} of adapters: make it, or name a repository, {HUB}OWNER/NAME."
        )
