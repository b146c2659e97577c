"""Tests for train.numerics: the native type, the gradient norm and clipping."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from train import numerics
from train.numerics import clip_gradients, gradient_norm

# (rows, columns) of GPT-2 124M's token table. "frequent": frequent tokens come first, as they do.
TABLE = (50304, 768)


def table(kind: str) -> torch.Tensor:
    values = torch.randn(TABLE, generator=torch.Generator().manual_seed(0))
    return values / torch.arange(1, 50305)[:, None] if kind == "frequent" else values


@pytest.mark.parametrize(
    ("cpuinfo", "variables", "native"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\nflags\t\t: fpu\n", {}, True),
        ("flags : avx512f amx_bf16 amx_tile\n", {"ONEDNN_MAX_CPU_ISA": "avx512_core_amx"}, True),
        ("flags : avx512f amx_bf16 amx_tile\n", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        ("flags : avx512_bf16\n", {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, False),
        ("flags : avx512_bf16\n", {"ATEN_CPU_CAPABILITY": "avx2"}, False),
        ("flags : fpu avx2 avx512f avx_vnni\n", {}, False),
        ("Features\t: fp asimd bf16 i8mm\n", {}, True),
        ("Features\t: fp asimd\n", {}, False),
        ("", {}, False),
        (None, {}, False),
    ],
)
def test_bfloat16_is_native_where_kernels_use_its_instructions(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpuinfo: str | None,
    variables: dict[str, str],
    native: bool,
) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # PyTorch reads its variable once, when it starts.
    capability = variables.get("ATEN_CPU_CAPABILITY", "avx512").upper()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert numerics._cpu_has_bfloat16(tmp_path / "cpuinfo") is native


@pytest.mark.parametrize("kind", ["gaussian", "frequent"])
def test_the_norm_of_a_large_table_is_that_of_float64(kind: str) -> None:
    gradients = [table(kind), torch.randn(3072, 768), torch.randn(768)]
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert gradient_norm(gradients).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("limit", "norm_after"), [(2.0, 2.0), (100.0, math.sqrt(55)), (None, math.sqrt(55))]
)
def test_gradients_are_scaled_down_to_the_limit(limit: float | None, norm_after: float) -> None:
    vector, matrix = torch.zeros(3), torch.zeros(2, 1)
    vector.grad, matrix.grad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[4.0], [-5.0]])
    norm = clip_gradients([vector, matrix], limit)
    assert (norm.dtype, norm.shape) == (torch.float32, ())
    assert norm.item() == pytest.approx(math.sqrt(55))
    after = gradient_norm([vector.grad, matrix.grad])
    assert after.item() == pytest.approx(norm_after, rel=1e-5)
    assert torch.allclose(matrix.grad / vector.grad[0], torch.tensor([[4.0], [-5.0]]))


def test_the_norm_of_no_gradients_is_zero_and_any_size_is_computed_in_large_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gradient_norm([]).item() == 0
    sizes = []
    norm = torch.linalg.vector_norm

    def counted(values: torch.Tensor, **keys: Any) -> torch.Tensor:
        sizes.append(values.shape)
        return norm(values, **keys)

    monkeypatch.setattr(torch.linalg, "vector_norm", counted)
    gradients = [torch.ones(3, 4099), torch.ones(0), torch.ones(2, 4).T]
    assert gradient_norm(gradients).item() == pytest.approx(math.sqrt(3 * 4099 + 8))
    assert sizes == [(3, 4096), (1, 9), (0, 4096), (1, 0), (0, 4096), (1, 8), (3 + 1 + 1 + 1,)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_norm_of_a_non_finite_gradient_is_non_finite(bad: float) -> None:
    assert not gradient_norm([torch.ones(2, 2), torch.tensor([1.0, bad])]).isfinite()


@pytest.mark.soak  # compiles
def test_gradients_of_a_compiled_model_repeat() -> None:
    """Threads add to the same rows of the table; their speed must not decide the order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        numerics.repeat_compiled_gradients()
        gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=128, vocab_size=300), seed=0)
        forward = torch.compile(gpt, fullgraph=True)
        tokens = torch.randint(20, (64, 129))
        found = [
            torch.autograd.grad(forward(tokens[:, :-1], tokens[:, 1:]), gpt.wte.weight)[0]
            for _ in range(5)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, found[0]) for gradient in found)
