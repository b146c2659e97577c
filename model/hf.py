"""Read and write the Hugging Face GPT-2 layout, in which OpenAI's weights are published.

It is a folder of `config.json`, `model.safetensors` and `generation_config.json`, which
`transformers.GPT2LMHeadModel` and `lm_eval --model hf` can load. It differs from a checkpoint in
two ways: linear maps ("Conv1D") are stored [in, out] instead of [out, in], and the token table has
no padded rows. Values never change, so a round trip is bit-exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import EOT, Activation, GPTConfig, require_gpt2
from model.errors import ConfigError, FormatError
from model.files import (
    Stored,
    check_shapes,
    list_tensors,
    load_tensors,
    read_json,
    save_tensors,
    shown,
    write_json,
)
from model.size import parameter_shapes

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"
FILES = (WEIGHTS, GENERATION, CONFIG)
"""In the order in which they are written: a folder without the config is not taken for a model."""

INDEX = f"{WEIGHTS}.index.json"
PREFIX = "transformer."
"""Prefix of every name in files of `save_pretrained`; the published gpt2 has none."""

TABLE, HEAD = "wte.weight", "lm_head.weight"
"""Names of one matrix, the token table, which is also the output head; files have one or both."""

# attention masks, which old versions stored with the weights
_BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_TRANSPOSED = re.compile(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight")

# Names of our activations; the first is written. Those of GELU's tanh approximation differ in how
# they compute it: the largest difference on [-12, 12] is 4e-7, one float32 step.
_ACTIVATIONS: dict[Activation, tuple[str, ...]] = {
    "gelu": (
        "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate",
    ),
    "relu_squared": ("relu2",),
}  # fmt: skip

# Config keys that must have one of these values, or be absent, for the model to be a GPT-2; the
# first is written.
_REQUIRED = {
    "model_type": ("gpt2",),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}

# other names of config keys (`attribute_map` of transformers' GPT2Config)
_ALIASES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
}


def read(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Read the config, and the parameters under our names, in our shapes and in float32.

    Raises:
        FormatError: A file is missing or unreadable, the model is not a GPT-2, or a tensor is
            missing, unknown, ambiguous, of another shape or not finite.
    """
    config = _read_config(folder / CONFIG)
    found = _find_tensors(folder)
    head = found.pop(HEAD, None)
    if head is not None:
        table = found.setdefault(TABLE, head)
        if table.shape != head.shape:
            raise FormatError(
                f"{head.path}: tensor {head.name!r} is {head.shape}, but {table.name!r} is "
                f"{table.shape}: GPT-2 ties them"
            )
    check_shapes(folder, found, _stored_shapes(config))
    state = dict(load_tensors(found))
    if head not in (None, found[TABLE]):
        for _, values in load_tensors({HEAD: head}):
            if not torch.equal(values, state[TABLE]):
                raise FormatError(
                    f"{head.path}: tensor {head.name!r} differs from {found[TABLE].name!r}: "
                    "GPT-2 ties them"
                )
    for name, tensor in state.items():
        state[name] = _from_hf(name, tensor, config)
    return config, state


def write(
    folder: Path,
    config: GPTConfig,
    parameters: dict[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the layout of a `state_dict()`, without the tokenizer (`tokenizer_files.py`).

    Args:
        metadata: More entries for the header of the weights.

    Raises:
        ConfigError: The model has an option that the layout cannot hold.
    """
    require_gpt2(config, "the GPT-2 of transformers", but=("activation",))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        PREFIX + name: _to_hf(name, parameter.detach().cpu(), config)
        for name, parameter in parameters.items()
    }
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt", **(metadata or {})})
    write_json(folder / GENERATION, {"_from_model_config": True, **_end_of_text(config)})
    write_json(folder / CONFIG, _config_values(config))


def wrote(folder: Path) -> bool:
    """Return whether `write` has written the config of a folder, and not another program."""
    try:
        values = read_json(folder / CONFIG, "")
    except FormatError:
        return False
    return values.keys() == _config_values(GPTConfig(n_layer=1, n_head=1, n_embd=1)).keys()


def _config_values(config: GPTConfig) -> dict[str, Any]:
    return {
        **{key: values[0] for key, values in _REQUIRED.items()},
        **_end_of_text(config),
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": _ACTIVATIONS[config.activation][0],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_inner": None,
        "vocab_size": config.vocab_size,
        # trained without dropout
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _end_of_text(config: GPTConfig) -> dict[str, int | None]:
    # the small vocabularies of tests have no <|endoftext|>
    eot = EOT if config.vocab_size > EOT else None
    return {"bos_token_id": eot, "eos_token_id": eot}


def _read_config(path: Path) -> GPTConfig:
    values = read_json(path, "give a folder in the Hugging Face layout")
    for alias, key in _ALIASES.items():
        if alias in values and values.setdefault(key, values[alias]) != values[alias]:
            raise FormatError(
                f"{path}: {alias} is {shown(values[alias])}, but {key} is {shown(values[key])}: "
                "they are names of one number"
            )
    for key, accepted in _REQUIRED.items():
        if key in values and values[key] not in accepted:
            raise FormatError(
                f"{path}: {key} is {shown(values[key])}, but {accepted[0]!r} in GPT-2"
            )
    try:
        config = GPTConfig(
            n_layer=values["n_layer"],
            n_head=values["n_head"],
            n_embd=values["n_embd"],
            block_size=values.get("n_positions", 1024),
            vocab_size=values.get("vocab_size", 50257),
            activation=_read_activation(path, values.get("activation_function", "gelu_new")),
        )
    except KeyError as error:
        raise FormatError(f"{path}: key {error} is missing") from error
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from error
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        raise FormatError(f"{path}: n_inner is {shown(values['n_inner'])}, but 4 * n_embd in GPT-2")
    return config


def _read_activation(path: Path, value: object) -> Activation:
    for ours, names in _ACTIVATIONS.items():
        if value in names:
            return ours
    known = ", ".join(name for names in _ACTIVATIONS.values() for name in names)
    raise FormatError(f"{path}: activation_function is {shown(value)}, but must be one of {known}")


def _find_tensors(folder: Path) -> dict[str, Stored]:
    """Find the tensors of the weight file, or of the files in an index, by our names.

    Raises:
        FormatError: A file is missing or unreadable, two tensors have the same name, or index and
            files differ.
    """
    assigned = None if (folder / WEIGHTS).exists() else _read_index(folder)
    found: dict[str, Stored] = {}
    for file in sorted({WEIGHTS} if assigned is None else set(assigned.values())):
        for stored in list_tensors(folder / file):
            if assigned is not None and assigned.pop(stored.name, None) != file:
                raise FormatError(
                    f"{stored.path}: tensor {stored.name!r} is not assigned to this file in "
                    f"{INDEX}: save the model again, or remove files of another"
                )
            name = stored.name.removeprefix(PREFIX)
            if name in found:
                raise FormatError(
                    f"{stored.path}: tensors {found[name].name!r} and {stored.name!r} are one "
                    "parameter of GPT-2: remove one of them"
                )
            if not _BUFFERS.fullmatch(name):
                found[name] = stored
    for name, file in (assigned or {}).items():
        raise FormatError(f"{folder / file}: tensor {name!r} is missing: {INDEX} assigns it")
    return found


def _read_index(folder: Path) -> dict[str, str] | None:
    """Read the file of each tensor from the index, if there is one."""
    index = folder / INDEX
    if not index.exists():
        raise FormatError(
            f"{folder / WEIGHTS} does not exist: weights must be in safetensors files; convert "
            "others with transformers: GPT2LMHeadModel.from_pretrained(DIR).save_pretrained(NEW)"
        )
    files = read_json(index, "it must list the weight files").get("weight_map")
    if not isinstance(files, dict) or not files:
        raise FormatError(f"{index}: key 'weight_map' must be an object, tensor -> file")
    for file in files.values():
        plain = isinstance(file, str) and file.isprintable() and Path(file).name == file
        if not (plain and file.endswith(".safetensors")):
            raise FormatError(
                f"{index}: {shown(file)} is not the name of a safetensors file in this folder"
            )
    return files


def _stored_shapes(config: GPTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the layout, without `PREFIX`."""
    for name, shape in parameter_shapes(config):
        if name == TABLE:
            shape = (config.vocab_size, config.n_embd)
        yield name, shape[::-1] if _TRANSPOSED.fullmatch(name) else shape


def _from_hf(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    if name == TABLE:
        padding = tensor.new_zeros(config.padded_vocab_size - config.vocab_size, tensor.shape[1])
        return torch.cat([tensor, padding])
    return tensor.T.contiguous() if _TRANSPOSED.fullmatch(name) else tensor


def _to_hf(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    if name == TABLE:
        tensor = tensor[: config.vocab_size]
    elif _TRANSPOSED.fullmatch(name):
        tensor = tensor.T
    return tensor
