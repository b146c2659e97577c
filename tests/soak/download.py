"""SIGKILL `pipeline.download` at random moments: `python -m tests.soak.download` (`make soak`).

A hub on loopback serves several files; whenever a random number of bytes is sent the stage is
killed (the driver, or all, or one worker), and started again. In the end the bytes on disk must be
those that were served, and few of them may have been sent twice.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.support.downloads import Project, interrupted, sample_files
from tests.support.hub import Hub

MOST = 1.2


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.download", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--mb", type=int, default=120, help="of all files together")
    parser.add_argument("--files", type=int, default=5)
    parser.add_argument("--rate", type=float, default=8.0, help="MB/s a connection")
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    rng = random.Random(seed)
    files = sample_files(args.files, args.mb * 10**6 // args.files)
    total = sum(map(len, files.values()))
    moments = [rng.random() * 0.98 * total for _ in range(args.kills)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Hub(args.rate * 1e6) as hub:
        hub.repo().commit(files)
        project = Project(Path(folder) / "project", hub)
        sent = interrupted(project, files, moments, rng)
        project.check_token()
    print(
        f"{args.kills} kills in {total / 1e6:.0f} MB of {args.files} files (seed {seed}): "
        f"the bytes are the served ones; {sent:.3f} times their number was sent (at most {MOST}); "
        f"{time.monotonic() - began:.0f} s"
    )
    sys.exit(int(sent >= MOST))


if __name__ == "__main__":
    main()
