"""Documents of the shards as people read them: `python -m pipeline.verify --show K`."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.format import tokenizer
from pipeline.format.manifest import Manifest
from pipeline.format.shards import open_shard, read_docs
from pipeline.verify.checks import places_of

_CHARACTERS = 1_000


def show_documents(folder: Path, count: int) -> Iterator[str]:
    """Decoded documents of `data/tokens`, spread over all shards; the same ones each time.

    Yields:
        Where a document comes from, and its text, cut after `_CHARACTERS`.

    Raises:
        UserError: there is no manifest, or a shard is damaged.
    """
    manifest = Manifest.load(folder)
    places = [place for shard in manifest.shards for place in places_of(shard)]
    total = sum(place.part.docs for place in places)
    count = min(count, total)
    unit = "token" if manifest.source.source.kind == "tokens" else "row"
    wanted = [(2 * nth + 1) * total // (2 * count) for nth in range(count)]
    before = 0
    for place in places:
        while wanted and wanted[0] < before + place.part.docs:
            index = place.docs[0] + wanted.pop(0) - before
            tokens, docs = open_shard(folder / place.shard), read_docs(folder / place.shard)
            begin, at = docs[index].tolist()
            end = int(docs[index + 1, 0]) if index + 1 < len(docs) else len(tokens)
            text = tokenizer.decode(tokens[begin + 1 : end].tolist())
            rest = len(text) - _CHARACTERS
            yield (
                f"== {place.shard} document {index}: {place.part.path} {unit} {at:,}, "
                f"{end - begin:,} tokens\n{_visible(text[:_CHARACTERS])}"
                + (f" [and {rest:,} characters more]" if rest > 0 else "")
            )
        before += place.part.docs


def _visible(text: str) -> str:
    """The text, its control characters written out: text of the web could steer a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text.rstrip()
    )
