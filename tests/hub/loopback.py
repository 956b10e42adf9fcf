"""A Hugging Face Hub on this machine, as much of it as pushing and loading a model need, and faults on demand.

`with Hub() as hub` serves on `hub.url`; hand it to a client process by `client_environment(hub, home)`. Everything that
was asked is in `hub.requests`, what was stored in `hub.repos`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, USER = "hf_" + "LoopbackTokenOfTheTests" * 2, "ada"
"""The token that may write, to repositories of this user and of the organisation `lab`."""
STRANGER = "hf_" + "TokenOfSomeoneElseAtAll" * 2
OWNERS = {TOKEN: (USER, "lab"), STRANGER: ("eve",)}


@dataclass
class Repo:
    """A repository: each branch holds path -> content, and large files are known by their SHA-256."""

    private: bool
    gated: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    log: list[str] = field(default_factory=lambda: ["initial commit"])
    """Messages."""

    def sha(self, branch: str) -> str:
        files = {path: hashlib.sha1(content).hexdigest() for path, content in self.branches[branch].items()}
        return hashlib.sha1(json.dumps([files, self.log]).encode()).hexdigest()

    def find(self, revision: str) -> dict[str, bytes] | None:
        return next((files for name, files in self.branches.items() if revision in (name, self.sha(name))), None)


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


class Hub:
    """The server and what it holds."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        """(method, path) in order."""
        self.headers: list[str] = []
        """User agents and paths, to be searched for secrets."""
        self.uploads: list[str] = []
        """SHA-256 of the large files that arrived whole, in order."""
        self.part_size: int | None = None
        """Bytes of a part, where large files are sent in parts."""
        self.drop: Callable[[int], int | None] = lambda put: None
        """Number of a PUT, from 0 -> bytes after which its connection is dropped."""
        self.puts = 0
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        """A request -> the status that it is refused with."""
        self.role = "write"
        """What the token is for."""
        self.members = "write"
        """What the user may do in the organisation."""
        self.garbled = False
        """Whether answers are no JSON."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> Repo:
        self.repos[name] = Repo(private, gated, {"main": files})
        return self.repos[name]


def client_environment(hub: Hub, home: Path, token: str | None = TOKEN, **more: str) -> dict[str, str]:
    """Of a process that knows no other hub; the variables are read when huggingface_hub is imported."""
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "VIRTUAL_ENV") if key in os.environ}
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"HOME": str(home), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "NO_PROXY": "127.0.0.1"}
    return {**kept, **env, **({} if token is None else {"HF_TOKEN": token}), **more}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append((self.command, self.route))
        self.hub.headers.append(f"{self.path} {self.headers.get('User-Agent')}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.owners = OWNERS.get(token, ())
        for pattern, method, answer in _ROUTES:
            found = re.fullmatch(pattern, self.route)
            if found and self.command in method:
                if (status := self.hub.refuse(self.command, self.route)) is not None:
                    self.fail(status, "", f"refused with {status}")
                elif token and not self.owners:
                    self.fail(401, "", "Invalid credentials in Authorization header")
                else:
                    answer(self, *found.groups())
                return
        self.fail(404, "", f"no route {self.command} {self.route}")

    do_GET = do_HEAD = do_POST = do_PUT = do

    # What the routes are made of.

    def body(self, limit: int | None = None) -> bytes:
        """What was sent, the first `limit` bytes at most."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            size = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(size if limit is None else min(size, limit))
        read = b""
        while size := int(self.rfile.readline().strip(), 16):
            read += self.rfile.read(size)
            self.rfile.readline()
            if limit is not None and len(read) >= limit:
                return read
        self.rfile.readline()
        return read

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def say(self, value: Any, **headers: str) -> None:
        content = b"<html>" if self.hub.garbled else json.dumps(value).encode()
        self.send(200, content, {"Content-Type": "application/json", **headers})

    def fail(self, status: int, code: str, message: str) -> None:
        if self.command in ("POST", "PUT"):
            self.body()
        told = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        self.send(status, json.dumps({"error": message}).encode(), told)

    def repo(self, name: str, *, write: bool = False, read: bool = False) -> Repo | None:
        """The repository, or None after the answer has said why not; `read` also asks for access to its files."""
        repo, owner = self.hub.repos.get(name), name.split("/")[0] in self.owners
        if repo is None or (repo.private and not owner):
            self.fail(404 if self.owners else 401, "RepoNotFound", "Repository not found")
        elif write and not owner:
            self.fail(403, "", f"You don't have the rights to write to {name}")
        elif read and repo.gated and not owner:
            self.fail(403 if self.owners else 401, "GatedRepo", f"Access to model {name} is restricted")
        else:
            return repo
        return None

    def files(self, name: str, revision: str, **access: bool) -> dict[str, bytes] | None:
        if (repo := self.repo(name, **access)) is None:
            return None
        if (files := repo.find(revision)) is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    # The routes.

    def whoami(self) -> None:
        if not self.owners:
            return self.fail(401, "", "Invalid username or password.")
        auth = {"accessToken": {"displayName": "tests", "role": self.hub.role}}
        organisations = [{"name": name, "roleInOrg": self.hub.members} for name in self.owners[1:]]
        return self.say({"type": "user", "name": self.owners[0], "orgs": organisations, "auth": auth})

    def create(self) -> None:
        told = json.loads(self.body())
        owner = told.get("organization") or (self.owners[0] if self.owners else "")
        name = f"{owner}/{told['name']}"
        if owner not in self.owners:
            return self.fail(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        if name in self.hub.repos:
            return self.send(409, json.dumps({"url": f"{self.hub.url}/{name}", "error": "exists"}).encode(), {})
        self.hub.repos[name] = Repo(told.get("private", told.get("visibility") == "private"))
        return self.say({"url": f"{self.hub.url}/{name}"})

    def settings(self, name: str) -> None:
        if (repo := self.repo(name, write=True)) is not None:
            repo.private = json.loads(self.body())["visibility"] == "private"
            self.say({})

    def branch(self, name: str, branch: str) -> None:
        if (repo := self.repo(name, write=True)) is not None:
            self.body()
            if branch in repo.branches:
                return self.send(409, b'{"error": "Reference already exists"}', {})
            repo.branches[branch] = dict(repo.branches["main"])
            self.say({})

    def validate(self) -> None:
        head = re.match(r"---\n(.*?)\n---\n", json.loads(self.body())["content"], re.S)
        told, errors = yaml.safe_load(head[1]) if head else {}, []
        if told.get("base_model_relation", "finetune") not in ("adapter", "finetune", "merge", "quantized"):
            errors.append({"message": '"base_model_relation" must be one of [adapter, finetune, merge, quantized]'})
        if not re.fullmatch(r"[a-z0-9.\-]+", told.get("license", "other")):
            errors.append({"message": '"license" must be a known one'})
        for result in [r for model in told.get("model-index", []) for r in model["results"]]:
            if not ({"type"} <= result["task"].keys() and {"type", "name"} <= result["dataset"].keys()):
                errors.append({"message": '"model-index" lacks a task or a data set'})
        if errors:
            return self.send(400, json.dumps({"errors": errors, "warnings": []}).encode(), {})
        return self.say({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if (files := self.files(name, revision, write=True)) is None:
            return
        answer = []
        for wanted in json.loads(self.body())["files"]:
            path = wanted["path"]
            mode = "lfs" if is_large(path) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None})
            if (there := files.get(path)) is not None:
                answer[-1]["oid"] = _sha256(there) if is_large(path) else _git_oid(there)
        self.say({"files": answer, "commitOid": None})

    def batch(self, name: str) -> None:
        if self.repo(name, write=True) is None:
            return
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(self.body())["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            objects.append({"oid": oid, "size": size})
            if oid in self.hub.blobs:
                continue
            header: dict[str, str] = {}
            href = f"{self.hub.url}/blobs/{oid}"
            if self.hub.part_size is not None:
                count = -(-size // self.hub.part_size)
                header = {"chunk_size": str(self.hub.part_size)}
                header |= {str(part + 1): f"{href}/{part + 1}" for part in range(count)}
            objects[-1]["actions"] = {"upload": {"href": href, "header": header}}
        self.say({"transfer": "basic" if self.hub.part_size is None else "multipart", "objects": objects})

    def put(self, oid: str, part: str | None) -> None:
        limit = self.hub.drop(self.hub.puts)
        self.hub.puts += 1
        content = self.body(limit)
        if limit is not None:
            self.close_connection = True
            self.connection.shutdown(2)
            return
        if part is None:
            self.keep(oid, content)
        else:
            self.hub.parts.setdefault(oid, {})[int(part)] = content
        self.send(200, b"", {"ETag": f'"{_sha256(content)}"'})

    def complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body())["parts"]]
        self.keep(oid, b"".join(self.hub.parts[oid][number] for number in numbers))
        self.say({})

    def keep(self, oid: str, content: bytes) -> None:
        assert _sha256(content) == oid, "a large file that arrived damaged"
        self.hub.blobs[oid] = content
        self.hub.uploads.append(oid)

    def commit(self, name: str, revision: str) -> None:
        if (files := self.files(name, revision, write=True)) is None:
            return
        repo = self.hub.repos[name]
        for line in self.body().splitlines():
            key, value = (told := json.loads(line))["key"], told["value"]
            if key == "header":
                repo.log.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                assert key == "deletedFile", key
                del files[value["path"]]
        sha = repo.sha(next(branch for branch, held in repo.branches.items() if held is files))
        self.say({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def info(self, name: str, revision: str = "main") -> None:
        if (files := self.files(name, revision)) is not None:
            repo = self.hub.repos[name]
            branch = next(branch for branch, held in repo.branches.items() if held is files)
            told = {
                "id": name,
                "sha": repo.sha(branch),
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
            }
            self.say({**told, "siblings": [{"rfilename": path} for path in files], "tags": []})

    def tree(self, name: str, revision: str, *_: str) -> None:
        if (files := self.files(name, revision)) is not None:
            self.say([_entry(path, content) for path, content in files.items()])

    def paths(self, name: str, revision: str) -> None:
        if (files := self.files(name, revision)) is not None:
            wanted = parse_qs(self.body().decode())["paths"]
            self.say([_entry(path, files[path]) for path in wanted if path in files])

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (files := self.files(name, revision, read=True)) is None:
            return None
        if path not in files:
            return self.fail(404, "EntryNotFound", f"Entry not found: {path}")
        repo = self.hub.repos[name]
        branch = next(branch for branch, held in repo.branches.items() if held is files)
        told = {"ETag": f'"{_git_oid(files[path])}"', "X-Repo-Commit": repo.sha(branch)}
        if is_large(path):
            told |= {"X-Linked-Etag": f'"{_sha256(files[path])}"', "X-Linked-Size": str(len(files[path]))}
        return self.send(200, files[path], told)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    if is_large(path):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    return entry


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, tuple[str, ...], Callable[..., None]]] = [
    ("/api/whoami-v2", ("GET",), _Handler.whoami),
    ("/api/repos/create", ("POST",), _Handler.create),
    ("/api/validate-yaml", ("POST",), _Handler.validate),
    (f"/api/models/{_NAME}/settings", ("PUT",), _Handler.settings),
    (f"/api/models/{_NAME}/branch/(.+)", ("POST",), _Handler.branch),
    (f"/api/models/{_NAME}/preupload/(.+)", ("POST",), _Handler.preupload),
    (f"/api/models/{_NAME}/commit/(.+)", ("POST",), _Handler.commit),
    (f"/api/models/{_NAME}/paths-info/(.+)", ("POST",), _Handler.paths),
    (f"/api/models/{_NAME}/tree/([^/]+)(/.*)?", ("GET",), _Handler.tree),
    (f"/api/models/{_NAME}/revision/(.+)", ("GET",), _Handler.info),
    (f"/api/models/{_NAME}", ("GET",), _Handler.info),
    (f"/{_NAME}.git/info/lfs/objects/batch", ("POST",), _Handler.batch),
    (r"/blobs/(\w+)(?:/(\d+))?", ("PUT",), _Handler.put),
    (r"/blobs/(\w+)", ("POST",), _Handler.complete),
    (f"/{_NAME}/resolve/([^/]+)/(.+)", ("GET", "HEAD"), _Handler.resolve),
]
