"""Tests for `model.loss`: values, gradients, padding and memory of the chunked loss."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.loss import Chunks, cross_entropy, linear_cross_entropy
from tests.support.metering import Meter

V, P, C = 300, 384, 16


def inputs(seed, shape=(3, 11), ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, C, generator=generator).requires_grad_()
    weight = torch.randn(P, C, generator=generator).requires_grad_()
    targets = torch.randint(V, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < ignored] = -100
    return hidden, weight, targets


def plain(hidden, weight, targets, reduction):
    logits = F.linear(hidden, weight[:V]).float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


def gradients(loss, hidden, weight, upstream=None):
    return torch.autograd.grad(loss, (hidden, weight), upstream)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 33),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    chunk_size=st.none() | st.integers(1, 40),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_chunked_loss_equals_plain_loss(seed, rows, reduction, chunk_size, scale):
    """Also where targets are ignored and rows of the table are padding."""
    hidden, weight, targets = inputs(seed, (rows,))
    targets[0] = seed % V  # the mean of no targets is below
    hidden = (hidden * scale).detach().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, V, reduction, chunk_size)
    expected = plain(hidden, weight, targets, reduction)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-5)
    explicit = cross_entropy(F.linear(hidden, weight[:V]), targets, reduction)
    torch.testing.assert_close(explicit, expected, rtol=2e-6, atol=2e-5)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))
    got = gradients(loss, hidden, weight, upstream)
    for a, b in zip(got, gradients(expected, hidden, weight, upstream), strict=True):
        # At scale 30 logits reach 500, which float32 rounds by 3e-5: so much a probability changes.
        assert (a - b).norm() <= (5e-5 if scale > 1 else 1e-6) * b.norm() + 1e-6
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, targets, V, reduction, chunk_size)
    torch.testing.assert_close(evaluated, loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_small_loss_of_large_logits_keeps_its_digits(reduction, chunked, bfloat16):
    """At logits of 100 and 86 it is 8.3e-7, far below the spacing of float32 at 100."""
    logits = torch.full((1, V), -100.0)
    logits[0, :2] = torch.tensor([100.0, 86.0])
    z = logits.double().requires_grad_()
    expected = F.cross_entropy(z, torch.tensor([0]))
    (dz,) = torch.autograd.grad(expected, z)
    assert expected.item() == pytest.approx(8.315e-7, rel=1e-3)

    hidden, targets = torch.eye(1, C), torch.tensor([0])
    weight = F.pad(logits.T, (0, C - 1, 0, P - V)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        if chunked:
            loss = linear_cross_entropy(hidden, weight, targets, V, reduction)
        else:
            loss = cross_entropy(F.linear(hidden, weight[:V]), targets, reduction)
        (dw,) = torch.autograd.grad(loss.sum(), weight)
    # 1 + 8.3e-7, the sum of exp(z - max), is rounded to a multiple of 1.2e-7; bfloat16 has 8 bits
    assert loss.item() == pytest.approx(expected.item(), abs=6e-8)
    for got, right in zip(dw[:2, 0].tolist(), dz[0, :2].tolist(), strict=True):
        assert got == pytest.approx(right, abs=6e-8, rel=1e-2)


def test_loss_of_ignored_targets_is_zero():
    hidden, weight, targets = inputs(4, ignored=1)
    loss = linear_cross_entropy(hidden, weight, targets, V)
    assert loss == 0
    assert all((g == 0).all() for g in gradients(loss, hidden, weight))


def test_autocast_uses_bfloat16_products_and_float32_sums():
    hidden, weight, targets = inputs(3, (4, 64))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, V, "mean", 50)
        expected = plain(hidden, weight, targets, "mean")
        none = linear_cross_entropy(hidden, weight, targets, V, "none", 50)
    assert loss.dtype == none.dtype == torch.float32
    assert abs(loss - expected) < 1e-5  # both round the same logits to bfloat16
    assert abs(none.sum() / (targets != -100).sum() - loss) < 1e-5
    for a, b in zip(
        gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("target", [-1, P])
def test_targets_out_of_range_are_refused(target):
    """Only -100 is ignored."""
    hidden, weight, targets = inputs(9)
    targets[0, 0] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, targets, V)


def test_peak_memory_is_an_eighth_of_that_of_the_plain_loss():
    """16 x 1024 tokens, C = 768, P = 50304, forward and backward, counted on the meta device."""
    peaks = {}
    for loss_kind in ("chunked", "plain"):
        hidden = torch.empty(16, 1024, 768, device="meta", requires_grad=True)
        weight = torch.empty(50304, 768, device="meta", requires_grad=True)
        targets = torch.zeros(16, 1024, dtype=torch.int64, device="meta")
        with Meter("meta") as meter:
            if loss_kind == "chunked":
                loss = linear_cross_entropy(hidden, weight, targets, 50257)
            else:
                logits = F.linear(hidden, weight).flatten(0, 1)
                loss = F.cross_entropy(logits, targets.flatten())
            loss.backward()
        peaks[loss_kind] = meter.peak
    print(peaks)
    assert peaks["plain"] > 6e9  # logits and their gradient: checks the meter
    assert peaks["chunked"] * 8 < peaks["plain"]


def test_evaluation_computes_no_gradients():
    hidden, weight, targets = inputs(8)
    with torch.no_grad(), Meter("cpu") as meter:
        linear_cross_entropy(hidden, weight, targets, V, "mean", 11)
    assert meter.products == 3  # one per chunk


def test_default_chunks_have_at_most_twice_the_width_or_512_tokens():
    for n, width, count in [
        (1024, 768, 1),
        (16 * 1024, 768, 11),
        (64 * 1024, 1600, 21),
        (512, 128, 1),
        (513, 128, 2),
        (0, 128, 0),
    ]:
        chunks = Chunks.choose(n, width, 50257, None, torch.float32)
        sizes = [s.stop - s.start for s in chunks.slices()]
        assert len(sizes) == count
        assert sum(sizes) == n
        assert max(sizes, default=0) <= max(2 * width, 512)
