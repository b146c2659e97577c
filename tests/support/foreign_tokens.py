"""Readers and writers of other projects' token files, written from their published formats."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def read_llm_c(path: Path) -> np.ndarray:
    """Read tokens as llm.c's loader (llmc/dataloader.h) and modded-nanogpt's do."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(256 * 4), dtype=np.int32)
        assert header[0] == 20240520
        assert header[1] == 1
        n_tokens = int(header[2])
        assert n_tokens > 0
        tokens = np.empty(n_tokens, dtype=np.uint16)
        assert file.readinto(tokens.view(np.uint8).data) == 2 * n_tokens
        assert file.read() == b""
    assert path.stat().st_size == 1024 + 2 * n_tokens
    return tokens


def write_llm_c(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + tokens.astype(np.uint16).tobytes())


def read_megatron(prefix: Path) -> list[np.ndarray]:
    """Read documents as Megatron-LM's IndexedDataset does."""
    index = prefix.with_name(prefix.name + ".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack_from("<Q", index, 9)
    (code,) = struct.unpack_from("<B", index, 17)
    sequences, documents = struct.unpack_from("<QQ", index, 18)
    assert (version, code) == (1, 8)  # 8: uint16
    offset = 34
    lengths = np.frombuffer(index, np.int32, sequences, offset)
    offset += lengths.nbytes
    pointers = np.frombuffer(index, np.int64, sequences, offset)
    offset += pointers.nbytes
    borders = np.frombuffer(index, np.int64, documents, offset)
    assert offset + borders.nbytes == len(index)
    assert borders.tolist() == list(range(sequences + 1))  # a sequence is a document
    data = prefix.with_name(prefix.name + ".bin").read_bytes()
    found = [
        np.frombuffer(data, np.uint16, length, pointer)
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    assert sum(map(len, found)) * 2 == len(data)
    return found
