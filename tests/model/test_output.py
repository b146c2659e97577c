"""Tests for the output folders of `model.export` and `model.import_hf`."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from model import GPT, GPTConfig, checkpoint, command, export, files, import_hf, output
from model.errors import FormatError

CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=60)

Contents = dict[str, bytes]
Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; return its status, 2 only with one line that names --out."""

    def run(module: object, *flags: object) -> int:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
        with pytest.raises(SystemExit) as caught:
            command.run(module.main)  # type: ignore[attr-defined]
        err = capsys.readouterr().err
        if caught.value.code == 2:
            assert err.startswith("error: --out ")
            assert err.count("\n") == 1
        assert isinstance(caught.value.code, int)
        return caught.value.code

    return run


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and a folder in the Hugging Face layout."""
    ours, theirs = tmp_path / "models/ours", tmp_path / "models/theirs"
    checkpoint.write(ours, CONFIG, GPT(CONFIG).state_dict(), {})
    GPT(CONFIG).to_hf(theirs)
    return ours, theirs


def contents(folder: Path) -> Contents:
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*")}
    return {name: p.read_bytes() if p.is_file() else b"" for name, p in found.items()}


def commands(ours: Path, theirs: Path) -> list[tuple[Path, tuple[object, ...]]]:
    """The folder that each command reads, and the command without --out."""
    return [
        (ours, (export, "--checkpoint", ours)),
        (ours, (export, "--format", "llmc", "--checkpoint", ours)),
        (theirs, (import_hf, theirs)),
    ]


def test_no_command_writes_over_what_it_reads(
    folders: tuple[Path, Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tmp_path)
    for source, flags in commands(*folders):
        (tmp_path / "link").symlink_to(source)
        (tmp_path / "link to all").symlink_to(source.parent)
        for out in (
            *(source, source.parent, source / "new", source / "new/deep", tmp_path / "link"),
            *(tmp_path / "link/new", tmp_path / "link to all", tmp_path / "link to all/.."),
            source / f"../{source.name}/.",
        ):
            assert run(*flags, "--out", out) == 2, out
        monkeypatch.chdir(source)
        assert run(*flags, "--out", ".") == 2
        (tmp_path / "link").unlink()
        (tmp_path / "link to all").unlink()
    assert contents(tmp_path) == before


def test_a_folder_under_another_name_is_the_same(tmp_path: Path) -> None:
    """As where case is ignored, or a folder is mounted twice: `samefile` decides, not the name."""
    (tmp_path / "model").mkdir()

    class Twice(type(tmp_path)):  # type: ignore[misc]
        def samefile(self, other: Path) -> bool:
            return self.name.lower() == Path(other).name.lower()

    assert not output._overlap(tmp_path / "Model", tmp_path / "model")
    (tmp_path / "Model").mkdir()
    assert output._overlap(Twice(tmp_path / "Model/new"), tmp_path / "model")


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "state.json", "a/b"])
def test_no_command_writes_into_a_folder_of_something_else(
    folders: tuple[Path, Path], run: Run, tmp_path: Path, name: str
) -> None:
    (tmp_path / "other" / name).parent.mkdir(parents=True)
    (tmp_path / "other" / name).write_bytes(b"precious")
    shutil.copytree(folders[0], tmp_path / "checkpoint")
    shutil.copytree(folders[1], tmp_path / "saved by transformers")
    path = tmp_path / "saved by transformers/config.json"
    path.write_text(path.read_text().replace("{", '{"transformers_version": "5.0.0",'))
    (tmp_path / "file").write_bytes(b"precious")
    before = contents(tmp_path)
    for _, flags in commands(*folders):
        for out in ("other", "checkpoint", "saved by transformers", "file"):
            assert run(*flags, "--out", tmp_path / out) == 2, out
    assert contents(tmp_path) == before


def test_an_earlier_export_is_replaced_and_files_have_the_mode_of_the_umask(
    folders: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    old = os.umask(0o027)
    try:
        for number, (_, flags) in enumerate(commands(*folders)):
            out = tmp_path / str(number)
            out.mkdir()  # an empty folder is fine
            assert run(*flags, "--out", out) == 0
            first = contents(out)
            assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o640}
            if flags[0] is import_hf:
                assert run(*flags, "--out", out) == 2  # a checkpoint, once written, stays
            else:
                checkpoint.write(folders[0], CONFIG, GPT(CONFIG, seed=number + 5).state_dict(), {})
                assert run(*flags, "--out", out) == 0
                assert contents(out).keys() == first.keys()
                assert contents(out) != first
    finally:
        os.umask(old)


@pytest.mark.parametrize("other", [[], ["notes.txt"]])
def test_a_folder_left_by_an_interrupted_run_protects_files_of_something_else(
    folders: tuple[Path, Path], run: Run, tmp_path: Path, other: list[str]
) -> None:
    for folder, last in (("foreign", "config.json"), ("trained", "state.json")):
        (tmp_path / folder / output.PART).mkdir(parents=True)
        for name in ("model.safetensors", last, *other):
            (tmp_path / folder / name).write_bytes(b"precious")
    shutil.copytree(folders[1], tmp_path / "exported")
    (tmp_path / "exported" / output.PART).mkdir()
    before = contents(tmp_path)
    for _, flags in commands(*folders):
        for out in ("foreign", "trained", "exported"):
            if flags != (export, "--checkpoint", folders[0]) or out != "exported":
                assert run(*flags, "--out", tmp_path / out) == 2, out
    assert contents(tmp_path) == before


@pytest.mark.parametrize("target", ["elsewhere", "nowhere", None])
def test_a_link_or_file_in_place_of_the_hidden_folder_is_refused(
    folders: tuple[Path, Path], run: Run, tmp_path: Path, target: str | None
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    part = tmp_path / "out" / output.PART
    part.touch() if target is None else part.symlink_to(tmp_path / target)
    for _, flags in commands(*folders):
        assert run(*flags, "--out", tmp_path / "out") == 2


@pytest.mark.parametrize("out", ["", "a\0b", "x" * 300, "loop", "loop/x", "file/x"])
def test_a_path_that_no_folder_can_have_is_refused(
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    out: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for _, (module, *flags) in commands(*folders):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, flags), "--out", out])
        with pytest.raises(SystemExit) as caught:
            command.run(module.main)  # type: ignore[attr-defined]
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def killed_before(event: int, flags: tuple[object, ...], out: Path) -> bool:
    """Run a command in a child process that dies before its n-th change of the file system."""
    pid = os.fork()
    if pid == 0:
        left = event

        def hook(name: str, args: tuple[object, ...]) -> None:
            nonlocal left
            if name in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"):
                left -= str(args[0]).startswith(str(out))
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        with open(os.devnull, "w") as sys.stdout:
            flags[0].main([*map(str, flags[1:]), "--out", str(out)])  # type: ignore[attr-defined]
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_killed_at_any_moment_and_started_again_a_command_ends_with_the_same_files(
    folders: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    export_hf, _, import_again = (flags for _, flags in commands(*folders))
    for last, flags in (("config.json", export_hf), ("state.json", import_again)):
        assert run(*flags, "--out", tmp_path / f"undisturbed {last}") == 0
        expected = contents(tmp_path / f"undisturbed {last}")
        event = 1
        while killed_before(event, flags, out := tmp_path / f"{last} {event}"):
            left = contents(out) if out.exists() else {}
            if last in left:  # complete, or not there
                assert {name: left[name] for name in expected} == expected
            if left != expected:
                assert run(*flags, "--out", out) == 0
            assert contents(out) == expected, event
            event += 1
        assert event > 10


def test_a_full_disk_leaves_nothing_and_is_a_fault(
    folders: tuple[Path, Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = contents(tmp_path)
    for function in ("sync", "save_file"):
        monkeypatch.setattr(files, function, full)
        for _, flags in commands(*folders):
            if function == "sync" or "llmc" not in flags:
                assert run(*flags, "--out", tmp_path / "new") == 1
    assert contents(tmp_path) == before


def test_control_characters_of_names_are_escaped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise FormatError("a\x1b[31m\n\u202eb ü")

    with pytest.raises(SystemExit):
        command.run(fail)
    assert capsys.readouterr().err == "error: a\\x1b[31m \\u202eb ü\n"
