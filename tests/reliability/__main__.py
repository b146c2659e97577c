"""`python -m tests.reliability`: inject every fault, and write the tables in docs/reliability.md.

Without flags it takes a sample of the points, of each kind one; `--long` takes all of them.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.reliability import damage, processes, project
from tests.reliability.commit_points import FAULTS, STAGES, CommitPoints, Prepared, Result
from tests.reliability.damage import DAMAGES, Damages, Outcome
from tests.reliability.stages import Stages
from tests.support.downloads import hub_variables, sample_files
from tests.support.hub import Hub
from tests.support.pages import replace_between
from tests.support.repo import REPO

PAGE = REPO / "docs/reliability.md"
MIDDLE = 6  # points per fault and stage


def commit_points(
    prepared: Prepared, stages: Stages, names: Sequence[str], most: int | None
) -> Iterator[Result]:
    """Test all faults at the commit points of stages."""
    for name in names:
        points = CommitPoints(stages, name, prepared.before(name), prepared.work)
        for fault in FAULTS:
            yield points.test(fault, most)


def damages(prepared: Prepared, stages: Stages) -> Iterator[Outcome]:
    """Test all damages of one file of each kind."""
    finished = project.copy(prepared.after_all(), prepared.work.with_name("finished"))
    tested = Damages(stages, finished, prepared.work)
    for kind, name in damage.kinds(finished).items():
        for how in DAMAGES:
            yield tested.test(kind, name, how)


def lost_processes(folder: Path) -> Iterator[Result]:
    """Test the loss of each kind of process."""
    for number, case in enumerate(processes.RAY_CASES):
        yield processes.hit_tokenize(folder / f"tokenize-{number}", case)
    for number, case in enumerate(processes.TRAINING_CASES):
        yield processes.hit_train(folder / f"train-{number}", case)


def table(results: Sequence[Result]) -> str:
    """Format results as a table in Markdown."""
    lines = [
        "| stage | fault | points | survived | lost | unexplained | seconds |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for r in results:
        points = str(r.points) if r.points == r.of else f"{r.points} of {r.of}"
        numbers = f"{r.survived} | {len(r.lost)} | {len(r.unexplained)} | {r.seconds:.0f}"
        lines.append(f"| {r.stage} | {r.fault} | {points} | {numbers} |")
    return "\n".join(lines)


def damage_table(outcomes: Sequence[Outcome]) -> str:
    """Format what happened to damaged files as a table in Markdown."""
    lines = [f"| file | {' | '.join(DAMAGES)} |", "|---|" + "---|" * len(DAMAGES)]
    found = {(o.kind, o.damage): o.what + (" (problem)" if o.problems else "") for o in outcomes}
    for kind in dict.fromkeys(o.kind for o in outcomes):
        lines.append(f"| `{kind}` | " + " | ".join(found[kind, how] for how in DAMAGES) + " |")
    return "\n".join(lines)


def write(name: str, text: str) -> None:
    """Replace the part of the page between the markers of this name."""
    begin, end = f"<!-- {name}: written by python -m tests.reliability -->", f"<!-- /{name} -->"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replace_between(page, begin, end, text), encoding="utf-8")


def measured_on(form: str, seconds: float) -> str:
    """Describe the tree and the machine of a measurement."""

    def git(*args: str) -> str:
        return subprocess.check_output(["git", *args], cwd=REPO, text=True).strip()

    changed = " with uncommitted changes" if git("status", "--porcelain", "-uno") else ""
    return (
        f"Measured on commit {git('rev-parse', '--short=12', 'HEAD')}{changed}, "
        f"Python {platform.python_version()}, {form} form, {seconds / 60:.0f} minutes."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--long", action="store_true", help="all points, not a sample")
    parser.add_argument("--only", choices=["points", "damage", "processes"], help="one table")
    parser.add_argument("--stage", choices=STAGES, action="append", help="points of this stage")
    parser.add_argument("--dry", action="store_true", help="do not write docs/reliability.md")
    args = parser.parse_args()
    form, most = ("long", None) if args.long else ("middle", MIDDLE)
    problems: list[str] = []
    begin = time.monotonic()

    def finish(name: str, text: str) -> None:
        spent = measured_on(form, time.monotonic() - begin)
        print(f"{text}\n{spent}\n", flush=True)
        if not args.dry and not args.stage:
            write(name, f"{text}\n\n{spent}")

    def progress(result: Result | Outcome) -> None:
        if isinstance(result, Result):
            print(f"{result.stage}, {result.fault}: {result.survived} of {result.points}", end="")
            found = [*result.lost, *result.unexplained]
        else:
            print(f"{result.kind}, {result.damage}: {result.what}", end="")
            found = result.problems
        print(f" ({result.seconds:.0f} s)", *found, sep="\n  ", flush=True)
        problems.extend(found)

    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        scratch = Path(folder)
        hub.repo().commit(sample_files(2, 20_000))
        with Stages(scratch / "stages", hub_variables(hub)) as stages:
            prepared = Prepared(stages, scratch)
            if args.only in (None, "points"):
                results = []
                for result in commit_points(prepared, stages, args.stage or STAGES, most):
                    progress(result)
                    results.append(result)
                finish("points", table(results))
            if args.only in (None, "damage"):
                outcomes = []
                for outcome in damages(prepared, stages):
                    progress(outcome)
                    outcomes.append(outcome)
                finish("damage", damage_table(outcomes))
        if args.only in (None, "processes"):
            results = []
            for result in lost_processes(scratch / "processes"):
                progress(result)
                results.append(result)
            finish("processes", table(results))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
