"""Tests for `model.size`: published parameter counts, FLOPs as PyTorch counts them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from model.loss import linear_cross_entropy
from model.size import flops_per_token, parameter_count, parameter_shapes


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count):
    config = GPTConfig.named(name)
    assert parameter_count(config) == count
    with torch.device("meta"):
        gpt = GPT(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
    assert sum(p.numel() for p in gpt.parameters()) == count + padding
    shapes = [(name, tuple(tensor.shape)) for name, tensor in gpt.state_dict().items()]
    assert list(parameter_shapes(config)) == shapes
    tables = (config.vocab_size + config.block_size) * config.n_embd
    assert parameter_count(config, embeddings=False) == count - tables


@pytest.mark.parametrize(
    ("T", "options"), [(16, {}), (48, {}), (16, {"positions": "rotary", "qk_norm": True})]
)
def test_flops_equal_those_counted_by_pytorch(T, options):
    config = GPTConfig(
        n_layer=3, n_head=2, n_embd=32, block_size=64, vocab_size=300, loss_chunk=20, **options
    )
    gpt = GPT(config, implementation="explicit")
    tokens = torch.randint(300, (2, T))
    with FlopCounterMode(display=False) as counter:
        gpt(tokens, tokens).backward()
    assert counter.get_total_flops() == 2 * T * flops_per_token(config, T)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gpt(tokens)
    assert counter.get_total_flops() == 2 * T * flops_per_token(config, T, backward=False)


def test_rotary_positions_have_no_table():
    config = GPTConfig.named("gpt2", positions="rotary")
    assert parameter_count(config) == 124_439_808 - 1024 * 768
    assert parameter_count(config, embeddings=False) == 85_056_000
    with torch.device("meta"):
        gpt = GPT(config)
    shapes = [(name, tuple(tensor.shape)) for name, tensor in gpt.state_dict().items()]
    assert list(parameter_shapes(config)) == shapes


def test_the_chunked_loss_has_the_flops_of_the_plain_loss():
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=300, loss_chunk=20)
    gpt = GPT(config)
    tokens = torch.randint(300, (2, 64))
    hidden = gpt.hidden(tokens).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, gpt.wte.weight, tokens, 300, chunk_size=20).backward()
    assert counter.get_total_flops() == 128 * 3 * 2 * 32 * config.padded_vocab_size


def test_flops_are_close_to_the_estimate_of_palm():
    config = GPTConfig.named("gpt2")
    n = parameter_count(config) - config.block_size * config.n_embd
    estimate = 6 * n + 12 * config.n_layer * config.n_embd * 1024
    assert flops_per_token(config, 1024) == pytest.approx(estimate, rel=2e-3)
