"""A training run: what decides it, its folder in the store, and what it publishes.

A run is addressed by its ``run_key``, the sha256 of all that decides its weights: the parameters
of model and training that do not merely observe, the content of the data, and the code. Its folder
in the store, ``.work/runs/<run_key>/``, grows during training:

    run.json         all that the key is made of, and the runs that were adopted (launch/adopt.py)
    step-00000200/   checkpoints (checkpoint/directory.py)
    log.jsonl        the log (monitor/history.py)
    starts.jsonl     one line per start: commit, machine and versions (run_summary.py)
    final.json       the summary of the finished run (run_summary.py); written last
    failed.json      a failure that would only repeat itself

At the end the last checkpoint is published to the outs of the DVC stage. The best checkpoint by
validation loss stays in the run's folder; the final message names it where the two differ.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from model.size import flops_per_token
from pipeline import TokenStream
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine, project_root
from pipeline.runtime.params_file import load_section
from pipeline.store import atomic
from pipeline.store.code_key import code_key
from pipeline.store.store import Store, publish
from train.checkpoint import directory, init_from
from train.data.mixed_order import MixedOrder, sampling_order
from train.data.order import DataOrder
from train.data.shard_check import check_verified
from train.data.split import Split, share_batch
from train.distributed import compiler
from train.evals import reference_curve
from train.monitor.history import History
from train.monitor.loggers import Loggers
from train.numerics import Dtype, native_dtype
from train.optim.schedule import BatchSchedule
from train.params import ModelParams, TrainParams
from train.validation import check_val_tokens

TOKENS = Path("data/tokens")
CHECKPOINT = Path("artifacts/checkpoint")
SUMMARY = Path("artifacts/training.json")
METRICS = Path("metrics/train.json")
# Numbers of the summary by which runs are compared, and the head of the chain, for git to keep.
COMPARED = ("loss", "val_loss", "hellaswag_acc_completion", "tokens_per_second", "mfu")
RECORD = "run.json"
FINAL = "final.json"
FAILED = "failed.json"
CURVES = Path("metrics/live")
LOG = Path("artifacts/log.jsonl")

LOCK_TIMEOUT = 60.0  # seconds: workers of a killed torchrun need some to save and exit


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides a run, validated, and its folder; `dtype: auto` is resolved."""

    model: ModelParams
    params: TrainParams
    machine: Machine
    train_data: TokenStream
    val_data: TokenStream
    code_key: str

    @classmethod
    def open(cls) -> Run:
        """Return the run that `params.yaml` and `data/` describe.

        Raises:
            UserError: A parameter, a machine setting or the data is missing or impossible.
        """
        model = load_section("model", ModelParams)
        machine = Machine.load()
        params = load_section("train", TrainParams).resolved(native_dtype(machine.device))
        params.batches(model.block_size)
        if params.invariant and machine.loss_chunk:
            raise UserError(
                f"loss_chunk (machine.yaml, GPT2_LOSS_CHUNK): {machine.loss_chunk} changes the "
                "rounding, which train.invariant keeps; remove it"
            )
        start = params.start()
        outs = {(root / CHECKPOINT).resolve() for root in (Path(), project_root())}
        if start and not outs.isdisjoint((at := start.folder.resolve(), *at.parents)):
            raise UserError(
                f"params.yaml: train.init: {CHECKPOINT} is an out of this stage, which DVC removes "
                f"before the stage runs; name the run's folder in the store, or a copy"
            )
        train_data, val_data = TokenStream(TOKENS, "train"), TokenStream(TOKENS, "val")
        check_verified(TOKENS)
        if len(train_data) < model.block_size + 1:
            raise UserError(
                f"params.yaml: model.block_size: {model.block_size}, but the train split has only "
                f"{len(train_data)} tokens; set a smaller one, or take more source files"
            )
        check_val_tokens("train.val_tokens", val_data, params.val_tokens)
        run = cls(
            model=model,
            params=params,
            machine=machine,
            train_data=train_data,
            val_data=val_data,
            code_key=code_key("train"),
        )
        _ = run.order  # raises a UserError where train.mixture does not fit the data
        return run

    @property
    def dataset_key(self) -> str:
        """Hash of the content of the data."""
        return self.train_data.manifest.dataset_key

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the weights, as JSON values."""
        start = self.params.start()
        return {
            "model": self.model.model_dump(mode="json"),
            "train": self.params.deciding(),
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
        """The store that holds the run's folder."""
        return Store.open(self.machine)

    @cached_property
    def folder(self) -> Path:
        """The run's folder in the store."""
        return self.store.folder("runs", self.key)

    @cached_property
    def batches(self) -> BatchSchedule:
        """The global samples of each step."""
        return self.params.batches(self.model.block_size)

    def samples(self, step: int) -> int:
        """Windows trained on after ``step`` complete steps."""
        return self.batches(step)[0]

    def tokens(self, step: int) -> int:
        """Tokens trained on after ``step`` complete steps."""
        return self.samples(step) * self.model.block_size

    @cached_property
    def order(self) -> DataOrder | MixedOrder:
        """The sampling order of the training data."""
        return sampling_order(self.params, self.train_data, self.model.block_size)

    def split(self, world_size: int, device: str) -> Split:
        """Split the batch among processes.

        Raises:
            UserError: There is no even split.
        """
        return share_batch(self.model, self.params, world_size, self.machine.micro_batch, device)

    @property
    def dtype(self) -> Dtype:
        """Type of the matrix products."""
        return self.params.matmul_dtype()

    def compiles(self, device: str) -> bool:
        """Whether the model is compiled."""
        return self.why_eager(device) is None

    def why_eager(self, device: str) -> str | None:
        """Why the model is not compiled: `compile` of machine.yaml, or by default where it pays."""
        per_token = flops_per_token(self.model.config(), self.model.block_size)
        flops = per_token * self.tokens(self.params.steps)
        return compiler.why_eager(self.machine.compile, device, flops)

    @cached_property
    def history(self) -> History:
        """The run's log, read once, and the curves that DVC shows of it."""
        loggers = Loggers(self.machine.loggers, self.folder)
        return History(self.folder / "log.jsonl", CURVES, self.params.log_every, loggers)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            Busy: Another process still holds it after `LOCK_TIMEOUT` seconds.
            UserError: The store cannot be written.
        """

        def announce() -> None:
            print("waiting for another process to release this run", file=sys.stderr)

        with self.store.lock_within("runs", self.key, LOCK_TIMEOUT, announce):
            yield

    def record(self) -> dict[str, Any]:
        """Read `run.json`, written when the run begins."""
        path, adopted = self.folder / RECORD, []
        try:
            record = atomic.read_sealed(path)
            if isinstance(record.get("adopted"), list):
                return record
            raise ValueError("no list of adopted runs")
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            _warn(path, error, "written again")
            if found := directory.latest(self.folder, self.samples):
                adopted = found[1].get("adopted", [])
            atomic.remove(path)
        atomic.write_json(path, atomic.sealed({**self.identity, "adopted": adopted}))
        return {**self.identity, "adopted": adopted}

    def clear(self) -> None:
        """Delete all that was done: the run starts from scratch."""
        for path in self.folder.iterdir():
            atomic.remove(path)
        self.__dict__.pop("history", None)

    def fail(self, reason: str) -> None:
        """Mark the run as failed, so that a restart does not repeat the failure."""
        marker = {"what": reason, "non_finite": self.params.non_finite}
        atomic.write_json(self.folder / FAILED, atomic.sealed(marker))

    def check_not_failed(self) -> None:
        """Refuse to repeat a failure.

        A run that stopped at a non-finite step may resume with ``non_finite: skip``, and after any
        failure with `train.launch --retry`, which removes the mark.

        Raises:
            UserError: The run failed; the message has the ways to continue, the harmless first.
        """
        path = self.folder / FAILED
        try:
            marker = atomic.read_sealed(path)
            what, stopped = marker["what"], marker["non_finite"] == "stop"
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError) as error:
            _warn(path, error, "ignored")  # the failure repeats itself
            return
        if stopped and self.params.non_finite == "skip":
            return
        skip = "set train.non_finite: skip to leave out such steps; " if stopped else ""
        lower = "set a lower train.learning_rate"
        saved = directory.checkpoints(self.folder)
        if saved:
            lower += f" with train.init: checkpoint {saved[-1]} and train.init_with: all"
        since = f"step {directory.step_of(saved[-1])}" if saved else "the start"
        raise UserError(
            f"this run failed before: {what}. To continue from {since}: python -m train.launch "
            f"--retry repeats the steps, in case the machine was at fault; {skip}{lower}. "
            "GPT2_FRESH=1 deletes this run with its checkpoints and starts from scratch"
        )

    def forget_failure(self) -> None:
        """Remove the mark of a failure: the run resumes beyond it."""
        atomic.remove(self.folder / FAILED)

    def note_start(self, record: dict[str, Any]) -> None:
        """Append a line to `starts.jsonl`."""
        path = self.folder / "starts.jsonl"
        _remove_other(path)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")

    def beside_reference(self, step: int, loss: float) -> reference_curve.Point | None:
        """A validation beside the published curve; None where they are not comparable."""
        model, train = self.model.config().to_dict(), self.params.model_dump(mode="json")
        raw, other = self.train_data.manifest.source, reference_curve.other_recipe(model, train)
        if other or reference_curve.recipe_mismatch(model, train, raw):
            return None
        return reference_curve.Point.at(step, loss)

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished."""
        _remove_other(self.folder / FINAL)
        atomic.write_json(self.folder / FINAL, atomic.sealed(summary))

    def summary(self) -> dict[str, Any] | None:
        """Read the summary of a finished run; None if there is none, or a damaged one."""
        path = self.folder / FINAL
        try:
            return atomic.read_sealed(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _warn(path, error, "written again from the log")
            return None

    def finished(self) -> tuple[Path, dict[str, Any]] | None:
        """The last checkpoint of a finished run, verified, and its state; None for other runs."""
        if self.summary() is None:
            return None
        found = directory.latest(self.folder, self.samples)
        return found if found is not None and found[1]["step"] == self.params.steps else None

    def publish_finished(self) -> bool:
        """Publish the run if it is finished; return whether it is.

        Prints the keys of `train` that have other values now. They only observe, so that the run
        is not trained again for them.
        """
        if (found := self.finished()) is None:
            return False
        last, state = found
        self.publish(last)
        if changed := self.changed_observations(state):
            print(
                f"note: params.yaml has changed since this run was trained: {changed}", flush=True
            )
        return True

    def changed_observations(self, state: dict[str, Any]) -> str:
        """The observing keys whose value was another when a checkpoint was saved, for a message.

        Args:
            state: The checkpoint's state.

        Returns:
            "train.log_every 10 (now 20), ..."; empty where all are the same.
        """
        before = state["train"]
        return ", ".join(
            f"train.{name} {before[name]} (now {value})"
            for name, value in self.params.observing().items()
            if name in before and before[name] != value
        )

    def publish(self, last: Path) -> None:
        """Put the finished run where DVC expects it: checkpoint, log, summary, metrics, curves."""
        directory.remove_leftovers(self.folder)
        history = self.history
        history.draw(directory.step_of(last))
        CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
        publish({name: last / name for name in directory.FILES}, CHECKPOINT)
        atomic.write_bytes(LOG, history.content())
        final = self.summary()
        assert final is not None, "finish() first"
        atomic.write_json(SUMMARY, atomic.sealed(final))
        atomic.write_json(METRICS, compared(final, COMPARED))

    def result(self) -> str:
        """The result of a finished run, in one line."""
        m = self.summary()
        assert m is not None, "finish() first"
        best = directory.best(self.folder)
        other = best is not None and directory.step_of(best) != m["step"]
        return (
            f"trained {m['step']:,} steps, {m['tokens']:,} tokens: val loss {m['val_loss']:.4f} "
            f"(best {m['best_val_loss']:.4f}), {m['tokens_per_second']:,.0f} tokens/s; "
            f"model in {CHECKPOINT}, metrics in {METRICS}"
            + (f"; the best saved checkpoint is {best}" if other else "")
        )


def _warn(path: Path, error: Exception, what: str) -> None:
    print(f"warning: {path}: damaged ({error}); {what}", file=sys.stderr, flush=True)


def _remove_other(path: Path) -> None:
    """Remove what is in the place of one of the run's files, but is none, such as a folder."""
    if path.exists() and not path.is_file():
        _warn(path, OSError("not a regular file"), "replaced")
        atomic.remove(path)


def compared(numbers: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return those of ``names`` that have a value, for a file of `metrics/`."""
    return {name: numbers[name] for name in names if numbers.get(name) is not None}
