"""How numbers are computed: dtypes, algorithms that repeat, and the device's name and memory."""

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
    """The loss of a batch, summed over its targets.

    Args:
        forward: A GPT, or what compile or DDP made of it.
        inputs: (B, T) int64.
        targets: (B, T) int64; those of -100 do not count.
        dtype: Of the matrix products; "bfloat16" by autocast, "float32" without.

    Returns:
        Scalar float32, nats.
    """
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss: Tensor = forward(inputs, targets, reduction="sum")
    return loss


def configure(device: torch.device, *, deterministic: bool) -> None:
    """TF32 for products that stay float32 on CUDA; algorithms that repeat, where asked for."""
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
    """Whether a device, or the CPU, had no memory left to give."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def peak_memory(device: torch.device) -> int:
    """Most memory that this process has held, bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def versions() -> dict[str, str]:
    """Of what computes."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }
