"""To and from the Hugging Face GPT-2 layout.

It is a folder of `config.json`, `model.safetensors` and `generation_config.json`.

OpenAI's weights are published in it, and `transformers.GPT2LMHeadModel` and `lm_eval --model hf`
read it. Two differences to our parameters: its linear maps ("Conv1D") are stored [in, out], ours
are [out, in]; its token table has no padded rows. Values are moved, never changed: a round trip is
exact to the bit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint import read_json, save_tensors, write_json
from model.config import EOT, GPTConfig
from model.errors import ConfigError, FormatError

WEIGHTS = "model.safetensors"
PREFIX = "transformer."
"""Before each name in the files of `save_pretrained`; absent in those of the published gpt2."""

# masks that old versions stored beside the weights
_BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_TRANSPOSED = re.compile(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight")

# what GPT-2 is, where the layout can say otherwise: key, value, meaning when absent
_REQUIRED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def read(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and the parameters, under our names and in our shapes, of a folder in that layout.

    Raises:
        FormatError: A file is missing, a tensor missing or unknown, or the model is not a GPT-2.
    """
    config = _read_config(folder)
    files = _weight_files(folder)
    state: dict[str, Tensor] = {}
    head: Tensor | None = None
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                # one tensor at a time: no second copy of the whole
                for stored in file.keys():  # noqa: SIM118 (no mapping)
                    name = stored.removeprefix(PREFIX)
                    if name == "lm_head.weight":
                        head = file.get_tensor(stored)
                    elif not _BUFFERS.fullmatch(name):
                        state[name] = _to_ours(name, file.get_tensor(stored), config)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} cannot be read: {error}") from error
    table = state.get("wte.weight")
    if head is not None and table is not None and not torch.equal(head, table[: len(head)]):
        raise FormatError(f"{folder}: lm_head.weight is not tied to wte.weight, as GPT-2's is")
    return config, state


def write(folder: Path, config: GPTConfig, parameters: dict[str, Tensor]) -> None:
    """Writes the layout, without tokenizer files (see `tokenizer_files.py`).

    Args:
        folder: Made if it does not exist.
        config: The model's.
        parameters: Its `state_dict()`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        PREFIX + name: _to_theirs(name, parameter.detach().cpu(), config)
        for name, parameter in parameters.items()
    }
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    # a vocabulary without <|endoftext|> (in tests) has no such token to name
    eot = EOT if config.vocab_size > EOT else None
    write_json(
        folder / "config.json",
        {
            **_REQUIRED,
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_positions": config.block_size,
            "n_ctx": config.block_size,
            "n_inner": None,
            "vocab_size": config.vocab_size,
            "bos_token_id": eot,
            "eos_token_id": eot,
            # this project trains without dropout
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "initializer_range": 0.02,
            "torch_dtype": "float32",
            "use_cache": True,
        },
    )
    write_json(
        folder / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": eot, "eos_token_id": eot},
    )


def _read_config(folder: Path) -> GPTConfig:
    path = folder / "config.json"
    values = read_json(path, f"is {folder} a model in the Hugging Face layout?")
    for key, required in _REQUIRED.items():
        if values.get(key, required) != required:
            raise FormatError(f"{path}: {key} is {values[key]!r}, GPT-2 has {required!r}")
    try:
        config = GPTConfig(
            n_layer=values["n_layer"],
            n_head=values["n_head"],
            n_embd=values["n_embd"],
            block_size=values.get("n_positions", 1024),
            vocab_size=values.get("vocab_size", 50257),
        )
    except KeyError as error:
        raise FormatError(f"{path}: key {error} is missing") from error
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from error
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        raise FormatError(f"{path}: n_inner is {values['n_inner']}, GPT-2 has 4 * n_embd")
    return config


def _weight_files(folder: Path) -> list[Path]:
    """One file, or the several that an index names."""
    single = folder / WEIGHTS
    index = folder / f"{WEIGHTS}.index.json"
    if single.is_file() or not index.is_file():
        files = [single]
    else:
        names: dict[str, Any] = read_json(index, "it should name the weight files")["weight_map"]
        for name in names.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise FormatError(f"{index}: {name!r} is no name of a file beside it")
        files = [folder / name for name in sorted(set(names.values()))]
    for path in files:
        if not path.is_file():
            raise FormatError(
                f"{path} does not exist: weights are read from safetensors files only"
            )
    return files


def _to_ours(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    if name == "wte.weight" and tensor.ndim == 2:
        padding = tensor.new_zeros(config.padded_vocab_size - config.vocab_size, tensor.shape[1])
        return torch.cat([tensor, padding])
    return tensor.T.contiguous() if _TRANSPOSED.fullmatch(name) else tensor


def _to_theirs(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    if name == "wte.weight":
        tensor = tensor[: config.vocab_size]
    elif _TRANSPOSED.fullmatch(name):
        tensor = tensor.T
    return tensor
