"""Read and write the Hugging Face GPT-2 layout, in which OpenAI's weights are published.

It is a folder of `config.json`, `model.safetensors` and `generation_config.json`, which
`transformers.GPT2LMHeadModel` and `lm_eval --model hf` can load. It differs from a checkpoint in
two ways: linear maps ("Conv1D") are stored [in, out] instead of [out, in], and the token table has
no padded rows. Values never change, so a round trip is bit-exact.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint import read_json, save_tensors, write_json
from model.config import EOT, GPTConfig
from model.errors import ConfigError, FormatError

WEIGHTS = "model.safetensors"
PREFIX = "transformer."
"""Prefix of every name in files of `save_pretrained`; the published gpt2 has none."""

# attention masks, which old versions stored with the weights
_BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_TRANSPOSED = re.compile(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight")

# config keys that must have these values, or be absent, for the model to be a GPT-2
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
    """Read the config, and the parameters under our names and in our shapes.

    Raises:
        FormatError: A file is missing or unreadable, or the model is not a GPT-2.
    """
    config = _read_config(folder)
    files = _weight_files(folder)
    state: dict[str, Tensor] = {}
    head: Tensor | None = None
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                # one tensor at a time, to never hold a second copy of the model
                for stored in file.keys():  # noqa: SIM118 (not a mapping)
                    name = stored.removeprefix(PREFIX)
                    if name == "lm_head.weight":
                        head = file.get_tensor(stored)
                    elif not _BUFFERS.fullmatch(name):
                        state[name] = _from_hf(name, file.get_tensor(stored), config)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} cannot be read: {error}") from error
    table = state.get("wte.weight")
    if head is not None and table is not None and not torch.equal(head, table[: len(head)]):
        raise FormatError(f"{folder}: lm_head.weight differs from wte.weight: GPT-2 ties them")
    return config, state


def write(folder: Path, config: GPTConfig, parameters: dict[str, Tensor]) -> None:
    """Write the layout of a `state_dict()`, without the tokenizer (`tokenizer_files.py`)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        PREFIX + name: _to_hf(name, parameter.detach().cpu(), config)
        for name, parameter in parameters.items()
    }
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    # the small vocabularies of tests have no <|endoftext|>
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
            # trained without dropout
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
    values = read_json(path, "give a folder in the Hugging Face layout")
    for key, required in _REQUIRED.items():
        if values.get(key, required) != required:
            raise FormatError(f"{path}: {key} is {values[key]!r}, but {required!r} in GPT-2")
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
        raise FormatError(f"{path}: n_inner is {values['n_inner']}, but 4 * n_embd in GPT-2")
    return config


def _weight_files(folder: Path) -> list[Path]:
    """Return the single weight file, or the files listed in an index."""
    single = folder / WEIGHTS
    index = folder / f"{WEIGHTS}.index.json"
    if single.is_file() or not index.is_file():
        files = [single]
    else:
        names = read_json(index, "it must list the weight files").get("weight_map")
        if not isinstance(names, dict):
            raise FormatError(f"{index}: key 'weight_map' is missing")
        for name in names.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise FormatError(f"{index}: {name!r} is not the name of a file in this folder")
        files = [folder / name for name in sorted(set(names.values()))]
    for path in files:
        if not path.is_file():
            raise FormatError(f"{path} does not exist: weights must be in safetensors files")
    return files


def _from_hf(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    if name == "wte.weight" and tensor.ndim == 2:
        padding = tensor.new_zeros(config.padded_vocab_size - config.vocab_size, tensor.shape[1])
        return torch.cat([tensor, padding])
    return tensor.T.contiguous() if _TRANSPOSED.fullmatch(name) else tensor


def _to_hf(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    if name == "wte.weight":
        tensor = tensor[: config.vocab_size]
    elif _TRANSPOSED.fullmatch(name):
        tensor = tensor.T
    return tensor
