"""Model sizes: what is accepted, what is refused and how."""

import json
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from model.errors import ConfigError

TINY: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "vocab_size": 300,
}


def test_published_sizes():
    config = GPTConfig.named("gpt2")
    assert (config.n_layer, config.n_head, config.n_embd) == (12, 12, 768)
    assert (config.block_size, config.vocab_size) == (1024, 50257)
    assert config.padded_vocab_size == 50304
    assert GPTConfig.named("gpt2-xl", block_size=64).block_size == 64
    assert GPTConfig.named("gpt2-xl").n_embd == 1600


def test_round_trip_through_json():
    config = GPTConfig(**TINY, loss_chunk=7, document_positions=False)
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layer": 0}, "n_layer must be a whole number of at least 1"),
        ({"n_head": 3}, "n_embd (32) must be a multiple of n_head (3)"),
        ({"block_size": -1}, "block_size"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"n_layer": True}, "n_layer"),
        ({"loss_chunk": -2}, "loss_chunk"),
        ({"checkpoint_activations": "yes"}, "checkpoint_activations must be true or false"),
        ({"n_layers": 2}, "unknown model key 'n_layers': did you mean 'n_layer'?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change, words):
    with pytest.raises(ConfigError) as caught:
        GPTConfig.from_dict({**TINY, **change})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_key_and_unknown_name():
    with pytest.raises(ConfigError, match="'n_embd' is missing"):
        GPTConfig.from_dict({"n_layer": 1, "n_head": 1})
    with pytest.raises(ConfigError, match="gpt2-medium"):
        GPTConfig.named("gpt3")


def test_loss_chunk_zero_chooses():
    assert GPTConfig(**TINY, loss_chunk=0) == GPTConfig(**TINY)


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        GPTConfig(**TINY).n_layer = 3  # type: ignore[misc]


def test_wrong_calls_of_the_model():
    gpt = GPT(GPTConfig(**TINY))
    tokens = torch.zeros(1, 33, dtype=torch.int64)
    with pytest.raises(ConfigError, match="block_size is 32"):
        gpt(tokens)
    with pytest.raises(ConfigError, match="targets are"):
        gpt(tokens[:, :8], tokens[:, :9])
    with pytest.raises(ConfigError, match="documents are"):
        gpt(tokens[:, :8], documents=tokens[:, :9])
    for implementation in ("fused", "explicit"):
        with pytest.raises(ConfigError, match="reduction"):
            GPT(GPTConfig(**TINY), implementation=implementation)(
                tokens[:, :8], tokens[:, :8], "average"
            )
    with pytest.raises(ConfigError, match="implementation"):
        GPT(GPTConfig(**TINY), implementation="quick")  # type: ignore[arg-type]
