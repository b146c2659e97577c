"""`train.launch --adopt RUN`: an unfinished run whose code has changed goes on.

The code is a part of a run's key, so that mended code never meets what the old one trained: after
a change the run starts anew. Where one knows that the change does no harm, its checkpoints are
taken over, as hard links; `run.json`, and `state.json` of each later checkpoint, say so.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import validate
from pipeline.store import atomic
from train.checkpoint import directory
from train.params import ModelParams, TrainParams
from train.run import RECORD, Run


def adopt(run: Run, name: str) -> str:
    """Lets ``run`` go on from the newest checkpoint of another.

    Args:
        run: As `params.yaml`, the data and the code are now.
        name: The other's key, or its first characters.

    Returns:
        What was done, in a line.

    Raises:
        UserError: There is no such run; it is finished; it differs in more than code; or it has
            come no further than this one.
    """
    other = _find(run, name)
    key = other.name
    with run.lock(), run.store.lock("runs", key, wait=False):
        record = _record(other)
        if record is None:
            raise UserError(f"--adopt {name}: {other} holds no {RECORD}: it never began")
        if (other / "final.json").exists():
            raise UserError(f"--adopt {name}: that run is finished")
        if differs := _differences(run, record):
            raise UserError(
                f"--adopt {name}: that run differs in more than code: {', '.join(differs)}"
            )
        found = directory.latest(other)
        if found is None:
            raise UserError(f"--adopt {name}: that run has no checkpoint")
        step, own = directory.step_of(found[0]), directory.latest(run.folder)
        if own is not None and directory.step_of(own[0]) >= step:
            raise UserError(
                f"--adopt {name}: that run is at step {step}, and this one is already at "
                f"{directory.step_of(own[0])}; run without --adopt"
            )
        adopted = {"run_key": key, "code_key": record["code_key"], "step": step}
        _take_over(run, other, [*record["adopted"], adopted])
    return f"adopted run {key[:12]} at step {step}: its code was another"


def adoptable(run: Run) -> Iterator[tuple[str, int]]:
    """The unfinished runs that differ from ``run`` in code alone: key and step of each."""
    for folder in sorted(run.folder.parent.iterdir()):
        record = _record(folder)
        saved = directory.steps(folder)
        if folder.name == run.key or record is None or (folder / "final.json").exists():
            continue
        if saved and not _differences(run, record):
            yield folder.name, directory.step_of(saved[-1])


def _find(run: Run, name: str) -> Path:
    """The folder of the one run whose key begins so."""
    runs = [path for path in run.folder.parent.iterdir() if path != run.folder]
    found = [path for path in runs if path.name.startswith(name)]
    if len(found) != 1:
        keys = ", ".join(sorted(path.name[:12] for path in runs)) or "none"
        what = "several runs begin so" if found else "there is no such run"
        raise UserError(f"--adopt {name}: {what}; besides this one there are: {keys}")
    return found[0]


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return None
    return record


def _differences(run: Run, record: dict[str, Any]) -> list[str]:
    """What differs between two runs besides the code; a key that was not known then is as unset."""
    differs = [key for key in ("dataset_key", "starts_from") if record[key] != run.identity[key]]
    for name, section in (("model", ModelParams), ("train", TrainParams)):
        try:
            then = validate(section, record[name], name).model_dump(mode="json")
        except UserError as error:
            return [str(error)]
        now = run.identity[name]
        differs += [f"{name}.{key}" for key in now if now[key] != then[key]]
    return differs


def _take_over(run: Run, other: Path, adopted: list[dict[str, Any]]) -> None:
    """Links the checkpoints of a run into another's folder, which appears whole or not at all."""
    part = run.folder.with_name(f".{run.key}.adopting")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for folder in directory.steps(other):
        shutil.copytree(folder, part / folder.name, copy_function=os.link)
    for path in other.glob("*.jsonl"):  # they grow: no links
        shutil.copy2(path, part / path.name)
    atomic.write_json(part / RECORD, {**run.identity, "adopted": adopted})
    shutil.rmtree(run.folder)
    os.rename(part, run.folder)
    atomic.fsync_folder(run.folder.parent)
