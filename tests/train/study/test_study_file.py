"""Tests for the files of studies: what a run is, and what is refused before anything runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.runtime.errors import UserError
from tests.support.repo import REPO
from train.params import TrainParams
from train.preset import merge
from train.study import definition, study_file
from train.study.definition import Study
from train.study.runner import checkpoint_bytes, data_key

DATA = {"curate.exact_duplicates": True}  # a key of the data
VALID: dict[str, Any] = {
    "base": "smoke",
    "variants": {"a": {}, "b": {"train.learning_rate": 1e-3}},
    "seeds": 3,
    "budget": {"tokens": 20_480},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, in which `write` writes a study."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        study_file, "study_files", lambda: {path.stem: path for path in tmp_path.glob("*.yaml")}
    )
    return tmp_path


def load(changes: dict[str, Any] | str = {}, name: str = "one") -> Study:  # noqa: B006
    if isinstance(changes, str):
        Path(f"{name}.yaml").write_text(changes)
    else:
        with open(f"{name}.yaml", "w") as file:
            YAML(typ="safe", pure=True).dump({**copy.deepcopy(VALID), **changes}, file)
    return study_file.load(name)


def test_a_run_has_all_sections_and_the_tokens_of_the_budget(folder: Path) -> None:
    study = load({"variants": {"a": {}, "b": {"train": {"batch_tokens": 4096}}}})
    for name in study.variants:
        params = study.parameters(name, 2)
        assert params["train"]["seed"] == 2
        train = TrainParams.model_validate(params["train"])
        assert train.batches(params["model"]["block_size"])(train.steps)[0] * 64 == 20_480
    assert study.parameters("b", 1)["model"]["n_layer"] == 2  # smoke
    assert study.parameters("b", 1)["tokenize"]["val_per_10k"] == 500  # mini, which has every key


LONG = "x" * 300  # no name of a file
SECONDS = {"budget": {"seconds": 8.0}}
HELD_OUT = {"held_out": "text.jsonl"}
VAL_LOSS = {"held_out": "text.jsonl", "metric": "val_loss"}
TWO = {"sources.main.kind": "sample", "sources.web": {"kind": "hub", "files": 1}}


def test_sources_are_changed_by_name_or_replaced_with_their_mixture(folder: Path) -> None:
    Path("text.jsonl").write_text('{"text": "some text"}')
    variants = {
        "a": {},
        "less": {"sources.main.files": 2},
        "own": {"sources": {"code": {"kind": "files", "paths": ["x"]}}},
        "b": {"sources.web": {"files": 3}, "train.mixture": {"main": 1, "web": 4}},
    }
    mixed = {**TWO, "train.mixture": {"main": 1, "web": 1}}
    study = load({"params": mixed, "variants": variants, "held_out": "text.jsonl"})
    a, less, own, b = (study.parameters(name, 1) for name in variants)
    assert [p["sources"]["main"]["files"] for p in (a, less, b)] == [None, 2, None]
    assert b["sources"]["web"] == {**a["sources"]["web"], "files": 3}
    assert list(own["sources"]) == ["code"]
    assert [p["train"]["mixture"] is None for p in (a, less, own, b)] == [False, False, True, False]
    committed = (REPO / "params.yaml").read_text()  # what a run reads: complete, nothing of before
    for params in (a, less, own, b):
        text = merge(committed, params)
        assert YAML(typ="safe", pure=True).load(text) == params
    assert len({study.data_key(name) for name in variants}) == 4


def test_mixtures_of_the_same_sources_have_the_same_data(folder: Path) -> None:
    variants = {"even": {}, "uneven": {"train.mixture": {"main": 1, "web": 4}}}
    mixed = {**TWO, "train.mixture": {"main": 1, "web": 1}}
    study = load({"params": mixed, "variants": variants, "metric": "val_loss"})
    assert study.same_data
    assert study.parameters("uneven", 1)["train"]["mixture"] == {"main": 1, "web": 4}


def test_the_budget_counts_a_growing_batch(folder: Path) -> None:
    ramp = {"train": {"batch_doublings": 2, "batch_ramp_steps": 10, "warmup_steps": 0}}
    study = load({"params": ramp})
    train = TrainParams.model_validate(study.parameters("a", 1)["train"])
    tokens = [train.batches(64)(train.steps + more)[0] * 64 for more in (0, 1)]
    assert tokens[0] <= 20_480 < tokens[1]


def test_a_variant_without_keys_may_be_left_empty(folder: Path) -> None:
    text = "variants:\n  a:\n  b: {train.beta2: 0.9}\nbudget: {tokens: 102400}\n"
    assert load(text).changes["a"] == {}


def test_a_study_that_no_experiment_can_be_named_by_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"MyStudy.*rename"):
        load(name="MyStudy")


def test_another_held_out_text_is_looked_for_in_the_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Study, "code_key", "x")
    keys = set()
    for text in ("one", "another"):
        Path("text.jsonl").write_text(json.dumps({"text": text}))
        study = load(HELD_OUT)
        keys.add(data_key(study, "a"))
        assert data_key(study, "a") == data_key(study, "b")  # which has the same data
    assert len(keys) == 2


def test_the_checkpoints_of_a_run_have_the_bytes_of_adamw(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Study, "code_key", "x")
    size = {
        "model": {
            "size": "gpt2",
            "n_layer": None,
            "n_head": None,
            "n_embd": None,
            "block_size": 1024,
        }
    }
    study = load({"params": {**size, "train.keep_checkpoints": 2}})
    # 124,439,808 parameters (Radford et al. 2019, small) of 4 bytes, with two moments; the best
    # checkpoint as well.
    assert checkpoint_bytes(study.run("a", 1)) == pytest.approx(3 * 12 * 124_439_808, rel=1e-3)


def test_seeds_are_paired_or_all_different(folder: Path) -> None:
    def seeds(study: Study) -> list[int]:
        return [study.parameters(v, s)["train"]["seed"] for v in study.variants for s in (7, 8)]

    assert seeds(load({"seeds": [7, 8]})) == [7, 8, 7, 8]
    equal = load({"seeds": [7, 8], "pair_seeds": False, "variants": {"a": {}, "b": {}}})
    assert len({*seeds(equal)}) == 4


def test_comparisons(folder: Path) -> None:
    three = {"a": {}, "b": {"train.beta2": 0.9}, "c": {"train.beta2": 0.8}}
    assert load({"variants": three}).comparisons == [("a", "b"), ("a", "c")]
    assert len(load({"variants": three, "compare": "all"}).comparisons) == 3
    assert load({"variants": three, "compare": [["c", "b"]]}).comparisons == [("c", "b")]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"variants": {"a": {}, "b": {"sources.web.paths": ["x"]}}}, "sources.web"),
        ({"variants": {"a": {}, "b": {"sources": {"main": 3}}}}, "main"),
        ({"variants": {"a": {}, "b": {"sources.main.kinds": "x"}}}, "sources.main.kinds"),
        ({"variants": {"a": {}, "b": {"sources.main.kind": "x"}}}, "sources.main.kind"),
        ({"variants": {"a": {}, "b": {"train.mixture": {"web": 1}}}}, "train.mixture.web"),
        (
            {"params": {"sources": {"main": {"files": 1}}, "sources.main.files": 2}},
            "sources.main.files",
        ),
        ({"variants": {"a": {}, "b": {"train.learning_rat": 1e-3}}}, "b: train.learning_rat"),
        ({"variants": {"a": {}, "b": {"train.learning_rate": 2.0}}}, "train.learning_rate"),
        ({"variants": {"a": {}, "b": {"trian.beta1": 0.5}}}, "trian"),
        ({"variants": {"a": {}, "b": {"train.seed": 5}}}, "train.seed"),
        ({"variants": {"a": {}, "b": {"train": {"steps": 5}}}}, "train.steps"),
        ({"variants": {"a": {}, "b": {"evaluate.held_out": "x.txt"}}}, "evaluate.held_out"),
        ({"variants": {"a": {}, "b": {}}}, "variants.b"),
        ({"variants": {"a": {}, "b": {"train.log_every": 7}}}, "variants.b"),  # observes
        ({"variants": {"a": {}, "b": {"train.beta1": 0.5, "train": {"beta1": 0.6}}}}, "beta1"),
        ({"variants": {"a": {}, "b": {"evaluate.val_tokens": 1024}}}, "evaluate.val_tokens"),
        ({"variants": {"a": {}, "b": {"evaluate": {"samples": 3}}}}, "evaluate.samples"),
        ({"variants": {"a": {}, "b": {"model.block_size": 32}}}, "held_out"),
        ({"variants": {"a": {}}}, "variants"),
        ({"variants": {"a": {}, "../b": {"train.beta1": 0.5}}}, "../b"),
        ({"variants": {"a": {}, "b/c": {"train.beta1": 0.5}}}, "b/c"),
        ({"variants": {"a": {}, "b..c": {"train.beta1": 0.5}}}, "b..c"),
        ({"variants": {"a": {}, "b": DATA}}, "held_out"),
        ({"variants": {"a": {}, "b": DATA}, "held_out": "one-document.txt"}, "held_out"),
        ({"held_out": "empty.jsonl"}, "held_out"),
        ({"held_out": "text.csv"}, "held_out"),
        ({"held_out": "../text.txt"}, "held_out"),
        ({"held_out": "/etc/hostname"}, "held_out"),
        ({"held_out": "link.txt"}, "held_out"),
        ({"held_out": "missing.txt"}, "held_out"),
        ({"base": "smok"}, "smok"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": 2**62}, "seeds"),
        ({"seeds": "three"}, "seeds"),
        ({"seeds": [1.5]}, "seeds"),
        ({"seeds": [1, 1_000_004]}, "seeds"),  # 1 of the second variant, if they are not paired
        ({"budget": {"seconds": 1e308}}, "budget.seconds"),
        ({"variants": {"a": {}, "b": 3}}, "b"),
        ({"variants": {"a": {}, 1: {"train.beta1": 0.5}}}, "1"),
        ({"variants": {"a": {}, "b": {"train.batch_tokens": 1000}}}, "b: train.batch_tokens"),
        ({"variants": {"a": {}, "b": {"train.batch_tokens": 1000}}, **SECONDS}, "b: train.batch_"),
        ({"variants": {"a": {}, "b": {"model.block_size": 50}}, **HELD_OUT}, "variants.b"),
        ({"variants": {"a": {}, "b": {"model.block_size": 32}}, **VAL_LOSS}, "model.block_size"),
        ({"variants": {"a": {}, "b": {"train.document_masking": True}}}, "train.document_masking"),
        ({"params": {"evaluate.hellaswag": "missing.jsonl"}}, "evaluate.hellaswag: missing.jsonl"),
        ({"params": {"evaluate.val_shards": LONG}}, "evaluate.val_shards"),
        ({"params": {"curate.decontaminate": [LONG]}}, "curate.decontaminate"),
        ({"params": {"curate.decontaminate": ["."]}}, "curate.decontaminate"),
        ({"params": {"train.init": "hf ../nowhere"}}, "train.init"),
        ({"held_out": LONG}, "held_out"),
        ({"held_out": "a\nb.jsonl"}, "held_out"),
        ({"base": "a\nb"}, "base"),
        ({"base": "x" * 5000}, "base"),
        ({"compare": [["a\nb", "b"]]}, "compare"),
        ({"compare": ["a", "b"]}, "compare"),
        ({"params": {"sources": {"a\nb": 3}}}, "sources"),
        ({"budget": {"tokens": 10}}, "budget"),
        ({"budget": {"tokens": 10_000, "seconds": 3.0}}, "budget"),
        ({"budget": {"tokens": 4096}}, "warmup_steps"),
        ({"metric": "loss"}, "metric"),
        ({"metric": "lambada_acc"}, "evaluate.lambada"),
        ({"compare": [["a", "a"]]}, "compare"),
        ({"compare": [["a", "x"]]}, "compare"),
        ({"compare": [["a", "b"], ["b", "a"]]}, "compare"),
        ({"alpha": 0.7}, "alpha"),
        ({"sedes": 3}, "sedes"),
    ],
)
def test_faults_are_refused_in_one_line_that_names_them(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    (folder / "outside").mkdir(exist_ok=True)
    Path("link.txt").symlink_to("/etc/hostname")
    Path("empty.jsonl").write_text("{}\n")
    Path("text.jsonl").write_text('{"text": "some text"}')
    for name in ("one-document.txt", "text.csv"):
        Path(name).write_text("some text")
    with pytest.raises(UserError) as error:
        load(changes)
    assert named in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) <= 1000
    assert "one.yaml" in str(error.value) or "smok" in named


def test_a_name_twice_and_a_strange_study_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"one\.yaml"):
        load("variants: {a: {}, a: {train.beta1: 0.5}, b: {}}\nbudget: {tokens: 9999}\n")
    for name in ("two", "../one", "/etc/passwd", "one/../one", ""):
        with pytest.raises(UserError, match="unknown"):
            study_file.load(name)


def test_the_key_follows_all_that_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "code_key", "x")
    Path("text.txt").write_text("some text")

    def key(changes: dict[str, Any], seed: int = 1) -> str:
        return load({"held_out": "text.txt", **changes}).run("a", seed).key

    first = key({})
    assert key({"params": {"sources.main.exclude": []}}) == first  # the default
    assert key({}) == key({"seeds": 9, "compare": "all", "alpha": 0.05}) == first
    others = [key({}, seed=2), key({"budget": {"tokens": 30_720}})]
    others += [key({"params": {"train.mixture": {"main": 2}}}), key({"params": DATA})]
    Path("text.txt").write_text("other text")
    assert len({first, *others, key({})}) == 6


@pytest.mark.parametrize(
    "name",
    ["curate.decontaminate", "evaluate.hellaswag", "evaluate.lambada", "evaluate.val_shards"],
)
def test_the_key_follows_the_content_of_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(Study, "code_key", "x")
    changes = {"params": {name: ["tasks.jsonl"] if "curate" in name else "tasks.jsonl"}}
    keys = set()
    for content in ("one", "another"):
        Path("tasks.jsonl").write_text(content)
        study = load(changes)
        keys.add(study.run("a", 1).key)
        assert list(study.files) == ["tasks.jsonl"]
        (machine, other) = ({"cores": 1, "compile": c} for c in (True, False))
        assert study.speed_key("a", machine) != study.speed_key("a", other)
    assert len(keys) == 2


def test_the_key_follows_the_content_of_initial_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Study, "code_key", "x")
    Path("start").mkdir()
    keys = set()
    for content in ("one", "another"):
        Path("start/model.safetensors").write_text(content)
        study = load({"params": {"train.init": "hf start"}})
        keys.add(study.run("a", 1).key)
        assert list(study.files) == ["start"]
    assert len(keys) == 2
    Path("start/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"one\.yaml: train\.init: start"):
        load({"params": {"train.init": "hf start"}})


def test_the_committed_studies_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(study_file, "_inside", lambda name, where: name)  # data is not committed
    monkeypatch.setattr(study_file, "read_documents", lambda path, where: ["some text"])
    monkeypatch.setattr(definition, "_hash", lambda path: "x")
    assert len(study_file.study_files()) >= 2
    for name in study_file.study_files():
        study = study_file.load(name)
        assert study.title
        assert len(study.variants) >= 2
