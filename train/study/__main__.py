"""`python -m train.study NAME`: run a study's missing experiments, and say what can be claimed."""

from __future__ import annotations

import sys

from pipeline.runtime import command


def main(argv: list[str] | None = None) -> None:
    """Run what is missing of train/studies/NAME.yaml and report what can be claimed."""
    parser = command.Parser(prog="python -m train.study", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="name of the study; none: list all")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="print what is finished; run nothing")
    what.add_argument(
        "--report", action="store_true", help="write the page of what is finished; run nothing"
    )
    what.add_argument(
        "--json", action="store_true", help="print the page as data; run nothing, write nothing"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at the same time (default: 1)"
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs: at least 1")
    # scipy and DVC take seconds to import.
    from pipeline.runtime.errors import printable
    from pipeline.runtime.machine import Machine
    from pipeline.store import atomic
    from train.study import findings, page, runner, study_file
    from train.study.results import Results

    if args.name is None:
        for name, path in study_file.study_files().items():
            first = path.read_text(encoding="utf-8", errors="replace").splitlines()[:1]
            print(f"{name:20} {printable(''.join(first).lstrip('# '))}")
        return
    study, machine = study_file.load(args.name), Machine.load()
    if args.status:
        print(findings.status(study, Results.of(study, machine)))
        return
    run_nothing = args.report or args.json
    results = Results.of(study, machine) if run_nothing else runner.run(study, machine, args.jobs)
    found = findings.find(study, results)
    if args.json:
        sys.stdout.write(atomic.json_bytes(found.as_json()).decode())
        return
    text = page.render(found)
    atomic.write_bytes(page.OUT, text.encode())
    print("\n".join(found.verdicts()))
    print(f"study: {page.OUT}, {len(text) / 1e3:.0f} kB, opens in any browser, offline")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
