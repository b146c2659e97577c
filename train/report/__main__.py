"""`python -m train.report`: write a page about a run, or one that compares several."""

import sys

from pipeline.runtime import command


def main(argv: list[str] | None = None) -> None:
    """Write a page about the run in metrics/ and artifacts/, or one that compares several runs."""
    parser = command.Parser(prog="python -m train.report", description=main.__doc__)
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="REV",
        help="experiments, branches, tags, commits or `workspace`: compare them in "
        "artifacts/compare.html",
    )
    parser.add_argument(
        "--run",
        metavar="KEY",
        help="a run of the store, finished or not, by the first letters of its key: write "
        "artifacts/run-KEY.html",
    )
    args = parser.parse_args(argv)
    if args.compare and args.run:
        parser.error("--compare and --run exclude each other")
    # torch takes seconds to import, in which this process must notice that its parent has died.
    from pipeline.store import atomic
    from train.report import compare, live
    from train.report.page import OUT, render

    if args.run is not None:
        out, page = live.page(args.run)
    elif args.compare:
        out, page = compare.OUT, compare.render(args.compare)
    else:
        out, page = OUT, render()
    atomic.write_bytes(out, page.encode())
    print(f"report: {out}, {len(page) / 1e3:.0f} kB, opens in any browser, offline")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
