"""A fresh clone of this tree in another folder, in which the real `dvc` runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.repo import REPO
from tests.support.small_data import hashes


class Clone:
    """A project folder with its own git repository, DVC cache and store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder.parent / f"{folder.name}.log"
        home = folder.parent / f"{folder.name}-home"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {
            "HOME": str(home),
            "DVC_SITE_CACHE_DIR": str(home / "site"),
            "DVC_GLOBAL_CONFIG_DIR": str(home / "global"),
            "DVC_SYSTEM_CONFIG_DIR": str(home / "system"),
            "GIT_CONFIG_NOSYSTEM": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.env["SHELL"] = "/bin/sh"  # unlike bash, it remains between DVC and a stage
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(self, *command: str, status: int = 0, **env: str) -> str:
        """Run a command, check its exit status, return its output."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command in a new session; its output is in ``log``."""
        log = open(self.log, "w")
        return subprocess.Popen(
            command, cwd=self.folder, env=self.env, stdout=log, stderr=log, start_new_session=True
        )

    def git(self, *args: str) -> str:
        return self.run("git", *args)

    def set(self, key: str, value: str) -> None:
        """Change one line of params.yaml."""
        path = self.folder / "params.yaml"
        lines = path.read_text().splitlines()
        (index,) = (i for i, line in enumerate(lines) if line.startswith(f"  {key}:"))
        lines[index] = f"  {key}: {value}"
        path.write_text("\n".join(lines) + "\n")

    def hashes(self, folder: str) -> dict[str, str]:
        """Return relative path -> sha256 of the files in a folder."""
        return hashes(self.folder / folder)

    def is_busy(self) -> bool:
        """Return whether a process runs in this folder (Linux)."""
        for link in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if link.readlink() == self.folder:
                    return True
        return False


def stages_run(output: str) -> set[str]:
    """Return the stages that `dvc` ran."""
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}


def make_clone(folder: Path, preset: str) -> Clone:
    """Copy the tree as git would clone it, apply a preset, and commit."""
    folder.mkdir(parents=True)
    listed = ("git", "ls-files", "-co", "--exclude-standard", "-z")
    names = subprocess.check_output(listed, cwd=REPO, text=True)
    for name in filter(None, names.split("\0")):
        if (REPO / name).is_file():  # git also lists deleted files
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, folder / name)
    clone = Clone(folder)
    clone.run(sys.executable, "-m", "train.preset", preset)
    clone.git("init", "-q")
    clone.git("config", "user.name", "Test")
    clone.git("config", "user.email", "test@example.org")
    clone.git("add", "-A")
    clone.git("commit", "-qm", "A clone")
    return clone
