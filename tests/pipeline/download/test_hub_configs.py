"""Tests for pipeline.download.hub_configs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pytest
from datasets.load import LocalDatasetModuleFactory
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.download.hub_configs import _metadata, find_files, read_card
from pipeline.download.left_out import LeftOut
from pipeline.runtime.errors import UserError

PATHS = [
    *("README.md", "a/x.jsonl", "a/x.parquet", "a/_temporary/x.parquet"),
    *("b/deep/y.parquet", "data/train-0.parquet", "data/test-0.parquet"),
]


def find(
    configs: Sequence[str],
    config: str | None,
    paths: Sequence[str] = PATHS,
    exclude: Sequence[str] = (),
) -> list[str]:
    def list_folder(folder: str, recursive: bool) -> list[str]:
        parents = PurePosixPath(folder)
        inside = [path for path in paths if parents in PurePosixPath(path).parents]
        return 2 * [p for p in inside if recursive or PurePosixPath(p).parent == parents]

    entries = "".join(f"- {{{entry}}}\n" for entry in configs)
    card = f"---\nconfigs:\n{entries}---\n" if configs else "no metadata"
    left_out = LeftOut(exclude)
    try:
        return find_files(read_card(card, "a/repo"), config, "a/repo", list_folder, left_out)
    finally:
        left_out.report()


@pytest.mark.parametrize(
    ("configs", "config", "files"),
    [
        (["config_name: a, data_files: a/*"], "a", ["a/x.parquet"]),
        (["config_name: a, data_files: a/*.jsonl"], None, ["a/x.jsonl"]),
        (["config_name: a, data_files: [a/*.jsonl, a/x.jsonl]"], None, ["a/x.jsonl"]),
        (["config_name: a, data_files: a/_*/*"], None, ["a/_temporary/x.parquet"]),
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


@given(st.lists(st.sampled_from(["---", "\n", "\r\n", "\r", " ", "\t", "a: 1", "-"])).map("".join))
@example("---\na: 1\n--- \t\n# Text")
@example(" \n---\na: 1\n---")
@example("--- \na: 1\n---\n")
@example("---\n---\na: 1\n---\n")
@example("---\r\n---\n")
def test_the_metadata_of_a_card_are_those_that_the_hub_finds(card: str) -> None:
    found = REGEX_YAML_BLOCK.search(card)
    assert _metadata(card) == _metadata(f"\ufeff{card}") == (found[2] if found else "")


def test_many_patterns_on_many_files_are_refused_at_once() -> None:
    configs = {"a": {"data_files": [f"data/{i}-*.jsonl" for i in range(300)]}}
    paths = [f"data/{i}.jsonl" for i in range(30_000)]
    with pytest.raises(UserError, match=r"^source\.config: 30000 files are too many"):
        find_files(configs, "a", "a/repo", lambda *_: paths, LeftOut())


@pytest.mark.parametrize(
    "paths",
    [
        ["a.jsonl", "b.jsonl", "c.parquet"],
        ["a.jsonl.gz", "b.json", "c.parquet"],
        ["a.jsonl", "b.parquet"],
        ["a.csv", "b.json", "c.txt"],
        ["a.txt", "b.txt", "c.csv", "d.csv.gz"],
        ["a.v1.jsonl", "b.tsv", "c.csv", "config.json", "d.md", "README.md"],
        ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"],
        ["train.jsonl", "more.jsonl", "test.jsonl"],
        ["train/a.parquet", "train/b.txt", "train/c.txt", ".cache/d.parquet", "__x/e.parquet"],
        ["data/train-00000-of-00001.parquet", "data/a.jsonl", "b.jsonl"],
        ["a.zip", "b.txt", "c.txt"],
    ],
)
def test_the_files_of_a_mixed_repository_are_those_of_datasets(
    tmp_path: Path, paths: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    module = LocalDatasetModuleFactory(str(tmp_path)).get_module()
    assert module.builder_configs_parameters.builder_configs
    (builder_config,) = module.builder_configs_parameters.builder_configs
    taken = {
        Path(file).relative_to(tmp_path).as_posix() for file in builder_config.data_files["train"]
    }
    taken -= {path for path in taken if path.endswith(".zip")}
    assert find([], None, paths) == sorted(taken)
    # Whatever else could be text is named.
    named = capsys.readouterr().out
    hidden = {"config.json", "dataset_info.json", "README.md"}
    assert [path for path in paths if path not in taken | hidden and path not in named] == []


def test_files_may_be_excluded_and_decide_no_format() -> None:
    paths = ["a.jsonl", "b/c.jsonl", "d.parquet"]
    assert find([], None, paths, ["*.jsonl"]) == ["d.parquet"]
    assert find([], None, paths, ["b/*"]) == ["d.parquet"]
    assert find([], None, paths, ["d.parquet", "a.jsonl"]) == ["b/c.jsonl"]
    card = ["config_name: a, data_files: '**'"]
    assert find(card, "a", paths, ["b/"]) == ["d.parquet"]
    for configs in ([], card):
        with pytest.raises(UserError, match=r"source\.exclude"):
            find(configs, None, paths, ["*"])


@pytest.mark.parametrize("others", [["a.png", "b.png"], ["a.zip", "b.ZIP"]])
def test_a_repository_of_another_kind_is_refused(others: list[str]) -> None:
    with pytest.raises(UserError, match=r"source\.config.*source\.exclude"):
        find([], None, ["metadata.jsonl", *others])
    assert find([], None, ["metadata.jsonl", *others], others) == ["metadata.jsonl"]


@pytest.mark.parametrize(
    ("configs", "config", "named"),
    [
        (["config_name: a, data_files: a/*"], "other", "'other'"),
        (["config_name: a, data_files: a/*", "config_name: b, data_files: b/*"], None, "a, b"),
        (["config_name: a, data_files: c/*"], "a", r"a of a/repo"),
        (["config_name: a, data_files: 'https://host/a.jsonl'"], "a", "https://host/a.jsonl"),
        (["config_name: a, data_files: [a/x.jsonl, a/y.jsonl]"], "a", r"a/y\.jsonl"),
        ([], "other", "'other'"),
    ],
)
def test_a_configuration_without_files_is_an_error(
    configs: list[str], config: str | None, named: str
) -> None:
    with pytest.raises(UserError, match=rf"source\.config.*{named}"):
        find(configs, config)
