"""Tests for the model card of `model.export`: the figures of a run of this project."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from model import card, export
from model.config import GPTConfig
from model.errors import FormatError
from tests.support.training import Project, train_here
from train import evaluate

CHECKPOINT, OUT = Path("artifacts/checkpoint"), Path("artifacts/hf")


def test_card_has_the_figures_of_the_run_and_of_no_other(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.tokenizer_files.write_tokenizer", lambda *_: None)  # saves a second
    train_here()
    evaluate.main()
    export.main(
        ["--checkpoint", str(CHECKPOINT), "--out", str(OUT), "--project", ".", "--licence", "mit"]
    )
    page = (OUT / card.FILE).read_text(encoding="utf-8")
    evaluation, training = project.results("evaluation"), project.results()

    data = ModelCard(page).data  # as the hub reads it
    assert isinstance(data, ModelCardData)
    assert data.license == "mit"
    results = data.eval_results or []
    assert {r.metric_name: r.metric_value for r in results} == {
        label: evaluation[key] for key, (_, label) in card.METRICS.items() if key in evaluation
    }
    rows = dict(re.findall(r"^\| (\S[^|]*?) +\| (.*?) +\|$", page, re.MULTILINE))
    assert rows["12"] == f"{training['val_loss']:.4f}"  # the end of the curve
    assert rows["`learning_rate`"] == "0.01"
    assert rows["training tokens"] == "5,000"
    assert rows["tokens seen"] == f"{12 * 128:,}"
    assert rows["devices"] == f"1 x {training['device']}"

    state = json.loads((CHECKPOINT / "state.json").read_text())
    with safe_open(OUT / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert (metadata["run_key"], metadata["step"]) == (state["run_key"], "12")

    # Records of another run, and damaged ones, are refused.
    for path, key in (
        (card.TRAINING, "val_loss"),
        (card.EVALUATION, "weights_sha256"),
        (card.MANIFEST, "dataset_key"),
    ):
        kept = path.read_bytes()
        values = {k: v for k, v in json.loads(kept).items() if k != "json_sha256"}
        path.write_text(json.dumps(values | {key: "of another run"}))
        with pytest.raises(FormatError, match=rf"{key}.*{path.name}"):
            card.read(CHECKPOINT, project.folder)
        path.write_bytes(kept)
    card.EVALUATION.write_bytes(card.EVALUATION.read_bytes().replace(b"perplexity", b"Perplexity"))
    with pytest.raises(FormatError, match=r"evaluation\.json is damaged"):
        card.read(CHECKPOINT, project.folder)
    card.EVALUATION.unlink()
    card.MANIFEST.unlink()
    assert "## Evaluation" not in card.text(GPTConfig(1, 1, 8), card.read(CHECKPOINT, Path()), "x")


@pytest.mark.parametrize("missing", ["init", "seed", "schedule", "train"])
def test_card_of_a_checkpoint_of_earlier_code(missing: str) -> None:
    train = {"init": "hf /home/me/<model>", "seed": 1, "schedule": "wsd", "dtype": "a | b & <b>"}
    train.pop(missing, None)
    state = {"step": 1, "tokens": 128, "train": train}
    state.pop(missing, None)
    page = card.text(GPTConfig(1, 1, 8), card.Records(state), "x")
    assert "/home/me" not in page  # a path of the machine that trained
    if missing == "train":
        return
    assert r"| `dtype` | a \| b &amp; &lt;b&gt; |" in page
    assert missing == "init" or "| `init` | hf |" in page
    with pytest.raises(FormatError) as refused:
        card.text(GPTConfig(1, 1, 8), card.Records({**state, "tokens": "many"}), "x")
    assert "--project" not in str(refused.value)


def test_card_of_odd_names_has_no_other_cells_links_or_yaml() -> None:
    odd = 'a | b \\| <img src="//x"> ![c](//x) [d](//x)\n\n---\n# Title'
    records = card.Records(
        {"step": 1, "tokens": 128, "versions": {odd: odd}},
        {"world_size": 1, "device": odd, "seconds": 1.0},
        manifest={
            "source": {
                "sources": {"main": {"kind": "hub", "repo": odd, "revision": odd, "config": odd}}
            },
            "totals": {"train": {"tokens": 1, "docs": 1}},
            "tokenizer": {"name": odd},
            "dataset_key": "k",
        },
    )
    page = card.text(GPTConfig(1, 1, 8), records, "me/x", licence=odd)
    data, body = ModelCard(page).data.to_dict(), page.partition("\n---\n")[2]
    assert (data["datasets"], data["license"]) == ([odd], odd)
    assert len(re.findall("^# ", body, re.MULTILINE)) == 1
    rows = [re.sub(r"\\.", "", line) for line in body.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert {row.count("|") for row in rows} == {3}
    assert not any(set("[]<") & set(row) for row in rows)


def test_manifest_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    for path, value in (
        (checkpoint / "state.json", {"dataset_key": "0"}),
        (tmp_path / card.TRAINING, {}),
        (tmp_path / card.MANIFEST, {"schema_version": "1.2", "dataset_key": "0", "source": {}}),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    with pytest.raises(FormatError, match=r"data/tokens/manifest\.json") as error:
        card.read(checkpoint, tmp_path)
    assert "1.2" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dataset_of_two_configurations_is_listed_once() -> None:
    source = {"kind": "hub", "repo": "a/b", "revision": "v"}
    manifest = {
        "source": {"sources": {"one": source, "two": source}},
        "totals": {},
        "tokenizer": {"name": "gpt2"},
        "dataset_key": "0",
    }
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8)
    found = card.text(config, card.Records({}, manifest=manifest), ".")
    assert ModelCard(found).data.to_dict()["datasets"] == ["a/b"]
