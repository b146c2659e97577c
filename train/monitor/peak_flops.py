"""Peak FLOP/s of devices for matrix products, the denominator of MFU (model FLOPs utilisation).

MFU as in PaLM (Chowdhery et al. 2022, appendix B): the FLOPs of the model for the tokens trained
per second (``model.size.flops_per_token``), divided by the peak of the device.
"""

from __future__ import annotations

import time

import torch

from train.numerics import Dtype

# Dense peaks in TFLOP/s: for inputs in bfloat16 or float16, and for float32 products in TF32 (in
# plain float32 on GPUs without TF32: Volta and Turing). Sums in float32, no sparsity. From NVIDIA's
# data sheets and, for GeForce cards, the white papers of Turing (appendix A, reference clocks),
# Ampere GA102, Ada and RTX Blackwell. RTX 30 to 50 that are not in a table there are computed as
# those are: float32 is 2 x cores x boost clock, TF32 the same, bfloat16 twice that.
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
    "Tesla V100S": (130.0, 16.4),
    "Tesla V100-PCIE": (112.0, 14.0),
    "Tesla V100": (125.0, 15.7),
    "Tesla T4": (65.0, 8.1),
    "RTX 6000 Ada": (364.2, 182.1),
    "RTX 5090": (209.5, 104.8),
    "RTX 5080": (112.6, 56.3),
    "RTX 5070 Ti": (87.9, 43.9),
    "RTX 5070": (61.7, 30.9),
    "RTX 4090": (165.2, 82.6),
    "RTX 4080 SUPER": (104.4, 52.2),
    "RTX 4080": (97.5, 48.7),
    "RTX 4070 Ti SUPER": (88.2, 44.1),
    "RTX 4070 Ti": (80.2, 40.1),
    "RTX 4070 SUPER": (71.0, 35.5),
    "RTX 4070": (58.3, 29.1),
    "RTX 4060 Ti": (44.1, 22.1),
    "RTX 4060": (30.2, 15.1),
    "RTX 3090 Ti": (80.0, 40.0),
    "RTX 3090": (71.0, 35.6),
    "RTX 3080 Ti": (68.2, 34.1),
    "RTX 3080": (59.5, 29.8),
    "RTX 3070 Ti": (43.5, 21.7),
    "RTX 3070": (40.6, 20.3),
    "RTX 3060 Ti": (32.4, 16.2),
    "RTX 3060": (25.5, 12.7),
    "RTX 2080 Ti": (53.8, 13.4),
    "RTX 2080 SUPER": (44.6, 11.2),
    "RTX 2080": (40.3, 10.1),
    "RTX 2070 SUPER": (36.3, 9.1),
    "RTX 2070": (29.9, 7.5),
    "RTX 2060": (25.8, 6.5),
}

_SIDE = 512  # rows of the square matrices for measuring a CPU: 3 ms at 90 GFLOP/s


def gpu_peak(name: str, dtype: Dtype) -> float | None:
    """Look up the peak of a GPU for matrix products, FLOP/s; None if the table does not have it.

    Args:
        name: Name from CUDA, such as "NVIDIA A100-SXM4-80GB".
        dtype: Type of the inputs.
    """
    # part of a GPU, or a smaller one of the same name
    if any(word in name for word in ("MIG", "Laptop", "Max-Q")):
        return None
    for part, peaks in GPU_PEAKS.items():
        if part in name:
            return 1e12 * peaks[1 if dtype == "float32" else 0]
    return None


def cpu_peak(dtype: Dtype, seconds: float = 0.3) -> float:
    """Measure the peak of a CPU with this process's threads, FLOP/s: the fastest of some products.

    Args:
        seconds: Time to try for. Other processes that start at the same moment take both cores for
            some 10 ms at a time: within 6 ms a peak was measured that training exceeded.
    """
    matrix = torch.ones(_SIDE, _SIDE, dtype=getattr(torch, dtype))
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        before = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - before)
    return 2 * _SIDE**3 / best


def peak(device: torch.device, dtype: Dtype) -> float | None:
    """Return the peak of a device, FLOP/s; None for a GPU that is not in the table."""
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), dtype)
    return cpu_peak(dtype)
