"""The layers without attention: embedding, linear, LayerNorm, GELU.

Each operation stands here twice. `explicit_*` is its mathematics written out; its `fused` twin is
the one kernel that PyTorch has for it. Tests hold the two equal, in values and gradients. A layer
takes `implementation="fused"` or `"explicit"` when it is built; the results differ by rounding
only.

Mixed precision (`torch.autocast`) computes matrix products in a narrow type (bfloat16) and the rest
in float32. The explicit twins cast where autocast would cast for the fused ones; every layer says
what comes out. Parameters, and so the residual stream, stay float32.
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
    """The type in which a matrix product with `x` is computed: autocast's, or else that of `x`."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # meta tensors have no autocast
        return x.dtype
    return torch.get_autocast_dtype(device)


def widened(x: Tensor) -> Tensor:
    """`x` in float32 at least: sums and exponentials are not accumulated in anything narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- the mathematics -------------------------------------------------------------------------------


def explicit_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x Wᵀ + b.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (..., out), in autocast's type, else in that of `x`.
    """
    dtype = autocast_dtype(x)
    y = x.to(dtype) @ weight.to(dtype).T
    # without the cast, the float32 bias would make the sum float32 again, which F.linear's is not
    return y if bias is None else y + bias.to(dtype)


def explicit_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes (x - mean) / sqrt(variance + 1e-5) * weight + bias (Ba et al. 2016, eq. 4).

    Mean and variance are those of each token over its channels: no token knows of another.

    Args:
        x: (..., C).
        weight: (C,).
        bias: (C,).

    Returns:
        (..., C) in the type of `x`, computed in float32.
    """
    wide = widened(x)
    centred = wide - wide.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)  # over n, not n - 1
    return (centred * torch.rsqrt(variance + LAYER_NORM_EPSILON) * weight + bias).to(x.dtype)


def explicit_gelu(x: Tensor) -> Tensor:
    """Computes x/2 (1 + tanh(sqrt(2/π) (x + 0.044715 x³))) (Hendrycks & Gimpel 2016, section 2).

    GPT-2 was trained with this approximation; the exact one (with erf) differs from it
    by up to 5e-4.

    Args:
        x: Any shape.

    Returns:
        The same shape and type, computed in float32.
    """
    wide = widened(x)
    inner = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide.pow(3))
    return (0.5 * wide * (1 + torch.tanh(inner))).to(x.dtype)


def explicit_embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """The row of `weight` (rows, C) for each id: (...) int64 -> (..., C).

    It is the product of one-hot vectors with `weight`, without the multiplications by 0.
    """
    return weight[tokens]


# -- the layers ------------------------------------------------------------------------------------


class Embedding(Module):
    """A table with a learned row for each id. Output: float32 (its own type), also in autocast."""

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
    """An affine map. Output: autocast's type (bfloat16), without autocast the type of its input."""

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
    """Brings each token's channels to mean 0 and variance 1, then to a learned scale and shift.

    Output: the type of its input. That is the residual stream here, so float32, also in autocast.
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
    """The smooth rectifier between the two linear maps of an MLP. Output: the type of its input."""

    def __init__(self, implementation: Implementation = "fused") -> None:
        super().__init__()
        self.fused = implementation == "fused"

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if self.fused:
            return F.gelu(x, approximate="tanh")
        return explicit_gelu(x)
