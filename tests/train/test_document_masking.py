"""Tests for `train.document_masking`: real text, its document index, and runs trained with it."""

from __future__ import annotations

import shutil

import pytest
import torch

from model import GPT
from model.attention import document_ids
from pipeline.params import TokenizeParams
from pipeline.provenance import Documents, DocumentSpan
from pipeline.runtime.machine import Machine
from tests.support.small_data import tokenize_here, write_raw
from tests.support.training import Project, batches, records, stop_in, train_here
from train import DataOrder, evaluate
from train.data.loader import read_windows
from train.distributed.interrupt import Interrupt
from train.distributed.rendezvous import process_group
from train.run import Run
from train.trainer import Trainer

TRAIN = {"document_masking": True, "steps": 8, "checkpoint_every": 3, "log_every": 1}


@pytest.fixture
def masked(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The project with documents of 5 to 40 tokens, two micro-steps per batch, and masking."""
    tokens, places = project.folder / "data/tokens", ("land", "sea", "city", "wood")
    texts: list[str | None] = [
        f"A tale of the {places[i % 4]}: " + f"he saw {i} of them, and " * (i * 7 % 5)
        for i in range(300)
    ]
    raw = write_raw(project.folder / "data/raw", [texts[:150], texts[150:]], group=40)
    params = TokenizeParams(shard_tokens=1000, val_per_10k=1000)
    shutil.rmtree(tokens)
    tokenize_here(raw, tokens, params, Machine(workers=1, work_dir=project.folder / "encoded"))
    project.verify()
    project.write(train=TRAIN, evaluate={"val_tokens": 200})
    monkeypatch.setenv("GPT2_MICRO_BATCH", "4")
    return project


def documents_of(run: Run, window: int) -> list[DocumentSpan]:
    """Return the documents of a window's inputs, by the document index."""
    first = window * run.order.block_size
    return Documents(run.train_data).between(first, first + run.order.block_size)


def test_documents_in_the_tokens_are_those_of_the_index(masked: Project) -> None:
    run = Run.open()
    assert len(run.train_data.shards) > 3
    assert isinstance(run.order, DataOrder)
    for window in run.order.samples(0, run.order.n_windows):
        inputs, _ = read_windows(
            run.train_data, window[None] * run.order.block_size, run.order.block_size
        )
        lengths = [span.end - span.first for span in documents_of(run, int(window))]
        found = document_ids(inputs)[0].unique_consecutive(return_counts=True)[1]
        assert found.tolist() == lengths


@pytest.mark.parametrize("implementation", ["fused", "explicit"])
def test_a_step_is_that_of_its_documents_alone(masked: Project, implementation: str) -> None:
    """The loss and the norm of the gradient, over two micro-steps."""
    run = Run.open()
    with process_group("cpu") as world:
        trainer = Trainer(run, world)
        trainer.warm_up()
        with batches(run, trainer, 0, 1) as loader:
            _, numbers = trainer.step(0, loader, Interrupt(world))
    gpt = GPT(run.model.config(), seed=run.params.seed, implementation=implementation)  # type: ignore[arg-type]
    total, count = torch.zeros(()), 0
    assert isinstance(run.order, DataOrder)
    for window in run.order.samples(0, 8):
        for span in documents_of(run, int(window)):
            tokens = torch.from_numpy(run.train_data[span.first : span.end + 1].astype("int64"))
            total = total + gpt(tokens[None, :-1], tokens[None, 1:], "sum")
            count += 1
    assert count > 8  # several in some windows
    (total / 128).backward()
    norm = torch.stack([p.grad.norm() for p in gpt.parameters() if p.grad is not None]).norm()
    assert numbers.tolist() == pytest.approx([total.item() / 128, norm.item()], rel=1e-5)


def test_stopped_and_resumed_ends_with_the_same_bits_and_is_evaluated_as_trained(
    masked: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = train_here()
    files = masked.published()
    monkeypatch.setenv("GPT2_WORK_DIR", "stopped")
    stop_in(monkeypatch, "step", 5)
    resumed = train_here()
    assert masked.published() == files
    for name in ("train/loss", "val/loss"):
        assert records(resumed, name) == records(uninterrupted, name)
    evaluate.main()
    metrics = masked.results("evaluation")
    assert metrics["val_loss"] == pytest.approx(masked.results()["val_loss"], abs=1e-4)
    assert abs(metrics["val_loss_unmasked"] - metrics["val_loss"]) > 1e-3


def test_two_ranks_train_on_the_documents_of_one(masked: Project) -> None:
    masked.write(train={**TRAIN, "steps": 3})
    one = records(train_here(), "train/loss")
    masked.train_ranks(2, GPT2_WORK_DIR="two", GPT2_MICRO_BATCH=2)
    assert masked.losses("two") == pytest.approx(one, abs=1e-5)


def test_off_nothing_is_computed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write(train={"steps": 3, "val_every": 3})
    monkeypatch.setattr("model.gpt.document_ids", None)  # not callable
    without = records(train_here(), "train/loss")
    project.write(train={"steps": 3, "val_every": 3, "document_masking": True})
    with pytest.raises(TypeError, match="not callable"):
        train_here()
    assert len(without) > 1
