# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`python examples/serve.py` as its users meet it: over HTTP, with changes, too much work, deaths and an end."""

from __future__ import annotations

import io
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image


pytest.importorskip("ray.serve", reason="needs the extra `serve`")
pytest.importorskip("onnxscript", reason="needs the extra `serve`")
from serve_client import Client, ServerError  # noqa: E402

from tests.support.served import (  # noqa: E402
    Offline,
    Running,
    eventually,
    export,
    picture,
    put,
    server,
    variant,
    version_of,
)


pytestmark = pytest.mark.processes
IMAGE = picture(0)
LIMIT_MB, MAX_PIXELS = 0.5, 1_000_000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("files"), "onnx", "torch")


@pytest.fixture(scope="module")
def offline(files: Path) -> Offline:
    return Offline(files / "backbone")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Path:
    folder = tmp_path_factory.mktemp("store")
    for file in (files / "exported").iterdir():
        put(file, folder, file.stem)
    return folder


@pytest.fixture(scope="module", params=["onnx", pytest.param("torch", marks=pytest.mark.slow)])
def running(
    request: pytest.FixtureRequest, files: Path, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """One replica, with small limits, for each back end. Quick runs start this one server alone, with ONNX."""
    small = ["--max-image-mb", LIMIT_MB, "--max-adapter-mb", 1, "--max-pixels", MAX_PIXELS]
    queue = ["--max-batch", 4, "--max-queued", 4, "--poll-s", 0.3]
    arguments = [files / "backbone", "--adapters", store, "--backend", request.param, *small, *queue]
    with server(*arguments, log=tmp_path_factory.mktemp("log") / "log") as started:
        yield started


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.url, patience_s=30) as opened:
        yield opened


def scores(predictions: Any) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in predictions}


def logits_of(answer: dict[str, Any]) -> dict[str, float]:
    return scores(answer["predictions"])


def test_answers_are_those_of_the_exported_graph(client, files, offline):
    for name in ("a", "b", "pruned", "kv", "zeroed", "__base__"):
        file = None if name == "__base__" else files / "exported" / f"{name}.safetensors"
        answer = client.answer(IMAGE, name, top_k=99, function="none")
        assert logits_of(answer) == pytest.approx(offline.logits(IMAGE, file), abs=1e-4)
        assert answer["version"] == ("" if file is None else version_of(file))


def test_the_client_is_used_like_a_pipeline(client, tmp_path):
    (tmp_path / "photo.png").write_bytes(IMAGE)
    one = client(tmp_path / "photo.png", "a", top_k=2)
    assert len(one) == 2 and one[0]["score"] >= one[1]["score"]
    several = client([IMAGE, Image.open(io.BytesIO(IMAGE)), tmp_path / "photo.png"], ["a", "b", "a"], top_k=2)
    for predictions in (several[0], several[2]):
        assert scores(predictions) == pytest.approx(scores(one), abs=1e-5)
    assert len(several) == 3 and scores(several[1]) != pytest.approx(scores(one), abs=1e-3)
    assert sum(entry["score"] for entry in client(IMAGE, "a", top_k=99)) == pytest.approx(1)
    with pytest.raises(ValueError, match="2 images, but 1 adapters"):
        client([IMAGE, IMAGE], ["a"])


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (2000, 2000)).save(file, "PNG")
    return file.getvalue()


def garbled(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, kind)
    return file.getvalue()[:-1000]


@pytest.mark.parametrize(
    "request_of, status, said",
    [
        (("POST", "/predict/nope", {"content": IMAGE}), 404, "GET /adapters"),
        (("POST", "/predict/_a", {"content": IMAGE}), 422, "pattern"),
        (("POST", "/predict/a?top_k=0", {"content": IMAGE}), 422, "top_k"),
        (("POST", "/predict/a?function=cosine", {"content": IMAGE}), 422, "softmax"),
        (("POST", "/predict/a", {"content": b""}), 400, "no image"),
        (("POST", "/predict/a", {"content": b"words"}), 415, "PNG"),
        (("POST", "/predict/a", {"content": b"%!PS-Adobe-3.0 EPSF-3.0\n"}), 415, "PNG"),
        (("POST", "/predict/a", {"content": garbled("PNG")}), 400, "damaged"),
        (("POST", "/predict/a", {"content": garbled("JPEG")}), 400, "damaged"),
        (("POST", "/predict/a", {"content": bomb()}), 413, "2000 x 2000 pixels"),
        (("POST", "/predict/a", {"content": b"0" * 600_000}), 413, "0.5 MB"),
        (("POST", "/predict/a", {"content": iter([b"0" * 300_000] * 3)}), 413, "0.5 MB"),  # of unknown length
        (("POST", "/predict/a", {"data": {"file": "text"}, "files": {"x": ("", b"")}}), 400, "no file"),
        (
            ("POST", "/predict/a", {"content": IMAGE, "headers": {"Content-Type": "multipart/form-data"}}),
            400,
            "form is damaged",
        ),
        (("PUT", "/adapters/new", {"content": b"words"}), 422, "cannot be read"),
        (("PUT", "/adapters/.new", {"content": b"words"}), 422, "pattern"),
        (("PUT", "/adapters/new", {"content": b"0" * 1_100_000}), 413, "1 MB"),
        (("DELETE", "/adapters/nope", {}), 404, "nope"),
        (("DELETE", "/adapters/__base__", {}), 422, "pattern"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(running, request_of, status, said):
    method, path, arguments = request_of
    if "content" in arguments and not isinstance(arguments["content"], bytes):
        arguments = {"content": iter([b"0" * 300_000] * 3)}
    answer = httpx.request(method, running.url + path, timeout=30, **arguments)
    assert answer.status_code == status and said in answer.text, answer.text


def test_an_image_may_come_in_a_form(running):
    answer = httpx.post(f"{running.url}/predict/a", files={"file": ("a.png", IMAGE, "image/png")}, timeout=30)
    assert answer.status_code == 200, answer.text


def test_adapters_come_change_and_go_over_http(client, files, offline, store, tmp_path):
    for seed, kind in enumerate(("a", "pruned")):
        file = variant(files / "exported" / f"{kind}.safetensors", seed, tmp_path)
        assert client.add("changing", file)["version"] == version_of(file)
        answer = client.answer(IMAGE, "changing", top_k=99, function="none")
        assert logits_of(answer) == pytest.approx(offline.logits(IMAGE, file), abs=1e-4)
        assert client.adapters()["changing"]["version"] == answer["version"] == version_of(file)
    client.remove("changing")
    with pytest.raises(ServerError, match="404"):
        client.answer(IMAGE, "changing")
    assert "changing" not in client.adapters() and not list(store.glob("*changing*"))


def test_adapters_come_change_and_go_with_the_folder(running, client, files, store, tmp_path):
    loaded = client.health()["adapters"]
    first, second = (variant(files / "exported" / "b.safetensors", seed, tmp_path) for seed in (1, 2))
    put(first, store, "dropped")
    assert eventually(lambda: client.health()["adapters"] == loaded + 1, 10), "it is loaded without being asked for"
    assert client.answer(IMAGE, "dropped")["version"] == version_of(first)
    (store / "dropped.safetensors").write_bytes(second.read_bytes()[:-9])  # half-written
    assert client.answer(IMAGE, "dropped")["version"] == version_of(first)
    refused = client.request("GET", "/adapters")["refused"]
    assert "cannot be read" in refused["dropped"] and str(store) in refused["dropped"]
    put(second, store, "dropped")
    assert client.answer(IMAGE, "dropped")["version"] == version_of(second)
    assert "dropped" not in client.request("GET", "/adapters")["refused"]
    (store / "dropped.safetensors").unlink()
    with pytest.raises(ServerError, match="404"):
        client.answer(IMAGE, "dropped")
    assert eventually(lambda: "the former one stays" in running.log, 10)


def test_the_api_and_the_state_of_the_server_are_published(running, client):
    paths = client.request("GET", "/openapi.json")["paths"]
    assert set(paths) == {"/predict/{adapter}", "/adapters", "/adapters/{adapter}", "/healthz"}
    assert {"200", "400", "404", "413", "415", "422", "503"} <= set(paths["/predict/{adapter}"]["post"]["responses"])
    assert httpx.get(f"{running.url}/docs").status_code == 200
    health = client.health()
    assert health["model"] == "ViTForImageClassification" and health["pid"] in running.pids("Backbone")


def test_metrics_tell_images_batches_and_adapters(running, client):
    client([picture(seed) for seed in range(8)], "a")
    wanted = ("ray_adapters_images", "ray_adapters_batch_size", "ray_adapters_loaded", "ray_serve_")
    assert eventually(lambda: all(name in httpx.get(running.metrics).text for name in wanted), 30)


def test_beyond_the_queue_requests_are_asked_to_come_back_and_the_others_are_answered(running):
    with httpx.Client(timeout=60, limits=httpx.Limits(max_connections=None)) as http, ThreadPoolExecutor(96) as pool:
        answers = list(pool.map(lambda n: http.post(f"{running.url}/predict/a", content=picture(n)), [0] * 96))
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 503} and counts[200] >= 12, counts
    assert all(answer.headers["Retry-After"] == "1" for answer in answers if answer.status_code == 503)
    with Client(running.url, patience_s=60, workers=32) as patient:  # who comes back gets an answer
        assert len(patient([IMAGE] * 64, "a")) == 64


def test_a_visitor_who_leaves_disturbs_nobody(running, client):
    for _ in range(10):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{running.url}/predict/a", content=IMAGE, timeout=httpx.Timeout(10, read=0.001))
    assert client(IMAGE, "a")


@pytest.mark.slow
def test_an_end_loses_no_request_that_was_accepted(files, store, tmp_path):
    """Each gets its answer. Later ones get 503, then 404 or a broken connection while Ray ends, then no connection."""
    outcomes: list[tuple[float, float, Any]] = []
    with server(files / "backbone", "--adapters", store, "--max-batch", 2, log=tmp_path / "log") as running:

        def visit(number: int) -> None:
            outcome: Any = None
            while outcome != "no connection":
                start = time.monotonic()
                try:
                    answer = httpx.post(f"{running.url}/predict/a", content=picture(number), timeout=60)
                    outcome = answer.status_code
                    assert outcome != 503 or answer.headers["Retry-After"]
                except httpx.ConnectError:
                    outcome = "no connection"
                except httpx.TransportError:
                    outcome = "broken off"
                outcomes.append((start, time.monotonic(), outcome))
                time.sleep(0.0 if outcome == 200 else 0.05)

        with ThreadPoolExecutor(16) as pool:
            visits = [pool.submit(visit, number) for number in range(16)]
            time.sleep(3)
            running.ask_to_end()
            for done in visits:
                done.result()
    counts = Counter(outcome for *_, outcome in outcomes)
    print(dict(counts))
    refusing_from = min(end for _, end, outcome in outcomes if outcome == 503)
    assert {outcome for start, _, outcome in outcomes if start < refusing_from} <= {200, 503}
    assert counts[200] and set(counts) <= {200, 503, 404, "broken off", "no connection"}


@pytest.mark.slow
def test_requests_that_a_replica_has_accepted_are_answered_by_another_one_when_it_is_killed(files, store, tmp_path):
    """With a batch that waits for a second, all are accepted and none is answered when the replica is killed."""
    arguments = ["--adapters", store, "--replicas", 2, "--max-batch", 64, "--batch-wait-ms", 1000]
    with server(files / "backbone", *arguments, log=tmp_path / "log") as running, ThreadPoolExecutor(24) as pool:
        with Client(running.url, patience_s=0) as client:
            client(IMAGE, "a")
            visits = [pool.submit(client.answer, picture(number), "a") for number in range(24)]
            time.sleep(0.6)
            assert not any(visit.done() for visit in visits)
            os.kill(min(running.pids("Backbone")), signal.SIGKILL)
            answers = [visit.result() for visit in visits]
        assert len({answer["replica"] for answer in answers}) == 1
        assert eventually(lambda: "The replica of a request is gone" in running.log, 10)


class History:
    """Which versions the store had of each adapter, and when."""

    def __init__(self) -> None:
        self._changes: dict[str, list[tuple[float, float, str | None]]] = {}
        self.files: dict[str, Path] = {}

    def change(self, name: str, file: Path | None, do: Any) -> None:
        start = time.monotonic()
        version = None if file is None else version_of(file)
        if file is not None:
            self.files[version_of(file)] = file
        changes = self._changes.setdefault(name, [])
        changes.append((start, np.inf, version))
        do()
        changes[-1] = (start, time.monotonic(), version)

    def possible(self, name: str, start: float, end: float) -> set[str | None]:
        """What a request may have met that lasted from `start` to `end`."""
        possible: set[str | None] = set()
        for begun, done, version in self._changes[name]:
            if begun > end:
                break
            if done < start:
                possible.clear()
            possible.add(version)
        return possible


@pytest.mark.slow
def test_two_replicas_with_changes_and_a_death_answer_a_thousand_mixed_requests(files, offline, tmp_path):
    """Every answer is that of a version that the store had while the request ran; none is lost or tried again."""
    store = tmp_path / "store"
    store.mkdir()
    kinds = sorted((files / "exported").iterdir())
    history, chance = History(), random.Random(0)
    names = [f"adapter-{number}" for number in range(64)]
    versions = iter(variant(kinds[seed % len(kinds)], seed, tmp_path / "variants") for seed in range(10_000))
    for name in names:
        file = next(versions)
        history.change(name, file, partial(put, file, store, name))

    arguments = [files / "backbone", "--adapters", store, "--replicas", 2, "--max-batch", 16]
    with server(*arguments, log=tmp_path / "log") as running, Client(running.url, patience_s=0) as client:
        before = running.pids("Backbone")
        assert len(before) == 2
        stopped = threading.Event()
        changes: Counter[str] = Counter()

        def keep_changing() -> None:
            while not stopped.is_set():
                name, how = chance.choice(names[:48]), chance.choice(["put", "folder", "delete", "new"])
                if how == "delete":
                    if not (store / f"{name}.safetensors").exists():
                        continue
                    history.change(name, None, partial(client.remove, name))
                elif how == "folder":
                    file = next(versions)
                    history.change(name, file, partial(put, file, store, name))
                else:
                    file, name = next(versions), f"new-{changes['new']}" if how == "new" else name
                    history.change(name, file, partial(client.add, name, file))
                    names.extend([name] if how == "new" else [])
                changes[how] += 1
                time.sleep(0.02)

        def visit(number: int) -> tuple[str, bytes, float, float, dict[str, Any] | None]:
            if number == 500:
                os.kill(min(before), signal.SIGKILL)
            name, image = random.Random(number).choice(list(names)), picture(number)
            start = time.monotonic()
            try:
                answer = client.answer(image, name, top_k=99, function="none")
            except ServerError as error:
                assert error.status == 404, error
                answer = None
            return name, image, start, time.monotonic(), answer

        changing = threading.Thread(target=keep_changing)
        changing.start()
        try:
            with ThreadPoolExecutor(16) as pool:
                began = time.monotonic()
                visits = list(pool.map(visit, range(1000)))
                lasted = time.monotonic() - began
        finally:
            stopped.set()
            changing.join()
        assert eventually(lambda: len(running.pids("Backbone")) == 2, 60), "the one that died is replaced"
        after = running.pids("Backbone")
        seen = {answer["replica"] for *_, answer in visits if answer}
        retried = running.log.count("The replica of a request is gone")

    assert len(visits) == 1000 and len(after & before) == 1
    for name, image, start, end, answer in visits:
        version = answer["version"] if answer else None
        assert version in history.possible(name, start, end)
        if answer:
            expected = offline.logits(image, history.files[answer["version"]])
            assert logits_of(answer) == pytest.approx(expected, abs=1e-4)
    times = np.array([end - start for _, _, start, end, _ in visits]) * 1000
    missing = sum(answer is None for *_, answer in visits)
    print(
        f"\n1000 requests in {lasted:.1f} s, p50 {np.percentile(times, 50):.0f} ms, "
        f"p99 {np.percentile(times, 99):.0f} ms, longest {times.max():.0f} ms; "
        f"{missing} of removed adapters; changes {dict(changes)}; replicas {seen}, "
        f"{retried} retries"
    )
    assert sum(changes.values()) > 20 and min(changes[how] for how in ("put", "folder", "delete", "new")) > 0
