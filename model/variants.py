"""Parts that GPT-2 does not have, each off by default: rotary positions, QK-norm, ReLU squared.

    GPTConfig.positions = "rotary"          queries and keys are rotated; no table of positions
    GPTConfig.qk_norm = True                queries and keys are normalised
    GPTConfig.activation = "relu_squared"   instead of GELU in the MLP

None of them has parameters. As in `layers.py`, each operation is spelled out, and has a fused twin
where PyTorch has a kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from model.layers import Implementation, upcast

ROTARY_BASE = 10_000.0
RMS_NORM_EPSILON = 1e-5

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of each position, both (..., T, 1, D / 2) float32."""


# -- rotary positions ------------------------------------------------------------------------------


def rotation_of(positions: Tensor, D: int) -> Rotation:
    """Compute the rotation of each position (Su et al. 2021, section 3.2.2).

    Pair i of the D / 2 pairs of channels turns by 10000^(-2 i / D) radians per token: the first by
    one radian, the last by a little over 1e-4.

    Args:
        positions: (..., T) int64.
        D: Channels per head, even.
    """
    pairs = torch.arange(D // 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None, None] * ROTARY_BASE ** (-2 * pairs / D)  # (..., T, 1, D / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair of channels by the angle of its position.

    The dot product of a query at position m and a key at position n then depends on m - n, not on m
    and n. Channel i is paired with channel i + D / 2, as in GPT-NeoX; the paper pairs neighbours,
    which only names the channels differently.

    Args:
        x: Queries or keys (B, T, H, D).
        rotation: Of the T positions, the same for all rows or one for each.

    Returns:
        The same shape and dtype, computed in float32.
    """
    cos, sin = rotation
    a, b = upcast(x).chunk(2, dim=-1)  # (B, T, H, D / 2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


# -- QK-norm ---------------------------------------------------------------------------------------


def explicit_rms_norm(x: Tensor) -> Tensor:
    """Compute x / sqrt(mean(x²) + 1e-5) over the last dimension (Zhang & Sennrich 2019, eq. 4).

    Returns:
        The same shape and dtype, computed in float32.
    """
    wide = upcast(x)
    mean_square = wide.square().mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + RMS_NORM_EPSILON)).to(x.dtype)


class RMSNorm(Module):
    """Normalisation of the last dimension to a root mean square of 1. Output: dtype of its input.

    Of queries and keys, per head and token (Henry et al. 2020, with other norms: they divide by the
    length and learn one scale for all scores). Without a gain, each has the length sqrt(D), so with
    attention's usual scale the scores lie between -sqrt(D) and sqrt(D) throughout training.
    """

    def __init__(self, implementation: Implementation = "fused") -> None:
        super().__init__()
        self.fused = implementation == "fused"

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.fused:
            return F.rms_norm(x, x.shape[-1:], eps=RMS_NORM_EPSILON).to(x.dtype)
        return explicit_rms_norm(x)


# -- activation ------------------------------------------------------------------------------------


def explicit_relu_squared(x: Tensor) -> Tensor:
    """Compute max(x, 0)² (So et al. 2021); any shape -> the same shape and dtype."""
    return torch.where(x > 0, upcast(x).square(), 0.0).to(x.dtype)


class ReLUSquared(Module):
    """A non-linearity that is zero for negative inputs. Output: the dtype of its input."""

    def __init__(self, implementation: Implementation = "fused") -> None:
        super().__init__()
        self.fused = implementation == "fused"

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if self.fused:
            y = F.relu(x)
            return y * y  # not `square`: autocast computes powers in float32 on CUDA
        return explicit_relu_squared(x)
