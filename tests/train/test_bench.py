"""Tests for train.bench and train.plan.bench_report: real steps on the CPU, and the advice."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from model.size import flops_per_token
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from tests.support.training import Project, kill_group
from train import bench
from train.plan.accelerators import accelerator
from train.plan.bench_report import (
    CLOCKS,
    Kernel,
    Measurement,
    advice,
    best_fit,
    median_clocks,
    plan_for,
    report,
)
from train.plan.memory import padded_parameter_count
from train.preset import load


def test_one_process_measures_its_step_and_writes_only_the_json(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(train={"batch_doublings": 2, "batch_ramp_steps": 2})
    before = sorted(project.folder.rglob("*"))
    bench.main(["--steps", "6", "--json", "found.json"])
    out = capsys.readouterr().out
    found = json.loads(Path("found.json").read_text())
    assert [path for path in sorted(project.folder.rglob("*")) if path not in before] == [
        project.folder / "found.json"
    ]
    assert len(found["steps"]) == 6
    assert found["tokens"] == 128
    assert (found["micro_batch"], found["micro_steps"]) == (2, 4)  # fits the smallest batch
    assert (found["world"], found["reduced"], found["made_up"]) == (1, 0, False)
    median = sorted(found["steps"])[2:4]
    flops = 128 * flops_per_token(load().model.config(), 16)
    assert found["mfu"] == pytest.approx(flops / (sum(median) / 2) / found["peak"])
    assert found["parts"]["all-reduce"] == 0
    assert all(found["parts"][name] > 0 for name in ("forward and backward", "optimizer"))
    assert 0 < found["parts"]["forward and backward"] < 3 * max(found["steps"])
    assert any(kernel["name"] == "aten::mm" for kernel in found["kernels"])
    for text in ("1 x cpu", "128 tokens", "aten::mm", "--hardware cpu", "try: "):
        assert text in out
    assert "all-reduce" not in out


def test_compiler_is_imported_after_the_group_has_limited_its_processes(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limit(kind: str) -> None:
        raise UserError(f"limit {os.environ.get('TORCHINDUCTOR_COMPILE_THREADS')}")

    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setenv("GPT2_COMPILE", "true")
    monkeypatch.setenv("GPT2_PROCESSES", "1")
    monkeypatch.setattr(bench, "check_compiler", limit)
    with pytest.raises(UserError, match="limit 1"):
        bench.main([])


@pytest.mark.soak
def test_two_processes_also_time_the_all_reduce(project: Project) -> None:
    shutil.rmtree(project.folder / "data")  # no shards: random tokens
    flags = ("--steps", "4", "--json", "found.json")
    processes = project.start_ranks(2, *flags, module="train.bench", GPT2_MICRO_BATCH=2)
    try:
        outs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            kill_group(process)
    assert [process.returncode for process in processes] == [0, 0], outs
    assert outs[1][0] == ""  # only rank 0 prints
    found = json.loads(Path("found.json").read_text())
    assert found["made_up"]
    assert (found["world"], found["micro_batch"], found["micro_steps"]) == (2, 2, 2)
    assert found["reduced"] == 4 * padded_parameter_count(load().model.config())
    assert found["parts"]["all-reduce"] > 0
    assert "all-reduce" in outs[0][0]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--seconds", "-1"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--seconds", "abc"], "abc"),
        (["--batch-tokens", "x"], "--batch-tokens"),
        (["--presets", "mini"], "--presets"),
    ],
)
def test_wrong_flag_is_one_line_and_status_2(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        bench.main(flags)
    assert raised.value.code == 2
    err = capsys.readouterr().err
    assert named in err
    assert err.count("\n") == 1


def test_impossible_batch_or_file_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"train\.batch_tokens: 100 .* 96 "):
        bench.main(["--batch-tokens", "100"])
    monkeypatch.setenv("GPT2_PROCESSES", "3")
    with pytest.raises(UserError, match=r"GPT2_PROCESSES.* 2 or 4"):
        bench.main([])
    with pytest.raises(UserError, match=r"--json missing/x\.json"):
        bench.main(["--json", "missing/x.json"])


def on_gpus(**changes: Any) -> Measurement:
    """A measurement on eight A100-80 that needs no advice, with some values changed."""
    parts = {"forward and backward": 0.33, "all-reduce": 0.004, "optimizer": 0.005}
    good = Measurement(
        device="NVIDIA A100-SXM4-80GB",
        world=8,
        compiled=True,
        micro_batch=64,
        micro_steps=1,
        loss_chunk=8192,
        made_up=False,
        start=60.0,
        steps=[0.349, 0.350, 0.350, 0.351],
        tokens=524288,
        data_wait=0.0,
        mfu=0.5,
        peak=8 * 312e12,
        memory=50 << 30,
        reserved=55 << 30,
        total=int(79.1 * 2**30),
        parts={**parts, "clipping": 0.001, "zeroing": 0.001},
        reduced=4 * 124_475_904,
        kernels=[Kernel("nvjet", 100, 0.3), Kernel("flash_bwd", 12, 0.045)],
        clocks={"clocks.sm": 1395.0, "clocks.max.sm": 1410.0, "power.draw": 390.0},
    )
    return dataclasses.replace(good, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"compiled": False}, "compile: true"),
        ({"kernels": [Kernel("nvjet", 100, 0.2)]}, "43%"),
        ({"clocks": {"clocks.sm": 900.0, "clocks.max.sm": 1410.0}}, "900 of 1410 MHz"),
        ({"data_wait": 0.05}, "data/tokens: 5.0%"),
        ({"steps": [0.3, 0.3, 0.4, 0.4]}, "29%"),
    ],
)
def test_each_problem_has_its_advice(changes: dict[str, Any], named: str) -> None:
    none = advice(on_gpus(), None, Machine())
    lines = advice(on_gpus(**changes), None, Machine())
    assert len(none) == 1
    assert lines[0] != none[0]
    assert named in lines[0]
    assert len(lines) == 1


def test_the_best_that_fits_is_named_with_its_gain(project: Project) -> None:
    params, small = load("fineweb-10b"), on_gpus(micro_batch=16, micro_steps=4, loss_chunk=1490)
    fit = best_fit(small, params, Machine(micro_batch=16))
    assert fit
    assert (fit.micro_batch, fit.loss_chunk) == (64, 8192)
    plans = [plan_for(m, params, Machine()) for m in (small, on_gpus())]
    assert fit.gain == pytest.approx(1 - plans[1].step.total / plans[0].step.total)  # type: ignore[union-attr]
    assert "GPT2_MICRO_BATCH=64 GPT2_LOSS_CHUNK=8192" in advice(small, None, Machine(), fit)[0]
    taken = best_fit(on_gpus(), params, Machine())
    assert taken
    assert taken.gain == 0
    assert "GPT2_MICRO_BATCH" not in str(advice(on_gpus(), None, Machine(), taken))
    unknown = best_fit(on_gpus(device="NVIDIA A40", total=int(44.4 * 2**30)), params, Machine())
    assert unknown
    assert (unknown.micro_batch, unknown.gain) == (64, None)
    assert best_fit(on_gpus(total=None), params, Machine()) is None  # a CPU
    assert best_fit(on_gpus(tokens=65536), params, Machine()) is None  # --batch-tokens


def test_batch_tokens_changes_the_timed_batch_and_not_the_run(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = on_gpus(tokens=65536, micro_batch=8)
    monkeypatch.setattr(bench, "measure", lambda *_: found)
    bench.main(["--preset", "fineweb-10b", "--batch-tokens", "65536"])
    out = capsys.readouterr().out
    assert f" {10_255_073_280 / 65536 * found.step / 3600:.2f} h " in out
    plan = plan_for(found, load("speedrun"), Machine())
    assert plan
    assert (plan.micro_batch, plan.micro_steps) == (8, 1)


def test_cpu_plan_uses_the_peak_that_all_ranks_measured(project: Project) -> None:
    found = on_gpus(device="cpu", world=4, total=None, reserved=None, peak=4e11)
    found = dataclasses.replace(found, loss_chunk=512)
    plan = plan_for(found, load("fineweb-10b"), Machine())
    assert plan
    assert (plan.options.hardware, plan.options.loss_chunk, plan.peak) == ("cpu", 512, 4e11)
    products = 524_288 * plan.flops_per_token / 4e11 / plan.mfu
    assert plan.step.compute - plan.step.traffic == pytest.approx(products)


def test_slow_all_reduce_is_named_with_its_bandwidth() -> None:
    slow = on_gpus(parts={**on_gpus().parts, "all-reduce": 0.08})
    assert slow.bus == pytest.approx(2 * 7 / 8 * slow.reduced / 0.08)
    (line,) = advice(slow, None, Machine())
    assert f"{slow.bus / 1e9:.1f} GB/s" in line
    assert "nvidia-smi topo" in line
    assert "overlap: true" in line
    assert "overlap: true" not in advice(slow, None, Machine(overlap=True))[0]


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H100 PCIe", 79.1, None),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA L4", 22.0, "l4"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA A40", 44.4, None),
    ],
)
def test_plan_is_for_the_measured_hardware(
    project: Project, device: str, gib: float, name: str | None
) -> None:
    total = int(gib * 2**30)
    measured = on_gpus(device=device, total=total, tokens=2**17, micro_batch=16, micro_steps=1)
    plan = plan_for(measured, load("fineweb-10b"), Machine())
    assert (plan and plan.options.hardware) == name
    if plan:
        assert plan.world == 8
        assert plan.peak == accelerator(str(name)).peak("bfloat16")
        text = report(measured, load("fineweb-10b"), Machine())
        assert f"--hardware {name}" in text
        assert f" {measured.step / plan.step.total:.2f} " in text
        products = 0.33 - plan.step.traffic
        found = re.search(r"--mfu +(\S+) ", text)
        assert (found and float(found[1])) == pytest.approx(0.5 * 0.350 / products, abs=6e-4)


def test_medians_skip_incomplete_lines_and_unknown_values() -> None:
    assert len(CLOCKS) == 5
    lines = ["1410, 1410, 300.5, [N/A], 60", "1400, 1410, 310.5, [N/A], 62", "13"]
    found = {"clocks.sm": 1405, "clocks.max.sm": 1410, "power.draw": 305.5, "temperature.gpu": 61}
    assert median_clocks(lines) == found
    assert median_clocks([]) == {}
