"""Build chunks from text: cut parquet files by rows, and encode each chunk."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.cluster.tasks import run_tasks
from pipeline.format.manifest import RawManifest
from pipeline.format.selection import Selection
from pipeline.params import TokenizeParams
from pipeline.runtime.errors import printable
from pipeline.runtime.machine import Machine
from pipeline.runtime.progress import Progress
from pipeline.store.store import Store
from pipeline.tokenize import engines, ship_chunks
from pipeline.tokenize.chunk_plan import Chunk, plan_chunks
from pipeline.tokenize.chunk_record import Record, read_engine_report
from pipeline.tokenize.encode_chunk import chunk_key, encode_chunk


@dataclass(frozen=True)
class TextChunks:
    """The `ChunkBuilder` of text."""

    raw: Path
    source: RawManifest
    params: TokenizeParams
    store: Store
    code: str
    machine: Machine
    selection: Selection | None = None
    can_ship: ClassVar = True

    def plan(self) -> list[tuple[Chunk, str]]:
        """Cut the parquet files into chunks of rows; return each with its key."""
        chunks = plan_chunks(self.raw, self.source, self.params.shard_tokens, self.selection)
        columns = [self.source.column(chunk.file) for chunk in chunks]
        return [
            (chunk, chunk_key(chunk, column, self.params, self.code))
            for chunk, column in zip(chunks, columns, strict=True)
        ]

    def written_tokens(self, chunk: Chunk) -> int:
        """Return the number of tokens to write, estimated."""
        return chunk.estimated_tokens

    def build(
        self, missing: Sequence[tuple[Chunk, str]], progress: Progress, **options: Any
    ) -> Iterator[tuple[int, Record]]:
        """Encode chunks, and report the engines that did it."""
        if self.machine.engine == "gigatoken" and (reason := engines.unavailable_reason()):
            progress.log(f"{reason}; encoding with tiktoken, about ten times slower")
        raw, column = self.raw.absolute(), self.source.column
        engine = self.machine.engine, self.machine.check_fraction
        tasks = [
            (chunk, key, raw, column(chunk.file), self.params, self.store, *engine)
            for chunk, key in missing
        ]
        if self.machine.data == "ship":
            finished = ship_chunks.encode_chunks(tasks, progress=progress, **options)
        else:
            finished = run_tasks(
                encode_chunk, tasks, None, "tokenize", progress=progress, **options
            )
        text_bytes: Counter[str] = Counter()
        for index, record in finished:
            chunk, key = missing[index]
            report = read_engine_report(self.store.root / "chunks" / key)
            for row in report["differences"]:
                progress.log(
                    f"warning: {printable(chunk.file.path)}, row {row}: gigatoken and tiktoken "
                    "differ; the chunk was encoded with tiktoken. Please report this document; to "
                    "turn gigatoken off, set engine: tiktoken in machine.yaml"
                )
            text_bytes.update(report["bytes"])
            yield index, record
        if text_bytes.total():
            share = 100 * text_bytes["tiktoken"] / text_bytes.total()
            progress.log(f"{share:.2f} % of the text was encoded by tiktoken")
