# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Serves one exported backbone with any number of adapters, on one machine or on a Ray cluster.

```bash
pip install -e ".[serve]"
python examples/serve.py exported/ --adapters adapters/ --replicas 2   # this machine; Ctrl-C drains and ends it
serve run examples.serve:build backbone=/data/exported adapters=/data/adapters replicas=8   # a running Ray cluster
curl --data-binary @photo.jpg 'http://localhost:8000/predict/pets?top_k=3'
```

`exported/` is what `peft_e2vpt.export.export_backbone` wrote, with the settings of the image processor beside it
(`processor.save_pretrained("exported")`). `adapters/` holds what `export_adapter` wrote, `NAME.safetensors` each, and
may change while the server runs. The pages `/docs` and `/openapi.json` describe the API; docs/serving_adapters.md, all
the rest.

The ingress takes requests, bounds them, and hands them to replicas of the backbone. Replicas share nothing but the
folder of adapters. Each of them decodes images, gathers them into batches whatever their adapters are, and looks at
the files of these adapters before every batch, so that an answer is that of the store when its batch began.
"""

# Annotations stay objects: Ray copies these classes to other processes, where FastAPI cannot look up names.
import argparse
import asyncio
import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

import numpy as np
import ray
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as InPath
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.formparsers import MultiPartException, MultiPartParser


log = logging.getLogger("ray.serve")  # Serve writes it to the files of the replica, and to the driver's output
APP = "adapters"
BASE = "__base__"  # the model without an adapter
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
SUFFIX = ".safetensors"
HUB = "hf://"
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # of those that Pillow reads, what needs no other program
GRAPHS = {"onnx": "backbone.onnx", "torch": "backbone.pt2"}
PROCESSOR = "preprocessor_config.json"
ATTEMPTS = 3  # of a request whose replicas die, one after another
OWN = "served-adapters-"
_locks: list[IO[str]] = []  # held while this process lives
STUCK_S = 120.0  # a replica whose batch takes longer is replaced


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


# ----------------------------------------------------------------------------------------------------------- the store


class FolderStore:
    """A folder with a file `NAME.safetensors` for each adapter, on this machine or shared by many."""

    writable = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pull(self, *, asked: bool = False) -> None:
        """Brings what is new: a folder is always up to date."""

    def put(self, name: str, data: bytes, check: Callable[[Path], object]) -> bool:
        """
        Writes an adapter, of which nobody sees a part.

        Args:
            name (`str`): Of the adapter; a former one is replaced.
            data (`bytes`): What `export_adapter` wrote.
            check (`Callable`): Raises for a file that must not enter.

        Returns:
            `bool`: Whether the name is new.
        """
        path = self.folder / f"{name}{SUFFIX}"
        part = self.folder / f".{name}.{uuid.uuid4().hex}.part"
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            check(part)
            is_new = not path.exists()
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return is_new

    def delete(self, name: str) -> bool:
        """Deletes an adapter; returns whether there was one."""
        try:
            (self.folder / f"{name}{SUFFIX}").unlink()
        except FileNotFoundError:
            return False
        return True


class HubStore:
    """The files `NAME.safetensors` of a repository of the Hugging Face Hub."""

    writable = False

    def __init__(self, repo_id: str, revision: str | None, poll_s: float) -> None:
        self.repo_id, self.revision, self._poll_s = repo_id, revision, poll_s
        self._lock = threading.Lock()
        self._pulled_at = -np.inf
        self.folder = Path()
        self.pull()

    def pull(self, *, asked: bool = False) -> None:
        """Brings what is new, at most every 60 polls, or every 10 when asked; without a connection, all stays."""
        from huggingface_hub import snapshot_download

        with self._lock:
            if time.monotonic() - self._pulled_at < self._poll_s * (10 if asked else 60):
                return
            try:
                folder = snapshot_download(self.repo_id, revision=self.revision, allow_patterns=f"*{SUFFIX}")
                self.folder = Path(folder)
            except Exception as error:  # of the network, the Hub or the disk; those of a first pull are the caller's
                if self.folder == Path():
                    raise ValueError(f"The adapters of {HUB}{self.repo_id} cannot be read: {error}") from error
                log.warning("%s%s cannot be reached, its adapters stay: %s", HUB, self.repo_id, error)
            self._pulled_at = time.monotonic()


Store = FolderStore | HubStore


def open_store(address: str, poll_s: float) -> Store:
    """
    Opens a folder, or the repository in `hf://OWNER/NAME[@REVISION]`.

    Raises:
        ValueError: There is none.
    """
    if address.startswith(HUB):
        repo_id, _, revision = address.removeprefix(HUB).partition("@")
        return HubStore(repo_id, revision or None, poll_s)
    if not Path(address).is_dir():
        raise ValueError(f"There is no folder {address} of adapters: make it, or name a repository, {HUB}OWNER/NAME.")
    return FolderStore(Path(address).resolve())


def version_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


class Bank:
    """
    The adapters of one replica, which follow a store.

    Each version of a file is copied to a folder of the replica's own before it is read, so that nothing changes under
    a version that is in use. A damaged file is refused, and the former version stays. Only one thread may use it.

    Args:
        backbone (`Path`): Folder that `export_backbone` wrote.
        store (`Store`): Where adapters come from.
        own (`Path`): A folder for copies.
        max_bytes (`int`): Memory for adapters.
        max_file (`int`): Size of a file, beyond which it is refused.

    Attributes:
        bank (`AdapterBank`): What is loaded.
        versions (`dict[str, str]`): A hash of the file of each adapter.
        refused (`dict[str, str]`): Why a file was not taken, by its name.
    """

    def __init__(self, backbone: Path, store: Store, own: Path, *, max_bytes: int, max_file: int) -> None:
        from peft_e2vpt.export import AdapterBank

        self.bank = AdapterBank(backbone, max_bytes=max_bytes)
        self.store, self._own, self._max_file = store, own, max_file
        self.versions: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self._seen: dict[str, tuple[int, ...]] = {}
        self._is_there = True

    def follow(self, names: Iterable[str] | None = None) -> None:
        """Brings adapters to what the store has now: those of some names, or all."""
        folder = self.store.folder
        is_there = folder.is_dir()
        if not is_there and self._is_there:
            log.error("The folder of adapters %s is gone; those that are loaded stay.", folder)
        self._is_there = is_there
        if not is_there:
            return
        if names is None:
            found = {path.name.removesuffix(SUFFIX) for path in folder.glob(f"[!.]*{SUFFIX}")}
            names = found | self._seen.keys()
        for name in sorted(names):
            if name != BASE:
                self._follow(name, folder / f"{name}{SUFFIX}")

    def _follow(self, name: str, path: Path) -> None:
        try:
            status = path.stat()
            seen = (status.st_ino, status.st_size, status.st_mtime_ns)
            if seen == self._seen.get(name):
                return
            self._take(name, path, status.st_size)
        except FileNotFoundError:
            self._forget(name)
            return
        except (OSError, ValueError) as error:
            former = "the former one stays" if name in self.versions else "there is no former one"
            log.warning("The adapter %s is refused, %s: %s", name, former, error)
            self.refused[name] = str(error).replace(str(self._own), str(path.parent))
        else:
            self.refused.pop(name, None)
        self._seen[name] = seen

    def _take(self, name: str, path: Path, size: int) -> None:
        if not re.fullmatch(NAME, name):
            raise ValueError(f"{name!r} is no name of an adapter: use letters, digits, '.', '_' and '-', at most 64.")
        if size > self._max_file:
            raise ValueError(f"{path.name} has {size:,} bytes, more than the {self._max_file:,} of an adapter.")
        data = path.read_bytes()
        version = version_of(data)
        if version == self.versions.get(name):
            return
        copy = self._own / f"{name}.{version}{SUFFIX}"
        try:
            copy.write_bytes(data)
            self.bank.add(name, copy)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
        self._drop_copy(name)
        self.versions[name] = version
        log.info("The adapter %s is loaded, version %s.", name, version)

    def _forget(self, name: str) -> None:
        self._seen.pop(name, None)
        self.refused.pop(name, None)
        if name in self.versions:
            self.bank.remove(name)
            self._drop_copy(name)
            del self.versions[name]
            log.info("The adapter %s is removed.", name)

    def _drop_copy(self, name: str) -> None:
        if name in self.versions:
            (self._own / f"{name}.{self.versions[name]}{SUFFIX}").unlink(missing_ok=True)

    def known(self, name: str) -> bool:
        return name == BASE or name in self.versions

    def labels(self, name: str) -> tuple[str, ...]:
        """The classes of an adapter; empty for a base model that names none."""
        labels: tuple[str, ...] = self.bank.labels(name)
        return labels


def own_folder() -> Path:
    """Makes a folder for this process, and removes those of processes that were killed: nobody locks them any more."""
    for lock in Path(tempfile.gettempdir()).glob(f"{OWN}*/lock"):
        with suppress(OSError), lock.open() as file:  # locked by a process that lives, or removed meanwhile
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
    folder = Path(tempfile.mkdtemp(prefix=OWN))
    _locks.append((folder / "new").open("w"))
    fcntl.flock(_locks[-1], fcntl.LOCK_EX)
    (folder / "new").rename(folder / "lock")  # only now can others see it
    return folder


# ----------------------------------------------------------------------------------------------------------- the model

Arrays = dict[str, np.ndarray]
Runner = Callable[[np.ndarray, Arrays], np.ndarray]


def open_graph(folder: Path, backend: str, threads: int) -> Runner:
    """Loads a graph; what it returns runs images (B, 3, height, width) with the inputs of a bank to logits (B, C)."""
    if backend == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(folder / GRAPHS[backend], options, ["CPUExecutionProvider"])
        return lambda images, adapters: session.run(["logits"], {"pixel_values": images, **adapters})[0]
    import torch

    torch.set_num_threads(threads)
    module = torch.export.load(folder / GRAPHS[backend]).module()

    @torch.inference_mode()
    def run(images: np.ndarray, adapters: Arrays) -> np.ndarray:
        tensors = {name: torch.from_numpy(array) for name, array in adapters.items()}
        return module({"pixel_values": torch.from_numpy(images)}, tensors)["logits"].numpy()

    return run


def read_image(data: bytes, max_pixels: int) -> Image.Image:
    """
    Decodes an image as `transformers` does: upright, in RGB.

    Raises:
        Refusal: It is none, is of a format that is not read, is damaged, or has too many pixels.
    """
    if not data:
        raise Refusal(400, "The request has no image: send one as the body, or as a field of a multipart form.")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise Refusal(413, f"The image has {width} x {height} pixels; at most {max_pixels:,} are taken.")
        return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise Refusal(415, f"This is no image that is read here: send one as {', '.join(FORMATS)}.") from error
    except Image.DecompressionBombError as error:
        raise Refusal(413, f"The image has too many pixels: {error}") from error
    except Refusal:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise Refusal(400, f"The image is damaged: {error}") from error


class Prediction(BaseModel):
    label: str
    score: float


class Answer(BaseModel):
    """
    Attributes:
        adapter (`str`): The one that was asked for.
        version (`str`): A hash of its file; empty for `"__base__"`.
        replica (`str`): Which replica answered.
        predictions (`list[Prediction]`): The most likely classes, best first.
    """

    adapter: str
    version: str
    replica: str
    predictions: list[Prediction]


Scores = Literal["softmax", "sigmoid", "none"]


def scores_of(logits: np.ndarray, function: Scores) -> np.ndarray:
    logits = logits.astype(np.float64)
    if function == "softmax":
        exponentials = np.exp(logits - logits.max())
        return exponentials / exponentials.sum()
    return 1 / (1 + np.exp(-logits)) if function == "sigmoid" else logits


class Classified(NamedTuple):
    labels: tuple[str, ...]
    logits: np.ndarray  # (C,)
    version: str


class Classifier:
    """
    A backbone, its image processor and its adapters: what a replica is, without Ray.

    Raises:
        ValueError: The folder of the backbone lacks something, or the graph is none of a classifier of images.
    """

    def __init__(self, options: Options, own: Path) -> None:
        from transformers import AutoImageProcessor

        check_files(options)
        self.options, self.folder = options, Path(options.backbone)
        self.store = open_store(options.adapters, options.poll_s)
        self.bank = Bank(
            self.folder,
            self.store,
            own,
            max_bytes=int(options.adapter_memory_mb * 2**20),
            max_file=int(options.max_adapter_mb * 2**20),
        )
        self.layout = self.bank.bank.layout
        if list(self.layout.images) != ["pixel_values"] or "logits" not in self.layout.outputs:
            taken, given = ", ".join(self.layout.images), ", ".join(self.layout.outputs)
            raise ValueError(f"This server classifies images, but the graph takes {taken} and gives {given}.")
        self.processor = AutoImageProcessor.from_pretrained(self.folder)
        self.run = open_graph(self.folder, options.backend, options.threads)
        blank = self.pixels_of(Image.new("RGB", (64, 64)))
        logits = self.run(blank[None], self.bank.bank.inputs([BASE]))  # warms up, too
        if logits.ndim != 2:
            raise ValueError(f"This server classifies images, but the logits of the graph have shape {logits.shape}.")
        self.bank.follow()

    def pixels_of(self, image: Image.Image) -> np.ndarray:
        """The input of the graph, (3, height, width)."""
        pixels = np.asarray(self.processor(image, return_tensors="np")["pixel_values"][0], np.float32)
        wanted = tuple(self.layout.images["pixel_values"])
        if pixels.shape != wanted:
            raise ValueError(
                f"The image processor in {self.folder} makes images of {pixels.shape}, but the graph takes {wanted}: "
                f"save the processor of the exported model there, processor.save_pretrained({str(self.folder)!r})."
            )
        return pixels

    def classify(self, names: Sequence[str], pixels: Sequence[np.ndarray]) -> list[Classified | Refusal]:
        """Answers a batch with what the store has now; one bad adapter spoils the answers of no other."""
        self.bank.follow(set(names))
        outcomes: list[Any] = [None if self.bank.known(name) else self._unknown(name) for name in names]
        places = [place for place, outcome in enumerate(outcomes) if outcome is None]
        parts = [places]
        if not self.layout.per_sample_heads:  # one head for the whole batch
            parts = [[p for p in places if names[p] == name] for name in dict.fromkeys(names[p] for p in places)]
        for part in filter(None, parts):
            for place, outcome in zip(
                part, self._logits([names[p] for p in part], [pixels[p] for p in part]), strict=True
            ):
                outcomes[place] = outcome
        return outcomes

    def _logits(self, names: list[str], pixels: list[np.ndarray]) -> list[Classified | Refusal]:
        try:
            rows = self.run(np.stack(pixels), self.bank.bank.inputs(names))
        except Exception as error:
            if len(names) == 1:
                log.exception("The adapter %s does not run.", names[0])
                return [Refusal(500, f"The adapter {names[0]} does not run: {error}")]
            log.warning("A batch of %d does not run, so its images run one by one: %s", len(names), error)
            return [self._logits([name], [image])[0] for name, image in zip(names, pixels, strict=True)]
        return [self._classified(name, row) for name, row in zip(names, rows, strict=True)]

    def _classified(self, name: str, row: np.ndarray) -> Classified | Refusal:
        labels = self.bank.labels(name) or tuple(str(number) for number in range((row > -np.inf).sum()))
        logits = row[: len(labels)]
        if not np.isfinite(logits).all():
            return Refusal(500, f"The adapter {name} gives scores that are not finite for this image.")
        return Classified(labels, logits, self.bank.versions.get(name, ""))

    def _unknown(self, name: str) -> Refusal:
        reason = f" Its file was refused: {self.bank.refused[name]}" if name in self.bank.refused else ""
        return Refusal(404, f"There is no adapter {name}; GET /adapters lists those that there are.{reason}")

    def put(self, name: str, data: bytes) -> dict[str, Any]:
        """Checks an exported adapter, and writes it to the store."""
        from peft_e2vpt.export import read_adapter

        self._check_writable()
        labels: list[str] = []

        def check(path: Path) -> None:
            rows = read_adapter(self.layout, path)
            room = self.bank.bank.max_bytes
            if room is not None and rows.nbytes > room:
                raise ValueError(f"{path} takes {rows.nbytes:,} bytes, more than the {room:,} of a replica.")
            labels.extend(rows.labels)

        try:
            is_new = self.store.put(name, data, check)
        except ValueError as error:
            raise Refusal(422, re.sub(r"\S*\.part", "The file", str(error))) from error
        except OSError as error:
            raise Refusal(500, f"The store cannot be written to: {error.strerror}.") from error
        self.bank.follow([name])
        return {"created": is_new, "name": name, "version": version_of(data), "labels": labels}

    def delete(self, name: str) -> None:
        self._check_writable()
        try:
            existed = self.store.delete(name)
        except OSError as error:
            raise Refusal(500, f"The store cannot be written to: {error.strerror}.") from error
        if not existed:
            raise self._unknown(name)
        self.bank.follow([name])

    def _check_writable(self) -> None:
        if self.options.read_only:
            raise Refusal(405, "This server takes no changes of adapters over HTTP.")
        if not self.store.writable:
            raise Refusal(405, f"Adapters come from {self.options.adapters}: change that repository instead.")

    def adapters(self) -> dict[str, Any]:
        """What is loaded, and what was refused."""
        self.bank.follow()
        return {
            "adapters": [
                {"name": name, "version": version, "labels": list(self.bank.labels(name))}
                for name, version in sorted(self.bank.versions.items())
            ],
            "refused": dict(sorted(self.bank.refused.items())),
        }


# --------------------------------------------------------------------------------------------------------- deployments


@serve.deployment
class Backbone:
    """A replica: one copy of the backbone, whose model, bank and store changes are used by one thread alone."""

    def __init__(self, options: Options) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

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
                self._bytes.set(bank.bank.nbytes)
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
            "adapter_bytes": bank.bank.nbytes,
            "answered": self._answered,
            "replica": self._id,
            "pid": os.getpid(),
        }


api = FastAPI(
    title="Adapters on one backbone",
    description="Classifies images with the adapter of your choice. Send images as raw bodies or multipart forms.",
    version="1",
)
AdapterName = Annotated[str, InPath(pattern=f"^{NAME}$", description="Letters, digits, '.', '_' and '-', at most 64.")]
NameOrBase = Annotated[str, InPath(pattern=f"^({NAME}|{BASE})$", description=f"`{BASE}` is the model without any.")]
BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM = {"schema": {"type": "object", "required": ["file"], "properties": {"file": BINARY["schema"]}}}


def upload_of(kind: str) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: BINARY, "multipart/form-data": FORM}}}


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    said = {
        400: "The image or the form is damaged",
        404: "No such adapter",
        405: "The store cannot be written to",
        413: "Too large",
        415: "No image of a known format",
        503: "Too many requests are waiting, or the server ends: try again after `Retry-After` seconds",
    }
    return {status: {"description": said[status]} for status in (*statuses, 503)}


async def body_of(request: Request, limit_mb: float) -> bytes:
    """
    Reads an upload, of which no more than the limit is ever held.

    Raises:
        HTTPException: It is too large, or a form without a file.
    """
    limit = int(limit_mb * 2**20)
    too_large = HTTPException(413, f"The upload is larger than the limit of {limit_mb:g} MB.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    data = b"".join(parts)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return data

    async def once() -> AsyncIterator[bytes]:
        yield data
        yield b""  # the end, as a stream of Starlette has it

    try:
        form = await MultiPartParser(request.headers, once(), max_files=1).parse()
    except (MultiPartException, KeyError) as error:
        raise HTTPException(400, f"The form is damaged: {getattr(error, 'message', error)}") from error
    for value in form.values():
        if not isinstance(value, str):
            return await value.read()
    raise HTTPException(400, "The form has no file: send it as the field `file`.")


@serve.deployment
@serve.ingress(api)
class Ingress:
    """Takes requests, and sees to it that each gets an answer."""

    def __init__(self, options: Options, backbone: Any) -> None:
        self._options, self._backbone = options, backbone
        self._under_way, self._draining = 0, False
        from ray.util.metrics import Counter

        self._retried = Counter("adapters_retries", "Requests that were tried again because a replica died.")
        self._rejected = Counter("adapters_rejected", "Requests answered with 503.")

    async def drain(self) -> tuple[str, int]:
        """Refuses requests from now on; returns which ingress this is, and how many requests are under way."""
        self._draining = True
        return serve.get_replica_context().replica_id.unique_id, self._under_way

    @asynccontextmanager
    async def _accepted(self) -> AsyncIterator[None]:
        if self._draining:
            raise self._busy("The server ends.")
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    def _busy(self, detail: str) -> HTTPException:
        self._rejected.inc()
        return HTTPException(503, detail, {"Retry-After": "1"})

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """
        Calls a replica; when it dies, another one.

        Raises:
            HTTPException: What the replica refuses, or 503 with `Retry-After`.
        """
        deaths, deadline = 0, time.monotonic() + self._options.timeout_s
        while deaths < ATTEMPTS and time.monotonic() < deadline:
            try:
                outcome = await getattr(self._backbone, method).remote(*arguments)
            except BackPressureError as error:
                if not deaths:  # else it was accepted before its replica died
                    raise self._busy("Too many requests are waiting.") from error
            except (RayActorError, DeploymentUnavailableError) as error:
                deaths += 1
                self._retried.inc()
                log.warning("The replica of a request is gone, attempt %d: %s", deaths, error)
            else:
                if not isinstance(outcome, Refusal):
                    return outcome
                if deaths and outcome.status == 404 and arguments[:1] == ("delete",):
                    return None  # the replica that died had deleted it
                raise HTTPException(outcome.status, outcome.detail)
            await asyncio.sleep(0.2)
        raise self._busy(f"{deaths} replicas died over this request.")

    @api.post("/predict/{adapter}", openapi_extra=upload_of("image/*"), responses=answers(400, 404, 413, 415))
    async def predict(
        self,
        adapter: NameOrBase,
        request: Request,
        top_k: Annotated[int, Query(ge=1, description="How many classes to name.")] = 5,
        function: Annotated[Scores, Query(description="From logits to scores.")] = "softmax",
    ) -> Answer:
        """Classifies an image, sent as the body or as the field `file` of a form."""
        async with self._accepted():
            data = await body_of(request, self._options.max_image_mb)
            return Answer(**await self._ask("predict", adapter, data, top_k, function))

    @api.get("/adapters", responses=answers())
    async def list_adapters(self) -> dict[str, Any]:
        """Lists the adapters with their classes and versions, and files that were refused with the reason."""
        async with self._accepted():
            return await self._ask("change", "adapters")

    @api.put(
        "/adapters/{adapter}",
        status_code=201,
        openapi_extra=upload_of("application/octet-stream"),
        responses={200: {"description": "A former one was replaced"}, **answers(400, 405, 413)},
    )
    async def put_adapter(self, adapter: AdapterName, request: Request, response: Response) -> dict[str, Any]:
        """Adds or replaces an adapter: the file that `export_adapter` wrote. It is checked before it enters."""
        async with self._accepted():
            data = await body_of(request, self._options.max_adapter_mb)
            outcome = await self._ask("change", "put", adapter, data)
        if not outcome.pop("created"):
            response.status_code = 200
        return outcome

    @api.delete("/adapters/{adapter}", status_code=204, responses=answers(404, 405))
    async def delete_adapter(self, adapter: AdapterName) -> None:
        """Deletes an adapter from the store; answers under way are still given."""
        async with self._accepted():
            await self._ask("change", "delete", adapter)

    @api.get("/healthz", responses=answers())
    async def health(self) -> dict[str, Any]:
        """Says what one of the replicas has loaded; 503 when there is none, or the server ends."""
        if self._draining:
            raise self._busy("The server ends.")
        try:
            return await asyncio.wait_for(self._ask("health"), 10)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise self._busy("No replica has answered within 10 s.") from error


def check_files(options: Options) -> None:
    """
    Checks what can be checked without loading anything.

    Raises:
        ValueError: A file is missing.
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
    if not options.adapters.startswith(HUB):
        open_store(options.adapters, options.poll_s)


def build(options: Options) -> serve.Application:
    """
    The application, as `serve run examples.serve:build NAME=VALUE ...` takes it.

    Raises:
        ValueError: The folder of the backbone lacks a file, or there is no folder of adapters.
    """
    check_files(options)
    waiting = 2 * options.max_batch  # in a replica: a batch that runs, and one that gathers
    room = options.replicas * waiting + options.max_queued
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    backbone = Backbone.options(
        num_replicas=options.replicas,
        max_ongoing_requests=waiting,
        max_queued_requests=options.max_queued,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.timeout_s,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": options.threads, "runtime_env": {"env_vars": threads}},
    ).bind(options)
    # It has room for more than the backbone takes, so that 503 comes from there, with `Retry-After`.
    return Ingress.options(
        num_replicas=options.ingresses,
        max_ongoing_requests=room + 256,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=2 * options.timeout_s,
        ray_actor_options={"num_cpus": 0},
    ).bind(options, backbone)


# -------------------------------------------------------------------------------------------------------- command line


def parse(arguments: Sequence[str]) -> tuple[Options, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("backbone", help=Options.model_fields["backbone"].description)
    for name, field in Options.model_fields.items():
        if name != "backbone":
            how: dict[str, Any] = {"action": "store_true"} if field.annotation is bool else {"default": field.default}
            about = field.description or ""
            parser.add_argument("--" + name.replace("_", "-"), help=f"{about}; default {field.default}", **how)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all; default 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--metrics-port", type=int, help="port of Prometheus metrics; default: any free one")
    parser.add_argument("--address", default="local", help="of a running Ray cluster; default: a Ray of its own")
    parsed = parser.parse_args(arguments)
    try:
        options = Options(**{name: getattr(parsed, name) for name in Options.model_fields})
        check_files(options)
    except ValueError as error:
        parser.error(str(error))
    return options, parsed


def drain(options: Options) -> None:
    """Waits until all requests that were accepted have their answers; new ones are refused."""
    under_way: dict[str, int] = {}
    deadline = time.monotonic() + options.timeout_s
    ingress = serve.get_app_handle(APP)
    while (len(under_way) < options.ingresses or any(under_way.values())) and time.monotonic() < deadline:
        name, number = ingress.drain.remote().result(timeout_s=10)  # of any of them
        under_way[name] = number
        time.sleep(0.05)
    time.sleep(1)  # the last answers are on their way through Serve's proxies


def main() -> None:
    options, parsed = parse(sys.argv[1:])
    ended = threading.Event()

    def end(*_: Any) -> None:
        ended.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)  # a second one ends at once

    if parsed.address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own: dict[str, Any] = {
            "num_cpus": max(os.cpu_count() or 1, options.replicas * options.threads),
            "object_store_memory": 200 * 2**20,
            "include_dashboard": False,
            "_metrics_export_port": parsed.metrics_port,
        }
    else:
        own = {}
    ray.init(address=parsed.address, **own)
    try:
        free = int(ray.cluster_resources().get("CPU", 0))
        if options.replicas * options.threads > free:
            wanted = f"{options.replicas} replicas of {options.threads} threads"
            sys.exit(f"{wanted} need {options.replicas * options.threads} CPUs, but the cluster has {free}.")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        where = "EveryNode" if own == {} else "HeadOnly"
        http = {"host": parsed.host, "port": parsed.port, "request_timeout_s": 2 * options.timeout_s}
        serve.start(proxy_location=where, http_options=http)
        try:
            serve.run(build(options), name=APP)
        except RuntimeError as error:
            sys.exit(f"The server does not start; the reason is the last error above. {error}")
        print(f"Ready: http://{parsed.host}:{parsed.port}/docs", flush=True)
        ended.wait()
        print("Draining: requests under way get their answers, new ones 503.", flush=True)
        drain(options)
        serve.shutdown()
    except KeyboardInterrupt:
        sys.exit("Ended at once: requests under way are lost.")
    finally:
        ray.shutdown()
    print("Ended.", flush=True)


if __name__ == "__main__":
    main()
