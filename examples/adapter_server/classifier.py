# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A backbone, its image processor and its adapters: what a replica does, without Ray."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoImageProcessor

from peft_e2vpt.export import read_adapter

from .bank import FollowingBank, version_of
from .options import BASE, GRAPHS, Options, Refusal, check_files, log
from .store import open_store


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # of those that Pillow reads, what needs no other program
Arrays = dict[str, np.ndarray]
Runner = Callable[[np.ndarray, Arrays], np.ndarray]
Scores = Literal["softmax", "sigmoid", "none"]


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
        check_files(options)
        self.options, self.folder = options, Path(options.backbone)
        self.store = open_store(options.adapters, options.poll_s)
        self.bank = FollowingBank(
            self.folder,
            self.store,
            own,
            max_bytes=int(options.adapter_memory_mb * 2**20),
            max_file=int(options.max_adapter_mb * 2**20),
        )
        self.layout = self.bank.adapters.layout
        if list(self.layout.images) != ["pixel_values"] or "logits" not in self.layout.outputs:
            taken, given = ", ".join(self.layout.images), ", ".join(self.layout.outputs)
            raise ValueError(f"This server classifies images, but the graph takes {taken} and gives {given}.")
        self.processor = AutoImageProcessor.from_pretrained(self.folder)
        self.run = open_graph(self.folder, options.backend, options.threads)
        blank = self.pixels_of(Image.new("RGB", (64, 64)))
        logits = self.run(blank[None], self.bank.adapters.inputs([BASE]))  # warms up, too
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
        if self.layout.per_sample_heads:
            parts = [places] if places else []
        else:  # one head for the whole batch
            parts = [[p for p in places if names[p] == name] for name in dict.fromkeys(names[p] for p in places)]
        for part in parts:
            answers = self._logits([names[p] for p in part], [pixels[p] for p in part])
            for place, answer in zip(part, answers, strict=True):
                outcomes[place] = answer
        return outcomes

    def _logits(self, names: list[str], pixels: list[np.ndarray]) -> list[Classified | Refusal]:
        try:
            batch = self.bank.adapters.batch(names)
            rows = self.run(np.stack(pixels), batch.inputs)
        except Exception as error:
            if len(names) == 1:
                log.exception("The adapter %s does not run.", names[0])
                return [Refusal(500, f"The adapter {names[0]} does not run: {error}")]
            log.warning("A batch of %d does not run, so its images run one by one: %s", len(names), error)
            return [self._logits([name], [image])[0] for name, image in zip(names, pixels, strict=True)]
        return [
            Classified(labels, logits, self.bank.versions.get(name, ""))
            if np.isfinite(logits).all()
            else Refusal(500, f"The adapter {name} gives scores that are not finite for this image.")
            for name, labels, logits in zip(names, batch.labels, batch.split(rows), strict=True)
        ]

    def _unknown(self, name: str) -> Refusal:
        reason = f" Its file was refused: {self.bank.refused[name]}" if name in self.bank.refused else ""
        return Refusal(404, f"There is no adapter {name}; GET /adapters lists those that there are.{reason}")

    def put(self, name: str, data: bytes) -> dict[str, Any]:
        """Checks an exported adapter, and writes it to the store."""
        self._check_writable()
        labels: list[str] = []

        def check(path: Path) -> None:
            rows = read_adapter(self.layout, path)
            room = self.bank.adapters.max_bytes
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
                {"name": name, "version": version, "labels": list(self.bank.adapters.labels(name))}
                for name, version in sorted(self.bank.versions.items())
            ],
            "refused": dict(sorted(self.bank.refused.items())),
        }
