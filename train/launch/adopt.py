"""`train.launch --adopt RUN`: resume from an unfinished run whose code was another.

The code is part of a run's key, so that fixed code never meets what the old code trained: after a
change the run starts from scratch. If you know that the change does no harm, adopt the old run:
its checkpoints are hard-linked into the new one; `run.json` and `state.json` record the adoption.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import Section
from pipeline.store import atomic
from train.checkpoint import directory
from train.params import ModelParams, TrainParams
from train.run import FINAL, RECORD, Run

SECTIONS: dict[str, type[Section]] = {"model": ModelParams, "train": TrainParams}
_UNKNOWN = object()  # value of a parameter that this code does not have


def adopt(run: Run, name: str) -> str:
    """Let ``run`` resume from the newest checkpoint of another.

    Args:
        run: The run of today's parameters, data and code.
        name: Key of the other run, or its first characters.

    Returns:
        One line that says what was adopted.

    Raises:
        UserError: There is no such run; it is finished; it differs in more than code; or it is
            not ahead of this one.
    """
    other = _find(run, name)
    key = other.name
    with run.lock(), run.store.lock("runs", key, wait=False):
        record = _record(other)
        if record is None:
            raise UserError(f"--adopt {name}: {other / RECORD} is missing or damaged")
        if (other / FINAL).exists():
            raise UserError(f"--adopt {name}: that run is finished")
        if differs := differences(record, run.identity):
            raise UserError(
                f"--adopt {name}: that run differs in more than code: {', '.join(differs)}"
            )
        found = directory.latest(other, run.samples)
        if found is None:
            raise UserError(f"--adopt {name}: that run has no checkpoint")
        step, own = directory.step_of(found[0]), directory.latest(run.folder, run.samples)
        if own is not None and directory.step_of(own[0]) >= step:
            raise UserError(
                f"--adopt {name}: that run is at step {step}, this one is already at step "
                f"{directory.step_of(own[0])}; run without --adopt"
            )
        adopted = {"run_key": key, "code_key": record["code_key"], "step": step}
        _link_checkpoints(run, other, [*record["adopted"], adopted])
    return f"adopted run {key[:12]} at step {step}, trained by other code"


def adoptable(run: Run) -> Iterator[tuple[str, int]]:
    """Yield key and step of each unfinished run that differs from ``run`` only in code."""
    for folder in sorted(run.folder.parent.iterdir()):
        record = _record(folder)
        saved = directory.checkpoints(folder)
        if folder.name == run.key or record is None or (folder / FINAL).exists():
            continue
        if saved and not differences(record, run.identity):
            yield folder.name, directory.step_of(saved[-1])


def _find(run: Run, name: str) -> Path:
    """The folder of the one run whose key begins with ``name``."""
    runs = [path for path in run.folder.parent.iterdir() if path != run.folder]
    found = [path for path in runs if path.name.startswith(name)]
    if len(found) != 1:
        keys = ", ".join(sorted(path.name[:12] for path in runs)) or "none"
        reason = "several runs begin so" if found else "there is no such run"
        raise UserError(f"--adopt {name}: {reason}; other runs: {keys}")
    return found[0]


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record = atomic.read_sealed(folder / RECORD)
    except (OSError, ValueError):
        return None
    is_complete = record.keys() >= {*SECTIONS, "dataset_key", "starts_from", "code_key", "adopted"}
    return record if is_complete else None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities of runs other than code.

    A parameter that one of them does not have had its default there.
    """
    found = [key for key in ("dataset_key", "starts_from") if then[key] != now[key]]
    for name, section in SECTIONS.items():
        known = {key: field.default for key, field in section.model_fields.items()}
        for key in [*sorted({**then[name], **now[name]}.keys() - known.keys()), *known]:
            default = known.get(key, _UNKNOWN)
            if then[name].get(key, default) != now[name].get(key, default):
                found.append(f"{name}.{key}")
    return found


def _link_checkpoints(run: Run, other: Path, adopted: list[dict[str, Any]]) -> None:
    """Link the checkpoints of a run into another's folder, which appears complete or not at all."""
    part = run.folder.with_name(f".{run.key}.adopting")
    atomic.remove(part)
    part.mkdir()
    for folder in directory.checkpoints(other):
        shutil.copytree(folder, part / folder.name, copy_function=os.link)
    for path in other.glob("*.jsonl"):  # these grow: no links
        shutil.copy2(path, part / path.name)
    atomic.write_json(part / RECORD, atomic.sealed({**run.identity, "adopted": adopted}))
    shutil.rmtree(run.folder)
    os.rename(part, run.folder)
    atomic.fsync_folder(run.folder.parent)
