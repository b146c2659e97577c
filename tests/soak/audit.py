"""Plant forgeries in runs, and audit them.

    python -m tests.soak.audit [--forgeries 200] [--edits 400]

Each forgery (a weight bit, a document, the rate by 1 %, a skipped step, a swapped checkpoint, an
edited loss) is made in a random segment of four, before the head is pinned. Two segments are drawn
and run again: a forged one must differ, an honest one must be equal. Each edit is made after the
head was pinned, half of them with all hashes made to match, and must be found without running
anything. The exit status is 1 where one is not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

from tests.support.forge import KINDS, TRAIN, Forgery, edit, forge
from tests.support.training import Project, make_project, train_here
from train.audit.checks import problems
from train.audit.judge import Judge
from train.audit.run_folder import Audited
from train.audit.segments import draw, segments


def plant(project: Project, honest: Path, forgeries: int) -> int:
    """Plant forgeries; return the number of wrong answers."""
    answers: Counter[tuple[str, str]] = Counter()
    wrong = 0
    for seed in range(forgeries):
        rng = Random(seed)
        forgery = Forgery(KINDS[seed % len(KINDS)], rng.randrange(4), seed)
        with contextlib.redirect_stdout(io.StringIO()):
            run = Audited.open(forge(project, honest, forgery))
            judge, parts = Judge(run, project.folder), segments(run)
            pinned = problems(run, run.chain.head)
            verdicts = {n: judge(parts[n]) for n in draw(4, 2, f"soak {seed}")}
        if pinned:
            print(f"{forgery}: its own chain is wrong: {pinned}", flush=True)
            wrong += 1
        for number, verdict in verdicts.items():
            is_forged = number in forgery.found_in
            answers[f"{forgery.kind}, {'forged' if is_forged else 'honest'}", verdict.answer] += 1
            if verdict.answer != ("differs" if is_forged else "equal"):
                print(f"{forgery}: segment {number}: {verdict.answer} {verdict.why}", flush=True)
                wrong += 1
    for (kind, answer), times in sorted(answers.items()):
        print(f"{kind:28} {answer:8} {times:4d}", flush=True)
    return wrong


def change(project: Project, honest: Path, edits: int) -> int:
    """Edit a finished run; return the number of edits that are not found."""
    head, kinds, missed = Audited.open(honest).chain.head, Counter[str](), 0
    for seed in range(edits):
        copy = project.folder / "edited" / honest.name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(honest, copy)
        what = edit(copy, Random(seed))
        kinds[what] += 1
        with contextlib.redirect_stderr(io.StringIO()):
            found = problems(Audited.open(copy), head)
        if not found:
            print(f"edit {seed}, {what}: not found", flush=True)
            missed += 1
    for what, times in sorted(kinds.items()):
        print(f"edited: {what:45} {times:4d}", flush=True)
    return missed


def main() -> None:
    """Plant, edit, audit."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.audit")
    parser.add_argument("--forgeries", type=int, default=200)
    parser.add_argument("--edits", type=int, default=400)
    args = parser.parse_args()
    os.environ.update(GPT2_DEVICE="cpu", DVCLIVE_LOG_LEVEL="ERROR", OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder))
        os.chdir(folder)
        project.write(train=TRAIN)
        with contextlib.redirect_stdout(io.StringIO()):
            honest = train_here().folder
        missed = change(project, honest, args.edits)
        wrong = plant(project, honest, args.forgeries)
        os.chdir("/")
    print(f"{missed} of {args.edits} edits not found; {wrong} wrong answers, of which 0 expected")
    sys.exit(bool(missed or wrong))


if __name__ == "__main__":
    main()
