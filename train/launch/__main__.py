"""`python -m train.launch [--adopt RUN] [--retry]`: the training stage as DVC runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.runtime import command


def main(argv: Sequence[str] = ()) -> None:
    """Train the run of params.yaml, or publish it if it is finished."""
    parser = command.Parser(prog="python -m train.launch", description=main.__doc__)
    parser.add_argument(
        "--adopt",
        metavar="RUN",
        help="resume from an unfinished run (its key, or the first characters) of other code",
    )
    parser.add_argument(
        "--retry",
        action="store_true",
        help="after a non-finite loss or gradient: repeat the steps after the last checkpoint",
    )
    args = parser.parse_args(argv)
    from train.launch.stage import launch  # torch: --help need not wait for it

    launch(args.adopt, retry=args.retry)


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
