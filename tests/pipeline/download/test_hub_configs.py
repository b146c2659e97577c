"""Tests for pipeline.download.hub_configs."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from pipeline.download.hub_configs import find_files, read_card
from pipeline.runtime.errors import UserError

PATHS = ["README.md", "a/x.jsonl", "a/x.parquet", "b/deep/y.parquet", "data/train-0.parquet"]


def list_folder(folder: str, recursive: bool) -> list[str]:
    parents = PurePosixPath(folder)
    inside = [path for path in PATHS if parents in PurePosixPath(path).parents]
    return [p for p in inside if recursive or PurePosixPath(p).parent == parents]


def find(configs: list[str], config: str | None) -> list[str]:
    entries = "".join(f"- {{{entry}}}\n" for entry in configs)
    card = f"---\nconfigs:\n{entries}---\n" if configs else "no metadata"
    return find_files(read_card(card, "a/repo"), config, "a/repo", list_folder)


@pytest.mark.parametrize(
    ("configs", "config", "files"),
    [
        (["config_name: a, data_files: a/*"], "a", ["a/x.parquet"]),
        (["config_name: a, data_files: a/*.jsonl"], None, ["a/x.jsonl"]),
        (["config_name: b, data_dir: b, data_files: '**'"], "b", ["b/deep/y.parquet"]),
        (["config_name: default, data_dir: data"], None, ["data/train-0.parquet"]),
        ([], None, ["data/train-0.parquet"]),
        ([], "default", ["data/train-0.parquet"]),
    ],
)
def test_a_configuration_selects_its_files(
    configs: list[str], config: str | None, files: list[str]
) -> None:
    assert find(configs, config) == files


@pytest.mark.parametrize(
    ("configs", "config", "named"),
    [
        (["config_name: a, data_files: a/*"], "other", "'other'"),
        (["config_name: a, data_files: a/*", "config_name: b, data_files: b/*"], None, "a, b"),
        (["config_name: a, data_files: c/*"], "a", r"c/\*"),
        (["config_name: a, data_files: 'https://host/a.jsonl'"], "a", "https://host/a.jsonl"),
        ([], "other", "'other'"),
    ],
)
def test_a_configuration_without_files_is_an_error(
    configs: list[str], config: str | None, named: str
) -> None:
    with pytest.raises(UserError, match=rf"source\.config.*{named}"):
        find(configs, config)
