"""Numerics and devices: autocast, gradient norm, deterministic algorithms, memory, and versions."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import torch
from torch import Tensor

from train.distributed import compiler

Dtype = Literal["float32", "bfloat16", "float16"]

# Values of ONEDNN_MAX_CPU_ISA that leave a CPU its instructions for bfloat16 (oneDNN, "CPU
# dispatcher control").
_ISA_WITH_BFLOAT16 = ("ALL", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10", "_AMX")

PIECE = 4096  # elements whose squares are added in float32, at most


def summed_loss(forward: Any, inputs: Tensor, targets: Tensor, dtype: Dtype) -> Tensor:
    """Compute the loss of a batch, summed over its targets.

    Args:
        forward: A GPT, also compiled or wrapped in DDP.
        inputs: (B, T) int64.
        targets: (B, T) int64; -100 is ignored.
        dtype: Type of the matrix products; all but "float32" by autocast.

    Returns:
        Scalar float32, nats.
    """
    with autocast(inputs.device, dtype):
        loss: Tensor = forward(inputs, targets, reduction="sum")
    return loss


def autocast(device: torch.device, dtype: Dtype) -> torch.autocast:
    """Context in which matrix products are computed in `dtype`."""
    narrow = torch.float16 if dtype == "float16" else torch.bfloat16
    return torch.autocast(device.type, narrow, enabled=dtype != "float32")


def native_dtype(device: Literal["auto", "cpu", "cuda"]) -> Dtype:
    """Return what `train.dtype: auto` becomes, given the setting `device`.

    bfloat16 where the device has instructions for it: GPUs of the Ampere generation or later, CPUs
    with AVX512-BF16, AMX, or ARM's BF16. Elsewhere it would be emulated, slower than float32. The
    tensor cores of Volta and Turing compute float16.
    """
    if device != "cpu" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability >= (8, 0):
            return "bfloat16"
        return "float16" if capability >= (7, 0) else "float32"
    return "bfloat16" if _cpu_has_bfloat16() else "float32"


def _cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether PyTorch's kernels compute bfloat16 natively on this CPU.

    The variables by which PyTorch and oneDNN are limited to older instructions count as an older
    CPU. Where there is no `/proc` (macOS), PyTorch has no such kernels.
    """
    flags = set(_cpuinfo(_FLAGS, cpuinfo).split())
    if "bf16" in flags:  # ARM
        return "ATEN_CPU_CAPABILITY" not in os.environ
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    return (
        bool(flags & {"avx512_bf16", "amx_bf16"})
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and any(part in isa for part in _ISA_WITH_BFLOAT16)
    )


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Compute the 2-norm of all gradients together.

    On a CPU PyTorch adds the squares of a tensor in a few float32 accumulators, which is 1e-3 off
    for the 38M elements of GPT-2's token table. Here float32 adds only pieces of a tensor, and
    float64 the pieces: within 1e-6, as fast. On CUDA PyTorch adds in a tree, which is as exact.

    Args:
        gradients: Of any shape, on one device; none have the norm 0.

    Returns:
        Scalar float32 on that device.
    """
    if not gradients:
        return torch.zeros(())
    if gradients[0].is_cuda:
        return torch.nn.utils.get_total_norm(gradients)
    norms = []
    for gradient in gradients:
        flat = gradient.reshape(-1)
        whole = len(flat) - len(flat) % PIECE
        for pieces in (flat[:whole].view(-1, PIECE), flat[whole:].view(1, -1)):
            norms.append(torch.linalg.vector_norm(pieces, dim=1))
    norm: Tensor = torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64).float()
    return norm


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale the gradients so that their norm is at most ``limit``; None: leave them.

    Returns:
        The norm before, as in `gradient_norm`.
    """
    parameters = list(parameters)
    norm = gradient_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def configure(device: torch.device, *, deterministic: bool) -> None:
    """On CUDA, use TF32 for float32 products, and deterministic algorithms if asked."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def repeat_compiled_gradients() -> None:
    """Have models that are compiled for a CPU repeat bit for bit with several threads.

    Inductor turns the backward pass of an embedding into additions by all threads at once, in any
    order. Without that rule it calls PyTorch's kernel, in which each row belongs to one thread.
    `use_deterministic_algorithms` does so too, but replaces kernels of the loss as well, for a
    tenth of a step or more.
    """
    # Private: there is no public switch. Registered as a fallback here, without a warning: inductor
    # does so by itself on first use, but ends in an error where the variable CI is set.
    from torch._inductor.decomposition import decompositions
    from torch._inductor.lowering import make_fallback

    backward = torch.ops.aten.embedding_dense_backward.default
    if decompositions.pop(backward, None) is not None:
        make_fallback(backward, warn=False)


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def gpu_memory(device: torch.device) -> int | None:
    """Memory of a GPU in bytes, whatever of it is free; None for a CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a GPU or the CPU could not allocate memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


_MATH_SETTINGS = (
    "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA",
)  # fmt: skip


def environment(device: torch.device, *, compiled: bool = False) -> dict[str, str]:
    """What the last bits depend on in addition to parameters, samples and settings of a run.

    Returns:
        Versions of PyTorch, which brings its libraries, of the C library, whose cosine the schedule
        uses, and of safetensors, because files are hashed; the processor, or the GPU with its
        libraries; on a CPU the instructions that PyTorch uses, and the variables that limit MKL's
        and oneDNN's; of a compiled model the variables of Inductor and, on a CPU, the compiler.
    """
    found = {
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "libc": " ".join(platform.libc_ver()),
    }
    if compiled:
        prefix, no_matter = "TORCHINDUCTOR_", ("CACHE_DIR", "COMPILE_THREADS")
        found |= {
            name: value
            for name, value in os.environ.items()
            if name.startswith(prefix) and name.removeprefix(prefix) not in no_matter
        }
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return {
            **found,
            "gpu": f"{torch.cuda.get_device_name(device)} ({capability})",
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        }
    return {
        **found,
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "flags": _simd_flags(),
        **{name: os.environ[name] for name in _MATH_SETTINGS if name in os.environ},
        **({"compiler": compiler.version()} if compiled else {}),
    }


_FLAGS = "flags|Features"  # on x86, and on ARM


def _cpuinfo(field: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The first value of a field, a regular expression; empty without one, or without `/proc`."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^(?:{field})\s*:[ \t]*(.*)$", cpuinfo.read_text(), re.MULTILINE):
            return found[1]
    return ""


def _simd_flags() -> str:
    """Vector and matrix instructions of the processor."""
    simd = ("amx", "asimd", "avx", "bf16", "fma", "sve")
    return " ".join(sorted(flag for flag in _cpuinfo(_FLAGS).split() if flag.startswith(simd)))


def _cpu_name() -> str:
    """Name of the processor, or its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }
