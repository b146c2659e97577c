"""Of train.bench and train.advice: real steps measured on the CPU, and what is advised."""

from __future__ import annotations

import dataclasses
import json
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
from train.plan.bench_report import CLOCKS, Kernel, Measured, advice, medians, plan_of, report
from train.preset import load


def test_one_process_measures_its_step_and_leaves_nothing(
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
    assert (found["micro_batch"], found["micro_steps"]) == (2, 4)  # of the smallest batch
    assert (found["world"], found["reduced"], found["made_up"]) == (1, 0, False)
    median = sorted(found["steps"])[2:4]
    flops = 128 * flops_per_token(load().model.config(), 16)
    assert found["mfu"] == pytest.approx(flops / (sum(median) / 2) / found["peak"])
    assert found["parts"]["all-reduce"] == 0
    assert all(found["parts"][name] > 0 for name in ("forward and backward", "optimizer"))
    assert 0 < found["parts"]["forward and backward"] < 3 * max(found["steps"])
    assert any(kernel["name"] == "aten::mm" for kernel in found["kernels"])
    for words in ("1 x cpu", "128 tokens a step", "median of 6", "aten::mm", "--hardware cpu"):
        assert words in out
    assert "all-reduce" not in out
    assert "try: " in out


def test_two_processes_also_time_the_all_reduce(project: Project) -> None:
    shutil.rmtree(project.folder / "data")  # before any shard is there
    processes = project.start_ranks(2, "--steps", "4", module="train.bench", GPT2_MICRO_BATCH=2)
    try:
        outs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            kill_group(process)
    assert [process.returncode for process in processes] == [0, 0], outs
    assert outs[1][0] == ""  # rank 0 alone speaks
    first = outs[0][0]
    assert "2 times 2 x 16 a process" in first
    assert "made-up tokens" in first
    assert "all-reduce" in first
    assert "GB/s bus bandwidth" in first


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0"], "--steps"),
        (["--seconds", "-1"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--seconds", "abc"], "abc: not a number above 0"),
        (["--batch-tokens", "x"], "--batch-tokens"),
        (["--presets", "mini"], "--presets"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        bench.main(flags)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_batch_that_cannot_be_shared_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="96 and 112"):
        bench.main(["--batch-tokens", "100"])
    monkeypatch.setenv("GPT2_PROCESSES", "3")
    with pytest.raises(UserError, match="2 or 4"):
        bench.main([])
    with pytest.raises(UserError, match="no folder missing"):
        bench.main(["--json", "missing/x.json"])


def on_gpus(**changes: Any) -> Measured:
    """A measurement of eight A100-80 with which nothing is wrong."""
    parts = {
        "forward and backward": 0.33,
        "all-reduce": 0.004,
        "optimizer": 0.005,
        "clipping": 0.001,
    }
    good = Measured(
        device="NVIDIA A100-SXM4-80GB",
        world=8,
        compiled=True,
        micro_batch=64,
        micro_steps=1,
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
        parts={**parts, "zeroing": 0.001},
        reduced=4 * 124_475_904,
        kernels=[Kernel("nvjet", 100, 0.3), Kernel("flash_bwd", 12, 0.045)],
        clocks={"clocks.sm": 1395.0, "clocks.max.sm": 1410.0, "power.draw": 390.0},
    )
    return dataclasses.replace(good, **changes)


RULES: list[tuple[dict[str, Any], str]] = [
    ({"compiled": False}, "compile: true"),
    ({"kernels": [Kernel("nvjet", 100, 0.2)]}, "nothing to do for 43%"),
    ({"clocks": {"clocks.sm": 900.0, "clocks.max.sm": 1410.0}}, "900 of 1410 MHz"),
    ({"memory": 20 << 30, "micro_batch": 16, "micro_steps": 4}, "GPT2_MICRO_BATCH=32"),
    ({"data_wait": 0.05}, "faster disk"),
    ({"steps": [0.3, 0.3, 0.4, 0.4]}, "something else"),
]


@pytest.mark.parametrize(("changes", "words"), RULES)
def test_each_fault_has_its_advice(changes: dict[str, Any], words: str) -> None:
    machine = Machine()
    assert advice(on_gpus(), None, machine, 512) == ["nothing: no setting stands out"]
    lines = advice(on_gpus(**changes), None, machine, 512)
    assert words in lines[0]
    spare = "memory" in changes
    assert [line for line in lines[1:] if "GPT2_LOSS_CHUNK" not in line] == []
    assert len(lines) == 1 + spare


def test_no_micro_batch_is_advised_that_training_refuses() -> None:
    spare = on_gpus(memory=20 << 30, micro_batch=16, micro_steps=4)
    assert "MICRO_BATCH" not in str(advice(spare, None, Machine(), 128))  # 16 for each of 8
    assert "GPT2_MICRO_BATCH=32" in str(advice(spare, None, Machine(), 256))


def test_the_batch_that_is_tried_is_not_that_of_the_run(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = on_gpus(tokens=65536, micro_batch=8)
    monkeypatch.setattr(bench, "measure", lambda *_: found)
    bench.main(["--preset", "fineweb-10b", "--batch-tokens", "65536"])
    out = capsys.readouterr().out
    assert f" {9_999_745_024 / 65536 * found.step / 3600:.2f} h " in out
    plan = plan_of(found, load("speedrun"), Machine())
    assert plan
    assert (plan.micro_batch, plan.micro_steps) == (8, 1)


def test_on_a_cpu_the_plan_takes_what_all_ranks_measured(project: Project) -> None:
    found = on_gpus(device="cpu", world=4, total=None, reserved=None, peak=4e11)
    plan = plan_of(found, load("fineweb-10b"), Machine(loss_chunk=512))
    assert plan
    assert (plan.options.hardware, plan.options.loss_chunk, plan.peak) == ("cpu", 512, 4e11)
    assert plan.step.compute == pytest.approx(524_288 * plan.flops_per_token / 4e11 / plan.mfu)


def test_a_slow_link_is_named_with_its_speed() -> None:
    slow = on_gpus(parts={**on_gpus().parts, "all-reduce": 0.08})
    assert slow.bus == pytest.approx(2 * 7 / 8 * slow.reduced / 0.08)
    (line,) = advice(slow, None, Machine(), 512)
    assert f"{slow.bus / 1e9:.1f} GB/s" in line
    assert "nvidia-smi topo" in line
    assert "overlap: true" in line
    assert "overlap: true" not in advice(slow, None, Machine(overlap=True), 512)[0]


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
        ("NVIDIA L40S", 44.4, None),
    ],
)
def test_the_plan_is_that_of_the_hardware(
    project: Project, device: str, gib: float, name: str | None
) -> None:
    measured = on_gpus(device=device, total=int(gib * 2**30), micro_batch=1, micro_steps=1)
    plan = plan_of(measured, load(), Machine())
    assert (plan and plan.options.hardware) == name
    if plan:
        assert plan.world == 8
        assert plan.peak == accelerator(str(name)).peak(load().train.dtype)
        page = report(measured, load(), Machine())
        assert f"--hardware {name}" in page
        assert f"{measured.step / plan.step.total:.2f} times" in page
        assert re.search(rf"train.plan --mfu +{0.5 * 0.350 / 0.33:.3f} ", page)


def test_what_nvidia_smi_says() -> None:
    assert len(CLOCKS) == 5
    lines = ["1410, 1410, 300.5, [N/A], 60", "1400, 1410, 310.5, [N/A], 62", "13"]
    found = {"clocks.sm": 1405, "clocks.max.sm": 1410, "power.draw": 305.5, "temperature.gpu": 61}
    assert medians(lines) == found
    assert medians([]) == {}
