"""Tests for train.optim.param_groups and train.optim.muon."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from model import GPT, GPTConfig
from train.optim.muon import MuonAdamW
from train.optim.param_groups import (
    Kind,
    Optimizer,
    decay_groups,
    flat_state,
    groups_table,
    load_flat_state,
    make_optimizer,
    set_rates,
    step_with_cautious_decay,
)

KINDS: tuple[Kind, Kind] = ("adamw", "muon")

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64)


def optimizer_of(
    gpt: GPT,
    kind: Kind = "adamw",
    weight_decay: float = 0.1,
    lr_ratios: Mapping[str, float] | None = None,
) -> Optimizer:
    groups = decay_groups(gpt.named_parameters(), embeddings_decay=True, lr_ratios=lr_ratios)
    return make_optimizer(
        groups, kind, learning_rate=1e-2, weight_decay=weight_decay, betas=(0.9, 0.95), eps=1e-8
    )


def one_step(gpt: GPT, optimizer: Optimizer) -> None:
    tokens = torch.arange(16).view(2, 8)
    gpt(tokens, tokens + 1).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def test_every_parameter_is_in_one_group_and_vectors_do_not_decay() -> None:
    gpt = GPT(CONFIG)
    groups = {g.name: g for g in decay_groups(gpt.named_parameters(), embeddings_decay=False)}
    assert {n for n, _ in groups["embeddings"].parameters} == {"wte.weight", "wpe.weight"}
    assert all(p.dim() == 2 for _, p in groups["matrices"].parameters)
    assert all(n.endswith("bias") or "ln_" in n for n, _ in groups["vectors"].parameters)
    assert [groups[n].decays for n in ("matrices", "embeddings", "vectors")] == [True, False, False]
    decaying = decay_groups(gpt.named_parameters(), embeddings_decay=True)
    assert {g.name for g in decaying if g.decays} == {"matrices", "embeddings"}
    assert sum(g.size for g in groups.values()) == sum(p.numel() for p in gpt.parameters())
    assert len(groups["matrices"].parameters) == 4 * CONFIG.n_layer
    matrices, embeddings, _ = groups_table(groups.values(), 0.1, "muon").splitlines()
    assert matrices.split()[0] == "matrices"
    assert matrices.endswith("weight decay 0.1   Muon")
    assert embeddings.endswith("weight decay 0   AdamW")


def test_a_parameter_given_twice_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(AssertionError):
        decay_groups([("a.weight", weight), ("b.weight", weight)], embeddings_decay=True)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_shrinks_only_the_groups_that_decay(kind: Kind) -> None:
    gpt = GPT(CONFIG)
    optimizer = optimizer_of(gpt, kind)
    before = {n: p.detach().clone() for n, p in gpt.named_parameters()}
    for p in gpt.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, parameter in gpt.named_parameters():
        factor = 1 - 1e-2 * 0.1 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter, before[name] * factor)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_state_gives_the_same_next_step(kind: Kind) -> None:
    one, other = GPT(CONFIG), GPT(CONFIG)
    a, b = optimizer_of(one, kind), optimizer_of(other, kind)
    one_step(one, a)
    state = flat_state(a, dict(one.named_parameters()))
    assert "ln_f.bias.exp_avg_sq" in state
    hidden = "exp_avg_sq" if kind == "adamw" else "momentum_buffer"
    assert state[f"h.1.attn.c_attn.weight.{hidden}"].shape == (48, 16)
    other.load_state_dict(one.state_dict())
    load_flat_state(b, dict(other.named_parameters()), state)
    one_step(one, a)
    one_step(other, b)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_empty_before_the_first_step(kind: Kind) -> None:
    """A run that has skipped all steps so far saves none and resumes without."""
    gpt = GPT(CONFIG)
    assert flat_state(optimizer_of(gpt, kind), dict(gpt.named_parameters())) == {}


def test_the_state_of_another_model_is_refused() -> None:
    gpt = GPT(CONFIG)
    optimizer = optimizer_of(gpt)
    one_step(gpt, optimizer)
    named = dict(gpt.named_parameters())
    state = flat_state(optimizer, named)
    with pytest.raises(ValueError, match=r"x\.exp_avg"):
        load_flat_state(optimizer, named, {**state, "x.exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"ln_f\.bias\.exp_avg.*\(3,\).*\(16,\)"):
        load_flat_state(optimizer, named, {**state, "ln_f.bias.exp_avg": torch.zeros(3)})
    with pytest.raises(KeyError):
        load_flat_state(optimizer, named, {})


def test_the_state_of_the_other_optimizer_is_refused() -> None:
    gpt = GPT(CONFIG)
    named = dict(gpt.named_parameters())
    optimizers = [optimizer_of(gpt, kind) for kind in KINDS]
    for optimizer in optimizers:
        one_step(gpt, optimizer)
    states = [flat_state(optimizer, named) for optimizer in optimizers]
    for optimizer, state in zip(optimizers, reversed(states), strict=True):
        with pytest.raises(KeyError, match="weight"):
            load_flat_state(optimizer, named, state)


@pytest.mark.parametrize("kind", KINDS)
def test_every_group_gets_its_rates(kind: Kind) -> None:
    gpt = GPT(CONFIG)
    optimizer = optimizer_of(gpt, kind, lr_ratios={"embeddings": 4.0, "vectors": 0.5})
    ratios = {id(gpt.wte.weight): 4.0, id(gpt.ln_f.bias): 0.5}
    for fraction in (1.0, 0.25, 0.0, 0.5):
        set_rates(optimizer, 0.1, fraction)
        for group in optimizer.param_groups:
            found = [ratios[id(p)] for p in group["params"] if id(p) in ratios]
            assert group["lr"] == 0.1 * (found or [1.0])[0]
            assert group["weight_decay"] == (0.0 if found == [0.5] else 0.1 * fraction)
    adamw = optimizer.adamw if isinstance(optimizer, MuonAdamW) else optimizer
    assert all(group["fused"] for group in adamw.param_groups)


@pytest.mark.parametrize("kind", KINDS)
def test_cautious_decay_shrinks_a_weight_only_where_its_update_does(kind: Kind) -> None:
    plain, cautious = GPT(CONFIG), GPT(CONFIG)
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for gpt, decay in ((plain, 0.0), (cautious, 0.5)):
        gpt.load_state_dict(start)
        optimizer = optimizer_of(gpt, kind, weight_decay=decay)
        tokens = torch.arange(16).view(2, 8)
        gpt(tokens, tokens + 1).backward()
        step_with_cautious_decay(optimizer)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.5}
    without = dict(plain.named_parameters())
    for name, parameter in cautious.named_parameters():
        shrinks = (start[name] - without[name]) * start[name] >= 0
        decayed = without[name] - 1e-2 * 0.5 * shrinks * start[name]
        expected = decayed if parameter.dim() == 2 else without[name]
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-7)
        assert parameter.dim() < 2 or shrinks.unique().numel() == 2, name


# -- Muon ------------------------------------------------------------------------------------------


def first_update(kind: Kind) -> dict[str, Tensor]:
    """Change of each parameter by the first step."""
    gpt = GPT(CONFIG)
    before = {n: p.detach().clone() for n, p in gpt.named_parameters()}
    one_step(gpt, optimizer_of(gpt, kind, weight_decay=0.0))
    return {n: p.detach() - before[n] for n, p in gpt.named_parameters()}


def test_muon_updates_are_nearly_orthogonal_separately_for_q_k_and_v() -> None:
    """The Newton-Schulz iteration brings most singular values to between 0.7 and 1.2."""
    for name, step in first_update("muon").items():
        if ".weight" not in name or not name.startswith("h.") or ".ln_" in name:
            continue
        for part in step.chunk(3) if "c_attn" in name else [step]:
            values = torch.linalg.svdvals(part / (1e-2 * 0.2 * max(part.shape) ** 0.5))
            assert values.median() > 0.6, name  # the smallest have not converged
            assert values.max() < 1.4, name
        if "c_attn" in name:  # three orthogonal maps, not one
            assert torch.linalg.svdvals(step / (1e-2 * 0.2 * 16**0.5)).max() > 1.4


def test_adamw_updates_embeddings_and_vectors_beside_muon() -> None:
    adamw, muon = first_update("adamw"), first_update("muon")
    same = {name for name, step in adamw.items() if torch.equal(step, muon[name])}
    assert same == {n for n in adamw if n in ("wte.weight", "wpe.weight") or adamw[n].dim() == 1}


def test_muon_uses_weights_and_gradients_that_are_changed_in_place() -> None:
    """As loading a checkpoint does, and DDP with its buckets."""
    gpt = GPT(CONFIG)
    optimizer = optimizer_of(gpt, "muon", weight_decay=0.0)
    weight = dict(gpt.named_parameters())["h.0.attn.c_attn.weight"]
    weight.data.fill_(5.0)
    one_step(gpt, optimizer)
    assert (weight - 5.0).abs().max() < 0.1
    assert not torch.equal(weight, torch.full_like(weight, 5.0))
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0
    optimizer.zero_grad()
    assert weight.grad is None
