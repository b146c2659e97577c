"""`python -m tests.train.faulty`: `python -m train` with a fault, for tests of several ranks.

`FAULT=RANK,CALL` makes the loss of one micro-batch no number, on one rank: the CALL-th that it
computes, rehearsals included.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

from pipeline import stage
from train import __main__, arithmetic, trainer

if __name__ == "__main__":
    rank, call = map(int, os.environ["FAULT"].split(","))
    original, calls = arithmetic.summed_loss, itertools.count(1)

    def summed_loss(*args: Any) -> Any:
        loss = original(*args)
        faulty = int(os.environ["RANK"]) == rank and next(calls) == call
        return loss * float("nan") if faulty else loss

    vars(trainer)["summed_loss"] = summed_loss
    stage.run(__main__.main)
