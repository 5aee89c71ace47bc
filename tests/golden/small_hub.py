"""A hub on this machine that holds one model repository, to be pulled from."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPOSITORY = "someone/small"
_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".onnx", ".npz")


@contextmanager
def serve_repository(folder: Path) -> Iterator[str]:
    """Serve the files of `folder` as `REPOSITORY`; give the address."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    held = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    handler = type("Handler", (_Handler,), {"held": held})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    held: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith(f"api/models/{REPOSITORY}/tree/"):
            self._answer(200, json.dumps(self._tree()).encode())
            return
        if path.startswith(f"api/models/{REPOSITORY}"):
            self._answer(200, json.dumps(self._listing()).encode())
            return
        name = path.removeprefix(f"{REPOSITORY}/resolve/").partition("/")[2]
        if name in self.held:
            self._answer(200, self.held[name])
        else:
            self._answer(404, b"{}")

    do_HEAD = do_GET  # noqa: N815 - the base class's name

    def _listing(self) -> dict[str, object]:
        siblings = []
        for path, content in self.held.items():
            item: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": "0" * 40}
            if path.endswith(_LARGE):
                digest = hashlib.sha256(content).hexdigest()
                item["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 130}
            siblings.append(item)
        return {"id": REPOSITORY, "sha": _COMMIT, "private": False, "siblings": siblings}

    def _tree(self) -> list[dict[str, object]]:
        listing = []
        for path, content in self.held.items():
            size = len(content)
            item: dict[str, object] = {"type": "file", "path": path, "size": size, "oid": "0" * 40}
            if path.endswith(_LARGE):
                digest = hashlib.sha256(content).hexdigest()
                item["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
            listing.append(item)
        return listing

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", _COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
