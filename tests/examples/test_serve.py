# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Pieces of `examples/serve.py` without a server: uploads, images, requests that are tried again, commands, client."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image


serve = pytest.importorskip("serve", reason="needs the extra `serve`")
from adapter_server.classifier import FORMATS, read_image, scores_of  # noqa: E402
from adapter_server.ingress import Ingress, body_of  # noqa: E402
from adapter_server.options import Options, Refusal  # noqa: E402
from fastapi import HTTPException, Request  # noqa: E402
from ray.exceptions import ActorDiedError, RayActorError  # noqa: E402
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary  # noqa: E402
from ray.serve.exceptions import BackPressureError  # noqa: E402
from serve_client import Client, ServerError, bytes_of  # noqa: E402


# -------------------------------------------------------------------------------------------------- uploads and images


def body(parts: list[bytes], *, limit_mb: float = 1, **headers: str) -> bytes:
    """What the server reads of a request whose body comes in parts."""
    ahead = iter(parts)

    async def receive() -> dict[str, Any]:
        part = next(ahead, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": encoded}
    return asyncio.run(body_of(Request(scope, receive), limit_mb))


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
    image = read_image(file.getvalue(), 1000)
    assert image.mode == "RGB" and image.size == (20, 10)


def test_a_photograph_that_was_taken_upright_is_read_upright():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif)
    assert read_image(file.getvalue(), 1000).size == (10, 20)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")  # 50 kB, and 1.2 GB as RGB
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    for limit in (1000, 10**12):  # Pillow's own limit holds where ours is beyond it
        with pytest.raises(Refusal, match="pixels") as error:
            read_image(file.getvalue(), limit)
        assert error.value.status == 413


@pytest.mark.parametrize("kind", FORMATS)
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
            assert read_image(bytes(garbled), 10**6).mode == "RGB"
        except Refusal as refusal:
            assert refusal.status in (400, 413, 415)


def test_scores_are_those_of_the_pipelines_of_transformers():
    logits = np.array([2.0, -1.0, 1000.0], np.float32)
    assert scores_of(logits, "softmax").tolist() == pytest.approx([0, 0, 1])
    assert scores_of(logits, "sigmoid").tolist() == pytest.approx([0.880797, 0.268941, 1], abs=1e-5)
    assert scores_of(logits, "none").tolist() == [2, -1, 1000]


# ------------------------------------------------------------------------------------------------ ingress and commands


class Replicas:
    """Answers calls with what is in a list; exceptions of Ray are raised."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.predict = self.change = self.health = self

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
    made = object.__new__(Ingress.func_or_class)
    made._options, made._backbone = Options(backbone="none"), Replicas(*outcomes)
    made._draining, made._retried, made._rejected = False, Counted(), Counted()
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
    with pytest.raises(HTTPException, match="3 died over it") as error:
        asked(made)
    assert error.value.status_code == 503 and len(made._backbone.outcomes) == 6


def test_the_health_of_a_busy_server_is_no_failure():
    made = ingress(BUSY, {"status": "ok"}, DIED)
    assert [asyncio.run(made.health())["status"] for _ in range(2)] == ["busy", "ok"]
    with pytest.raises(HTTPException, match="503"):
        asyncio.run(made.health())


def test_a_request_beyond_the_queue_is_asked_to_come_back():
    with pytest.raises(HTTPException) as error:
        asked(ingress(BUSY, "answer"))
    assert error.value.status_code == 503 and error.value.headers["Retry-After"] == "1"


def test_what_a_replica_refuses_is_the_status_of_the_answer():
    with pytest.raises(HTTPException, match="no such") as error:
        asked(ingress(Refusal(404, "no such")))
    assert error.value.status_code == 404


def test_a_deletion_whose_replica_died_after_it_is_done():
    assert asked(ingress(DIED, Refusal(404, "gone")), "change", "delete", "a") is None
    with pytest.raises(HTTPException):
        asked(ingress(Refusal(404, "gone")), "change", "delete", "a")


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
    assert options == Options(
        backbone=str(tmp_path), adapters=str(tmp_path), replicas="3", read_only="true", max_queued="7"
    )
    of_cluster = {"backbone": str(tmp_path), "adapters": str(tmp_path), "replicas": "3", "max_queued": "7"}
    application = call_user_app_builder_with_args_if_necessary(serve.build, of_cluster)  # as `serve run` does
    deployments = {bound.name: bound for bound in _deployments(application)}
    assert deployments["Backbone"].num_replicas == 3 and deployments["Backbone"].max_queued_requests == 7
    # requests that the backbone refuses for want of room never wait in front of the ingress
    assert deployments["Ingress"].max_ongoing_requests > 3 * deployments["Backbone"].max_ongoing_requests + 7


def _deployments(application: Any) -> list[Any]:
    ingress_of = application._bound_deployment
    inner = [value for value in ingress_of.init_args if hasattr(value, "_bound_deployment")]
    return [ingress_of, *(value._bound_deployment for value in inner)]


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


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "P", "L"])
def test_the_client_sends_images_of_all_modes_upright(mode):
    image = Image.new(mode, (20, 10))
    image.getexif()[0x0112] = 6  # turned by a quarter
    assert read_image(bytes_of(image), 1000).size == (10, 20)
