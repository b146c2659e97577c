"""Tests for train.monitor.peak_flops."""

import pytest
import torch

from train.monitor.peak_flops import cpu_peak, gpu_peak, peak


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("NVIDIA A10", 125e12, 62.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989.4e12, 494.7e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA L40S", 362e12, 183e12),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name: str, bfloat16: float, float32: float) -> None:
    assert gpu_peak(name, "bfloat16") == pytest.approx(bfloat16)
    assert gpu_peak(name, "float32") == pytest.approx(float32)


def test_an_unknown_gpu_has_no_peak() -> None:
    assert gpu_peak("Some Accelerator 9", "bfloat16") is None


def test_the_peak_of_a_cpu_is_measured() -> None:
    measured = cpu_peak("float32", tries=3)
    assert 1e8 < measured < 1e14
    assert peak(torch.device("cpu"), "float32") is not None
