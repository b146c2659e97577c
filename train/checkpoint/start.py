"""Parameter `train.init`: the folder of weights that a run starts from.

A relative folder is one of the working directory or, in an experiment's workspace, of the main
checkout, as every file that `params.yaml` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.machine import find_file


@dataclass(frozen=True)
class Start:
    """The weights that a run starts from, parsed from `train.init` and `train.init_with`.

    Attributes:
        kind: "checkpoint" or "hf".
        folder: The checkpoint, or the folder that `transformers` wrote.
        with_optimizer: Whether a checkpoint's optimizer state and step are taken as well.
    """

    kind: str
    folder: Path
    with_optimizer: bool

    @classmethod
    def parse(cls, init: str, init_with: str) -> Start | None:
        """Parse the two parameters; None for `scratch`.

        Raises:
            ValueError: They do not fit each other or the grammar.
        """
        kind, _, folder = init.partition(" ")
        with_optimizer = init_with == "all"
        fits = kind in ("scratch", "checkpoint", "hf") and "\0" not in folder
        if not fits or bool(folder.strip()) != (kind != "scratch"):
            raise ValueError(f"init {init!r}: set scratch, checkpoint DIR, or hf DIR")
        if with_optimizer and kind != "checkpoint":
            raise ValueError(f"init_with all needs init: checkpoint DIR, but init is {init}")
        if kind == "scratch":
            return None
        try:
            path = Path(folder.strip()).expanduser()
        except RuntimeError as error:  # a user who does not exist
            raise ValueError(f"init {init!r}: {error}") from None
        return cls(kind, find_file(str(path)), with_optimizer)
