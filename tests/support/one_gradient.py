"""`python -m tests.support.one_gradient`: write a rank's gradients of the first step to a file.

The trainer computes them under DDP; only the optimizer is replaced, and buckets have `BUCKET_MB`
megabytes if that is set. A compiled model is traced and split, but no code is generated, which
would take minutes. The file also has the validation loss, and the number of graphs into which the
training step was split (`GPT2_OVERLAP`; else 1).
"""

import os
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch._dynamo.backends.distributed import DDPOptimizer
from torch.nn.parallel import DistributedDataParallel

from tests.support.training import batches
from train import trainer as trainer_module
from train.distributed.interrupt import Interrupt
from train.distributed.rendezvous import process_group
from train.run import Run
from train.trainer import Trainer


def count_graphs() -> list[int]:
    """Return the list to which each compilation under DDP adds its number of graphs."""
    counts, original = [1], DDPOptimizer.compile_fn

    def compile_fn(self: DDPOptimizer, *args: Any, **named: Any) -> Any:
        compiled = original(self, *args, **named)
        counts.append(len(self.buckets))
        return compiled

    cast(Any, DDPOptimizer).compile_fn = compile_fn
    return counts


def main() -> None:
    if megabytes := os.environ.get("BUCKET_MB"):
        small = partial(DistributedDataParallel, bucket_cap_mb=float(megabytes))
        vars(trainer_module)["DistributedDataParallel"] = small
    vars(torch)["compile"] = partial(torch.compile, backend="aot_eager")
    run, graphs = Run.open(), count_graphs()
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
        seen["graphs"] = torch.tensor([float(max(graphs))])
        seen["validation"] = torch.tensor([trainer.validate(interrupt)])
        save_file(seen, f"{os.environ['GRADIENTS']}-{world.rank}.safetensors")


if __name__ == "__main__":
    main()
