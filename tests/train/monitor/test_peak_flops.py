"""Tests for train.monitor.peak_flops."""

import pytest
import torch

from train.monitor.peak_flops import GPU_PEAKS, cpu_peak, gpu_peak, peak


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
        ("NVIDIA B200", 2250e12, 1125e12),
        ("Tesla T4", 65e12, 8.1e12),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
        ("Tesla V100S-PCIE-32GB", 130e12, 16.4e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12, 182.1e12),
        ("NVIDIA GeForce RTX 2080 Ti", 53.8e12, 13.4e12),
        ("NVIDIA GeForce RTX 3080", 59.5e12, 29.8e12),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2e12, 44.1e12),
        ("NVIDIA GeForce RTX 5070 Ti", 87.9e12, 43.9e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12, 104.8e12),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name: str, bfloat16: float, float32: float) -> None:
    assert gpu_peak(name, "bfloat16") == pytest.approx(bfloat16)
    assert gpu_peak(name, "float16") == pytest.approx(bfloat16)
    assert gpu_peak(name, "float32") == pytest.approx(float32)


@pytest.mark.parametrize(
    "name", ["Some Accelerator 9", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA T400", "Quadro T4"]
)
def test_an_unknown_gpu_has_no_peak(name: str) -> None:
    assert gpu_peak(name, "bfloat16") is None


def test_longer_names_come_first() -> None:
    """A GPU takes the first name that its own contains: RTX 2080 Ti before RTX 2080."""
    names = list(GPU_PEAKS)
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b]


def test_the_peak_of_a_cpu_is_measured() -> None:
    measured = cpu_peak("float32", seconds=0.02)
    assert 1e8 < measured < 1e14
    assert peak(torch.device("cpu"), "float32") is not None
