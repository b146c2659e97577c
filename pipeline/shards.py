"""Token shards on disk, and the stream of tokens that a split's shards form.

A shard is llm.c's layout (karpathy/llm.c, dev/data/data_common.py): 256 little-endian int32, of
which [0] = 20240520, [1] = 1 and [2] = the number of tokens, then the tokens as little-endian
uint16.
"""

from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.manifest import Manifest, Shard, Split

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
        self._docs: list[np.ndarray] = []
        self._file = open(path, "wb")
        self._file.write(_header(0))

    @property
    def docs(self) -> int:
        """Documents written so far."""
        return sum(len(block) for block in self._docs)

    def append(self, tokens: np.ndarray, docs: np.ndarray) -> None:
        """Append whole documents.

        Args:
            tokens: (n,) uint16.
            docs: (d, 2) int64, their first tokens counted from ``tokens[0]``, and their rows.
        """
        self._docs.append(docs + np.array([self.tokens, 0]))
        self._file.write(tokens.astype(TOKEN_DTYPE, copy=False).tobytes())
        self.tokens += len(tokens)

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
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES)


class TokenStream:
    """The tokens of one split, across its shards, as one sequence.

    ``len(stream)`` is the number of tokens; ``stream[a:b]`` copies tokens ``a`` to ``b`` out as a
    (b - a,) uint16 array. Shards are memory-mapped when first touched, and all maps are dropped
    after `_DROP_BYTES` of reading: a map held for an epoch would let the resident set grow to the
    size of the data. Not to be shared between threads.
    """

    _DROP_BYTES = 256 * 2**20

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
        self._read_bytes = 0

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
            piece = self._map(index)[offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1
        self._read_bytes += out.nbytes
        if self._read_bytes > self._DROP_BYTES:
            self._maps.clear()
            self._read_bytes = 0
        return out

    def _map(self, index: int) -> np.ndarray:
        if index not in self._maps:
            self._maps[index] = open_shard(self.folder / self.shards[index].name)
        return self._maps[index]
