"""Numerics and devices: autocast, gradient norm, deterministic algorithms, memory, and versions."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import safetensors
import torch
from torch import Tensor

Dtype = Literal["float32", "bfloat16"]

PIECE = 4096  # elements whose squares are added in float32, at most


def summed_loss(forward: Any, inputs: Tensor, targets: Tensor, dtype: Dtype) -> Tensor:
    """Compute the loss of a batch, summed over its targets.

    Args:
        forward: A GPT, also compiled or wrapped in DDP.
        inputs: (B, T) int64.
        targets: (B, T) int64; -100 is ignored.
        dtype: Type of the matrix products; "bfloat16" by autocast, "float32" without.

    Returns:
        Scalar float32, nats.
    """
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss: Tensor = forward(inputs, targets, reduction="sum")
    return loss


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Compute the 2-norm of all gradients together.

    On a CPU PyTorch adds the squares of a tensor in a few float32 accumulators, which is 1e-3 off
    for the 38M elements of GPT-2's token table. Here float32 adds only pieces of a tensor, and
    float64 the pieces: within 1e-6, as fast. On CUDA PyTorch adds in a tree, which is as exact.

    Args:
        gradients: Of any shape, on one device; none have the norm 0.

    Returns:
        Scalar float32 on that device.
    """
    if not gradients:
        return torch.zeros(())
    if gradients[0].is_cuda:
        return torch.nn.utils.get_total_norm(gradients)
    norms = []
    for gradient in gradients:
        flat = gradient.reshape(-1)
        whole = len(flat) - len(flat) % PIECE
        for pieces in (flat[:whole].view(-1, PIECE), flat[whole:].view(1, -1)):
            norms.append(torch.linalg.vector_norm(pieces, dim=1))
    norm: Tensor = torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64).float()
    return norm


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale the gradients so that their norm is at most ``limit``; None: leave them.

    Returns:
        The norm before, as in `gradient_norm`.
    """
    parameters = list(parameters)
    norm = gradient_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def configure(device: torch.device, *, deterministic: bool) -> None:
    """On CUDA, use TF32 for float32 products, and deterministic algorithms if asked."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a GPU or the CPU could not allocate memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }
