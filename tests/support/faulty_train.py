"""`python -m tests.support.faulty_train`: `python -m train` with a fault on one rank.

`FAULT=RANK,CALL` makes the loss of one micro-batch NaN on one rank: the CALL-th that it computes,
including warm-up. `SLOW=SECONDS` makes each checkpoint take that much longer.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

from pipeline.runtime import command
from train import __main__, numerics, trainer
from train.checkpoint import directory

if __name__ == "__main__":
    rank, call = map(int, os.environ["FAULT"].split(","))
    original, calls = numerics.summed_loss, itertools.count(1)

    def summed_loss(*args: Any) -> Any:
        loss = original(*args)
        faulty = int(os.environ["RANK"]) == rank and next(calls) == call
        return loss * float("nan") if faulty else loss

    save = directory.save

    def slow_save(*args: Any, **named: Any) -> Any:
        time.sleep(float(os.environ.get("SLOW", 0)))
        return save(*args, **named)

    vars(trainer)["summed_loss"] = summed_loss
    vars(directory)["save"] = slow_save
    command.run(__main__.main)
