"""Tests for layers and attention: explicit equals fused, in values, gradients and dtypes."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from model import GPT, GPTConfig
from model.attention import document_mask, document_positions, explicit_attention, fused_attention
from model.layers import GELU, Embedding, LayerNorm, Linear
from model.variants import ReLUSquared, RMSNorm

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=300)
LAYERS = {
    "linear": lambda kind: Linear(24, 40, kind),
    "linear without bias": lambda kind: Linear(24, 40, kind, bias=False),
    "layer_norm": lambda kind: LayerNorm(24, kind),
    "gelu": lambda kind: GELU(kind),
    "rms_norm": lambda kind: RMSNorm(kind),
    "relu_squared": lambda kind: ReLUSquared(kind),
}
VARIANTS: dict[str, Any] = {"positions": "rotary", "qk_norm": True, "activation": "relu_squared"}
BF16_STEP = 2.0**-8


def twins(make):
    """Return a fused and an explicit layer with the same random parameters."""
    torch.manual_seed(0)
    fused, explicit = make("fused"), make("explicit")
    for a, b in zip(fused.parameters(), explicit.parameters(), strict=True):
        with torch.no_grad():
            a.normal_()
            b.copy_(a)
    return fused, explicit


def run(layer, x, autocast):
    """Return output, gradient of the input, and gradients of the parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    assert x.grad is not None
    return [y, x.grad, *(p.grad for p in layer.parameters())]


def distance(a, b):
    """Return the norm of the difference, relative to the second tensor."""
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_explicit_layer_equals_fused(name, autocast):
    fused, explicit = twins(LAYERS[name])
    x = torch.randn(3, 7, 24)
    expected, got = run(fused, x, autocast), run(explicit, x, autocast)
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    for a, b in zip(got, expected, strict=True):
        assert distance(a, b) < (BF16_STEP if autocast else 1e-5)


@pytest.mark.parametrize("name", ["linear", "layer_norm", "gelu", "rms_norm", "relu_squared"])
def test_bfloat16_input_without_autocast_keeps_its_dtype(name):
    fused, explicit = twins(lambda kind: LAYERS[name](kind).bfloat16())
    x = torch.randn(3, 24).bfloat16()
    assert fused(x).dtype == explicit(x).dtype == torch.bfloat16
    assert distance(explicit(x), fused(x)) < 2 * BF16_STEP


def test_explicit_embedding_equals_fused():
    fused, explicit = twins(lambda kind: Embedding(10, 4, kind))
    ids = torch.tensor([[1, 9, 1], [0, 1, 5]])
    assert torch.equal(fused(ids), explicit(ids))
    upstream = torch.randn(2, 3, 4)
    fused(ids).backward(upstream)
    explicit(ids).backward(upstream)
    torch.testing.assert_close(explicit.weight.grad, fused.weight.grad, atol=1e-6, rtol=0)


def test_gelu_is_the_tanh_approximation():
    x = torch.linspace(-4, 4, 101)
    exact = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    assert 1e-4 < (GELU("explicit")(x) - exact).abs().max() < 1e-3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explicit_attention_equals_fused(masked, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 17, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    documents = torch.tensor([[0] * 5 + [1] * 12, [7] * 17])
    mask = document_mask(documents) if masked else None
    assert not isinstance(mask, BlockMask)
    upstream = torch.randn(2, 3, 17, 8).to(dtype)
    results = []
    for attention in (explicit_attention, fused_attention):
        y = attention(q, k, v, mask)
        results.append((y, *torch.autograd.grad(y, (q, k, v), upstream)))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == dtype
        assert distance(a, b) < (1e-5 if dtype == torch.float32 else 3 * BF16_STEP)


def test_attention_handles_scores_that_overflow_exp():
    q = torch.full((1, 1, 3, 4), 300.0)
    y = explicit_attention(q, q, torch.ones(1, 1, 3, 4), None)
    torch.testing.assert_close(y, torch.ones(1, 1, 3, 4))


def test_document_mask_and_positions():
    documents = torch.tensor([[4, 4, 9, 9, 9, 2]])
    assert document_positions(documents).tolist() == [[0, 1, 0, 1, 2, 0]]
    mask = document_mask(documents)
    assert isinstance(mask, torch.Tensor)
    expected = [[k <= q and documents[0, q] == documents[0, k] for k in range(6)] for q in range(6)]
    assert mask[0, 0].tolist() == expected


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("documents", "options"),
    [(False, {}), (True, {}), (False, VARIANTS), (True, VARIANTS)],
    ids=["plain", "documents", "variants", "variants and documents"],
)
def test_explicit_model_equals_fused(autocast, documents, options):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, **options)
    fused, explicit = GPT(config), GPT(config, implementation="explicit")
    tokens, targets = torch.randint(300, (2, 2, 32)).unbind()
    ids = torch.arange(32).expand(2, 32) // 10 if documents else None
    results = []
    for gpt in (fused, explicit):
        with torch.no_grad():
            for i, p in enumerate(gpt.parameters()):  # no bias is zero
                p[:300] += 0.02 * torch.randn(p[:300].shape, generator=torch.manual_seed(i))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, loss = gpt(tokens, documents=ids), gpt(tokens, targets, documents=ids)
        loss.backward()
        results.append((logits, loss, gpt))
    (logits, loss, _), (explicit_logits, explicit_loss, _) = results
    assert logits.dtype == explicit_logits.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert loss.dtype == explicit_loss.dtype == torch.float32
    assert distance(explicit_logits, logits) < (0.02 if autocast else 1e-5)
    assert abs(loss - explicit_loss) < (5e-3 if autocast else 1e-6)
    for (name, a), b in zip(explicit.named_parameters(), fused.parameters(), strict=True):
        a_grad, b_grad = a.grad, b.grad
        assert a_grad is not None
        assert b_grad is not None
        if name.endswith("c_attn.bias"):  # the keys' third is zero up to rounding
            a_grad, b_grad = (grad.view(3, -1)[[0, 2]] for grad in (a_grad, b_grad))
        assert distance(a_grad, b_grad) < (0.05 if autocast else 1e-5), name


@pytest.mark.parametrize("implementation", ["fused", "explicit"])
def test_every_layer_is_our_own(implementation):
    """Only Module and ModuleList come from torch.nn, also as base classes."""
    allowed = {torch.nn.Module, torch.nn.ModuleList}
    for name, module in GPT(TINY, implementation=implementation).named_modules():
        assert {k for k in type(module).__mro__ if k.__module__.startswith("torch.")} <= allowed, (
            name
        )
