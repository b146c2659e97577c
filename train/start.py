"""What a run starts from (`train.init`): the seed, a checkpoint, or another's model.

    scratch           weights drawn from the seed
    checkpoint DIR    a checkpoint's weights; with `train.init_with: all` its optimizer and step
                      too: the run goes on where that one was (longer, or on another schedule)
    hf DIR            the weights of a folder as `transformers` writes it

The folder is read once, before a run's first step; a run that resumes has checkpoints of its own.
Its content is a part of the run's key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model import GPT, GPTConfig
from model.errors import FormatError
from pipeline import atomic
from pipeline.errors import UserError
from train import checkpoint

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


@dataclass(frozen=True)
class Start:
    """A folder of weights, and how much of it is taken.

    Attributes:
        kind: "checkpoint" or "hf".
        folder: Where it is.
        whole: Whether a checkpoint's optimizer and step are taken as well.
    """

    kind: str
    folder: Path
    whole: bool

    @classmethod
    def parse(cls, init: str, init_with: str) -> Start | None:
        """What `train.init` and `train.init_with` say; None for `scratch`.

        Raises:
            ValueError: They say nothing that can be done.
        """
        kind, _, folder = init.partition(" ")
        whole = init_with == "all"
        if kind not in ("scratch", "checkpoint", "hf") or bool(folder.strip()) != (
            kind != "scratch"
        ):
            raise ValueError(f"init {init!r}: write scratch, checkpoint DIR, or hf DIR")
        if whole and kind != "checkpoint":
            raise ValueError(f"init_with all needs a checkpoint to start from; init is {init}")
        return None if kind == "scratch" else cls(kind, Path(folder.strip()).expanduser(), whole)

    def key(self) -> str:
        """The content that the run starts from, as a hash.

        Raises:
            UserError: There is none.
        """
        if self.kind == "checkpoint":
            names = checkpoint.FILES if self.whole else (checkpoint.MODEL,)
            paths = [self.folder / name for name in names]
        else:
            paths = sorted(self.folder.glob("*.safetensors"))
        try:
            hashes = [atomic.sha256_file(path) for path in paths]
        except OSError as error:
            raise UserError(
                f"params.yaml: train.init: {error.filename}: {error.strerror}; it is read again at "
                "each start, so keep it where it is"
            ) from None
        if not hashes:
            raise UserError(f"params.yaml: train.init: {self.folder} holds no *.safetensors")
        return atomic.sha256_json([self.kind, *hashes])

    @property
    def step(self) -> int:
        """Complete steps that are taken over; 0 unless whole."""
        state = self.folder / checkpoint.STATE
        return int(json.loads(state.read_bytes())["step"]) if self.whole else 0

    def load(self, config: GPTConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], int, int]:
        """Reads the folder.

        Args:
            config: The model that is to be trained.

        Returns:
            Weights; flat optimizer state (empty unless whole); complete steps and samples seen (0
            unless whole).

        Raises:
            UserError: The folder is broken, or of another model.
        """
        try:
            state = self._verified()
            if self.kind == "hf":
                gpt = GPT.from_hf(self.folder)
            else:
                gpt = GPT.from_checkpoint(self.folder)
        except (FormatError, checkpoint.BrokenCheckpoint) as error:
            raise UserError(f"params.yaml: train.init: {error}") from None
        ours, theirs = config.to_dict(), gpt.config.to_dict()
        if any(ours[name] != theirs[name] for name in SIZES):
            said = ", ".join(f"{name} {theirs[name]} (here {ours[name]})" for name in SIZES)
            raise UserError(f"params.yaml: model: {self.folder} is of another size: {said}")
        if not self.whole:
            return gpt.state_dict(), {}, 0, 0
        _, moments = checkpoint.load_tensors(self.folder)
        return gpt.state_dict(), moments, int(state["step"]), int(state["samples"])

    def _verified(self) -> dict[str, Any]:
        """The state of a checkpoint of ours; that of an imported model holds no hashes to check."""
        path = self.folder / checkpoint.STATE
        if self.kind == "hf" or not path.exists():
            return {}
        if not self.whole and "sha256" not in json.loads(path.read_bytes()):
            return {}
        return checkpoint.verify(self.folder)
