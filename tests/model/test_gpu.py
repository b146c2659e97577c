"""Tests for the model on a GPU: results as on the CPU, memory, graphs, kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, GPTConfig
from model.loss import linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
# 64 channels per head, as in every published size; a vocabulary that needs padding.
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=256, vocab_size=1000)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Compute float32 products without TF32, and compile every test from scratch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.set_float32_matmul_precision(before)
    torch._dynamo.reset()


def batch(rows: int = 4, T: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1000, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].clone()
    targets[0, :9] = -100
    return tokens[:, :-1], targets


def loss_and_gradients(
    gpt: GPT, device: str, autocast: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute them on `device`; return them on the CPU."""
    inputs, targets = (part.to(device) for part in batch())
    gpt.to(device).zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = gpt(inputs, targets)
    loss.backward()
    gradients = {n: p.grad.cpu() for n, p in gpt.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(gpt.parameters()))
    return loss.detach().cpu(), gradients


def test_initial_weights_do_not_depend_on_the_device() -> None:
    here, there = GPT.initialised(CONFIG), GPT.initialised(CONFIG, device=DEVICE)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(a, b.cpu())


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["fused", "explicit"])
def test_float32_logits_equal_those_of_the_cpu(implementation: Any) -> None:
    inputs, _ = batch()
    expected = GPT(CONFIG)(inputs)
    got = GPT(CONFIG, implementation=implementation).to(DEVICE)(inputs.to(DEVICE)).cpu()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("autocast", "atol", "rtol"), [(False, 1e-4, 1e-3), (True, 2e-2, 0.1)])
def test_loss_and_gradients_equal_those_of_the_cpu_in_float32(
    autocast: bool, atol: float, rtol: float
) -> None:
    gpt = GPT(CONFIG)
    loss, gradients = loss_and_gradients(gpt, "cpu")
    gpu_loss, gpu_gradients = loss_and_gradients(gpt, DEVICE, autocast)
    assert gpu_loss.dtype == torch.float32
    assert abs(gpu_loss - loss) < atol
    for name, expected in gradients.items():
        if not name.endswith("c_attn.bias"):  # the keys' third is rounding error
            assert (gpu_gradients[name] - expected).norm() < rtol * expected.norm(), name


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_compiles_to_two_graphs_equal_to_eager(autocast: bool) -> None:
    """One graph for training, one for evaluation without gradients."""
    gpt = GPT(CONFIG).to(DEVICE)
    compiled, losses = torch.compile(gpt, fullgraph=True), []
    for seed in range(4):
        inputs, targets = (part.to(DEVICE) for part in batch(seed=seed))
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            trained = compiled(inputs, targets, reduction="sum") / targets.numel()
            with torch.no_grad():
                evaluated = compiled(inputs, targets, reduction="sum") / targets.numel()
                expected = gpt(inputs, targets, reduction="sum") / targets.numel()
        trained.backward()
        losses.append(torch.stack([trained.detach(), evaluated, expected]))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2
    found = torch.stack(losses).cpu()
    assert (found - found[:, 2:]).abs().max() < (2e-2 if autocast else 1e-4)
    assert all(torch.isfinite(p.grad).all() for p in gpt.parameters() if p.grad is not None)


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_memory_efficient_attention_kernels_accept_our_shapes(kernel: SDPBackend) -> None:
    """PyTorch raises if the only allowed kernel does not support heads, strides or dtypes."""
    gpt, (inputs, targets) = GPT(CONFIG).to(DEVICE), batch()
    with sdpa_kernel([kernel]), torch.autocast(DEVICE, torch.bfloat16):
        gpt(inputs.to(DEVICE), targets.to(DEVICE)).backward()


def peak_memory(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], N: int, C: int, V: int) -> int:
    """Return the peak of allocated bytes above the inputs."""
    x = torch.randn(N, C, device=DEVICE, requires_grad=True)
    w = torch.randn(V, C, device=DEVICE, requires_grad=True)
    y = torch.randint(50257, (N,), device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = loss_of(x, w, y)
    loss.backward()
    return torch.cuda.max_memory_allocated() - before


def test_the_chunked_loss_needs_a_quarter_of_the_memory() -> None:
    N, C, V = 8 * 1024, 768, 50304
    chunked = peak_memory(lambda x, w, y: linear_cross_entropy(x, w, y, 50257, "sum"), N, C, V)
    plain = peak_memory(
        lambda x, w, y: F.cross_entropy(F.linear(x, w).float(), y, reduction="sum"), N, C, V
    )
    print(f"chunked {chunked / 1e9:.2f} GB, plain {plain / 1e9:.2f} GB")
    assert plain > 4 * N * V  # its float32 logits: checks the measurement
    assert chunked < plain / 4


def test_greedy_generation_equals_that_of_the_cpu() -> None:
    gpt = GPT(CONFIG)
    prompts = [[1, 2, 3], [999] * 40]
    expected = gpt.generate(prompts, 24, temperature=0)
    assert gpt.to(DEVICE).generate(prompts, 24, temperature=0) == expected
