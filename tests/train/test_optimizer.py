"""Of train.optimizer: every parameter in one group, and a state that goes round."""

import pytest
import torch
from torch import nn

from model import GPT, GPTConfig
from train.optimizer import (
    adamw,
    decay_groups,
    flat_state,
    load_flat_state,
    set_learning_rate,
    table,
)

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64)


def optimizer_of(gpt: GPT) -> torch.optim.AdamW:
    groups = decay_groups(gpt.named_parameters(), embeddings_decay=True)
    return adamw(groups, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def one_step(gpt: GPT, optimizer: torch.optim.AdamW) -> None:
    tokens = torch.arange(16).view(2, 8)
    gpt(tokens, tokens + 1).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_matrices_decay_vectors_do_not_and_each_parameter_is_in_one_group() -> None:
    gpt = GPT(CONFIG)
    groups = {g.name: g for g in decay_groups(gpt.named_parameters(), embeddings_decay=False)}
    assert {n for n, _ in groups["embeddings"].parameters} == {"wte.weight", "wpe.weight"}
    assert all(p.dim() == 2 for _, p in groups["matrices"].parameters)
    assert all(n.endswith("bias") or "ln_" in n for n, _ in groups["vectors"].parameters)
    assert [groups[n].decays for n in ("matrices", "embeddings", "vectors")] == [True, False, False]
    assert sum(g.size for g in groups.values()) == sum(p.numel() for p in gpt.parameters())
    assert len(groups["matrices"].parameters) == 4 * CONFIG.n_layer
    assert "weight decay 0.1" in table(groups.values(), 0.1)


def test_embeddings_decay_by_parameter() -> None:
    groups = decay_groups(GPT(CONFIG).named_parameters(), embeddings_decay=True)
    assert {g.name for g in groups if g.decays} == {"matrices", "embeddings"}


def test_a_parameter_given_twice_is_noticed() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(AssertionError):
        decay_groups([("a.weight", weight), ("b.weight", weight)], embeddings_decay=True)


def test_decay_is_taken_from_the_weights_of_decaying_groups_only() -> None:
    gpt = GPT(CONFIG)
    optimizer = optimizer_of(gpt)
    before = {n: p.detach().clone() for n, p in gpt.named_parameters()}
    for p in gpt.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, parameter in gpt.named_parameters():
        factor = 1 - 1e-2 * 0.1 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter, before[name] * factor)


def test_the_state_goes_round_and_the_next_step_is_the_same() -> None:
    one, other = GPT(CONFIG), GPT(CONFIG)
    a, b = optimizer_of(one), optimizer_of(other)
    assert flat_state(a, dict(one.named_parameters())) == {}
    one_step(one, a)
    state = flat_state(a, dict(one.named_parameters()))
    assert "h.1.mlp.c_fc.weight.exp_avg_sq" in state
    other.load_state_dict(one.state_dict())
    load_flat_state(b, dict(other.named_parameters()), state)
    one_step(one, a)
    one_step(other, b)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_of_another_model_is_refused() -> None:
    gpt = GPT(CONFIG)
    optimizer = optimizer_of(gpt)
    one_step(gpt, optimizer)
    named = dict(gpt.named_parameters())
    state = flat_state(optimizer, named)
    with pytest.raises(ValueError, match="no parameter"):
        load_flat_state(optimizer, named, {**state, "x.exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match="shape"):
        load_flat_state(optimizer, named, {**state, "ln_f.bias.exp_avg": torch.zeros(3)})
    with pytest.raises(KeyError):
        load_flat_state(optimizer, named, {})


def test_the_learning_rate_reaches_every_group() -> None:
    optimizer = optimizer_of(GPT(CONFIG))
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert all(group["fused"] for group in optimizer.param_groups)
