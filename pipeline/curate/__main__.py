"""`python -m pipeline.curate`: decide which rows of the source are kept."""

import sys
from collections.abc import Sequence

from pipeline.curate.stage import RAW, curate
from pipeline.download.restore import restore
from pipeline.format.selection import SELECTION
from pipeline.params import CurateParams, TokenizeParams
from pipeline.runtime import command
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import load_section


def main(argv: Sequence[str] = ()) -> None:
    """Decide which rows are kept, print one summary; or explain a row, or show examples."""
    parser = command.Parser(prog="python -m pipeline.curate", description=main.__doc__)
    parser.parse_args(list(argv))
    params, split = load_section("curate", CurateParams), load_section("tokenize", TokenizeParams)
    machine = Machine.load()
    if params.has_rules:
        restore(RAW, machine)
    manifest = curate(RAW, SELECTION, params, split, machine)
    rows, kept = (sum(getattr(f, name) for f in manifest.files) for name in ("rows", "kept"))
    for rule, count in manifest.dropped.items():
        print(f"curate: {rule}: {count:,} rows dropped")
    for name, count in manifest.found.items():
        print(f"curate: {name.replace('_', ' ')}: {count:,}")
    what = f"{kept:,} of {rows:,} rows kept" if params.has_rules else "no rules: all rows are kept"
    print(f"curate: {what}; selection_key {manifest.selection_key[:12]}")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
