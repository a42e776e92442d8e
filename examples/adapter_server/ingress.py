# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The ingress: takes requests over HTTP, bounds them, and sees to it that each gets an answer."""

# Annotations stay objects: FastAPI reads them in other processes, where it cannot look up names.
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as InPath
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.util.metrics import Counter
from starlette.formparsers import MultiPartException, MultiPartParser

from .classifier import Scores
from .options import BASE, NAME, Options, Refusal, log


ATTEMPTS = 3  # of a request whose replicas die, one after another


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
        raise self._busy(f"No replica has answered this request; {deaths} died over it.")

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
        """Says what a replica has loaded, or that all are busy; 503 when there is none, or the server ends."""
        if self._draining:
            raise self._busy("The server ends.")
        try:
            health: dict[str, Any] = await asyncio.wait_for(self._backbone.health.remote(), 10)
        except BackPressureError:
            return {"status": "busy"}
        except (RayActorError, DeploymentUnavailableError, asyncio.TimeoutError, TimeoutError) as error:
            raise self._busy("No replica has answered within 10 s.") from error
        return health
