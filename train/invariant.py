"""`train.invariant: N`: the same weights, bit for bit, on any number of processes.

A *leaf* is N sequences, computed in one forward and backward pass wherever it is. Its loss is a
plain sum over its tokens, and its gradient a leaf of the tree of `summation.py`. So the gradient of
a batch, its norm, clipping and the update are the same bits on each rank of any world:

    leaves [n r / W, n (r + 1) / W)      of rank r, forward and backward one after the other
    binary counter                       their gradients, in one flat buffer each
    sum_over_ranks                       the rest of the tree
    * 1 / tokens                         once, after the sum: scaling rounds
    clip, update                         as in trainer.py, without DDP

What decides the bits in addition is fixed (one thread on a CPU, the model's own chunks of the loss)
or recorded and compared when a run resumes (`Trainer.conditions`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.errors import UserError
from train import numerics
from train.checkpoint.chain import Chain
from train.data.loader import Batches
from train.distributed.interrupt import Interrupt
from train.distributed.world import World, process_name
from train.evals import hellaswag
from train.numerics import summed_loss
from train.optim.param_groups import set_rates
from train.run import Run
from train.summation import Counter, most_nodes, sum_over_ranks
from train.trainer import Trainer


class InvariantTrainer(Trainer):
    """A trainer whose weights do not depend on the number of processes."""

    def __init__(self, run: Run, world: World, tasks: list[hellaswag.Task] | None = None) -> None:
        super().__init__(run, world, tasks)
        if world.device.type == "cpu":
            # The gradients of LayerNorm's gain and bias are partial sums, one per thread.
            torch.set_num_threads(1)
        if self.compiled:
            from torch._inductor import config

            config.deterministic = True
        self._check_same_conditions()
        # A flat buffer that any bucket can be cut from: one slice per rank.
        self._size = -(-sum(p.numel() for p in self.named.values()) // world.size) * world.size
        self._free: list[Tensor] = []

    def _check_same_conditions(self) -> None:
        """Refuse ranks of other processors, libraries or settings than rank 0.

        Raises:
            UserError: On all ranks.
        """
        ranks = self.world.gather((process_name(self.world.rank), self._rounding()))
        (_, first), *others = ranks
        for name, found in others:
            if differs := [key for key in {**first, **found} if found.get(key) != first.get(key)]:
                raise UserError(
                    f"train.invariant: {name}: {', '.join(differs)}: not as on rank 0; use nodes "
                    "of one kind and setting, or invariant: null"
                )

    def compare_arithmetic(self, state: dict[str, Any]) -> None:
        """Refuse to resume where the next steps would round differently than those before.

        Raises:
            UserError: On all ranks, unless `other_rounding` of rank 0's machine.yaml allows it.
        """
        if self.world.broadcast(self.run.machine.other_rounding) or "chain" not in state:
            return
        last, now = Chain.of(state).conditions[-1], self._rounding()
        before = {**last["arithmetic"], **last["environment"]}
        for name in {**before, **now}:
            then, here = before.get(name), now.get(name)
            if then != here:
                raise UserError(
                    f"train.invariant: {name}: {then} up to step {state['step']}, but {here} "
                    "here, which rounds differently; resume where it is the same, or set "
                    "GPT2_OTHER_ROUNDING=1 to continue as a run that is not invariant"
                )

    def _rounding(self) -> dict[str, Any]:
        """What decides the bits in addition to parameters, code and data."""
        device = self.world.device
        found = {**self.arithmetic(), **numerics.environment(device, compiled=self.compiled)}
        del found["world_size"]
        return found

    def conditions(self) -> dict[str, Any]:
        """All that decides the bits of the next steps; not the number of processes."""
        found = super().conditions()
        del found["arithmetic"]["world_size"]
        return found

    def dry_passes(self, inputs: Tensor, targets: Tensor) -> None:
        """Run one pass, with as many gradients in memory as a step has; nothing is wrapped."""
        leaves = self.split.micro_batches(self.run.batches.full, self.world.rank)
        held = [self._gradient() for _ in range(most_nodes(leaves))]
        self._use(held[0])
        summed_loss(self.forward, inputs, targets, self.run.dtype).backward()
        self._free += held

    def step(self, step: int, batches: Batches, interrupt: Interrupt) -> tuple[float, Tensor]:
        """Train one optimizer step; see `Trainer.step`."""
        learning_rate = self.schedule(step)
        set_rates(self.optimizer, learning_rate, self.params.decay_fraction(step))

        _, count = self.run.batches(step)
        shares = [self.split.micro_batches(count, rank) for rank in range(self.world.size)]
        own, leaves = shares[self.world.rank], count // self.split.micro_batch
        losses = torch.zeros(leaves, dtype=torch.float64, device=self.world.device)
        counter = Counter(self._add)
        for micro_step in range(self.split.micro_steps(count)):
            interrupt.check()
            if micro_step == len(own):  # a rank with one leaf less
                break
            batch = next(batches)
            assert batch.step == step, f"the loader is at step {batch.step}, the loop at {step}"
            gradient = self._gradient()
            self._use(gradient)
            loss = summed_loss(self.forward, batch.inputs, batch.targets, self.run.dtype)
            loss.backward()
            losses[own[micro_step]] = loss.detach()
            counter.push(own[micro_step], gradient)

        nodes, tokens = counter.nodes, count * self.run.model.block_size
        total = sum_over_ranks(nodes, shares, self.world)
        self._use(total.mul_(1 / tokens))
        loss = (self.world.sum(losses).sum() / tokens).float()
        numbers = self.optimize(loss)
        self._free += [node.value for node in nodes]
        return learning_rate, numbers

    def _gradient(self) -> Tensor:
        """A flat buffer of zeros for the gradient of all parameters."""
        if self._free:
            return self._free.pop().zero_()
        return torch.zeros(self._size, device=self.world.device)

    def _use(self, gradient: Tensor) -> None:
        """Make parts of a flat buffer the gradients of the parameters."""
        start = 0
        for parameter in self.named.values():
            part = gradient[start : start + parameter.numel()]
            parameter.grad = part.view(parameter.shape)
            start += parameter.numel()

    def _add(self, left: Tensor, right: Tensor) -> Tensor:
        self._free.append(right)
        return left.add_(right)
