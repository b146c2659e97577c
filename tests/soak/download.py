"""SIGKILL `pipeline.download` at random moments: `python -m tests.soak.download` (`make soak`).

A loopback hub serves several files. Each time the bytes it has sent reach a random number, the
driver, one worker or all processes of the stage are killed, and the stage is started again. At the
end the bytes on disk must be those that were served, and few of them may have been sent twice.
"""

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from tests.support.downloads import Project, kill_tree, sample_files
from tests.support.hub import Hub

MAX_SENT = 1.2  # bytes sent per byte of the files


def run_with_kills(
    project: Project, files: Mapping[str, bytes], moments: Iterable[float], rng: random.Random
) -> float:
    """Run the stage to its end, with a SIGKILL each time the bytes sent reach a moment.

    A third of the kills hit the driver alone, and the next run starts while Ray's processes are
    still dying; a third hit all processes, like a power cut; a third hit one worker, and the same
    run continues.

    Returns:
        Bytes sent in total, per byte of the files.
    """
    total = sum(map(len, files.values()))
    process = project.start()

    def sent() -> int:
        return sum(project.hub.sent().values())

    for moment in sorted(moments):
        end = time.monotonic() + 120
        while process.poll() is None and sent() < moment:
            assert time.monotonic() < end, "no progress"
            time.sleep(0.002)
        assert process.poll() is None, project.end(process)
        kind = rng.choice(["driver", "all", "worker"])
        workers = _workers(process)
        if kind == "worker" and workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(workers).kill()
            continue
        if kind == "all":
            kill_tree(process)
        else:
            process.kill()
            process.wait(30)
        project.check_nothing_published()
        process = project.start()
    project.end(process)
    project.check(files)
    return sent() / total


def _workers(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """Return the Ray workers of this process that are running a download."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::download" in " ".join(child.cmdline()):
                found.append(child)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.download", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    rng = random.Random(args.seed)
    files = sample_files(5, 24_000_000)
    total = sum(map(len, files.values()))
    moments = [rng.random() * 0.98 * total for _ in range(args.kills)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Hub(bandwidth=8e6) as hub:
        hub.repo().commit(files)
        project = Project(Path(folder) / "project", hub)
        sent = run_with_kills(project, files, moments, rng)
        project.check_token()
    print(
        f"{args.kills} kills in {total / 1e6:.0f} MB of {len(files)} files (seed {args.seed}): "
        f"bytes match; {sent:.3f} bytes sent per byte of the files (at most {MAX_SENT}); "
        f"{time.monotonic() - began:.0f} s"
    )
    sys.exit(int(sent >= MAX_SENT))


if __name__ == "__main__":
    main()
