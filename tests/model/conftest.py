"""Shared fixtures of the model tests."""

import sys
from collections.abc import Iterator

import pytest
import torch

from model import command


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Use one thread: on models this small, synchronising threads costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command in this process; return exit status, stdout and stderr."""

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
        with pytest.raises(SystemExit) as caught:
            command.run(module.main)
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call
