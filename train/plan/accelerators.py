"""Hardware that `python -m train.plan` knows: memory, links, price, and the MFU it assumes.

The peaks of matrix products are in `train.monitor.peak_flops`; everything else is here, with its
source. Only the CPU's MFU was measured by this project: `python -m train.bench` measures the MFU of
your hardware, and `train.plan --mfu` uses it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

from pipeline.runtime.errors import UserError
from train.monitor.peak_flops import cpu_peak, gpu_peak
from train.numerics import Dtype, native_dtype

GB, GIB = 1e9, 2.0**30
Link = Literal["nvlink", "pcie"]

# Fraction of a link's speed that a ring all-reduce of some 100 MB reaches ("bus bandwidth" of
# NVIDIA's nccl-tests, doc/PERFORMANCE.md): about 230 of 300 GB/s on a DGX A100, and about half
# through host memory, as between GeForce cards. All three are assumptions.
LINK_EFFICIENCY = {"nvlink": 0.75, "pcie": 0.5, "network": 0.75}
# Fraction of the memory bandwidth that a kernel reaches which only reads and writes: an assumption.
MEMORY_EFFICIENCY = 0.8
# Sizes for which an MFU is assumed, in parameters: GPT-2's smallest and largest.
SMALL, LARGE = 124_439_808, 1_557_611_200


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A type of device, in the node that it is usually rented in."""

    name: str  # name for `--hardware`
    gpu_name: str | None  # name in `train.monitor.peak_flops.GPU_PEAKS`; None for a CPU
    memory: float  # memory that PyTorch sees, bytes
    bandwidth: float  # memory bandwidth, bytes per second
    nvlink: float | None  # NVLink bandwidth in one direction, bytes per second; None without NVLink
    pcie: float  # PCIe bandwidth in one direction, bytes per second
    network: float  # bandwidth between two nodes of eight devices, bits per second
    mfu: tuple[float, float]  # assumed MFU of forward and backward at SMALL and LARGE, 0 to 1
    mfu_source: str  # source of that MFU
    price: float | None = None  # typical price, dollars per GPU-hour; None on a CPU
    price_source: str = ""  # source of that price, and its date

    def assumed_mfu(self, parameters: int) -> float:
        """Return the MFU for a model of this size: linear in the logarithm from SMALL to LARGE."""
        position = math.log(parameters / SMALL) / math.log(LARGE / SMALL)
        small, large = self.mfu
        return small + (large - small) * min(1.0, max(0.0, position))

    @property
    def native_dtype(self) -> Dtype:
        """What `train.dtype: auto` becomes on it."""
        if self.gpu_name is None:
            return native_dtype("cpu")
        return "float16" if self.gpu_name.startswith("Tesla") else "bfloat16"

    def peak(self, dtype: Dtype) -> float:
        """Return the dense peak of matrix products in FLOP/s; on a CPU it is timed, in 30 ms."""
        found = cpu_peak(dtype) if self.gpu_name is None else gpu_peak(self.gpu_name, dtype)
        assert found is not None, f"{self.gpu_name} is not in GPU_PEAKS"
        return found

    def link(self, requested: Link | None = None) -> Link:
        """Return the link between the devices of a node: as requested, else the fastest.

        Raises:
            UserError: NVLink is requested for devices without it.
        """
        if requested == "nvlink" and self.nvlink is None:
            raise UserError(f"--interconnect: {self.name} has no NVLink; use pcie")
        return requested or ("pcie" if self.nvlink is None else "nvlink")

    def bus_bandwidth(self, link: Link, nodes: int, network: float | None = None) -> float:
        """Return the bus bandwidth of a ring all-reduce, that of its slowest link, in bytes/s.

        `network` is the bandwidth between nodes in bits per second; None: the usual one.
        """
        within = (self.nvlink if link == "nvlink" else self.pcie) or self.pcie
        speed = LINK_EFFICIENCY[link] * within
        if nodes > 1:
            # NCCL builds one ring per network card, and each ring visits all devices of a node.
            speed = min(speed, LINK_EFFICIENCY["network"] * (network or self.network) / 8)
        return speed


# MFU of forward and backward at which train.plan gives the step times of published runs, each named
# in docs/plan.md; tests/train/plan/test_step_time.py limits the error to 20 %.
# A100, 124M: llm.c 60 %, build-nanogpt 52 %, llm-foundry 43 %. 355M: llm.c 62 %, llm-foundry 50 %.
#       760M: llm.c 65 %, llm-foundry 48 % (57 % at T 2,048). 1.3B, 2.6B: llm-foundry 61 and 63 %.
# H100, 124M: llm.c 41 %, modded-nanogpt 40 %; nanochat's d12 logs 41 to 46 %. 760M, 1.3B and 2.6B:
#       llm-foundry 40, 43 and 47 %. 1558M: llm.c 50 %; nanochat's d32 (1.9B) logs 50 %.
# RTX 4090, 124M: nanogpt-speedrun 58 %; nanoGPT issue 182 reports 29 % of an A100's peak: 55 %.
_A100 = "assumed from llm.c, build-nanogpt, llm-foundry", (0.52, 0.61)
_H100 = "assumed from llm.c, modded-nanogpt, llm-foundry", (0.42, 0.48)
_4090 = "assumed from nanogpt-speedrun, 124M", (0.57, 0.57)
_GUESS = "a guess: no published figure was found", (0.40, 0.40)

# Typical prices, dollars per GPU-hour: the middle of the range of the specialised clouds
# (mercatus-ai.com, "Cloud GPU pricing", May 2026: A100-80 1.10 to 1.50, H100 2.50 to 3.50, H200
# 3.50 to 4.50), RunPod's list (deploybase.ai, March 2026), and Lambda (llm.c discussion 481).
_CLOUDS, _RUNPOD, _LAMBDA = "typical, May 2026", "RunPod, March 2026", "Lambda, May 2024"

# memory: "total capacity" in PyTorch's own messages on such cards (79.1 GiB on an A100-80, 23.6 on
# an RTX 4090, ...). bandwidth, nvlink (half of the "600" and "900 GB/s", which count both
# directions), pcie (x16: 31.5 GB/s for generation 4, 63 for generation 5): NVIDIA's data sheet of
# each card, in SXM form where it exists (V100: with 16 GB). network: a DGX A100 has eight of 200
# Gbit/s, a DGX H100 eight of 400; rented hosts of other cards rarely have more than 25 in total.
_Row = tuple[
    str, str, float, float, float | None, float, float, tuple[str, tuple[float, float]],
    float | None, str,
]  # fmt: skip
_TABLE: tuple[_Row, ...] = (
    # name, GPU, GiB, GB/s, NVLink GB/s, PCIe GB/s, network Gbit/s, MFU, dollars, their source
    ("a100-40", "A100", 39.4, 1555, 300, 31.5, 1600, _A100, 1.29, _LAMBDA),
    ("a100-80", "A100", 79.1, 2039, 300, 31.5, 1600, _A100, 1.30, _CLOUDS),
    ("h100", "H100", 79.1, 3350, 450, 63.0, 3200, _H100, 3.00, _CLOUDS),
    ("h200", "H200", 139.8, 4800, 450, 63.0, 3200, _H100, 4.00, _CLOUDS),
    ("l4", "L4", 22.0, 300, None, 31.5, 25, _GUESS, 0.44, _RUNPOD),
    ("rtx4090", "RTX 4090", 23.5, 1008, None, 31.5, 25, _4090, 0.34, _RUNPOD),
    ("b200", "B200", 178.4, 8000, 900, 63.0, 3200, _GUESS, None, ""),
    ("l40s", "L40S", 44.4, 864, None, 31.5, 25, _GUESS, None, ""),
    ("rtx6000-ada", "RTX 6000 Ada", 47.4, 960, None, 31.5, 25, _GUESS, None, ""),
    ("rtx5090", "RTX 5090", 31.4, 1792, None, 63.0, 25, _GUESS, None, ""),
    ("rtx3090", "RTX 3090", 23.7, 936, None, 31.5, 25, _GUESS, None, ""),
    ("t4", "Tesla T4", 14.6, 320, None, 15.8, 25, _GUESS, None, ""),
    ("v100", "Tesla V100", 15.8, 900, 150, 15.8, 100, _GUESS, None, ""),
)

NAMES = (*(row[0] for row in _TABLE), "cpu")


def accelerator(name: str) -> Accelerator:
    """Return the accelerator with this name; "cpu" is this machine.

    Raises:
        UserError: The name is unknown.
    """
    if name == "cpu":
        return _this_cpu()
    for known, gpu, memory, bandwidth, nvlink, pcie, network, mfu, price, dated in _TABLE:
        if name == known:
            return Accelerator(
                name=name,
                gpu_name=gpu,
                memory=memory * GIB,
                bandwidth=bandwidth * GB,
                nvlink=nvlink * GB if nvlink else None,
                pcie=pcie * GB,
                network=network * GB,
                mfu_source=mfu[0],
                mfu=mfu[1],
                price=price,
                price_source=dated,
            )
    raise UserError(f"--hardware {name}: unknown; use one of {', '.join(NAMES)}")


def identify(gpu_name: str, memory: float) -> str | None:
    """Return the name for `--hardware` of a GPU; None if it is not in the table.

    Args:
        gpu_name: Name from CUDA, such as "NVIDIA A100-SXM4-80GB".
        memory: Its memory in bytes: cards with the same name can differ in it.
    """
    for name, known, gib, *_ in _TABLE:
        # They can also differ in form factor and speed: H100 PCIe and H100 SXM.
        same_speed = gpu_peak(gpu_name, "bfloat16") == gpu_peak(known, "bfloat16")
        if known in gpu_name and same_speed and 0.9 < gib * GIB / memory < 1.1:
            return name
    return None


def _this_cpu() -> Accelerator:
    """Describe this machine. Links are round figures: they hardly matter on a CPU."""
    return Accelerator(
        name="cpu",
        gpu_name=None,
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        bandwidth=20 * GB,
        nvlink=None,
        pcie=4 * GB,  # gloo over loopback
        network=10 * GB,
        mfu=(0.5, 0.5),
        mfu_source="assumed: 124M in bfloat16 reached 55 % on 2 cores",
    )
