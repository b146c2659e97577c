"""Of train.evaluate: measures that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline import TokenStream
from pipeline.errors import UserError
from pipeline.tokenizer import EOT, encode
from tests.train.conftest import Project, write_tokens
from tests.train.test_loop import train_here
from train import evaluate


def test_a_trained_model_is_measured_and_sampled(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(evaluate={"val_tokens": 200})
    train_here()
    evaluate.main()
    metrics = project.metrics("eval")
    assert metrics["val_loss"] == pytest.approx(project.metrics()["val_loss"], abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["val_loss"]))
    assert metrics["below_unigram"] == metrics["unigram_entropy"] - metrics["val_loss"]
    samples = (project.folder / "artifacts/samples.md").read_text()
    assert "**The people**" in samples
    assert samples.count("\n## ") == 2
    assert "val loss" in capsys.readouterr().out
    evaluate.main()
    assert (project.folder / "artifacts/samples.md").read_text() == samples


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


def test_bits_per_byte() -> None:
    measures = evaluate.describe(loss=2 * math.log(2), n_bytes=4.0, entropy=3.0)
    assert measures["bits_per_byte"] == pytest.approx(0.5)
    assert measures["perplexity"] == pytest.approx(4.0)
    assert measures["below_unigram"] == pytest.approx(3.0 - 2 * math.log(2))
