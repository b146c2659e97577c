"""Write the model files of llm.c (https://github.com/karpathy/llm.c), in float32 and bfloat16.

    256 int32: magic, version, maximal T, V, layers, heads, channels, P, 0, ...
    token table (P, C), its padded rows zero; position table (T, C)
    for each parameter of a block, in the order of the block: that of all layers, [out, in]
    weight and bias of the last LayerNorm

[llm.c at f1e2ace: `write_model` in train_gpt2.py, `gpt2_build_from_checkpoint` in train_gpt2.c and
train_gpt2.cu]. All numbers are little-endian. `train_gpt2` reads version 3, `train_gpt2cu` version
5 unless it was built with PRECISION=FP32.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model.config import GPTConfig, require_gpt2
from model.files import write_atomically
from model.size import block_shapes

FILES = {"gpt2_fp32.bin": torch.float32, "gpt2_bf16.bin": torch.bfloat16}

_MAGIC = 20240326
_VERSIONS = {torch.float32: 3, torch.bfloat16: 5}


def write(folder: Path, config: GPTConfig, parameters: dict[str, Tensor]) -> None:
    """Write both files of a `state_dict()`.

    Raises:
        ConfigError: The model has an option that llm.c does not have.
    """
    require_gpt2(config, "llm.c")
    for name, dtype in FILES.items():
        write_atomically(
            folder / name, partial(_write, config=config, parameters=parameters, dtype=dtype)
        )


def _write(
    path: Path, config: GPTConfig, parameters: dict[str, Tensor], dtype: torch.dtype
) -> None:
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    header = (_MAGIC, _VERSIONS[dtype], *sizes, config.padded_vocab_size)
    with open(path, "wb") as file:
        file.write(struct.pack("<256i", *header, *[0] * (256 - len(header))))
        for tensor in _in_order(config, parameters):
            values = tensor.detach().to("cpu", dtype).contiguous()
            file.write(values.view(torch.uint8).numpy().tobytes())


def _in_order(config: GPTConfig, parameters: dict[str, Tensor]) -> Iterator[Tensor]:
    table = parameters["wte.weight"].clone()
    table[config.vocab_size :] = 0
    yield table
    yield parameters["wpe.weight"]
    for name in block_shapes(config):
        for layer in range(config.n_layer):
            yield parameters[f"h.{layer}.{name}"]
    yield parameters["ln_f.weight"]
    yield parameters["ln_f.bias"]
