"""`python -m train.report`: a page of a run, or of several beside each other."""

import argparse
import sys

from pipeline.runtime import command
from pipeline.store import atomic
from train.report import compare
from train.report.page import OUT, render


def main(argv: list[str] | None = None) -> None:
    """Write the page, print one summary."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description="A page of a run.")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="REV",
        help=f"experiments, branches, tags, commits, `workspace`: one page of them, {compare.OUT}",
    )
    args = parser.parse_args(argv)
    if args.compare:
        out, page = compare.OUT, compare.render(args.compare)
    else:
        out, page = OUT, render()
    atomic.write_bytes(out, page.encode())
    print(f"report: {out}, {len(page) / 1e3:.0f} kB, opens in any browser without a network")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
