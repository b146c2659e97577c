"""Cross-entropy loss: the plain formula, and a version fused with the output head.

For logits z = W x and target y, the loss of a token is  -log softmax(z)_y = log Σ exp(z_i) - z_y.
Its gradient is  dz = softmax(z) - onehot(y),  and so  dx = Wᵀ dz  and  dW = dz xᵀ.

For 16 x 1024 tokens the logits of GPT-2 take 3.3 GB in float32, and a plain loss holds several
tensors of that size. The fused version processes the tokens in chunks:

    forward, for each chunk:  logits -> losses and dz -> dx, and add dW
    backward:                 multiply dx and dW by the upstream gradient

The head is computed once, and only one chunk of logits exists at a time. This works because "mean"
and "sum" weight all tokens equally; "none" recomputes the logits of each chunk in its backward.

The head multiplies all P padded rows of the table (aligned products are faster). Logits from V on
are then set to minus infinity, which gives them no probability and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from model.errors import ConfigError
from model.layers import autocast_dtype, upcast

Reduction = Literal["mean", "sum", "none"]

IGNORE_INDEX = -100
"""Target without a loss."""

MIN_CHUNK = 512
"""Fewest tokens per chunk, if `Chunks.choose` decides."""


def cross_entropy(logits: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute the loss from existing logits, differentiable by autograd.

    Args:
        logits: (..., V), any float dtype.
        targets: (...) int64, -100 where ignored.
        reduction: As in `GPT.forward`.

    Returns:
        Float32, scalar or (...) for "none".
    """
    _check_reduction(reduction)
    counted = targets != IGNORE_INDEX
    z = upcast(logits)
    top = z.amax(-1, keepdim=True).detach()  # exp(z) may overflow, exp(z - max) cannot
    z_target = z.gather(-1, _target_index(targets)[..., None])
    # not (log + top) - z_target, which rounds a small loss to the spacing of large logits
    losses = ((z - top).exp().sum(-1).log() + (top - z_target)[..., 0]).where(counted, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() * _sum_factor(counted, reduction)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Compute `cross_entropy(hidden @ weight.T, targets)` in chunks (module docstring).

    Matrix products use autocast's dtype; everything else, and all sums, use float32.

    Args:
        hidden: (..., C).
        weight: (P, C); rows from `vocab_size` on are padding.
        targets: (...) int64, -100 where ignored.
        vocab_size: V, up to P.
        reduction: As in `GPT.forward`.
        chunk_size: Tokens per chunk; None chooses.

    Returns:
        Float32, scalar or (...) for "none". First derivatives only.
    """
    _check_reduction(reduction)
    x = hidden.reshape(-1, hidden.shape[-1])  # (N, C)
    y = targets.reshape(-1)  # (N,)
    chunks = Chunks.choose(len(x), x.shape[1], vocab_size, chunk_size, autocast_dtype(hidden))
    training = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)

    arguments = x, weight, y, chunks
    if reduction == "none":
        losses = _token_losses(*arguments) if training else _losses(*arguments)
        return losses.view(targets.shape)
    total = _summed_loss(*arguments) if training else _losses(*arguments).sum()
    return total * _sum_factor(y != IGNORE_INDEX, reduction)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")


def _target_index(targets: Tensor) -> Tensor:
    """Return the index of each target's logit; 0 if ignored, where the loss is masked later."""
    return targets.where(targets != IGNORE_INDEX, 0)


def _sum_factor(counted: Tensor, reduction: Reduction) -> Tensor | float:
    """Return the factor that turns the sum of the losses into the reduced loss."""
    return counted.sum().clamp(min=1).float().reciprocal() if reduction == "mean" else 1.0


class Chunks(NamedTuple):
    """The split of N tokens into chunks, and how to compute the logits of a chunk."""

    n: int  # tokens (N)
    size: int  # tokens per chunk (R); the last chunk may be smaller
    vocab_size: int  # V
    dtype: torch.dtype  # of the products

    @classmethod
    def choose(
        cls, n: int, width: int, vocab_size: int, size: int | None, dtype: torch.dtype
    ) -> Chunks:
        """Split into chunks of `size` tokens; if None, into about equal ones of up to 2 C tokens.

        A chunk reads and writes its P R logits, and the gradient of the table, P C numbers.
        At R = 2 C that is the smaller part, and the memory of the loss is a few times that of the
        table, whatever B and T are. Larger chunks were no faster when compiled (docs/model.md).
        `MIN_CHUNK` avoids too many small operations where C is small.
        """
        if size is None:
            count = -(-n // max(2 * width, MIN_CHUNK))
            size = -(-n // max(1, count))
        return cls(n, max(1, min(size, n)), vocab_size, dtype)

    def slices(self) -> list[slice]:
        """Return the tokens of each chunk."""
        return [slice(a, min(a + self.size, self.n)) for a in range(0, self.n, self.size)]


def _chunk_losses(x: Tensor, w: Tensor, y: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (R,) of a chunk, exp(z - max) (R, P), and the row sums of that (R, 1)."""
    z = upcast(x.to(chunks.dtype) @ w.T)  # (R, P)
    if chunks.vocab_size < z.shape[1]:
        z[:, chunks.vocab_size :] = -torch.inf
    top = z.amax(1, keepdim=True)
    z_target = z.gather(1, _target_index(y)[:, None])
    # in place, because the logits are no longer needed: no second (R, P) tensor
    exps = z.sub_(top).exp_()
    total = exps.sum(1, keepdim=True)
    losses = (total.log() + (top - z_target))[:, 0]
    return losses.where(y != IGNORE_INDEX, 0.0), exps, total


def _chunk_gradients(
    x: Tensor, w: Tensor, y: Tensor, scale: Tensor, chunks: Chunks
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (R,), and d/dx (R, C) and d/dw (P, C) of Σ scale * loss; scale is (R,)."""
    losses, exps, total = _chunk_losses(x, w, y, chunks)
    scale = scale.where(y != IGNORE_INDEX, 0.0)
    dz = exps.mul_(scale[:, None] / total).to(chunks.dtype)  # softmax(z) * scale
    # at the target, softmax - 1 = exp(-loss) - 1; expm1 stays accurate for small losses
    rows = torch.arange(len(y), device=y.device)
    dz[rows, _target_index(y)] = (torch.expm1(-losses) * scale).to(chunks.dtype)
    return losses, dz @ w, dz.T @ x.to(chunks.dtype)


def _losses(x: Tensor, weight: Tensor, y: Tensor, chunks: Chunks) -> Tensor:
    """Return the losses (N,), without gradients."""
    w = weight.to(chunks.dtype)
    return torch.cat([_chunk_losses(x[s], w, y[s], chunks)[0] for s in chunks.slices()])


def _gradients(
    x: Tensor, weight: Tensor, y: Tensor, scale: Tensor, chunks: Chunks
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (N,), d/dx (N, C), and d/dweight (P, C), summed over chunks in float32."""
    w = weight.to(chunks.dtype)
    losses, dx = [], []
    dw: Tensor | None = None
    for s in chunks.slices():
        chunk_losses, chunk_dx, chunk_dw = _chunk_gradients(x[s], w, y[s], scale[s], chunks)
        losses.append(chunk_losses)
        dx.append(chunk_dx.to(x.dtype))
        dw = upcast(chunk_dw) if dw is None else dw.add_(chunk_dw)
    assert dw is not None
    return torch.cat(losses), torch.cat(dx), dw.to(weight.dtype)


class _SummedLoss(torch.autograd.Function):
    """The sum of the losses, with gradients computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor, chunks: Chunks) -> Tensor:
        one = torch.ones(chunks.n, device=x.device)
        losses, dx, dw = _gradients(x, weight, y, one, chunks)
        ctx.save_for_backward(dx, dw)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return upstream * dx, upstream * dw, None, None


class _TokenLosses(torch.autograd.Function):
    """The loss of each token; its weight in the gradient is known only in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor, chunks: Chunks) -> Tensor:
        ctx.save_for_backward(x, weight, y)
        ctx.chunks = chunks
        return _losses(x, weight, y, chunks)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        _, dx, dw = _gradients(x, weight, y, upstream, ctx.chunks)
        return dx, dw, None, None


# typed, because `apply` is not
_summed_loss: Callable[[Tensor, Tensor, Tensor, Chunks], Tensor] = _SummedLoss.apply
_token_losses: Callable[[Tensor, Tensor, Tensor, Chunks], Tensor] = _TokenLosses.apply
