# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A small Hugging Face Hub for tests: models in memory, served by FastAPI on this machine.

It answers what `huggingface_hub` asks in uploads and downloads. Every file is to be uploaded in the "regular" way,
inside the commit, so neither LFS nor xet is needed.

```python
with HubServer() as hub:
    run(..., env={"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test"})  # the client reads them when it is imported
    hub.files("tester/vit")["README.md"]
```
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from tests.support.paths import ROOT


USER = "tester"
DATE = "2026-01-01T00:00:00.000Z"
Files = dict[str, bytes]


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubError(Exception):
    """What the Hub answers with status 404 and a code, which the client turns into an exception of its own."""

    def __init__(self, code: str, **headers: str) -> None:
        self.answer = JSONResponse({"error": code}, 404, {"X-Error-Code": code, **headers})


@dataclass
class Repository:
    """Commits by their hash, branches by their name."""

    name: str
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {})

    def commit(self, branch: str, files: Files) -> str:
        name = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def resolve(self, revision: str) -> str:
        name = self.branches.get(revision, revision)
        if name not in self.commits:
            raise HubError("RevisionNotFound")
        return name


class HubServer:
    """Serves until the `with` block is left.

    Attributes:
        url: what `HF_ENDPOINT` has to be.
        unknown: method and path of every request that it had no answer to.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.unknown: list[str] = []
        app = FastAPI(exception_handlers={HubError: _answer_error, 404: self._note_unknown, 405: self._note_unknown})
        app.include_router(router)
        app.state.hub = self
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self._thread = Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()  # requests wait in the socket until it listens
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.should_exit = True
        self._thread.join()

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that takes this server for the Hub, and keeps what it downloads in `home`."""
        environment = {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_test",
            "HF_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        environment.pop("HF_HUB_OFFLINE", None)
        return environment

    def files(self, repo_id: str, revision: str = "main") -> Files:
        """The files of a repository, by their paths."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision)]

    async def _note_unknown(self, request: Request, error: Exception) -> Response:
        self.unknown.append(f"{request.method} {request.url.path}")
        return JSONResponse({"error": "unknown"}, 404)


async def _answer_error(request: Request, error: HubError) -> Response:
    return error.answer


# ------------------------------------------------------------------------------------------------------------- routing
# Everything is `async`, so that requests are answered one after another and need no lock.
router = APIRouter()


async def _hub(request: Request) -> HubServer:
    return request.app.state.hub


Hub = Annotated[HubServer, Depends(_hub)]


async def _repository(hub: Hub, user: str, name: str) -> Repository:
    if f"{user}/{name}" not in hub.repositories:
        raise HubError("RepoNotFound")
    return hub.repositories[f"{user}/{name}"]


Repo = Annotated[Repository, Depends(_repository)]
MODEL = "/api/models/{user}/{name}"


@router.post("/api/repos/create")
async def create(hub: Hub, request: Request) -> Response:
    wanted = await request.json()
    repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
    status = 409 if repo_id in hub.repositories else 200
    hub.repositories.setdefault(repo_id, Repository(repo_id))
    return JSONResponse({"url": f"{hub.url}/{repo_id}", "name": repo_id, "id": repo_id}, status)


@router.get("/api/whoami-v2")
async def whoami() -> dict[str, Any]:
    return {"name": USER, "type": "user", "orgs": []}


@router.post("/api/validate-yaml")
async def validate_yaml() -> dict[str, Any]:
    return {"errors": [], "warnings": []}


@router.get(MODEL)
@router.get(MODEL + "/revision/{revision}")
async def info(repo: Repo, revision: str = "main") -> dict[str, Any]:
    name = repo.resolve(revision)
    return {
        "_id": repo.name,
        "id": repo.name,
        "modelId": repo.name,
        "sha": name,
        "private": False,
        "tags": [],
        "siblings": [{"rfilename": path} for path in sorted(repo.commits[name])],
        "lastModified": DATE,
    }


@router.get(MODEL + "/tree/{revision}")
@router.get(MODEL + "/tree/{revision}/{folder:path}")
async def tree(repo: Repo, revision: str, folder: str = "") -> list[dict[str, Any]]:
    entries = [
        {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        for path, content in sorted(repo.commits[repo.resolve(revision)].items())
        if not folder or path.startswith(folder + "/")
    ]
    if folder and not entries:
        raise HubError("EntryNotFound")
    return entries


@router.post(MODEL + "/preupload/{revision}")
async def preupload(repo: Repo, request: Request) -> dict[str, Any]:
    files = (await request.json())["files"]
    return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}


@router.post(MODEL + "/branch/{branch}")
async def make_branch(repo: Repo, branch: str, request: Request) -> Response:
    start = json.loads(await request.body() or b"{}").get("startingPoint", "main")
    known = branch in repo.branches
    repo.branches.setdefault(branch, repo.resolve(start))
    return JSONResponse({}, 409 if known else 200)


@router.post(MODEL + "/commit/{branch}")
async def commit(hub: Hub, repo: Repo, branch: str, request: Request) -> dict[str, Any]:
    files = dict(repo.commits[repo.resolve(branch)])
    for line in (await request.body()).splitlines():
        operation = json.loads(line)
        if operation["key"] == "file":
            value = operation["value"]
            files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "deletedFile":
            del files[operation["value"]["path"]]
    name = repo.commit(branch, files)
    url = f"{hub.url}/{repo.name}/commit/{name}"
    return {"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""}


@router.api_route("/{user}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
async def download(repo: Repo, revision: str, path: str) -> Response:
    name = repo.resolve(revision)
    if path not in repo.commits[name]:
        raise HubError("EntryNotFound", **{"X-Repo-Commit": name})
    content = repo.commits[name][path]
    return Response(content, headers={"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": name})
