"""The devices that training computes on: which and how many, and what keeps it from a GPU."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import torch

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine, usable_cores

# The oldest NVIDIA driver for a major version of CUDA (NVIDIA, "CUDA Compatibility").
OLDEST_DRIVER = {12: 525, 13: 580}
OLDER_BUILD = "https://download.pytorch.org/whl/cu126"  # for drivers that CUDA 13 refuses


def device_type(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """What a machine computes on.

    Raises:
        UserError: CUDA is asked for and absent.
    """
    if wanted == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    why = hindrance()
    if wanted == "cuda":
        raise UserError(
            f"device (machine.yaml, GPT2_DEVICE): cuda, but {why or 'PyTorch sees none; use auto'}"
        )
    if why:
        print(f"warning: computing on the CPU: {why}", file=sys.stderr, flush=True)
    return "cpu"


def default_processes(kind: Literal["cpu", "cuda"], cores: int | None = None) -> int:
    """Processes on this node where nobody says: each GPU one, or two on a CPU.

    Args:
        kind: What is computed on.
        cores: Of a CPU, that may be used; None: all.
    """
    return torch.cuda.device_count() if kind == "cuda" else min(2, cores or usable_cores())


def processes_here(machine: Machine, kind: Literal["cpu", "cuda"]) -> int:
    """Processes on this node: as the machine's settings say, else as many as serve it.

    Raises:
        UserError: More than there are GPUs.
    """
    default = default_processes(kind, machine.cores)
    processes = machine.processes or default
    if kind == "cuda" and processes > default:
        raise UserError(
            f"processes (machine.yaml, GPT2_PROCESSES): {processes}, but there are {default} GPUs; "
            "use as many, or device: cpu"
        )
    return processes


def hindrance(proc: Path = Path("/proc"), dev: Path = Path("/dev")) -> str | None:
    """Why PyTorch sees no GPU where there is one; None where there is none, or none is wanted.

    Args:
        proc: Where Linux tells the version of the driver.
        dev: Where each GPU is a file, also in a container that was given some.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not any(dev.glob("nvidia[0-9]*")):
        return None
    try:
        told = (proc / "driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3,})\.\d+", told)
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
            f"{needed} or newer; update it, or take the build for CUDA 12.6 "
            f"(pip install --force-reinstall torch=={version} --index-url {OLDER_BUILD})"
        )
    return f"the NVIDIA driver {driver} is there, but gives PyTorch no GPU; see nvidia-smi"


def check(dtype: Literal["float32", "bfloat16"], compiled: bool) -> None:
    """Refuses GPUs that could not compute the run, or only in emulation.

    Args:
        dtype: Of the matrix products.
        compiled: Whether the model is compiled.

    Raises:
        UserError: Names what is missing, and the mend.
    """
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    builds = torch.cuda.get_arch_list()  # "sm_80", ...
    if not any(_runs(build, capability) for build in builds):
        raise UserError(
            f"device (machine.yaml, GPT2_DEVICE): {name} is sm_{capability[0]}{capability[1]}, and "
            f"this PyTorch is built for {', '.join(builds)}; take a build that has it "
            f"({OLDER_BUILD} has older GPUs), or device: cpu"
        )
    if dtype == "bfloat16" and capability < (8, 0):
        raise UserError(
            f"params.yaml: train.dtype: bfloat16, which {name} has only in emulation, slower than "
            "float32; take float32, or a GPU of the Ampere generation or later"
        )
    if compiled and (lacking := _lacking_to_compile()):
        raise UserError(
            f"compile (machine.yaml, GPT2_COMPILE): Triton needs {lacking}; install it (apt-get "
            "install gcc python3-dev), or set compile: false, which is slower"
        )


def _runs(build: str, capability: tuple[int, int]) -> bool:
    """Whether code runs on a GPU: "sm_86" on its generation, 8.6 to 8.9; "compute_90" on later."""
    number = re.sub(r"\D", "", build)
    made_for = int(number[:-1]), int(number[-1])
    return made_for <= capability and ("compute" in build or made_for[0] == capability[0])


def _lacking_to_compile() -> str | None:
    """What Triton looks for on a machine and does not find (triton/runtime/build.py)."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers (Python.h)"
    return None
