"""Of train.evaluate: measures that can be checked by hand."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import TokenStream
from pipeline.format.tokenizer import EOT, encode
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from tests.support.hub import Hub
from tests.support.training import Project, some_tokens, write_tokens
from tests.train.test_loop import train_here
from train import evaluate
from train.evals import hellaswag


def test_a_trained_model_is_measured_and_sampled(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(evaluate={"val_tokens": 200})
    train_here()
    evaluate.main()
    metrics = project.metrics("eval")
    assert metrics["val_loss"] == pytest.approx(project.metrics()["val_loss"], abs=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["val_loss"]), rel=1e-4)
    below = metrics["unigram_entropy"] - metrics["val_loss"]
    assert metrics["below_unigram"] == pytest.approx(below, abs=1e-4)
    assert metrics["reference"].startswith("does not apply: model.n_layer is 2")
    assert (project.folder / "metrics/reference.csv").read_text() == "step,reference\n"
    samples = (project.folder / "artifacts/samples.md").read_text()
    assert "**The people**" in samples
    assert samples.count("\n## ") == 2
    assert "val loss" in capsys.readouterr().out
    evaluate.main()
    assert (project.folder / "artifacts/samples.md").read_text() == samples


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def test_ranks_batches_and_sources_make_no_difference(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process from files, 16 rows at a time; by two from the hub, 1 row at a time."""
    words = re.findall(r"\w+", "the people of this land saw a wide river and went over it in boats")
    tasks = [
        {
            "activity_label": "Rowing",
            "ctx_a": " ".join(words[i % 7 :]) + ".",
            "ctx_b": "they then",
            "ctx": " ".join([*words[i % 7 :], "they then"]),
            "endings": [" ".join(words[k : k + 1 + (i + k) % 4]) for k in range(4)],
            "label": str(i % 4),
        }
        for i in range(12)
    ]
    passages = [{"text": " ".join(words[: 2 + i])} for i in range(12)]
    for name, rows in (("tasks", tasks), ("passages", passages)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tokens(project.folder / "other", {"train": [some_tokens(700, seed=9)]})
    asked = {"val_shards": "other/train-00000.bin", "lambada": "passages.jsonl"}
    project.write(evaluate={**asked, "hellaswag": "tasks.jsonl"})
    train_here()
    monkeypatch.setenv("GPT2_MICRO_BATCH", "16")
    evaluate.main()
    one = project.metrics("eval")
    assert (one["hellaswag_tasks"], one["lambada_tasks"]) == (12, 12)
    assert 0 < one["hellaswag_acc"] < 1
    assert one["val_shards_loss"] != one["val_loss"]
    project.write(evaluate={**asked, "hellaswag": "hub"})
    with Hub() as hub:
        file = {"data/validation-00000-of-00001.parquet": parquet(tasks)}
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
    assert project.metrics("eval") == one


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"val_shards": "none.bin"}, r"val_shards: none\.bin: no token file in llm\.c's format"),
        ({"val_shards": "data/tokens/manifest.json"}, "val_shards: .*no token file"),
        ({"val_shards": "data/tokens/train-00000.bin", "val_tokens": 1700}, "at most 1665"),
        ({"hellaswag": "none.jsonl"}, r"evaluate\.hellaswag: none\.jsonl: No such file"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    project: Project, changes: dict[str, Any], said: str
) -> None:
    atomic.write_json(Path("artifacts/checkpoint/state.json"), {})
    project.write(evaluate=changes)
    with pytest.raises(UserError, match=said):
        evaluate.main()


def test_without_a_checkpoint_the_mend_is_named(project: Project) -> None:
    with pytest.raises(UserError, match=r"artifacts/checkpoint.*train\.launch"):
        evaluate.main()


def test_a_short_split_is_refused(project: Project) -> None:
    project.write(evaluate={"val_tokens": 2000})
    with pytest.raises(UserError, match=r"evaluate\.val_tokens: 2000.*at most 1999"):
        evaluate.main()


@pytest.fixture
def stream(project: Project) -> TokenStream:
    """12 documents of one text, as a validation split."""
    text = [EOT, *encode("Ünder the sky")] * 12
    write_tokens(project.folder / "other", {"val": [np.array(text, dtype=np.uint16)]})
    return TokenStream(project.folder / "other", "val")


def test_bytes_are_those_of_the_targets(
    stream: TokenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "BLOCK", 7)  # several blocks
    n = len(stream) - 1
    assert evaluate.target_bytes(stream, n) * n == pytest.approx(12 * len("Ünder the sky".encode()))


def test_the_unigram_entropy_is_that_of_the_counts(
    stream: TokenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "BLOCK", 7)
    tokens = [EOT, *encode("Ünder the sky")]
    assert len(set(tokens)) == len(tokens)
    assert evaluate.unigram_entropy(stream) == pytest.approx(math.log(len(tokens)))
    monkeypatch.setattr(evaluate, "BLOCK", 4)
    monkeypatch.setattr(evaluate, "ENTROPY_BLOCKS", 1)  # the first 4 tokens stand for all
    assert evaluate.unigram_entropy(stream) == pytest.approx(math.log(4))


def test_bits_per_byte() -> None:
    measures = evaluate.describe(loss=2 * math.log(2), n_bytes=4.0, entropy=3.0)
    assert measures["bits_per_byte"] == pytest.approx(0.5)
    assert measures["perplexity"] == pytest.approx(4.0)
    assert measures["below_unigram"] == pytest.approx(3.0 - 2 * math.log(2))
