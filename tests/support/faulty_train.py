"""`python -m tests.support.faulty_train`: `python -m train` with a fault on one rank.

`FAULT=RANK,CALL` makes the loss of one micro-batch NaN on one rank: the CALL-th that it computes,
including warm-up. `SLOW=SECONDS` makes each checkpoint take that much longer. `DRIFT=RANK,STEP`
changes the last bit of one weight on one rank after that step.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any, cast

import torch

from pipeline.runtime import command
from train import __main__, numerics, trainer
from train.checkpoint import directory

if __name__ == "__main__":
    rank, call = map(int, os.environ.get("FAULT", "-1,0").split(","))
    drifting, last = map(int, os.environ.get("DRIFT", "-1,0").split(","))
    original, calls = numerics.summed_loss, itertools.count(1)

    def summed_loss(*args: Any) -> Any:
        loss = original(*args)
        faulty = int(os.environ["RANK"]) == rank and next(calls) == call
        return loss * float("nan") if faulty else loss

    save = directory.save

    def slow_save(*args: Any, **named: Any) -> Any:
        time.sleep(float(os.environ.get("SLOW", 0)))
        return save(*args, **named)

    step = trainer.Trainer.step

    def drifting_step(self: trainer.Trainer, number: int, *args: Any) -> Any:
        result = step(self, number, *args)
        if (self.world.rank, number + 1) == (drifting, last):
            self.gpt.ln_f.weight.detach().view(torch.int32)[0] += 1
        return result

    vars(trainer)["summed_loss"] = summed_loss
    cast(Any, trainer.Trainer).step = drifting_step
    vars(directory)["save"] = slow_save
    command.run(__main__.main)
