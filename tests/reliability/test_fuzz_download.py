"""Fuzzing of what the data stages read from outside: an exact result or a `UserError`, and soon.

The parsers of shards, records, checkpoints and logs are fuzzed in test_parsers.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline.download import hub, local_paths
from pipeline.download.http import Refused, fetch, retry_after
from pipeline.download.hub_configs import find_files, read_card
from pipeline.download.left_out import LeftOut
from pipeline.download.partial_file import PartialFile
from pipeline.download.source_paths import resolve
from pipeline.download.to_parquet import ReadOptions, to_parquet
from pipeline.format.foreign_tokens import open_token_file
from pipeline.format.manifest import NAME, Manifest, RawManifest
from pipeline.params import SourceParams, TokenizeParams, load_sources
from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import load_section
from pipeline.store.store import Store

T = TypeVar("T")

fuzz = settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(
    function: Callable[..., T], *args: Any, seconds: float = 2.0, named: str = ""
) -> T | None:
    """Return the result, or None for a `UserError`: one printable line that has ``named`` in it."""
    began = time.process_time()
    try:
        result: T | None = function(*args)
    except UserError as error:
        result, message = None, str(error)
        assert message == printable(message), message
        assert len(message) < 2000
        assert named in message
    assert time.process_time() - began < seconds
    return result


NUMBERS = st.integers() | st.sampled_from([-1, 1 << 63, 10**30, 10**4000, 1e400]) | st.floats()
WORDS = st.sampled_from(
    ["a", "a/b.jsonl", "../x", "/x", "**", "*a*a*a*b", "train", "default", "\x1b[2J", "a\nb", ""]
)
TEXT = WORDS | st.text(max_size=8)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def sometimes(*usual: Any) -> st.SearchStrategy[Any]:
    """Mostly one of the usual values, so that what reads them gets far."""
    return st.sampled_from(usual) | st.sampled_from(usual) | VALUES


DEEP = "[" * 20_000 + "]" * 20_000
LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(30)
)


# --- YAML: params.yaml, machine.yaml, dataset cards

HOSTILE_YAML = [
    LAUGHS + "sources: *a30\n",
    LAUGHS + "configs: *a30\n",
    "sources: &a [*a]\n",
    f"sources: {DEEP}\n",
    "m0: &m0 {a: 1}\n" + "".join(f"m{i + 1}: &m{i + 1}\n  <<: [{', '.join([f'*m{i}'] * 9)}]\n"
                                  for i in range(12)),
    f"sources: {{files: {'9' * 5000}}}}}\n",
    f"sources: {{files: {'9' * 100}}}}}\n",
    "sources: {main: {paths: [2001-99-99]}}\n",
    "sources: !!python/object/apply:os.system [exit]\n",
    "? [a, b]\n: c\n",
    "a\\nb: 1\n",
    '"a\\n\\e[2J": 1\n',
    'sources: {"a\\n\\e[2J": 1}\n',
    "sources: !!binary x\n",
    "sources: !!timestamp x\n",
    "sources: !!int ''\n",
    "\0",
    "- " * 2000 + "a\n",
    "#" * 2_000_000,
    "source: {kind: sample}\n",
    "sources: {}\n",
    "sources: {Main: {}}\n",
    "sources: {a.b: {}}\n",
    "sources: {1: {}}\n",
    "sources: {null: {}}\n",
    "sources: {_a: {}}\n",
    "sources: {main: null}\n",
    "sources: {main: [a]}\n",
    f"sources: {{{'a' * 33}: {{}}}}\n",
]  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def read_parameters(folder: Path, text: str | bytes) -> None:
    for name, load in (
        ("params.yaml", load_sources),
        ("params.yaml", lambda: load_section("tokenize", TokenizeParams)),
        ("machine.yaml", Machine.load),
    ):
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        (folder / name).write_bytes(data)
        outcome(load)


def read_and_resolve(text: str) -> None:
    configs = read_card(text, "a/repo")
    for config in [None, "a", *list(configs)[:2]]:
        left_out = LeftOut(["x*"])
        outcome(find_files, configs, config, "a/repo", lambda *_: ["a/b.jsonl", "c"], left_out)


@pytest.mark.parametrize("text", HOSTILE_YAML)
def test_hostile_yaml_is_refused(project: Path, text: str) -> None:
    for name, load in (
        ("params.yaml", load_sources),
        ("machine.yaml", Machine.load),
    ):
        (project / name).write_text(text)
        assert outcome(load, seconds=5, named=name) is None
    outcome(read_and_resolve, f"---\n{text}\n---\n")


@fuzz
@given(
    st.binary(max_size=40) | st.text(max_size=40) | st.text(":-[]{}&*!<|># \n\"'a1", max_size=40)
)
def test_any_bytes_as_parameters_or_card(project: Path, data: bytes | str) -> None:
    read_parameters(project, data)
    text = data if isinstance(data, str) else data.decode(errors="replace")
    for card in (text, f"---\n{text}\n---\n"):
        outcome(read_and_resolve, card)


def write_yaml(path: Path, value: Any) -> None:
    with open(path, "wb") as file:
        YAML(typ="safe", pure=True).dump(value, file)


PARAMETERS = st.fixed_dictionaries(
    {"kind": sometimes("files", "hub"), "paths": sometimes(["a"], [])},
    optional=dict.fromkeys(
        ("files", "max_tokens", "exclude", "encoding", "text_column", "a\x1b[0m"), VALUES
    ),
)


@fuzz
@given(PARAMETERS, st.dictionaries(TEXT | st.just("workers"), VALUES, max_size=2))
def test_any_values_of_parameters(project: Path, source: Any, machine: Any) -> None:
    write_yaml(project / "params.yaml", {"sources": {"main": source}})
    outcome(load_sources)
    write_yaml(project / "machine.yaml", machine)
    outcome(Machine.load)


SPLITS = st.lists(
    st.fixed_dictionaries({"split": sometimes("train"), "path": sometimes("a/*", ["**/*a"])}),
    max_size=2,
)
CONFIGS = st.fixed_dictionaries(
    {"config_name": sometimes("a", "default")},
    optional={"data_files": SPLITS | VALUES, "data_dir": VALUES, "default": VALUES,
              "features": VALUES},
)  # fmt: skip


@fuzz
@given(st.lists(CONFIGS | VALUES, max_size=3) | VALUES)
def test_any_configurations_of_a_card(configs: Any) -> None:
    outcome(read_and_resolve, f"---\n{json.dumps({'configs': configs})}\n---\n")


def test_a_card_of_many_lines_is_read_soon() -> None:
    assert outcome(read_card, "---\n" + "\n" * 1_000_000, "a/repo") == {}
    with pytest.raises(UserError, match=r"source\.repo"):
        read_card("---\nconfigs: 5\n---\n", "a/repo")


# --- globs


@pytest.mark.parametrize("glob", ["*a" * 30 + "b", "**/*a*/" * 9 + "b", "[!a]*" * 30, "?*" * 30])
def test_globs_that_backtrack(project: Path, glob: str) -> None:
    paths = ["a/" + "a" * 200 + f"/{i}.jsonl" for i in range(50)]
    configs = {"a": {"data_files": [glob]}}
    outcome(find_files, configs, "a", "a/repo", lambda *_: paths, LeftOut())
    left_out = LeftOut([glob])
    assert outcome(lambda: [left_out.excludes(path) for path in paths]) is not None
    outcome(resolve, [f"memory://{glob}"], seconds=10)  # imports fsspec
    deep = project / "/".join("a" * 24)
    deep.mkdir(parents=True)
    outcome(local_paths.find, glob, LeftOut())
    outcome(local_paths.find, "**/a/" * 12 + "b", LeftOut())


@fuzz
@given(st.text("ab*?[]!^-/.\\~\0\n\x1b{}", max_size=12))
@example("")
@example("~nobody/x")
def test_any_pattern(project: Path, pattern: str) -> None:
    (project / "a").mkdir(exist_ok=True)
    (project / "a" / "b").touch()
    left_out = LeftOut([pattern])
    outcome(local_paths.find, pattern, left_out)
    left_out.report()
    configs = {"a": {"data_files": pattern}}
    outcome(find_files, configs, "a", "a/repo", lambda *_: ["a/b", "a/b.txt"], left_out)


@pytest.mark.slow
def test_a_listing_of_100_000_files_is_answered_soon() -> None:
    paths = [f"data/part-{i:06d}.jsonl" for i in range(100_000)]
    found = outcome(find_files, {}, None, "a/r", lambda *_: paths, LeftOut(), seconds=30)
    assert found == paths


# --- the answers of a hub


class Answers(http.server.ThreadingHTTPServer):
    """A hub that answers each path with what a test sets: status, headers and bytes of body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: dict[str, bytes] = {}


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Answers

    def do_GET(self) -> None:
        bodies = self.server.bodies
        body = next((body for part, body in bodies.items() if part in self.path), b"")
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def answers() -> Iterator[Answers]:
    with Answers() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
            yield server
        server.shutdown()


SHA1, SHA256 = "a" * 40, "b" * 64
INFO = {"id": "a/repo", "sha": SHA1, "siblings": [], "tags": [], "downloads": 0, "likes": 0}
FILE = {"type": "file", "path": "a.jsonl", "size": 3, "oid": SHA1}
LFS = {"oid": SHA256, "size": 3, "pointerSize": 1}


def ask(answers: Answers, info: str, tree: str, card: bytes = b"") -> list[hub.HubFile] | None:
    answers.bodies = {"/tree/": tree.encode(), "/resolve/": card, "/api/": info.encode()}
    params = SourceParams(kind="hub", repo="a/repo", config=None)
    found = outcome(hub.resolve, params, 1e-3, seconds=10)  # the first one imports the client
    return found and found[1]


@pytest.mark.parametrize("bad", ["../../x", "B" * 64, "b" * 63, "b" * 64 + "\n", "", 5, None])
def test_an_object_id_that_is_no_hash_is_refused(answers: Answers, bad: Any) -> None:
    (good,) = ask(answers, json.dumps(INFO), json.dumps([{**FILE, "lfs": LFS}])) or []
    assert good.identity == SHA256
    for entry in ({**FILE, "lfs": {**LFS, "oid": bad}}, {**FILE, "oid": bad}):
        assert ask(answers, json.dumps(INFO), json.dumps([entry])) is None
    assert ask(answers, json.dumps({**INFO, "sha": bad}), json.dumps([FILE])) is None


def test_a_store_key_is_one_plain_name(tmp_path: Path) -> None:
    store = Store(tmp_path / "work")
    for key in ("../../x", "/x", "..", ".", "", "a/b", "a\0b", "a\n", "x" * 300):
        for use in (store.find, store.folder, store.discard, store.path):
            with pytest.raises(UserError):
                use("files", key)
        with pytest.raises(UserError), store.lock("files", key), store.make("files", key):
            pass
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("body", [DEEP, "9" * 5000, "{}", "[1]", "null", "<html>", "\udce9", ""])
def test_answers_that_are_no_listing(answers: Answers, body: str) -> None:
    for info, tree in ((body, json.dumps([FILE])), (json.dumps(INFO), body)):
        answers.bodies = {}
        ask(answers, info.encode(errors="replace").decode(), tree.encode(errors="replace").decode())
    ask(answers, json.dumps(INFO), json.dumps([FILE]), b"---\n" + b"a: b\n" * (1 << 21))


ENTRY = st.fixed_dictionaries(
    {
        "type": sometimes("file", "directory"),
        "path": sometimes("a.jsonl", "b/c.jsonl"),
        "size": sometimes(3),
        "oid": sometimes(SHA1),
    },
    optional={
        "lfs": VALUES | st.fixed_dictionaries({key: sometimes(value) for key, value in LFS.items()})
    },
)
FIELDS = {key: sometimes(value) for key, value in INFO.items()}


@fuzz
@given(st.fixed_dictionaries(FIELDS) | VALUES, st.lists(ENTRY | VALUES, max_size=3) | VALUES)
def test_any_listing(answers: Answers, info: Any, tree: Any) -> None:
    for file in ask(answers, json.dumps(info), json.dumps(tree)) or []:
        assert len(file.sha256 or SHA256) == 64
        assert len(file.git) == 40
        assert not file.path.startswith(("/", ".."))


# --- the headers of a server


class _Raw(socketserver.BaseRequestHandler):
    """Answers each request with the same bytes."""

    def handle(self) -> None:
        self.request.recv(1 << 16)
        self.request.sendall(self.server.answer)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def raw_server() -> Iterator[socketserver.ThreadingTCPServer]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Raw) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


DIGITS = st.sampled_from(["\xb2", "9" * 4400, "-1", "0", "3", "004", "+3", "x", "3, 3", ""])
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Content-Length": DIGITS,
        "Content-Range": st.builds("bytes {}-{}/{}".format, DIGITS, DIGITS, DIGITS),
        "Retry-After": DIGITS | st.text(" 0123456789:,+-JanMoGT", max_size=30),
        "RateLimit": st.builds("a;r=0;t={}".format, DIGITS),
        "Location": st.sampled_from(["http://[::1", "//x:y/", "file:///etc/passwd", "\xff", "/"]),
        "ETag": st.text("a\"\x01\xe9 \t", max_size=4),
        "Transfer-Encoding": st.sampled_from(["chunked", "x"]),
        "Content-Encoding": st.sampled_from(["gzip", "x"]),
    },
)  # fmt: skip


@fuzz
@given(
    st.sampled_from(["200 OK", "206 Partial", "301 Moved", "302 x", "416 x", "429 x", "99", "x"]),
    HEADERS,
    st.sampled_from([b"abc", b"", b"abcd", b"3\r\nabc\r\n0\r\n\r\n", b"-5\r\nabc", b"x"]),
    st.booleans(),
)
def test_any_headers(
    raw_server: Any, tmp_path: Path, status: str, headers: Any, body: bytes, resumed: bool
) -> None:
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items())]
    raw_server.answer = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body
    url = f"http://127.0.0.1:{raw_server.server_address[1]}/x"
    folder = tmp_path / "partial"
    folder.mkdir(exist_ok=True)
    (folder / "data").write_bytes(b"a" * resumed)
    (folder / "etag").write_text(headers.get("ETag", ""), encoding="latin-1")
    with PartialFile(folder, 3) as partial:

        def bytes_fetched() -> bytes:
            sha256 = hashlib.sha256(b"abc").hexdigest()
            fetch("x", url, partial, sha256, None, patience=1e-4)
            return partial.path.read_bytes()

        with contextlib.suppress(Refused):
            assert outcome(bytes_fetched) in (b"abc", None)


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(["Retry-After", "Date", "RateLimit"]), DIGITS | st.text(max_size=30)
    )
)
def test_any_requested_wait(headers: dict[str, str]) -> None:
    wait = retry_after(headers)
    assert wait is None or wait >= 0


# --- manifests, token files, text formats

RAW = {
    "schema_version": "2.0",
    "sources": {"main": {"kind": "files", "repo": "r", "revision": "1", "text_column": "text"}},
    "files": [{"source": "main", "path": "a.parquet", "bytes": 1, "rows": 1, "sha256": SHA256}],
}


@st.composite
def damaged(draw: st.DrawFn, value: Any) -> Any:
    """Return JSON in which some values are replaced by others."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    if isinstance(value, dict):
        return {key: draw(damaged(inner)) for key, inner in value.items()}
    return [draw(damaged(inner)) for inner in value] if isinstance(value, list) else value


@fuzz
@given(damaged(RAW).map(json.dumps) | st.text(max_size=20) | st.sampled_from([DEEP, "9" * 5000]))
def test_any_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_bytes(text.encode("utf-8", "surrogatepass"))
    manifest = outcome(RawManifest.load, tmp_path)
    for file in manifest.files if manifest else []:
        assert file.path == printable(file.path)
        assert ".." not in Path(file.path).parts
        assert 0 <= file.rows < 1 << 63
    outcome(Manifest.load, tmp_path)


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


NPY_HEADERS = [
    f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({size},), }}\n"
    for size in (0, 2, -1, 1 << 62, 1 << 70)
] + ["(" * 5000, "{'descr': 'O', 'fortran_order': False, 'shape': (2,), }\n"]
SHARD = np.zeros(256, "<i4")
SHARD[:3] = 20240520, 1, 2


@fuzz
@given(
    st.binary(max_size=30)
    | st.sampled_from([npy(header) + bytes(4) for header in NPY_HEADERS])
    | st.binary(max_size=12).map(lambda head: head + SHARD.tobytes()[len(head) :] + bytes(4)),
    st.sampled_from(["a.bin", "a.npy", "val.NPY"]),
)
def test_any_token_file(tmp_path: Path, data: bytes, name: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(data)
    file = outcome(open_token_file, path, name)
    assert file is None or len(file.read()) == file.tokens > 0


NAMES = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.arrow", "a.jsonl.zst", "a.csv.gz"]
STARTS = [b"", b"[", b'{"text": ', b"text,id\n", b"ARROW1\0\0", b"\xff\xff\xff\xff\x10\0\0\0"]


@fuzz
@given(st.sampled_from(NAMES), st.sampled_from(STARTS), st.binary(max_size=60))
@example("a.jsonl", DEEP.encode(), b"")
@example("a.json", DEEP.encode(), b"")
@example("a.json", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", b"")
@example("a.jsonl", b'{"text": "a", "token_count": ' + b"9" * 5000 + b"}", b"")
def test_any_bytes_as_text(tmp_path: Path, name: str, start: bytes, data: bytes) -> None:
    (tmp_path / "data").write_bytes(start + data)
    options = ReadOptions("text", "file", "utf-8")
    outcome(to_parquet, tmp_path / "data", name, options, tmp_path / "made.parquet")
