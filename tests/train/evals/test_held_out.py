"""Tests for the held-out text: its bits per byte, and documents that training has seen."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from model import GPT
from pipeline.format.tokenizer import EOT, encode
from pipeline.params import TokenizeParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from tests.support.small_data import some_texts, tokenize_here, write_raw
from tests.support.training import Project, train_here
from train import evaluate
from train.evals.held_out import read_documents
from train.run import CHECKPOINT
from train.study.held_out_check import count_shared

TEXTS = ["Wir sind das Volk – é.", "The <|endoftext|> people\nof the Union.", "x" * 40]


def write(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [*TEXTS, None, ""]}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS))
    else:
        path.write_text("\n".join(TEXTS))
    return path


def test_bits_per_byte_are_over_each_token_and_byte(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    write("held.jsonl")
    project.write(evaluate={"held_out": "held.jsonl"})
    train_here()
    evaluate.main()
    found = project.results("evaluation")
    gpt = GPT.from_checkpoint(CHECKPOINT)
    tokens = torch.tensor([token for text in TEXTS for token in (EOT, *encode(text))])
    nats, size = 0.0, gpt.config.block_size
    for first in range(0, len(tokens) - 1, size):
        window = tokens[first : first + size + 1][None]
        with torch.no_grad():
            nats += gpt(window[:, :-1], window[:, 1:], reduction="sum").item()
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    expected = nats / math.log(2) / n_bytes
    assert found["held_out_bits_per_byte"] == pytest.approx(expected, rel=1e-4)
    assert found["held_out_bytes"] == n_bytes
    metrics = json.loads((project.folder / "metrics/eval.json").read_text())
    assert metrics["held_out_bits_per_byte"] == found["held_out_bits_per_byte"]
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_the_documents_of_each_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = ["\n".join(TEXTS)] if name.endswith("txt") else TEXTS
    assert read_documents(write(name), "x") == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"text\nx\n"),
        ("a.txt", b""),
        ("a.txt", b"\xff\xfe"),
        ("a.jsonl", b'{"text": 3}\n'),
        ("a.jsonl", b'{"other": "x"}\n'),
        ("a.jsonl", b'["text"]\n'),
        ("a.jsonl", b"{\n"),
        ("a.jsonl", b'{"text": "\\ud800"}\n'),
        ("a.parquet", b"PAR1"),
    ],
)
def test_faults_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path / f"missing-{name}", tmp_path):
        with pytest.raises(UserError, match=r"^held: ") as error:
            read_documents(path, "held")
        assert "\n" not in str(error.value)


def test_documents_that_training_has_seen_are_found(tmp_path: Path, machine: Machine) -> None:
    texts = [text for text in some_texts(60) if text]
    raw = write_raw(tmp_path / "raw", [texts])
    params = TokenizeParams(shard_tokens=5000, val_per_10k=2000)
    tokenize_here(raw, tmp_path / "tokens", params, machine)
    found = [count_shared(tmp_path / "tokens", [text]) for text in texts]
    assert set(found) == {0, 1}  # 0: a validation document
    trained = sum(found)
    assert 0.6 * len(texts) < trained < len(texts)
    assert count_shared(tmp_path / "tokens", [*texts, *texts]) == trained
    assert count_shared(tmp_path / "tokens", [text + "." for text in texts]) == 0
