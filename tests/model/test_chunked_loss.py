"""The loss in chunks against the plain one, its memory, its padding."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, GPTConfig
from model.errors import ConfigError
from model.loss import Cut, cross_entropy, linear_cross_entropy
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


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [None, 1, 7, 33, 1000])
def test_equals_the_plain_loss(reduction, chunk):
    hidden, weight, targets = inputs(0)
    loss = linear_cross_entropy(hidden, weight, targets, V, reduction, chunk)
    expected = plain(hidden, weight, targets, reduction).view(loss.shape)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))
    got = gradients(loss, hidden, weight, upstream)
    for a, b in zip(got, gradients(expected, hidden, weight, upstream), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
    with torch.no_grad():
        again = linear_cross_entropy(hidden, weight, targets, V, reduction, chunk)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 20),
    chunk=st.integers(1, 25),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_any_shape_and_scale(seed, rows, chunk, scale):
    hidden, weight, targets = inputs(seed, (rows,))
    hidden = (hidden * scale).detach().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, V, "sum", chunk)
    expected = plain(hidden, weight, targets, "sum")
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-5)
    for a, b in zip(
        gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_explicit_cross_entropy_equals_torch(reduction):
    logits, targets = torch.randn(4, 9, V) * 5, torch.randint(V, (4, 9))
    targets[0, 3:] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    got = cross_entropy(logits, targets, reduction)
    torch.testing.assert_close(got.flatten(), expected.flatten(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_exact_gradients_in_float64(reduction):
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, -100, 5, 3, 3])

    def loss(x, w):
        return linear_cross_entropy(x, w, targets, 6, reduction, 2)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_bfloat16_products_with_float32_sums():
    hidden, weight, targets = inputs(3, (4, 64))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, V, "mean", 50)
        expected = plain(hidden, weight, targets, "mean")
        none = linear_cross_entropy(hidden, weight, targets, V, "none", 50)
    assert loss.dtype == none.dtype == torch.float32
    assert abs(loss - expected) < 1e-5  # both round the same logits to bf16
    assert abs(none.sum() / (targets != -100).sum() - loss) < 1e-5
    for a, b in zip(
        gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.01 * b.norm()


def test_ignored_targets_get_neither_loss_nor_gradient():
    hidden, weight, targets = inputs(4)
    losses = linear_cross_entropy(hidden, weight, targets, V, "none", 4)
    dx, _ = gradients(losses.sum(), hidden, weight)
    assert (losses[targets == -100] == 0).all()
    assert (dx[targets == -100] == 0).all()
    targets[:] = -100
    nothing = linear_cross_entropy(hidden, weight, targets, V)
    assert nothing == 0
    assert all((g == 0).all() for g in gradients(nothing, hidden, weight))


@pytest.mark.parametrize("target", [-1, P])
def test_target_that_is_no_token_is_refused(target):
    """-100 alone is ignored: another number out of range must not be taken for a token."""
    hidden, weight, targets = inputs(9)
    targets[0, 0] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, targets, V)


def test_padded_rows_are_in_no_softmax_and_get_no_gradient():
    hidden, weight, targets = inputs(5)
    loss = linear_cross_entropy(hidden, weight, targets, V)
    _, dw = gradients(loss, hidden, weight)
    assert (dw[V:] == 0).all()
    with torch.no_grad():
        weight[V:] = 100.0
    assert linear_cross_entropy(hidden, weight, targets, V) == loss


def test_gradients_of_both_uses_of_the_tied_table_add_up():
    config = GPTConfig(n_layer=1, n_head=2, n_embd=C, block_size=16, vocab_size=V, loss_chunk=5)
    gpt = GPT(config)
    tokens, targets = torch.randint(V, (2, 2, 16)).unbind()
    gpt.loss(tokens, targets).backward()
    got = gpt.get_parameter("wte.weight").grad
    assert got is not None
    loss = F.cross_entropy(gpt(tokens).flatten(0, 1), targets.flatten())
    (expected,) = torch.autograd.grad(loss, [gpt.wte.weight])
    assert (got - expected).norm() < 1e-6 * got.norm()
    assert (got[V:] == 0).all()


def test_same_bits_again():
    hidden, weight, targets = inputs(6, (8, 64))
    runs = []
    for _ in range(3):
        loss = linear_cross_entropy(hidden, weight, targets, V, "mean", 100)
        runs.append((loss, *gradients(loss, hidden, weight)))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))


def test_unknown_reduction_is_refused():
    hidden, weight, targets = inputs(7)
    with pytest.raises(ConfigError, match="reduction"):
        linear_cross_entropy(hidden, weight, targets, V, "average")  # type: ignore[arg-type]


def test_peak_memory_is_an_eighth_of_the_plain_way():
    """16 x 1024 tokens, C = 768, P = 50304, forward and backward, counted on the meta device."""
    peaks = {}
    for way in ("chunked", "plain"):
        hidden = torch.empty(16, 1024, 768, device="meta", requires_grad=True)
        weight = torch.empty(50304, 768, device="meta", requires_grad=True)
        targets = torch.zeros(16, 1024, dtype=torch.int64, device="meta")
        with Meter("meta") as meter:
            if way == "chunked":
                loss = linear_cross_entropy(hidden, weight, targets, 50257)
            else:
                logits = F.linear(hidden, weight).flatten(0, 1)
                loss = F.cross_entropy(logits, targets.flatten())
            loss.backward()
        peaks[way] = meter.peak
    print(peaks)
    assert peaks["plain"] > 6e9  # the logits and their gradient: the meter works
    assert peaks["chunked"] * 8 < peaks["plain"]


def test_evaluation_computes_no_gradients():
    hidden, weight, targets = inputs(8)
    with torch.no_grad(), Meter("cpu") as meter:
        linear_cross_entropy(hidden, weight, targets, V, "mean", 11)
    assert meter.products == 3  # one a chunk
    with Meter("cpu") as meter:
        linear_cross_entropy(hidden, weight, targets, V, "mean", 11).backward()
    assert meter.products == 9  # logits and two gradients a chunk, the head not computed twice


def test_small_logits_are_one_chunk_and_large_ones_bounded():
    for n, width, pieces in [
        (1024, 768, 1),
        (16 * 1024, 768, 11),
        (64 * 1024, 1600, 21),
        (512, 128, 1),
        (513, 128, 2),
        (0, 128, 0),
    ]:
        cut = Cut.of(n, width, 50257, None, torch.float32)
        sizes = [s.stop - s.start for s in cut.pieces()]
        assert len(sizes) == pieces
        assert sum(sizes) == n
        assert max(sizes, default=0) <= max(2 * width, 512)
