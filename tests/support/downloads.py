"""A project folder whose `python -m pipeline.download` fetches from a hub on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from pipeline.format.parquet import FINEWEB_SCHEMA
from tests.support.hub import FINEWEB, TOKEN, Hub
from tests.support.repo import REPO

# Nothing of the caller's machine decides what is fetched, or from where.
_NOT_OURS = ("GPT2_", "DVC_", "RAY_", "HF_", "HUGGING_FACE", "HUGGINGFACE")


def parquet_of(texts: Iterable[str], group: int = 100) -> bytes:
    """A parquet file in FineWeb's schema, not compressed, its row groups small enough to cut."""
    values = list(texts)
    count = len(values)
    columns = {
        "text": values,
        "id": [f"<urn:{i}>" for i in range(count)],
        "dump": ["CC-MAIN-2013-20"] * count,
        "url": [f"https://example.org/{i}" for i in range(count)],
        "date": ["2013-05-18T00:00:00Z"] * count,
        "file_path": ["s3://example"] * count,
        "language": ["en"] * count,
        "language_score": [0.9] * count,
        "token_count": [len(text) // 2 for text in values],
    }
    out = io.BytesIO()
    table = pa.table(columns, schema=FINEWEB_SCHEMA)
    pq.write_table(table, out, row_group_size=group, compression="none", use_dictionary=False)
    return out.getvalue()


def random_parquet(seed: int, size: int) -> bytes:
    """A parquet file of about ``size`` bytes that nothing compresses well."""
    text = random.Random(seed).randbytes(size // 2).hex()
    return parquet_of((text[i : i + 2000] for i in range(0, len(text), 2000)), 100)


def sample_paths(count: int) -> list[str]:
    """The paths of sample-10BT's first files."""
    return [f"sample/10BT/{i:03d}_00000.parquet" for i in range(count)]


def sample_files(count: int, size: int, seed: int = 0) -> dict[str, bytes]:
    """So many files of sample-10BT, each of about ``size`` bytes."""
    return {path: random_parquet(seed + i, size) for i, path in enumerate(sample_paths(count))}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def environment(hub: Hub, home: Path, **variables: str) -> dict[str, str]:
    """The caller's environment, with the hub in place of the real one."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_NOT_OURS) and not name.lower().endswith("_proxy")
    }
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    kept.pop("PYTHONUNBUFFERED", None)
    return {
        **kept,
        "HOME": str(home),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN,
        **variables,
    }


class Project:
    """A folder with the package, `params.yaml` and `dvc.yaml`, and what its runs printed."""

    def __init__(self, root: Path, hub: Hub, **source: Any) -> None:
        self.root, self.hub = root, hub
        self.raw, self.store = root / "data" / "raw", root / ".work"
        self.home = root.with_name(f"{root.name}-home")
        self.said = ""
        root.mkdir(parents=True)
        self.home.mkdir()
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / "pipeline", root / "pipeline", ignore=ignored)
        shutil.copy2(REPO / "dvc.yaml", root)
        shutil.copy2(REPO / "params.yaml", root)
        hub_source = {"repo": FINEWEB, "config": "sample-10BT", "revision": "main", "files": None}
        self.set(kind="hub", **(hub_source | source))

    def set(self, **source: Any) -> None:
        """Change keys of section `source`."""
        set_source(self.root / "params.yaml", **source)

    def environment(self, **variables: str) -> dict[str, str]:
        ours = {"PYTHONPATH": str(self.root), "GPT2_PARALLEL_DOWNLOADS": "4"}
        return environment(self.hub, self.home, **(ours | variables))

    def run(self, *statuses: int, **variables: str) -> str:
        """Run the stage to its end; its stderr. Fails on a status that is not named, or not 0."""
        return self.end(self.start(**variables), *statuses)

    def start(self, **variables: str) -> subprocess.Popen[bytes]:
        """Start the stage in a session of its own."""
        # To files: a pipe stays open as long as anything of a killed run lives.
        with open(self.home / "out.txt", "wb") as out, open(self.home / "err.txt", "wb") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline.download"],
                cwd=self.root,
                env=self.environment(**variables),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def end(self, process: subprocess.Popen[bytes], *statuses: int, limit: float = 180) -> str:
        """Wait for the stage's end; its stderr. Fails on a status that is not named, or not 0."""
        try:
            process.wait(limit)
        finally:
            kill_tree(process)
        out, err = ((self.home / f"{name}.txt").read_text() for name in ("out", "err"))
        self.said += out + err
        report = f"status {process.returncode}\n{out}\n{err}"
        assert process.returncode in (statuses or (0,)), report
        return err

    def without_ray(self) -> dict[str, str]:
        """Variables with which a run that imports Ray fails."""
        stub = self.home / "no-ray"
        stub.mkdir(exist_ok=True)
        (stub / "ray.py").write_text("raise RuntimeError('Ray is not needed here')\n")
        return {"PYTHONPATH": f"{stub}{os.pathsep}{self.root}"}

    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.raw / "manifest.json").read_text())
        return manifest

    def check(self, files: Mapping[str, bytes]) -> None:
        """`data/raw` holds exactly these files, and the manifest tells of them."""
        manifest = self.manifest()
        described = {entry["path"]: entry for entry in manifest["files"]}
        assert list(described) == sorted(described)
        present = {
            path.relative_to(self.raw).as_posix() for path in self.raw.rglob("*") if path.is_file()
        }
        assert present == {"manifest.json", *described}
        assert sorted(entry["sha256"] for entry in described.values()) == sorted(
            sha256(data) for data in files.values()
        )
        for path, data in files.items():
            name = next(n for n, e in described.items() if e["sha256"] == sha256(data))
            assert Path(name).name.endswith(Path(path).name)
            assert (self.raw / name).read_bytes() == data
            assert described[name]["bytes"] == len(data)
            assert described[name]["rows"] == pq.read_metadata(self.raw / name).num_rows
        self.check_store()

    def check_nothing(self) -> None:
        """Nothing was published, and what the store calls finished is right."""
        assert not self.raw.exists()
        self.check_store()

    def check_store(self) -> None:
        """Each finished file in the store has the hash that names it."""
        for folder in (self.store / "files").glob("*"):
            assert sha256((folder / "data.parquet").read_bytes()) == folder.name

    def check_token(self, *more: Path) -> None:
        """The token stands in no file that was written, and was not printed."""
        assert TOKEN not in self.said
        for top in (self.root, self.home, *more):
            for path in top.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    assert TOKEN.encode() not in path.read_bytes(), path
        assert {request.authorization for request in self.hub.asked("cdn")} <= {None}


def set_source(params: Path, **source: Any) -> None:
    """Change keys of section `source` of a params.yaml; its comments stay."""
    yaml = YAML()
    values = yaml.load(params)
    for key, value in source.items():
        values["source"][key] = value
    with open(params, "w", encoding="utf-8") as file:
        yaml.dump(values, file)


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process, and all that it started."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    if process.poll() is None:
        process.kill()
    for child in tree:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(30)


def interrupted(
    project: Project, files: Mapping[str, bytes], moments: Iterable[float], rng: random.Random
) -> float:
    """SIGKILL the stage whenever so many bytes are sent, then let it end.

    A third of the kills meet the driver alone, and the next run begins at once, while what Ray
    started still dies; a third meet all of it, as when the machine loses its power; a third meet
    one of the workers, and the same run goes on.

    Returns:
        Bytes sent in all, per byte served.
    """
    total = sum(map(len, files.values()))
    process = project.start()

    def sent() -> int:
        return sum(project.hub.sent().values())

    for moment in sorted(moments):
        end = time.monotonic() + 120
        while process.poll() is None and sent() < moment:
            assert time.monotonic() < end, "it stands still"
            time.sleep(0.002)
        assert process.poll() is None, project.end(process)
        kind = rng.choice(["driver", "all", "worker"])
        workers = _workers(process)
        if kind == "worker" and workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(workers).kill()
            continue
        if kind == "all":
            kill_tree(process)
        else:
            process.kill()
            process.wait(30)
        project.check_nothing()
        process = project.start()
    project.end(process)
    project.check(files)
    return sent() / total


def _workers(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """The workers of this process that have a download in hand."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::download" in " ".join(child.cmdline()):
                found.append(child)
    return found


def wait_for(condition: Callable[[], object], seconds: float = 60, every: float = 0.005) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(every)
