"""Token shards on disk, and the stream of tokens that a split's shards form.

A shard is llm.c's layout (karpathy/llm.c, dev/data/data_common.py): 256 little-endian int32, of
which [0] = 20240520, [1] = 1 and [2] = the number of tokens, then the tokens as little-endian
uint16.
"""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.format.manifest import Manifest, Shard, Split
from pipeline.runtime.errors import UserError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MAX_TOKENS = 2**31 - 1
TOKEN_DTYPE = np.dtype("<u2")
_HEADER_DTYPE = np.dtype("<i4")


class ShardError(UserError):
    """A shard that is not what its header or its manifest says."""


def _header(n_tokens: int) -> bytes:
    if n_tokens > MAX_TOKENS:
        raise ShardError(f"a shard of {n_tokens} tokens; its header holds at most {MAX_TOKENS}")
    header = np.zeros(HEADER_BYTES // _HEADER_DTYPE.itemsize, dtype=_HEADER_DTYPE)
    header[:3] = MAGIC, VERSION, n_tokens
    return header.tobytes()


class ShardWriter:
    """Writes a shard and its sidecar of documents, holding one block at a time.

    The sidecar `<name>.docs.npy` is int64 (docs, 2): a document's first token in the shard, and its
    row in the source file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.docs_path = docs_path(path)
        self.tokens = 0
        self.docs = 0
        self._docs: list[np.ndarray] = []
        self._file = open(path, "wb")
        self._file.write(_header(0))

    def append(self, tokens: np.ndarray, docs: np.ndarray) -> None:
        """Append whole documents.

        Args:
            tokens: (n,) uint16.
            docs: (d, 2) int64, their first tokens counted from ``tokens[0]``, and their rows.
        """
        self._docs.append(docs + np.array([self.tokens, 0]))
        self._file.write(np.ascontiguousarray(tokens, dtype=TOKEN_DTYPE).data)
        self.tokens += len(tokens)
        self.docs += len(docs)

    def abandon(self) -> None:
        """Close the file as it is: left open, it would write once more when it is collected."""
        self._file.close()

    def close(self) -> None:
        """Write the sidecar, and the number of tokens into the header; leave no empty shard."""
        with self._file as file:
            file.seek(0)
            file.write(_header(self.tokens))
        if self.tokens:
            docs = np.concatenate(self._docs).astype("<i8")
            np.save(self.docs_path, docs, allow_pickle=False)
        else:
            self.path.unlink()


def docs_path(path: Path) -> Path:
    """The sidecar of a shard: ``train-00000.docs.npy`` for ``train-00000.bin``."""
    return path.with_suffix(".docs.npy")


def read_docs(path: Path) -> np.ndarray:
    """A shard's sidecar: (docs, 2) int64, first token in the shard and row in the source file.

    Raises:
        ShardError: the file is missing or holds something else.
    """
    try:
        docs = np.load(docs_path(path), allow_pickle=False)
    except FileNotFoundError:
        raise ShardError(f"{docs_path(path)}: no such file; `dvc repro` makes it") from None
    except OSError:
        raise
    except Exception:  # whatever numpy's parser meets in a damaged header, TokenError among it
        docs = None
    if (
        not isinstance(docs, np.ndarray)
        or docs.dtype != np.dtype("<i8")
        or docs.ndim != 2
        or docs.shape[1] != 2
    ):
        raise ShardError(f"{docs_path(path)}: no sidecar of documents; `dvc repro` mends it")
    return np.asarray(docs)


def open_shard(path: Path) -> np.ndarray:
    """Map a shard's tokens into memory: (n,) uint16, read-only.

    Raises:
        ShardError: the file is missing, or its header, size and name do not fit together.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            data = file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0")
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file; `dvc repro` makes it") from None
    header = np.frombuffer(data, dtype=_HEADER_DTYPE)
    if size < HEADER_BYTES or header[0] != MAGIC or header[1] != VERSION:
        raise ShardError(f"{path}: no token shard (wrong header); `dvc repro` mends it")
    n_tokens = int(header[2])
    expected = HEADER_BYTES + n_tokens * TOKEN_DTYPE.itemsize
    if size != expected:
        raise ShardError(f"{path}: {size} bytes, its header says {expected}; `dvc repro` mends it")
    if n_tokens == 0:
        return np.zeros(0, dtype=TOKEN_DTYPE)
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # No np.memmap: it costs microseconds a slice, and hides the map, which is to be told things.
    return np.frombuffer(memory, dtype=TOKEN_DTYPE, offset=HEADER_BYTES)


class TokenStream:
    """The tokens of one split, across its shards, as one sequence.

    ``len(stream)`` is the number of tokens; ``stream[a:b]`` copies tokens ``a`` to ``b`` out as a
    (b - a,) uint16 array; ``gather`` copies many spans of one length. Shards are memory-mapped when
    first touched, and the oldest map is dropped beyond `_MAPS` (each holds a file open). What was
    mapped in is given back, to the page cache, after `_RESIDENT_BYTES`: else the resident set would
    grow to the size of the data in an epoch. A split that memory cannot hold is read without its
    surroundings: Linux would read 128 KB, or what the disk is set to, for each window of 2 KB, and
    soon drop it again. Not to be shared between threads.
    """

    _RESIDENT_BYTES = 128 * 2**20
    _FAULT_BYTES = 64 * 2**10  # what Linux maps in round a touched page, where it is in the cache
    _MAPS = 512
    _LONG_BYTES = 2**20  # a span that is read ahead as a whole, where single pages are the rule

    def __init__(self, folder: Path | str, split: Split) -> None:
        """Open the stream; every shard's size and header are checked against the manifest.

        Raises:
            UserError: the folder or a shard is missing or damaged.
        """
        self.folder = Path(folder)
        self.split = split
        self.manifest = Manifest.load(self.folder)
        self.shards: list[Shard] = [s for s in self.manifest.shards if s.split == split]
        for shard in self.shards:
            found = len(open_shard(self.folder / shard.name))
            if found != shard.tokens:
                raise ShardError(
                    f"{self.folder / shard.name}: {found} tokens, the manifest says "
                    f"{shard.tokens}; `dvc repro` mends it"
                )
        # Shard i holds the stream's tokens [starts[i], starts[i + 1]).
        self.starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self._maps: dict[int, np.ndarray] = {}
        self._resident = 0
        self._scattered = len(self) * TOKEN_DTYPE.itemsize > _memory() // 2

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise ValueError("a token stream is read with step 1")
        out = np.empty(max(0, stop - start), dtype=np.uint16)
        filled = 0
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        while filled < len(out):
            offset = start + filled - int(self.starts[index])
            tokens = self._map(index)
            piece = tokens[offset : offset + len(out) - filled]
            if self._scattered and piece.nbytes >= self._LONG_BYTES:
                _advise(tokens, mmap.MADV_WILLNEED, offset, len(piece))
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1
        self._touched(1, out.nbytes)
        return out

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Copies the spans [start, start + length) out.

        Args:
            starts: (n,) int64, first tokens.
            length: Tokens of each span.

        Returns:
            (n, length) uint16.

        Raises:
            ValueError: a span lies outside of the stream.
        """
        if len(starts) and not 0 <= starts.min() <= starts.max() + length <= len(self):
            raise ValueError(f"a span lies outside of the stream's {len(self)} tokens")
        out = np.empty((len(starts), length), dtype=np.uint16)
        shards = np.searchsorted(self.starts, starts, side="right") - 1
        offsets = starts - self.starts[shards]
        whole = starts + length <= self.starts[shards + 1]
        # Plain numbers and plain slices: this loop is what a loader's speed is made of.
        where = zip(shards.tolist(), offsets.tolist(), whole.tolist(), strict=True)
        for row, (shard, offset, inside) in zip(out, where, strict=True):
            if inside:
                row[:] = self._map(shard)[offset : offset + length]
            else:
                start = int(self.starts[shard]) + offset
                row[:] = self[start : start + length]
        self._touched(len(starts), out.nbytes)
        return out

    def _map(self, index: int) -> np.ndarray:
        tokens = self._maps.get(index)
        if tokens is None:
            if len(self._maps) >= self._MAPS:
                del self._maps[next(iter(self._maps))]
            tokens = self._maps[index] = open_shard(self.folder / self.shards[index].name)
            if self._scattered:
                _advise(tokens, mmap.MADV_RANDOM)
        return tokens

    def _touched(self, spans: int, n_bytes: int) -> None:
        """Counts what was read, and in time gives back the memory that its pages are mapped in."""
        self._resident += spans * self._FAULT_BYTES + n_bytes
        if self._resident < self._RESIDENT_BYTES:
            return
        self._resident = 0
        if not hasattr(mmap, "MADV_DONTNEED"):
            self._maps.clear()
        for tokens in self._maps.values():
            _advise(tokens, mmap.MADV_DONTNEED)


def _advise(tokens: np.ndarray, advice: int, start: int = 0, count: int | None = None) -> None:
    """Tell the system how ``count`` tokens of a mapped shard, or all of it, are used."""
    view: Any = tokens.base  # of the map, as numpy keeps it; an empty shard has none
    if view is None:
        return
    if count is None:
        view.obj.madvise(advice)
    else:
        begin = HEADER_BYTES + TOKEN_DTYPE.itemsize * start
        page = begin - begin % mmap.PAGESIZE
        view.obj.madvise(advice, page, begin + TOKEN_DTYPE.itemsize * count - page)


def _memory() -> int:
    """Bytes of this machine's memory; where it tells none, or takes no advice, as if endless."""
    if not hasattr(mmap, "MADV_RANDOM") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 2**62
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
