# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A replica: one copy of the backbone on Ray Serve."""

# Annotations stay objects: Ray copies these classes to other processes.
import asyncio
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from ray import serve
from ray.util.metrics import Counter, Gauge, Histogram

from .classifier import Classified, Classifier, Scores, read_image, scores_of
from .options import Options, Refusal, log
from .scratch import own_folder


STUCK_S = 120.0  # a replica whose batch takes longer is replaced


@serve.deployment
class Backbone:
    """A replica: one copy of the backbone, whose model, bank and store changes are used by one thread alone."""

    def __init__(self, options: Options) -> None:
        self._own = own_folder()
        self._classifier = Classifier(options, self._own)
        self._options = options
        self._id = serve.get_replica_context().replica_id.unique_id
        self._model = ThreadPoolExecutor(1, "model")
        self._decoders = ThreadPoolExecutor(2, "decode")
        self._busy_since: float | None = None
        self._answered = 0
        self._batch.set_max_batch_size(options.max_batch)
        self._batch.set_batch_wait_timeout_s(options.batch_wait_ms / 1000)
        self._outcomes = Counter("adapters_images", "Images by the status of the answer.", ("status",))
        self._sizes = Histogram("adapters_batch_size", "Images in a batch.", [1, 2, 4, 8, 16, 32, 64, 128])
        self._mixed = Histogram("adapters_per_batch", "Adapters in a batch.", [1, 2, 4, 8, 16, 32, 64, 128])
        self._seconds = Histogram("adapters_batch_seconds", "Time of a batch.", [0.01, 0.03, 0.1, 0.3, 1, 3, 10])
        self._loaded = Gauge("adapters_loaded", "Adapters that a replica knows.")
        self._refused = Gauge("adapters_refused", "Files in the store that a replica refused.")
        self._bytes = Gauge("adapters_bytes", "Memory for adapters.")
        self._polling = asyncio.get_running_loop().create_task(self._poll())

    async def _on_model(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._model, function, *arguments)

    async def _poll(self) -> None:
        """Follows the store without being asked, so that adapters are loaded before they are asked for."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.run_in_executor(self._decoders, self._classifier.store.pull)
                await self._on_model(self._classifier.bank.follow)
                bank = self._classifier.bank
                self._loaded.set(len(bank.versions))
                self._refused.set(len(bank.refused))
                self._bytes.set(bank.adapters.nbytes)
            except Exception:
                log.exception("The adapters could not be followed; the next try is in %s s.", self._options.poll_s)
            await asyncio.sleep(self._options.poll_s)

    def __del__(self) -> None:
        if hasattr(self, "_own"):
            shutil.rmtree(self._own, ignore_errors=True)

    def check_health(self) -> None:
        """Serve replaces a replica that raises here."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > STUCK_S:
            raise RuntimeError(f"A batch has been running for more than {STUCK_S} s.")
        if self._polling.done():
            raise RuntimeError("The adapters are not followed any more.")

    @serve.batch
    async def _batch(self, names: list[str], pixels: list[np.ndarray]) -> list[Any]:
        return await self._on_model(self._classify, names, pixels)

    def _classify(self, names: list[str], pixels: list[np.ndarray]) -> list[Classified | Refusal]:
        self._busy_since = start = time.monotonic()
        try:
            return self._classifier.classify(names, pixels)
        finally:
            self._busy_since = None
            self._seconds.observe(time.monotonic() - start)
            self._sizes.observe(len(names))
            self._mixed.observe(len(set(names)))

    def _decode(self, data: bytes, name: str) -> np.ndarray:
        if not self._classifier.bank.known(name):
            self._classifier.store.pull(asked=True)
        return self._classifier.pixels_of(read_image(data, self._options.max_pixels))

    async def predict(self, name: str, data: bytes, top_k: int, function: Scores) -> Any:
        """Answers with an `Answer` as a dict, or with a `Refusal`; as values, since Ray wraps exceptions."""
        try:
            pixels = await asyncio.get_running_loop().run_in_executor(self._decoders, self._decode, data, name)
            outcome = await self._batch(name, pixels)
        except Refusal as refusal:
            outcome = refusal
        self._outcomes.inc(1, {"status": str(outcome.status if isinstance(outcome, Refusal) else 200)})
        if isinstance(outcome, Refusal):
            return outcome
        self._answered += 1
        scores = scores_of(outcome.logits, function)
        best = np.argsort(-scores, kind="stable")[:top_k]
        predictions = [{"label": outcome.labels[place], "score": float(scores[place])} for place in best]
        return {"adapter": name, "version": outcome.version, "replica": self._id, "predictions": predictions}

    async def change(self, what: Literal["put", "delete", "adapters"], *arguments: Any) -> Any:
        """Runs a method of the `Classifier` that reads or changes adapters, between two batches."""
        try:
            return await self._on_model(getattr(self._classifier, what), *arguments)
        except Refusal as refusal:
            return refusal

    async def health(self) -> dict[str, Any]:
        bank, layout = self._classifier.bank, self._classifier.layout
        return {
            "status": "ok",
            "model": layout.model,
            "fingerprint": layout.fingerprint,
            "backend": self._options.backend,
            "adapters": len(bank.versions),
            "refused": len(bank.refused),
            "adapter_bytes": bank.adapters.nbytes,
            "answered": self._answered,
            "replica": self._id,
            "pid": os.getpid(),
        }
