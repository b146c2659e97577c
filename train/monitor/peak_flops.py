"""Peak FLOP/s of devices for matrix products, the denominator of MFU (model FLOPs utilisation).

MFU as in PaLM (Chowdhery et al. 2022, appendix B): the FLOPs of the model for the tokens trained
per second (``model.size.flops_per_token``), divided by the peak of the device.
"""

from __future__ import annotations

import time
from typing import Literal

import torch

# Dense peaks in TFLOP/s: for bfloat16 inputs, and for float32 products in TF32 (in plain float32
# on GPUs without TF32). Sums in float32, no sparsity. From NVIDIA's data sheets and, for GeForce
# cards, from the appendices of the white papers of Ada and Ampere (GA102).
# The first name that a device's name contains is taken, so longer names come first.
GPU_PEAKS: dict[str, tuple[float, float]] = {
    "GB200": (2500.0, 1250.0),
    "B200": (2250.0, 1125.0),
    "GH200": (989.4, 494.7),
    "H200 NVL": (835.5, 417.5),
    "H200": (989.4, 494.7),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.5, 417.5),
    "H100": (989.4, 494.7),
    "A100": (312.0, 156.0),
    "A800": (312.0, 156.0),
    "RTX A6000": (154.8, 77.4),
    "A40": (149.7, 74.8),
    "A30": (165.0, 82.0),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 62.5),
    "L40S": (362.0, 183.0),
    "L40": (181.0, 90.5),
    "L4": (121.0, 60.0),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}

_SIDE = 512  # rows of the square matrices for measuring a CPU: 3 ms at 90 GFLOP/s


def gpu_peak(name: str, dtype: Literal["float32", "bfloat16"]) -> float | None:
    """Look up the peak of a GPU for matrix products, FLOP/s; None if the table does not have it.

    Args:
        name: Name from CUDA, such as "NVIDIA A100-SXM4-80GB".
        dtype: Type of the inputs.
    """
    if "MIG" in name or "Laptop" in name:  # part of a GPU, or a smaller one of the same name
        return None
    for part, peaks in GPU_PEAKS.items():
        if part in name:
            return 1e12 * peaks[0 if dtype == "bfloat16" else 1]
    return None


def cpu_peak(dtype: Literal["float32", "bfloat16"], tries: int = 8) -> float:
    """Measure the peak of a CPU with this process's threads, FLOP/s: the fastest of some products.

    Takes about 30 ms. On a busy machine the result is too low.
    """
    matrix = torch.ones(_SIDE, _SIDE, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(tries):
        before = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - before)
    return 2 * _SIDE**3 / best


def peak(device: torch.device, dtype: Literal["float32", "bfloat16"]) -> float | None:
    """Return the peak of a device, FLOP/s; None for a GPU that is not in the table."""
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), dtype)
    return cpu_peak(dtype)
