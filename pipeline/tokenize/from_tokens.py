"""Build chunks from token files: cut them by tokens, and index the documents of each chunk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from pipeline.cluster.tasks import run_tasks
from pipeline.format.foreign_tokens import open_token_file, split_of_file
from pipeline.format.manifest import RawManifest
from pipeline.format.shards import MAX_TOKENS
from pipeline.params import TokenizeParams, errors_of_source
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import Progress
from pipeline.store.store import Store
from pipeline.tokenize.chunk_plan import Chunk
from pipeline.tokenize.chunk_record import Record
from pipeline.tokenize.index_chunk import index_chunk, index_key


@dataclass(frozen=True)
class TokenFileChunks:
    """The `ChunkBuilder` of token files."""

    raw: Path
    source: RawManifest
    params: TokenizeParams
    store: Store
    code: str
    can_ship: ClassVar = False

    def plan(self) -> list[tuple[Chunk, str]]:
        """Cut the files about every ``shard_tokens`` tokens; return each chunk with its key.

        A chunk has the documents that begin in it. A file that is already a shard is one chunk.

        Raises:
            UserError: A file is for validation by its name, but the split is by position.
        """
        files = [f for f in self.source.files if not self.source.sources[f.source].has_text]
        val = [file.path for file in files if split_of_file(file.path) == "val"]
        if val and self.params.val_split == "position":
            raise UserError(
                "params.yaml: tokenize.val_split: position, but the name of the token file "
                f"{val[0]} makes it validation; set documents, or add the file to exclude"
            )
        chunks, numbers = [], self.source.numbers()
        for file in files:
            with errors_of_source(file.source):
                found = open_token_file(self.raw / file.path, file.path)
            shard_tokens = min(self.params.shard_tokens, MAX_TOKENS)
            count = 1 if found.is_shard else max(1, round(found.tokens / shard_tokens))
            borders = [found.tokens * nth // count for nth in range(count + 1)]
            chunks += [Chunk(numbers[file.path], file, a, b, b - a) for a, b in pairwise(borders)]
        return [(chunk, index_key(chunk, self.code)) for chunk in chunks]

    def written_tokens(self, chunk: Chunk) -> int:
        """Count validation twice, because its pieces are merged, and linked shards not at all."""
        if split_of_file(chunk.file.path) == "val":
            return 2 * chunk.estimated_tokens
        is_linked = open_token_file(self.raw / chunk.file.path, chunk.file.path).is_shard
        return 0 if is_linked else chunk.estimated_tokens

    def build(
        self, missing: Sequence[tuple[Chunk, str]], progress: Progress, **options: Any
    ) -> Iterator[tuple[int, Record]]:
        """Index chunks."""
        tasks = [(chunk, key, self.raw.absolute(), self.store) for chunk, key in missing]
        return run_tasks(index_chunk, tasks, None, "tokenize", progress=progress, **options)
