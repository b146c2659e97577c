"""Tests for the project as users run it: real `dvc` in a clone, with the preset `smoke`.

One clone is built per session, with two interruptions. Tests change copies of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.params import TokenizeParams
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import load_section
from pipeline.store.code_key import code_key
from tests.support.browser import CHROMIUM, browser
from tests.support.clone import Clone, make_clone, stages_run
from tests.support.small_data import flip, hashes, tokenize_here
from tests.support.waiting import wait_for
from train.preset import read_preset

pytestmark = pytest.mark.slow

DATA_STAGES = ("download", "curate", "tokenize", "verify")
LATER_STAGES = ("evaluate", "export", "report")


@dataclass(frozen=True)
class Built:
    """A clone with a complete build. Do not change it."""

    clone: Clone
    outputs: list[str]
    """The output of each `dvc repro`: killed in `tokenize`, terminated in `train`, complete."""
    chunks: dict[Path, int]
    """The inode of each chunk that was finished at the kill."""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Run `dvc repro` until it is done, killed and terminated on the way."""
    clone = make_clone(tmp_path_factory.mktemp("built") / "project", "smoke")
    clone.set("shard_tokens", "10000")  # many chunks, so that the kill comes between two
    clone.set("steps", "30")
    clone.git("commit", "-qam", "Sizes")
    work, outputs = clone.folder / ".work", []

    process = clone.start("dvc", "repro")
    wait_for(lambda: len([*work.glob("chunks/*")]) >= 3, 120)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    wait_for(lambda: not clone.is_busy(), 60)
    outputs.append(clone.log.read_text())
    chunks = {path: path.stat().st_ino for path in work.glob("chunks/*/train.bin")}

    process = clone.start("dvc", "repro")
    wait_for(lambda: any(work.glob("runs/*/step-*")), 180)
    process.terminate()  # DVC alone, which does not forward the signal
    process.wait(60)
    wait_for(lambda: not clone.is_busy(), 30)
    outputs += [clone.log.read_text(), clone.run("dvc", "repro")]
    return Built(clone, outputs, chunks)


@pytest.fixture
def copy(built: Built, tmp_path: Path) -> Clone:
    """A copy of the built clone; store, cache and outs keep the hard links among them."""
    subprocess.run(["cp", "-a", built.clone.folder, tmp_path / "project"], check=True)
    return Clone(tmp_path / "project")


def chunks_found(output: str) -> int:
    """Return how many chunks `tokenize` found finished in the store."""
    (count,) = re.findall(r"(\d+) chunks done before", output)
    return int(count)


def test_interrupted_repro_keeps_finished_work_and_leaves_no_orphan(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone, (killed, terminated, complete) = built.clone, built.outputs
    assert stages_run(killed) == {"download", "curate", "tokenize"}
    assert chunks_found(terminated) >= len(built.chunks) > 0
    assert all(path.stat().st_ino == inode for path, inode in built.chunks.items())
    assert stages_run(complete) == {"train", *LATER_STAGES}
    assert "resumes after step" in complete
    # Compare with tokens that were made without an interruption, in another store.
    monkeypatch.chdir(clone.folder)
    params = load_section("tokenize", TokenizeParams)
    machine, raw = Machine(work_dir=tmp_path / "store"), Path("data/raw")
    tokenize_here(raw, tmp_path / "tokens", params, machine, code_key("tokenize"))
    assert hashes(tmp_path / "tokens") == clone.hashes("data/tokens")


def test_repro_builds_all_outs_and_changes_only_dvc_files(built: Built) -> None:
    clone = built.clone
    for out in ("checkpoint/model.safetensors", "report.html", "samples.md", "hf/config.json"):
        assert (clone.folder / "artifacts" / out).stat().st_size > 0
    changed = {line[3:] for line in clone.git("status", "--porcelain").splitlines()}
    # DVC updates these; the README says to commit them.
    metrics = {f"metrics/{name}.json" for name in ("data", "train", "eval")}
    assert changed <= {"dvc.lock", "metrics/", *metrics}
    for path in metrics:
        values = json.loads((clone.folder / path).read_text()).values()
        assert 0 < len(values) <= 6
        assert {type(value) for value in values} <= {int, float}
    evaluation = json.loads((clone.folder / "metrics/eval.json").read_text())
    assert evaluation["val_loss"] < 10.5  # less than ln 50257 = 10.82, that of random guesses
    assert stages_run(clone.run("dvc", "repro")) == set()


def test_report_is_one_page_that_needs_no_network(built: Built) -> None:
    clone = built.clone
    path = clone.folder / "artifacts/report.html"
    page = path.read_text()
    evaluation = json.loads((clone.folder / "metrics/eval.json").read_text())
    assert f"{evaluation['val_loss']:.4f}" in page
    assert "learning_rate: " in page  # params.yaml
    assert "step 20" in page  # a sample
    if CHROMIUM is None:
        pytest.skip("needs Chromium")

    async def open_page() -> None:
        async with browser() as tab:
            await tab.open(path.as_uri())
            assert await tab.js("document.querySelectorAll('svg').length") == page.count("<figure")
            assert tab.complaints == []

    asyncio.run(open_page())


def test_preset_flags_work_for_an_experiment(copy: Clone) -> None:
    flags = copy.run(sys.executable, "-m", "train.preset", "mini", "--flags")
    copy.run("dvc", "exp", "run", "--queue", *shlex.split(flags))
    shown = json.loads(copy.run("dvc", "exp", "show", "--json"))
    (queued,) = (exp for entry in shown for exp in entry.get("experiments") or [])
    params = queued["revs"][0]["data"]["params"]["params.yaml"]["data"]
    mini = read_preset("mini")
    assert {key: params["train"][key] for key in mini["train"]} == mini["train"]
    assert params["evaluate"]["prompts"] == mini["evaluate"]["prompts"]


@pytest.mark.soak
def test_experiments_share_the_data_and_are_compared(copy: Clone) -> None:
    copy.git("add", "-A")
    copy.git("commit", "-qm", "Built")
    output = copy.run("dvc", "exp", "run", "-n", "hotter", "-S", "train.learning_rate=2e-2")
    assert stages_run(output) == {"train", *LATER_STAGES}
    # In a temporary workspace without ignored files it uses the same store.
    output = copy.run(
        "dvc", "exp", "run", "--temp", "-n", "cooler", "-S", "train.learning_rate=1e-4"
    )
    assert "Running stage 'train'" in output
    assert not any(f"Running stage '{stage}'" in output for stage in DATA_STAGES)
    shown = json.loads(copy.run("dvc", "exp", "show", "--json"))
    names = [exp["name"] for entry in shown for exp in entry.get("experiments") or []]
    assert sorted(names) == ["cooler", "hotter"]
    for name in ("metrics/train.json", "metrics/eval.json"):
        assert json.dumps(shown).count(f'"{name}"') >= 3  # of the workspace and both experiments
    assert "train.learning_rate" in copy.run("dvc", "params", "diff", "HEAD")
    copy.run("dvc", "plots", "diff", "HEAD", "hotter", "-o", "plots")
    report = (sys.executable, "-m", "train.report", "--compare")
    copy.run(*report, "workspace", "hotter", "cooler")
    page = (copy.folder / "artifacts/compare.html").read_text()
    assert all(text in page for text in ("train.learning_rate", "0.02", "0.0001", "cooler"))
    for rev, command in (("nowhere", "dvc exp list"), ("HEAD~1", "dvc pull")):
        (line,) = copy.run(*report, "hotter", rev, status=2).splitlines()
        assert line.startswith(f"error: --compare {rev}: ")
        assert command in line
    assert "Traceback" not in copy.run("dvc", "plots", "show", "-o", "plots")


def test_comments_rebuild_nothing_and_damage_only_the_damaged_chunks(copy: Clone) -> None:
    """Workspace, store and DVC's cache are hard links to the damaged files."""
    before, tokens = copy.hashes("data/tokens"), copy.folder / "data/tokens"
    work, weights = copy.folder / ".work", copy.hashes("artifacts/checkpoint")
    runs = {*work.glob("runs/*")}
    pieces = {p: p.stat().st_ino for p in work.glob("chunks/*/record.json")}
    damaged = [tokens / f"train-{n:05d}.bin" for n in (1, 2, 3)] + [tokens / "chunks/00005.json"]
    for path in damaged:
        path.chmod(0o644)
    flipped, truncated, foreign, edited = damaged
    flip(flipped, 5000, keep_mtime=True)
    os.truncate(truncated, truncated.stat().st_size - 2)
    foreign.write_bytes((tokens / "train-00004.bin").read_bytes())  # valid, but of another chunk
    edited.write_text(edited.read_text().replace('"docs": ', '"docs": 1'))
    output = copy.run(sys.executable, "-m", "pipeline.verify", status=1)
    faults = [line for line in output.splitlines() if line.startswith("data/")]
    named = {copy.folder / line.split(": ")[0] for line in faults}
    assert sorted(named) == sorted(damaged)
    for package in ("pipeline", "model", "train"):
        for path in (copy.folder / package).rglob("*.py"):
            path.write_text(f'{path.read_text()}\n\n# A comment\n"""A docstring."""\n')
    output = copy.run("dvc", "repro", "train")
    assert stages_run(output) == {*DATA_STAGES, "train"}  # DVC sees other files
    rebuilt = [path for path, inode in pieces.items() if path.stat().st_ino != inode]
    assert len(rebuilt) == len(damaged)
    assert chunks_found(output) == len(pieces) - len(damaged)
    assert copy.hashes("data/tokens") == before
    assert ({*work.glob("runs/*")}, copy.hashes("artifacts/checkpoint")) == (runs, weights)
    # The objects in the cache had the same inodes: they must be replaced as well.
    shutil.rmtree(copy.folder / "data")
    copy.run("dvc", "checkout", "data/tokens")
    assert copy.hashes("data/tokens") == before


@pytest.mark.soak
def test_fresh_clone_pulls_and_runs_only_what_changed(copy: Clone, tmp_path: Path) -> None:
    """The commands of docs/experiments.md and run-10b.md, with folders as remotes."""
    params = (copy.folder / "params.yaml").read_text()
    copy.git("add", "-A")
    copy.git("init", "-q", "--bare", str(tmp_path / "git"))
    copy.git("remote", "add", "origin", str(tmp_path / "git"))
    copy.run("dvc", "remote", "add", "--default", "storage", str(tmp_path / "remote"))
    copy.git("commit", "-qam", "Results")
    copy.git("push", "-q", "origin", "HEAD")
    copy.run("dvc", "push")
    output = copy.run("dvc", "exp", "run", "-n", "warm", "-S", "evaluate.temperature=0.3")
    assert stages_run(output) == {"evaluate", "export", "report"}
    show = ("show", "--only-changed", "--no-pager", "--drop", ".*/")
    for command in (("metrics", "show"), ("exp", *show)):
        table = copy.run("dvc", *command, COLUMNS="400").splitlines()
        assert max(map(len, table)) <= 160
    copy.run("dvc", "exp", "push", "origin", "warm")
    (copy.folder / "params.yaml").write_text(params)
    assert stages_run(copy.run("dvc", "repro")) == set()  # all stages are in the run cache

    box = Clone(tmp_path / "box")
    copy.git("clone", "-q", str(tmp_path / "git"), str(box.folder))
    for name in ("name", "email"):
        box.git("config", f"user.{name}", "test@example.org")
    assert stages_run(box.run("dvc", "repro", "--pull", "--allow-missing")) == set()
    box.run("dvc", "pull")
    box.run("dvc", "checkout")
    assert box.run("dvc", "status").count("\n") == 1  # up to date
    assert box.hashes("data/tokens") == copy.hashes("data/tokens")
    box.run("dvc", "exp", "pull", "origin", "warm")
    box.run("dvc", "exp", "apply", "warm")
    assert stages_run(box.run("dvc", "repro")) == set()
    output = box.run("dvc", "exp", "run", "-S", "evaluate.temperature=0.5")
    assert stages_run(output) == {"evaluate", "export", "report"}
    assert not (box.folder / ".work/files").exists()  # nothing was fetched from the source
    assert [path.name for path in (box.folder / "data/raw").iterdir()] == ["manifest.json"]


@pytest.mark.soak
def test_repro_works_without_git(tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "clone", "smoke")
    shutil.rmtree(clone.folder / ".git")
    clone.run("dvc", "config", "--local", "core.no_scm", "true")  # as `make run` does
    assert "train" in stages_run(clone.run("dvc", "repro", "train"))
