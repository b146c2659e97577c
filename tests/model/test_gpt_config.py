"""Tests for `GPTConfig`, and for arguments that the model refuses."""

import json
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from model.errors import ConfigError

TINY: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 99}


def test_published_sizes():
    config = GPTConfig.named("gpt2")
    assert (config.n_layer, config.n_head, config.n_embd) == (12, 12, 768)
    assert (config.block_size, config.vocab_size) == (1024, 50257)
    assert config.padded_vocab_size == 50304
    assert GPTConfig.named("gpt2-xl", block_size=64).block_size == 64
    assert GPTConfig.named("gpt2-xl").n_embd == 1600


def test_config_is_frozen_and_survives_json():
    config = GPTConfig(**TINY, loss_chunk=7, document_positions=False, positions="rotary")
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert GPTConfig(**TINY, loss_chunk=0) == GPTConfig(**TINY)
    with pytest.raises(AttributeError):
        config.n_layer = 3  # type: ignore[misc]
    assert GPTConfig.from_dict(TINY).variants == {}  # also of checkpoints older than these keys
    assert config.variants == {"positions": "rotary"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_layer": 0}, "n_layer"),
        ({"n_head": 3}, "n_embd (32)"),
        ({"block_size": -1}, "block_size"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"n_layer": True}, "n_layer"),
        ({"loss_chunk": -2}, "loss_chunk"),
        ({"checkpoint_activations": "yes"}, "checkpoint_activations"),
        ({"n_layers": 2}, "'n_layer'"),
        ({"positions": "alibi"}, "positions"),
        ({"positions": None}, "positions"),
        ({"activation": ["gelu"]}, "activation"),
        ({"qk_norm": 1}, "qk_norm"),
        ({"zero_init": "yes"}, "zero_init"),
        ({"positions": "rotary", "n_embd": 34}, "n_embd (34)"),
    ],
)
def test_invalid_fields_are_named_in_one_line(change, named):
    with pytest.raises(ConfigError) as caught:
        GPTConfig.from_dict({**TINY, **change})
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_field_and_unknown_size_are_named():
    with pytest.raises(ConfigError, match="'n_embd'"):
        GPTConfig.from_dict({"n_layer": 1, "n_head": 1})
    with pytest.raises(ConfigError, match="gpt3"):
        GPTConfig.named("gpt3")


def test_invalid_arguments_of_the_model_are_named():
    gpt = GPT(GPTConfig(**TINY))
    tokens = torch.zeros(1, 33, dtype=torch.int64)
    with pytest.raises(ConfigError, match="block_size"):
        gpt(tokens)
    with pytest.raises(ConfigError, match="targets"):
        gpt(tokens[:, :8], tokens[:, :9])
    with pytest.raises(ConfigError, match="documents"):
        gpt(tokens[:, :8], documents=tokens[:, :9])
    for model in (gpt, GPT(gpt.config, implementation="explicit")):
        with pytest.raises(ConfigError, match="reduction"):
            model(tokens[:, :8], tokens[:, :8], "average")
    with pytest.raises(ConfigError, match="implementation"):
        GPT(GPTConfig(**TINY), implementation="quick")  # type: ignore[arg-type]
