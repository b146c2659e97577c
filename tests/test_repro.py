"""The project as its users run it: real `dvc` in a fresh clone of this tree, preset `smoke`.

One clone is built once; each test works on a copy of it, or on a clone of its own where finished
pieces would prove nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.browser import CHROMIUM, browser
from tests.support.clone import Clone, make_clone, ran
from train.preset import read_preset

pytestmark = pytest.mark.slow

DATA_STAGES = ("download", "tokenize", "verify")
LATER_STAGES = ("evaluate", "export", "report")


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clone, str]:
    """A clone in which `dvc repro` has run, and what that printed. Not to be changed."""
    clone = make_clone(tmp_path_factory.mktemp("built") / "project", "smoke")
    return clone, clone.run("dvc", "repro")


@pytest.fixture
def copy(built: tuple[Clone, str], tmp_path: Path) -> Clone:
    """A copy of the built clone: its store, cache and outs share their bytes, but not with it."""
    subprocess.run(["cp", "-a", built[0].folder, tmp_path / "project"], check=True)
    return Clone(tmp_path / "project")


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A fresh clone: nothing built, an empty store, an empty cache."""
    return make_clone(tmp_path / "clone", "smoke")


def test_repro_builds_all_and_leaves_git_clean(built: tuple[Clone, str]) -> None:
    clone, output = built
    assert ran(output) == {*DATA_STAGES, "train", *LATER_STAGES}
    for out in ("checkpoint/model.safetensors", "report.html", "samples.md", "hf/config.json"):
        assert (clone.folder / "artifacts" / out).stat().st_size > 0
    changed = {line[3:] for line in clone.git("status", "--porcelain").splitlines()}
    # What DVC itself updates and the README says to commit.
    metrics = {f"metrics/{name}.json" for name in ("data", "train", "eval")}
    assert changed <= {"dvc.lock", "metrics/", *metrics}
    evaluation = json.loads((clone.folder / "metrics/eval.json").read_text())
    assert evaluation["val_loss"] < 10.5  # ln 50257 = 10.82: it has learnt something
    assert evaluation["val_tokens"] == 4096


def test_the_report_is_one_page_that_needs_no_network(built: tuple[Clone, str]) -> None:
    clone, _ = built
    path = clone.folder / "artifacts/report.html"
    page = path.read_text()
    evaluation = json.loads((clone.folder / "metrics/eval.json").read_text())
    assert f"{evaluation['val_loss']:.4f}" in page
    assert "learning_rate: " in page  # params.yaml
    assert "Documents by length" in page
    assert "step 20" in page  # a sample
    if CHROMIUM is None:
        pytest.skip("no Chromium here: the page was not opened in a browser")

    async def opened() -> None:
        async with browser() as tab:
            await tab.open(path.as_uri())
            assert await tab.js("document.querySelectorAll('svg').length") == page.count("<figure")
            assert tab.complaints == []

    asyncio.run(opened())


def test_a_preset_is_flags_for_an_experiment(copy: Clone) -> None:
    flags = copy.run(sys.executable, "-m", "train.preset", "mini", "--flags")
    copy.run("dvc", "exp", "run", "--queue", *shlex.split(flags))  # DVC refuses what it can't read
    shown = json.loads(copy.run("dvc", "exp", "show", "--json"))
    (queued,) = (exp for entry in shown for exp in entry.get("experiments") or [])
    params = queued["revs"][0]["data"]["params"]["params.yaml"]["data"]
    mini = read_preset("mini")
    assert {key: params["train"][key] for key in mini["train"]} == mini["train"]
    assert params["evaluate"]["prompts"] == mini["evaluate"]["prompts"]


def test_a_second_repro_runs_nothing(copy: Clone) -> None:
    before = copy.hashes("artifacts")
    assert ran(copy.run("dvc", "repro")) == set()
    assert copy.hashes("artifacts") == before


def test_a_train_parameter_never_runs_the_data_stages(copy: Clone) -> None:
    before = copy.hashes("artifacts")
    weights = copy.hashes("artifacts/checkpoint")
    params = (copy.folder / "params.yaml").read_text()
    copy.set("learning_rate", "1e-3")
    assert ran(copy.run("dvc", "repro")) == {"train", *LATER_STAGES}
    assert copy.hashes("artifacts/checkpoint") != weights
    (copy.folder / "params.yaml").write_text(params)
    assert ran(copy.run("dvc", "repro")) == set()  # all of it is in the run cache
    assert copy.hashes("artifacts") == before


def test_experiments_share_the_data_and_are_listed(copy: Clone) -> None:
    copy.git("add", "-A")
    copy.git("commit", "-qm", "Built")
    output = copy.run("dvc", "exp", "run", "-n", "hotter", "-S", "train.learning_rate=2e-2")
    assert ran(output) == {"train", *LATER_STAGES}
    # In a workspace of its own, where ignored files are absent, the same store serves.
    output = copy.run(
        "dvc", "exp", "run", "--temp", "-n", "cooler", "-S", "train.learning_rate=1e-4"
    )
    assert "Running stage 'train'" in output
    assert not any(f"Running stage '{stage}'" in output for stage in DATA_STAGES)
    shown = json.loads(copy.run("dvc", "exp", "show", "--json"))
    names = [exp["name"] for entry in shown for exp in entry.get("experiments") or []]
    assert sorted(names) == ["cooler", "hotter"]
    for name in ("metrics/train.json", "metrics/eval.json"):
        assert json.dumps(shown).count(f'"{name}"') >= 3  # the workspace's and both experiments'
    assert "train.learning_rate" in copy.run("dvc", "params", "diff", "HEAD")
    copy.run("dvc", "plots", "diff", "HEAD", "hotter", "-o", "plots")
    report = (sys.executable, "-m", "train.report", "--compare")
    copy.run(*report, "workspace", "hotter", "cooler")
    page = (copy.folder / "artifacts/compare.html").read_text()
    assert all(text in page for text in ("train.learning_rate", "0.02", "0.0001", "cooler"))
    for rev, said in (("nowhere", "dvc exp list"), ("HEAD~1", "dvc pull")):
        (line,) = copy.run(*report, "hotter", rev, status=2).splitlines()
        assert line.startswith(f"error: --compare {rev}: ")
        assert said in line
    assert "Traceback" not in copy.run("dvc", "plots", "show", "-o", "plots")


@pytest.mark.soak  # tests/train/test_resume.py compares the same bits without DVC, in CI
def test_torchrun_killed_halfway_ends_in_the_same_bytes(copy: Clone, clone: Clone) -> None:
    for project in (copy, clone):
        project.set("steps", "60")
    process = copy.start("dvc", "repro", "train")
    wait_for(lambda: any((copy.folder / ".work").glob("runs/*/step-00000010")))
    (torchrun,) = (pid for pid, command in copy.processes().items() if "train.launch" in command)
    os.kill(torchrun, signal.SIGKILL)
    assert process.wait(120) != 0
    wait_for(lambda: not copy.processes(), 60)
    assert "resumes after step" in copy.run("dvc", "repro", "train")
    clone.run("dvc", "repro", "train")  # never stopped, with a store and a cache of its own
    assert copy.hashes("artifacts/checkpoint") == clone.hashes("artifacts/checkpoint")


def test_dvc_terminated_leaves_no_orphan_and_resumes(copy: Clone) -> None:
    copy.set("steps", "60")
    process = copy.start("dvc", "repro", "train")
    wait_for(lambda: any((copy.folder / ".work").glob("runs/*/step-00000010")))
    process.terminate()  # DVC alone: it forwards nothing
    process.wait(60)
    wait_for(lambda: not copy.processes(), 30)
    assert "resumes after step" in copy.run("dvc", "repro", "train")


def test_tokenize_killed_keeps_its_finished_chunks(built: tuple[Clone, str], clone: Clone) -> None:
    clone.set("shard_tokens", "1000")  # many chunks, so that a kill falls among them
    clone.run("dvc", "repro", "download")
    process = clone.start("dvc", "repro", "tokenize")
    wait_for(lambda: len(list((clone.folder / ".work").glob("chunks/*"))) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    wait_for(lambda: not clone.processes(), 60)
    done = {p: p.stat().st_ino for p in (clone.folder / ".work").glob("chunks/*/train.bin")}
    output = clone.run("dvc", "repro", "tokenize")
    (line,) = (line for line in output.splitlines() if "chunks done before" in line)
    assert int(line.split(" chunks done before")[0].split()[-1]) >= 3
    assert all(path.stat().st_ino == inode for path, inode in done.items())
    # Against a build that nobody killed, in its own store and cache.
    whole = Clone(clone.folder.parent / "whole")
    shutil.copytree(clone.folder, whole.folder, ignore=shutil.ignore_patterns(".work", "data"))
    shutil.rmtree(whole.folder / ".dvc/cache")
    assert "0 chunks done before" in whole.run("dvc", "repro", "tokenize", GPT2_WORKERS="1")
    assert whole.hashes("data/tokens") == clone.hashes("data/tokens")


def test_changed_tokenizer_code_makes_the_chunks_anew(copy: Clone) -> None:
    before = copy.hashes("data/tokens")
    with open(copy.folder / "pipeline/format/tokenizer.py", "a") as file:
        file.write("# a changed line\n")
    output = copy.run("dvc", "repro", "tokenize")
    assert ", 0 chunks done before" in output or "; 0 chunks done before" in output
    after = copy.hashes("data/tokens")
    same = {name for name in before if before[name] == after[name]}
    assert {name for name in before if name.endswith((".bin", ".npy"))} <= same


def test_damage_is_named_and_exactly_those_chunks_are_mended(copy: Clone) -> None:
    """In the workspace, the store and DVC's cache, which share their bytes."""
    before, tokens = copy.hashes("data/tokens"), copy.folder / "data/tokens"
    pieces = {p: p.stat().st_ino for p in (copy.folder / ".work/chunks").glob("*/record.json")}
    damaged = [tokens / f"train-{n:05d}.bin" for n in (1, 2, 3)] + [tokens / "chunks/00005.json"]
    for path in damaged:
        path.chmod(0o644)
    flipped, truncated, foreign, edited = damaged
    with open(flipped, "r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    os.truncate(truncated, truncated.stat().st_size - 2)
    foreign.write_bytes((tokens / "train-00004.bin").read_bytes())  # whole, and of another chunk
    edited.write_text(edited.read_text().replace('"docs": ', '"docs": 1'))
    output = copy.run(sys.executable, "-m", "pipeline.verify", status=1)
    faults = [line for line in output.splitlines() if line.startswith("data/")]
    named = {copy.folder / line.split(": ")[0] for line in faults}
    assert sorted(named) == sorted(damaged)
    output = copy.run("dvc", "repro")
    assert "5 chunks done before, 4 to do" in output
    assert copy.hashes("data/tokens") == before
    assert sum(path.stat().st_ino == inode for path, inode in pieces.items()) == 5
    assert ran(copy.run("dvc", "repro")) == set()
    # The cache's objects were the same inodes: they must be whole again as well.
    shutil.rmtree(copy.folder / "data")
    copy.run("dvc", "checkout", "data/tokens")
    assert copy.hashes("data/tokens") == before


def test_a_gpu_box_pulls_the_tokens_and_runs_only_what_follows(copy: Clone, tmp_path: Path) -> None:
    """The commands of docs/run-10b.md: the data are made on one machine, the model on another."""
    copy.set("steps", "15")  # of this run only the data are made here
    copy.run("dvc", "remote", "add", "--default", "storage", str(tmp_path / "remote"))
    copy.git("add", "-A")
    copy.git("commit", "-qm", "The data of a run")
    copy.run("dvc", "push", "download", "tokenize", "verify")
    box = Clone(tmp_path / "box")
    copy.git("clone", "-q", str(copy.folder), str(box.folder))
    output = box.run("dvc", "repro", "--pull", "--allow-missing")
    assert ran(output) == {"train", *LATER_STAGES}
    assert box.hashes("data/tokens") == copy.hashes("data/tokens")
    assert not (box.folder / "data/raw").exists()
    assert json.loads((box.folder / "metrics/train.json").read_text())["step"] == 15


def test_it_works_without_git(clone: Clone) -> None:
    shutil.rmtree(clone.folder / ".git")
    clone.run("dvc", "config", "--local", "core.no_scm", "true")  # as `make run` does
    assert "train" in ran(clone.run("dvc", "repro", "train"))


@pytest.mark.parametrize(
    ("key", "value", "stage", "said"),
    [
        ("batch_tokens", "-5", "train.launch", "train.batch_tokens"),
        ("learning_rat", "1", "train.launch", "did you mean learning_rate?"),
        ("shard_tokens", "many", "pipeline.tokenize", "tokenize.shard_tokens"),
    ],
)
def test_mistakes_in_params_end_in_one_line_and_status_2(
    clone: Clone, key: str, value: str, stage: str, said: str
) -> None:
    if key == "learning_rat":
        path = clone.folder / "params.yaml"
        path.write_text(path.read_text().replace("learning_rate:", "learning_rat:"))
    else:
        clone.set(key, value)
    output = clone.run(sys.executable, "-m", stage, status=2)
    (line,) = output.splitlines()
    assert line.startswith("error: params.yaml: ")
    assert said in line


@pytest.mark.parametrize("stage", ["pipeline.tokenize", "pipeline.verify", "train.launch"])
def test_a_missing_data_folder_ends_in_one_line_and_status_2(clone: Clone, stage: str) -> None:
    (line,) = clone.run(sys.executable, "-m", stage, status=2).splitlines()
    assert line.startswith("error: data/")
    assert "dvc repro" in line
