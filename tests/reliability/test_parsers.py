"""Fuzzing of the parsers of files that come from elsewhere: an error of the user, or a value.

Here are benchmark tasks, weights, checkpoints and the curves that `evaluate` reads back. Downloads,
parameters, shards, manifests, records and logs are fuzzed beside their own tests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from model import GPT, GPTConfig, checkpoint
from model.errors import FormatError
from pipeline.runtime.errors import UserError
from tests.support.damage import FEW, JSON_VALUES, damaged
from train.checkpoint import directory, init_from
from train.checkpoint.directory import BrokenCheckpoint, Keep
from train.checkpoint.start import Start
from train.evals import hellaswag, lambada, reference_curve

CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=64)

HELLASWAG = {
    "activity_label": "Rowing", "ctx_a": "A man rows.", "ctx_b": "he", "ctx": "A man rows. he",
    "endings": ["sleeps.", "rows on.", "flies.", "sings."], "label": "1",
}  # fmt: skip
LAMBADA = {"text": "They rowed over the wide river in their boats"}


class Parser(NamedTuple):
    """A parser, the files it reads, which of them is damaged, and the errors it may raise."""

    read: Callable[[Path], Any]
    write: Callable[[Path], object]
    file: str
    errors: tuple[type[Exception], ...]


def write_weights(folder: Path) -> None:
    GPT(CONFIG, seed=1).to_hf(folder)


def write_sharded_weights(folder: Path) -> None:
    """Write weights that are found only by the index."""
    write_weights(folder)
    part = (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = {"weight_map": dict.fromkeys(load_file(part), part.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))


def write_checkpoint(folder: Path) -> None:
    gpt = GPT(CONFIG, seed=1)
    checkpoint.write(folder, gpt.config, gpt.state_dict(), {})


def write_run(folder: Path) -> None:
    gpt = GPT(CONFIG, seed=1)
    state = {"step": 1, "samples": 4, "model": CONFIG.to_dict(), "val_loss": 4.0}
    tensors = {name: tensor.contiguous() for name, tensor in gpt.state_dict().items()}
    saved = directory.save(
        folder.with_name("run"), model=tensors, optimizer=tensors, state=state, keep=Keep(last=1)
    )
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    shutil.rmtree(folder.with_name("run"))


def write_lines(row: dict[str, Any], name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text((json.dumps(row) + "\n") * 3)


def write_curve(folder: Path) -> None:
    (folder / "loss.tsv").write_text("timestamp\tstep\tloss\n1\t250\t6.2\n2\t500\t5.4\n")


def start(folder: Path) -> Any:
    begin = Start(kind="checkpoint", folder=folder, with_optimizer=True)
    init_from.content_key(begin)
    return init_from.load(begin, CONFIG)


PARSERS = {
    "HellaSwag": Parser(
        lambda f: [
            (task.harness_requests(), task.completion_requests())
            for task in hellaswag.read("evaluate.hellaswag", str(f / "tasks.jsonl"))
        ],
        write_lines(HELLASWAG, "tasks.jsonl"),
        "tasks.jsonl",
        (UserError,),
    ),
    "LAMBADA": Parser(
        lambda f: lambada.read("evaluate.lambada", str(f / "tasks.jsonl")),
        write_lines(LAMBADA, "tasks.jsonl"),
        "tasks.jsonl",
        (UserError,),
    ),
    "HF config": Parser(GPT.from_hf, write_weights, "config.json", (FormatError,)),
    "HF weights": Parser(GPT.from_hf, write_weights, "model.safetensors", (FormatError,)),
    "HF index": Parser(
        GPT.from_hf, write_sharded_weights, "model.safetensors.index.json", (FormatError,)
    ),
    "checkpoint's state": Parser(
        GPT.from_checkpoint, write_checkpoint, "state.json", (FormatError,)
    ),
    "checkpoint's weights": Parser(
        GPT.from_checkpoint, write_checkpoint, "model.safetensors", (FormatError,)
    ),
    "run's state": Parser(directory.verify, write_run, "state.json", (BrokenCheckpoint,)),
    "run's optimizer": Parser(
        directory.verify, write_run, "optimizer.safetensors", (BrokenCheckpoint,)
    ),
    "train.init": Parser(start, write_run, "state.json", (UserError,)),
    "curve": Parser(
        lambda f: reference_curve.read_validations(f / "loss.tsv"),
        write_curve,
        "loss.tsv",
        (UserError,),
    ),
}


def check_answer(parser: Parser, folder: Path) -> None:
    """Read a file, which must succeed, or be refused in one line."""
    message = "read"
    try:
        parser.read(folder)
    except parser.errors as error:
        message = str(error)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_files_are_refused_or_read(name: str, tmp_path: Path) -> None:
    parser, folder = PARSERS[name], tmp_path / "folder"
    folder.mkdir()
    parser.write(folder)
    parser.read(folder)
    path = folder / parser.file
    good = path.read_bytes()

    @FEW
    @example(b"")
    @example(b"[" * 100_000)
    @example(b'{"step": NaN, "n_layer": 1e400}')
    @example(b"\xff\xfe\x00")
    @given(damaged(good))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        check_answer(parser, folder)

    check()


@pytest.mark.parametrize("name", ["HellaSwag", "LAMBADA", "HF config", "HF index", "run's state"])
def test_json_with_other_values_is_refused_or_read(name: str, tmp_path: Path) -> None:
    """Values of other types, and numbers out of range, in each key of a valid file."""
    parser, folder = PARSERS[name], tmp_path / "folder"
    folder.mkdir()
    parser.write(folder)
    path = folder / parser.file
    text = path.read_text()
    good = json.loads(text.splitlines()[0] if parser.file == "tasks.jsonl" else text)
    numbers = st.sampled_from([-1, 0, 2**31, 2**63, 10**30, 0.5, "1", True])

    @FEW
    @given(st.sampled_from(sorted(good)), JSON_VALUES | numbers)
    def check(key: str, value: object) -> None:
        path.write_text(json.dumps({**good, key: value}) + "\n")
        check_answer(parser, folder)

    check()
