# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A small Hugging Face Hub for tests: models in memory, served over HTTP on this machine.

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
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit


USER = "tester"
DATE = "2026-01-01T00:00:00.000Z"
Files = dict[str, bytes]


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Commits by their hash, branches by their name."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {})

    def commit(self, branch: str, files: Files) -> str:
        name = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def resolve(self, revision: str) -> str | None:
        name = self.branches.get(revision, revision)
        return name if name in self.commits else None


class HubServer:
    """Serves until the `with` block is left.

    Attributes:
        url: what `HF_ENDPOINT` has to be.
        requests: method and path of every request, in their order.
        unknown: those that it had no answer to.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.lock = Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> Files:
        """The files of a repository, by their paths."""
        repository = self.repositories[repo_id]
        name = repository.resolve(revision)
        assert name is not None, f"{repo_id} has no revision {revision}"
        return repository.commits[name]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    # -------------------------------------------------------------------------------------------------------- plumbing
    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, code: str) -> None:
        self.answer({"error": code}, 404, X_Error_Code=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        body = self.body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} /{path}")
            self.route(path.split("/"), body)

    do_GET = do_HEAD = do_POST = handle_request

    # --------------------------------------------------------------------------------------------------------- routing
    def route(self, path: list[str], body: bytes) -> None:
        match (self.command, path):
            case "POST", ["api", "repos", "create"]:
                self.create(json.loads(body))
            case "GET", ["api", "whoami-v2"]:
                self.answer({"name": USER, "type": "user", "orgs": []})
            case "POST", ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case _, ["api", "models", user, name, *rest]:
                self.with_repository(f"{user}/{name}", lambda repo: self.api(f"{user}/{name}", repo, rest, body))
            case "GET" | "HEAD", [user, name, "resolve", revision, *file]:
                self.with_repository(f"{user}/{name}", lambda repo: self.resolve(repo, revision, "/".join(file)))
            case _:
                self.unknown()

    def unknown(self) -> None:
        self.hub.unknown.append(self.hub.requests[-1])
        self.answer({"error": "unknown"}, 404)

    def with_repository(self, repo_id: str, then: Callable[[Repository], None]) -> None:
        if repo_id in self.hub.repositories:
            then(self.hub.repositories[repo_id])
        else:
            self.error("RepoNotFound")

    def create(self, wanted: dict[str, Any]) -> None:
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        status = 409 if repo_id in self.hub.repositories else 200
        self.hub.repositories.setdefault(repo_id, Repository())
        self.answer({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}, status)

    def api(self, repo_id: str, repository: Repository, path: list[str], body: bytes) -> None:
        match (self.command, path):
            case "GET", []:
                self.info(repo_id, repository, "main")
            case "GET", ["revision", revision]:
                self.info(repo_id, repository, revision)
            case "GET", ["tree", revision, *folder]:
                self.tree(repository, revision, "/".join(folder))
            case "POST", ["preupload", _]:
                files = json.loads(body)["files"]
                self.answer(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
                )
            case "POST", ["branch", branch]:
                start = json.loads(body or b"{}").get("startingPoint", "main")
                known = branch in repository.branches
                repository.branches.setdefault(branch, str(repository.resolve(start)))
                self.answer({}, 409 if known else 200)
            case "POST", ["commit", branch]:
                self.commit(repo_id, repository, branch, body)
            case _:
                self.unknown()

    # --------------------------------------------------------------------------------------------------------- answers
    def info(self, repo_id: str, repository: Repository, revision: str) -> None:
        name = repository.resolve(revision)
        if name is None:
            self.error("RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in sorted(repository.commits[name])]
        self.answer(
            {
                "_id": repo_id,
                "id": repo_id,
                "modelId": repo_id,
                "sha": name,
                "private": False,
                "tags": [],
                "siblings": siblings,
                "lastModified": DATE,
            }
        )

    def tree(self, repository: Repository, revision: str, folder: str) -> None:
        name = repository.resolve(revision)
        if name is None:
            self.error("RevisionNotFound")
            return
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            for path, content in sorted(repository.commits[name].items())
            if not folder or path.startswith(folder + "/")
        ]
        if folder and not entries:
            self.error("EntryNotFound")
        else:
            self.answer(entries)

    def commit(self, repo_id: str, repository: Repository, branch: str, body: bytes) -> None:
        parent = repository.resolve(branch)
        if parent is None:
            self.error("RevisionNotFound")
            return
        files = dict(repository.commits[parent])
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                value = operation["value"]
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[operation["value"]["path"]]
        name = repository.commit(branch, files)
        url = f"{self.hub.url}/{repo_id}/commit/{name}"
        self.answer({"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        name = repository.resolve(revision)
        if name is None:
            self.error("RevisionNotFound")
        elif path not in repository.commits[name]:
            self.answer({"error": "EntryNotFound"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=name)
        else:
            content = repository.commits[name][path]
            self.answer(content, ETag=f'"{git_hash(content)}"', X_Repo_Commit=name)
