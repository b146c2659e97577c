"""Of pipeline.params: a mistake in params.yaml is one line that names it and the mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.params import TokenizeParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import SECTIONS, Section, load_section, nearest, read_yaml
from tests.support.repo import REPO

GOOD = "tokenize:\n  shard_tokens: 5000\n  val_per_10k: 7\n"


def load(tmp_path: Path, text: str) -> TokenizeParams:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return load_section("tokenize", TokenizeParams, path)


def test_a_section_is_loaded_and_frozen(tmp_path: Path) -> None:
    params = load(tmp_path, GOOD)
    assert params == TokenizeParams(shard_tokens=5000, val_per_10k=7)
    with pytest.raises(ValueError, match="frozen"):
        params.val_per_10k = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokenize:\n  shard_token: 5000\n", r"tokenize\.shard_token: .*mean shard_tokens\?"),
        ("tokenize:\n  zzz: 1\n", r"tokenize\.zzz: unknown key; known: shard_tokens, val_per_10k"),
        ("tokenize:\n  shard_tokens: many\n", r"tokenize\.shard_tokens: .*integer.*'many'"),
        ("tokenize:\n  shard_tokens: 5000.5\n", r"tokenize\.shard_tokens: .*5000\.5"),
        ("tokenize:\n  shard_tokens: [1]\n", r"tokenize\.shard_tokens: .*\[1\]"),
        ("tokenize:\n  shard_tokens: null\n", r"tokenize\.shard_tokens: .*None"),
        ("tokenize:\n  shard_tokens: -5000\n", r"tokenize\.shard_tokens: .*1000 .*-5000"),
        ("tokenize:\n  val_per_10k: 10001\n", r"tokenize\.val_per_10k: .*10000 .*10001"),
        ("tokenise:\n  shard_tokens: 5000\n", r"tokenise: unknown section; did you mean tokenize"),
        ("train: {}\n", r"section tokenize is missing"),
        ("", r"section tokenize is missing"),
        ("tokenize: 5\n", r"tokenize"),
        ("- tokenize\n", r"expected `key: value` lines"),
        ("tokenize: [\n", r"not readable as YAML"),
        ("tokenize:\n\tx: 1\n", r"not readable as YAML"),
        (GOOD + GOOD, r"not readable as YAML.*duplicate"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, text)
    assert "params.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml: no such file"):
        read_yaml(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"params\.yaml: not readable"):
        read_yaml(tmp_path / "params.yaml")


def test_nearest() -> None:
    assert nearest("lerning_rate", ["learning_rate", "steps"]) == "did you mean learning_rate?"
    assert nearest("q", ("b", "a")) == "known: a, b"


def test_the_committed_file_holds_every_section() -> None:
    assert tuple(read_yaml(REPO / "params.yaml")) == SECTIONS


def test_every_field_of_a_section_is_documented() -> None:
    sections = [cls for cls in Section.__subclasses__() if cls.__module__.startswith("pipeline")]
    assert len(sections) == 3
    for section in sections:
        for name, field in section.model_fields.items():
            assert field.description or name == "kind", f"{section.__name__}.{name}"
