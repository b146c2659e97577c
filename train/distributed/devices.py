"""The devices of a node: CPU or GPU, processes to start, and why a GPU cannot be used."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import torch

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from train.numerics import Dtype

# The oldest NVIDIA driver for a major version of CUDA (NVIDIA, "CUDA Compatibility").
OLDEST_DRIVER = {12: 525, 13: 580}
OLDER_BUILD = "https://download.pytorch.org/whl/cu126"  # for drivers that CUDA 13 refuses

DeviceType = Literal["cpu", "cuda"]

# Parameters of glibc's mallopt (man 3 mallopt).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def device_type(wanted: Literal["auto", "cpu", "cuda"]) -> DeviceType:
    """Type of device to compute on; warns on stderr when ``auto`` cannot use a GPU that is there.

    Raises:
        UserError: ``cuda`` is wanted and PyTorch finds no GPU.
    """
    if wanted == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    reason = why_no_gpu()
    if wanted == "cuda":
        raise UserError(
            "device (machine.yaml, GPT2_DEVICE): cuda, but "
            f"{reason or 'PyTorch finds no GPU; use auto'}"
        )
    if reason:
        print(f"warning: computing on the CPU: {reason}", file=sys.stderr, flush=True)
    return "cpu"


def processes_here(machine: Machine, kind: DeviceType) -> int:
    """Processes to start on this node: the `processes` setting; else one per GPU, one on a CPU.

    Raises:
        UserError: There are fewer GPUs.
    """
    if kind == "cpu":
        return machine.processes or 1
    gpus = torch.cuda.device_count()
    if machine.processes and machine.processes > gpus:
        raise UserError(
            f"processes (machine.yaml, GPT2_PROCESSES): {machine.processes}, but there are {gpus} "
            "GPUs; use as many, or device: cpu"
        )
    return machine.processes or gpus


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones, rather than give it back.

    Otherwise every tensor over 32 MB, such as the logits, is mapped again at each step, and the
    system fills all its pages with zeros: half of the time of a small model's step.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def why_no_gpu(proc: Path = Path("/proc"), dev: Path = Path("/dev")) -> str | None:
    """Why PyTorch finds no GPU although there is one, and how to fix it.

    Args:
        proc: Linux's folder with the version of the driver.
        dev: Linux's folder with a file per GPU, also in a container that was given some.

    Returns:
        None where there is no GPU, it is hidden by CUDA_VISIBLE_DEVICES, or there is no driver.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not any(dev.glob("nvidia[0-9]*")):
        return None
    try:
        text = (proc / "driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3,})\.\d+", text)
    driver = int(found[1]) if found else 0
    build, version = torch.version.cuda, torch.__version__.partition("+")[0]
    if build is None:
        return (
            f"this PyTorch ({torch.__version__}) is built for CPUs; install the build for CUDA "
            f"(pip install --force-reinstall torch=={version})"
        )
    needed = OLDEST_DRIVER.get(int(build.partition(".")[0]), 0)
    if driver < needed:
        return (
            f"the NVIDIA driver {driver} is too old for this PyTorch (CUDA {build}), which needs "
            f"{needed} or newer; update it, or install the build for CUDA 12.6 "
            f"(pip install --force-reinstall torch=={version} --index-url {OLDER_BUILD})"
        )
    return f"the NVIDIA driver {driver} gives PyTorch no GPU; see nvidia-smi"


def check_gpu(dtype: Dtype, compiled: bool) -> None:
    """Refuse a GPU that cannot compute the run, or only by emulation.

    Raises:
        UserError: Names what is missing and how to fix it.
    """
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    builds = torch.cuda.get_arch_list()  # "sm_80", ...
    if not any(_supports(build, capability) for build in builds):
        raise UserError(
            f"device (machine.yaml, GPT2_DEVICE): {name} is sm_{capability[0]}{capability[1]}, but "
            f"this PyTorch is built for {', '.join(builds)}; install a build for this GPU "
            f"({OLDER_BUILD} supports older ones), or use device: cpu"
        )
    if dtype == "bfloat16" and capability < (8, 0):
        raise UserError(
            f"params.yaml: train.dtype: bfloat16, but {name} only emulates it, slower than "
            "float32; use auto or float16, or a GPU of the Ampere generation or later"
        )
    if compiled and (missing := _missing_for_triton()):
        raise UserError(
            f"compile (machine.yaml, GPT2_COMPILE): Triton needs {missing}; install it (apt-get "
            "install gcc python3-dev), or set compile: false, which is slower"
        )


def _supports(build: str, capability: tuple[int, int]) -> bool:
    """Whether code runs on a GPU: "sm_86" on its generation, 8.6 to 8.9; "compute_90" on later."""
    number = re.sub(r"\D", "", build)
    target = int(number[:-1]), int(number[-1])
    return target <= capability and ("compute" in build or target[0] == capability[0])


def _missing_for_triton() -> str | None:
    """Return the first build tool that Triton needs and does not find (triton/runtime/build.py)."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers (Python.h)"
    return None
