"""Tests for train.checkpoint.directory: atomic, verified checkpoints, and no pickle."""

import contextlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.store import atomic
from tests.support.damage import FEW, JSON_VALUES, damaged
from train.checkpoint import directory
from train.checkpoint.directory import Keep

MODEL = {"wte.weight": torch.arange(6.0).view(2, 3)}
OPTIMIZER = {"wte.weight.exp_avg": torch.ones(2, 3), "wte.weight.step": torch.tensor(3.0)}


def save(run: Path, step: int, keep: int = 9) -> Path:
    return directory.save(
        run, model=MODEL, optimizer=OPTIMIZER, state={"step": step, "x": 1}, keep=Keep(last=keep)
    )


def names(run: Path) -> list[str]:
    return [path.name for path in directory.checkpoints(run)]


def test_a_saved_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    assert directory.latest(tmp_path) is None
    folder = save(tmp_path, 200)
    assert folder == tmp_path / "step-00000200"
    assert sorted(p.name for p in folder.iterdir()) == sorted(directory.FILES)
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1  # that of the umask
    found = directory.latest(tmp_path)
    assert found is not None
    assert found[0] == folder
    assert found[1]["step"] == 200
    model, optimizer = directory.load_tensors(folder)
    assert torch.equal(model["wte.weight"], MODEL["wte.weight"])
    assert optimizer.keys() == OPTIMIZER.keys()


def test_equal_states_are_equal_bytes(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    for name in directory.FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_the_newest_are_kept_and_leftovers_of_a_killed_run_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000005.tmp").mkdir()
    for step in (1, 2, 10):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]


@pytest.mark.parametrize("keep", [1, 2])
def test_broken_checkpoints_of_later_steps_are_removed_first(tmp_path: Path, keep: int) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step)
    for step in (200, 300):
        (tmp_path / directory.folder_name(step) / directory.MODEL).write_bytes(b"broken")
    directory.verify(save(tmp_path, 110, keep=keep))
    assert names(tmp_path) == ["step-00000100", "step-00000110"][-keep:]


@pytest.mark.parametrize(
    ("keep", "losses", "kept"),
    [
        (Keep(last=2), {1: None, 2: None, 3: None}, {2, 3}),
        (Keep(last=1), {1: 5.0, 2: 4.0, 3: 4.5, 4: None}, {2, 4}),
        (Keep(last=1), {1: 4.0, 2: 4.0}, {1, 2}),
        (Keep(last=1, every=10), {10: None, 15: None, 20: 3.0, 21: None, 22: 9.0}, {10, 20, 22}),
        (Keep(last=5), {}, set()),
    ],
)
def test_the_newest_the_best_and_every_nth_are_selected(
    keep: Keep, losses: dict[int, float | None], kept: set[int]
) -> None:
    assert keep.select(losses) == kept


def test_the_best_is_kept_however_old(tmp_path: Path) -> None:
    for step, loss in ((1, 9.0), (2, 3.0), (3, 8.0), (4, None), (5, 7.0), (6, 7.5)):
        state = {"step": step, "val_loss": loss}
        directory.save(tmp_path, model=MODEL, optimizer=OPTIMIZER, state=state, keep=Keep(last=1))
    assert names(tmp_path) == ["step-00000002", "step-00000006"]
    assert directory.best(tmp_path) == tmp_path / "step-00000002"


def test_losses_over_other_tokens_are_not_compared(tmp_path: Path) -> None:
    for step, loss, tokens, windows in (
        *((1, 1.0, 10, "spread"), (2, 2.0, 20, None), (3, 3.0, 20, "spread")),
        *((4, 4.0, 20, "spread"), (5, None, 20, "spread")),
    ):
        state: dict[str, Any] = {"step": step, "val_loss": loss, "train": {"val_tokens": tokens}}
        if windows is not None:  # earlier code stored none
            state["val_windows"] = windows
        directory.save(tmp_path, model=MODEL, optimizer=OPTIMIZER, state=state, keep=Keep(last=1))
    assert names(tmp_path) == ["step-00000003", "step-00000005"]
    assert directory.best(tmp_path) == tmp_path / "step-00000003"


def test_a_run_killed_while_it_replaces_a_checkpoint_has_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, 1)
    (folder / directory.MODEL).write_bytes(b"broken")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1)
    directory.verify(folder)
    save(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}


@pytest.mark.parametrize("name", directory.FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_broken_checkpoint_is_reported_and_the_one_before_used(
    tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    path = bad / name
    if damage == "flip":
        data = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        path.chmod(0o444)  # as DVC does
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()
    found = directory.latest(tmp_path)
    assert found is not None
    assert found[0] == good
    assert "step-00000002" in capsys.readouterr().err
    if damage == "flip":  # so that DVC replaces it
        assert path.stat().st_mode & 0o777 == 0o644


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    """Not even one whose hash is right."""

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, ("raise SystemExit('unpickled')",))

    folder = save(tmp_path, 1)
    for content in (pickle.dumps(Bomb()), b""):
        (folder / directory.MODEL).write_bytes(content)
        state = atomic.read_sealed(folder / directory.STATE)
        state["sha256"][directory.MODEL] = atomic.sha256_file(folder / directory.MODEL)
        atomic.write_json(folder / directory.STATE, atomic.sealed(state))
        assert directory.latest(tmp_path) is None


def rewrite_state(folder: Path, *, seal: bool = True, **changes: object) -> None:
    state = {**atomic.read_sealed(folder / directory.STATE), **changes}
    atomic.write_json(folder / directory.STATE, atomic.sealed(state) if seal else state)


def test_a_checkpoint_of_earlier_code_is_loaded_and_an_unknown_version_refused(
    tmp_path: Path,
) -> None:
    folder = save(tmp_path, 1)
    rewrite_state(folder, seal=False, schema_version=1)
    assert directory.verify(folder)["step"] == 1
    rewrite_state(folder, seal=False, schema_version=2)  # without its hash
    with pytest.raises(directory.BrokenCheckpoint, match="json_sha256"):
        directory.verify(folder)
    rewrite_state(folder, schema_version=3)
    with pytest.raises(directory.BrokenCheckpoint, match="schema_version"):
        directory.verify(folder)


def test_step_must_agree_with_the_folder_and_with_the_samples_of_the_run(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    rewrite_state(folder, samples=40)
    assert directory.verify(folder, lambda step: 8 * step)["samples"] == 40
    for broken in (lambda step: 9 * step, lambda step: -1):
        assert directory.latest(tmp_path, broken) is None
    copy = tmp_path / "copy"
    folder.rename(copy)  # as published: the name has no step
    assert directory.verify(copy)["step"] == 5
    copy.rename(tmp_path / "step-00000007")
    with pytest.raises(directory.BrokenCheckpoint, match="step 5 "):
        directory.verify(tmp_path / "step-00000007")


def test_folders_of_other_names_are_no_checkpoints_and_stay(tmp_path: Path) -> None:
    for name in ("step-old", "step-00000009.bak", "step-"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000003").write_text("a file")
    (tmp_path / ".step-00000004.tmp").symlink_to(tmp_path / "step-old")
    folder = save(tmp_path, 2, keep=1)
    assert directory.checkpoints(tmp_path) == [folder]
    assert (tmp_path / "step-old").is_dir()
    assert directory.best(tmp_path) is None


def test_any_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    for name in directory.FILES:
        good = (folder / name).read_bytes()
        for at in range(len(good)):
            bad = good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :]
            (folder / name).write_bytes(bad)
            with pytest.raises(directory.BrokenCheckpoint, match=str(folder)):
                directory.verify(folder)
        (folder / name).write_bytes(good)
    assert directory.verify(folder)["x"] == 1


@FEW
@given(data=st.data())
def test_any_bytes_are_a_state_or_a_broken_checkpoint(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also with a matching hash, or as a checkpoint of earlier code, which has none."""
    folder = save(tmp_path_factory.mktemp("run"), 5)
    path = folder / directory.STATE
    key = st.sampled_from(["step", "samples", "sha256", "val_loss", "train", "schema_version"])
    if changes := data.draw(st.dictionaries(key, JSON_VALUES, max_size=2)):
        seal = data.draw(st.booleans())
        with contextlib.suppress(ValueError):  # NaN
            rewrite_state(folder, seal=seal, **({} if seal else {"schema_version": 1}) | changes)
    else:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    directory.latest(folder.parent, lambda step: 8 * step)
    directory.best(folder.parent)
