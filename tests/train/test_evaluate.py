"""Tests for `train.evaluate`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model import GPT
from pipeline import TokenStream
from pipeline.curate import stage as curate_stage
from pipeline.format.selection import SELECTION
from pipeline.format.tokenizer import EOT, encode
from pipeline.params import CurateParams, TokenizeParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from tests.support.hub import Hub
from tests.support.small_data import no_cluster, run_here, write_raw
from tests.support.training import Project, some_tokens, train_here, write_hellaswag, write_tokens
from train import evaluate
from train.evals import hellaswag, lambada
from train.evals.hellaswag import Task
from train.evals.task_files import are_clean
from train.run import CHECKPOINT


def test_a_trained_model_is_evaluated_and_sampled(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(evaluate={"val_tokens": 200})
    train_here()
    evaluate.main()
    metrics = project.results("evaluation")
    assert metrics["val_loss"] == pytest.approx(project.results()["val_loss"], abs=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["val_loss"]), rel=1e-4)
    below = metrics["unigram_entropy"] - metrics["val_loss"]
    assert metrics["below_unigram"] == pytest.approx(below, abs=1e-4)
    assert metrics["reference"].startswith("does not apply: model.n_layer")
    assert (project.folder / "metrics/reference.csv").read_text() == "step,reference\n"
    samples = (project.folder / "artifacts/samples.md").read_text()
    assert "**The people**" in samples
    assert samples.count("\n## ") == 4
    before, after = (samples.split(f"\n## {part} training\n")[1] for part in ("Before", "After"))
    assert before.split("\n## ")[0] != after
    assert "> **The people**" in before
    assert "val loss" in capsys.readouterr().out
    evaluate.main()
    assert (project.folder / "artifacts/samples.md").read_text() == samples


@pytest.mark.slow
def test_metrics_do_not_depend_on_ranks_batch_size_or_source(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, files, batches of 16; two processes, the Hub, batches of 1."""
    tasks = write_hellaswag()
    passages = [{"text": " ".join(task["ctx"].split()[: 2 + i])} for i, task in enumerate(tasks)]
    Path("passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    write_tokens(project.folder / "other", {"train": [some_tokens(700, seed=9)]})
    inputs = {"val_shards": "other/train-00000.bin", "lambada": "passages.jsonl"}
    project.write(evaluate={**inputs, "hellaswag": "tasks.jsonl"})
    train_here()
    monkeypatch.setenv("GPT2_MICRO_BATCH", "16")
    evaluate.main()
    one = project.results("evaluation")
    assert (one["hellaswag_tasks"], one["lambada_tasks"]) == (12, 12)
    assert 0 < one["hellaswag_acc"] < 1
    assert one["val_shards_loss"] != one["val_loss"]
    project.write(evaluate={**inputs, "hellaswag": "hub"})
    pq.write_table(pa.Table.from_pylist(tasks), "tasks.parquet")
    with Hub() as hub:
        file = {"data/validation-00000-of-00001.parquet": Path("tasks.parquet").read_bytes()}
        hub.repo(hellaswag.HUB[0]).commit({"README.md": b"---\nlicense: mit\n---\n", **file})
        done = project.run(
            "train.evaluate",
            GPT2_PROCESSES=2,
            GPT2_MICRO_BATCH=1,
            HF_ENDPOINT=hub.endpoint,
            HF_HOME=project.folder / "hub",
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("HellaSwag (12 tasks) acc") == 1
    assert project.results("evaluation") == one


def test_tasks_that_are_in_the_text_are_left_out_of_the_clean_scores(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the tasks share 13 words with a document."""
    monkeypatch.setattr(curate_stage, "cluster", no_cluster)
    monkeypatch.setattr(curate_stage, "run_tasks", run_here)
    tasks = write_hellaswag()
    passages = [" ".join(task["ctx"].split()[: 2 + i]) for i, task in enumerate(tasks)]
    lines = [json.dumps({"text": passage}) + "\n" for passage in passages]
    Path("passages.jsonl").write_text("".join(lines))
    document = tasks[0]["ctx"].removesuffix(" they then")
    raw = write_raw(Path("data/raw"), [["Another text.", f"It was said that {document}."]])
    files = {"hellaswag": "tasks.jsonl", "lambada": "passages.jsonl"}
    rules = CurateParams(decontaminate=list(files.values()))
    curate_stage.curate(raw, SELECTION, rules, TokenizeParams(), Machine())
    project.write(evaluate=files)
    train_here()
    evaluate.main()
    metrics = project.results("evaluation")
    assert (metrics["hellaswag_tasks"], metrics["lambada_tasks"]) == (12, 12)
    gpt = GPT.from_checkpoint(CHECKPOINT)
    clean = [Task.from_row(task) for i, task in enumerate(tasks) if i % 7 > 2]
    expected = hellaswag.metrics(hellaswag.predict(gpt, clean))
    assert expected["hellaswag_tasks"] == 6
    # The other passages are in the document, or too short to tell.
    expected |= lambada.evaluate(gpt, [lambada.request({"text": passages[11]})])
    assert are_clean("other.jsonl", 12) is None
    for name, value in expected.items():
        assert metrics[name.replace("_", "_clean_", 1)] == pytest.approx(value, rel=1e-5)
    Path("other").mkdir()
    Path("other/passages.jsonl").write_text(json.dumps({"text": "x " * 40}) + "\n")
    rules = CurateParams(decontaminate=["passages.jsonl", "other/passages.jsonl"])
    curate_stage.curate(raw, SELECTION, rules, TokenizeParams(), Machine())
    assert are_clean("other/passages.jsonl", 1) == [True]
    assert are_clean("passages.jsonl", 12) == [False] * 11 + [True]
    Path("passages.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(UserError, match=r"passages\.jsonl"):
        are_clean("passages.jsonl", 12)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"val_shards": "none.bin"}, r"evaluate\.val_shards: none\.bin"),
        ({"val_shards": "a\0.bin"}, r"evaluate\.val_shards: "),
        ({"val_shards": "params.yaml"}, r"evaluate\.val_shards: params\.yaml"),
        ({"val_shards": "other/train-00000.bin"}, r"evaluate\.val_shards: other.* 50257"),
        (
            {"val_shards": "data/tokens/train-00000.bin", "val_tokens": 1700},
            r"evaluate\.val_tokens.* 1665",
        ),
        ({"val_tokens": 2000}, r"evaluate\.val_tokens: 2000.* 1999"),
        ({"hellaswag": "none.jsonl"}, r"evaluate\.hellaswag: none\.jsonl"),
    ],
)
def test_invalid_inputs_are_named_before_the_checkpoint_is_read(
    project: Project, changes: dict[str, Any], named: str
) -> None:
    atomic.write_json(Path("artifacts/checkpoint/state.json"), {})
    write_tokens(project.folder / "other", {"train": [np.full(700, EOT + 1)]})
    project.write(evaluate=changes)
    with pytest.raises(UserError, match=named):
        evaluate.main()


def test_a_missing_checkpoint_is_named(project: Project) -> None:
    with pytest.raises(UserError, match="artifacts/checkpoint"):
        evaluate.main()


@pytest.fixture
def stream(project: Project) -> TokenStream:
    """Return a validation split of 12 equal documents."""
    text = [EOT, *encode("Ünder the sky")] * 12
    write_tokens(project.folder / "other", {"val": [np.array(text, dtype=np.uint16)]})
    return TokenStream(project.folder / "other", "val")


def test_bytes_per_target(stream: TokenStream) -> None:
    n = len(stream) - 1
    text_bytes = 12 * len("Ünder the sky".encode())
    assert evaluate.bytes_per_target(stream, n, 7) * n == pytest.approx(text_bytes)


def test_unigram_entropy(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "BLOCK", 7)
    tokens = [EOT, *encode("Ünder the sky")]
    assert len(set(tokens)) == len(tokens)
    assert evaluate.unigram_entropy(stream) == pytest.approx(math.log(len(tokens)))
    monkeypatch.setattr(evaluate, "BLOCK", 4)
    monkeypatch.setattr(evaluate, "ENTROPY_BLOCKS", 1)  # only the first 4 tokens are counted
    assert evaluate.unigram_entropy(stream) == pytest.approx(math.log(4))


def test_loss_metrics() -> None:
    metrics = evaluate.loss_metrics(loss=2 * math.log(2), n_bytes=4.0, entropy=3.0)
    assert metrics["bits_per_byte"] == pytest.approx(0.5)
    assert metrics["perplexity"] == pytest.approx(4.0)
    assert metrics["below_unigram"] == pytest.approx(3.0 - 2 * math.log(2))
