"""What `python -m train.plan` knows of hardware: memory, links, and the MFU that it assumes.

Peaks of matrix products are in `train.monitor.peak_flops`; here is the rest, each with its source.
Nothing in this file was measured by this project, but for the CPU's MFU: `python -m train.bench`
measures your own, and `train.plan --mfu` takes it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from pipeline.runtime.errors import UserError
from train.monitor.peak_flops import cpu_peak, gpu_peak

GB, GIB = 1e9, 2.0**30
Dtype = Literal["float32", "bfloat16"]
Link = Literal["nvlink", "pcie"]

# Part of a link's speed that a ring all-reduce of some 100 MB gets out of it: "bus bandwidth" of
# NVIDIA's nccl-tests (doc/PERFORMANCE.md), about 230 of 300 GB/s on a DGX A100. Through the host's
# memory, as between GeForce cards, it is about half. Assumptions, both.
LINK_SHARE = {"nvlink": 0.75, "pcie": 0.5, "network": 0.75}
# Part of the memory's speed that kernels which only read and write reach; an assumption.
MEMORY_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A kind of device, and the node that it is usually rented in.

    Attributes:
        name: As `--hardware` takes it.
        cuda: What `train.monitor.peak_flops.GPU_PEAKS` knows it by; None: a CPU.
        memory: Bytes that PyTorch sees.
        bandwidth: Of that memory, bytes a second.
        nvlink: One way, bytes a second; None where it has none.
        pcie: The same of its PCIe slot.
        network: Of a whole node of eight to another, bits a second.
        mfu: Part of the peak that forward and backward are assumed to reach.
        mfu_source: Where that is from.
    """

    name: str
    cuda: str | None
    memory: float
    bandwidth: float
    nvlink: float | None
    pcie: float
    network: float
    mfu: float
    mfu_source: str

    def peak(self, dtype: Dtype) -> float:
        """Dense peak of matrix products, FLOP/s; a CPU's is timed, in 30 ms."""
        known = cpu_peak(dtype) if self.cuda is None else gpu_peak(self.cuda, dtype)
        assert known is not None, f"{self.cuda} is not in GPU_PEAKS"
        return known

    def link(self, wanted: Link | None = None) -> Link:
        """How the devices of a node are connected: as asked for, or by the best that they have.

        Raises:
            UserError: NVLink is asked for where there is none.
        """
        if wanted == "nvlink" and self.nvlink is None:
            raise UserError(f"--interconnect: {self.name} has no NVLink; take pcie")
        return wanted or ("pcie" if self.nvlink is None else "nvlink")

    def bus(self, link: Link, nodes: int, network: float | None = None) -> float:
        """Speed of a ring all-reduce, bytes a second: that of its slowest link.

        Args:
            link: Within a node.
            nodes: How many.
            network: Between nodes, bits a second of a node; None: as usual.
        """
        within = (self.nvlink if link == "nvlink" else self.pcie) or self.pcie
        speed = LINK_SHARE[link] * within
        if nodes > 1:
            # NCCL makes as many rings as there are network cards, each through all of the node.
            speed = min(speed, LINK_SHARE["network"] * (network or self.network) / 8)
        return speed


# 16 x 1,024 tokens in 90 ms, 3.4 of it the optimizer by cost.py: 50 % in all.
_A100 = "assumed: build-nanogpt's PyTorch on one A100, 182K tokens/s"
# 9,536 steps of 524,288 tokens in 31.4 min on 8 x H100: 198 ms, 5 of them links and optimizer.
_H100 = "assumed: modded-nanogpt's record 2, PyTorch, 31.4 min"
_NONE = "a guess: no published figure was found"

# memory: "total capacity" in PyTorch's own messages on such cards (79.1 GiB of an A100-80, 23.6 of
# an RTX 4090, ...). bandwidth, nvlink (half of the "600" and "900 GB/s" that are both ways), pcie
# (x16: 31.5 GB/s of generation 4, 63 of 5): NVIDIA's data sheets of each card, SXM where there is
# one. network: DGX A100 has eight 200 Gbit/s cards, DGX H100 eight of 400; rented L4 and RTX 4090
# hosts have seldom more than 25 in all.
_TABLE: tuple[tuple[str, str, float, float, float | None, float, float, float, str], ...] = (
    # name, cuda, GiB, GB/s, NVLink GB/s, PCIe GB/s, network Gbit/s, MFU, source of the MFU
    ("a100-40", "A100", 39.4, 1555, 300, 31.5, 1600, 0.52, _A100),
    ("a100-80", "A100", 79.1, 2039, 300, 31.5, 1600, 0.52, _A100),
    ("h100", "H100", 79.1, 3350, 450, 63.0, 3200, 0.29, _H100),
    ("h200", "H200", 139.8, 4800, 450, 63.0, 3200, 0.29, _H100),
    ("l4", "L4", 22.0, 300, None, 31.5, 25, 0.40, _NONE),
    ("rtx4090", "RTX 4090", 23.5, 1008, None, 31.5, 25, 0.40, _NONE),
)

NAMES = (*(row[0] for row in _TABLE), "cpu")


def accelerator(name: str) -> Accelerator:
    """The hardware of a name; "cpu" is this machine.

    Raises:
        UserError: No hardware of that name is known.
    """
    if name == "cpu":
        return _this_cpu()
    for known, cuda, memory, bandwidth, nvlink, pcie, network, mfu, source in _TABLE:
        if name == known:
            return Accelerator(
                name=name,
                cuda=cuda,
                memory=memory * GIB,
                bandwidth=bandwidth * GB,
                nvlink=nvlink * GB if nvlink else None,
                pcie=pcie * GB,
                network=network * GB,
                mfu=mfu,
                mfu_source=source,
            )
    raise UserError(f"--hardware {name}: unknown; take {', '.join(NAMES)}")


def _this_cpu() -> Accelerator:
    """This machine: its memory, and round figures for the links, which hardly count on a CPU."""
    return Accelerator(
        name="cpu",
        cuda=None,
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        bandwidth=20 * GB,
        nvlink=None,
        pcie=4 * GB,  # gloo over loopback
        network=10 * GB,
        mfu=0.5,
        mfu_source="assumed: 124M in bfloat16 had 55 % on 2 cores",
    )
