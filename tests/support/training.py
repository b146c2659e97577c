"""A project folder with a little data and a tiny model, for running the real commands."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.format.manifest import Manifest, RawManifest, Shard, Source, Tokenizer, Totals
from pipeline.format.tokenizer import EOT, N_VOCAB, RANKS_SHA256
from pipeline.runtime.errors import Stopped
from pipeline.runtime.params_file import SECTIONS
from pipeline.store import atomic
from tests.support.repo import REPO
from tests.support.waiting import wait_for
from train.checkpoint import directory
from train.data.loader import Batches
from train.distributed.rendezvous import process_group
from train.loop import train
from train.monitor.history import parse
from train.run import Run
from train.trainer import Trainer

MODEL = {"size": None, "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
TRAIN = {
    "seed": 1, "steps": 12, "batch_tokens": 128, "learning_rate": 1e-2, "warmup_steps": 2,
    "dtype": "float32", "val_every": 6, "val_tokens": 200, "checkpoint_every": 4, "log_every": 2,
}  # fmt: skip
EVALUATE = {
    "val_tokens": 300, "prompts": ["", "The people"], "samples": 1, "sample_tokens": 8,
}  # fmt: skip


def write_tokens(folder: Path, splits: dict[str, list[np.ndarray]], key: str = "k" * 64) -> None:
    """Write a token folder in the format of `pipeline.tokenize`, without running it."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for split, parts in splits.items():
        for number, tokens in enumerate(parts):
            name = f"{split}-{number:05d}.bin"
            content = shard_header(len(tokens)) + tokens.astype("<u2").tobytes()
            (folder / name).write_bytes(content)
            digest, docs = hashlib.sha256(content).hexdigest(), int((tokens == EOT).sum())
            shards.append(shard_entry(name, len(tokens), docs=docs, sha256=digest))
    write_manifest(folder, shards, key)


def shard_header(tokens: int) -> bytes:
    """Return the header of a shard, in llm.c's layout."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, tokens
    return header.tobytes()


def shard_entry(
    name: str, tokens: int, *, docs: int = 0, sha256: str = "", source: str = "main"
) -> Shard:
    """Describe a shard for the manifest, as one without a document index."""
    values = {"name": name, "source": source, "split": name.split("-")[0], "tokens": tokens}
    return Shard.model_validate(
        {**values, "docs": docs, "text_bytes": 0, "sha256": sha256, "docs_sha256": "", "parts": []}
    )


def write_manifest(folder: Path, shards: list[Shard], key: str = "k" * 64) -> None:
    """Write the manifest of a token folder."""
    totals = {}
    for split in {shard.split for shard in shards}:
        counts = [shard.tokens for shard in shards if shard.split == split]
        totals[split] = Totals(shards=len(counts), docs=0, tokens=sum(counts), text_bytes=0)
    origin = Source(kind="test", repo="", revision="")
    names = sorted({shard.source for shard in shards}) or ["main"]
    manifest = Manifest(
        dataset_key=key,
        format="llm.c",
        dtype="uint16",
        tokenizer=Tokenizer(name="gpt2", ranks_sha256=RANKS_SHA256, n_vocab=N_VOCAB, eot=EOT),
        params={},
        source=RawManifest(sources=dict.fromkeys(names, origin), files=[]),
        shards=shards,
        totals=totals,
        skipped={},
    )
    atomic.write_json(folder / "manifest.json", manifest.model_dump(mode="json"))


def some_tokens(n: int, seed: int) -> np.ndarray:
    """Generate tokens that can be learnt: a noisy cycle of 200 values, documents of 501 tokens."""
    rng = np.random.default_rng(seed)
    tokens = (np.arange(n) * 7 + rng.integers(0, 3, n)) % 200
    tokens[::501] = EOT
    return tokens.astype(np.uint16)


@dataclass
class Project:
    """A folder with `params.yaml`, `dvc.yaml` and `data/`, and the commands run in it.

    The fixture `project` kills the processes that a test has left.
    """

    folder: Path
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def write(self, **changes: dict[str, Any]) -> None:
        """Write `params.yaml`: the defaults of this module, with changes per section."""
        base: dict[str, dict[str, Any]] = {"model": MODEL, "train": TRAIN, "evaluate": EVALUATE}
        base["sources"] = {"main": {}}
        self.sections = {name: {**base.get(name, {}), **changes.get(name, {})} for name in SECTIONS}
        (self.folder / "params.yaml").write_text(json.dumps(self.sections))  # JSON is YAML

    def write_data(self, key: str = "k" * 64, n_train: int = 5000, n_val: int = 2000) -> None:
        """Write `data/tokens` and mark them as verified."""
        half = n_train // 3
        tokens = some_tokens(n_train, seed=1)
        write_tokens(
            self.folder / "data/tokens",
            {"train": [tokens[:half], tokens[half:]], "val": [some_tokens(n_val, seed=2)]},
            key,
        )
        self.verify()

    def verify(self) -> None:
        """Write what `pipeline.verify` writes for intact data."""
        digest = atomic.sha256_file(self.folder / "data/tokens/manifest.json")
        atomic.write_json(self.folder / "data/verified.json", {"manifest_sha256": digest})

    def environ(self, **more: object) -> dict[str, str]:
        """Return the environment of a command: this repository's code, and no GPU."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPT2_", "DVC_", "GIT_"))}
        return {
            **clean,
            "PYTHONPATH": str(REPO),
            "DVC_STAGE": "train",  # as under DVC: no process outlives its parent
            "DVCLIVE_LOG_LEVEL": "ERROR",
            "GPT2_DEVICE": "cpu",
            "OMP_WAIT_POLICY": "passive",  # no busy waiting on few cores
            **self.environment,
            **{k: str(v) for k, v in more.items()},
        }

    def start(self, *command: str, **environment: object) -> subprocess.Popen[str]:
        """Start `python -m ...` in its own process group."""
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=self.environ(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *command: str, **environment: object) -> subprocess.CompletedProcess[str]:
        """Run `python -m ...` to its end."""
        process = self.start(*command, **environment)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            kill_group(process)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def train(self, processes: int = 1, **environment: object) -> subprocess.CompletedProcess[str]:
        """Train to the end as DVC does; fail the test if training fails."""
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
        """Start the processes that torchrun would start, without its seconds of overhead.

        Environment variables are given for all processes, or in ``each`` per process.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return [
            self.start(
                module,
                *flags,
                TORCHELASTIC_RUN_ID="test",
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
        """Train to the end with ``n`` processes and no torchrun."""
        for process in self.start_ranks(n, **environment):
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, out + err

    def wait_for_step(
        self, process: subprocess.Popen[str], step: int, work: str = ".work", seconds: float = 60
    ) -> None:
        """Wait until a run has saved a step, or a later one."""

        def saved() -> bool:
            found = (self.folder / work).glob("runs/*/step-*")
            return any(directory.step_of(path) >= step for path in found)

        wait_for(lambda: saved() or process.poll() is not None, seconds)
        assert process.poll() is None, process.communicate()

    def losses(self, work: str) -> dict[int, float]:
        """Return the logged training losses of the only run in a store, by step."""
        (path,) = (self.folder / work).glob("runs/*/log.jsonl")
        lines = map(json.loads, path.read_text().splitlines())
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}

    @property
    def run_folder(self) -> Path:
        """Folder of the only run in the store."""
        (folder,) = (self.folder / ".work/runs").iterdir()
        return folder

    def weights(self) -> bytes:
        """Return the bytes of the published weights."""
        return (self.folder / "artifacts/checkpoint/model.safetensors").read_bytes()

    def published(self) -> dict[str, bytes]:
        """Return the bytes of each file of the published checkpoint."""
        folder = self.folder / "artifacts/checkpoint"
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def results(self, name: str = "training") -> dict[str, Any]:
        """Read the results of training or evaluation."""
        results: dict[str, Any] = json.loads((self.folder / f"artifacts/{name}.json").read_text())
        return results


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a process and all processes of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def make_project(folder: Path) -> Project:
    """Create a project with default parameters and data."""
    project = Project(folder)
    (folder / "stage_code.py").write_text("")
    (folder / "dvc.yaml").write_text("stages: {train: {cmd: none, deps: [stage_code.py]}}")
    project.write()
    project.write_data()
    return project


def batches(run: Run, trainer: Trainer, first: int, stop: int | None = None) -> Batches:
    """Make the loader of this rank for steps [first, stop), or for all steps from ``first`` on."""
    return Batches(
        run.train_data,
        run.order,
        trainer.split,
        rank=trainer.world.rank,
        spans=run.batches.spans(first, stop),
        device=trainer.world.device,
    )


def write_hellaswag() -> list[dict[str, Any]]:
    """Write 12 tasks to `tasks.jsonl` in the working directory, and return them."""
    text = "the people of this land saw a wide river and went over it in boats"
    words = text.split()
    tasks = [
        {
            "activity_label": "Rowing",
            "ctx_a": " ".join(words[i % 7 :]) + ".",
            "ctx_b": "they then",
            "ctx": " ".join([*words[i % 7 :], "they then"]),
            "endings": [" ".join(words[k : k + 1 + (i + k) % 4]) for k in range(4)],
            "label": str(i % 4),
        }
        for i in range(12)
    ]
    Path("tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return tasks


def train_here() -> Run:
    """Train the run of the current folder in this process."""
    run = Run.open()
    with process_group("cpu") as world, run.lock():
        train(run, world)
    return run


def records(run: Run, name: str) -> dict[int, Any]:
    """The logged values of a curve, by step."""
    log = run.folder / "log.jsonl"  # as it is now: `run.history` reads it once
    return {r["step"]: r[name] for r in parse(log.read_bytes(), str(log)) if name in r}


def stop_in(
    monkeypatch: pytest.MonkeyPatch, method: str, call: int, number: int = signal.SIGTERM
) -> None:
    """Train, and stop the run by a signal at the n-th call, from 1, of a method of the trainer."""
    original, calls = getattr(Trainer, method), count(1)

    def method_and_signal(self: Trainer, *args: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, method, method_and_signal)
        with pytest.raises(Stopped):
            train_here()
