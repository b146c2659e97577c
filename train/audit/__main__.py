"""`python -m train.audit RUN`: check a training run that somebody else has done.

First the chain: the links, the log and the files of all checkpoints against each other and against
the head that was pinned (`--head`). Then K segments between checkpoints, drawn by a seed, are run
again. The seed must be chosen after the head was published, else segments that are never drawn can
be forged. Exit status: 0 all equal; 1 something differs; 4 nothing differs, but this machine cannot
judge a segment, because it would round differently.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from model.command import count
from pipeline.runtime import command
from pipeline.runtime.errors import UserError

CANNOT_JUDGE = 4


def main(argv: Sequence[str] = ()) -> None:
    """Check the chain of a run, and run some of its segments again."""
    args = _parser().parse_args(argv)
    # torch takes seconds to import, for which --help need not wait.
    from pipeline.runtime.machine import Machine
    from pipeline.store.store import Store
    from train.audit.judge import Judge
    from train.audit.segments import Audited, chances, draw, problems

    run = Audited.open(args.run)
    if found := problems(run, args.head):
        for line in found:
            print(f"differs: {line}", flush=True)
        sys.exit(command.FAULT)
    segments = run.segments()
    pinned = "as pinned" if args.head else "not compared with a pinned one (--head)"
    print(
        f"chain: {len(run.links)} links up to step {run.links[-1]['step']:,}, consistent with the "
        f"log and {len(segments)} checkpoints; head {run.chain.head}, {pinned}",
        flush=True,
    )
    if args.chain:
        return
    if not 1 <= args.segments <= len(segments):
        raise UserError(f"--segments {args.segments}: the run has {len(segments)}; use 1 to that")
    if args.seed is None:
        raise UserError("--seed: missing; choose one that the author of the run cannot know")
    drawn = draw(len(segments), args.segments, args.seed)
    for forged, probability in chances(len(segments), args.segments):
        print(
            f"a forgery of {forged} of {len(segments)} segments is found with probability "
            f"{probability:.1%}",
            flush=True,
        )
    judge = Judge(run, Store.open(Machine.load()).root, args.processes)
    answers = []
    for number in drawn:
        verdict = judge(segments[number])
        answers.append(verdict.answer)
        steps = f"steps {verdict.segment.first + 1:,} to {verdict.segment.stop:,}"
        why = f" ({verdict.why})" if verdict.why else ""
        print(f"segment {number}, {steps}: {verdict.answer}{why}", flush=True)
    if "differs" in answers:
        sys.exit(command.FAULT)
    if "cannot judge" in answers:
        sys.exit(CANNOT_JUDGE)


def _parser() -> command.Parser:
    parser = command.Parser(prog="python -m train.audit", description=main.__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder, .work/runs/KEY")
    add("--head", metavar="HASH", help="head of the chain that was published, metrics/train.json")
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
