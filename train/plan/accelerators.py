"""Hardware that `python -m train.plan` knows: memory, links, and the MFU it assumes.

The peaks of matrix products are in `train.monitor.peak_flops`; everything else is here, with its
source. Only the CPU's MFU was measured by this project: `python -m train.bench` measures the MFU of
your hardware, and `train.plan --mfu` uses it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from pipeline.runtime.errors import UserError
from train.monitor.peak_flops import cpu_peak, gpu_peak
from train.numerics import Dtype

GB, GIB = 1e9, 2.0**30
Link = Literal["nvlink", "pcie"]

# Fraction of a link's speed that a ring all-reduce of some 100 MB reaches ("bus bandwidth" of
# NVIDIA's nccl-tests, doc/PERFORMANCE.md): about 230 of 300 GB/s on a DGX A100, and about half
# through host memory, as between GeForce cards. All three are assumptions.
LINK_EFFICIENCY = {"nvlink": 0.75, "pcie": 0.5, "network": 0.75}
# Fraction of the memory bandwidth that a kernel reaches which only reads and writes: an assumption.
MEMORY_EFFICIENCY = 0.8


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
    mfu: float  # assumed MFU of forward and backward, 0 to 1
    mfu_source: str  # source of that MFU

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


# 16 x 1,024 tokens in 90 ms, of which the optimizer takes 3.4 ms (step_time.py): 50 % overall.
_A100 = "assumed: build-nanogpt's PyTorch on one A100, 182K tokens/s"
# 9,536 steps of 524,288 tokens in 31.4 min on 8 x H100: 198 ms, of which links and optimizer 5 ms.
_H100 = "assumed: modded-nanogpt's record 2, PyTorch, 31.4 min"
_GUESS = "a guess: no published figure was found"

# memory: "total capacity" in PyTorch's own messages on such cards (79.1 GiB on an A100-80, 23.6 on
# an RTX 4090, ...). bandwidth, nvlink (half of the "600" and "900 GB/s", which count both
# directions), pcie (x16: 31.5 GB/s for generation 4, 63 for generation 5): NVIDIA's data sheet of
# each card, in SXM form where it exists. network: a DGX A100 has eight 200 Gbit/s cards, a DGX H100
# eight of 400 Gbit/s; rented L4 and RTX 4090 hosts rarely have more than 25 Gbit/s in total.
_TABLE: tuple[tuple[str, str, float, float, float | None, float, float, float, str], ...] = (
    # name, GPU, GiB, GB/s, NVLink GB/s, PCIe GB/s, network Gbit/s, MFU, source of the MFU
    ("a100-40", "A100", 39.4, 1555, 300, 31.5, 1600, 0.52, _A100),
    ("a100-80", "A100", 79.1, 2039, 300, 31.5, 1600, 0.52, _A100),
    ("h100", "H100", 79.1, 3350, 450, 63.0, 3200, 0.29, _H100),
    ("h200", "H200", 139.8, 4800, 450, 63.0, 3200, 0.29, _H100),
    ("l4", "L4", 22.0, 300, None, 31.5, 25, 0.40, _GUESS),
    ("rtx4090", "RTX 4090", 23.5, 1008, None, 31.5, 25, 0.40, _GUESS),
)

NAMES = (*(row[0] for row in _TABLE), "cpu")


def accelerator(name: str) -> Accelerator:
    """Return the accelerator with this name; "cpu" is this machine.

    Raises:
        UserError: The name is unknown.
    """
    if name == "cpu":
        return _this_cpu()
    for known, gpu_name, memory, bandwidth, nvlink, pcie, network, mfu, source in _TABLE:
        if name == known:
            return Accelerator(
                name=name,
                gpu_name=gpu_name,
                memory=memory * GIB,
                bandwidth=bandwidth * GB,
                nvlink=nvlink * GB if nvlink else None,
                pcie=pcie * GB,
                network=network * GB,
                mfu=mfu,
                mfu_source=source,
            )
    raise UserError(f"--hardware {name}: unknown; use one of {', '.join(NAMES)}")


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
        mfu=0.5,
        mfu_source="assumed: 124M in bfloat16 reached 55 % on 2 cores",
    )
