"""`python -m pipeline.verify`: check every byte of the data, and report statistics."""

import sys
from collections.abc import Sequence

from pipeline.download.restore import restore
from pipeline.format.manifest import NAME
from pipeline.format.selection import SELECTION
from pipeline.params import VerifyParams
from pipeline.runtime import command
from pipeline.runtime.errors import printable
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import load_section
from pipeline.store import atomic
from pipeline.store.store import Store
from pipeline.verify.data_report import COMPARED, engine_metrics
from pipeline.verify.show import show_documents
from pipeline.verify.stage import METRICS, RAW, STATISTICS, TOKENS, VERIFIED, DataFault, verify


def main(argv: Sequence[str] = ()) -> None:
    """Read the parameters, verify, write the metrics, print one summary; or show documents."""
    parser = command.Parser(prog="python -m pipeline.verify", description=__doc__)
    parser.add_argument(
        "--show", type=int, metavar="K", help="print K decoded documents instead of verifying"
    )
    args = parser.parse_args(list(argv))
    if args.show is not None:
        for document in show_documents(TOKENS, max(args.show, 0)):
            print(document, end="\n\n")
        return
    params, machine = load_section("verify", VerifyParams), Machine.load()
    restore(RAW, machine)
    try:
        selection = SELECTION if SELECTION.exists() else None
        manifest, report = verify(RAW, TOKENS, params, machine, selection)
    except DataFault as fault:
        print(
            "verify: damaged files, now removed; run `dvc repro` to rebuild:",
            *map(printable, str(fault).splitlines()),
            sep="\n",
            flush=True,
        )
        raise SystemExit(command.FAULT) from None
    store = Store.open(machine)
    pieces = (store.find("chunks", chunk.chunk_key) for chunk in manifest.chunks)
    engines = engine_metrics([piece for piece in pieces if piece is not None])
    statistics = report.statistics(manifest, engines)
    tables = {METRICS.with_name(f"{name}.csv"): text for name, text in report.tables().items()}
    for path, text in tables.items():
        atomic.write_bytes(path, text.encode())
    hashes = {path.name: atomic.sha256_file(path) for path in tables}
    atomic.write_json(STATISTICS, atomic.sealed({**statistics, "tables_sha256": hashes}))
    atomic.write_json(METRICS, {name: statistics[name] for name in COMPARED})
    atomic.write_json(VERIFIED, {"manifest_sha256": atomic.sha256_file(TOKENS / NAME)})
    warning = statistics.pop("warning", None)
    shown = (f"{name} {v:,}" if type(v) is int else f"{name} {v}" for name, v in statistics.items())
    print("verify: " + printable(", ".join(shown)))
    if warning:
        print(f"verify: warning: {warning}")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
