"""A training run: what it is made of, where it lies, and what it leaves behind.

A run is addressed by its ``run_key``: parameters of model and training, content of the data, and
the code. Its folder in the store, ``.work/runs/<run_key>/``, grows while it trains:

    run.json         what it is: all that its key is made of, and what it adopted (adopt.py)
    step-00000200/   checkpoints (checkpoint.py)
    log.jsonl        its history (history.py)
    starts.jsonl     the run record: a line a start, with commit, machine and versions (describe.py)
    final.json       written last: the metrics of the finished run
    failed.json      a failure that would only repeat itself

What the stage promises to DVC is published from there at the end: the last checkpoint. The best by
validation stays in the run's folder, which the end names where the two differ.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline import TokenStream
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import load_section
from pipeline.store import atomic
from pipeline.store.code_key import code_key
from pipeline.store.store import Store, publish
from train.checkpoint import directory, init_from
from train.data.order import DataOrder
from train.data.split import Split, share_batch
from train.evals import reference_curve
from train.monitor.history import History
from train.optim.schedule import BatchSchedule
from train.params import ModelParams, TrainParams
from train.validation import check_split

TOKENS = Path("data/tokens")
VERIFIED = Path("data/verified.json")
CHECKPOINT = Path("artifacts/checkpoint")
METRICS = Path("metrics/train.json")
RECORD = "run.json"
CURVES = Path("metrics/live")
LOG = Path("artifacts/log.jsonl")

LOCK_PATIENCE = 60.0  # seconds: workers of a torchrun that was killed need some to save and leave


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides a run, checked, and its folder."""

    model: ModelParams
    params: TrainParams
    machine: Machine
    train_data: TokenStream
    val_data: TokenStream
    code_key: str

    @classmethod
    def open(cls) -> Run:
        """The run that `params.yaml` and `data/` describe.

        Raises:
            UserError: A parameter, the machine's settings or the data make no run.
        """
        model = load_section("model", ModelParams)
        params = load_section("train", TrainParams)
        machine = Machine.load()
        params.batches(model.block_size)
        start = params.start()
        if start is not None and CHECKPOINT.resolve() in (p := start.folder.resolve(), *p.parents):
            raise UserError(
                f"params.yaml: train.init: {CHECKPOINT} is what this stage makes, and DVC removes "
                f"it before; name the run's folder in the store, or a copy"
            )
        train_data, val_data = TokenStream(TOKENS, "train"), TokenStream(TOKENS, "val")
        _check_verified()
        if len(train_data) < model.block_size + 1:
            raise UserError(
                f"params.yaml: model.block_size: {model.block_size}, but the train split holds "
                f"only {len(train_data)} tokens; take a smaller one or more source files"
            )
        check_split("train.val_tokens", val_data, params.val_tokens)
        return cls(
            model=model,
            params=params,
            machine=machine,
            train_data=train_data,
            val_data=val_data,
            code_key=code_key("train"),
        )

    @property
    def dataset_key(self) -> str:
        """Content of the data."""
        return self.train_data.manifest.dataset_key

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the weights, as JSON values."""
        start = self.params.start()
        return {
            "model": self.model.model_dump(mode="json"),
            "train": self.params.model_dump(mode="json"),
            "dataset_key": self.dataset_key,
            "code_key": self.code_key,
            "starts_from": init_from.content_key(start) if start else None,
        }

    @cached_property
    def key(self) -> str:
        """The run's address: sha256 of all that decides its weights."""
        return atomic.sha256_json(self.identity)

    @cached_property
    def store(self) -> Store:
        """The store that the run's folder lies in."""
        return Store.open(self.machine)

    @cached_property
    def folder(self) -> Path:
        """The run's folder in the store."""
        return self.store.folder("runs", self.key)

    @cached_property
    def batches(self) -> BatchSchedule:
        """Which global samples each step takes."""
        return self.params.batches(self.model.block_size)

    def samples(self, step: int) -> int:
        """Windows seen after ``step`` complete steps."""
        return self.batches(step)[0]

    def tokens(self, step: int) -> int:
        """The same in tokens."""
        return self.samples(step) * self.model.block_size

    @cached_property
    def order(self) -> DataOrder:
        """The order of the training data."""
        return DataOrder(
            n_tokens=len(self.train_data),
            block_size=self.model.block_size,
            seed=self.params.seed,
            order=self.params.order,
        )

    def split(self, world_size: int, device: str) -> Split:
        """How the batch is shared by so many processes.

        Raises:
            UserError: It cannot be shared evenly.
        """
        return share_batch(self.model, self.params, world_size, self.machine.micro_batch, device)

    def compiles(self, device: str) -> bool:
        """Whether the model is compiled: as the machine's settings say, else on a GPU."""
        return device == "cuda" if self.machine.compile is None else self.machine.compile

    @property
    def history(self) -> History:
        """The run's log, and the curves that DVC shows of it."""
        return History(self.folder / "log.jsonl", CURVES)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Holds the run for this process.

        Raises:
            UserError: Another process holds it, and goes on doing so.
        """
        return _patient_lock(self.store, self.key)

    def record(self) -> dict[str, Any]:
        """`run.json`: written when the run begins."""
        path = self.folder / RECORD
        if not path.exists():
            atomic.write_json(path, {**self.identity, "adopted": []})
        value: dict[str, Any] = json.loads(path.read_bytes())
        return value

    def clear(self) -> None:
        """Forgets all that was done: the run begins anew."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def check_not_failed(self) -> None:
        """Refuses to repeat a failure.

        Raises:
            UserError: The run failed in a way that does not depend on luck.
        """
        path = self.folder / "failed.json"
        if path.exists():
            what = json.loads(path.read_bytes())["what"]
            raise UserError(
                f"this run failed before: {what}; change params.yaml, "
                "or try again from the start with GPT2_FRESH=1"
            )

    def fail(self, what: str) -> None:
        """Leaves a marker, so that a restart does not replay the failure."""
        atomic.write_json(self.folder / "failed.json", {"what": what})

    def note_start(self, record: dict[str, Any]) -> None:
        """Adds a line to the run record."""
        with open(self.folder / "starts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")

    def beside_published(self, step: int, loss: float) -> reference_curve.Point | None:
        """A validation beside the published curve; None where there is nothing to compare."""
        model, train = self.model.config().to_dict(), self.params.model_dump(mode="json")
        if reference_curve.why_not(model, train, self.train_data.manifest.source):
            return None
        return reference_curve.Point.at(step, loss)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Marks the run as finished."""
        atomic.write_json(self.folder / "final.json", metrics)

    def finished(self) -> Path | None:
        """The last checkpoint of a finished run, its bytes verified; None for any other run."""
        if not (self.folder / "final.json").exists():
            return None
        found = directory.latest(self.folder)
        if found is None or found[1]["step"] != self.params.steps:
            return None
        return found[0]

    def publish(self, last: Path) -> None:
        """Puts the finished run where DVC expects it: checkpoint, metrics, curves, and log."""
        self.history.draw()
        CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
        publish({name: last / name for name in directory.FILES}, CHECKPOINT)
        atomic.write_bytes(LOG, self.history.path.read_bytes())
        atomic.write_bytes(METRICS, (self.folder / "final.json").read_bytes())

    def ending(self) -> str:
        """What a finished run came to, in a line."""
        m = json.loads((self.folder / "final.json").read_bytes())
        best = directory.best(self.folder)
        other = best is not None and directory.step_of(best) != m["step"]
        return (
            f"trained {m['step']:,} steps, {m['tokens']:,} tokens: val loss {m['val_loss']:.4f} "
            f"(best {m['best_val_loss']:.4f}), {m['tokens_per_second']:,.0f} tokens/s; "
            f"model in {CHECKPOINT}, metrics in {METRICS}"
            + (f"; the best that was saved is {best}" if other else "")
        )


def _check_verified() -> None:
    """Refuses data that `verify` has not passed."""
    manifest = atomic.sha256_file(TOKENS / "manifest.json")
    try:
        passed = json.loads(VERIFIED.read_bytes())["manifest_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{VERIFIED}: missing or unreadable; run python -m pipeline.verify"
        ) from None
    if manifest != passed:
        raise UserError(
            f"{VERIFIED}: is of other data than {TOKENS}; run python -m pipeline.verify"
        )


@contextlib.contextmanager
def _patient_lock(store: Store, key: str) -> Iterator[None]:
    end = time.monotonic() + LOCK_PATIENCE
    told = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(store.lock("runs", key, wait=False))
                break
            except UserError:
                if time.monotonic() > end:
                    raise
                if not told:
                    print("waiting for another process to leave this run", file=sys.stderr)
                    told = True
                time.sleep(0.5)
        yield
