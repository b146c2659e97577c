"""A project folder whose `python -m pipeline.download` fetches from a loopback hub."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from pipeline.download.stage import download
from pipeline.format.manifest import RawManifest
from pipeline.format.parquet import FINEWEB_SCHEMA
from pipeline.params import SourceParams
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store
from tests.support.hub import FINEWEB, TOKEN, Hub
from tests.support.repo import REPO
from tests.support.small_data import no_cluster

# Variables of the caller's environment that would change what is fetched, or from where.
_DROPPED = ("GPT2_", "DVC_", "RAY_", "HF_", "HUGGING_FACE", "HUGGINGFACE", "PYTHON")


def random_parquet(seed: int, size: int) -> bytes:
    """Return a parquet file of about ``size`` bytes of random hexadecimal text."""
    text = random.Random(seed).randbytes(size // 2).hex()
    rows = [
        {"text": text[i : i + 2000], "id": f"<urn:{i}>", "token_count": 1000}
        for i in range(0, len(text), 2000)
    ]
    out = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=FINEWEB_SCHEMA)
    pq.write_table(table, out, row_group_size=100, compression="none", use_dictionary=False)
    return out.getvalue()


def sample_paths(count: int) -> list[str]:
    """Return the paths of sample-10BT's first files."""
    return [f"sample/10BT/{i:03d}_00000.parquet" for i in range(count)]


def sample_files(count: int, size: int) -> dict[str, bytes]:
    """Return the first ``count`` files of sample-10BT, of about ``size`` bytes each."""
    return {path: random_parquet(i, size) for i, path in enumerate(sample_paths(count))}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hub_variables(hub: Hub) -> dict[str, str]:
    """Return the environment variables with which a process uses the loopback hub."""
    flags = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, **flags}


class Downloads:
    """A `data/raw` and a store, which the stage fills from a loopback hub."""

    def __init__(self, root: Path, hub: Hub) -> None:
        self.root, self.hub = root, hub
        self.raw, self.store = root / "data" / "raw", root / ".work"
        root.mkdir(parents=True)

    def download(
        self,
        patience: float = 10,
        variables: Mapping[str, str] | None = None,
        threads: int = 1,
        **source: Any,
    ) -> RawManifest:
        """Run the stage in this process.

        As on another node of a cluster, the tasks' environment has neither token nor hub.
        """
        environment = hub_variables(self.hub) | dict(variables or {})

        def run_tasks(
            function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], *_: Any, **__: Any
        ) -> Iterator[tuple[int, Any]]:
            with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(threads) as pool:
                for name in environment:
                    patch.delenv(name)
                yield from enumerate(pool.map(lambda task: function(*task), tasks))

        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(self.root / "no-token"))
            patch.setattr("pipeline.download.stage.cluster", no_cluster)
            patch.setattr("pipeline.download.stage.run_tasks", run_tasks)
            machine = Machine(work_dir=self.store, patience=patience)
            params = SourceParams(kind="hub", **source)
            return download({"main": params}, Store.open(machine), self.raw, machine)

    def check(self, files: Mapping[str, bytes]) -> None:
        """Assert that `data/raw` and its manifest hold exactly these files."""
        described = {file.path: file for file in RawManifest.load(self.raw).files}
        assert list(described) == sorted(files)
        present = {
            path.relative_to(self.raw).as_posix() for path in self.raw.rglob("*") if path.is_file()
        }
        assert present == {"manifest.json", *files}
        for path, data in files.items():
            assert (self.raw / path).read_bytes() == data
            assert described[path].sha256 == sha256(data)
            assert described[path].bytes == len(data)
            assert described[path].rows == pq.read_metadata(self.raw / path).num_rows
        self.check_store()

    def check_nothing_published(self) -> None:
        """Assert that there is no `data/raw`, and that all files in the store are right."""
        assert not self.raw.exists()
        self.check_store()

    def check_store(self) -> None:
        """Assert that each complete file in the store has the sha256 that is its key."""
        for folder in (self.store / "files").glob("*"):
            assert sha256((folder / "data.parquet").read_bytes()) == folder.name


class Project(Downloads):
    """A folder with the package, `params.yaml` and `dvc.yaml`; collects the output of its runs."""

    def __init__(self, root: Path, hub: Hub) -> None:
        super().__init__(root, hub)
        self.home = root.with_name(f"{root.name}-home")
        self.output = ""
        self.home.mkdir()
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / "pipeline", root / "pipeline", ignore=ignored)
        shutil.copy2(REPO / "dvc.yaml", root)
        shutil.copy2(REPO / "params.yaml", root)
        set_source(
            root / "params.yaml",
            kind="hub", repo=FINEWEB, config="sample-10BT", revision="main", files=None,
        )  # fmt: skip

    def run(self, *statuses: int, **variables: str) -> str:
        """Run the stage and return its stderr; assert one of the exit statuses (default 0)."""
        return self.end(self.start(**variables), *statuses)

    def start(self, **variables: str) -> subprocess.Popen[bytes]:
        """Start the stage in a new session."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(_DROPPED) and not name.lower().endswith("_proxy")
        }
        defaults = {"PYTHONPATH": str(self.root), "GPT2_PARALLEL_DOWNLOADS": "4"}
        defaults |= {"HOME": str(self.home), **hub_variables(self.hub)}
        # Not to a pipe, which stays open while any process of a killed run is alive.
        with open(self.home / "out.txt", "wb") as out, open(self.home / "err.txt", "wb") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline.download"],
                cwd=self.root,
                env=kept | defaults | variables,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def end(self, process: subprocess.Popen[bytes], *statuses: int, limit: float = 180) -> str:
        """Wait for the stage and return its stderr; assert one of the exit statuses (default 0)."""
        try:
            process.wait(limit)
        finally:
            kill_tree(process)
        out, err = ((self.home / f"{name}.txt").read_text() for name in ("out", "err"))
        self.output += out + err
        report = f"status {process.returncode}\n{out}\n{err}"
        assert process.returncode in (statuses or (0,)), report
        return err

    def without_ray(self) -> dict[str, str]:
        """Return variables with which importing Ray fails."""
        stub = self.home / "no-ray"
        stub.mkdir(exist_ok=True)
        (stub / "ray.py").write_text("raise RuntimeError('Ray is not needed here')\n")
        return {"PYTHONPATH": f"{stub}{os.pathsep}{self.root}"}

    def check_token(self, *more: Path) -> None:
        """Assert that the token was neither written to a file, nor printed, nor sent to the CDN."""
        assert TOKEN not in self.output
        for top in (self.root, self.home, *more):
            for path in top.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    assert TOKEN.encode() not in path.read_bytes(), path
        assert {request.authorization for request in self.hub.asked("cdn")} <= {None}


def set_source(params: Path, **source: Any) -> None:
    """Set keys of the source of a params.yaml, keeping its comments."""
    yaml = YAML()
    values = yaml.load(params)
    for key, value in source.items():
        values["sources"]["main"][key] = value
    with open(params, "w", encoding="utf-8") as file:
        yaml.dump(values, file)


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """Send SIGKILL to a process and its descendants."""
    tree = []
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.kill()
    for child in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait(30)
