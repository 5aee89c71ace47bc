"""A small Hub on this machine: enough of its HTTP interface to push to and pull from.

What it answers follows the requests that `huggingface_hub` makes: repositories, branches,
commits as NDJSON, large files by the basic LFS transfer, and downloads with ranges. It can
also misbehave on request.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

TOKEN = "hf_TestTokenOfTheFakeHub"
USER = "someone"
_LARGE = (".onnx", ".npz")

Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: every commit's files, and where each branch is."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        listing = [(path, hashlib.sha1(files[path]).hexdigest()) for path in sorted(files)]
        text = json.dumps([len(self.commits), listing])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        return oid

    @property
    def files(self) -> Files:
        return self.commits[self.branches["main"]]


@dataclass
class FakeHub:
    """The state of the Hub, and what it should do wrong.

    `served` replaces the content of a file on download only; `cut` ends the connection after
    so many bytes of a file; `ignored` is what a `.gitignore` keeps out of commits; `dies_at`
    drops every connection from that request on, `dies_after` from the request for a file on that
    follows so many; `answer_first` answers a method and path first.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    served: Files = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    dies_at: int | None = None
    dies_after: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    answer_first: Callable[[str, str], tuple[int, dict[str, str]] | None] = lambda method, path: (
        None
    )

    def add(self, name: str, files: Files, *, private: bool = False) -> Repo:
        """Put a repository there without any request."""
        repo = self.repos[name] = Repo(private)
        repo.commit("main", files)
        return repo

    def take(self, method: str, path: str) -> bool:
        """Note a request; False if the Hub is gone."""
        with self.lock:
            if self.dies_after is not None and self.dies_at is None:
                wanted = method == "GET" and "/resolve/" in path
                if wanted and len(self.downloads()) >= self.dies_after:
                    self.dies_at = len(self.requests)
            alive = self.dies_at is None or len(self.requests) < self.dies_at
            if alive:
                self.requests.append((method, path))
            return alive

    def downloads(self) -> list[str]:
        """Paths of the files that were downloaded, in order."""
        gets = (path for method, path in self.requests if method == "GET" and "/resolve/" in path)
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in gets]


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Run a Hub on a free port for the length of the block."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve_to(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[FakeHub]:
    """Run a Hub that knows `TOKEN`, for a client that has it and nothing else of its user."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol, to a cloud
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serve() as running:
        yield running


def files_of(folder: Path) -> Files:
    """The files of a folder, as a repository holds them."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


class _Refused(Exception):  # noqa: N818 - an answer, not a fault
    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.headers = {f"X-Error-{key.title()}": value for key, value in headers.items()}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on stderr."""

    def handle_method(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = urlsplit(self.path).path
        if not self.hub.take(self.command, unquote(path)):
            self.close_connection = True
            return
        try:
            if said := self.hub.answer_first(self.command, unquote(path)):
                raise _Refused(said[0], **said[1])
            self.route(path, body)
        except _Refused as refused:
            self.answer(refused.status, b"{}", refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_method  # noqa: N815 - the base class's names

    def route(self, path: str, body: bytes) -> None:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token != TOKEN:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        if parts[0] == "lfs":
            self.hub.large[parts[1]] = body
            self.answer(200)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif parts[0] == "api":
            self.api("/".join(parts[2:4]), parts[4:], body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        else:
            repo = self.repo("/".join(parts[:2]))
            self.resolve(self.at(repo, parts[3]), "/".join(parts[4:]))

    def repo(self, name: str) -> Repo:
        """A repository that this request may see."""
        repo = self.hub.repos.get(name)
        if repo is None:
            raise _Refused(404, code="RepoNotFound")
        if repo.private and not self.headers.get("Authorization"):
            raise _Refused(401, code="RepoNotFound")
        return repo

    def at(self, repo: Repo, revision: str) -> tuple[str, Files]:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise _Refused(404, code="RevisionNotFound")
        return oid, repo.commits[oid]

    def create(self, wanted: dict[str, Any]) -> None:
        self.check_write(wanted["organization"])
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repos:
            self.answer_json({"url": f"{self.hub.url}/{name}"}, 409)
            return
        repo = self.hub.repos[name] = Repo(wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.onnx filter=lfs\n"})
        self.answer_json({"url": f"{self.hub.url}/{name}"})

    def check_write(self, user: str) -> None:
        if not self.headers.get("Authorization"):
            raise _Refused(401, message="Invalid credentials in Authorization header")
        if user != USER:
            raise _Refused(403, message="You don't have the rights")

    def validate(self, card: str) -> None:
        assert card.startswith("---\n")
        fields = yaml.safe_load(card.split("---\n")[1])
        self.answer_json({"errors": [], "warnings": [], "fields": sorted(fields)})

    def api(self, name: str, verb: list[str], body: bytes) -> None:
        repo = self.repo(name)
        if not verb or verb[0] == "revision":
            self.info(name, repo, *self.at(repo, verb[1] if verb else "main"))
            return
        if verb[0] == "tree":
            self.answer_json(_tree(self.at(repo, verb[1])[1]))
            return
        self.check_write(name.split("/")[0])
        if verb[0] == "branch":
            if verb[1] in repo.branches:
                raise _Refused(409)
            repo.branches[verb[1]] = repo.branches["main"]
            self.answer(200)
        elif verb[0] == "preupload":
            self.preupload(self.at(repo, verb[1])[1], json.loads(body))
        else:
            self.commit(name, repo, verb[1], [json.loads(line) for line in body.splitlines()])

    def info(self, name: str, repo: Repo, oid: str, files: Files) -> None:
        siblings = []
        for path, content in files.items():
            item: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": "0" * 40}
            if path.endswith(_LARGE):
                digest = hashlib.sha256(content).hexdigest()
                item["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 130}
            siblings.append(item)
        self.answer_json({"id": name, "sha": oid, "private": repo.private, "siblings": siblings})

    def preupload(self, there: Files, asked: dict[str, Any]) -> None:
        answers = []
        for file in asked["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(_LARGE) else "regular"
            answer = {
                "path": path,
                "uploadMode": mode,
                "shouldIgnore": path in self.hub.ignored,
                "oid": _git_oid(there[path], mode) if path in there else None,
            }
            answers.append(answer)
        self.answer_json({"files": answers})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.large:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(answer)
        self.answer_json({"transfer": "basic", "objects": objects})

    def commit(self, name: str, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> None:
        header, *operations = lines
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != repo.branches[branch]:
            raise _Refused(412, message="A commit has happened since")
        files = dict(repo.commits[repo.branches[branch]])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                del files[value["path"]]
        oid = repo.commit(branch, files)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self.answer_json({"commitUrl": url, "commitOid": oid, "pullRequestUrl": None})

    def resolve(self, found: tuple[str, Files], path: str) -> None:
        oid, files = found
        if path not in files:
            raise _Refused(404, code="EntryNotFound")
        content = files[path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": oid}
        if self.command == "HEAD":
            self.answer(200, content, headers)
            return
        content = self.hub.served.get(path, content)
        start = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") :].split("-")[0])
        end = max(start, self.hub.cut.pop(path, len(content)))
        self.answer(206 if start else 200, content[start:], headers, sent=end - start)

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(
        self,
        status: int,
        content: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        sent: int | None = None,
    ) -> None:
        """Answer; with `sent`, promise all of `content` and end after that many bytes."""
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[:sent])
        if sent is not None and sent < len(content):
            self.close_connection = True


def _tree(files: Files) -> list[dict[str, Any]]:
    """The listing of a commit's files with sizes and hashes."""
    listing = []
    for path, content in files.items():
        item: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
        item["oid"] = _git_oid(content, "regular")
        if path.endswith(_LARGE):
            digest = _git_oid(content, "lfs")
            item["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        listing.append(item)
    return listing


def _git_oid(content: bytes, mode: str) -> str:
    """What the Hub compares an upload with: SHA-256 of large files, git's blob id of others."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
