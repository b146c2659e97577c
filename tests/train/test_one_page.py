"""Tests for train/one_page.py: its weights are those of the full program, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from model import GPT
from model.loss import linear_cross_entropy
from tests.support.one_page import FILE, PAGE, SOURCE, updated
from tests.support.repo import REPO
from tests.support.training import TRAIN, Project, records, some_tokens, train_here
from tests.support.waiting import wait_for
from train import one_page
from train.numerics import native_dtype

CHECKPOINT = Path("artifacts/one_page.pt")
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
SHARED = {
    "seed": 1, "steps": 6, "batch_tokens": 128, "learning_rate": 1e-2, "warmup_steps": 2,
    "grad_clip": 0.5, "val_every": 3, "val_tokens": 192, "checkpoint_every": 3, "log_every": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def group_is_left() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    if dist.is_initialized():
        dist.destroy_process_group()


def settings(**changes: object) -> list[str]:
    """Return the page's flags for the run that `write` describes."""
    values = {**MODEL, **SHARED, "micro_batch": 4, **changes}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def write(project: Project, **changes: object) -> None:
    """Describe the same run to the full program."""
    project.write(model=MODEL, train={**TRAIN, **SHARED, **changes})


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def assert_same(project: Project) -> None:
    """Compare the page's weights and moments with those of the full program."""
    saved = torch.load(project.folder / CHECKPOINT, weights_only=True)
    published = project.folder / "artifacts/checkpoint"
    weights, moments = saved["model"], saved["optimizer"]["state"]
    assert bits(weights) == bits(load_file(published / "model.safetensors"))
    # The page's optimizer numbers its parameters: first those that decay.
    names = [n for n, w in weights.items() if w.dim() >= 2]
    names += [n for n, w in weights.items() if w.dim() < 2]
    flat = {f"{names[i]}.{key}": value for i, of in moments.items() for key, value in of.items()}
    assert bits(flat) == bits(load_file(published / "optimizer.safetensors"))


def test_same_weights_as_the_full_program_also_when_resumed(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setenv("GPT2_MICRO_BATCH", "4")
    monkeypatch.setenv("GPT2_COMPILE", "false")
    write(project)
    run = train_here()

    def rate(step: int, s: one_page.Settings) -> float:
        if step == 4:
            raise KeyboardInterrupt
        return original(step, s)

    original = one_page.rate
    with monkeypatch.context() as patch:
        patch.setattr(one_page, "rate", rate)
        with pytest.raises(SystemExit):
            one_page.main(settings())
    dist.destroy_process_group()
    capsys.readouterr()  # the full program has printed the same loss
    one_page.main(settings())
    assert_same(project)
    loss = records(run, "val/loss")[6]
    assert f"{loss:.4f}" in capsys.readouterr().out

    CHECKPOINT.rename("moved.pt")
    free = settings(out="moved.pt", micro_batch=2, val_every=5, checkpoint_every=1, log_every=9)
    one_page.main(free)  # it is complete
    assert "step" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"moved\.pt"):
        one_page.main([*free, "--seed", "2"])


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"val_tokens": 15}, "val_tokens"),
        ({"val_tokens": 2000}, "val_tokens"),
        ({"block_size": 1024, "batch_tokens": 4096, "val_tokens": 1024}, "block_size"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"dtype": "float16"}, "dtype"),
        ({"tokens": "nothing"}, "nothing"),
    ],
)
def test_wrong_setting_is_one_line(project: Project, wrong: dict[str, object], name: str) -> None:
    project.write_data(n_train=1000)
    with pytest.raises(SystemExit, match=rf"^[^\n]*{name}[^\n]*$"):
        one_page.main(settings(**wrong))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_of_three_chunks_are_those_of_the_full_program(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(one_page, "V", 300)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1100, 8, generator=generator, requires_grad=True)
    table = torch.randn(384, 8, generator=generator, requires_grad=True)
    y = torch.randint(300, (1100,), generator=generator)
    found = []
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for loss in (
            one_page.SummedLoss.apply(x, table, y),
            linear_cross_entropy(x, table, y, 300, "sum"),
        ):
            found.append(
                bits(
                    dict(
                        zip(
                            "lxt",
                            (loss.detach(), *torch.autograd.grad(loss, (x, table))),
                            strict=True,
                        )
                    )
                )
            )
    assert found[0] == found[1]


def test_edits_of_the_docs_are_short_and_work(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    text, source = PAGE.read_text(encoding="utf-8"), SOURCE.read_text(encoding="utf-8")
    for edit in re.findall(r"```diff\n(.*?\n)```", text, re.DOTALL):
        lines = edit.splitlines()
        old, new = ("".join(f"{x[1:]}\n" for x in lines if x[0] != sign) for sign in "+-")
        assert sum(line[0] == "+" for line in lines) <= 5
        assert source.count(old) == 1, edit
        source = source.replace(old, new)
    Path("edited.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited", "edited.py")
    assert spec is not None
    assert spec.loader is not None
    edited = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "edited", edited)
    spec.loader.exec_module(edited)

    for name in ("plain/train.bin", "plain/val.bin", "data/other/val.bin"):  # without headers
        Path(name).parent.mkdir(exist_ok=True)
        some_tokens(2000, seed=3).tofile(name)
    edited.main(settings(tokens="plain", steps=1))
    assert "loss on data/other" in capsys.readouterr().out
    last = edited.Settings(steps=1001)
    assert [edited.rate(step, last) / last.learning_rate for step in (500, 800, 900, 1000)] == [
        1.0, pytest.approx(1.0, abs=2e-3), pytest.approx(0.55, abs=2e-3), 0.1,
    ]  # fmt: skip

    (export,) = re.findall(r"```python\n(import torch\nfrom model.*?)```", text, re.DOTALL)
    assert len(re.findall(r"^(?!import|from)\S", export, re.MULTILINE)) <= 5
    exec(export, {})
    exported = GPT.from_hf("artifacts/one_page_hf").state_dict()
    weights = torch.load(CHECKPOINT, weights_only=True)["model"]
    weights["wte.weight"][one_page.V :] = exported["wte.weight"][one_page.V :]  # the padding
    assert bits(exported) == bits(weights)


def test_page_is_up_to_date_and_short() -> None:
    source = SOURCE.read_text(encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == updated(), "python -m tests.support.one_page"
    assert len(source.splitlines()) <= 500
    imported = re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)
    assert set(imported) <= {*sys.stdlib_module_names, "numpy", "torch"}
    assert [file for file in FILE.findall(source) if not (REPO / file).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "micro_batch", "dtype"),
    [
        pytest.param(1, 4, "float32", marks=pytest.mark.soak),
        (2, 2, native_dtype("cpu")),
        pytest.param(2, 2, "bfloat16", marks=pytest.mark.soak),  # emulated, it takes a minute
    ],
)
def test_same_weights_after_50_steps_and_a_kill(
    project: Project, processes: int, micro_batch: int, dtype: str
) -> None:
    changes = {"steps": 50, "checkpoint_every": 10, "dtype": dtype}  # two micro-batches per step
    write(project, **changes)
    project.train(processes, GPT2_MICRO_BATCH=micro_batch, GPT2_COMPILE="false")

    flags = settings(micro_batch=micro_batch, processes=processes, **changes)
    command = "train.one_page", *flags
    first = project.start(*command)
    wait_for(lambda: (project.folder / CHECKPOINT).exists() or first.poll() is not None, 120)
    assert first.poll() is None, first.communicate()
    first.send_signal(signal.SIGINT if processes == 1 else signal.SIGTERM)
    _, errors = first.communicate(timeout=60)  # until no process is left that could print
    assert "Traceback" not in errors
    assert torch.load(project.folder / CHECKPOINT, weights_only=True)["step"] < 50
    done = project.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(project)
