"""The model on a GPU against itself on the CPU: numbers, memory, graphs, kernels."""

from __future__ import annotations

from collections.abc import Iterator

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
# Heads of 64 channels, as in every published size; a vocabulary that is padded.
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=256, vocab_size=1000)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Float32 products in float32, not in TF32; and every test compiles for itself."""
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
    """On the CPU, whatever computed them."""
    inputs, targets = (part.to(device) for part in batch())
    gpt.to(device).zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = gpt(inputs, targets)
    loss.backward()
    gradients = {}
    for name, parameter in gpt.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad.cpu()
    return loss.detach().cpu(), gradients


def furthest(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance of a tensor, relative; biases of keys have no gradient but round-off."""
    return max(
        float((gradients[name] - wanted).norm() / wanted.norm())
        for name, wanted in expected.items()
        if not name.endswith("c_attn.bias")
    )


def test_initial_weights_do_not_depend_on_the_device() -> None:
    here, there = GPT.initialised(CONFIG), GPT.initialised(CONFIG, device=DEVICE)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(a, b.cpu())


@torch.no_grad()
def test_logits_in_float32() -> None:
    gpt, (inputs, _) = GPT(CONFIG), batch()
    expected = gpt(inputs)
    got = gpt.to(DEVICE)(inputs.to(DEVICE)).cpu()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    explicit = GPT(CONFIG, implementation="explicit").to(DEVICE)
    torch.testing.assert_close(explicit(inputs.to(DEVICE)).cpu(), expected, atol=1e-4, rtol=1e-4)


def test_loss_and_gradients_in_float32() -> None:
    gpt = GPT(CONFIG)
    loss, gradients = loss_and_gradients(gpt, "cpu")
    on_gpu, its_gradients = loss_and_gradients(gpt, DEVICE)
    assert abs(on_gpu - loss) < 1e-4
    assert furthest(its_gradients, gradients) < 1e-3


def test_loss_and_gradients_in_bfloat16_are_near_those_in_float32() -> None:
    gpt = GPT(CONFIG)
    loss, gradients = loss_and_gradients(gpt, "cpu")
    on_gpu, its_gradients = loss_and_gradients(gpt, DEVICE, autocast=True)
    assert on_gpu.dtype == torch.float32
    assert abs(on_gpu - loss) < 2e-2
    assert furthest(its_gradients, gradients) < 0.1


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_compiled_in_two_graphs_and_equal_to_eager(autocast: bool) -> None:
    """As the loop alternates: training, and evaluation without gradients."""
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
def test_a_kernel_that_holds_no_scores_takes_our_shapes(kernel: SDPBackend) -> None:
    """PyTorch raises where the kernel that is allowed does not take heads, strides or types."""
    gpt, (inputs, targets) = GPT(CONFIG).to(DEVICE), batch()
    with sdpa_kernel([kernel]), torch.autocast(DEVICE, torch.bfloat16):
        gpt(inputs.to(DEVICE), targets.to(DEVICE)).backward()


def peak_of(loss_of: object, N: int, C: int, V: int) -> int:
    """Bytes at the highest, beyond what is there before and after."""
    x = torch.randn(N, C, device=DEVICE, requires_grad=True)
    w = torch.randn(V, C, device=DEVICE, requires_grad=True)
    y = torch.randint(50257, (N,), device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = loss_of(x, w, y)  # type: ignore[operator]
    loss.backward()
    return torch.cuda.max_memory_allocated() - before


def test_the_loss_in_chunks_needs_a_quarter_of_the_memory() -> None:
    N, C, V = 8 * 1024, 768, 50304
    chunked = peak_of(lambda x, w, y: linear_cross_entropy(x, w, y, 50257, "sum"), N, C, V)
    plain = peak_of(
        lambda x, w, y: F.cross_entropy(F.linear(x, w).float(), y, reduction="sum"), N, C, V
    )
    print(f"chunked {chunked / 1e9:.2f} GB, plain {plain / 1e9:.2f} GB")
    assert plain > 4 * N * V  # its logits in float32, at least: the figures mean something
    assert chunked < plain / 4


def test_generation_chooses_the_same_tokens() -> None:
    gpt = GPT(CONFIG)
    prompts = [[1, 2, 3], [999] * 40]
    expected = gpt.generate(prompts, 24, temperature=0)
    assert gpt.to(DEVICE).generate(prompts, 24, temperature=0) == expected
