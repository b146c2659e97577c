"""Tests for train.attention_kernels: the order of the kernels, and which one is in use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from model import GPTConfig
from pipeline.runtime.machine import Machine
from train import attention_kernels
from train.attention_kernels import BACKENDS, kernel_in_use, kernel_order, set_kernel_order

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=128, block_size=16, vocab_size=64)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    attention_kernels._chosen.close()


@pytest.mark.parametrize(
    ("capability", "first"),
    [((7, 5), "flash"), ((8, 0), "flash"), ((8, 9), "flash"), ((9, 0), "cudnn"),
     ((10, 0), "cudnn"), ((10, 3), "cudnn"), ((12, 0), "flash")],
)  # fmt: skip
def test_the_first_kernel_depends_on_the_generation_and_the_setting(
    capability: tuple[int, int], first: str
) -> None:
    order = kernel_order(None, capability)
    assert order[0] == first
    assert sorted(order) == sorted(BACKENDS)
    assert order[-1] == "math"
    assert kernel_order(None, capability, deterministic=True)[0] == "flash"
    for name in BACKENDS:
        wanted = kernel_order(Machine(attention=name).attention, capability)
        assert wanted[0] == name
        assert sorted(wanted) == sorted(BACKENDS)


def test_pytorch_is_given_the_order_and_keeps_it() -> None:
    for first in ("cudnn", "efficient"):
        set_kernel_order(kernel_order(first, (9, 0)))
        found = _cur_sdpa_kernel_backends(with_priority=True)
        assert found[0] == BACKENDS[first][0]
        assert len(found) == 4
    attention_kernels._chosen.close()
    assert _cur_sdpa_kernel_backends(with_priority=True)[0] == SDPBackend.FLASH_ATTENTION


def test_a_kernel_that_cannot_compute_the_model_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = kernel_order(None, (9, 0))
    # A build for CPUs has none of them.
    assert kernel_in_use(order, CONFIG, "bfloat16", CPU, masked=False) == "math"

    def unmasked(params: Any) -> bool:
        assert params.query.shape == (1, 2, 16, 64)
        return params.attn_mask is None and params.is_causal

    monkeypatch.setitem(BACKENDS, "cudnn", (SDPBackend.CUDNN_ATTENTION, unmasked))
    assert kernel_in_use(order, CONFIG, "bfloat16", CPU, masked=False) == "cudnn"
    assert kernel_in_use(order, CONFIG, "bfloat16", CPU, masked=True) == "math"


def test_the_order_is_set_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(device: str, deterministic: bool = False, masked: bool = False) -> str | None:
        return attention_kernels.choose(
            None,
            CONFIG,
            "bfloat16",
            torch.device(device),
            deterministic=deterministic,
            masked=masked,
            compiled=True,
        )

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_kernels, "kernel_in_use", lambda order, *_: order[0])
    assert chosen("cpu") is None
    assert _cur_sdpa_kernel_backends(with_priority=True)[0] == SDPBackend.FLASH_ATTENTION
    assert chosen("cuda") == "cudnn"
    assert _cur_sdpa_kernel_backends(with_priority=True)[0] == SDPBackend.CUDNN_ATTENTION
    assert chosen("cuda", deterministic=True) == "flash"
    assert chosen("cuda", masked=True) == "flex"
