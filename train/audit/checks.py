"""A run's chain, log and files, checked against each other; nothing is executed.

chain in the newest state.json      links recomputed; head against the pinned one
log.jsonl                           its numbers against the hash in each link
step-*/                             files against the hashes in the links, chains against it
run.json, the folder's name         against the run's identity in the chain
final.json                          its numbers against the log
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pipeline.store import atomic
from train.audit.run_folder import Audited
from train.checkpoint import directory
from train.checkpoint.chain import HASH, STOPPED, conditions_hash, link_hash, log_hash
from train.launch.adopt import differences
from train.monitor.history import Record
from train.run import CHECKPOINT, FINAL, RECORD


def problems(run: Audited, head: str | None) -> list[str]:
    """Check a run without executing anything; return what is wrong, in words."""
    found: list[str] = []
    for check in (_link_problems, _identity_problems, _file_problems, _figure_problems):
        try:
            found += check(run)
        except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
            found.append(f"{run.folder}: is no run of this program ({error!r})")
    if head is not None and run.chain.head != head:
        found.append(f"head: {run.chain.head}, but --head is {head}")
    return found


def published_problem(run: Audited) -> str | None:
    """Compare the published weights with the head's link, if they claim to be of this run."""
    try:
        state = directory.read_state(CHECKPOINT)
        if state["chain"]["links"][-1][HASH] != run.chain.head:
            return None
        found = atomic.sha256_file(CHECKPOINT / directory.MODEL)
    except (OSError, LookupError, TypeError, directory.BrokenCheckpoint):
        return None
    if found == run.links[-1]["files"][directory.MODEL]:
        return None
    return f"{CHECKPOINT / directory.MODEL}: not the weights of the chain's head"


def _link_problems(run: Audited) -> Iterator[str]:
    chain, before, first = run.chain, None, run.chain.start
    for link in chain.links:
        name = f"link of step {link['step']}"
        if link[HASH] != link_hash(link, before):
            yield f"{name}: its hash does not match its content"
        if link["first"] != first:
            yield f"{name}: begins after step {link['first']}, the one before ends at {first}"
        if link["step"] <= link["first"]:
            yield f"{name}: has no steps, it begins after step {link['first']}"
        if STOPPED in link and link is not chain.links[-1]:
            yield f"{name}: a signal caused it, but another link builds on it"
        if link["conditions"] != conditions_hash(chain.conditions, link["step"]):
            yield f"{name}: made under other conditions than state.json has"
        if link["log"] != log_hash(run.records, link["first"], link["step"]):
            yield f"{name}: log.jsonl has other numbers in its steps"
        before, first = link[HASH], link["step"]
    since = [part["since"] for part in chain.conditions]
    if since[0] != chain.start or any(a >= b for a, b in pairwise(since)) or since[-1] > first:
        yield f"conditions: hold since steps {since}, in a chain of steps {chain.start} to {first}"
    if max(run.kept) != first:
        yield f"step {max(run.kept)}: its chain ends at step {first}"


def _identity_problems(run: Audited) -> Iterator[str]:
    identity = run.identity
    if atomic.sha256_json(identity) != run.folder.name:
        yield f"{run.folder.name}: is not the key of the run in the chain"
    record = atomic.read_sealed(run.folder / RECORD)
    if {name: record.get(name) for name in identity} != identity:
        yield f"{RECORD}: another run than in the chain"
    adopted = {entry["run_key"] for entry in record.get("adopted", [])}
    for part in run.chain.conditions:
        then = part["identity"]
        if then == identity:
            continue
        differs = differences(then, identity)
        if atomic.sha256_json(then) not in adopted:
            differs = differs or ["code_key"]
        if differs:
            yield f"since step {part['since']}: another run: {', '.join(differs)}"


def _file_problems(run: Audited) -> Iterator[str]:
    by_step = {link["step"]: number for number, link in enumerate(run.links)}
    validated = {(r["step"], r["val/loss"]) for r in run.records if "val/loss" in r}
    for step, folder in run.kept.items():
        if step not in by_step:
            continue  # caused by a signal: no link builds on it, and no segment begins with it
        try:
            state = directory.verify(folder)
        except directory.BrokenCheckpoint as error:
            yield str(error)
            continue
        links = run.links[: by_step[step] + 1]
        if state["chain"]["links"] != links:
            yield f"{folder.name}: its chain is not the beginning of the newest one"
        if state["sha256"] != links[-1]["files"]:
            yield f"{folder.name}: its weights or optimizer state are not those of its link"
        if (state["step"], state["samples"]) != (step, links[-1]["samples"]):
            yield f"{folder.name}: its step or samples are not those of its link"
        loss = state.get("val_loss")
        if loss is not None and (step, loss) not in validated:
            yield f"{folder.name}: its validation loss is not that of the log"
        conditions = [part for part in run.chain.conditions if part["since"] < step]
        if state.get("dataset_key") != conditions[-1]["identity"]["dataset_key"]:
            yield f"{folder.name}: its dataset_key is not that of the chain"


def _figure_problems(run: Audited) -> Iterator[str]:
    """Records that no link commits to, and the summary of a finished run."""
    head, skips = run.links[-1]["step"], [r["skipped"] for r in run.records if "skipped" in r]
    if any(b != a + 1 for a, b in pairwise(skips)):
        yield f"log.jsonl: numbers of skipped steps: {skips}"
    for record in run.records:
        if not run.uncovered and record["step"] <= run.chain.start:
            yield f"log.jsonl: a record of step {record['step']}, before the first"
    if not (run.folder / FINAL).exists():
        return
    for record in run.records:
        if record["step"] > head:
            yield f"log.jsonl: a record of step {record['step']}, after the last, {head}"
    final = atomic.read_sealed(run.folder / FINAL)
    for name, value in {**_figures(run.records), "step": head, "chain": run.chain.head}.items():
        if final.get(name) != value:
            yield f"{FINAL}: {name}: {final.get(name)}, but {value} in the chain and the log"


def _figures(records: list[Record]) -> dict[str, Any]:
    """Numbers of the summary that follow from the log, as run_summary.py has them."""
    losses = [r["train/loss"] for r in records if "train/loss" in r][-10:]
    validations = [r for r in records if "val/loss" in r]
    newest = validations[-1]
    same = [r for r in validations if r["val_tokens"] == newest["val_tokens"]]
    return {
        "loss": sum(losses) / len(losses) if losses else None,
        "val_loss": newest["val/loss"],
        "best_val_loss": min(r["val/loss"] for r in same),
        "validations": [[r["step"], r["val/loss"]] for r in validations],
    }
