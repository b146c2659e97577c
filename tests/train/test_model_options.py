"""Tests of training with the options of `model` that GPT-2 does not have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model import GPT, GPTConfig, checkpoint
from pipeline.runtime.errors import UserError
from tests.support.training import Project, stop_in, train_here
from train.checkpoint import init_from
from train.checkpoint.start import Start
from train.play import GenerateRequest, generate

OPTIONS: dict[str, Any] = {
    "positions": "rotary",
    "qk_norm": True,
    "activation": "relu_squared",
    "zero_init": True,
}


def test_a_run_with_all_options_resumes_and_its_model_is_played(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"document_masking": True, "steps": 4, "val_every": 4, "checkpoint_every": 2}
    project.write(model=OPTIONS, train=train)
    stop_in(monkeypatch, "step", 2)
    train_here()
    gpt = GPT.from_checkpoint("artifacts/checkpoint")
    assert {key: gpt.config.to_dict()[key] for key in OPTIONS} == OPTIONS
    assert len(list(generate(gpt, GenerateRequest(prompt="The people", tokens=20, seed=1)))) >= 20


def test_a_run_does_not_start_from_a_checkpoint_with_another_option(tmp_path: Path) -> None:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=60)
    checkpoint.write(tmp_path, config, GPT(config).state_dict(), {})
    start = Start("checkpoint", tmp_path, with_optimizer=False)
    for option, value in OPTIONS.items():
        other = replace(config, **{option: value})
        if option == "zero_init":  # decides only weights that are replaced
            init_from.load(start, other)
        else:
            with pytest.raises(UserError, match=rf"model\.{option}: "):
                init_from.load(start, other)
