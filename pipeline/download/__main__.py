"""`python -m pipeline.download`: download the sources' files to `data/raw`."""

import sys
from collections.abc import Sequence

from pipeline.download.stage import OUT, download
from pipeline.params import load_sources
from pipeline.runtime import command
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store


def main(argv: Sequence[str] = ()) -> None:
    """Download as `params.yaml` says and print a summary."""
    command.Parser(prog="python -m pipeline.download", description=main.__doc__).parse_args(argv)
    sources, machine = load_sources(), Machine.load()
    manifest = download(sources, Store.open(machine), OUT, machine)
    for name, source in manifest.sources.items():
        files = [file for file in manifest.files if file.source == name]
        tokens = sum(file.tokens or 0 for file in files)
        print(
            f"download: {name}: {source.repo} at {source.revision}: {len(files)} files, "
            + (f"{tokens:,} tokens, " if tokens else f"{sum(f.rows for f in files):,} documents, ")
            + f"{sum(f.bytes for f in files) / 1e6:.1f} MB in {OUT}"
        )


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
