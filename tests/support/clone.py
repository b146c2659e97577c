"""A fresh clone of this tree in another folder, where the real `dvc` runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.repo import REPO


class Clone:
    """A project folder with git, DVC, a store and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        home = folder.parent / f"{folder.name}-home"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {
            "HOME": str(home),
            "DVC_SITE_CACHE_DIR": str(home / "site"),
            "DVC_GLOBAL_CONFIG_DIR": str(home / "global"),
            "DVC_SYSTEM_CONFIG_DIR": str(home / "system"),
            "GIT_CONFIG_NOSYSTEM": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        self.env["SHELL"] = "/bin/sh"  # which, unlike bash, stays between DVC and a stage

    def run(self, *command: str, status: int = 0, **env: str) -> str:
        """Run a command; its output. Fails on another exit status."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own."""
        log = open(self.folder / "log.txt", "w")
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
        """The sha256 of each file under a folder."""
        top = self.folder / folder
        return {
            path.relative_to(top).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(top.rglob("*"))
            if path.is_file()
        }

    def processes(self) -> dict[int, str]:
        """The live processes that work in this folder, and their command lines (Linux)."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "cwd").readlink() == self.folder:
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return found


def ran(output: str) -> set[str]:
    """The stages whose commands ran."""
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}


def make_clone(folder: Path, preset: str) -> Clone:
    """The tree as git would clone it, with a preset applied, committed."""
    folder.mkdir(parents=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPO / name).is_file():  # a file may be listed and deleted
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
