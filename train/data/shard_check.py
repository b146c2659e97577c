"""Check the shards while training begins: a byte that changed since `verify` is found, not learnt.

    process:   start | steps ...                           | first checkpoint | steps ...
    thread:          | hash each shard of this process     |  waits for the hashes

Every start hashes all shards of the data once per node: the processes of a node share them. The
thread has a lower priority than training, and its sequential reads fill the page cache from which
the loader then takes its windows. Nothing is saved before all hashes are known to be right, so no
checkpoint has learnt from damaged tokens. A run that is preempted before that saves nothing, so
each start must last longer than the hashes take. A file or a note that says "verified" proves
nothing here: it may come from another machine.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline import TokenStream
from pipeline.format.manifest import Shard
from pipeline.runtime import command
from pipeline.runtime.errors import StageFailed, UserError
from pipeline.store import atomic
from train.checkpoint.writer import lower_priority
from train.distributed.group import read_group
from train.distributed.world import World

BLOCK_BYTES = 1 << 22
VERIFIED = Path("data/verified.json")


def check_verified(tokens: Path) -> None:
    """Refuse data that `verify` has not passed.

    Raises:
        UserError: Names the file that is missing or belongs to other data.
    """
    manifest = atomic.sha256_file(tokens / "manifest.json")
    try:
        passed = atomic.parse_json(atomic.read_bytes(VERIFIED))["manifest_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{VERIFIED}: missing or unreadable; run python -m pipeline.verify"
        ) from None
    if manifest != passed:
        raise UserError(
            f"{VERIFIED}: belongs to other data than {tokens}; run python -m pipeline.verify"
        )


class ShardCheck:
    """Hashes this process's part of the shards in a thread; a context manager, which runs it.

    An error within the context is replaced by the damage that may have caused it, such as a token
    outside the vocabulary. Another process of the node may still hash that shard, or wait for this
    one, so this one then hashes all others, too.

    Args:
        world: The processes; those of this node share its shards.
        data: A split of the data; all its shards, those of the other split too, are hashed.
    """

    def __init__(self, world: World, data: TokenStream) -> None:
        group = read_group()
        self._world, self._folder = world, data.folder
        shards, rank, size = data.manifest.shards, group.local_rank, group.local_size
        self._own = shards[rank::size]
        self._others = [shard for i, shard in enumerate(shards) if i % size != rank]
        self._fault: StageFailed | None = None
        self._complete = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._hash_own, name="shards", daemon=True)

    def __enter__(self) -> ShardCheck:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        may_be_damage = isinstance(error, (IndexError, RuntimeError))
        if may_be_damage and not isinstance(error, torch.OutOfMemoryError):
            self._thread.join()
            self.check()
            self._hash(self._others)
            self.check()
        self._closing.set()
        self._thread.join()

    def check(self) -> None:
        """Raise the damage found so far by this process; does not wait.

        Raises:
            StageFailed: A shard differs from the manifest.
        """
        if self._fault is not None:
            raise self._fault

    def complete(self, seconds: float) -> bool:
        """Wait until all shards are hashed. A collective: all processes must call it alike.

        Args:
            seconds: To wait at most; far less than ``World.timeout``, which the others wait.

        Returns:
            Whether all are hashed, and right; the same on each process.

        Raises:
            StageFailed: On the processes that found a damaged shard.
            SystemExit: On the others.
        """
        if not self._complete:
            self._thread.join(seconds)
            if self._world.any(self._fault is not None):
                self.check()
                sys.exit(command.FAULT)
            self._complete = not self._world.any(self._thread.is_alive())
        return self._complete

    def _hash_own(self) -> None:
        lower_priority()
        self._hash(self._own)

    def _hash(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            path = self._folder / shard.name
            try:
                problem = self._problem(path, shard)
            except OSError as error:
                problem = f"cannot be read ({error.strerror})"
            if problem and not self._closing.is_set():
                self._fault = StageFailed(
                    f"{path}: {problem}; run `python -m pipeline.verify`, which removes damaged "
                    "files, then `dvc repro` to rebuild them"
                )
                return

    def _problem(self, path: Path, shard: Shard) -> str | None:
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while (block := file.read(BLOCK_BYTES)) and not self._closing.is_set():
                digest.update(block)
        found = digest.hexdigest()
        return None if found == shard.sha256 else f"sha256 is {found}, expected {shard.sha256}"
