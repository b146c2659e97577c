"""Layers other than attention: embedding, linear, LayerNorm, GELU.

Every operation is written twice: `explicit_*` spells out the mathematics, and its fused twin is the
single PyTorch kernel. A layer takes `implementation="fused"` or `"explicit"`; the two differ by
rounding only, and tests compare their values and gradients.

Under mixed precision (`torch.autocast`), matrix products are computed in a narrow type (bfloat16)
and everything else in float32. The explicit functions cast where autocast casts for the fused ones,
and each layer documents its output dtype. Parameters are float32, and so is the residual stream.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

Implementation = Literal["fused", "explicit"]

LAYER_NORM_EPSILON = 1e-5


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product with `x`: autocast's if enabled, else that of `x`."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # meta tensors have no autocast
        return x.dtype
    return torch.get_autocast_dtype(device)


def upcast(x: Tensor) -> Tensor:
    """Return `x` in at least float32, for sums and exponentials."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- the mathematics -------------------------------------------------------------------------------


def explicit_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x Wᵀ + b.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (..., out) in autocast's dtype, or that of `x` without autocast.
    """
    dtype = autocast_dtype(x)
    y = x.to(dtype) @ weight.to(dtype).T
    # a float32 bias would promote the sum to float32; F.linear does not
    return y if bias is None else y + bias.to(dtype)


def explicit_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute (x - mean) / sqrt(variance + 1e-5) * weight + bias (Ba et al. 2016, eq. 4).

    Mean and variance are taken over the channels of each token.

    Args:
        x: (..., C).
        weight: (C,).
        bias: (C,).

    Returns:
        (..., C) in the dtype of `x`, computed in float32.
    """
    wide = upcast(x)
    centred = wide - wide.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)  # divided by C, not C - 1
    return (centred * torch.rsqrt(variance + LAYER_NORM_EPSILON) * weight + bias).to(x.dtype)


def explicit_gelu(x: Tensor) -> Tensor:
    """Compute x/2 (1 + tanh(sqrt(2/π) (x + 0.044715 x³))) (Hendrycks & Gimpel 2016, section 2).

    GPT-2 was trained with this approximation; the exact GELU (with erf) differs by up to 5e-4.

    Args:
        x: Any shape.

    Returns:
        The same shape and dtype, computed in float32.
    """
    wide = upcast(x)
    inner = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide.pow(3))
    return (0.5 * wide * (1 + torch.tanh(inner))).to(x.dtype)


def explicit_embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Look up rows of `weight` (rows, C): (...) int64 -> (..., C).

    Equals the product of one-hot vectors with `weight`, without the multiplications by 0.
    """
    return weight[tokens]


# -- the layers ------------------------------------------------------------------------------------


class Embedding(Module):
    """A learned vector per id. Output: float32, the dtype of the table, also under autocast."""

    def __init__(self, rows: int, width: int, implementation: Implementation = "fused") -> None:
        super().__init__()
        self.fused = implementation == "fused"
        self.weight = Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., width)."""
        if self.fused:
            return F.embedding(ids, self.weight)
        return explicit_embedding(ids, self.weight)


class Linear(Module):
    """An affine map. Output: autocast's dtype (bfloat16), or that of its input without autocast."""

    def __init__(
        self, n_in: int, n_out: int, implementation: Implementation = "fused", bias: bool = True
    ) -> None:
        super().__init__()
        self.fused = implementation == "fused"
        self.weight = Parameter(torch.empty(n_out, n_in))
        self.bias = Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        if self.fused:
            return F.linear(x, self.weight, self.bias)
        return explicit_linear(x, self.weight, self.bias)


class LayerNorm(Module):
    """Normalisation of each token to mean 0 and variance 1, then a learned scale and shift.

    Output: the dtype of its input, which is the float32 residual stream, also under autocast.
    """

    def __init__(self, width: int, implementation: Implementation = "fused") -> None:
        super().__init__()
        self.fused = implementation == "fused"
        self.weight = Parameter(torch.empty(width))
        self.bias = Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if self.fused:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, LAYER_NORM_EPSILON)
        return explicit_layer_norm(x, self.weight, self.bias)


class GELU(Module):
    """The smooth non-linearity of the MLP, tanh approximation. Output: the dtype of its input."""

    def __init__(self, implementation: Implementation = "fused") -> None:
        super().__init__()
        self.fused = implementation == "fused"

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if self.fused:
            return F.gelu(x, approximate="tanh")
        return explicit_gelu(x)
