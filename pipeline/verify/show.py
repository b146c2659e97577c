"""Decode documents of the shards for reading: `python -m pipeline.verify --show K`."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.format import tokenizer
from pipeline.format.foreign_tokens import is_token_file
from pipeline.format.manifest import Manifest
from pipeline.format.shards import open_shard, read_docs
from pipeline.runtime.errors import printable
from pipeline.verify.checks import part_spans

_CHARACTERS = 1_000
# The last two join letters or keep them apart in Persian, Hindi and emoji, and move no text.
_HARMLESS = "\n\t\u200c\u200d"


def show_documents(folder: Path, count: int) -> Iterator[str]:
    """Decode documents of `data/tokens`, spread over all shards; the same ones on each call.

    Yields:
        A document's source and its text, cut after `_CHARACTERS`.

    Raises:
        UserError: The manifest is missing, or a shard is damaged.
    """
    manifest = Manifest.load(folder)
    spans = [span for shard in manifest.shards for span in part_spans(shard)]
    total = sum(span.part.docs for span in spans)
    count = min(count, total)
    wanted = [(2 * nth + 1) * total // (2 * count) for nth in range(count)]
    before = 0
    for span in spans:
        while wanted and wanted[0] < before + span.part.docs:
            index = span.docs[0] + wanted.pop(0) - before
            tokens, docs = open_shard(folder / span.shard), read_docs(folder / span.shard)
            begin, at = docs[index].tolist()
            end = int(docs[index + 1, 0]) if index + 1 < len(docs) else len(tokens)
            text = tokenizer.decode(tokens[begin + 1 : end].tolist())
            rest = len(text) - _CHARACTERS
            unit = "token" if is_token_file(span.part.path) else "row"
            yield (
                f"== {span.shard} document {index}: {printable(span.part.path)} {unit} {at:,}, "
                f"{end - begin:,} tokens\n{_visible(text[:_CHARACTERS])}"
                + (f" [{rest:,} more characters]" if rest > 0 else "")
            )
        before += span.part.docs


def _visible(text: str) -> str:
    """Escape control characters: web text could contain terminal commands."""
    return "".join(
        c if c.isprintable() or c in _HARMLESS else f"\\x{ord(c):02x}" for c in text.rstrip()
    )
