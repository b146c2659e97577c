"""Drift: ranks whose weights are no longer those of the others.

DDP gives every rank the same gradients, and each rank updates its own copy of the weights. A fault
of the memory or of the arithmetic, or GPUs of two kinds, make one copy differ. No number of the log
shows it: losses are means over all ranks, and only rank 0's copy is saved. So the copies are
compared before each checkpoint. Muon's momenta are compared as well: each rank's are used for its
share of the update, so a wrong one changes the weights of all ranks alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from train.distributed.world import World, process_name


class Drift(RuntimeError):
    """The weights of ranks differ; the message names the ranks."""


def checksums(named: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Sum the bits of each tensor as integers: exact, so no order of addition changes it.

    Args:
        named: Float32 tensors by name, on one device, which computes the sums.
    """
    bits = [tensor.detach().view(torch.int32) for tensor in named.values()]
    return tuple(torch.stack([part.sum(dtype=torch.int64) for part in bits]).tolist())


def check_same_weights(named: Mapping[str, Tensor], world: World, step: int) -> None:
    """Compare the weights of all ranks; every rank must call it.

    Args:
        named: The weights of this rank, and other float32 state that all ranks must have alike.
        step: Number of complete steps, for the message.

    Raises:
        Drift: On all ranks: some have other weights than most (of two ranks: than rank 0).
    """
    ranks = world.gather((process_name(world.rank), checksums(named)))
    ((most, _),) = Counter(sums for _, sums in ranks).most_common(1)
    drifted = [(name, sums) for name, sums in ranks if sums != most]
    if not drifted:
        return
    differs = (sums != right for sums, right in zip(drifted[0][1], most, strict=True))
    parameter = next(name for name, other in zip(named, differs, strict=True) if other)
    raise Drift(
        f"step {step}: {', '.join(name for name, _ in drifted)}: its weights differ from those of "
        f"the other ranks, first in {parameter}; check that machine (nvidia-smi -q -d ECC), and "
        "that all GPUs are of one kind, then run the same command to resume"
    )
