"""A project folder with a little data and a tiny model, in which the real commands run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.format.manifest import Manifest, RawManifest, Shard, Source, Tokenizer, Totals
from pipeline.format.tokenizer import EOT, N_VOCAB, RANKS_SHA256
from pipeline.runtime.params_file import SECTIONS
from pipeline.store import atomic
from tests.support.repo import REPO

MODEL = {"size": None, "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
TRAIN = {
    "seed": 1, "steps": 12, "batch_tokens": 128, "learning_rate": 1e-2, "warmup_steps": 2,
    "dtype": "float32", "val_every": 6, "val_tokens": 200, "checkpoint_every": 4, "log_every": 2,
}  # fmt: skip
EVALUATE = {
    "val_tokens": 300, "prompts": ["", "The people"], "samples": 1, "sample_tokens": 8,
}  # fmt: skip


def write_tokens(folder: Path, splits: dict[str, list[np.ndarray]], key: str = "k" * 64) -> None:
    """A token folder as `pipeline.tokenize` leaves it, from tokens made up here."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, totals = [], {}
    for split, parts in splits.items():
        for number, tokens in enumerate(parts):
            name = f"{split}-{number:05d}.bin"
            header = np.zeros(256, dtype="<i4")  # llm.c's layout
            header[:3] = 20240520, 1, len(tokens)
            content = header.tobytes() + tokens.astype("<u2").tobytes()
            (folder / name).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            shards.append(
                Shard.model_validate(
                    {
                        "name": name,
                        "split": split,
                        "tokens": len(tokens),
                        "docs": int((tokens == EOT).sum()),
                        "text_bytes": 0,
                        "sha256": digest,
                        "docs_sha256": "",
                        "parts": [],
                    }
                )
            )
        n = sum(map(len, parts))
        totals[split] = Totals(shards=len(parts), docs=0, tokens=n, text_bytes=0)
    manifest = Manifest.model_validate(
        {
            "dataset_key": key,
            "format": "llm.c",
            "dtype": "uint16",
            "tokenizer": Tokenizer(
                name="gpt2", ranks_sha256=RANKS_SHA256, n_vocab=N_VOCAB, eot=EOT
            ),
            "params": {},
            "source": RawManifest(source=Source(kind="test", repo="", revision=""), files=[]),
            "shards": shards,
            "totals": totals,
            "skipped": {},
        }
    )
    atomic.write_json(folder / "manifest.json", manifest.model_dump(mode="json"))


def some_tokens(n: int, seed: int) -> np.ndarray:
    """Tokens that can be learnt: few, in a noisy cycle, with a document's border now and then."""
    rng = np.random.default_rng(seed)
    tokens = (np.arange(n) * 7 + rng.integers(0, 3, n)) % 200
    tokens[::501] = EOT
    return tokens.astype(np.uint16)


@dataclass
class Project:
    """A folder with `params.yaml`, `dvc.yaml` and `data/`, and what is done in it."""

    folder: Path
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def write(self, **changes: dict[str, Any]) -> None:
        """Writes `params.yaml` with changed keys, section by section."""
        base: dict[str, dict[str, Any]] = {"model": MODEL, "train": TRAIN, "evaluate": EVALUATE}
        self.sections = {name: {**base.get(name, {}), **changes.get(name, {})} for name in SECTIONS}
        (self.folder / "params.yaml").write_text(json.dumps(self.sections))  # JSON is YAML

    def write_data(self, key: str = "k" * 64, n_train: int = 5000, n_val: int = 2000) -> None:
        """Writes tokens, verified."""
        half = n_train // 3
        tokens = some_tokens(n_train, seed=1)
        write_tokens(
            self.folder / "data/tokens",
            {"train": [tokens[:half], tokens[half:]], "val": [some_tokens(n_val, seed=2)]},
            key,
        )
        self.verify()

    def verify(self) -> None:
        """What `pipeline.verify` leaves when the data are good."""
        digest = atomic.sha256_file(self.folder / "data/tokens/manifest.json")
        atomic.write_json(self.folder / "data/verified.json", {"manifest_sha256": digest})

    def environ(self, **more: object) -> dict[str, str]:
        """The environment of a command run here: this repository's code, and no GPU."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPT2_", "DVC_", "GIT_"))}
        return {
            **clean,
            "PYTHONPATH": str(REPO),
            "DVC_STAGE": "train",  # as under DVC: nothing outlives its parent
            "DVCLIVE_LOG_LEVEL": "ERROR",
            "GPT2_DEVICE": "cpu",
            "OMP_WAIT_POLICY": "passive",  # no spinning where cores are few
            **self.environment,
            **{k: str(v) for k, v in more.items()},
        }

    def start(self, *command: str, **environment: object) -> subprocess.Popen[str]:
        """Starts `python -m ...` in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=self.environ(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, **environment: object) -> subprocess.CompletedProcess[str]:
        """Runs `python -m ...` to its end."""
        process = self.start(*command, **environment)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            kill_group(process)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def train(self, processes: int = 1, **environment: object) -> subprocess.CompletedProcess[str]:
        """Trains to the end, as DVC would; fails the test where training fails."""
        done = self.run("train.launch", GPT2_PROCESSES=processes, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def start_ranks(
        self,
        n: int,
        *flags: str,
        module: str = "train",
        each: Sequence[dict[str, object]] = (),
        **environment: object,
    ) -> list[subprocess.Popen[str]]:
        """Starts the processes that torchrun would start, without the seconds that it takes.

        Args:
            n: How many.
            flags: Of each.
            module: What each runs.
            each: The environment of each, where they differ.
            environment: Of all.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return [
            self.start(
                module,
                *flags,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE=n,
                LOCAL_WORLD_SIZE=n,
                **environment,
                **(each[rank] if each else {}),
            )
            for rank in range(n)
        ]

    def train_ranks(self, n: int, **environment: Any) -> None:
        """Trains to the end with ``n`` processes."""
        processes = self.start_ranks(n, **environment)
        try:
            for process in processes:
                out, err = process.communicate(timeout=120)
                assert process.returncode == 0, out + err
        finally:
            for process in processes:
                kill_group(process)

    @property
    def run_folder(self) -> Path:
        """The only run in the store."""
        (folder,) = (self.folder / ".work/runs").iterdir()
        return folder

    def weights(self) -> bytes:
        """The published weights."""
        return (self.folder / "artifacts/checkpoint/model.safetensors").read_bytes()

    def metrics(self, name: str = "train") -> dict[str, Any]:
        """A metrics file."""
        return json.loads((self.folder / f"metrics/{name}.json").read_text())


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kills a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def make_project(folder: Path) -> Project:
    """A project with default parameters and data."""
    project = Project(folder)
    (folder / "stage_code.py").write_text("")
    (folder / "dvc.yaml").write_text("stages: {train: {cmd: none, deps: [stage_code.py]}}")
    project.write()
    project.write_data()
    return project
