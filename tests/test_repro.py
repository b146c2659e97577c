"""Tests for the project as users run it: real `dvc` in a fresh clone, with the preset `smoke`.

One clone is built per session. A test gets a copy of it, or a fresh clone if finished pieces in the
store would hide a fault.
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
from pathlib import Path

import pytest

from tests.support.browser import CHROMIUM, browser
from tests.support.clone import Clone, make_clone, stages_run
from tests.support.small_data import flip
from tests.support.waiting import wait_for
from train.preset import read_preset

pytestmark = pytest.mark.slow

DATA_STAGES = ("download", "tokenize", "verify")
LATER_STAGES = ("evaluate", "export", "report")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clone, str]:
    """A clone in which `dvc repro` has run, and its output. Do not change it."""
    clone = make_clone(tmp_path_factory.mktemp("built") / "project", "smoke")
    return clone, clone.run("dvc", "repro")


@pytest.fixture
def copy(built: tuple[Clone, str], tmp_path: Path) -> Clone:
    """A copy of the built clone; store, cache and outs keep the hard links among them."""
    subprocess.run(["cp", "-a", built[0].folder, tmp_path / "project"], check=True)
    return Clone(tmp_path / "project")


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A fresh clone with an empty store and an empty cache."""
    return make_clone(tmp_path / "clone", "smoke")


def chunks_found(output: str) -> int:
    """Return how many chunks `tokenize` found finished in the store."""
    (count,) = re.findall(r"(\d+) chunks done before", output)
    return int(count)


def test_repro_builds_all_outs_and_changes_only_dvc_files(built: tuple[Clone, str]) -> None:
    clone, output = built
    assert stages_run(output) == {*DATA_STAGES, "train", *LATER_STAGES}
    for out in ("checkpoint/model.safetensors", "report.html", "samples.md", "hf/config.json"):
        assert (clone.folder / "artifacts" / out).stat().st_size > 0
    changed = {line[3:] for line in clone.git("status", "--porcelain").splitlines()}
    # DVC updates these; the README says to commit them.
    metrics = {f"metrics/{name}.json" for name in ("data", "train", "eval")}
    assert changed <= {"dvc.lock", "metrics/", *metrics}
    evaluation = json.loads((clone.folder / "metrics/eval.json").read_text())
    assert evaluation["val_loss"] < 10.5  # less than ln 50257 = 10.82, that of random guesses
    assert evaluation["val_tokens"] == 4096


def test_report_is_one_page_that_needs_no_network(built: tuple[Clone, str]) -> None:
    clone, _ = built
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


def test_train_parameter_does_not_run_the_data_stages(copy: Clone) -> None:
    before = copy.hashes("artifacts")
    weights = copy.hashes("artifacts/checkpoint")
    params = (copy.folder / "params.yaml").read_text()
    copy.set("learning_rate", "1e-3")
    assert stages_run(copy.run("dvc", "repro")) == {"train", *LATER_STAGES}
    assert copy.hashes("artifacts/checkpoint") != weights
    (copy.folder / "params.yaml").write_text(params)
    assert stages_run(copy.run("dvc", "repro")) == set()  # all stages are in the run cache
    assert copy.hashes("artifacts") == before


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


def test_terminated_dvc_leaves_no_orphan_and_resumes(copy: Clone) -> None:
    copy.set("steps", "60")
    process = copy.start("dvc", "repro", "train")
    wait_for(lambda: any((copy.folder / ".work").glob("runs/*/step-00000010")), 120)
    process.terminate()  # DVC alone, which does not forward the signal
    process.wait(60)
    wait_for(lambda: not copy.is_busy(), 30)
    assert "resumes after step" in copy.run("dvc", "repro", "train")


def test_killed_tokenize_keeps_its_finished_chunks(clone: Clone) -> None:
    clone.set("shard_tokens", "1000")  # many chunks, so that the kill comes between two
    clone.run("dvc", "repro", "download")
    process = clone.start("dvc", "repro", "tokenize")
    wait_for(lambda: len(list((clone.folder / ".work").glob("chunks/*"))) >= 3, 120)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    wait_for(lambda: not clone.is_busy(), 60)
    done = {p: p.stat().st_ino for p in (clone.folder / ".work").glob("chunks/*/train.bin")}
    output = clone.run("dvc", "repro", "tokenize")
    assert chunks_found(output) >= 3
    assert all(path.stat().st_ino == inode for path, inode in done.items())
    # Compare with a build that was not killed, with another store and cache.
    other = Clone(clone.folder.parent / "other")
    shutil.copytree(clone.folder, other.folder, ignore=shutil.ignore_patterns(".work", "data"))
    shutil.rmtree(other.folder / ".dvc/cache")
    assert chunks_found(other.run("dvc", "repro", "tokenize", GPT2_WORKERS="1")) == 0
    assert other.hashes("data/tokens") == clone.hashes("data/tokens")


def test_only_changed_code_rebuilds_chunks_not_comments_and_docstrings(copy: Clone) -> None:
    work, weights = copy.folder / ".work", copy.folder / "artifacts/checkpoint/model.safetensors"

    def state() -> tuple[set[Path], bytes]:
        return {*work.glob("chunks/*"), *work.glob("runs/*")}, weights.read_bytes()

    before = state()
    for package in ("pipeline", "model", "train"):
        for path in (copy.folder / package).rglob("*.py"):
            path.write_text(f'{path.read_text()}\n\n# A comment\n"""A docstring."""\n')
    output = copy.run("dvc", "repro")
    assert stages_run(output) >= {"tokenize", "train"}  # DVC sees other files
    assert chunks_found(output) == len([*work.glob("chunks/*")])
    assert state() == before

    tokens = copy.hashes("data/tokens")
    with open(copy.folder / "pipeline/format/tokenizer.py", "a") as file:
        file.write("CHANGED = True\n")
    assert chunks_found(copy.run(sys.executable, "-m", "pipeline.tokenize")) == 0
    after = copy.hashes("data/tokens")
    assert {
        n: h for n, h in after.items() if n.endswith((".bin", ".npy"))
    }.items() <= tokens.items()


def test_verify_names_damaged_files_and_only_their_chunks_are_rebuilt(copy: Clone) -> None:
    """Workspace, store and DVC's cache are hard links to the damaged files."""
    before, tokens = copy.hashes("data/tokens"), copy.folder / "data/tokens"
    pieces = {p: p.stat().st_ino for p in (copy.folder / ".work/chunks").glob("*/record.json")}
    damaged = [tokens / f"train-{n:05d}.bin" for n in (1, 2, 3)] + [tokens / "chunks/00005.json"]
    for path in damaged:
        path.chmod(0o644)
    flipped, truncated, foreign, edited = damaged
    flip(flipped, 5000)
    os.truncate(truncated, truncated.stat().st_size - 2)
    foreign.write_bytes((tokens / "train-00004.bin").read_bytes())  # valid, but of another chunk
    edited.write_text(edited.read_text().replace('"docs": ', '"docs": 1'))
    output = copy.run(sys.executable, "-m", "pipeline.verify", status=1)
    faults = [line for line in output.splitlines() if line.startswith("data/")]
    named = {copy.folder / line.split(": ")[0] for line in faults}
    assert sorted(named) == sorted(damaged)
    output = copy.run("dvc", "repro")
    assert chunks_found(output) == 5
    assert copy.hashes("data/tokens") == before
    assert sum(path.stat().st_ino == inode for path, inode in pieces.items()) == 5
    assert stages_run(copy.run("dvc", "repro")) == set()
    # The objects in the cache had the same inodes: they must be replaced as well.
    shutil.rmtree(copy.folder / "data")
    copy.run("dvc", "checkout", "data/tokens")
    assert copy.hashes("data/tokens") == before


def test_second_machine_pulls_the_tokens_and_runs_only_the_later_stages(
    copy: Clone, tmp_path: Path
) -> None:
    """The commands of docs/run-10b.md: one machine makes the data, another trains."""
    copy.set("steps", "15")  # not trained on the first machine
    copy.run("dvc", "remote", "add", "--default", "storage", str(tmp_path / "remote"))
    copy.git("add", "-A")
    copy.git("commit", "-qm", "Data")
    copy.run("dvc", "push", "download", "tokenize", "verify")
    box = Clone(tmp_path / "box")
    copy.git("clone", "-q", str(copy.folder), str(box.folder))
    output = box.run("dvc", "repro", "--pull", "--allow-missing")
    assert stages_run(output) == {"train", *LATER_STAGES}
    assert box.hashes("data/tokens") == copy.hashes("data/tokens")
    assert not (box.folder / "data/raw").exists()
    assert json.loads((box.folder / "metrics/train.json").read_text())["step"] == 15


@pytest.mark.soak
def test_repro_works_without_git(clone: Clone) -> None:
    shutil.rmtree(clone.folder / ".git")
    clone.run("dvc", "config", "--local", "core.no_scm", "true")  # as `make run` does
    assert "train" in stages_run(clone.run("dvc", "repro", "train"))
