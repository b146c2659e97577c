"""Of train.launch, params and distributed: what is refused before anything starts, and how."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from typing import Any

import pytest
import torch

from pipeline.runtime.errors import StageFailed, UserError
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import validate
from tests.support.training import Project, write_tokens
from tests.train.test_loop import train_here
from train.distributed.devices import device_type, processes_here
from train.distributed.rendezvous import _agree, process_group
from train.launch import __main__ as launch
from train.params import EvaluateParams, ModelParams, TrainParams


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Process counts with which torchrun would have been started."""
    starts: list[int] = []
    monkeypatch.setattr(
        launch, "run_torchrun", lambda processes, restarts: starts.append(processes)
    )
    return starts


def test_a_good_run_is_handed_to_torchrun(
    project: Project, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2_PROCESSES", "4")
    launch.main()
    monkeypatch.delenv("GPT2_PROCESSES")
    monkeypatch.setattr("train.distributed.world.usable_cores", lambda: 64)
    launch.main()
    monkeypatch.setattr("train.distributed.world.usable_cores", lambda: 1)
    launch.main()
    assert started == [4, 2, 1]


def test_a_finished_run_is_published_again_without_torchrun(
    project: Project,
    started: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_here()
    weights, metrics = project.weights(), project.metrics()
    curve = project.folder / "metrics/live/plots/metrics/train/loss.tsv"
    before = curve.read_bytes()
    for name in ("artifacts", "metrics"):  # as DVC does before a stage
        shutil.rmtree(project.folder / name)
    monkeypatch.setenv("GPT2_PROCESSES", "3")  # which could not train it
    launch.main()
    assert started == []
    assert "finished already" in capsys.readouterr().out
    assert project.weights() == weights
    assert project.metrics() == metrics
    assert curve.read_bytes() == before

    monkeypatch.setenv("GPT2_FRESH", "1")
    with pytest.raises(UserError, match="processes"):
        launch.main()
    monkeypatch.delenv("GPT2_PROCESSES")
    launch.main()
    assert len(started) == 1


MISTAKES: list[tuple[dict[str, dict[str, Any]], dict[str, str], list[str]]] = [
    ({"train": {"learning_rat": 1}}, {}, ["train.learning_rat", "learning_rate"]),
    ({"train": {"batch_tokens": -128}}, {}, ["train.batch_tokens", "greater than or equal to 1"]),
    ({"train": {"batch_tokens": 100}}, {}, ["train.batch_tokens", "100", "96 and 112"]),
    ({"train": {"warmup_steps": 12}}, {}, ["train", "warmup_steps", "at most 11"]),
    ({"train": {"val_tokens": 10**6}}, {}, ["train.val_tokens", "at most 1999"]),
    (
        {"train": {"hellaswag": "none.jsonl", "hellaswag_every": 6}},
        {},
        ["train.hellaswag: none.jsonl", "name a .jsonl file, hub, or null"],
    ),
    ({"train": {"hellaswag": "hub"}}, {}, ["hellaswag_every null", "go together"]),
    (
        {"train": {"hellaswag": "hub", "hellaswag_every": 8}},
        {},
        ["hellaswag_every 8", "val_every 6", "take 12"],
    ),
    ({"model": {"n_embd": 17}}, {}, ["model", "n_embd", "n_head"]),
    ({"model": {"size": "gpt2"}}, {}, ["model", "size", "n_layer"]),
    ({"model": {"n_layer": None}}, {}, ["model", "n_layer", "missing"]),
    ({"model": {"block_size": 8192}, "train": {"batch_tokens": 8192}}, {}, ["block_size", "5000"]),
    ({}, {"GPT2_PROCESSES": "3"}, ["processes", "2 or 4", "96 or 144"]),
    ({}, {"GPT2_MICRO_BATCH": "3", "GPT2_PROCESSES": "1"}, ["micro_batch", "2 or 4"]),
]


@pytest.mark.parametrize(("changes", "environment", "words"), MISTAKES)
def test_a_mistake_is_named_in_one_line(
    project: Project,
    started: list[int],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, dict[str, Any]],
    environment: dict[str, str],
    words: list[str],
) -> None:
    project.write(**changes)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        launch.main()
    assert started == []
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("params.yaml", ["params.yaml"]),
        ("data/tokens/manifest.json", ["data/tokens/manifest.json"]),
        ("data/tokens/train-00001.bin", ["train-00001.bin"]),
        ("data/verified.json", ["data/verified.json", "pipeline.verify"]),
    ],
)
def test_a_missing_file_is_named(
    project: Project, started: list[int], gone: str, words: list[str]
) -> None:
    (project.folder / gone).unlink()
    with pytest.raises(UserError) as caught:
        launch.main()
    assert all(word in str(caught.value) for word in words), caught.value


def test_data_that_verify_has_not_seen_are_refused(project: Project, started: list[int]) -> None:
    (project.folder / "data/verified.json").write_text(json.dumps({"manifest_sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"pipeline\.verify"):
        launch.main()


def test_a_data_folder_without_validation_is_refused(project: Project, started: list[int]) -> None:
    shutil.rmtree(project.folder / "data/tokens")
    tokens = torch.arange(5000).numpy().astype("uint16")
    write_tokens(project.folder / "data/tokens", {"train": [tokens]})
    project.verify()
    with pytest.raises(UserError, match=r"train\.val_tokens"):
        launch.main()


def test_the_command_prints_one_line_and_exits_with_2(project: Project) -> None:
    shutil.rmtree(project.folder / "data")
    done = project.run("train.launch")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: data/tokens")
    assert done.stderr.count("\n") == 1


def test_sizes_have_names() -> None:
    assert ModelParams(size="gpt2-xl").config().n_layer == 48
    assert ModelParams(size="gpt2", block_size=64).config().block_size == 64
    assert ModelParams(n_layer=1, n_head=2, n_embd=4).config().n_embd == 4


def test_the_schedule_follows_the_parameters() -> None:
    values: dict[str, Any] = {
        "steps": 100,
        "batch_tokens": 8,
        "learning_rate": 0.5,
        "val_tokens": 8,
    }
    wsd = TrainParams(**values, schedule="wsd", decay_ratio=0.1, min_lr_ratio=0.0).lr_schedule()
    assert [wsd(step) for step in (0, 88, 89, 99)] == pytest.approx([0.5, 0.5, 0.5, 0.0])
    assert wsd(90) < 0.5


def test_every_field_is_described() -> None:
    for section in (ModelParams, TrainParams, EvaluateParams):
        for name, field in section.model_fields.items():
            assert field.description, name


def test_prompts_may_be_a_list() -> None:
    params = validate(EvaluateParams, {"val_tokens": 1, "prompts": ["a", "b"]}, "evaluate")
    assert params.prompts == ("a", "b")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(UserError, match="device"):
        device_type("cuda")


def test_a_world_of_one_needs_no_torchrun() -> None:
    with process_group("cpu") as world:
        assert (world.rank, world.size, world.first) == (0, 1, True)
        assert world.sum(torch.tensor(2.0)).item() == 2.0
        assert world.any(True)
        assert not world.any(False)
        assert world.broadcast({"a": 1}) == {"a": 1}
        world.barrier()


@pytest.mark.parametrize(("rank", "missing"), [(0, "rank 1"), (1, "rank 0")])
def test_who_does_not_come_back_after_a_restart_is_named(rank: int, missing: str) -> None:
    """The store has the keys of the start before, so no read of it waits in vain."""
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    store.set("here-1", "old")
    store.set("start", json.dumps({"name": "old", "here": {"1": "old"}}))
    with pytest.raises(StageFailed, match=rf"rank {rank} .* has waited 0\.3 s for {missing};"):
        _agree(store, rank, 2, timedelta(seconds=0.3))


def test_what_a_run_holds_already_needs_no_more_space(
    project: Project, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(launch, "require_space", lambda root, size, what: needed.append(size))
    launch.main()
    run = train_here()
    (run.folder / "final.json").unlink()
    launch.main()
    held = sum(path.stat().st_size for path in run.folder.glob("step-*/*"))
    assert needed[0] - needed[1] == held > 0


def test_a_gpu_that_never_ends_its_work_is_waited_for_with_patience() -> None:
    class Never:
        def query(self) -> bool:
            return False

    with process_group("cpu", patience=0.3) as world:
        with pytest.raises(torch.distributed.DistError, match=r"not done in 0\.3 s"):
            world.wait(Never())  # type: ignore[arg-type]
        events = iter([False, False, True])
        Never.query = lambda self: next(events)  # type: ignore[method-assign]
        world.wait(Never())  # type: ignore[arg-type]
    assert next(events, None) is None


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert processes_here(Machine(), "cuda") == 2
    assert processes_here(Machine(processes=1), "cuda") == 1
    with pytest.raises(UserError, match=r"GPT2_PROCESSES\): 3, but there are 2 GPUs"):
        processes_here(Machine(processes=3), "cuda")
