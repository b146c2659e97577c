"""Tests for train.preset: merging, the committed presets, and what is refused."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from pipeline.runtime.errors import UserError
from tests.support.repo import REPO
from train import preset
from train.preset import load, merge, preset_files, read_preset

PRESETS = list(preset_files())
PARTIAL = ("mini", "smoke")  # the other presets set everything in which presets differ
COMPLETE = [name for name in PRESETS if name not in PARTIAL]


def committed() -> str:
    return (REPO / "params.yaml").read_text(encoding="utf-8")


def values(text: str) -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_merging_twice_changes_nothing_and_keeps_comments(name: str) -> None:
    once = merge(committed(), read_preset(name))
    assert merge(once, read_preset(name)) == once
    assert once.count("#") == committed().count("#")


def test_mini_is_the_committed_parameters_and_undoes_every_preset() -> None:
    mini = read_preset("mini")
    assert mini == values(committed())
    assert merge(committed(), mini) == committed()
    for name in PRESETS:
        other = merge(committed(), read_preset(name))
        assert values(merge(other, mini)) == mini


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.parametrize("before", ["mini", "speedrun"])
def test_large_preset_overrides_every_other_preset(name: str, before: str) -> None:
    other = merge(committed(), read_preset(before))
    assert values(merge(other, read_preset(name))) == values(merge(committed(), read_preset(name)))


def test_list_shows_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    preset.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == PRESETS
    assert max(map(len, lines)) <= 120


def test_command_merges_into_params_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(REPO / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    preset.main(["smoke"])
    assert Path("params.yaml").read_text() == merge(committed(), read_preset("smoke"))
    assert load().train.steps == 20


@pytest.mark.parametrize(
    ("params", "name", "named"),
    [
        ("model: {}\n", None, "section sources"),
        ("sources: 3\n", None, "section sources"),
        ("source: 3\n", None, "sources: {main: 3}"),
        (committed().replace("block_size: ", "blocksize: "), None, "model.blocksize"),
        (committed(), "fineweb", "did you mean fineweb-10b"),
    ],
)
def test_mistake_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: str, name: str | None, named: str
) -> None:
    (tmp_path / "params.yaml").write_text(params)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        load(name)
    with pytest.raises(UserError, match=named):
        preset.main([name or "smoke"])
    with pytest.raises(UserError, match=named):
        preset.main([name or "smoke", "--flags"])


PHASES = [{"until": 0.5, "weights": {"main": 1}}, {"until": 1.0, "weights": {"main": 2.5}}]


@pytest.mark.parametrize("mixture", [{"main": 0.7}, PHASES])
def test_fractions_in_params_yaml_can_be_merged_again(mixture: Any) -> None:
    text = merge(committed(), {"train": {"mixture": mixture}})
    assert merge(text, {"train": {"mixture": mixture}}) == text
    text = merge(text, {"train": {"log_every": 7}})
    assert values(text)["train"]["mixture"] == mixture


TWO: dict[str, Any] = {
    "web": {"kind": "hub"}, "code": {"kind": "files", "paths": ["a b"], "exclude": ["x"]},
}  # fmt: skip


def with_sources(sources: dict[str, Any], mixture: Any = None) -> str:
    params = values(committed())
    params["sources"], params["train"]["mixture"] = sources, mixture
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(params, text)
    return text.getvalue()


@pytest.mark.parametrize("mixture", [None, {"web": 1, "code": 0.5}])
@pytest.mark.parametrize("name", ["muon", "mini"])
def test_preset_with_its_own_sources_replaces_all_and_the_mixture(name: str, mixture: Any) -> None:
    own = read_preset(name)["sources"]
    text = merge(with_sources(TWO, mixture), read_preset(name))
    assert values(text)["sources"] == own
    assert values(text)["train"]["mixture"] is None
    text = merge(with_sources({"main": TWO["code"]}, {"main": 1}), read_preset(name))
    assert values(text)["sources"] == {"main": {"exclude": []} | own["main"]}
    assert values(text)["train"]["mixture"] is None
    mixed = {"sources": TWO, "train": {"mixture": {"web": 2, "code": 1}}}
    assert values(merge(text, mixed))["train"]["mixture"] == mixed["train"]["mixture"]


def test_preset_without_a_kind_changes_a_source_that_exists() -> None:
    both = {**TWO, "main": {"kind": "sample"}}
    text = merge(with_sources(both, {"main": 1, "web": 0, "code": 0}), read_preset("smoke"))
    assert values(text)["sources"] == {**both, "main": {"kind": "sample", "files": 1}}
    assert values(text)["train"]["mixture"] == {"main": 1, "web": 0, "code": 0}
    wrong: list[dict[str, Any]] = [TWO, {"main": None}, {"main": [1]}, {"main": "x", **TWO}, {}]
    for sources in wrong:
        with pytest.raises(UserError, match=r"sources\.main"):
            merge(with_sources(sources), read_preset("smoke"))


def test_sources_are_changed_by_name_and_a_mixture_is_replaced() -> None:
    two = with_sources({"main": {"kind": "sample"}, "web": {"kind": "hub"}})
    weights: dict[str, Any] = {"train": {"mixture": {"main": 1, "web": 0}}}
    phased: dict[str, Any] = {
        "train": {"mixture": [{"until": 1.0, "weights": {"main": 1, "web": 2}}]}
    }
    one_stream: dict[str, Any] = {"train": {"mixture": None}}
    for overlay in (weights, phased, weights, one_stream):
        two = merge(two, overlay)
        assert values(two)["train"]["mixture"] == overlay["train"]["mixture"]
    for overlay, named in (
        ({"sources": {"other": {"files": 1}}}, "sources.other"),
        ({"source": {"files": 1}}, "sources: {main:"),
        ({"train": {"mixture": {"main": 1}}}, "train.mixture.web: missing"),
        ({"train": {"mixture": {"main": 1, "wob": 1}}}, "did you mean web"),
    ):
        with pytest.raises(UserError, match=named):
            merge(two, overlay)


@pytest.mark.parametrize("name", ["muon", "mini"])
def test_flags_replace_sources_and_their_mixture(tmp_path: Path, name: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(with_sources({**TWO, "main": TWO["code"]}, {"web": 1, "code": 1, "main": 1}))
    words = shlex.split(preset.flags(read_preset(name)))
    apply_overrides(path, [word for word in words if word != "-S"])
    assert values(path.read_text())["sources"] == read_preset(name)["sources"]
    assert values(path.read_text())["train"]["mixture"] is None


@pytest.mark.parametrize("before", [None, {"main": 3}, PHASES[1:] + PHASES[1:]])
@pytest.mark.parametrize("mixture", [{"main": 3}, PHASES, None])
def test_flags_set_what_dvc_would_merge(tmp_path: Path, before: Any, mixture: Any) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"train: {json.dumps({'mixture': before})}\n")
    words = shlex.split(preset.flags({"train": {"mixture": mixture}}))
    apply_overrides(path, [word for word in words if word != "-S"])
    assert values(path.read_text())["train"]["mixture"] == mixture
