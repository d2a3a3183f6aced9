"""A Hub of one process: the few HTTP endpoints that ``huggingface_hub`` needs to push a model and to load it again.

Repositories live in memory, as a list of commits of whole files. Small text files arrive inside the commit (base64),
the others through Git LFS: batch request, PUT, commit. Downloads carry the ETag and commit headers that the client's
cache is built on. Clients use it with ``HF_ENDPOINT=<url> HF_HUB_DISABLE_XET=1``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One model repository: its commits, oldest first, each a full map from path to content."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for path in sorted(files):
            digest.update(path.encode() + b"\0" + files[path])
        self.commits.append((digest.hexdigest(), files))
        return digest.hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class HubStandIn:
    """Context manager that serves a Hub at ``url``.

    Attributes:
        repositories: what was pushed, by ``owner/name``.
        lfs: contents that arrived by PUT, by sha256.
        requests: ``METHOD path`` of every request, in order.
        unknown: requests to an endpoint that is not implemented; a test asserts that none concerned its repository.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> HubStandIn:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The files of the newest commit of a repository."""
        return self.repositories[repo_id].commits[-1][1]


Reply = tuple[int, dict[str, str], bytes]


def _json(body: object, status: int = HTTPStatus.OK) -> Reply:
    return status, {"Content-Type": "application/json"}, json.dumps(body).encode()


def _error(status: int, code: str, message: str) -> Reply:
    return status, {"X-Error-Code": code, "X-Error-Message": message}, b""


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _create(hub: HubStandIn, body: bytes) -> Reply:
    wanted = json.loads(body)
    name = "/".join(part for part in (wanted.get("organization") or "me", wanted["name"]))
    url = {"url": f"{hub.url}/{name}", "name": name}
    if name in hub.repositories:
        return _json(url | {"error": "You already created this model repo"}, HTTPStatus.CONFLICT)
    hub.repositories[name] = Repository(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
    return _json(url)


def _validate_yaml(hub: HubStandIn, body: bytes) -> Reply:
    content = json.loads(body)["content"]
    errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
    return _json({"errors": errors, "warnings": []}, HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK)


def _preupload(hub: HubStandIn, body: bytes, repo: str, revision: str) -> Reply:
    large = (".safetensors", ".png", ".bin")
    modes = [
        {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular", "shouldIgnore": False}
        for f in json.loads(body)["files"]
    ]
    return _json({"files": modes})


def _lfs_batch(hub: HubStandIn, body: bytes, repo: str) -> Reply:
    objects = []
    for wanted in json.loads(body)["objects"]:
        entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in hub.lfs:
            entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}", "header": {}}}
        objects.append(entry)
    return _json({"transfer": "basic", "objects": objects})


def _lfs_put(hub: HubStandIn, body: bytes, oid: str) -> Reply:
    if hashlib.sha256(body).hexdigest() != oid:
        return _error(HTTPStatus.BAD_REQUEST, "BadDigest", "content does not match its sha256")
    hub.lfs[oid] = body
    return HTTPStatus.OK, {}, b""


def _commit(hub: HubStandIn, body: bytes, repo: str, revision: str) -> Reply:
    if repo not in hub.repositories:
        return _error(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
    files = dict(hub.files(repo))
    for line in body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            files[value["path"]] = hub.lfs[value["oid"]]
        elif item["key"] == "deletedFile":
            del files[value["path"]]
    oid = hub.repositories[repo].commit(files)
    return _json({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo}/commit/{oid}"})


def _found(hub: HubStandIn, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | Reply:
    if repo not in hub.repositories:
        return _error(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
    commit = hub.repositories[repo].at(revision)
    return commit or _error(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")


def _info(hub: HubStandIn, body: bytes, repo: str, revision: str = "main") -> Reply:
    found = _found(hub, repo, revision)
    if len(found) == 3:
        return found
    oid, files = found
    siblings = [{"rfilename": path, "size": len(content)} for path, content in sorted(files.items())]
    private = hub.repositories[repo].private
    return _json({"id": repo, "modelId": repo, "sha": oid, "private": private, "tags": [], "siblings": siblings})


def _tree(hub: HubStandIn, body: bytes, repo: str, revision: str, folder: str = "") -> Reply:
    found = _found(hub, repo, revision)
    if len(found) == 3:
        return found
    prefix = f"{folder}/" if folder else ""
    entries: list[dict[str, Any]] = []
    for path, content in sorted(found[1].items()):
        if path.startswith(prefix) and "/" not in path.removeprefix(prefix):
            entries.append({"type": "file", "path": path, "oid": _git_blob(content), "size": len(content)})
    if folder and not entries:
        return _error(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{folder} does not exist")
    return _json(entries)


def _resolve(hub: HubStandIn, body: bytes, repo: str, revision: str, path: str) -> Reply:
    found = _found(hub, repo, revision)
    if len(found) == 3:
        return found
    oid, files = found
    if path not in files:
        status, headers, content = _error(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{path} does not exist")
        return status, headers | {"X-Repo-Commit": oid}, content
    return HTTPStatus.OK, {"X-Repo-Commit": oid, "ETag": f'"{_git_blob(files[path])}"'}, files[path]


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Reply]]] = [
    (method, re.compile(pattern), answer)
    for method, pattern, answer in (
        ("POST", r"/api/repos/create", _create),
        ("POST", r"/api/validate-yaml", _validate_yaml),
        ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _preupload),
        ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _commit),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _lfs_put),
        ("GET", rf"/api/models/{_REPO}", _info),
        ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", _info),
        ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(/(?P<folder>.+))?", _tree),
        ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
    )
]


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            status, headers, content = self.route(path, self.body())
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def route(self, path: str, body: bytes) -> Reply:
            method = "GET" if self.command == "HEAD" else self.command
            for wanted, pattern, answer in _ROUTES:
                match = pattern.fullmatch(path)
                if wanted == method and match:
                    given = {name: value for name, value in match.groupdict().items() if value is not None}
                    return answer(hub, body, **given)
            hub.unknown.append(f"{self.command} {path}")
            return _error(HTTPStatus.NOT_FOUND, "EntryNotFound", "not implemented here")

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def log_message(self, format: str, *args: object) -> None:
            """Requests are kept in ``hub.requests``, not written to the terminal."""

    return Handler
