"""`python -m pipeline.tokenize`: turn text or token files into token shards."""

import sys
from collections.abc import Sequence

from pipeline.download.restore import restore
from pipeline.format.manifest import SelectionManifest
from pipeline.format.selection import SELECTION
from pipeline.params import CurateParams, TokenizeParams
from pipeline.runtime import command
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import load_section
from pipeline.store.code_key import code_key
from pipeline.tokenize.stage import OUT, RAW, tokenize


def main(argv: Sequence[str] = ()) -> None:
    """Read the parameters, tokenize, print one summary."""
    command.Parser(prog="python -m pipeline.tokenize", description=main.__doc__).parse_args(argv)
    params = load_section("tokenize", TokenizeParams)
    machine = Machine.load()
    restore(RAW, machine)
    # Without rules `curate` need not have run; with rules a missing selection is an error.
    rules = load_section("curate", CurateParams)
    selection = SELECTION if SELECTION.exists() or rules.has_rules else None
    if selection and SelectionManifest.load(selection).params != rules.applied:
        print(
            f"warning: {selection} was made with other parameters; run `dvc repro curate`",
            file=sys.stderr,
        )
    manifest = tokenize(RAW, OUT, params, machine, code_key("tokenize"), selection)
    splits = ", ".join(
        f"{name} {t.tokens:,} tokens of {t.docs:,} documents in {t.shards} shards"
        for name, t in manifest.totals.items()
    )
    print(f"tokenize: {splits} in {OUT}; dataset_key {manifest.dataset_key[:12]}")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
