"""Tests for the model files of llm.c: bytes, and a forward pass over what llm.c would read.

Both are transcribed from llm.c at f1e2ace, and use nothing of `model/` but its file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import GPT, GPTConfig, checkpoint, export

CONFIG = GPTConfig(n_layer=2, n_head=3, n_embd=24, block_size=32)

Arrays = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def gpt() -> GPT:
    gpt = GPT(CONFIG, seed=3)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)  # no two blocks or biases are equal
    return gpt  # also with padded rows that are not zero


@pytest.fixture(scope="module")
def exported(gpt: GPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llmc")
    checkpoint.write(folder / "checkpoint", CONFIG, gpt.state_dict(), {})
    flags = ["--checkpoint", str(folder / "checkpoint"), "--out", str(folder / "out")]
    export.main([*flags, "--format", "llmc"])
    return folder / "out"


def write_model(state: dict[str, Tensor], dtype: torch.dtype) -> bytes:
    """Transcribe `write_model`, `write_tensors` and `pad_vocab` of train_gpt2.py."""
    header = torch.zeros(256, dtype=torch.int32)
    header[0] = 20240326
    header[1] = {torch.float32: 3, torch.bfloat16: 5}[dtype]
    header[2], header[3], header[4], header[5], header[6] = 32, 50257, 2, 3, 24
    header[7] = 50304
    tensors = [
        torch.nn.functional.pad(state["wte.weight"][:50257], (0, 0, 0, 47)),
        state["wpe.weight"],
    ]
    for name in (
        *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias"),
        *("attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias"),
        *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    ):  # fmt: skip
        tensors += [state[f"h.{i}.{name}"] for i in range(2)]
    tensors += [state["ln_f.weight"], state["ln_f.bias"]]
    parts = [tensor.to(dtype) for tensor in tensors]
    parts = [part.view(torch.int16) if dtype == torch.bfloat16 else part for part in parts]
    return header.numpy().tobytes() + b"".join(part.numpy().tobytes() for part in parts)


def test_both_files_have_the_bytes_of_the_published_layout(gpt: GPT, exported: Path) -> None:
    names = {"gpt2_fp32.bin": torch.float32, "gpt2_bf16.bin": torch.bfloat16}
    assert {path.name for path in exported.iterdir()} == set(names)
    for name, dtype in names.items():
        assert (exported / name).read_bytes() == write_model(gpt.state_dict(), dtype)


def build_from_checkpoint(path: Path) -> tuple[dict[str, int], Arrays]:
    """Read a file as `gpt2_build_from_checkpoint` of train_gpt2.c and train_gpt2.cu does."""
    header = np.fromfile(path, dtype="<i4", count=256)
    assert header[0] == 20240326
    assert not header[8:].any()
    maxT, V, L, NH, C, Vp = map(int, header[2:8])
    if header[1] == 3:
        data = np.fromfile(path, dtype="<f4", offset=1024)
    else:
        assert header[1] == 5
        data = (np.fromfile(path, dtype="<u2", offset=1024).astype("<u4") << 16).view("<f4")
    arrays, offset = {}, 0
    for name, shape in {
        "wte": (Vp, C), "wpe": (maxT, C), "ln1w": (L, C), "ln1b": (L, C),
        "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C), "attprojw": (L, C, C), "attprojb": (L, C),
        "ln2w": (L, C), "ln2b": (L, C), "fcw": (L, 4 * C, C), "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C), "fcprojb": (L, C), "lnfw": (C,), "lnfb": (C,),
    }.items():  # fmt: skip
        arrays[name] = data[offset : offset + math.prod(shape)].reshape(shape)
        offset += math.prod(shape)
    assert offset == len(data)
    return {"V": V, "L": L, "NH": NH, "C": C}, arrays


def forward(sizes: dict[str, int], p: Arrays, tokens: list[int]) -> NDArray[np.float64]:
    """Compute the logits (T, V) as `gpt2_forward` of train_gpt2.c does, in float64."""

    def layernorm(x: Any, w: Any, b: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w + b

    T, NH, C = len(tokens), sizes["NH"], sizes["C"]
    p = {name: array.astype(np.float64) for name, array in p.items()}
    x = p["wte"][tokens] + p["wpe"][:T]
    for i in range(sizes["L"]):
        qkv = layernorm(x, p["ln1w"][i], p["ln1b"][i]) @ p["qkvw"][i].T + p["qkvb"][i]
        q, k, v = (part.reshape(T, NH, C // NH).swapaxes(0, 1) for part in np.split(qkv, 3, 1))
        scores = q @ k.swapaxes(1, 2) / math.sqrt(C // NH)
        scores = np.where(np.tri(T, dtype=bool), np.exp(scores), 0)
        atty = scores / scores.sum(-1, keepdims=True) @ v
        x = x + atty.swapaxes(0, 1).reshape(T, C) @ p["attprojw"][i].T + p["attprojb"][i]
        h = layernorm(x, p["ln2w"][i], p["ln2b"][i]) @ p["fcw"][i].T + p["fcb"][i]
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + h @ p["fcprojw"][i].T + p["fcprojb"][i]
    logits: NDArray[np.float64] = layernorm(x, p["lnfw"], p["lnfb"]) @ p["wte"].T
    return logits[:, : sizes["V"]]


@pytest.mark.parametrize(("name", "tolerance"), [("gpt2_fp32.bin", 1e-5), ("gpt2_bf16.bin", 0.1)])
def test_llmc_would_compute_our_logits(
    gpt: GPT, exported: Path, name: str, tolerance: float
) -> None:
    tokens = torch.randint(50257, (32,)).tolist()
    logits = forward(*build_from_checkpoint(exported / name), tokens)
    with torch.no_grad():
        expected = gpt(torch.tensor([tokens]))[0].numpy()
    assert np.abs(expected).max() > 1
    assert np.abs(logits - expected).max() < tolerance
