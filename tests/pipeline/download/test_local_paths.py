"""Tests for pipeline.download.local_paths and left_out: what a path, folder or glob names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.download import local_paths
from pipeline.download.left_out import LeftOut
from pipeline.download.source_paths import resolve
from pipeline.runtime.errors import UserError

FILES = (
    *("2024/a.txt", "2024/_temporary/0/b.txt", ".git/c.txt", "notes.MD", "top.TXT"),
    *("out.parquet/part-00000-x-c000.snappy.parquet", "out.parquet/_SUCCESS"),
    *("out.parquet/.part-0.crc", "out.csv/date=2024-01-01/part-0.csv", "out.csv/part-1"),
    *("b[1]/data[1].txt", "a::b.txt", "_own/d.txt"),
)


def test_a_workspace_without_ignored_files_reads_those_of_the_main_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, workspace = tmp_path / "main", tmp_path / "workspace"
    for file in ("main/data/a.txt", "main/data/b.txt", "workspace/data/a.txt", "workspace/c/d.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("DVC_ROOT", str(main))  # as in the workspace of an experiment

    def found(pattern: str) -> list[Path]:
        return [file.path for file in local_paths.find(pattern, LeftOut())]

    for pattern in ("data", "data/*.txt", "**/*.txt"):
        assert found(pattern) == [main / "data/a.txt", main / "data/b.txt"]
    assert found("data/a.txt") == [workspace / "data/a.txt"]
    assert found("data/b.txt") == [main / "data/b.txt"]
    assert found("c/*.txt") == [workspace / "c/d.txt"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `in` with files, links and special files, in the current folder."""
    for file in FILES:
        path = tmp_path / "in" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder = tmp_path / "in"
    (folder / "latest").symlink_to("2024")
    (folder / "loop").symlink_to("../in")
    (folder / "0link.txt").symlink_to("2024/a.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "self.txt").symlink_to("self.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/e.txt").touch()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


TEXTS = ["2024/a.txt", "a::b.txt", "b[1]/data[1].txt", "linked/e.txt", "top.TXT"]
TABLES = [
    "out.csv/date=2024-01-01/part-0.csv",
    "out.parquet/part-00000-x-c000.snappy.parquet",
]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("in", sorted(TEXTS + TABLES)),
        ("./in/", sorted(TEXTS + TABLES)),
        ("~/in", sorted(TEXTS + TABLES)),
        ("in/*", sorted(TEXTS + TABLES)),
        ("in/**", sorted(TEXTS + TABLES)),
        ("in/**/*.txt", TEXTS[:-1]),
        ("in/*.[tT][xX][tT]", ["0link.txt", "a::b.txt", "top.TXT"]),
        ("in/[^2-b]*.TXT", ["top.TXT"]),
        ("in/[^t]*.TXT", None),
        ("in/[^0a-z]*/*.txt", ["2024/a.txt"]),
        ("in/[2bt]*/", ["2024/a.txt", "b[1]/data[1].txt"]),
        ("in/*.txt/", None),
        ("in/**/", sorted(TEXTS + TABLES)),
        ("in/*.parquet", TABLES[1:]),
        ("in/*/*.parquet", TABLES[1:]),
        ("in/out.parquet", ["part-00000-x-c000.snappy.parquet"]),
        ("in/out.csv/*/*", ["date=2024-01-01/part-0.csv"]),
        ("in/latest", ["a.txt"]),
        ("in/loop/latest/*.txt", ["a.txt"]),
        ("in/b[1]", ["data[1].txt"]),
        ("in/b[1]/data[1].txt", ["data[1].txt"]),
        ("in/b[1]/*", ["data[1].txt"]),
        ("in/[2b]*/*.txt", ["2024/a.txt", "b[1]/data[1].txt"]),
        ("in/a::b.txt", ["a::b.txt"]),
        ("in/_own", ["d.txt"]),
        ("in/_*/d.txt", ["_own/d.txt"]),
        ("in/2024/_temporary/0/*", ["b.txt"]),
        ("in/.git/c.txt", ["c.txt"]),
        ("in/0link.txt", ["0link.txt"]),
        ("file://{here}/in/top.TXT", ["top.TXT"]),
    ],
)
def test_a_path_names_what_ls_shows(folder: Path, pattern: str, names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(UserError, match=r"^source\.paths: "):
            resolve([pattern])
        return
    found = resolve([pattern.format(here=folder.parent)])
    assert [file.path for file in found] == names
    assert all(Path(file.url).is_file() for file in found)


def test_whatever_is_left_out_of_a_folder_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(["in"])
    out = capsys.readouterr().out
    for name in (
        *("2024/_temporary/", ".git/", "out.parquet/_SUCCESS", ".part-0.crc", "_own/"),
        *("notes.MD", "out.csv/part-1", "gone.txt", "self.txt", "pipe.txt"),
        *("latest/", "loop/", "0link.txt"),
    ):
        assert name in out
    for name in TEXTS + TABLES:
        assert name not in out


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("in/**/*.txt", ["2024/_temporary/", "_own/"]),
        ("in/**/_own/*", ["2024/_temporary/"]),
        ("in/**/_temporary/0/*", ["_own/"]),
    ],
)
def test_auxiliary_folders_below_two_stars_are_named_unless_read(
    folder: Path, pattern: str, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    resolve([pattern])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "auxiliary" in line]
    assert line.rpartition(": ")[2].split(", ") == named


def test_the_current_folder_is_no_glob(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "b1").mkdir()
    monkeypatch.chdir(folder / "b[1]")
    monkeypatch.setenv("HOME", str(folder / "b[1]"))
    for pattern in ("*.txt", ".", "~", "~/d*"):
        assert [file.path for file in resolve([pattern])] == ["data[1].txt"]


def test_folders_that_are_nested_too_deeply_are_no_missing_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recurse(*_: object) -> None:
        raise RecursionError

    monkeypatch.setattr(local_paths._Search, "add", recurse)
    with pytest.raises(UserError, match="deep"):
        resolve(["in"])


@pytest.mark.parametrize("pattern", ["q" * 5000, "q/" * 2500, "q" * 300, "q" * 300 + "/*"])
def test_a_name_that_is_too_long_is_called_so(folder: Path, pattern: str) -> None:
    with pytest.raises(UserError, match="too long") as error:
        resolve([pattern])
    assert "exclude" not in str(error.value)


def test_many_names_are_cut_and_printed_safely(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(25):
        (tmp_path / f"{number:02d}.md").touch()
    (tmp_path / "\x1b[31m\n.doc").touch()
    (tmp_path / os.fsdecode(b"\xff.doc")).touch()
    (tmp_path / "a.txt").touch()
    resolve([str(tmp_path)])
    (line,) = capsys.readouterr().out.splitlines()
    assert "7 more" in line
    assert line.isprintable()


@pytest.mark.parametrize(
    "pattern",
    [
        *("", "a\0b", "q" * 300, "in/no.txt", "in/no*.txt", "in/no/*.txt", "in/**/no", "~nobody/x"),
        *("in/gone.txt", "in/self.txt", "in/pipe.txt", "in/notes.MD", "in/a.txt/", "/dev/null"),
        *("x::y", "zip://a.txt::in/a.zip", "in/*/_SUCCESS", "in/gone*", "\x1b[0m"),
    ],
)
def test_a_path_that_names_no_text_is_an_error_in_one_line(folder: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=r"^source\.paths: ") as error:
        resolve([pattern])
    assert str(error.value).isprintable()


def test_a_name_that_is_also_a_pattern_for_other_files_is_refused(folder: Path) -> None:
    (folder / "b[1]/data1.txt").touch()
    assert [f.path for f in resolve(["in/b[1]"])] == ["data1.txt", "data[1].txt"]
    with pytest.raises(UserError, match=r"data\[1\]\.txt.*data1\.txt"):
        resolve(["in/b[1]/data[1].txt"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_an_error_unless_excluded(folder: Path) -> None:
    (folder / "2024").chmod(0)
    try:
        with pytest.raises(UserError, match="2024"):
            resolve(["in"])
        found = resolve(["in"], exclude=["2024", "latest", "0link.txt"])
        assert [file.path for file in found] == sorted(TEXTS[1:] + TABLES)
    finally:
        (folder / "2024").chmod(0o755)


def test_a_file_of_several_paths_is_taken_once(folder: Path) -> None:
    paths = ["in/top.TXT", "in/*.TXT", "in/loop/top.TXT", "in/0link.txt", "in/2024"]
    assert [file.path for file in resolve(paths)] == ["0link.txt", "top.TXT"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["c", "c/sub"], ["sub/x.txt", "y.txt"]),
        (["c/sub", "c"], ["x.txt", "y.txt"]),
        (["c", "c/sub/x.txt"], ["sub/x.txt", "y.txt"]),
        (["c/sub/*.txt", "c/**/x.txt"], ["x.txt"]),
        (["c", "c/../c/sub"], ["sub/x.txt", "y.txt"]),
        (["c", "c/link"], ["sub/x.txt", "y.txt"]),
        (["c/link", "c/sub"], ["x.txt"]),
        (["c/l*", "c/**/x.txt"], ["link/x.txt"]),
    ],
)
def test_overlapping_paths_take_a_file_once_under_its_first_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], names: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c/sub").mkdir(parents=True)
    for name in ("c/y.txt", "c/sub/x.txt"):
        Path(name).touch()
    Path("c/link").symlink_to("sub")
    assert [file.path for file in resolve(paths)] == names


@pytest.mark.parametrize(
    ("exclude", "names"),
    [
        (["*.txt"], [*TABLES, "top.TXT"]),
        (["out.*", "b[1]", "a::b.txt"], ["2024/a.txt", "linked/e.txt", "top.TXT"]),
        (["./2024/", "latest", "0link.txt", "out.*/*", "*/*.txt", "a::b.txt"], ["top.TXT"]),
        (["**/a.txt", "0*", "**/out.*", "**/[^0]*.TXT", "a::*"], TEXTS[2:4]),
        (["linked/**/e.txt", "**/top.*"], sorted([*TEXTS[:3], *TABLES])),
        (["data[[]1].txt", "e.txt", "out.*", "a.txt", "0*", "a::*", "top.*"], None),
    ],
)
def test_exclude_matches_the_path_the_name_and_folders(
    folder: Path, exclude: list[str], names: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if names is None:
        with pytest.raises(UserError, match=r"source\.exclude"):
            resolve(["in"], exclude=exclude)
    else:
        assert [file.path for file in resolve(["in"], exclude=exclude)] == names
    assert "warning" not in capsys.readouterr().out


def test_a_pattern_that_excludes_nothing_is_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(["in"], exclude=["*.doc", "top.*"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "*.doc" in line
    assert "top" not in line


@pytest.mark.parametrize("pattern", ["?", ".", "./", "??", ""])
def test_the_folder_itself_has_no_name_to_exclude(folder: Path, pattern: str) -> None:
    for path in ("in", "in/**"):
        assert len(resolve([path], exclude=[pattern])) == len(TEXTS + TABLES)


def test_a_path_without_files_is_an_error_although_another_is_excluded(folder: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        resolve(["in", "in/no*.txt"], exclude=["top.TXT"])
    assert len(resolve(["in/top.TXT", "in/2024"], exclude=["top.TXT"])) == 1
    assert not LeftOut(["a"]).excludes("b/c")
