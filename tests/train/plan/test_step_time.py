"""Tests for train.plan.step_time: published runs, and PyTorch's count of operations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from tests.benchmarks.plan import PUBLISHED, Published
from train.optim.param_groups import decay_groups, make_optimizer
from train.plan.accelerators import LARGE, SMALL, accelerator
from train.plan.step_time import Cluster, all_reduce_bytes, muon_flops, step_time, traffic

GPT2 = GPTConfig.named("gpt2")


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda r: f"{r.name} {r.hardware} {r.sizes}")
def test_published_run_at_the_assumed_mfu(run: Published) -> None:
    assert run.plan().step.total == pytest.approx(run.seconds, rel=0.2)


def test_mfu_grows_from_the_smallest_to_the_largest_size_and_stays_there() -> None:
    h100 = accelerator("h100")
    sizes = (1e7, SMALL, 4e8, LARGE, 1e12)
    tiny, small, middle, large, huge = (h100.assumed_mfu(int(size)) for size in sizes)
    assert (tiny, huge) == (small, large) == h100.mfu
    assert small < middle < large


def test_traffic_grows_with_micro_steps_and_loss_chunks() -> None:
    chunk = 12 * 50304 * 768  # bytes: the table's gradient in bfloat16 and its sum in float32
    assert traffic(GPT2, 16, "bfloat16") == 24 * 124_475_904 + 11 * chunk
    assert traffic(GPT2, 64, "bfloat16") == 24 * 124_475_904 + 43 * chunk
    large = dataclasses.replace(GPT2, loss_chunk=8192)
    assert traffic(GPT2, 16, "bfloat16") - traffic(large, 16, "bfloat16") == 9 * chunk
    assert traffic(GPT2, 1, "float32") == 12 * 124_475_904 + 16 * 50304 * 768
    usual, more = (step_time(GPT2, cluster(), 524288, 4, extra_bytes=n) for n in (0, 10**9))
    assert usual.traffic == 0
    assert more.traffic == pytest.approx(1e9 / (0.8 * 2039e9))
    assert more.compute == pytest.approx(usual.compute + more.traffic)


def test_muon_flops_match_pytorch_count() -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100)
    gpt = GPT(config)
    optimizer = make_optimizer(
        decay_groups(gpt.named_parameters(), embeddings_decay=True),
        "muon",
        learning_rate=1e-3,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for parameter in gpt.parameters():
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == muon_flops(config)


def cluster(hardware: str = "a100-80", nodes: int = 1, network: float | None = None) -> Cluster:
    device = accelerator(hardware)
    return Cluster(
        accelerator=device, nodes=nodes, gpus=8, link=device.link(), network=network,
        peak=device.peak("bfloat16"), mfu=0.5,
    )  # fmt: skip


def test_all_reduce_is_a_ring_limited_by_its_slowest_link() -> None:
    parameters = 124_439_808 + 47 * 768  # with padding rows
    assert all_reduce_bytes(GPT2, 1) == 0
    assert all_reduce_bytes(GPT2, 8) == pytest.approx(2 * 7 / 8 * 4 * parameters)
    one = step_time(GPT2, cluster(), 524288, 4)
    assert one.all_reduce == pytest.approx(all_reduce_bytes(GPT2, 8) / (0.75 * 300e9))
    two = step_time(GPT2, cluster(nodes=2, network=25e9), 524288, 4)
    assert two.all_reduce == pytest.approx(all_reduce_bytes(GPT2, 16) / (0.75 * 25e9 / 8))
    # With a fast network, NVLink is the slowest link.
    quick = step_time(GPT2, cluster(nodes=2, network=1e13), 524288, 4)
    assert quick.all_reduce == pytest.approx(all_reduce_bytes(GPT2, 16) / (0.75 * 300e9))


def test_overlap_hides_all_but_the_token_table() -> None:
    plain = step_time(GPT2, cluster(), 524288, 4)
    hidden = step_time(GPT2, cluster(), 524288, 4, overlap=True)
    assert plain.exposed == plain.all_reduce
    assert hidden.exposed == pytest.approx(plain.all_reduce * 50304 * 768 / 124_475_904)
    # What takes longer than the backward pass of the last micro-step is exposed.
    slow = step_time(GPT2, cluster(nodes=2, network=1e9), 524288, 4, overlap=True)
    assert slow.exposed == pytest.approx(slow.all_reduce - 2 / 3 * slow.compute / 4)


def test_checkpointed_blocks_run_forward_twice() -> None:
    plain = step_time(GPT2, cluster(), 524288, 4)
    twice = step_time(GPT2, cluster(), 524288, 4, checkpoint_activations=True)
    head = 3 * 2 * 50304 * 768 / 854_654_976  # of the operations; it is computed once
    assert twice.compute / plain.compute == pytest.approx(1 + (1 - head) / 3, rel=1e-3)


def test_processes_share_a_cpu() -> None:
    cpu = dataclasses.replace(cluster("cpu"), peak=1e12)
    alone = dataclasses.replace(cpu, gpus=1)
    assert cpu.speed == alone.speed / 8
    assert cpu.memory == alone.memory / 8
