"""Token shards on disk, and `TokenStream`: the tokens of a split as one sequence.

A shard has llm.c's layout (karpathy/llm.c, dev/data/data_common.py): a header of 256 little-endian
int32, with [0] = 20240520, [1] = 1 and [2] = the number of tokens, then the tokens as little-endian
uint16. Its document index, `<name>.docs.npy`, is int64 (docs, 2): the first token of each document
in the shard, and the document's row in the source file.
"""

import mmap
import operator
import os
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np

from pipeline.format.manifest import SPLITS, Manifest, Shard, Split
from pipeline.runtime.errors import UserError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MAX_TOKENS = 2**31 - 1
TOKEN_DTYPE = np.dtype("<u2")
_HEADER_DTYPE = np.dtype("<i4")
_WRITEBACK_BYTES = 1 << 20
_CREATE = "run `dvc repro` to create it"
_REBUILD = "run `dvc repro` to rebuild it"


class ShardError(UserError):
    """A shard that is missing, or does not match its header or its manifest."""


def _header(n_tokens: int) -> bytes:
    if n_tokens > MAX_TOKENS:
        raise ShardError(
            f"a shard of {n_tokens} tokens exceeds the header's maximum of {MAX_TOKENS}; lower "
            "tokenize.shard_tokens or tokenize.val_per_10k"
        )
    header = np.zeros(HEADER_BYTES // _HEADER_DTYPE.itemsize, dtype=_HEADER_DTYPE)
    header[:3] = MAGIC, VERSION, n_tokens
    return header.tobytes()


class ShardWriter:
    """Writes a shard and its document index; tokens are written as they are appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens = 0
        self.docs = 0
        self._docs: list[np.ndarray] = []
        self._advised = 0
        self._file = open(path, "wb")
        self._file.write(_header(0))

    def append(self, tokens: np.ndarray, docs: np.ndarray) -> None:
        """Append complete documents.

        Args:
            tokens: (n,) uint16.
            docs: (d, 2) int64: each document's first token, relative to ``tokens``, and its row.
        """
        self._docs.append(docs + np.array([self.tokens, 0]))
        self._file.write(np.ascontiguousarray(tokens, dtype=TOKEN_DTYPE).data)
        self.tokens += len(tokens)
        self._start_writeback()
        self.docs += len(docs)

    def _start_writeback(self) -> None:
        """Have Linux write large data to disk while more is encoded: `fsync` then waits less."""
        size = TOKEN_DTYPE.itemsize * self.tokens - self._advised
        if size >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            self._file.flush()
            # Drops only pages that are already written, and these are not: it starts writing them.
            os.posix_fadvise(self._file.fileno(), self._advised, size, os.POSIX_FADV_DONTNEED)
            self._advised += size

    def abandon(self) -> None:
        """Close the incomplete file: garbage collection would flush its buffer later."""
        self._file.close()

    def close(self) -> None:
        """Write the number of tokens to the header, and the index; delete an empty shard."""
        with self._file as file:
            file.seek(0)
            file.write(_header(self.tokens))
        if self.tokens:
            docs = np.concatenate(self._docs).astype("<i8")
            np.save(docs_path(self.path), docs, allow_pickle=False)
        else:
            self.path.unlink()


def docs_path(path: Path) -> Path:
    """Return the path of a shard's document index: `train-00000.docs.npy` for `train-00000.bin`."""
    return path.with_suffix(".docs.npy")


def read_docs(path: Path) -> np.ndarray:
    """Read a shard's document index: (docs, 2) int64, first token and row in the source file.

    Raises:
        ShardError: The index is missing or invalid.
    """
    try:
        # A pipe, whose size is 0, would block.
        docs = (
            np.load(docs_path(path), allow_pickle=False) if docs_path(path).stat().st_size else None
        )
    except FileNotFoundError:
        raise ShardError(f"{docs_path(path)}: no such file; {_CREATE}") from None
    except OSError as error:
        raise _unreadable(docs_path(path), error) from None
    except Exception:  # NumPy's parser raises many types on a damaged header
        docs = None
    if not isinstance(docs, np.ndarray) or docs.dtype != "<i8" or docs.shape[1:] != (2,):
        raise ShardError(f"{docs_path(path)}: not a document index; {_REBUILD}")
    return np.asarray(docs)


def _unreadable(path: Path, error: OSError) -> ShardError:
    return ShardError(f"{path}: cannot be read ({error.strerror}); {_REBUILD}")


def open_shard(path: Path) -> np.ndarray:
    """Memory-map a shard's tokens: (n,) uint16, read-only.

    Raises:
        ShardError: The file is missing, or its header does not match its size.
    """
    try:
        size, data = path.stat().st_size, bytes(HEADER_BYTES)
        if size >= HEADER_BYTES:  # neither too short nor a pipe, which would block
            with open(path, "rb") as file:
                data = file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0")
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file; {_CREATE}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    header = np.frombuffer(data, dtype=_HEADER_DTYPE)
    if size < HEADER_BYTES or header[0] != MAGIC or header[1] != VERSION:
        raise ShardError(f"{path}: not a token shard (wrong header); {_REBUILD}")
    n_tokens = int(header[2])
    expected = HEADER_BYTES + n_tokens * TOKEN_DTYPE.itemsize
    if size != expected:
        raise ShardError(f"{path}: {size} bytes, but its header gives {expected}; {_REBUILD}")
    if n_tokens == 0:
        return np.zeros(0, dtype=TOKEN_DTYPE)
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Not np.memmap: it adds microseconds per slice and hides the map that `_advise` needs.
    return np.frombuffer(memory, dtype=TOKEN_DTYPE, offset=HEADER_BYTES)


class TokenStream:
    """The tokens of one split as one sequence across its shards.

    ``len(stream)`` is the number of tokens, ``stream[i]`` is a token, ``stream[a:b]`` copies tokens
    [a, b) to a (b - a,) uint16 array, and `gather` copies many spans of one length. Not
    thread-safe.

    Shards are memory-mapped on first use; beyond `_MAX_MAPS` the oldest map is dropped, since each
    keeps a file open. After `_MAX_RESIDENT_BYTES` the mapped pages are released to the page cache:
    otherwise the resident set would grow to the size of the data in one epoch. If the split is
    larger than half of the memory, readahead is disabled: Linux would read 128 KB (the default of
    most disks) for each window of 2 KB and soon evict it.
    """

    _MAX_RESIDENT_BYTES = 128 * 2**20
    _FAULT_BYTES = 64 * 2**10  # mapped by Linux around each page fault, if in the page cache
    _MAX_MAPS = 512
    _PREFETCH_BYTES = 2**20  # with readahead disabled, spans from this size are prefetched

    def __init__(self, folder: Path | str, split: Split, source: str | None = None) -> None:
        """Open the stream, checking each shard's size and header against the manifest.

        Args:
            source: Name of the source whose tokens are taken; None: all of the split.

        Raises:
            UserError: The folder or a shard is missing or damaged.
            ValueError: There is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}; use one of {', '.join(SPLITS)}")
        self.folder = Path(folder)
        self.split = split
        self.manifest = Manifest.load(self.folder)
        self.shards: list[Shard] = [
            shard
            for shard in self.manifest.shards
            if shard.split == split and source in (None, shard.source)
        ]
        for shard in self.shards:
            found = len(open_shard(self.folder / shard.name))
            if found != shard.tokens:
                raise ShardError(
                    f"{self.folder / shard.name}: {found} tokens, but the manifest gives "
                    f"{shard.tokens}; {_REBUILD}"
                )
        # Shard i holds the stream's tokens [starts[i], starts[i + 1]).
        self.starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self._maps: dict[int, np.ndarray] = {}
        self._resident = 0
        self._no_readahead = len(self) * TOKEN_DTYPE.itemsize > _memory_bytes() // 2

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return (
            f"TokenStream({str(self.folder)!r}, {self.split!r}): {len(self):,} tokens in "
            f"{len(self.shards):,} shards"
        )

    @overload
    def __getitem__(self, span: SupportsIndex) -> int: ...

    @overload
    def __getitem__(self, span: slice) -> np.ndarray: ...

    def __getitem__(self, span: slice | SupportsIndex) -> np.ndarray | int:
        if not isinstance(span, slice):
            index = operator.index(span)
            if not -len(self) <= index < len(self):
                raise IndexError(f"token {index} is outside the stream's {len(self)} tokens")
            index %= len(self)
            return int(self[index : index + 1][0])
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise ValueError("TokenStream supports only slices of step 1")
        out = np.empty(max(0, stop - start), dtype=np.uint16)
        filled = 0
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        while filled < len(out):
            offset = start + filled - int(self.starts[index])
            tokens = self._map(index)
            piece = tokens[offset : offset + len(out) - filled]
            if self._no_readahead and piece.nbytes >= self._PREFETCH_BYTES:
                _advise(tokens, mmap.MADV_WILLNEED, offset, len(piece))
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1
        self._limit_resident(1, out.nbytes)
        return out

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Copy the spans [start, start + length).

        Args:
            starts: (n,) int64, first token of each span.
            length: Tokens per span.

        Returns:
            (n, length) uint16.

        Raises:
            ValueError: A span lies outside the stream.
        """
        if len(starts) and not 0 <= starts.min() <= starts.max() + length <= len(self):
            raise ValueError(f"a span lies outside the stream's {len(self)} tokens")
        out = np.empty((len(starts), length), dtype=np.uint16)
        shards = np.searchsorted(self.starts, starts, side="right") - 1
        offsets = starts - self.starts[shards]
        in_one_shard = starts + length <= self.starts[shards + 1]
        # Python integers and plain slices: the loader's speed depends on this loop.
        where = zip(shards.tolist(), offsets.tolist(), in_one_shard.tolist(), strict=True)
        for row, (shard, offset, contiguous) in zip(out, where, strict=True):
            if contiguous:
                row[:] = self._map(shard)[offset : offset + length]
            else:
                start = int(self.starts[shard]) + offset
                row[:] = self[start : start + length]
        self._limit_resident(len(starts), out.nbytes)
        return out

    def _map(self, index: int) -> np.ndarray:
        tokens = self._maps.get(index)
        if tokens is None:
            if len(self._maps) >= self._MAX_MAPS:
                del self._maps[next(iter(self._maps))]
            tokens = self._maps[index] = open_shard(self.folder / self.shards[index].name)
            if self._no_readahead:
                _advise(tokens, mmap.MADV_RANDOM)
        return tokens

    def _limit_resident(self, spans: int, n_bytes: int) -> None:
        """Count the bytes read, and release the mapped pages at `_MAX_RESIDENT_BYTES`."""
        self._resident += spans * self._FAULT_BYTES + n_bytes
        if self._resident < self._MAX_RESIDENT_BYTES:
            return
        self._resident = 0
        if not hasattr(mmap, "MADV_DONTNEED"):
            self._maps.clear()
        for tokens in self._maps.values():
            _advise(tokens, mmap.MADV_DONTNEED)


def _advise(tokens: np.ndarray, advice: int, start: int = 0, count: int | None = None) -> None:
    """Call `madvise` on ``count`` tokens of a mapped shard, or on all of it."""
    view: Any = tokens.base  # a memoryview of the map; an empty shard has none
    if view is None:
        return
    if count is None:
        view.obj.madvise(advice)
    else:
        begin = HEADER_BYTES + TOKEN_DTYPE.itemsize * start
        page = begin - begin % mmap.PAGESIZE
        view.obj.madvise(advice, page, begin + TOKEN_DTYPE.itemsize * count - page)


def _memory_bytes() -> int:
    """Return this machine's memory in bytes; 2**62 if unknown, or if there is no `madvise`."""
    if not hasattr(mmap, "MADV_RANDOM") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 2**62
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
