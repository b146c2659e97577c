"""A loopback server with the Hugging Face hub's API for data sets and models, and fault injection.

```
hub  http://127.0.0.1:PORT   /api/datasets/{repo}[/revision/{rev}]      description of a repository
                             /api/datasets/{repo}/tree/{rev}[/{path}]   listing, paged by `Link`
                             /api/datasets/{repo}/paths-info/{rev}      the same for named paths
                             /datasets/{repo}/resolve/{rev}/{path}      a file, or 302 to the CDN
                             /api/models/{repo}..., /{repo}/resolve/... the same for models
                             /api/repos/create, .../preupload, .../commit, .git/info/lfs: uploads
cdn  http://127.0.0.2:PORT   /{sha256}?Signature=...                    the bytes of an LFS file
```

The CDN is another origin, so a client must not send it the token; like S3, it rejects a request
with both a signature and a token. Each request is recorded with the bytes of body sent for it.
`Hub.inject` makes chosen responses fail. The API follows huggingface_hub 2.4;
tests/pipeline/download/test_hub_server.py checks this server with that client.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import http.server
import json
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_LoopbackTokenThatMustStayWithTheHub"
FINEWEB = "HuggingFaceFW/fineweb"
# The part of FineWeb's card that names its configurations.
CARD = """\
---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: CC-MAIN-2013-20
  data_files:
  - split: train
    path: data/CC-MAIN-2013-20/*
---
# FineWeb, on loopback
"""

# Header values; a callable is evaluated when the header is sent.
Headers = Mapping[str, str | Callable[[], str]]


@dataclass(frozen=True)
class Fault:
    """An injected fault; all fields that are set apply. Offsets are in the file, in bytes."""

    status: int | None = None
    """HTTP status to send instead of the file."""
    headers: Headers = field(default_factory=dict)
    """Headers to send with `status`."""
    reset_at: int | None = None
    """Reset the connection at this byte."""
    close_at: int | None = None
    """Close the connection at this byte, before the announced length."""
    stall_at: int | None = None
    """Pause for `stall` seconds at this byte."""
    stall: float = 0.0
    truncate_at: int | None = None
    """End the file at this byte and announce it as complete."""
    chunked: bool = False
    """Do not announce the body's length."""
    flip: int | None = None
    """Invert the byte at this offset."""
    etag: str | None = None
    """Send this ETag."""
    content: bytes | None = None
    """Send this file instead."""
    ignore_range: bool = False
    """Send status 200 and the complete file for any requested range."""
    shift_range: int = 0
    """Start the range, in body and Content-Range, this many bytes too early."""
    rate: float | None = None
    """Bytes per second."""


def http_date(seconds: float) -> Callable[[], str]:
    """Return a header value: the time ``seconds`` from when it is sent, rounded up."""
    return lambda: formatdate(int(time.time() + seconds + 1), usegmt=True)


@dataclass
class Request:
    """A request and the response to it."""

    method: str
    route: str
    path: str
    range: str | None
    authorization: str | None
    at: float
    status: int = 0
    sent: int = 0
    ended: float = 0.0


@dataclass
class _Injected:
    fault: Fault
    route: str
    pattern: str
    times: int | None


class Repo:
    """A repository: commits (path -> bytes) and the branches and tags that name them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gated: str | None = None
        """Pattern of the paths that need granted access."""
        self.private = False
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self._sha256: dict[int, tuple[bytes, str]] = {}

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Commit ``files``, with `CARD` if they have no card, to ``ref``; return the commit."""
        files = {"README.md": CARD.encode(), **files}
        text = json.dumps({path: self.sha256(data) for path, data in files.items()})
        commit = hashlib.sha1(f"{len(self.commits)} {text}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch, tag or commit; None if there is none."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def sha256(self, data: bytes) -> str:
        """Return the sha256 of a file, computed once."""
        # Keeps a reference to the object, so that its id is not reused.
        known = self._sha256.get(id(data))
        if known is None:
            known = self._sha256[id(data)] = (data, hashlib.sha256(data).hexdigest())
        return known[1]

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        """Return a file's entry in a listing."""
        described: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(data),
            "oid": hashlib.sha1(b"blob %d\0" % len(data) + data[:100]).hexdigest(),
        }
        if is_lfs(path):
            described["lfs"] = {"oid": self.sha256(data), "size": len(data), "pointerSize": 134}
        return described


def is_lfs(path: str) -> bool:
    """Return whether the hub stores a file on the CDN."""
    return path.endswith((".parquet", ".zst", ".gz", ".safetensors", ".bin"))


class Hub:
    """The two servers, their repositories and the requests they received.

    Args:
        bandwidth: Bytes per second and connection; None for no limit.
        page_size: Entries per page of a listing.
    """

    def __init__(self, bandwidth: float | None = None, page_size: int = 1000) -> None:
        self.bandwidth = bandwidth
        self.page_size = page_size
        self.repos: dict[str, Repo] = {}
        self.uploaded: dict[str, bytes] = {}
        """LFS files by sha256, not yet part of a commit."""
        self.requests: list[Request] = []
        self.gate = threading.Event()
        """While cleared, the CDN sends headers but no body."""
        self.gate.set()
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._injected: list[_Injected] = []
        self._hub = _Server(("127.0.0.1", 0), self, "hub")
        # On macOS only 127.0.0.1 is loopback; the other port already makes it another origin.
        host = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
        self._cdn = _Server((host, 0), self, "cdn")
        self.endpoint = self._hub.url
        self.cdn = self._cdn.url
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    def repo(self, name: str = FINEWEB) -> Repo:
        """Return the repository of that name; create it if there is none."""
        return self.repos.setdefault(name, Repo(name))

    def inject(
        self, fault: Fault, path: str = "*", route: str = "cdn", times: int | None = 1
    ) -> None:
        """Apply a fault to the next ``times`` matching responses; None for all.

        Of several matching faults the one injected first applies.

        Args:
            path: Pattern of the file's path in its repository.
            route: Pattern of `info`, `tree`, `paths`, `resolve` or `cdn`.
        """
        with self._lock:
            self._injected.append(_Injected(fault, route, path, times))

    def clear_faults(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._injected.clear()

    def clear_requests(self) -> None:
        """Forget the requests recorded so far."""
        with self._lock:
            self.requests.clear()

    def asked(self, route: str = "*", path: str = "*") -> list[Request]:
        """Return the recorded requests that match, in order."""
        with self._lock:
            return [
                request
                for request in self.requests
                if fnmatch.fnmatchcase(request.route, route)
                and fnmatch.fnmatchcase(request.path, path)
            ]

    def sent(self) -> Counter[str]:
        """Return the bytes of body that the CDN has sent, by path."""
        sent: Counter[str] = Counter()
        for request in self.asked("cdn"):
            if request.sent:
                sent[request.path] += request.sent
        return sent

    def next_fault(self, request: Request) -> Fault:
        """Return the fault of the response to this request, and count it as applied."""
        with self._lock:
            for entry in self._injected:
                if (
                    entry.times != 0
                    and fnmatch.fnmatchcase(request.route, entry.route)
                    and fnmatch.fnmatchcase(request.path, entry.pattern)
                    and not (request.method == "HEAD" and entry.fault.status is None)
                ):
                    entry.times = None if entry.times is None else entry.times - 1
                    return entry.fault
        return Fault()

    def blob(self, sha256: str) -> tuple[str, bytes] | None:
        """Return the path and bytes of the newest LFS file with that hash."""
        for repo in self.repos.values():
            for files in reversed(list(repo.commits.values())):
                for path, data in files.items():
                    if is_lfs(path) and repo.sha256(data) == sha256:
                        return path, data
        return None


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], hub: Hub, host: str) -> None:
        super().__init__(address, _Handler)
        self.hub, self.host = hub, host
        self.url = f"http://{address[0]}:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # else the client disconnected
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 60

    def setup(self) -> None:
        # Bytes in the kernel's buffer count as sent but may never be received: keep it small.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.hub = self.server.hub
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.recorded = Request(
            method=self.command,
            route="other",
            path="",
            range=self.headers.get("Range"),
            authorization=self.headers.get("Authorization"),
            at=time.monotonic(),
        )
        self.body = self._read_body()
        self.hub.requests.append(self.recorded)
        try:
            if self.server.host == "cdn":
                self._cdn(url.path[1:])
            else:
                self._route([unquote(part) for part in url.path.split("/")[1:]])
        finally:
            self.recorded.ended = time.monotonic()

    do_HEAD = do_POST = do_PUT = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # Routes

    def _route(self, parts: list[str]) -> None:
        match parts:
            case (
                ["api", "repos", "create"]
                | ["api", "validate-yaml"]
                | ["api", "models", _, _, "preupload" | "commit", _]
                | [_, _, "info", "lfs", "objects", "batch"]
            ):
                return self._upload(parts)
            case ["api", "datasets" | "models", owner, name, *rest]:
                repo, rest = f"{owner}/{name}", rest or ["revision", "main"]
            case ["datasets", owner, name, "resolve", *rest] | [owner, name, "resolve", *rest]:
                repo, rest = f"{owner}/{name}", ["resolve", *rest]
            case _:
                return self._refuse(404, "RepoNotFound", "Repository not found")
        if len(rest) < 2 or rest[0] not in ("revision", "tree", "paths-info", "resolve"):
            return self._refuse(404, None, "Not found")
        kind, revision, path = rest[0], rest[1], "/".join(rest[2:])
        self.recorded.route = {"revision": "info", "paths-info": "paths"}.get(kind, kind)
        self.recorded.path = path
        fault = self.hub.next_fault(self.recorded)
        if fault.status is not None:
            return self._answer(fault.status, dict(fault.headers), b"injected")
        found = self._find_repo(repo, revision)
        if found is not None:
            answer = getattr(self, f"_{self.recorded.route}")  # _info, _tree, _paths or _resolve
            answer(*found, path, fault)
        return None

    def _find_repo(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """Return the repository and commit; refuse if they do not exist or need another token."""
        token = (self.recorded.authorization or "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            self._refuse(401, None, "Invalid credentials in Authorization header")
            return None
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not token):
            # Without a token the hub does not disclose whether a private repository exists.
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        commit = repo.resolve(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, commit

    def _info(self, repo: Repo, commit: str, _path: str, _fault: Fault) -> None:
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        info = {"id": repo.name, "sha": commit, "private": repo.private, "siblings": siblings}
        self._json({**info, "gated": "auto" if repo.gated else False})

    def _tree(self, repo: Repo, commit: str, folder: str, _fault: Fault) -> None:
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = list(_entries(repo, commit, folder.strip("/"), recursive))
        if folder and not entries:
            return self._refuse(404, "EntryNotFound", f"{folder} does not exist")
        start = int(self.query.get("cursor", ["0"])[0])
        stop = start + self.hub.page_size
        headers = {}
        if stop < len(entries):
            address = f"{self.hub.endpoint}{urlsplit(self.path).path}"
            flags = f"recursive={str(recursive).lower()}&cursor={stop}"
            headers["Link"] = f'<{address}?{flags}>; rel="next"'
        return self._json(entries[start:stop], headers)

    def _paths(self, repo: Repo, commit: str, _path: str, _fault: Fault) -> None:
        form = parse_qs(self.body.decode())
        wanted = {path.strip("/") for path in form.get("paths", [])}
        self._json([e for e in _entries(repo, commit, "", True) if e["path"] in wanted])

    def _resolve(self, repo: Repo, commit: str, path: str, fault: Fault) -> None:
        commit_header = {"X-Repo-Commit": commit}
        data = repo.commits[commit].get(path)
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", commit_header)
        if repo.gated is not None and fnmatch.fnmatchcase(path, repo.gated):
            status = 403 if self.recorded.authorization else 401
            message = f"Access to dataset {repo.name} is restricted and you are not in the list"
            return self._refuse(status, "GatedRepo", message, commit_header)
        if not is_lfs(path):
            etag = fault.etag or str(repo.entry(path, data)["oid"])
            return self._file(data, etag, fault, commit_header)
        sha256 = repo.sha256(data)
        headers = {
            **commit_header,
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{sha256}"',
            "ETag": f'"{sha256}"',
            "Location": f"{self.hub.cdn}/{sha256}?Expires=1&Signature=loopback",
        }
        return self._answer(302, headers, b"Found. Redirecting")

    def _upload(self, parts: list[str]) -> None:
        """Answer a request that writes: a new repository, or a step of an upload to a model."""
        self.recorded.route, self.recorded.path = "upload", "/".join(parts)
        if self.recorded.authorization != f"Bearer {TOKEN}":
            return self._refuse(401, None, "Invalid username or password.")
        lines = [json.loads(line) for line in self.body.splitlines()]  # JSON, or one per line
        match parts:
            case ["api", "repos", "create"]:
                name = f"{lines[0]['organization']}/{lines[0]['name']}"
                if name in self.hub.repos:
                    return self._refuse(409, None, "You already created this model repo")
                self.hub.repo(name).private = lines[0]["visibility"] == "private"
                self._json({"url": f"{self.hub.endpoint}/{name}"})
            case ["api", "models", owner, name, "preupload", _]:
                paths = [file["path"] for file in lines[0]["files"]]
                modes = [(path, "lfs" if is_lfs(path) else "regular") for path in paths]
                found = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]
                self._json({"files": found})
            case ["api", "models", owner, name, "commit", ref]:
                repo, files = self.hub.repo(f"{owner}/{name}"), {}
                for entry in (line["value"] for line in lines if line["key"] != "header"):
                    content = entry.get("content")  # of a small file
                    files[entry["path"]] = (
                        self.hub.uploaded[entry["oid"]]
                        if content is None
                        else base64.b64decode(content)
                    )
                commit = repo.commit({**repo.commits.get(repo.refs.get(ref, ""), {}), **files}, ref)
                url = f"{self.hub.endpoint}/{repo.name}/commit/{commit}"
                self._json({"commitUrl": url, "commitOid": commit})
            case [*_, "batch"]:
                self._json({"transfer": "basic", "objects": [
                    {**o, "actions": {"upload": {"href": f"{self.hub.cdn}/{o['oid']}"}}}
                    for o in lines[0]["objects"]
                ]})  # fmt: skip
            case _:
                self._json({})
        return None

    # The CDN

    def _cdn(self, sha256: str) -> None:
        self.recorded.route = "cdn"
        if self.command == "PUT":
            assert hashlib.sha256(self.body).hexdigest() == sha256
            self.hub.uploaded[sha256] = self.body
            return self._answer(200, {}, b"")
        blob = self.hub.blob(sha256)
        if blob is None:
            return self._answer(404, {}, b"NoSuchKey")
        self.recorded.path, data = blob
        if self.recorded.authorization is not None:
            return self._answer(400, {}, b"Only one auth mechanism allowed")
        if "Signature" not in self.query:
            return self._answer(403, {}, b"AccessDenied")
        fault = self.hub.next_fault(self.recorded)
        if fault.status is not None:
            return self._answer(fault.status, dict(fault.headers), b"injected")
        return self._file(data, fault.etag or f"cdn-{sha256[:32]}", fault, {})

    # Responses

    def _json(self, value: Any, headers: Headers | None = None) -> None:
        body = json.dumps(value).encode()
        self._answer(200, {"Content-Type": "application/json", **(headers or {})}, body)

    def _refuse(
        self, status: int, code: str | None, message: str, headers: Headers | None = None
    ) -> None:
        errors = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        body = json.dumps({"error": message}).encode()
        self._answer(status, {**(headers or {}), **errors}, body)

    def _head(self, status: int, headers: Headers) -> None:
        self.recorded.status = status
        self.send_response(status, HTTPStatus(status).phrase)
        for key, value in headers.items():
            self.send_header(key, value() if callable(value) else value)
        self.end_headers()

    def _answer(self, status: int, headers: Headers, body: bytes) -> None:
        self._head(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.connection.sendall(body)

    def _file(self, data: bytes, etag: str, fault: Fault, headers: Headers) -> None:
        """Send a file, or the requested range of it, with the fault applied."""
        if fault.content is not None:
            data = fault.content
        if fault.truncate_at is not None:
            data = data[: fault.truncate_at]
        etag = f'"{etag}"'
        start, stop, status = 0, len(data), 200
        headers = {**headers, "ETag": etag, "Accept-Ranges": "bytes"}
        part = self.recorded.range
        if self.headers.get("If-Range", etag) != etag or fault.ignore_range:
            part = None
        if part is not None and part.startswith("bytes=") and "," not in part:
            first, _, last = part[6:].partition("-")
            start = int(first) if first else max(len(data) - int(last), 0)
            stop = min(int(last) + 1, stop) if first and last else stop
            if start >= len(data):
                return self._answer(416, {**headers, "Content-Range": f"bytes */{len(data)}"}, b"")
            start = max(start - fault.shift_range, 0)
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        if fault.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(stop - start)
        self._head(status, headers)
        if self.command != "HEAD":
            self._body(data, start, stop, fault)
        return None

    def _body(self, data: bytes, start: int, stop: int, fault: Fault) -> None:
        if self.server.host == "cdn":
            self.hub.gate.wait(60)
        rate = fault.rate or self.hub.bandwidth
        block = 1 << 18 if rate is None else max(1, min(1 << 16, int(rate / 50)))
        ends = [at for at in (fault.reset_at, fault.close_at) if at is not None and at < stop]
        end = max(min(ends), start) if ends else stop
        position, began, stalled = start, time.monotonic(), False
        view = memoryview(data)
        while position < end:
            following = min(position + block, end)
            if fault.stall_at is not None and not stalled and following > fault.stall_at:
                stalled = True
                self.hub.closing.wait(fault.stall)
            piece = bytes(view[position:following])
            if fault.flip is not None and position <= fault.flip < following:
                wrong = bytearray(piece)
                wrong[fault.flip - position] ^= 0xFF
                piece = bytes(wrong)
            if fault.chunked:
                piece = b"%x\r\n%b\r\n" % (len(piece), piece)
            self.recorded.sent += following - position  # before the client can have read it
            try:
                self.connection.sendall(piece)
            except OSError:
                self.recorded.sent -= following - position
                raise
            position = following
            if rate is not None:
                wait = began + (position - start) / rate - time.monotonic()
                if wait > 0 and self.hub.closing.wait(wait):
                    break
        if fault.chunked and end == stop:
            self.connection.sendall(b"0\r\n\r\n")
        if position < stop:
            self._disconnect(reset=fault.reset_at is not None and position >= fault.reset_at)

    def _disconnect(self, reset: bool) -> None:
        """Close or reset the connection in the middle of a body."""
        self.close_connection = True
        if reset:
            self.hub.closing.wait(0.05)  # let the bytes sent so far arrive
            linger = struct.pack("ii", 1, 0)  # drop unsent bytes and send RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            for file in (self.rfile, self.wfile, self.connection):
                file.close()
            raise ConnectionAbortedError("as injected")


def _entries(repo: Repo, commit: str, folder: str, recursive: bool) -> Iterator[dict[str, Any]]:
    """Yield the listing of a folder, files and folders; of all below it if ``recursive``."""
    seen: set[str] = set()
    prefix = f"{folder}/" if folder else ""
    for path, data in sorted(repo.commits[commit].items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            name = prefix + "/".join(parts[:depth])
            if name not in seen and ".." not in parts and not path.startswith("/"):
                seen.add(name)
                oid = hashlib.sha1(quote(name).encode()).hexdigest()
                yield {"type": "directory", "path": name, "size": 0, "oid": oid}
        if recursive or len(parts) == 1:
            yield repo.entry(path, data)
