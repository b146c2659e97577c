"""`python -m pipeline.curate`: decide which rows of the source are kept."""

import sys
from collections.abc import Iterator, Sequence

from pipeline.curate import show
from pipeline.curate.stage import RAW, curate, facts_for, plan_pieces
from pipeline.download.restore import restore
from pipeline.format.manifest import RawManifest
from pipeline.format.selection import SELECTION, Selection
from pipeline.params import CurateParams, TokenizeParams
from pipeline.runtime import command
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import load_section
from pipeline.store.store import Store


def main(argv: Sequence[str] = ()) -> None:
    """Decide which rows are kept, print one summary; or explain a row, or show examples."""
    parser = command.Parser(prog="python -m pipeline.curate", description=main.__doc__)
    explain = parser.add_mutually_exclusive_group()
    explain.add_argument(
        "--why", nargs=2, metavar=("FILE", "ROW"), help="explain why a row is kept or dropped"
    )
    explain.add_argument(
        "--sample", nargs=2, metavar=("RULE", "N"), help="show N rows that a rule dropped, and kept"
    )
    args = parser.parse_args(list(argv))
    if args.why or args.sample:
        for line in _explain(args.why, args.sample, parser):
            print(line)
        return
    params, split = load_section("curate", CurateParams), load_section("tokenize", TokenizeParams)
    machine = Machine.load()
    if params.has_rules:
        restore(RAW, machine)
    manifest = curate(RAW, SELECTION, params, split, machine)
    rows, kept = (sum(getattr(f, name) for f in manifest.files) for name in ("rows", "kept"))
    for rule, count in manifest.dropped.items():
        if count:
            print(f"curate: {rule}: {count:,} rows dropped")
    for name, count in manifest.found.items():
        print(f"curate: {name.replace('_', ' ')}: {count:,}")
    what = f"{kept:,} of {rows:,} rows kept" if params.has_rules else "no rules: all rows are kept"
    print(f"curate: {what}; selection_key {manifest.selection_key[:12]}")


def _explain(
    row: list[str] | None, rule: list[str] | None, parser: command.Parser
) -> Iterator[str]:
    """Yield the lines of `--why` and `--sample`, from the selection as it is now."""
    number = (row or rule or ["", ""])[1]
    if not (number.isdecimal() and len(number) < 19):  # as int64
        parser.error(f"{number[:80]!r} is not a row or a number of rows")
    source = RawManifest.load(RAW)
    selection = Selection.load(SELECTION, source)
    if row:
        yield from show.why(RAW, selection, source, row[0], int(number))
    if rule:
        params = show.params_of(selection)
        store = Store.open(Machine.load())
        pieces = plan_pieces(RAW, source, facts_for(params), store)
        yield from show.sample(RAW, selection, source, pieces, rule[0], int(number))


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
