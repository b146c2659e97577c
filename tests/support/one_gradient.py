"""`python -m tests.support.one_gradient`: a rank's gradients of a run's first step, in a file.

It is the trainer's own step, under DDP, up to the moment when the optimizer would use them. The
validation loss is in the file, too.
"""

import os
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import save_file

from train.data.loader import Batches
from train.distributed.interrupt import Interrupt
from train.distributed.rendezvous import process_group
from train.run import Run
from train.trainer import Trainer


def main() -> None:
    run = Run.open()
    with process_group("cpu") as world, Interrupt(world) as interrupt:
        trainer = Trainer(run, world)
        trainer.join()
        seen = {}

        def keep() -> None:
            seen.update({name: cast(Any, p.grad).clone() for name, p in trainer.named.items()})

        cast(Any, trainer).optimizer = SimpleNamespace(
            param_groups=[], step=keep, zero_grad=lambda **_: None
        )
        batches = Batches(
            run.train_data,
            run.order,
            trainer.split,
            rank=world.rank,
            spans=[run.batches(0)],
            device=world.device,
        )
        with batches:
            trainer.step(0, batches, interrupt)
        assert next(batches, None) is None, "the step did not take all of its samples"
        seen["validation"] = torch.tensor([trainer.validate(interrupt)])
        save_file(seen, f"{os.environ['GRADIENTS']}-{world.rank}.safetensors")


if __name__ == "__main__":
    main()
