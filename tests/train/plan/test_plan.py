"""Tests for train.plan: what fits, how long it takes, and what is warned of or refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.params import SourceParams
from pipeline.runtime.errors import UserError
from tests.support.repo import REPO
from train.plan import __main__ as plan_command
from train.plan.accelerators import NAMES, accelerator
from train.plan.estimate import Options, Plan, make_plan
from train.preset import Parameters, load, preset_files

ONE_GPU = ("one-gpu", "one-hour")
BIG = (
    *ONE_GPU,
    "fineweb-10b",
    "fineweb-edu-10b",
    "gpt2-large",
    "gpt2-medium",
    "gpt2-xl",
    "speedrun",
)


@pytest.fixture(autouse=True)
def _in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(REPO / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)


def plan(preset: str | None = "fineweb-10b", **options: Any) -> Plan:
    return make_plan(load(preset), Options(**options))


def test_leaves_cost_memory_and_may_be_dear() -> None:
    usual = plan(gpus=4)
    params = load("fineweb-10b")

    def leaves_of(size: int, gpus: int = 4) -> Plan:
        train = params.train.model_copy(update={"invariant": size, "deterministic": True})
        return make_plan(replace(params, train=train), Options(gpus=gpus))

    found = leaves_of(32)  # 16 leaves, 4 per process: three gradients at a time
    assert found.memory.gradients == 3 * usual.memory.gradients
    assert found.step.all_reduce == usual.step.all_reduce  # one node per process
    assert not any("train.invariant" in line for line in found.warnings)
    assert any("train.invariant" in line for line in leaves_of(1).warnings)
    assert leaves_of(32, gpus=3).step.all_reduce > 1.2 * found.step.all_reduce


def test_fineweb_10b_on_eight_a100() -> None:
    found = plan()
    assert found.fits
    assert found.warnings == ()
    assert (found.parameters, found.steps, found.tokens) == (124_439_808, 19_560, 10_255_073_280)
    assert found.seconds < 2 * 3600
    assert plan(mfu=0.26).seconds < 4 * 3600
    assert found.epochs == pytest.approx(0.998, abs=0.01)
    assert found.corpus is not None
    assert found.corpus.files == 15
    assert 515 <= found.corpus.shards <= 520
    assert found.micro_batch * found.micro_steps * found.world * 1024 == 524_288
    assert found.micro_batch == 64  # as training chooses
    assert plan(hardware="cpu", gpus=4).micro_batch == 1


def test_time_and_price_scale_with_gpus_and_mfu() -> None:
    one, eight = plan(gpus=1, rate=2.0), plan(gpus=8, rate=2.0)
    assert 7.5 < one.seconds / eight.seconds < 8
    assert one.dollars == pytest.approx(2.0 * one.seconds / 3600)
    assert eight.dollars == pytest.approx(2.0 * 8 * eight.seconds / 3600)
    typical = plan()
    assert typical.rate is not None
    assert typical.rate == accelerator("a100-80").price
    assert typical.dollars == pytest.approx(8 * typical.rate * typical.seconds / 3600)
    assert plan(hardware="cpu", gpus=2).dollars is None
    half = plan(mfu=0.26)
    products = typical.step.compute - typical.step.traffic
    assert half.step.compute - half.step.traffic == pytest.approx(2 * products)
    assert half.step_mfu == pytest.approx(0.26 * 2 * products / half.step.total)


def test_micro_batch_and_loss_chunk_change_the_time_of_a_step() -> None:
    usual = plan(micro_batch=16, loss_chunk=1490)
    assert usual.step.traffic == 0
    assert (usual.loss_chunks, usual.loss_chunk) == (11, 1490)
    saving = (plan(), plan(micro_batch=64, loss_chunk=1490), plan(micro_batch=16, loss_chunk=8192))
    costing = (plan(micro_batch=1), plan(micro_batch=16, loss_chunk=512))
    assert all(found.step.traffic < 0 for found in saving)
    assert all(found.step.traffic > 0 for found in costing)
    assert saving[0].step.total == min(found.step.total for found in saving)
    whole = plan(micro_batch=16, loss_chunk=1_000_000)
    assert (whole.loss_chunks, whole.loss_chunk) == (1, 16 * 1024)
    for found in (*saving, *costing):
        assert found.step.compute == pytest.approx(usual.step.compute + found.step.traffic)


def growing(params: Parameters) -> Parameters:
    """The same with a quarter of the batch at first, then half."""
    update = {"batch_doublings": 2, "batch_ramp_steps": 1000}
    return replace(params, train=params.train.model_copy(update=update))


def test_growing_batch_takes_fewer_tokens_in_as_many_steps() -> None:
    params = growing(load("fineweb-10b"))
    found = make_plan(params, Options())
    assert found.tokens == params.train.batches(1024)(19_560)[0] * 1024 < 19_560 * 524_288
    overhead = found.step.exposed + found.step.optimizer
    compute = found.tokens / 524_288 * found.step.compute
    assert found.training_seconds == pytest.approx(compute + 19_560 * overhead)
    with pytest.raises(UserError, match=r"train\.batch_tokens / 2\^2 .*131072"):
        make_plan(params, Options(gpus=3))


def test_largest_micro_batch_fits_and_twice_it_does_not() -> None:
    found = plan("gpt2-large", hardware="a100-40")
    params = load("gpt2-large")
    share = params.train.batch_tokens // 1024 // 8
    most = found.largest_micro_batch
    assert share % most == 0
    assert plan("gpt2-large", hardware="a100-40", micro_batch=most).fits
    assert not plan("gpt2-large", hardware="a100-40", micro_batch=2 * most).fits


def test_problems_are_warned_of_with_the_setting_that_helps() -> None:
    tight = plan("gpt2-large", hardware="a100-40", micro_batch=16)
    assert not tight.fits
    (warning,) = tight.warnings
    assert f"GPT2_MICRO_BATCH={tight.largest_micro_batch}" in warning

    none = plan("gpt2-xl", hardware="l4")
    assert none.largest_micro_batch == 0
    assert "--checkpoint-activations" in none.warnings[0]

    slow = plan(nodes=2, network=1.0)
    (warning,) = slow.warnings
    assert "--overlap" in warning
    overlapped = plan(nodes=2, network=1.0, overlap=True)
    assert overlapped.step.exposed < slow.step.exposed
    assert "--overlap" not in str(overlapped.warnings)

    params = load()
    steps = {"steps": 10_000, "warmup_steps": 10}
    many = replace(params, train=params.train.model_copy(update=steps))
    (warning,) = make_plan(many, Options(hardware="cpu", gpus=1)).warnings
    assert "train.steps" in warning


def test_auto_is_the_type_that_the_hardware_computes() -> None:
    params = load("fineweb-10b")
    auto = replace(params, train=params.train.model_copy(update={"dtype": "auto"}))
    for hardware, peak in (("t4", 65e12), ("v100", 125e12), ("rtx5090", 209.5e12)):
        found = make_plan(auto, Options(hardware=hardware, gpus=1))
        assert found.peak == peak
        assert not any("train.dtype" in warning for warning in found.warnings)
    for dtype, hardware in (("bfloat16", "t4"), ("float32", "t4"), ("float32", "h100")):
        params = replace(params, train=params.train.model_copy(update={"dtype": dtype}))
        found = make_plan(params, Options(hardware=hardware, gpus=1))
        assert any("train.dtype" in warning for warning in found.warnings)


def test_checkpointed_activations_save_memory_and_cost_time() -> None:
    plain, twice = plan("gpt2-xl"), plan("gpt2-xl", checkpoint_activations=True)
    assert twice.memory.total < plain.memory.total
    assert twice.step.compute > plain.step.compute
    assert twice.step_mfu < plain.step_mfu


@pytest.mark.parametrize("hardware", NAMES)
def test_table_shows_the_plan_of_every_hardware(
    hardware: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_command.main(["--preset", "fineweb-10b", "--hardware", hardware, "--mfu", "0.4"])
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if not line.startswith("warning: ")]
    assert max(map(len, lines)) <= 120
    found = plan(hardware=hardware, mfu=0.4)
    for figure in (
        f"{found.parameters:,}",
        f"{found.memory.activations / 2**30:.2f} GiB",
        f"{found.tokens:,}",
        f"{found.disk_bytes / 1e9:,.2f} GB",
    ):
        assert f" {figure}" in shown, figure
    assert f" {found.loss_chunks} " in shown
    device = accelerator(hardware)
    assert device.mfu_source.startswith(("assumed", "a guess"))
    if device.price is not None:
        assert f" ${device.price:.2f} per hour; {device.price_source}" in shown
        assert re.search(r"\b202\d\b", device.price_source)


@pytest.mark.parametrize("preset", preset_files())
def test_every_preset_has_a_plan_that_changes_no_file(preset: str) -> None:
    before = Path("params.yaml").read_bytes()
    found = plan(preset, hardware="h200")
    assert Path("params.yaml").read_bytes() == before
    assert found.fits
    assert found.corpus is not None
    if preset in BIG:
        assert found.epochs is not None
        assert found.epochs < 1.02
        assert found.warnings == ()


def test_presets_for_one_gpu_take_the_time_in_their_names() -> None:
    for hardware in ("rtx4090", "l4", "a100-40"):
        night = plan("one-gpu", hardware=hardware, gpus=1)
        assert night.fits
        assert night.seconds < 12 * 3600
    for hardware in (name for name in NAMES if name != "cpu"):
        assert plan("one-gpu", hardware=hardware, gpus=1).fits
        assert plan("one-hour", hardware=hardware, gpus=1).seconds < 3600


def test_larger_loss_chunk_takes_more_memory() -> None:
    plain, large = (plan(micro_batch=16, loss_chunk=n) for n in (1490, 8192))
    more = (8192 - 1490) * 50_304 * (4 + 2)  # logits and their gradient
    assert large.memory.total - plain.memory.total == pytest.approx(more, rel=0.3)


def test_json_has_all_figures_and_their_sums(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command.main(["--preset", "mini", "--hardware", "cpu", "--gpus", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["memory"]["total"] == sum(
        v for part, v in found["memory"].items() if part != "total"
    )
    assert found["seconds"] == pytest.approx(
        found["training_seconds"] + found["evaluation_seconds"]
    )
    assert found["options"]["hardware"] == "cpu"
    assert found["options"]["gpus"] == 4
    assert found["dollars"] is None


def test_default_is_this_machine_as_train_launch_would_use_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(*flags: str) -> dict[str, Any]:
        plan_command.main([*flags, "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["options"]
        return found

    for name, value in {"DEVICE": "cpu", "PROCESSES": 4, "MICRO_BATCH": 2}.items():
        monkeypatch.setenv(f"GPT2_{name}", str(value))
    found = options()
    assert (found["hardware"], found["gpus"], found["micro_batch"]) == ("cpu", 4, 2)
    assert options("--gpus", "2", "--micro-batch", "1")["gpus"] == 2
    other = options("--hardware", "h100")  # the settings are those of this machine only
    assert (other["gpus"], other["micro_batch"]) == (8, None)

    properties = SimpleNamespace(name="NVIDIA H200", total_memory=int(139.8 * 2**30))
    monkeypatch.setattr(plan_command, "device_type", lambda wanted: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setenv("GPT2_PROCESSES", "")
    found = options("--preset", "fineweb-10b", "--gpus", "4")
    assert (found["hardware"], found["gpus"]) == ("h200", 4)
    properties.name = "NVIDIA P100"
    with pytest.raises(UserError, match=r"--hardware.*P100.*h200.*--mfu"):
        options()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--hardware", "a100"], ["--hardware a100", "a100-40, a100-80, h100"]),
        (["--hardware", "l4", "--interconnect", "nvlink"], ["--interconnect", "l4", "pcie"]),
        (["--preset", "fineweb"], ["preset fineweb", "fineweb-10b"]),
        (["--preset", "fineweb-10b", "--gpus", "7"], ["train.batch_tokens", " 7 "]),
        (["--preset", "fineweb-10b", "--micro-batch", "7"], ["micro_batch", "7"]),
        (["--mfu", "40"], ["--mfu", "40"]),
        (["--rate", "free"], ["--rate", "free"]),
        (["--gpus", "0"], ["--gpus", "0"]),
    ],
)
def test_mistake_is_named(
    arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((UserError, SystemExit)) as raised:
        plan_command.main(arguments)
    message = str(raised.value)
    if isinstance(raised.value, SystemExit):  # from argparse
        assert raised.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
    assert all(text in message for text in named), message


def test_mistake_exits_with_status_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train.plan", "--hardware", "tpu"],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --hardware tpu")
    assert done.stderr.count("\n") == 1


def test_a_mixture_has_epochs_per_source_as_far_as_sizes_are_known() -> None:
    params = load("fineweb-10b")
    mine = SourceParams(kind="files", paths=["/corpus/*.parquet"])
    train = params.train.model_copy(update={"mixture": {"main": 3.0, "mine": 1.0}})
    params = replace(params, sources={**params.sources, "mine": mine}, train=train)
    found = make_plan(params, Options(hardware="h200"))
    assert found.source_shares == {"main": 0.75, "mine": 0.25}
    assert found.source_epochs["main"] == pytest.approx(0.75 * 10.255e9 / 10.28e9, rel=1e-2)
    assert (found.source_epochs["mine"], found.epochs, found.corpus) == (None, None, None)
    assert "mine" in plan_command.table(found)
    one = replace(params, train=train.model_copy(update={"mixture": None}))
    assert make_plan(one, Options(hardware="h200")).evaluation_seconds == found.evaluation_seconds
