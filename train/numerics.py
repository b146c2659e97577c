"""Numerics and devices: autocast, deterministic algorithms, memory, and versions."""

from __future__ import annotations

import resource
import sys
from typing import Any, Literal

import numpy as np
import safetensors
import torch
from torch import Tensor

Dtype = Literal["float32", "bfloat16"]


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
