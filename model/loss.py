"""Cross-entropy, written out, and joined with the head so that the logits are never all held.

For logits z = W x and target y the loss of a token is  -log softmax(z)_y = log Σ exp(z_i) - z_y,
and its gradient  dz = softmax(z) - onehot(y);  from it follow  dx = Wᵀ dz  and  dW = dz xᵀ.

At 16 x 1024 tokens the logits of GPT-2 are 3.3 GB in float32, several times over. So the head and
the loss go through the tokens in chunks, and since the gradient of a chunk's logits is known as
soon as they are, the gradients of hidden states and weights are formed right there, in the forward
pass; the backward pass only multiplies them by what comes from above. The head is computed once,
and one chunk of logits lives at a time. That needs to know how the losses are reduced: "mean" and
"sum" go so; "none" computes the chunk's logits a second time in its backward.

All P padded rows of the table are multiplied (aligned products are faster), then the logits past V
are set to minus infinity: they have no probability and no gradient.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from model.errors import ConfigError
from model.layers import autocast_dtype, widened

Reduction = Literal["mean", "sum", "none"]

IGNORED = -100
"""A target that does not count."""

SMALLEST_CHUNK = 512
"""Tokens of a chunk, at least, when its size is chosen here (see `Cut.of`)."""


def cross_entropy(logits: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
    """The plain way: differentiable, from logits that exist.

    Args:
        logits: (..., V), any float type.
        targets: (...) int64, -100 where ignored.
        reduction: As in `GPT.forward`.

    Returns:
        Float32, scalar or (...) for "none".
    """
    _check(reduction)
    counts = targets != IGNORED
    z = widened(logits)
    top = z.amax(-1, keepdim=True).detach()  # exp(z) overflows, exp(z - max) cannot
    log_sum = (z - top).exp().sum(-1).log() + top[..., 0]
    z_target = z.gather(-1, _column(targets)[..., None])[..., 0]
    losses = (log_sum - z_target).where(counts, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() * _share(counts, reduction)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T, targets)` in chunks, as the module says.

    Products are computed in autocast's type, everything else and all sums in float32.

    Args:
        hidden: (..., C).
        weight: (P, C); rows from `vocab_size` on are padding.
        targets: (...) int64, -100 where ignored.
        vocab_size: V, up to P.
        reduction: As in `GPT.forward`.
        chunk: Tokens at a time; None chooses.

    Returns:
        Float32, scalar or (...) for "none". First derivatives only.
    """
    _check(reduction)
    x = hidden.reshape(-1, hidden.shape[-1])  # (N, C)
    y = targets.reshape(-1)  # (N,)
    cut = Cut.of(len(x), x.shape[1], vocab_size, chunk, autocast_dtype(hidden))
    training = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)

    if reduction == "none":
        losses = _TokenLosses.apply(x, weight, y, cut) if training else _losses(x, weight, y, cut)
        return losses.view(targets.shape)
    total = _SummedLoss.apply(x, weight, y, cut) if training else _losses(x, weight, y, cut).sum()
    return total * _share(y != IGNORED, reduction)


def _check(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")


def _column(targets: Tensor) -> Tensor:
    """Where a token's target stands among its logits; any place if ignored: it counts as 0."""
    return targets.where(targets != IGNORED, 0)


def _share(counts: Tensor, reduction: Reduction) -> Tensor | float:
    """By how much the sum of the losses is multiplied."""
    return counts.sum().clamp(min=1).float().reciprocal() if reduction == "mean" else 1.0


class Cut(NamedTuple):
    """How N tokens are cut into chunks, and how the logits of a chunk are computed."""

    n: int  # tokens (N)
    chunk: int  # tokens of a chunk (R), the last may have fewer
    vocab_size: int  # V
    dtype: torch.dtype  # of the products

    @classmethod
    def of(cls, n: int, width: int, vocab_size: int, chunk: int | None, dtype: torch.dtype) -> Cut:
        """Chooses the chunk where it is None: about equal ones, of up to 2 C tokens.

        A chunk costs more than its P R logits: it also reads and writes the gradient of the table
        once, P C numbers. At R = 2 C that is the smaller part, and the memory of the loss is a few
        times that of the table, whatever B and T are. Compiled, larger chunks were no faster
        (docs/model.md). Where C is small, chunks of 2 C tokens would be too many small operations.
        """
        if chunk is None:
            pieces = -(-n // max(2 * width, SMALLEST_CHUNK))
            chunk = -(-n // max(1, pieces))
        return cls(n, max(1, chunk), vocab_size, dtype)

    def pieces(self) -> list[slice]:
        """Where each chunk lies."""
        return [slice(a, min(a + self.chunk, self.n)) for a in range(0, self.n, self.chunk)]


def _chunk_losses(x: Tensor, w: Tensor, y: Tensor, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (R,) of R tokens; exp(z - max) (R, P) and its row sums (R, 1) for the gradient."""
    z = widened(x.to(cut.dtype) @ w.T)  # (R, P)
    if cut.vocab_size < z.shape[1]:
        z[:, cut.vocab_size :] = -torch.inf
    top = z.amax(1, keepdim=True)
    z_target = z.gather(1, _column(y)[:, None])
    # in place: the logits are not needed any more, and there is no second (R, P) tensor
    exps = z.sub_(top).exp_()
    total = exps.sum(1, keepdim=True)
    losses = (total.log() + top - z_target)[:, 0]
    return losses.where(y != IGNORED, 0.0), exps, total


def _chunk_gradients(
    x: Tensor, w: Tensor, y: Tensor, scale: Tensor, cut: Cut
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (R,), d/dx (R, C) and d/dw (P, C) of Σ scale * loss; scale is (R,)."""
    losses, exps, total = _chunk_losses(x, w, y, cut)
    scale = scale.where(y != IGNORED, 0.0)
    dz = exps.mul_(scale[:, None] / total).to(cut.dtype)  # softmax(z) * scale
    # at the target softmax - 1 = exp(-loss) - 1: expm1 keeps its digits when the loss is small
    rows = torch.arange(len(y), device=y.device)
    dz[rows, _column(y)] = (torch.expm1(-losses) * scale).to(cut.dtype)
    return losses, dz @ w, dz.T @ x.to(cut.dtype)


def _losses(x: Tensor, weight: Tensor, y: Tensor, cut: Cut) -> Tensor:
    """Losses (N,), without gradients."""
    w = weight.to(cut.dtype)
    return torch.cat([_chunk_losses(x[s], w, y[s], cut)[0] for s in cut.pieces()])


def _gradients(
    x: Tensor, weight: Tensor, y: Tensor, scale: Tensor, cut: Cut
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,), d/dx (N, C), d/dweight (P, C), the last summed over the chunks in float32."""
    w = weight.to(cut.dtype)
    losses, dx = [], []
    dw: Tensor | None = None
    for s in cut.pieces():
        chunk_losses, chunk_dx, chunk_dw = _chunk_gradients(x[s], w, y[s], scale[s], cut)
        losses.append(chunk_losses)
        dx.append(chunk_dx.to(x.dtype))
        dw = widened(chunk_dw) if dw is None else dw.add_(chunk_dw)
    assert dw is not None
    return torch.cat(losses), torch.cat(dx), dw.to(weight.dtype)


class _SummedLoss(torch.autograd.Function):
    """Σ losses, with its gradients formed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor, cut: Cut) -> Tensor:
        one = torch.ones(cut.n, device=x.device)
        losses, dx, dw = _gradients(x, weight, y, one, cut)
        ctx.save_for_backward(dx, dw)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return upstream * dx, upstream * dw, None, None


class _TokenLosses(torch.autograd.Function):
    """The losses one by one: what each is worth is known in the backward pass only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor, cut: Cut) -> Tensor:
        ctx.save_for_backward(x, weight, y)
        ctx.cut = cut
        return _losses(x, weight, y, cut)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        _, dx, dw = _gradients(x, weight, y, upstream, ctx.cut)
        return dx, dw, None, None
