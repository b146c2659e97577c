"""How fast a device can multiply matrices: what MFU, model FLOPs utilisation, is measured against.

MFU is PaLM's (Chowdhery et al. 2022, appendix B): the operations that the model needs for the
tokens of a second (``model.size.flops_per_token``), over those that the device could do in it.
"""

from __future__ import annotations

import time
from typing import Literal

import torch

# Dense peaks, TFLOP/s: with bfloat16 inputs, and of float32 products by TF32 (by plain float32
# where there is no TF32). Sums in float32, no sparsity. From NVIDIA's data sheets of each product
# and, for the GeForce cards, from the appendices of the white papers of Ada and Ampere (GA102).
# The first that a device's name contains counts: longer names stand first.
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

_SIDE = 512  # of the square matrices that a CPU is measured with: 3 ms at 90 GFLOP/s


def gpu_peak(name: str, dtype: Literal["float32", "bfloat16"]) -> float | None:
    """Peak of a GPU for matrix products, FLOP/s; None where the table does not know it.

    Args:
        name: As CUDA gives it, "NVIDIA A100-SXM4-80GB" say.
        dtype: Of the products' inputs.
    """
    if "MIG" in name or "Laptop" in name:  # a part of a GPU, or a smaller one of the same name
        return None
    for part, peaks in GPU_PEAKS.items():
        if part in name:
            return 1e12 * peaks[0 if dtype == "bfloat16" else 1]
    return None


def cpu_peak(dtype: Literal["float32", "bfloat16"], tries: int = 8) -> float:
    """Peak of a CPU with this process's threads, FLOP/s: the best of some products, timed.

    It takes some 30 ms, and is what the machine gives now: on a busy one less than it could.
    """
    matrix = torch.ones(_SIDE, _SIDE, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(tries):
        before = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - before)
    return 2 * _SIDE**3 / best


def peak(device: torch.device, dtype: Literal["float32", "bfloat16"]) -> float | None:
    """Peak of a device, FLOP/s; None for a GPU that is not in the table."""
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), dtype)
    return cpu_peak(dtype)
