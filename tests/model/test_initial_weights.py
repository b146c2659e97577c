"""Tests for `model.init`: the formula, and that weights depend on seed and name only."""

import math

import pytest
import torch

from model import GPT, GPTConfig
from model.init import initial_std, initialise
from tests.support.metering import Meter

CONFIG = GPTConfig(n_layer=3, n_head=2, n_embd=64, block_size=64, vocab_size=1000)


def check_table(gpt):
    """Check every parameter against the formula; print the table of docs/model.md."""
    L, V = gpt.config.n_layer, gpt.config.vocab_size
    print(f"{'parameter':24} {'formula':>9} {'measured':>9}")
    for name, parameter in gpt.named_parameters():
        p = parameter.detach()
        if name == "wte.weight":
            assert (p[V:] == 0).all()
            p = p[:V]
        if name.endswith("bias"):
            assert (p == 0).all()
        elif "ln_" in name:
            assert (p == 1).all()
        else:
            residual = name.endswith("c_proj.weight")
            expected = 0.02 / math.sqrt(2 * L) if residual else 0.02
            assert initial_std(name, L) == pytest.approx(expected)
            print(f"{name:24} {expected:9.6f} {p.std():9.6f}")
            # standard error of a standard deviation of n draws: std / sqrt(2 n)
            assert abs(p.std() / expected - 1) < 5 / math.sqrt(2 * p.numel()), name
            assert abs(p.mean()) < 5 * expected / math.sqrt(p.numel()), name


def test_standard_deviations_follow_the_formula():
    check_table(GPT(CONFIG, seed=5))


def test_the_seed_decides_the_weights():
    a, b, c = GPT(CONFIG, seed=1), GPT(CONFIG, seed=1), GPT(CONFIG, seed=2)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q)
        if initial_std(name, 3):
            assert not torch.equal(p, r), name


def test_weights_depend_on_their_name_only():
    """Not on the number of layers, nor on what was built or drawn before."""
    deep = GPT(GPTConfig(n_layer=6, n_head=2, n_embd=64, block_size=64, vocab_size=1000))
    torch.manual_seed(99)
    torch.rand(10)
    state = torch.get_rng_state()
    shallow = GPT(CONFIG)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not used
    for name in ("wte.weight", "wpe.weight", "h.2.attn.c_attn.weight", "h.0.mlp.c_fc.weight"):
        assert torch.equal(deep.get_parameter(name), shallow.get_parameter(name)), name
    tensors = [p for n, p in shallow.named_parameters() if n.endswith("c_fc.weight")]
    assert not torch.equal(tensors[0], tensors[1])


def test_a_model_built_on_the_meta_device_gets_the_same_weights():
    with torch.device("meta"):
        gpt = GPT(CONFIG)
    assert all(p.is_meta for p in gpt.parameters())
    gpt.to_empty(device="cpu")
    initialise(gpt, CONFIG, seed=3)
    for other in (GPT(CONFIG, seed=3), GPT.initialised(CONFIG, seed=3)):
        for p, q in zip(gpt.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)


def test_initialising_holds_no_second_copy():
    """Peak memory: all weights, and the parameter being drawn."""
    with Meter("cpu") as meter:
        gpt = GPT.initialised(CONFIG)
    sizes = [4 * p.numel() for p in gpt.parameters()]
    assert sum(sizes) <= meter.peak < sum(sizes) + 1.1 * max(sizes)


@pytest.mark.slow
def test_initial_loss_of_the_124m_model():
    gpt = GPT.initialised(GPTConfig.named("gpt2"))
    check_table(gpt)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(50257, (2, 4, 1024), generator=generator).unbind()
    with torch.no_grad():
        loss = gpt(tokens, targets)
    # logits of a N(0, 0.02²) head over normalised channels have variance C 0.02²
    expected = math.log(50257) + 768 * 0.02**2 / 2
    print(f"initial loss {loss:.4f}, expected {expected:.4f}")
    assert abs(loss - expected) < 0.03


def test_overfits_one_batch():
    """4 x 64 tokens, to a loss below 0.05 nats in 200 steps."""
    torch.manual_seed(0)
    gpt = GPT(CONFIG)
    tokens, targets = torch.randint(1000, (2, 4, 64)).unbind()
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(200):
        loss = gpt(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            return
    raise AssertionError(f"the loss is still {loss:.3f}")
