"""Of train.gpus: what is said where a GPU cannot be used. The machine is files and answers here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.runtime.errors import UserError
from train.distributed import devices
from train.distributed.devices import device_type

OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
NEW = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC\n"


def box(folder: Path, driver: str | None, gpus: int = 1) -> tuple[Path, Path]:
    """The two folders in which Linux shows a driver and GPUs."""
    proc, dev = folder / "proc", folder / "dev"
    for path in (proc / "driver/nvidia", dev):
        path.mkdir(parents=True)
    if driver:
        (proc / "driver/nvidia/version").write_text(driver)
    (dev / "nvidiactl").touch()
    for number in range(gpus):
        (dev / f"nvidia{number}").touch()
    return proc, dev


@pytest.fixture(autouse=True)
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_an_old_driver_is_named_with_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    said = devices.hindrance(*box(tmp_path, OLD))
    assert said
    assert all(word in said for word in ("driver 535", "CUDA 13.0", "580", "whl/cu126"))
    assert "\n" not in said


def test_a_driver_that_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "nvidia-smi" in str(devices.hindrance(*box(tmp_path, NEW)))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert "too old" not in str(devices.hindrance(*box(tmp_path / "b", OLD)))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for CPUs" in str(devices.hindrance(*box(tmp_path / "c", NEW)))


def test_nothing_is_said_where_no_gpu_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, dev = box(tmp_path, OLD, gpus=0)  # a container without GPUs sees the host's driver
    assert devices.hindrance(proc, dev) is None
    proc, dev = box(tmp_path / "b", OLD)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.hindrance(proc, dev) is None


def test_what_is_said_reaches_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("train.distributed.world.hindrance", lambda: "the driver is too old")
    with pytest.raises(UserError, match=r"GPT2_DEVICE.*cuda, but the driver is too old"):
        device_type("cuda")
    assert device_type("auto") == "cpu"
    assert "warning: computing on the CPU: the driver is too old" in capsys.readouterr().err
    assert device_type("cpu") == "cpu"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("capability", "dtype", "words"),
    [
        ((8, 0), "bfloat16", None),
        ((8, 9), "bfloat16", None),
        ((9, 0), "bfloat16", None),
        ((7, 5), "float32", None),
        ((7, 5), "bfloat16", ["train.dtype", "Some GPU", "float32"]),
        ((7, 0), "float32", ["GPT2_DEVICE", "sm_70", "sm_75, sm_80", "cu126"]),
        ((11, 0), "bfloat16", ["sm_110"]),
    ],
)
def test_gpus_that_cannot_compute_the_run(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: str,
    words: list[str] | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90"])
    if words is None:
        devices.check(dtype, compiled=False)  # type: ignore[arg-type]
        return
    with pytest.raises(UserError) as error:
        devices.check(dtype, compiled=False)  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words)


def test_compiling_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    devices.check("bfloat16", compiled=False)
    with pytest.raises(UserError, match=r"GPT2_COMPILE.*C compiler.*compile: false"):
        devices.check("bfloat16", compiled=True)
