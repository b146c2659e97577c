"""Tests for train.distributed.devices: why a GPU cannot be used, and memory on a CPU."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from tests.support.repo import REPO
from train.distributed import compiler, devices
from train.distributed.devices import device_type, processes_here
from train.numerics import Dtype

OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
NEW = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC\n"


def simulated_node(folder: Path, driver: str, gpus: int = 1) -> tuple[Path, Path]:
    """The folders `/proc` and `/dev` of a Linux node with a driver and GPUs."""
    proc, dev = folder / "proc", folder / "dev"
    for path in (proc / "driver/nvidia", dev):
        path.mkdir(parents=True)
    (proc / "driver/nvidia/version").write_text(driver)
    (dev / "nvidiactl").touch()
    for number in range(gpus):
        (dev / f"nvidia{number}").touch()
    return proc, dev


@pytest.fixture(autouse=True)
def visible_devices_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_driver_that_is_too_old_is_reported_with_the_version_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    reason = devices.why_no_gpu(*simulated_node(tmp_path, OLD))
    assert reason
    assert all(word in reason for word in ("535", "CUDA 13.0", "580", "whl/cu126"))
    assert "\n" not in reason


def test_a_driver_that_is_new_enough_is_not_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "nvidia-smi" in str(devices.why_no_gpu(*simulated_node(tmp_path, NEW)))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert "nvidia-smi" in str(devices.why_no_gpu(*simulated_node(tmp_path / "b", OLD)))


def test_a_pytorch_build_for_cpus_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = str(devices.why_no_gpu(*simulated_node(tmp_path, NEW)))
    assert f"({torch.__version__})" in reason
    assert "pip install" in reason


def test_no_reason_is_given_where_there_is_no_gpu_or_it_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, dev = simulated_node(tmp_path, OLD, gpus=0)  # a container may see the host's driver
    assert devices.why_no_gpu(proc, dev) is None
    proc, dev = simulated_node(tmp_path / "b", OLD)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.why_no_gpu(proc, dev) is None


def test_the_reason_is_an_error_for_cuda_and_a_warning_for_auto(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "why_no_gpu", lambda: "the driver is too old")
    with pytest.raises(UserError, match=r"GPT2_DEVICE.*the driver is too old"):
        device_type("cuda")
    assert device_type("auto") == "cpu"
    assert "the driver is too old" in capsys.readouterr().err
    assert device_type("cpu") == "cpu"
    assert capsys.readouterr().err == ""


def simulate_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90"])


@pytest.mark.parametrize(
    ("capability", "dtype", "words"),
    [
        ((8, 0), "bfloat16", None),
        ((8, 9), "bfloat16", None),
        ((9, 0), "bfloat16", None),
        ((7, 5), "float32", None),
        ((7, 5), "bfloat16", ["train.dtype", "Some GPU", "float32"]),
        ((7, 0), "float32", ["GPT2_DEVICE", "sm_70", "sm_75, sm_80", "cu126"]),
        ((11, 0), "bfloat16", ["GPT2_DEVICE", "sm_110"]),
    ],
)
def test_a_gpu_that_cannot_compute_the_run_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: Dtype,
    words: list[str] | None,
) -> None:
    simulate_gpu(monkeypatch, capability)
    if words is None:
        devices.check_gpu(dtype, compiled=False)
        return
    with pytest.raises(UserError) as error:
        devices.check_gpu(dtype, compiled=False)
    assert all(word in str(error.value) for word in words)


def test_compiling_without_a_c_compiler_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate_gpu(monkeypatch, (8, 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    devices.check_gpu("bfloat16", compiled=False)
    with pytest.raises(UserError, match=r"GPT2_COMPILE.*C compiler.*compile: false"):
        devices.check_gpu("bfloat16", compiled=True)


def test_a_cpu_with_avx2_trains_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "AVX2" in str(compiler.why_eager(None, "cpu", 1e18))
    assert compiler.why_eager(True, "cpu", 1e18) is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CXX", "/dev/null/g++"), ("CXX", "false"), ("TORCHINDUCTOR_CACHE_DIR", "/dev/null")],
)
def test_compiling_on_a_cpu_needs_a_compiler_and_a_cache(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    if shutil.which("g++"):
        compiler.check_compiler("cpu")
    assert compiler.why_eager(None, "cpu", 1e9) == "a short run"  # tries no compiler
    assert compiler.why_eager(True, "cpu", 1e9) is None
    assert compiler.why_eager(None, "cuda", 1e9) is None
    assert compiler.why_eager(False, "cuda", 1e18)
    monkeypatch.setenv(variable, value)
    assert "compile" in str(compiler.why_eager(None, "cpu", 1e18))
    with pytest.raises(UserError, match=r"^compile \(machine.yaml, GPT2_COMPILE\)"):
        compiler.check_compiler("cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert processes_here(Machine(), "cuda") == 2
    assert processes_here(Machine(processes=1), "cuda") == 1
    with pytest.raises(UserError, match=r"GPT2_PROCESSES\): 3, but there are 2 GPUs"):
        processes_here(Machine(processes=3), "cuda")


# Page faults of 20 tensors of 64 MB, one after the other, after the first ones.
COUNT_FAULTS = """
import resource, sys, torch
from train.distributed.devices import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(10):
    torch.ones(1 << 24)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    def faults(how: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", COUNT_FAULTS, how], cwd=REPO))

    assert faults("keep") * 100 < faults("return")
