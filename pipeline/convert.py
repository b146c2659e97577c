"""Convert token shards to the formats of other training code.

`python -m pipeline.convert --to nanogpt|build-nanogpt|megatron --out DIR`

```
nanogpt         train.bin, val.bin: uint16 tokens and no header, EOT after each document
                (karpathy/nanoGPT, data/openwebtext/prepare.py)
build-nanogpt   shard_val_000000.npy, shard_train_000001.npy, ...: 100,000,000 uint16 each, the rest
                in the last one, EOT before each document (karpathy/build-nanogpt, fineweb.py)
megatron        train_text_document.bin and .idx, val_text_document.bin and .idx: tokens, EOT after
                each document, and a document index; DIR/train_text_document is its --data-path
                (NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py)
```

llm.c and modded-nanogpt read `data/tokens/*.bin` without conversion.
"""

import argparse
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.format.manifest import SPLITS, Split
from pipeline.format.shards import TOKEN_DTYPE, TokenStream, read_docs
from pipeline.format.tokenizer import EOT
from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import Progress
from pipeline.store import atomic

TOKENS = Path("data/tokens")

_BLOCK_TOKENS = 1 << 22
_NPY_TOKENS = 100_000_000
# Megatron's index: magic bytes, version 1, and type code 8 for uint16.
_IDX_HEADER = b"MMIDIDX\0\0" + struct.pack("<QB", 1, 8)

Streams = dict[Split, TokenStream]
Advance = Callable[[int], None]


def convert(tokens: Path, to: str, out: Path) -> list[str]:
    """Convert the token folder ``tokens`` to format ``to`` in a new folder ``out``.

    Returns:
        The names of the files.

    Raises:
        UserError: ``out`` is not empty, the disk is too small, or a shard is damaged.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: already exists; name a new folder, or remove it")
    opened = {split: TokenStream(tokens, split) for split in SPLITS}
    streams = {split: stream for split, stream in opened.items() if len(stream)}
    total = sum(map(len, streams.values()))
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    docs = sum(shard.docs for stream in streams.values() for shard in stream.shards)
    needed, free = TOKEN_DTYPE.itemsize * total + 20 * docs, shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"--out {out}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; "
            "name a folder on a larger disk"
        )
    temporary = out.absolute().with_name(f".{out.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
    temporary.mkdir(parents=True)
    try:
        with Progress("convert", total, "tokens") as progress:
            WRITERS[to](streams, temporary, progress.advance)
        names = sorted(path.name for path in temporary.iterdir())
        for name in names:
            atomic.fsync_file(temporary / name)
        os.rename(temporary, out.absolute())
        atomic.fsync_folder(out.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return names


def _write_nanogpt(streams: Streams, folder: Path, advance: Advance) -> None:
    for split, stream in streams.items():
        with open(folder / f"{split}.bin", "wb") as file:
            _write_eot_after(stream, file, advance)


def _write_eot_after(stream: TokenStream, file: BinaryIO, advance: Advance) -> None:
    """Write the stream with EOT after each document: the first EOT moves to the end."""
    first = int(stream[:1][0] == EOT)
    for start in range(first, len(stream), _BLOCK_TOKENS):
        block = stream[start : start + _BLOCK_TOKENS]
        file.write(block.astype(TOKEN_DTYPE, copy=False).tobytes())
        advance(len(block))
    file.write(np.array([EOT], TOKEN_DTYPE).tobytes())
    advance(first)


def _write_build_nanogpt(streams: Streams, folder: Path, advance: Advance) -> None:
    number = 0
    for split in reversed(SPLITS):  # validation first, as in build-nanogpt
        stream: TokenStream | Sequence[int] = streams.get(split, ())
        for start in range(0, len(stream), _NPY_TOKENS):
            stop = min(start + _NPY_TOKENS, len(stream))
            with open(folder / f"shard_{split}_{number:06d}.npy", "wb") as file:
                shape = (stop - start,)
                header = {"descr": TOKEN_DTYPE.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for at in range(start, stop, _BLOCK_TOKENS):
                    block = streams[split][at : min(at + _BLOCK_TOKENS, stop)]
                    file.write(block.astype(TOKEN_DTYPE, copy=False).tobytes())
                    advance(len(block))
            number += 1


def _write_megatron(streams: Streams, folder: Path, advance: Advance) -> None:
    for split, stream in streams.items():
        path = folder / f"{split}_text_document.bin"
        with open(path, "wb") as file:
            _write_eot_after(stream, file, advance)
        with open(path.with_suffix(".idx"), "wb") as file:
            count = sum(map(len, document_lengths(stream)))
            file.write(_IDX_HEADER + struct.pack("<QQ", count, count + 1))
            for lengths in document_lengths(stream):
                file.write(lengths.astype("<i4").tobytes())
            offset = 0
            for lengths in document_lengths(stream):
                ends = offset + np.cumsum(lengths) * TOKEN_DTYPE.itemsize
                file.write(np.append(offset, ends[:-1]).astype("<i8").tobytes())
                offset = int(ends[-1])
            for start in range(0, count + 1, _BLOCK_TOKENS):  # a document is one sequence
                stop = min(start + _BLOCK_TOKENS, count + 1)
                file.write(np.arange(start, stop, dtype="<i8").tobytes())


def document_lengths(stream: TokenStream) -> Iterator[np.ndarray]:
    """Yield the tokens of each document, including its EOT: non-empty (n,) int64 arrays.

    A document that continues in the next shard is one document. Tokens before the first EOT of the
    stream, with which published shards may begin, are a document as well.
    """
    begin = None
    for shard, start in zip(stream.shards, stream.starts.tolist(), strict=False):
        starts = read_docs(stream.folder / shard.name)[:, 0] + start
        if begin is None and stream[:1][0] != EOT:
            begin = -1  # this document gains an EOT, and the last one loses none
        borders = starts if begin is None else np.append(begin, starts)
        if len(borders) > 1:
            yield np.diff(borders)
        if len(borders):
            begin = int(borders[-1])
    if begin is not None:
        yield np.array([len(stream) - begin])


WRITERS: dict[str, Callable[[Streams, Path, Advance], None]] = {
    "nanogpt": _write_nanogpt,
    "build-nanogpt": _write_build_nanogpt,
    "megatron": _write_megatron,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and print one summary."""
    parser = command.Parser(
        prog="python -m pipeline.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--to", required=True, choices=sorted(WRITERS), help="the output format")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    args = parser.parse_args(argv)
    names = convert(TOKENS, args.to, args.out)
    size = sum((args.out / name).stat().st_size for name in names)
    print(f"convert: {len(names)} files, {size / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
