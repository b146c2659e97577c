"""`python -m tests.support.one_gradient`: write a rank's gradients of the first step to a file.

The trainer computes them under DDP; only the optimizer is replaced. The file also has the
validation loss.
"""

import os
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import save_file

from tests.support.training import batches
from train.distributed.interrupt import Interrupt
from train.distributed.rendezvous import process_group
from train.run import Run
from train.trainer import Trainer


def main() -> None:
    run = Run.open()
    with process_group("cpu") as world, Interrupt(world) as interrupt:
        trainer = Trainer(run, world)
        trainer.warm_up()
        seen = {}

        def keep() -> None:
            seen.update({name: cast(Any, p.grad).clone() for name, p in trainer.named.items()})

        cast(Any, trainer).optimizer = SimpleNamespace(
            param_groups=[], step=keep, zero_grad=lambda **_: None
        )
        with batches(run, trainer, 0, 1) as loader:
            trainer.step(0, loader, interrupt)
        assert next(loader, None) is None, "the step did not take all of its samples"
        seen["validation"] = torch.tensor([trainer.validate(interrupt)])
        save_file(seen, f"{os.environ['GRADIENTS']}-{world.rank}.safetensors")


if __name__ == "__main__":
    main()
