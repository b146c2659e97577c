"""Tests for pipeline.runtime.params_file and pipeline.params."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.params import SourceParams, TokenizeParams, VerifyParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import Section, load_section, read_yaml

GOOD = "tokenize:\n  shard_tokens: 5000\n  val_per_10k: 7\n"


def load(tmp_path: Path, text: str) -> TokenizeParams:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return load_section("tokenize", TokenizeParams, path)


def test_section_is_loaded_and_frozen(tmp_path: Path) -> None:
    params = load(tmp_path, GOOD)
    assert params == TokenizeParams(shard_tokens=5000, val_per_10k=7)
    with pytest.raises(ValueError, match="frozen"):
        params.val_per_10k = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tokenize:\n  shard_token: 5000\n", r"tokenize\.shard_token: .*shard_tokens\?"),
        ("tokenize:\n  zzz: 1\n", r"tokenize\.zzz: .*shard_tokens, val_per_10k"),
        ("tokenize:\n  shard_tokens: many\n", r"tokenize\.shard_tokens: .*'many'"),
        ("tokenize:\n  shard_tokens: 5000.5\n", r"tokenize\.shard_tokens: .*5000\.5"),
        ("tokenize:\n  shard_tokens: null\n", r"tokenize\.shard_tokens: .*None"),
        ("tokenize:\n  shard_tokens: -5000\n", r"tokenize\.shard_tokens: .*1000 .*-5000"),
        ("tokenize:\n  val_per_10k: 10001\n", r"tokenize\.val_per_10k: .*10000 .*10001"),
        ("tokenise:\n  shard_tokens: 5000\n", r"tokenise: .*tokenize\?"),
        ("train: {}\n", "section tokenize"),
        ("", "section tokenize"),
        ("tokenize: 5\n", "section tokenize"),
        ("- tokenize\n", "key: value"),
        ("tokenize: [\n", "line 2"),
        (GOOD + GOOD, "duplicate"),
    ],
)
def test_invalid_key_or_section_is_named_on_one_line(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        load(tmp_path, text)
    assert "params.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml"):
        read_yaml(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"params\.yaml"):
        read_yaml(tmp_path / "params.yaml")


def test_file_of_many_paths_is_read_and_a_larger_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("text: " + "x" * 300_000)
    assert len(read_yaml(path)["text"]) == 300_000
    path.write_text("text: " + "x" * (1 << 20))
    with pytest.raises(UserError, match=r"params\.yaml: larger than 1 MiB"):
        read_yaml(path)


def test_long_value_is_cut_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenize\.val_per_10k") as error:
        load(tmp_path, f"tokenize:\n  val_per_10k: {'x' * 1000}\n")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("section", [SourceParams, TokenizeParams, VerifyParams])
def test_every_field_of_a_section_has_a_docstring(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name}"
