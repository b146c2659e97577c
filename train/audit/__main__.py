"""`python -m train.audit RUN`: check a training run that somebody else has done.

First the chain: the links, the log and the files of all checkpoints against each other and against
the head that was pinned (`--head`). Then K segments, drawn by a seed among those of the chain, are
run again. The seed must be chosen after the head was published, else segments that are never drawn
can be forged.

Exit status: 0 all equal; 5 something differs; 4 nothing differs, but a segment could not be judged;
1 the audit itself failed, which says nothing about the run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.command import count
from pipeline.runtime import command
from pipeline.runtime.errors import UserError, printable

if TYPE_CHECKING:
    from train.audit.run_folder import Audited

CANNOT_JUDGE, DIFFERS = 4, 5


def main(argv: Sequence[str] = ()) -> None:
    """Check the chain of a run, and run some of its segments again."""
    args = _parser().parse_args(argv)
    # torch takes seconds to import, for which --help need not wait.
    from pipeline.runtime.machine import Machine
    from pipeline.store.store import Store
    from train.audit.checks import problems, published_problem
    from train.audit.judge import Judge
    from train.audit.run_folder import Audited
    from train.audit.segments import draw, segments

    run = Audited.open(args.run)
    found = problems(run, args.head)
    if not found and args.head and (published := published_problem(run)):
        found = [published]
    if found:
        for line in found:
            _say(f"differs: {line}")
        sys.exit(DIFFERS)
    _describe(run, pinned=args.head is not None)
    answers = ["cannot judge"] if run.uncovered else []
    if not args.chain:
        all_of = segments(run)
        if not 1 <= args.segments <= len(all_of):
            raise UserError(f"--segments {args.segments}: the run has {len(all_of)}; use 1 to that")
        if args.seed is None:
            raise UserError("--seed: missing; choose one that the author of the run cannot know")
        missing = sum(segment.missing for segment in all_of)
        _print_chances(len(all_of), missing, args.segments)
        judge = Judge(run, Store.open(Machine.load()).root, args.processes)
        for number in draw(len(all_of), args.segments, args.seed):
            verdict = judge(all_of[number])
            answers.append(verdict.answer)
            steps = f"steps {verdict.segment.first + 1:,} to {verdict.segment.stop:,}"
            why = f" ({verdict.why})" if verdict.why else ""
            _say(f"segment {number}, {steps}: {verdict.answer}{why}")
    if "differs" in answers:
        sys.exit(DIFFERS)
    if "cannot judge" in answers:
        sys.exit(CANNOT_JUDGE)


def _say(line: str) -> None:
    """Print a line, in which text of the run's folder may be."""
    print(printable(line), flush=True)


def _describe(run: Audited, *, pinned: bool) -> None:
    """Print what run the chain is about, and what changed on its way."""
    link, identity = run.links[-1], run.identity
    _say(
        f"chain: {len(run.links)} links up to step {link['step']:,}, consistent with the log and "
        f"{len(run.kept)} checkpoints; head {run.chain.head}, "
        + ("as pinned" if pinned else "not compared with a pinned one (--head)")
    )
    _say(
        f"run {run.folder.name[:12]}: dataset_key {identity['dataset_key']}, code "
        f"{identity['code_key'][:12]}, init {identity['train'].get('init')}"
    )
    _say(f"weights of step {link['step']:,}: sha256 {link['files']['model.safetensors']}")
    for step, changes in run.changes():
        _say(f"since step {step:,}: {changes}")
    if run.uncovered:
        _say(f"steps 1 to {run.uncovered:,} are not covered: the chain begins after them")
    elif run.chain.start:
        _say(f"begins with the checkpoint of step {run.chain.start:,} of another run (train.init)")


def _print_chances(total: int, missing: int, drawn: int) -> None:
    """Print what the draw can find."""
    from train.audit.segments import chances

    if missing:
        _say(
            f"{missing} of {total} segments cannot be judged, as their first checkpoint is "
            "missing: a forgery there is not found"
        )
    for forged, probability in chances(total, drawn, total - missing):
        _say(
            f"a forgery of {forged} of the {total - missing} segments that can be run again is "
            f"found with probability {probability:.1%}"
        )


def _parser() -> command.Parser:
    parser = command.Parser(prog="python -m train.audit", description=main.__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder, .work/runs/KEY")
    add("--head", metavar="HASH", help="published head of the chain")
    add("--chain", action="store_true", help="check the chain only; run nothing")
    add("--segments", type=count, default=1, metavar="K", help="segments to run again; default 1")
    add("--seed", metavar="S", help="any text, chosen after the head was published")
    add(
        "--processes",
        type=count,
        default=1,
        metavar="N",
        help="for runs with train.invariant; default 1; others take as many as the run",
    )
    return parser


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
