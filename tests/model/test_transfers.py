"""Tests for copies between CPU and GPU during training, without a GPU.

On the meta device nothing is computed, but every operation is dispatched as on a GPU. An operation
with a CPU tensor would be a copy between the two, and most such copies wait for the GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=64, vocab_size=300, loss_chunk=48)
# Operations on Python numbers, which become CPU tensors and are read there: no copy.
HARMLESS = ("aten.lift_fresh.default", "aten.fill_.Tensor", "prim.device.default")


class Transfers(TorchDispatchMode):
    """Records operations with a CPU tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if str(func) not in HARMLESS and any(t.device.type == "cpu" for t in tensors):
            self.found.append(str(func))
        return out


def test_transfers_are_detected() -> None:
    x = torch.zeros(3, device="meta")
    with Transfers() as transfers:
        x[torch.tensor([0, 2])] = 1.0  # the index is copied to the device
        x += torch.tensor([1.0, 2.0, 3.0]).to("meta")
    assert transfers.found


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_micro_step_copies_nothing_between_devices(
    reduction: Any, documents: bool, checkpointed: bool
) -> None:
    with torch.device("meta"):
        gpt = GPT(CONFIG)
        tokens = torch.zeros(2, 64, dtype=torch.int64)
        targets, ids = torch.zeros_like(tokens), torch.zeros_like(tokens)
    gpt.checkpoint_activations = checkpointed
    with Transfers() as transfers:
        loss = gpt(tokens, targets, reduction, ids if documents else None).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
    assert all(p.grad is not None for p in gpt.parameters())
    assert transfers.operations > 200
    assert transfers.found == []
