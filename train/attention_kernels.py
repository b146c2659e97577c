"""Which of PyTorch's kernels computes attention on a GPU.

`scaled_dot_product_attention` takes the first of an order of kernels that can compute its inputs:

    cudnn      fastest on Hopper and the Blackwell of data centres, for bfloat16 and float16
    flash      FlashAttention 2, from Ampere on. On the Blackwell of workstations it is as fast as
               cudnn or faster with GPT-2's heads of 64 channels (sglang pull request 38689)
    efficient  memory-efficient attention: older GPUs, masks, float32
    math       always possible; it stores all scores

None of the orders has been measured by us. With `train.deterministic` flash comes first, whose
backward pass has a deterministic mode.
"""

from __future__ import annotations

import contextlib

import torch
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPTConfig
from pipeline.runtime.machine import AttentionKernel
from train.numerics import Dtype

BACKENDS = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention),
    "flash": (SDPBackend.FLASH_ATTENTION, can_use_flash_attention),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, can_use_efficient_attention),
    "math": (SDPBackend.MATH, lambda params: True),
}

# Holds the order until the process ends: `sdpa_kernel` restores the former one when it is left.
_chosen = contextlib.ExitStack()


def kernel_order(
    wanted: AttentionKernel | None, capability: tuple[int, int], deterministic: bool = False
) -> list[str]:
    """Return the names of all kernels, the first to try first.

    Args:
        wanted: The setting `attention` of machine.yaml.
        capability: Of the GPU: 8.x is Ampere or Ada, 9 Hopper, 10 Blackwell, 12 its workstations.
        deterministic: `train.deterministic`.
    """
    usual = "cudnn" if capability[0] in (9, 10) and not deterministic else "flash"
    first = wanted or usual
    return [first, *(name for name in ("flash", "cudnn", "efficient", "math") if name != first)]


def set_kernel_order(order: list[str]) -> None:
    """Have attention try the kernels in this order, in this process."""
    _chosen.close()
    backends = [BACKENDS[name][0] for name in order]
    _chosen.enter_context(sdpa_kernel(backends, set_priority=True))


def kernel_in_use(
    order: list[str], config: GPTConfig, dtype: Dtype, device: torch.device, masked: bool
) -> str:
    """Return the name of the first kernel that can compute the model's attention.

    Args:
        masked: Whether a bool mask is given, as for documents in an eager model.
    """
    T, H = config.block_size, config.n_head
    q = torch.empty(
        1, H, T, config.n_embd // H, dtype=getattr(torch, dtype), device=device
    ).requires_grad_()
    mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=device) if masked else None
    params = SDPAParams(q, q, q, mask, 0.0, not masked, False)
    return next(name for name in order if BACKENDS[name][1](params))


def choose(
    wanted: AttentionKernel | None,
    config: GPTConfig,
    dtype: Dtype,
    device: torch.device,
    *,
    deterministic: bool,
    masked: bool,
    compiled: bool,
) -> str | None:
    """Set the order of the kernels of a GPU; return the one in use, None on a CPU.

    Args:
        wanted: The setting `attention` of machine.yaml.
        masked: Whether attention stays within a document.
        compiled: Whether the model is compiled, which computes masks by itself.
    """
    if device.type != "cuda":
        return None
    order = kernel_order(wanted, torch.cuda.get_device_capability(device), deterministic)
    set_kernel_order(order)
    if masked and compiled:
        return "flex"  # model/attention.py
    return kernel_in_use(order, config, dtype, device, masked)
