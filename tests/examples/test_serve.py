# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The pieces of `examples/serve.py`, without a server."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image


serve = pytest.importorskip("serve", reason="needs the extra `serve`")
from fastapi import HTTPException, Request  # noqa: E402
from ray.exceptions import ActorDiedError, RayActorError  # noqa: E402
from ray.serve.exceptions import BackPressureError  # noqa: E402
from serve_client import Client, ServerError  # noqa: E402

from tests.support.hub_server import HubServer, Repository  # noqa: E402
from tests.support.paths import EXAMPLES, ROOT  # noqa: E402
from tests.support.served import export, picture, put, variant, version_of  # noqa: E402


# -------------------------------------------------------------------------------------------------- uploads and images


def body(parts: list[bytes], *, limit_mb: float = 1, **headers: str) -> bytes:
    """What the server reads of a request whose body comes in parts."""
    ahead = iter(parts)

    async def receive() -> dict[str, Any]:
        part = next(ahead, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": encoded}
    return asyncio.run(serve.body_of(Request(scope, receive), limit_mb))


def test_an_upload_is_what_was_sent():
    assert body([b"one ", b"two"]) == b"one two"


@pytest.mark.parametrize("headers", [{}, {"content_length": "3"}, {"content_length": "much"}])
def test_no_more_of_an_upload_is_read_than_the_limit_whatever_its_length_is_said_to_be(headers):
    read = []

    def parts():
        for _ in range(100):
            read.append(1)
            yield b"0" * 2**20

    with pytest.raises(HTTPException, match="2 MB") as error:
        body(parts(), limit_mb=2, **headers)
    assert error.value.status_code == 413 and len(read) == 3


def test_an_upload_that_says_that_it_is_too_large_is_not_read():
    with pytest.raises(HTTPException, match="413"):
        body(iter(lambda: pytest.fail("it was read"), None), content_length=str(2**21))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "I;16", "CMYK"])
def test_images_of_all_modes_are_read_as_rgb(mode):
    file = io.BytesIO()
    Image.new(mode, (20, 10)).save(file, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
    image = serve.read_image(file.getvalue(), 1000)
    assert image.mode == "RGB" and image.size == (20, 10)


def test_a_photograph_that_was_taken_upright_is_read_upright():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif)
    assert serve.read_image(file.getvalue(), 1000).size == (10, 20)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")  # 50 kB, and 1.2 GB as RGB
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    for limit in (1000, 10**12):  # Pillow's own limit holds where ours is beyond it
        with pytest.raises(serve.Refusal, match="pixels") as error:
            serve.read_image(file.getvalue(), limit)
        assert error.value.status == 413


@pytest.mark.parametrize("kind", serve.FORMATS)
def test_whatever_is_cut_off_or_garbled_is_refused_or_read_but_never_an_error(kind):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    Image.fromarray(noise).save(file, kind)
    whole, chance = file.getvalue(), np.random.default_rng(1)
    for trial in range(60):
        garbled = bytearray(whole[: chance.integers(1, len(whole))] if trial % 2 else whole)
        for place in chance.integers(0, len(garbled), 8):
            garbled[place] = chance.integers(0, 256)
        try:
            assert serve.read_image(bytes(garbled), 10**6).mode == "RGB"
        except serve.Refusal as refusal:
            assert refusal.status in (400, 413, 415)


def test_scores_are_those_of_the_pipelines_of_transformers():
    logits = np.array([2.0, -1.0, 1000.0], np.float32)
    assert serve.scores_of(logits, "softmax").tolist() == pytest.approx([0, 0, 1])
    assert serve.scores_of(logits, "sigmoid").tolist() == pytest.approx([0.880797, 0.268941, 1], abs=1e-5)
    assert serve.scores_of(logits, "none").tolist() == [2, -1, 1000]


# --------------------------------------------------------------------------------------------------- what replicas are


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("files"), "torch")


@pytest.fixture
def store(tmp_path, files) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    put(files / "exported" / "a.safetensors", folder, "a")
    return folder


@pytest.fixture
def classifier(files, store, tmp_path):
    return classifier_of(files, store, tmp_path)


def classifier_of(files, store, tmp_path, **settings):
    own = tmp_path / "own"
    own.mkdir(exist_ok=True)
    options = serve.Options(backbone=str(files / "backbone"), adapters=str(store), backend="torch", **settings)
    return serve.Classifier(options, own)


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """What is logged."""
    found: list[str] = []
    for level in ("warning", "error"):
        monkeypatch.setattr(serve.log, level, lambda text, *values: found.append(text % values))
    return found


def ask(classifier, *names: str) -> list[Any]:
    pixels = classifier.pixels_of(serve.read_image(picture(0), 10**6))
    return classifier.classify(names, [pixels] * len(names))


pieces = pytest.mark.compile


@pieces
def test_an_unknown_adapter_in_a_batch_is_refused_and_the_others_are_answered(classifier):
    known, unknown, base = ask(classifier, "a", "nope", "__base__")
    assert known.version and base.version == ""
    assert unknown.status == 404 and "GET /adapters" in unknown.detail


@pieces
def test_a_batch_that_fails_runs_again_one_by_one(classifier, store, files):
    put(files / "exported" / "b.safetensors", store, "b")
    run, whole = classifier.run, ask(classifier, "a", "b")

    def breaks_with_b(images, adapters):
        if len(images) > 1 or adapters["row_bias"].shape[2] == whole_rows:
            raise RuntimeError("no memory")
        return run(images, adapters)

    whole_rows = classifier.bank.bank.inputs(["b"])["row_bias"].shape[2]
    classifier.run = breaks_with_b
    good, bad = ask(classifier, "a", "b")
    np.testing.assert_allclose(good.logits, whole[0].logits, rtol=1e-4, atol=1e-5)
    assert bad.status == 500 and "b does not run: no memory" in bad.detail


@pieces
def test_scores_that_are_not_finite_are_an_error_of_their_adapter_alone(classifier):
    run = classifier.run

    def overflows(images, adapters):
        logits = run(images, adapters).copy()
        logits[0] = np.nan
        return logits

    classifier.run = overflows
    bad, good = ask(classifier, "a", "a")
    assert bad.status == 500 and "not finite" in bad.detail and np.isfinite(good.logits).all()


@pieces
def test_a_replaced_adapter_of_other_classes_is_answered_with_its_own(classifier, store, files):
    def relabelled(count):
        from safetensors import safe_open
        from safetensors.numpy import load_file, save_file

        source = files / "exported" / "a.safetensors"
        with safe_open(source, framework="np") as file:
            metadata = {**file.metadata(), "labels": json.dumps([f"class {n}" for n in range(count)])}
        tensors = load_file(source)
        for name in tensors:
            if name.startswith("head."):
                tensors[name] = np.resize(tensors[name], (count, *tensors[name].shape[1:]))
        path = store.parent / f"{count}.safetensors"
        save_file(tensors, path, metadata)
        return path

    for count in (2, 9, 3):
        put(relabelled(count), store, "a")
        classified, other = ask(classifier, "a", "__base__")
        assert len(classified.labels) == len(classified.logits) == count and len(other.logits) == 5


@pieces
@pytest.mark.parametrize("damage", ["cut", "words", "empty", "folder", "large"])
def test_a_damaged_file_is_refused_once_and_the_former_adapter_stays(files, store, tmp_path, damage, messages):
    classifier = classifier_of(files, store, tmp_path, max_adapter_mb=0.01)
    (former,) = ask(classifier, "a")
    path = store / "a.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"cut": whole[:-7], "words": b"words", "empty": b"", "large": bytes(20_000)}[damage])
    for _ in range(3):
        classifier.bank.follow()
        (still,) = ask(classifier, "a")
        assert still.version == former.version
        np.testing.assert_array_equal(still.logits, former.logits)
    assert sum("the former one stays" in message for message in messages) == 1
    assert list(classifier.adapters()["refused"]) == ["a"]
    shutil.rmtree(path) if damage == "folder" else path.unlink()
    assert ask(classifier, "a")[0].status == 404


@pieces
def test_a_file_of_another_backbone_or_with_no_name_for_an_adapter_is_refused(classifier, store, files):
    from safetensors.numpy import load_file, save_file

    save_file(load_file(files / "exported" / "a.safetensors"), store / "foreign.safetensors", {"kind": "other"})
    put(files / "exported" / "a.safetensors", store, "with space")
    refused = classifier.adapters()["refused"]
    assert "not an exported adapter" in refused["foreign"] and "no name" in refused["with space"]
    (foreign,) = ask(classifier, "foreign")
    assert foreign.status == 404 and "refused" in foreign.detail and "export_adapter" in foreign.detail


@pieces
def test_adapters_stay_while_their_folder_is_gone(classifier, store, messages):
    store.rename(store.with_name("elsewhere"))
    for _ in range(3):
        classifier.bank.follow()
        assert ask(classifier, "a")[0].version
    assert sum("is gone" in message for message in messages) == 1
    with pytest.raises(serve.Refusal, match="cannot be written to: No such file"):
        classifier.put("b", b"anything")
    store.with_name("elsewhere").rename(store)
    classifier.bank.follow()
    assert ask(classifier, "a")[0].version


@pieces
def test_more_adapters_than_memory_are_answered_from_the_versions_that_were_taken(files, store, tmp_path):
    sources = [variant(files / "exported" / "a.safetensors", seed, tmp_path) for seed in range(6)]
    for seed, source in enumerate(sources):
        put(source, store, f"v{seed}")
    whole = ask(classifier_of(files, store, tmp_path), *[f"v{seed}" for seed in range(6)])
    classifier = classifier_of(files, store, tmp_path, adapter_memory_mb=0.01)
    for seed, expected in enumerate(whole):
        (answer,) = ask(classifier, f"v{seed}")
        assert answer.version == expected.version == version_of(sources[seed])
        np.testing.assert_allclose(answer.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert classifier.bank.bank.nbytes <= 0.01 * 2**20


@pieces
def test_a_replica_keeps_no_copies_of_former_versions(classifier, store, files, tmp_path):
    for seed in range(4):
        put(variant(files / "exported" / "a.safetensors", seed, tmp_path), store, "a")
        ask(classifier, "a")
    assert len(list((tmp_path / "own").iterdir())) == 1
    (store / "a.safetensors").unlink()
    ask(classifier, "a")
    assert not list((tmp_path / "own").iterdir())


@pieces
def test_an_upload_that_is_refused_leaves_nothing_in_the_store(classifier, store, files):
    for data in (b"words", (files / "exported" / "b.safetensors").read_bytes()[:-3]):
        with pytest.raises(serve.Refusal, match="The file cannot be read") as error:
            classifier.put("b", data)
        assert error.value.status == 422
    assert [path.name for path in store.iterdir()] == ["a.safetensors"]


@pieces
def test_a_read_only_server_changes_nothing(files, store, tmp_path):
    classifier = classifier_of(files, store, tmp_path, read_only=True)
    for change in (lambda: classifier.put("b", b""), lambda: classifier.delete("a")):
        with pytest.raises(serve.Refusal, match="no changes"):
            change()


@pieces
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda folder: (folder / "backbone.pt2").unlink(), "has no backbone.pt2: write it with export_backbone"),
        (lambda folder: (folder / "backbone.json").unlink(), "has no backbone.json"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "AutoImageProcessor.from_pretrained"),
        (
            lambda folder: (folder / "preprocessor_config.json").write_text(
                (folder / "preprocessor_config.json").read_text().replace("32", "48")
            ),
            r"makes images of \(3, 48, 48\), but the graph takes \(3, 32, 32\)",
        ),
    ],
)
def test_a_folder_that_lacks_something_is_refused_with_what_to_do(files, store, tmp_path, change, said):
    shutil.copytree(files / "backbone", tmp_path / "copy" / "backbone")
    change(tmp_path / "copy" / "backbone")
    with pytest.raises(ValueError, match=said):
        classifier_of(tmp_path / "copy", store, tmp_path)


def test_a_folder_of_a_process_that_was_killed_is_removed_and_others_are_not(tmp_path):
    code = "import os, serve; print(serve.own_folder(), flush=True); input(); os._exit(1)"
    env = {"PATH": "", "TMPDIR": str(tmp_path), "PYTHONPATH": f"{EXAMPLES}:{ROOT}"}

    def start() -> tuple[subprocess.Popen[str], Path]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", code], env=env, **pipes)
        return process, Path(process.stdout.readline().strip())

    first, of_first = start()
    second, of_second = start()
    assert of_first.is_dir() and of_second.is_dir()
    first.kill()
    first.wait()
    third, of_third = start()
    assert not of_first.exists() and of_second.is_dir() and of_third.is_dir()
    for process in (second, third):
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------------------------------- the Hub

FOLLOW = """
import sys, serve
store = serve.open_store("hf://tester/adapters", 0.0)
for _ in range(3):
    print(*sorted(path.name for path in store.folder.glob("*.safetensors")), flush=True)
    input()
    store.pull(asked=True)
"""


@pytest.mark.processes
def test_adapters_come_from_a_repository_of_the_hub_and_stay_while_it_cannot_be_reached(tmp_path):
    with HubServer() as hub:
        repository = hub.repositories["tester/adapters"] = Repository("tester/adapters")
        repository.commit("main", {"a.safetensors": b"1", "README.md": b""})
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "PATH": ""}
        process = subprocess.Popen(
            [sys.executable, "-c", FOLLOW],
            env={**env, "PYTHONPATH": f"{EXAMPLES}:{ROOT}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline().split() == ["a.safetensors"]
        repository.commit("main", {"b.safetensors": b"2", "c.safetensors": b"3"})
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().split() == ["b.safetensors", "c.safetensors"]
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline().split() == ["b.safetensors", "c.safetensors"]
    process.communicate("\n")
    assert process.returncode == 0


# ------------------------------------------------------------------------------------------------ ingress and commands


class Replicas:
    """Answers calls with what is in a list; exceptions of Ray are raised."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.predict = self.change = self

    async def remote(self, *arguments: Any) -> Any:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, RayActorError | BackPressureError):
            raise outcome
        return outcome


class Counted:
    value = 0

    def inc(self) -> None:
        self.value += 1


def ingress(*outcomes: Any) -> Any:
    made = object.__new__(serve.Ingress.func_or_class)
    made._options, made._backbone = serve.Options(backbone="none"), Replicas(*outcomes)
    made._retried, made._rejected = Counted(), Counted()
    return made


DIED = ActorDiedError()
BUSY = BackPressureError(num_queued_requests=1, max_queued_requests=1)


def asked(made: Any, method: str = "predict", *arguments: Any) -> Any:
    return asyncio.run(made._ask(method, *arguments))


def test_a_request_whose_replica_dies_goes_to_another_one():
    made = ingress(DIED, BUSY, BUSY, DIED, "answer")
    assert asked(made) == "answer" and made._retried.value == 2


def test_a_request_that_kills_every_replica_is_given_up():
    made = ingress(*[DIED] * 9)
    with pytest.raises(HTTPException, match="3 replicas died") as error:
        asked(made)
    assert error.value.status_code == 503 and len(made._backbone.outcomes) == 6


def test_a_request_beyond_the_queue_is_asked_to_come_back():
    with pytest.raises(HTTPException) as error:
        asked(ingress(BUSY, "answer"))
    assert error.value.status_code == 503 and error.value.headers["Retry-After"] == "1"


def test_what_a_replica_refuses_is_the_status_of_the_answer():
    with pytest.raises(HTTPException, match="no such") as error:
        asked(ingress(serve.Refusal(404, "no such")))
    assert error.value.status_code == 404


def test_a_deletion_whose_replica_died_after_it_is_done():
    assert asked(ingress(DIED, serve.Refusal(404, "gone")), "change", "delete", "a") is None
    with pytest.raises(HTTPException):
        asked(ingress(serve.Refusal(404, "gone")), "change", "delete", "a")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere"], "has no backbone.json: write one with"),
        (["nowhere", "--replicas", "0"], "replicas"),
        (["nowhere", "--backend", "caffe"], "'onnx' or 'torch'"),
    ],
)
def test_a_wrong_command_is_told_what_is_wrong_before_anything_starts(arguments, said, capsys):
    with pytest.raises(SystemExit):
        serve.parse(arguments)
    assert said in capsys.readouterr().err


def test_the_command_line_and_a_cluster_take_the_same_options(tmp_path):
    for name in ("backbone.json", "backbone.onnx", "preprocessor_config.json"):
        (tmp_path / name).touch()
    line = [str(tmp_path), "--adapters", str(tmp_path), "--replicas", "3", "--read-only", "--max-queued", "7"]
    options, _ = serve.parse(line)
    assert options == serve.Options(
        backbone=str(tmp_path), adapters=str(tmp_path), replicas="3", read_only="true", max_queued="7"
    )
    application = serve.build(options)
    deployments = {bound.name: bound for bound in _deployments(application)}
    assert deployments["Backbone"].num_replicas == 3 and deployments["Backbone"].max_queued_requests == 7
    # requests that the backbone refuses for want of room never wait in front of the ingress
    assert deployments["Ingress"].max_ongoing_requests > 3 * deployments["Backbone"].max_ongoing_requests + 7


def _deployments(application: Any) -> list[Any]:
    ingress_of = application._bound_deployment
    inner = [value for value in ingress_of.init_args if hasattr(value, "_bound_deployment")]
    return [ingress_of, *(value._bound_deployment for value in inner)]


def test_a_store_that_is_neither_folder_nor_repository_is_refused(tmp_path):
    with pytest.raises(ValueError, match="make it, or name a repository"):
        serve.open_store(str(tmp_path / "none"), 1)


# ---------------------------------------------------------------------------------------------------------- the client


def client_of(*answers: httpx.Response | Exception, patience_s: float = 30) -> tuple[Client, list[httpx.Request]]:
    client, requests, ahead = Client("http://test", patience_s=patience_s), [], iter(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        given = next(ahead)
        if isinstance(given, Exception):
            raise given
        return given

    client._http = httpx.Client(base_url="http://test", transport=httpx.MockTransport(answer))
    return client, requests


GOOD = httpx.Response(200, json={"predictions": []})


def test_the_client_comes_back_while_the_server_is_busy_starts_or_is_replaced(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("serve_client.time.sleep", waits.append)
    busy = httpx.Response(503, json={"detail": "busy"}, headers={"Retry-After": "2"})
    starting = httpx.Response(404, text="Path '/predict/a' not found.")
    client, requests = client_of(httpx.ConnectError("refused"), starting, httpx.ReadError("cut"), busy, GOOD)
    assert client(b"image", "a") == [] and len(requests) == 5 and waits[3] >= 2


def test_the_client_does_not_repeat_what_was_refused():
    client, requests = client_of(httpx.Response(404, json={"detail": "There is no adapter a"}))
    with pytest.raises(ServerError, match="404: There is no adapter a"):
        client(b"image", "a")
    assert len(requests) == 1


def test_the_patience_of_the_client_ends():
    client, _ = client_of(httpx.Response(503, json={"detail": "busy"}), patience_s=0)
    with pytest.raises(ServerError, match="503: busy"):
        client(b"image", "a")
