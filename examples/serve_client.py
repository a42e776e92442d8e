# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A client of `examples/serve.py` that is used like a pipeline of `transformers`.

```python
with Client("http://localhost:8000") as client:
    client.add("pets", "exported/pets.safetensors")
    client("photo.jpg", "pets", top_k=3)  # [{"label": "Beagle", "score": 0.98}, ...]
    client(["a.jpg", "b.jpg"], ["pets", "flowers"])  # a list of these; the server gathers them into batches
```
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageOps


Picture = str | Path | bytes | Image.Image
Predictions = list[dict[str, Any]]


class ServerError(Exception):
    """
    What the server refuses.

    Attributes:
        status (`int`): Of the answer.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status


def bytes_of(image: Picture) -> bytes:
    """An image as a file has it."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        ImageOps.exif_transpose(image).convert("RGB").save(file, "PNG")
        return file.getvalue()
    return Path(image).read_bytes()


class Client:
    """
    Threads may share it.

    Args:
        url (`str`): Of the server.
        patience_s (`float`): How long a request is tried again while the server is busy (503), starts or is replaced.
        timeout_s (`float`): For one try.
        workers (`int`): Requests at a time for a list of images.
    """

    def __init__(self, url: str, *, patience_s: float = 60.0, timeout_s: float = 120.0, workers: int = 16) -> None:
        self._patience_s = patience_s
        self._threads = ThreadPoolExecutor(workers)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=workers)
        self._http = httpx.Client(base_url=url, timeout=httpx.Timeout(timeout_s, connect=5.0), limits=limits)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        self._threads.shutdown()
        self._http.close()

    def request(self, method: str, path: str, **arguments: Any) -> Any:
        """
        Sends a request, again while the server is busy or cannot be reached: all requests may be repeated.

        Returns:
            What the JSON of the answer says, `None` where there is none.

        Raises:
            ServerError: The server refuses it, or stays busy.
            httpx.TransportError: The server cannot be reached.
        """
        deadline, wait = time.monotonic() + self._patience_s, 0.1
        while True:
            try:
                answer = self._http.request(method, path, **arguments)
                if answer.is_success:
                    return answer.json() if answer.content else None
                # What is not of the API comes from Ray's proxy, whose application starts, ends or is replaced.
                passing = answer.status_code == 503 or "json" not in answer.headers.get("Content-Type", "")
                if not passing or time.monotonic() + wait > deadline:
                    raise ServerError(answer.status_code, _detail(answer))
                wait = max(wait, float(answer.headers.get("Retry-After", 0)))
            except httpx.TransportError:
                if time.monotonic() + wait > deadline:
                    raise
            time.sleep(wait)
            wait = min(2 * wait, 5.0)

    def answer(self, image: Picture, adapter: str, *, top_k: int = 5, function: str = "softmax") -> dict[str, Any]:
        """The whole answer to one image: `predictions`, and the `version` of the adapter that gave them."""
        parameters = {"top_k": top_k, "function": function}
        answer: dict[str, Any] = self.request(
            "POST", f"/predict/{adapter}", content=bytes_of(image), params=parameters
        )
        return answer

    def __call__(
        self,
        images: Picture | Sequence[Picture],
        adapter: str | Sequence[str],
        *,
        top_k: int = 5,
        function: str = "softmax",
    ) -> Predictions | list[Predictions]:
        """
        Classifies an image, or several at the same time.

        Args:
            images (`str | Path | bytes | Image.Image`, or a list of these): Paths, contents of files, or images.
            adapter (`str` or `list[str]`): For all images, or one for each; `"__base__"` for none.
            top_k (`int`): How many classes to name.
            function (`str`): From logits to scores: `"softmax"`, `"sigmoid"` or `"none"`.

        Returns:
            The classes with their scores, best first; of several images, a list of these.
        """
        settings: dict[str, Any] = {"top_k": top_k, "function": function}
        if isinstance(images, (str, Path, bytes, Image.Image)):
            if not isinstance(adapter, str):
                raise ValueError("adapter is a list, but there is one image: name one adapter.")
            predictions: Predictions = self.answer(images, adapter, **settings)["predictions"]
            return predictions
        names = [adapter] * len(images) if isinstance(adapter, str) else list(adapter)
        if len(names) != len(images):
            raise ValueError(f"There are {len(images)} images, but {len(names)} adapters: name one for each.")
        answers = self._threads.map(lambda image, name: self.answer(image, name, **settings), images, names)
        return [answer["predictions"] for answer in answers]

    def adapters(self) -> dict[str, dict[str, Any]]:
        """The adapters by name, with their `labels` and `version`."""
        return {entry["name"]: entry for entry in self.request("GET", "/adapters")["adapters"]}

    def add(self, name: str, file: str | Path) -> dict[str, Any]:
        """Adds or replaces an adapter: a file that `export_adapter` wrote."""
        added: dict[str, Any] = self.request("PUT", f"/adapters/{name}", content=Path(file).read_bytes())
        return added

    def remove(self, name: str) -> None:
        """Removes an adapter."""
        self.request("DELETE", f"/adapters/{name}")

    def health(self) -> dict[str, Any]:
        """What one of the replicas has loaded."""
        health: dict[str, Any] = self.request("GET", "/healthz")
        return health


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return answer.text
