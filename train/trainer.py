"""The model, its optimizer, and what a step does to them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model import GPT
from pipeline.runtime.errors import UserError
from train import numerics
from train.checkpoint import directory, init_from
from train.checkpoint.directory import Keep
from train.checkpoint.writer import Writer
from train.data.loader import Batches
from train.data.split import divisors
from train.distributed.interrupt import Interrupt
from train.distributed.world import World
from train.evals import hellaswag
from train.monitor import peak_flops
from train.numerics import summed_loss
from train.optim.param_groups import (
    decay_groups,
    flat_state,
    load_flat_state,
    make_optimizer,
    set_learning_rate,
)
from train.run import Run
from train.validation import mean_loss

SAMPLE_PROMPT = 16  # tokens of validation text that a sample goes on from


class Trainer:
    """The model, its optimizer, and what is done to them; the same on each rank.

    Attributes:
        gpt: The plain module: weights, saving, sampling.
        forward: The same, compiled where the machine says so: measuring.
        ddp: The same again, with its gradients averaged over the ranks: training.
        writer: Saves, on rank 0, beside the training.
        measured: Validation loss of the weights as they are; None where it is not known.

    Args:
        run: What is trained.
        world: By whom.
        tasks: Of HellaSwag, for `train.hellaswag_every`; None: it is not asked.
    """

    def __init__(self, run: Run, world: World, tasks: list[hellaswag.Task] | None = None) -> None:
        self.run, self.world, self.params = run, world, run.params
        self.tasks = tasks
        self.split = run.split(world.size, world.device.type)
        self.schedule = run.params.lr_schedule()
        numerics.configure(world.device, deterministic=run.params.deterministic)

        self.gpt = GPT.initialised(run.model.config(), seed=run.params.seed, device=world.device)
        self.gpt.checkpoint_activations = run.machine.checkpoint_activations
        self.gpt.loss_chunk = run.machine.loss_chunk
        self.named = dict(self.gpt.named_parameters())
        self.groups = decay_groups(self.named.items(), embeddings_decay=run.params.embeddings_decay)
        self.optimizer = make_optimizer(
            self.groups,
            run.params.optimizer,
            learning_rate=run.params.learning_rate,
            weight_decay=run.params.weight_decay,
            betas=(run.params.beta1, run.params.beta2),
            eps=run.params.eps,
        )
        self.compiled = run.compiles(world.device.type)
        self.writer = Writer(
            run.folder, Keep(last=run.params.keep_checkpoints, every=run.params.keep_every)
        )
        self.measured: float | None = None  # validation loss of the weights as they are now
        self.forward: Any = self.gpt
        if self.compiled:
            # One graph is the fastest. Cut where DDP's buckets end, it sends each bucket while the
            # backward goes on, which pays where the links between the nodes are slow.
            torch._dynamo.config.optimize_ddp = run.machine.overlap
            self.forward = torch.compile(self.gpt, fullgraph=True)

    def restore(self) -> int:
        """Takes up the newest whole checkpoint; else what the run starts from.

        Returns:
            Complete steps.

        Raises:
            UserError: That is of other data, or of another model.
        """
        found = directory.latest(self.run.folder) if self.world.first else None
        folder, state = self.world.broadcast(found) or (None, None)
        if folder is None or state is None:
            return self._begin()
        if state["dataset_key"] != self.run.dataset_key:
            raise UserError(
                f"{folder}: was trained on other data ({state['dataset_key'][:12]}) than "
                f"data/tokens holds ({self.run.dataset_key[:12]}); bring that back, or start anew "
                "with GPT2_FRESH=1"
            )
        differs = {k: v for k, v in self.arithmetic().items() if state["arithmetic"].get(k) != v}
        if differs and self.world.first:
            said = ", ".join(f"{k} {state['arithmetic'].get(k)} -> {v}" for k, v in differs.items())
            print(f"warning: resumes with other arithmetic ({said}): same data, other rounding")
        weights, moments = directory.load_tensors(folder)
        self.gpt.load_state_dict(weights)
        if moments:  # none where all steps so far were skipped
            load_flat_state(self.optimizer, self.named, moments)
        self.measured = state.get("val_loss")
        return int(state["step"])

    def _begin(self) -> int:
        start = self.params.start()
        if start is None:
            return 0
        weights, moments, step, samples = init_from.load(start, self.gpt.config)
        if samples != (here := self.run.samples(step)):
            raise UserError(
                f"params.yaml: train.init_with: all: {start.folder} has seen {samples} samples in "
                f"{step} steps, this run's would be {here}; keep its batch_tokens, or take weights"
            )
        if step >= self.params.steps:
            raise UserError(
                f"params.yaml: train.steps: {self.params.steps}, but {start.folder} is at step "
                f"{step} already; set more"
            )
        self.gpt.load_state_dict(weights)
        try:
            if moments:
                load_flat_state(self.optimizer, self.named, moments)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"params.yaml: train.init_with: all: {start.folder} is of another optimizer "
                f"({error}); take weights"
            ) from None
        return step

    def join(self) -> None:
        """Wraps the model for the group, and rehearses: two synchronised passes, and a measurement.

        What a resumed run sums must be summed as in one that never stopped, to the last bit, also
        by three and more ranks. But DDP lays its buckets out anew after the first backward (sums
        are taken in another order), and gradients that do not lie in the buckets yet are copied
        there times 1 / ranks, where those that do are divided by ranks. After two passes both are
        settled, and their gradients are thrown away. A lack of memory shows here as well, before
        an hour is spent; and both graphs are compiled, so that no signal waits for the compiler.
        """
        device = self.world.device
        self.ddp = DistributedDataParallel(
            self.forward,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        try:
            self._rehearse()
        except RuntimeError as error:
            if not numerics.is_out_of_memory(error):
                raise
            raise UserError(self._too_big()) from None

    def _rehearse(self) -> None:
        device = self.world.device
        # The moments that the first step will make, held meanwhile: a lack of memory shows here.
        stateless = [p for p in self.named.values() if p not in self.optimizer.state]
        moments = [torch.empty_like(p) for p in stateless for _ in range(2)]
        shape = (self.split.micro_batch, self.run.model.block_size)
        inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        targets = torch.zeros_like(inputs)  # not the same tensor twice: compiled as a case apart
        for _ in range(2):
            summed_loss(self.ddp, inputs, targets, self.params.dtype).backward()
        self.optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            summed_loss(self.forward, inputs, targets, self.params.dtype)
        del moments

    def _too_big(self) -> str:
        """What to change where a step finds too little memory."""
        rows, T = self.split.micro_batch, self.run.model.block_size
        smaller = [n for n in divisors(rows) if n < rows]
        mend = (
            f"try {smaller[-1]} (the same result, more micro-steps)"
            if smaller
            else "it cannot be smaller: take a smaller model or model.block_size"
        )
        return (
            f"micro_batch (machine.yaml, GPT2_MICRO_BATCH): {rows} sequences of {T} tokens at a "
            f"time need more memory than {numerics.device_name(self.world.device)} has; {mend}"
        )

    def peak(self) -> float | None:
        """What all devices together could compute, FLOP/s; None where that is not known."""
        own = peak_flops.peak(self.world.device, self.params.dtype)
        total = torch.tensor(own or math.nan, dtype=torch.float64, device=self.world.device)
        together = self.world.sum(total).item()
        return None if math.isnan(together) else together

    def step(self, step: int, batches: Batches, interrupt: Interrupt) -> tuple[float, Tensor]:
        """One optimizer step.

        Args:
            step: Its number, from 0.
            batches: Where the data comes from.
            interrupt: Asked at each micro-step: an unfinished step leaves the weights untouched.

        Returns:
            The learning rate; and, on the device, loss and gradient norm before clipping: (2,).

        Raises:
            Interrupted: On all ranks; the step is dropped.
        """
        learning_rate = self.schedule(step)
        set_learning_rate(self.optimizer, learning_rate)

        # The loss is the mean over the global batch: a sum over its tokens, divided once. DDP
        # divides the summed gradients by the number of ranks, which is undone here.
        _, count = self.run.batches(step)
        scale = self.world.size / (count * self.run.model.block_size)
        micro_steps = self.split.micro_steps(count)
        total = torch.zeros((), device=self.world.device)
        for micro_step in range(micro_steps):
            interrupt.check()
            inputs, targets = next(batches)
            # Only the last backward talks to other ranks; no_sync must hold the forward as well.
            last = micro_step == micro_steps - 1
            with nullcontext() if last else self.ddp.no_sync():
                loss = summed_loss(self.ddp, inputs, targets, self.params.dtype) * scale
                loss.backward()
            total += loss.detach()

        norm = torch.nn.utils.clip_grad_norm_(
            self.named.values(), self.params.grad_clip or float("inf")
        )
        numbers = torch.stack([self.world.sum(total) / self.world.size, norm])
        # Both are reduced: no rank skips alone. Only who may skip waits for the device here.
        if self.params.non_finite == "stop" or torch.isfinite(numbers).all():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # they lie in DDP's buckets, and stay there
        self.measured = None
        return learning_rate, numbers

    def validate(self, interrupt: Interrupt) -> float:
        """The mean loss over the fixed validation tokens, nats; the same on each rank.

        Raises:
            Interrupted: On all ranks; nothing is measured.
        """
        self.measured = mean_loss(
            self.forward,
            self.run.val_data,
            self.params.val_tokens,
            block_size=self.run.model.block_size,
            rows=self.split.micro_batch,
            dtype=self.params.dtype,
            device=self.world.device,
            world=self.world,
            check=interrupt.check,
        )
        return self.measured

    def answer(self, interrupt: Interrupt) -> float | None:
        """The part of HellaSwag's tasks answered right; the same on each rank; None: not asked.

        Raises:
            Interrupted: On all ranks; nothing is measured.
        """
        if self.tasks is None:
            return None
        return hellaswag.completion_accuracy(
            self.gpt, self.tasks, self.world, dtype=self.params.dtype, check=interrupt.check
        )

    def sample(self) -> list[int]:
        """How the model goes on from the first tokens of the validation split; rank 0's alone.

        The same tokens and random numbers each time: what differs is what was learnt. The first
        `SAMPLE_PROMPT` tokens are the prompt.
        """
        if not self.world.first or not self.params.sample_tokens:
            return []
        prompt = self.run.val_data[:SAMPLE_PROMPT].tolist()
        return self.gpt.generate(
            [prompt], self.params.sample_tokens, 0.8, top_k=50, seed=self.params.seed
        )[0]

    def save(self, step: int) -> None:
        """Begins to write the checkpoint after ``step`` complete steps, on rank 0."""
        if self.world.first:
            self.writer.save(
                model=self.gpt.state_dict(),
                optimizer=flat_state(self.optimizer, self.named),
                state={**self.state(step), "val_loss": self.measured},
            )

    def state(self, step: int) -> dict[str, Any]:
        """`state.json` of a checkpoint: all that it is, and nothing of when or by whom it was made.

        Args:
            step: Complete steps.
        """
        run = self.run
        return {
            "step": step,
            "samples": run.samples(step),
            "tokens": run.tokens(step),
            "model": self.gpt.config.to_dict(),
            "train": run.params.model_dump(mode="json"),
            "run_key": run.key,
            "dataset_key": run.dataset_key,
            "code_key": run.code_key,
            "adopted": run.record()["adopted"],
            "arithmetic": self.arithmetic(),
            "versions": numerics.versions(),
        }

    def arithmetic(self) -> dict[str, Any]:
        """What the last bits depend on, and neither the samples nor the parameters say."""
        return {
            "world_size": self.world.size,
            "micro_batch": self.split.micro_batch,
            "device": self.world.device.type,
            "threads": torch.get_num_threads(),
            "loss_chunk": self.gpt.loss_chunk,
            "compile": self.compiled,
            "overlap": self.compiled and self.run.machine.overlap,
        }
