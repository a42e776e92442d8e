# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What tests of `examples/serve.py` share: an exported backbone, files of adapters, and what they answer offline."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoImageProcessor, ViTImageProcessorPil

from peft_e2vpt.export import AdapterBank, export_adapter, export_backbone
from tests.support.paths import EXAMPLES, ROOT
from tests.support.processes import free_port
from tests.support.several import DIFFERENT, with_adapters


def export(folder: Path, *formats: str) -> Path:
    """The tiny ViT under `backbone`, with an image processor, and its adapters under `exported`."""
    model, _ = with_adapters("vit", DIFFERENT)
    for format in formats:
        export_backbone(model, folder / "backbone", format=format)
    for name in DIFFERENT:
        export_adapter(model, name, folder / "exported" / f"{name}.safetensors")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "backbone")
    return folder


def variant(file: Path, seed: int, folder: Path) -> Path:
    """A copy of an exported adapter with other values."""
    generator = np.random.default_rng(seed)
    with safe_open(file, framework="np") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        metadata = opened.metadata()
    for name, tensor in tensors.items():
        tensors[name] = tensor + generator.normal(0, 0.5, tensor.shape).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file.stem}-{seed}.safetensors"
    save_file(tensors, path, metadata)
    return path


def version_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def put(file: Path, store: Path, name: str) -> None:
    """Puts a file into a folder as everybody should: under its name it is whole at once."""
    part = store / f".{name}.part"
    part.write_bytes(file.read_bytes())
    part.replace(store / f"{name}.safetensors")


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 56, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Offline:
    """The exported graph without a server, one image and one file of an adapter at a time."""

    def __init__(self, backbone: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(backbone / "backbone.onnx", options)
        self._bank = AdapterBank(backbone)
        self._processor = AutoImageProcessor.from_pretrained(backbone)

    def logits(self, image: bytes, file: Path | None) -> dict[str, float]:
        """The logits by class; without a file, those of the base model."""
        name = "__base__"
        if file is not None:
            name = str(file)
            if name not in self._bank:
                self._bank.add(name, file)
        pixels = self._processor(Image.open(io.BytesIO(image)).convert("RGB"), return_tensors="np")["pixel_values"]
        (row,) = self._session.run(["logits"], {"pixel_values": pixels, **self._bank.inputs([name])})[0]
        return dict(zip(self._bank.labels(name), row.tolist(), strict=True))


class Running:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, metrics: str, log: Path) -> None:
        self.process, self.url, self.metrics, self._log = process, url, metrics, log
        self._asked_to_end = False

    @property
    def log(self) -> str:
        return self._log.read_text()

    def pids(self, deployment: str) -> set[int]:
        """The processes of the replicas of a deployment."""
        title = f"ray::ServeReplica:adapters:{deployment}"
        found = set()
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if child.cmdline()[:1] and child.cmdline()[0].startswith(title):
                    found.add(child.pid)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def ask_to_end(self) -> None:
        """Once: a second signal ends the server at once."""
        if not self._asked_to_end:
            self.process.send_signal(signal.SIGTERM)
        self._asked_to_end = True


@contextmanager
def server(*arguments: Any, log: Path) -> Iterator[Running]:
    """Runs `python examples/serve.py` until the block is left; it is up when the block begins."""
    port, metrics = free_port(), free_port()
    command = [sys.executable, str(EXAMPLES / "serve.py"), *map(str, arguments), "--port", str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--metrics-port", str(metrics)], cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
        )
    running = Running(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics", log)
    try:
        deadline = time.monotonic() + 120
        while "Ready: " not in running.log:
            assert process.poll() is None and time.monotonic() < deadline, running.log[-6000:]
            time.sleep(0.2)
        yield running
        running.ask_to_end()
        assert process.wait(60) == 0, running.log[-6000:]
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            for child in [*children, psutil.Process(process.pid)]:
                child.kill()
            process.wait()


def eventually(holds: Any, seconds: float = 30.0) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if holds():
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    return False
