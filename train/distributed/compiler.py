"""Whether a model is compiled with torch.compile, and why it cannot be."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path

from pipeline.runtime.errors import UserError

# Compiling takes some time and makes the steps faster, so it pays in runs of some minutes. Two
# cores compute 1e11 FLOP/s without it.
LONG = 1.5e13  # FLOPs of a run


def why_eager(setting: bool | None, device: str, flops: float) -> str | None:
    """Why a run is not compiled; None where it is.

    Args:
        setting: `compile` of machine.yaml; None: compiled on a GPU, and on a CPU if the run has at
            least `LONG` operations and torch.compile works.
        device: "cpu" or "cuda".
        flops: Operations of the run.
    """
    if setting is False:
        return "compile (machine.yaml, GPT2_COMPILE) is false"
    if setting or device == "cuda":
        return None
    if flops < LONG:
        return "a short run"
    import torch

    # PyTorch 2.13: the first loss is NaN. With AVX-512 compiled and eager losses agree.
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return "code compiled for AVX2 computes NaN"
    return why_not_compile(device)


_PROBE = """
#include <cmath>
#include <Python.h>
#ifdef _OPENMP
#include <omp.h>
#endif
"""


def check_compiler(kind: str) -> None:
    """Refuse to compile where torch.compile does not work.

    Raises:
        UserError: Names what does not work and how to fix it.
    """
    if reason := why_not_compile(kind):
        raise UserError(f"compile (machine.yaml, GPT2_COMPILE): {reason}, or set compile: false")


def why_not_compile(kind: str) -> str | None:
    """Why torch.compile does not work here, and how to fix it; None where it works.

    It needs a cache that can be written and, on a CPU, a C++ compiler, which is tried in a second.
    `check_gpu` asks for what Triton needs.
    """
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # takes 3 s, makes folders

        cache = cache_dir()
        with tempfile.TemporaryDirectory(dir=cache):
            pass
    except OSError as error:
        return (
            f"torch.compile cannot write its cache ({error}); set TORCHINDUCTOR_CACHE_DIR to "
            "another folder"
        )
    if kind == "cpu" and (reason := _why_no_cpp(_cpp(), cache)):
        return (
            f"the C++ compiler does not work ({reason}); install it (apt-get install g++ "
            "python3-dev), name another in CXX"
        )
    return None


def _cpp() -> str:
    """The C++ compiler that torch.compile calls (torch._inductor.config.cpp)."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


@lru_cache
def version() -> str:
    """First line of the C++ compiler's version; empty where there is none."""
    try:
        done = subprocess.run(
            [_cpp(), "--version"], capture_output=True, text=True, errors="replace"
        )
    except OSError:
        return ""
    return done.stdout.partition("\n")[0]


@lru_cache
def _why_no_cpp(compiler: str, cache: str) -> str | None:
    """Build and load a library as torch.compile does; return why that fails."""
    flags = ["-fPIC", "-I", sysconfig.get_paths()["include"]]
    mac = sys.platform == "darwin"
    flags += ["-undefined", "dynamic_lookup"] if mac else ["-fopenmp"]
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        library = Path(folder) / "probe.so"
        command = [compiler, "-shared", *flags, "-x", "c++", "-", "-o", str(library)]
        try:
            done = subprocess.run(
                command, input=_PROBE, capture_output=True, text=True, errors="replace"
            )
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line]
                return (errors or [f"{compiler} exited with status {done.returncode}"])[0]
            ctypes.CDLL(str(library))
        except OSError as error:
            return str(error)
    return None
