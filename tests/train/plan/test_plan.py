"""Of train.plan: what fits, how long it takes, what is said where something does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.runtime.errors import UserError
from tests.support.repo import REPO
from train.plan import __main__ as command
from train.plan.accelerators import NAMES, accelerator
from train.plan.estimate import Options, Plan, make_plan
from train.preset import load, merge, preset_files, read_preset
from train.run import TOKENS

BIG = ("fineweb-10b", "fineweb-edu-10b", "gpt2-large", "gpt2-medium", "gpt2-xl", "speedrun")


@pytest.fixture(autouse=True)
def _in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(REPO / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)


def plan(preset: str | None = "fineweb-10b", **options: Any) -> Plan:
    return make_plan(load(preset), Options(**options))


def test_the_real_run_on_eight_a100() -> None:
    found = plan()
    assert found.fits
    assert found.warnings == ()
    assert (found.parameters, found.steps, found.tokens) == (124_439_808, 19_073, 9_999_745_024)
    assert found.seconds < 2 * 3600
    assert plan(mfu=0.25).seconds < 4 * 3600
    assert found.epochs == pytest.approx(0.973, abs=0.01)
    assert found.corpus is not None
    assert found.corpus.files == 15
    assert 515 <= found.corpus.shards <= 520
    assert found.micro_batch * found.micro_steps * found.world * 1024 == 524_288


def test_the_micro_batch_is_the_trainings_on_a_cpu_as_well() -> None:
    assert plan(hardware="cpu", gpus=4).micro_batch == 1
    assert plan().micro_batch == 16


def test_time_and_price_scale_as_they_should() -> None:
    one, eight = plan(gpus=1, rate=2.0), plan(gpus=8, rate=2.0)
    assert 7.5 < one.seconds / eight.seconds < 8
    assert one.dollars == pytest.approx(2.0 * one.seconds / 3600)
    assert eight.dollars == pytest.approx(2.0 * 8 * eight.seconds / 3600)
    assert plan().dollars is None
    half = plan(mfu=0.26)
    assert half.step.compute == pytest.approx(2 * plan().step.compute)
    assert half.step_mfu == pytest.approx(0.26 * half.step.compute / half.step.total)


def test_a_growing_batch_takes_fewer_tokens_and_as_many_steps() -> None:
    found, params = plan("speedrun"), load("speedrun")
    assert found.tokens == params.train.batches(1024)(8000)[0] * 1024 < 8000 * 524_288
    each = found.step.exposed + found.step.optimizer
    compute = found.tokens / 524_288 * found.step.compute
    assert found.training_seconds == pytest.approx(compute + 8000 * each)


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    found = plan("gpt2-large", hardware="a100-40")
    params = load("gpt2-large")
    share = params.train.batch_tokens // 1024 // 8
    most = found.largest_micro_batch
    assert share % most == 0
    assert plan("gpt2-large", hardware="a100-40", micro_batch=most).fits
    assert not plan("gpt2-large", hardware="a100-40", micro_batch=2 * most).fits


def test_what_does_not_fit_is_said_with_its_mend() -> None:
    tight = plan("gpt2-large", hardware="a100-40")
    assert not tight.fits
    most = tight.largest_micro_batch
    assert [w for w in tight.warnings if f"GPT2_MICRO_BATCH={most}" in w]

    none = plan("gpt2-xl", hardware="l4")
    assert none.largest_micro_batch == 0
    assert [w for w in none.warnings if "not one sequence fits" in w and "checkpoint" in w]

    slow = plan(nodes=2, network=1.0)
    assert [w for w in slow.warnings if "sending gradients" in w and "overlap" in w]
    assert plan(nodes=2, network=1.0, overlap=True).step.exposed < slow.step.exposed

    again = {"steps": 10_000, "warmup_steps": 10}
    many = load()
    many = replace(many, train=many.train.model_copy(update=again))
    warned = make_plan(many, Options(hardware="cpu", gpus=2)).warnings
    assert [w for w in warned if "epochs" in w]


def test_checkpointed_activations_take_less_memory_and_more_time() -> None:
    plain, twice = plan("gpt2-xl"), plan("gpt2-xl", checkpoint_activations=True)
    assert twice.memory.total < plain.memory.total
    assert twice.step.compute > plain.step.compute
    assert twice.step_mfu < plain.step_mfu


@pytest.mark.parametrize("hardware", NAMES)
def test_every_hardware_has_a_plan_on_the_terminal(
    hardware: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["--preset", "fineweb-10b", "--hardware", hardware, "--rate", "1.5"])
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if not line.startswith("warning: ")]
    assert max(map(len, lines)) <= 120
    for word in ("parameters", "activations", "MFU", "all-reduce", "train stage", "price", "disk"):
        assert f"  {word}" in shown, word
    assert accelerator(hardware).mfu_source.startswith(("assumed", "a guess"))


@pytest.mark.parametrize("preset", preset_files())
def test_every_preset_has_a_plan(preset: str) -> None:
    found = plan(preset, hardware="h200")
    assert found.fits
    assert found.corpus is not None
    if preset in BIG:
        assert found.epochs is not None
        assert found.epochs < 1.02
        assert found.warnings == ()


@pytest.mark.parametrize("preset", BIG)
@pytest.mark.parametrize("before", ["mini", "speedrun"])
def test_a_big_preset_is_whole(preset: str, before: str) -> None:
    """Whatever stood there: it says all that the presets differ in."""
    text = (REPO / "params.yaml").read_text(encoding="utf-8")
    other = merge(text, read_preset(before))
    applied, fresh = (merge(t, read_preset(preset)) for t in (other, text))
    assert YAML(typ="safe").load(applied) == YAML(typ="safe").load(fresh)


def test_a_larger_chunk_of_the_loss_takes_more_memory() -> None:
    plain, large = plan(), plan(loss_chunk=8192)
    more = (8192 - 1490) * 50_304 * (4 + 2)  # logits and their gradient
    assert large.memory.total - plain.memory.total == pytest.approx(more, rel=0.3)


def test_json_is_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--preset", "fineweb-10b", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["memory"]["total"] == sum(
        v for part, v in found["memory"].items() if part != "total"
    )
    assert found["seconds"] == pytest.approx(
        found["training_seconds"] + found["evaluation_seconds"]
    )
    assert found["options"]["hardware"] == "a100-80"


def test_params_stay_as_they_are() -> None:
    before = Path("params.yaml").read_bytes()
    plan("gpt2-xl")
    assert Path("params.yaml").read_bytes() == before
    assert not TOKENS.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hardware", "a100"], "--hardware a100: unknown; take a100-40, a100-80, h100,"),
        (["--hardware", "l4", "--interconnect", "nvlink"], "l4 has no NVLink; take pcie"),
        (["--preset", "fineweb"], "preset fineweb: unknown; did you mean fineweb-10b?"),
        (["--preset", "fineweb-10b", "--gpus", "7"], "which 7 processes cannot share"),
        (
            ["--preset", "speedrun", "--gpus", "3"],
            "train.batch_tokens / 2^2 (batch_doublings): 131072",
        ),
        (["--preset", "fineweb-10b", "--micro-batch", "7"], "7 does not divide"),
        (["--mfu", "40"], "argument --mfu: 40: not a part of the peak"),
        (["--rate", "free"], "argument --rate: free: not a number above 0"),
        (["--gpus", "0"], "argument --gpus: 0: not a whole number of at least 1"),
    ],
)
def test_mistakes_are_said_in_a_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((UserError, SystemExit)) as ended:
        command.main(arguments)
    if isinstance(ended.value, SystemExit):  # argparse's
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    else:
        assert said in str(ended.value)


def test_the_status_of_a_mistake_is_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train.plan", "--hardware", "tpu"],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --hardware tpu: unknown")
    assert done.stderr.count("\n") == 1
