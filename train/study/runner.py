"""Run what a study lacks: data first, then seed by seed, each run a DVC experiment.

The order is seed by seed, so that a study that is stopped has pairs. Each run begins only when the
data of its variant is known to share no document with the held-out text.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path

from model.size import parameter_count
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.store import Busy, Store
from train.evals.held_out import read_documents
from train.params import ModelParams, TrainParams
from train.study import pilot
from train.study.definition import OF_THE_MODEL, Planned, Study, path_of
from train.study.held_out_check import count_shared
from train.study.results import Results, planned
from train.study.workspace import Diverged, Workspace, check_committed, check_names

_LOCK_SECONDS = 20.0  # a killed study's commands need some to end


def run(study: Study, machine: Machine, jobs: int = 1) -> Results:
    """Run all that is missing; return the results.

    Args:
        jobs: Runs at the same time, each in a clone of its own.

    Raises:
        UserError: The study cannot run here, or another process runs it.
        StageFailed: A run failed for another reason than a non-finite loss.
    """
    store, results, main = Store.open(machine), Results.of(study, machine), Path.cwd()
    with _lock(store, study.name):
        check_committed(main, study.files)
        check_names(main, study.messages)
        _check_files(study, results)
        todo = missing(study, results)
        for left in results.folder.glob("tree-*"):  # by a study that was killed
            atomic.remove(left)
        if todo == []:
            print(f"{study.name}: all runs are finished", flush=True)
            return results
        most = len(study.variants) * len(study.seeds) if todo is None else len(todo)
        spaces = [
            Workspace(main, results.folder / f"tree-{i}", results.folder / f"logs/tree-{i}.log")
            for i in range(min(jobs, most))
        ]
        try:
            _prepare(study, results, spaces[0])
            todo = missing(study, results) or []
            size = sum(checkpoint_bytes(run) for run in todo)
            print(
                f"{study.name}: {len(todo)} runs, whose checkpoints take up to {size / 1e9:.3g} GB "
                f"in {store.root} until a prune",
                flush=True,
            )
            _run_all(study, results, spaces, todo)
        finally:
            for space in spaces:
                space.terminate()
        for space in spaces:
            atomic.remove(space.folder)
    return results


def _check_files(study: Study, results: Results) -> None:
    """Refuse a file of text or tasks that has changed under its name: DVC has results of the old.

    Raises:
        UserError: Names the file.
    """
    for name, sha256 in study.files.items():
        key = atomic.sha256_json(name)
        if (record := results.read("files", key)) is None:
            results.write("files", key, {"name": name, "sha256": sha256})
        elif record["sha256"] != sha256:
            raise UserError(
                f"{path_of(study.name)}: {name}: has changed under its name, and DVC has results "
                "of the old file; give it a new name"
            )


def checkpoint_bytes(run: Planned) -> int:
    """Return the most bytes of the checkpoints that a finished run leaves in the store."""
    config = ModelParams.model_validate(run.params["model"]).config()
    # AdamW's: weights and two moments of 4 bytes; Muon has one moment.
    return 12 * parameter_count(config) * TrainParams.model_validate(run.params["train"]).kept()


def missing(study: Study, results: Results) -> list[Planned] | None:
    """Return the runs without a result; None if a speed must be measured before they are known."""
    runs = planned(study, results)
    return None if runs is None else [r for r in runs if results.read("results", r.key) is None]


@contextmanager
def _lock(store: Store, name: str) -> Iterator[None]:
    """Hold the study for this process.

    Raises:
        UserError: Another process runs it.
    """
    store.folder("studies", name)
    with ExitStack() as stack:
        try:
            lock = store.lock_within("studies", name, _LOCK_SECONDS, lambda: None)
            stack.enter_context(lock)
        except Busy:
            raise UserError(
                f"study {name}: another process runs it; wait until it ends, or see "
                f"python -m train.study {name} --status"
            ) from None
        yield


def _prepare(study: Study, results: Results, space: Workspace) -> None:
    """Make the data of all variants, once for those that share it, and measure missing speeds."""
    for variant, params in study.variants.items():
        key = data_key(study, variant)
        if results.read("data", key) is None:
            output = space.reproduce(params, "verify", f"variant {variant}")
            for line in output.splitlines():
                if re.match(r"(curate|tokenize): .*(kept|chunks|dataset_key)", line):
                    print(f"{variant}: {line}", flush=True)
            _check_held_out(study, results, space, variant, key)
        if study.file.budget.seconds is not None:
            pilot.measure(study, results, space, variant)


def data_key(study: Study, variant: str) -> str:
    """Address of the record of a variant's data, checked against this held-out text."""
    params = study.variants[variant]
    data = {name: v for name, v in params.items() if name not in OF_THE_MODEL}
    return study.key({**data, "held_out": {"sha256": study.held_out_sha256}})


def _check_held_out(
    study: Study, results: Results, space: Workspace, variant: str, key: str
) -> None:
    tokens, shared, name = space.folder / "data/tokens", 0, study.file.held_out
    if name is not None:
        texts = read_documents(Path(name), f"{path_of(study.name)}: held_out: {name}")
        if shared := count_shared(tokens, texts):
            raise UserError(
                f"{path_of(study.name)}: held_out: {name}: {shared} of its {len(texts)} documents "
                f"are training documents of variant {variant}; take them out of the source, or set "
                f"curate.decontaminate: [a .jsonl of the text] and curate.contaminated: drop"
            )
    manifest = space.json("data/tokens/manifest.json")
    results.write("data", key, {"dataset_key": manifest["dataset_key"], "variant": variant})


def _run_all(study: Study, results: Results, spaces: list[Workspace], todo: list[Planned]) -> None:
    """Share the runs among the workspaces."""
    free: queue.SimpleQueue[Workspace] = queue.SimpleQueue()
    for space in spaces:
        free.put(space)
    # Variants may differ in nothing that their data shows: then the second waits for the first's
    # weights, which are its own.
    trainings = {run.key: _training_key(study, results, run) for run in todo}
    one_at_a_time = {key: threading.Lock() for key in trainings.values()}

    def one(number: int, run: Planned) -> None:
        with one_at_a_time[trainings[run.key]]:
            space = free.get()
            try:
                print(f"{run.experiment}: run {number} of {len(todo)}", flush=True)
                print(f"{run.experiment}: {_run_one(study, results, space, run)}", flush=True)
            finally:
                free.put(space)

    with ThreadPoolExecutor(len(spaces)) as pool:
        futures = [pool.submit(one, i, run) for i, run in enumerate(todo, 1)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            for space in spaces:
                space.terminate()
            raise


def _distinct(environments: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for one in environments:
        if one not in found:
            found.append(one)
    return found


def _training_key(study: Study, results: Results, run: Planned) -> str:
    """Hash of all that decides the weights of a run of this study."""
    data = results.read("data", data_key(study, run.variant))
    train = TrainParams.model_validate(run.params["train"]).deciding()
    dataset_key = data["dataset_key"] if data else None
    return atomic.sha256_json([dataset_key, run.params["model"], train])


def _run_one(study: Study, results: Results, space: Workspace, run: Planned) -> str:
    speed = results.speed(study, run.variant)
    setting = pilot.compile_setting(speed["compiled"] if speed else None)
    try:
        # The data has been made and checked; its hash is compared below.
        space.reproduce(run.params, "verify", run.experiment, run_cache=True)
        space.reproduce(run.params, "evaluate", run.experiment, setting)
    except Diverged as error:
        results.write("results", run.key, {"name": run.experiment, "failed": str(error)})
        return f"diverged: {error}"
    evaluation = space.json("artifacts/evaluation.json")
    if study.file.held_out and evaluation["held_out_sha256"] != study.held_out_sha256:
        raise UserError(
            f"{path_of(study.name)}: held_out: {study.file.held_out}: has changed under its name, "
            "and DVC has results of the old text; give the file a new name"
        )
    dataset_key = space.json("data/tokens/manifest.json")["dataset_key"]
    checked = results.read("data", data_key(study, run.variant))
    if checked is None or checked["dataset_key"] != dataset_key:
        raise UserError(
            f"{path_of(study.name)}: variants.{run.variant}: its data has changed since it was "
            f"checked; remove {results.folder / 'data'} and {results.folder / 'results'}"
        )
    if study.key(run.params) != run.key:
        raise UserError(
            f"{path_of(study.name)}: a file of tasks or weights has changed during a run; give the "
            "new one another name"
        )
    conditions = space.json("artifacts/checkpoint/state.json")["chain"]["conditions"]
    record = {
        "name": run.experiment,
        "evaluation": evaluation,
        "training": space.json("artifacts/training.json"),
        "dataset_key": dataset_key,
        # Those of training, which may have been resumed elsewhere, or be of an earlier study.
        "environments": _distinct(part["environment"] for part in conditions),
        "commit": space.save(run.experiment, run.message),
    }
    results.write("results", run.key, record)
    value = study.metric.value(evaluation, bool(study.file.held_out))
    return f"{value:.5g} {study.metric.unit}, {record['training']['seconds']:.0f} s of training"
