"""A small Hugging Face hub on loopback, with what huggingface_hub 0.20 to 2.4 and datasets need.

It has the endpoints that datasets 2.14 to 5.2 asks for. It serves `root/models/OWNER/NAME/...` and
`root/datasets/OWNER/NAME/...` as they lie on disk, one commit each. Point a fresh process at it
with HF_ENDPOINT=hub.url: both libraries read that variable when they are imported.

    with Hub(tmp_path) as hub:
        hub.fail("GET /some/model/resolve/.*safetensors", "cut", times=2)
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        subprocess.run([...], env={**os.environ, **variables})
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_test_hub"  # opens the gated repositories
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")

DATE = "2023-01-01T00:00:00.000Z"

REPOSITORY = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+(?:/[^/]+)?)"  # some names have no owner: gpt2
INFO = re.compile(REPOSITORY + r"(?:/revision/[^/]+)?")
TREE = re.compile(REPOSITORY + r"/tree/[^/]+(?:/(?P<path>.*))?")
COMMITS = re.compile(REPOSITORY + r"/commits/[^/]+")
PATHS_INFO = re.compile(REPOSITORY + r"/paths-info/[^/]+")
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+(?:/[^/]+)?)/resolve/[^/]+/(?P<path>.+)")


PIECES, PIECE_S, STALL_S = 8, 0.4, 30.0

# A status; or a body that ends half-way, has one bit flipped, stops half-way with the line open, or
# trickles.
How = int | Literal["cut", "flip", "stall", "slow"]


@dataclass
class _Fault:
    pattern: str
    how: How
    times: int


class Hub:
    """A context manager.

    `requests` keeps one line a request, e.g. `GET /api/models/facebook/opt-1.3b 200`.
    """

    def __init__(self, root: Path, *, gated: Collection[str] = ()) -> None:
        self.root, self.gated = root, frozenset(gated)
        self.requests: list[str] = []
        self.retry_after = ""  # the value of this header in a 429 response
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, pattern: str, how: How, times: int = 10**9) -> None:
        """Answer so the next `times` requests whose `GET /path` matches, the oldest order first."""
        self._faults.append(_Fault(pattern, how, times))

    def heal(self) -> None:
        self._faults.clear()

    def _fault(self, request: str) -> How | None:
        with self._lock:
            found = next(
                (fault for fault in self._faults if fault.times and re.fullmatch(fault.pattern, request)), None
            )
            if found is None:
                return None
            found.times -= 1
            return found.how

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)  # port 0: the system picks a free one
        self.hub = hub


class _Refusal(Exception):
    """An answer other than 200, with the error code that huggingface_hub makes an exception of."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET  # the same answer; `_reply` leaves the body out

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self._how = self.server.hub._fault(f"{self.command} {path}")
        try:
            if isinstance(self._how, int):
                raise _Refusal(self._how, "Fault")
            if self.command == "POST":
                repository = self._repository(self._match(PATHS_INFO, path))
                return self._json(_entries_at(repository, self._paths_asked(body)))
            if match := INFO.fullmatch(path):
                return self._json(self._information(match, with_sizes="blobs" in query))
            if match := TREE.fullmatch(path):
                recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
                return self._json(_tree(self._repository(match), (match["path"] or "").strip("/"), recursive))
            if match := COMMITS.fullmatch(path):
                return self._json(
                    [{"id": _commit(self._repository(match)), "title": "", "message": "", "authors": [], "date": DATE}]
                )
            self._file(self._match(RESOLVE, path))
        except _Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code}
            if refusal.status == 429 and self.server.hub.retry_after:
                headers["Retry-After"] = self.server.hub.retry_after
            self._json({"error": refusal.code}, refusal.status, headers)

    def _match(self, pattern: re.Pattern[str], path: str) -> re.Match[str]:
        match = pattern.fullmatch(path)
        if match is None:
            raise _Refusal(404, "NotFound")
        return match

    def _repository(self, match: re.Match[str]) -> Path:
        kind = (match["kind"] or "models").strip("/")
        folder = self.server.hub.root / kind / match["name"]
        if not folder.is_dir():
            raise _Refusal(401, "RepoNotFound")  # 401, as the real hub says to strangers: it may be private
        return folder

    def _information(self, match: re.Match[str], *, with_sizes: bool) -> dict[str, Any]:
        folder, name = self._repository(match), match["name"]
        return {
            "id": name, "modelId": name, "sha": _commit(folder), "private": False, "disabled": False, "downloads": 0,
            "likes": 0, "tags": [],
            "gated": "manual" if name in self.server.hub.gated else False,
            "lastModified": DATE, "createdAt": DATE,
            "siblings": [_sibling(folder, file) if with_sizes else {"rfilename": file} for file in _files(folder)],
        }  # fmt: skip

    def _paths_asked(self, body: bytes) -> list[str]:
        if "json" in self.headers.get("Content-Type", ""):
            return list(json.loads(body)["paths"])
        return parse_qs(body.decode()).get("paths", [])

    def _file(self, match: re.Match[str]) -> None:
        folder = self._repository(match)
        if match["name"] in self.server.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refusal(401, "GatedRepo")
        if not (folder / match["path"]).is_file():
            raise _Refusal(404, "EntryNotFound")
        content, entry = (folder / match["path"]).read_bytes(), _entry(folder, match["path"])
        tag = f'"{entry.get("lfs", entry)["oid"]}"'
        headers = {
            "X-Repo-Commit": _commit(folder),
            "ETag": tag,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": tag, "X-Linked-Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or self.command == "HEAD":
            return self._reply(200, content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        self._reply(
            206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        )

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.server.hub.requests.append(f"{self.command} {self.path} {status}")
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send(body)

    def _send(self, body: bytes) -> None:
        if self._how is None or isinstance(self._how, int):
            self.wfile.write(body)
        elif self._how == "flip":
            self.wfile.write(bytes([body[0] ^ 1]) + body[1:])
        elif self._how == "slow":
            for i in range(PIECES):
                self.wfile.write(body[len(body) * i // PIECES : len(body) * (i + 1) // PIECES])
                time.sleep(PIECE_S)
        else:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(STALL_S if self._how == "stall" else 0)
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Silent: `Hub.requests` is the log."""


# --- a folder as a repository ---


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _commit(folder: Path) -> str:
    return hashlib.sha1(
        "".join(f"{file} {_entry(folder, file)['oid']}\n" for file in _files(folder)).encode()
    ).hexdigest()


def _entry(folder: Path, file: str) -> dict[str, Any]:
    content = (folder / file).read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": file, "size": len(content), "oid": blob}
    if file.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def _sibling(folder: Path, file: str) -> dict[str, Any]:
    entry = _entry(folder, file)
    found = {"rfilename": file, "size": entry["size"], "blobId": entry["oid"]}
    if "lfs" in entry:
        found["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 130}
    return found


def _directory(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def _entries_at(folder: Path, paths: list[str]) -> list[dict[str, Any]]:
    """What is there of `paths`; the rest is left out, as the hub does."""
    files = [_entry(folder, path) for path in paths if (folder / path).is_file()]
    return files + [_directory(path) for path in paths if (folder / path).is_dir()]


def _tree(folder: Path, under: str, recursive: bool) -> list[dict[str, Any]]:
    if not (folder / under).is_dir():
        raise _Refusal(404, "EntryNotFound")
    paths = sorted((folder / under).rglob("*") if recursive else (folder / under).iterdir())
    return [
        _entry(folder, name) if path.is_file() else _directory(name)
        for path in paths
        for name in [str(path.relative_to(folder))]
    ]
