"""A small local server that speaks as much of the Hub's API as the real client needs to publish and to download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

LARGE = (".safetensors", ".bin", ".png", ".jpg")  # what the Hub keeps outside git


@dataclass
class Repository:
    """One repository: its files, and one number for each commit."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0
    gated: bool = False

    @property
    def sha(self) -> str:
        """Name of the newest commit."""
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1 until `stop`; writing needs the token "secret"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}  # SHA-256 -> content, before and after it is committed
        self.requests: list[str] = []
        self.broken: set[str] = set()  # paths that answer 400
        self.failing = 0  # status that everything is answered with, unless 0
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """Free the port."""
        self.shutdown()
        self.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body = self._body()
        if self.server.failing:
            return self._json({"error": "busy"}, self.server.failing)
        if path in self.server.broken:
            return self._json({"error": "out of order"}, 400)
        if path.startswith("/cdn/"):
            return self._send(200, self.server.uploads[path.removeprefix("/cdn/")])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*found.groups())
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if found and self.command == "GET":
            return self._describe(found[1], found[2])
        if self.headers.get("Authorization") != "Bearer secret" and not path.startswith("/lfs/"):
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            valid = json.loads(body)["content"].startswith("---\n")
            errors = [] if valid else [{"message": "no front matter"}]
            return self._json({"errors": errors, "warnings": []}, 200 if valid else 400)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            return self._preupload(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if path.startswith("/lfs/"):
            self.server.uploads[hashlib.sha256(body).hexdigest()] = body
            return self._send(200)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(found[1], body.splitlines())
        return self._send(404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.server.repositories
        self.server.repositories.setdefault(name, Repository())
        self._json({"url": f"{self.server.url}/{name}"}, 409 if known else 200)

    def _preupload(self, asked: dict[str, Any]) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._json({"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**file, "actions": {"upload": {"href": f"{self.server.url}/lfs/{file['oid']}"}}}
            for file in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, lines: list[bytes]) -> None:
        repository = self.server.repositories[name]
        for line in map(json.loads, lines):
            if line["key"] == "file":
                repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                repository.files[line["value"]["path"]] = self.server.uploads[line["value"]["oid"]]
        repository.commits += 1
        url = f"{self.server.url}/{name}/commit/{repository.sha}"
        self._json({"commitUrl": url, "commitOid": repository.sha, "pullRequestUrl": None})

    def _repository(self, name: str) -> Repository | None:
        """Return a repository, or answer that there is none or that it is closed."""
        repository = self.server.repositories.get(name)
        if repository is None:
            self._send(404, headers={"X-Error-Code": "RepoNotFound"})
        elif repository.gated and self.headers.get("Authorization") != "Bearer secret":
            self._send(403, headers={"X-Error-Code": "GatedRepo"})
        else:
            return repository
        return None

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        if revision not in ("main", repository.sha):
            self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
            return
        commit = {"X-Repo-Commit": repository.sha}
        if path not in repository.files:
            self._send(404, headers={"X-Error-Code": "EntryNotFound", **commit})
            return
        content = repository.files[path]
        if path.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            self.server.uploads.setdefault(digest, content)
            size = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
            elsewhere = f"http://localhost:{self.server.server_port}/cdn/{digest}"  # the Hub sends to another host
            self._send(302, headers={"Location": elsewhere, **size, **commit})
        else:
            self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **commit})

    def _describe(self, name: str, what: str | None) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        if what == "tree":
            self._json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in repository.files.items()
                ]
            )
        else:
            siblings = [{"rfilename": path} for path in repository.files]
            self._json({"id": name, "modelId": name, "sha": repository.sha, "siblings": siblings, "tags": []})


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Set what HF_ENDPOINT, HF_HUB_CACHE and so on set when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
