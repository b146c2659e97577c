"""The model, its optimizer, and one training step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model import GPT
from pipeline import TokenStream
from pipeline.runtime.errors import UserError
from train import attention_kernels, numerics
from train.checkpoint import directory, init_from
from train.checkpoint.chain import Chain, shards_hash
from train.checkpoint.directory import Keep
from train.checkpoint.writer import Writer
from train.data.loader import Batches
from train.distributed.interrupt import Interrupt
from train.distributed.world import World
from train.evals import hellaswag
from train.monitor import history, peak_flops
from train.numerics import clip_gradients, summed_loss
from train.optim.param_groups import (
    decay_groups,
    flat_state,
    load_flat_state,
    make_optimizer,
    set_rates,
    step_with_cautious_decay,
)
from train.plan import fit
from train.run import Run
from train.validation import WINDOWS, mean_loss


class Trainer:
    """The model, its optimizer, and what a step does to them; the same on each rank.

    Attributes:
        gpt: The plain module, for weights, saving and sampling.
        forward: The same module, compiled where the machine says so, for measuring.
        ddp: ``forward`` wrapped in DDP, which averages gradients over the ranks, for training.
        writer: Saves checkpoints in the background, on rank 0.
        attention: Name of the attention kernel in use; None on a CPU.
        gpu_memory: Bytes of the smallest GPU of the run, as reported; None on a CPU.
        measured: Validation loss of the current weights, nats; None where not measured.

    Args:
        run: The run to train.
        world: The processes that train it.
        tasks: HellaSwag tasks for `train.hellaswag_every`; None: not scored.
    """

    def __init__(self, run: Run, world: World, tasks: list[hellaswag.Task] | None = None) -> None:
        self.run, self.world, self.params = run, world, run.params
        self.tasks = tasks
        own = numerics.gpu_memory(world.device)
        self.gpu_memory = min(world.gather(own)) if own else None
        self.split, loss_chunk = fit.choose(
            run.model, run.params, run.machine, world.size, self.gpu_memory
        )
        self.schedule = run.params.lr_schedule()
        numerics.configure(world.device, deterministic=run.params.deterministic)

        self.gpt = GPT.initialised(run.model.config(), seed=run.params.seed, device=world.device)
        self.gpt.checkpoint_activations = run.machine.checkpoint_activations
        self.gpt.loss_chunk = loss_chunk
        self.gpt.document_masking = run.params.document_masking
        self.named = dict(self.gpt.named_parameters())
        self.groups = decay_groups(
            self.named.items(),
            embeddings_decay=run.params.embeddings_decay,
            lr_ratios=run.params.lr_ratios(),
        )
        self.optimizer = make_optimizer(
            self.groups,
            run.params.optimizer,
            learning_rate=run.params.learning_rate,
            weight_decay=run.params.weight_decay,
            betas=(run.params.beta1, run.params.beta2),
            eps=run.params.eps,
            world=world,
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=run.dtype == "float16")
        keep = Keep(last=run.params.keep_checkpoints, every=run.params.keep_every)
        self.writer = Writer(run.folder, keep)
        self.measured: float | None = None
        self.forward: Any = self.gpt
        self.compiled = run.compiles(world.device.type)
        if self.compiled:
            # One graph is fastest. Cut at DDP's bucket boundaries, the graph sends each bucket
            # during the backward, which pays where the links between nodes are slow.
            torch._dynamo.config.optimize_ddp = run.machine.overlap
            if world.device.type == "cpu":
                numerics.repeat_compiled_gradients()
            self.forward = torch.compile(self.gpt, fullgraph=True)
        self.attention = attention_kernels.choose(
            run.machine.attention,
            self.gpt.config,
            run.dtype,
            world.device,
            deterministic=run.params.deterministic,
            masked=run.params.document_masking,
            compiled=self.compiled,
        )
        self.chain = Chain()

    def restore(self) -> int:
        """Load the newest valid checkpoint; without one, the weights that the run starts from.

        Returns:
            Number of complete steps.

        Raises:
            UserError: The checkpoint belongs to other data or another model.
        """
        found = None
        if self.world.first:
            found = directory.latest(self.run.folder, self.run.samples)
        folder, state = self.world.broadcast(found) or (None, None)
        if folder is None or state is None:
            self.chain.begin(done := self._start(), self.conditions())
            return done
        directory.check_data(folder, state["dataset_key"], self.run.dataset_key)
        self._report_changes(state)
        weights, moments = directory.load_tensors(folder)
        self.gpt.load_state_dict(weights)
        if moments:  # none where all steps so far were skipped
            load_flat_state(self.optimizer, self.named, moments)
        if "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        measured = state["train"]["val_tokens"], state.get("val_windows")
        if measured == (self.params.val_tokens, WINDOWS):
            self.measured = state.get("val_loss")
        self.chain = Chain.of(state).begin(state["step"], self.conditions())
        return int(state["step"])

    def _report_changes(self, state: dict[str, Any]) -> None:
        """Print what differs from the start that saved a checkpoint."""
        changed = self.run.changed_observations(state)
        if changed and self.world.first:
            print(f"note: params.yaml has changed since the last start: {changed}")
        self.compare_arithmetic(state)

    def compare_arithmetic(self, state: dict[str, Any]) -> None:
        """Warn of what makes the next steps round differently than those before."""
        before, now = state["arithmetic"], self.arithmetic()
        differs = [name for name, value in now.items() if before.get(name) != value]
        if differs and self.world.first:
            changes = ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in differs)
            print(f"warning: resumes with {changes}: same samples, other rounding")

    def _start(self) -> int:
        start = self.params.start()
        if start is None:
            return 0
        weights, moments, step, samples = init_from.load(start, self.gpt.config)
        init_from.check_step(start, step, samples, self.run.samples(step), self.params.steps)
        self.gpt.load_state_dict(weights)
        try:
            if moments:
                load_flat_state(self.optimizer, self.named, moments)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"params.yaml: train.init_with: all: {start.folder} has the state of another "
                f"optimizer ({error}); set init_with: weights"
            ) from None
        return step

    def warm_up(self) -> None:
        """Wrap the model in DDP, then run two synchronised passes and a measurement.

        A resumed run must add its gradients exactly as one that never stopped, also on three and
        more ranks. But DDP rebuilds its buckets after the first backward (sums are then taken in
        another order), and gradients that are not yet views of the buckets are copied there
        times 1 / ranks, where the others are divided by ranks. After two passes both are settled;
        their gradients are thrown away. A lack of memory shows here as well, before an hour is
        spent, and both graphs are compiled, so that no signal has to wait for the compiler.

        Raises:
            UserError: A step needs more memory than the device has.
        """
        # Hold as much memory as the moments that the first step will allocate.
        stateless = [p for p in self.named.values() if p not in self.optimizer.state]
        moments = [torch.empty_like(p) for p in stateless for _ in range(2)]
        shape = (self.split.micro_batch, self.run.model.block_size)
        device = numerics.device_name(self.world.device)
        try:
            inputs = torch.zeros(shape, dtype=torch.int64, device=self.world.device)
            targets = torch.zeros_like(inputs)  # one tensor in both places: another graph
            self.dry_passes(inputs, targets)
            with torch.no_grad():
                summed_loss(self.forward, inputs, targets, self.run.dtype)
        except RuntimeError as error:
            if not numerics.is_out_of_memory(error):
                raise
            fixed = self.params.invariant is not None
            raise UserError(fit.out_of_memory(*shape, device, invariant=fixed)) from None
        del moments

    def dry_passes(self, inputs: Tensor, targets: Tensor) -> None:
        """Wrap the model in DDP, and run what settles its buckets."""
        device = self.world.device
        self.ddp = DistributedDataParallel(
            self.forward,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        for _ in range(2):
            summed_loss(self.ddp, inputs, targets, self.run.dtype).backward()
        self.optimizer.zero_grad(set_to_none=False)

    def peak(self) -> float | None:
        """Peak of all devices together, FLOP/s; None where it is not known."""
        own = peak_flops.peak(self.world.device, self.run.dtype)
        total = torch.tensor(own or math.nan, dtype=torch.float64, device=self.world.device)
        together = self.world.sum(total).item()
        return None if math.isnan(together) else together

    def step(self, step: int, batches: Batches, interrupt: Interrupt) -> tuple[float, Tensor]:
        """Train one optimizer step.

        Args:
            step: Number of the step, from 0; the batches must belong to it.
            batches: The micro-batches of this rank.
            interrupt: Checked before each micro-step; a step that it ends leaves the weights as
                they were.

        Returns:
            The learning rate; and loss and gradient norm before clipping, (2,) on the device.

        Raises:
            Interrupted: On all ranks; the step is dropped.
        """
        learning_rate = self.schedule(step)
        set_rates(self.optimizer, learning_rate, self.params.decay_fraction(step))

        # Accumulate. The loss is the mean over the global batch: a sum over its tokens, divided
        # once. DDP divides the summed gradients by the number of ranks, which is undone here.
        _, count = self.run.batches(step)
        scale = self.world.size / (count * self.run.model.block_size)
        micro_steps = self.split.micro_steps(count)
        total = torch.zeros((), device=self.world.device)
        for micro_step in range(micro_steps):
            interrupt.check()
            batch = next(batches)
            assert batch.step == step, f"the loader is at step {batch.step}, the loop at {step}"
            # Only the last backward synchronises; no_sync must cover the forward as well.
            last = micro_step == micro_steps - 1
            with nullcontext() if last else self.ddp.no_sync():
                loss = summed_loss(self.ddp, batch.inputs, batch.targets, self.run.dtype) * scale
                self.scaler.scale(loss).backward()
            total += loss.detach()

        self.scaler.unscale_(cast(Any, self.optimizer))  # reads only the gradients of its groups
        numbers = self.optimize(self.world.sum(total) / self.world.size)
        self.optimizer.zero_grad(set_to_none=False)  # gradients stay views of DDP's buckets
        return learning_rate, numbers

    def optimize(self, loss: Tensor) -> Tensor:
        """Clip the gradients and update the weights.

        Loss and norm are the same on all ranks, which skip a step or none. Reading them waits for
        the device, so it is done only where a step may be skipped.

        Returns:
            Loss and gradient norm before clipping, (2,).
        """
        norm = clip_gradients(self.named.values(), self.params.grad_clip)
        numbers = torch.stack([loss, norm])
        may_skip = self.params.non_finite == "skip" or self.scaler.is_enabled()
        if not may_skip or torch.isfinite(numbers).all():
            if self.params.cautious_decay:
                step_with_cautious_decay(self.optimizer)
            else:
                self.optimizer.step()
        self.scaler.update()  # halves the scale after an overflow
        self.measured = None
        return numbers

    def validate(self, interrupt: Interrupt) -> float:
        """Mean loss over the fixed validation tokens, nats; the same on each rank.

        Raises:
            Interrupted: On all ranks; nothing is measured.
        """
        self.measured = self.loss_on(self.run.val_data, self.params.val_tokens, interrupt)
        return self.measured

    def loss_on(self, stream: TokenStream, n_targets: int, interrupt: Interrupt) -> float:
        """Mean loss over tokens spread over a stream, as `validate`."""
        return mean_loss(
            self.forward,
            stream,
            n_targets,
            block_size=self.run.model.block_size,
            rows=self.split.micro_batch,
            dtype=self.run.dtype,
            device=self.world.device,
            world=self.world,
            check=interrupt.check,
            one_order=self.params.invariant is not None,
        )

    def score_hellaswag(self, interrupt: Interrupt) -> float | None:
        """Fraction of HellaSwag tasks answered correctly; the same on each rank; None: no tasks.

        Raises:
            Interrupted: On all ranks; nothing is measured.
        """
        if self.tasks is None:
            return None
        return hellaswag.completion_accuracy(
            self.gpt, self.tasks, self.world, dtype=self.run.dtype, check=interrupt.check
        )

    def sample(self) -> list[int]:
        """Continue the first tokens of the validation split, on rank 0; empty elsewhere.

        Prompt and random numbers are the same each time: what differs is what the model has learnt.
        """
        if not self.world.first or not self.params.sample_tokens:
            return []
        prompt = self.run.val_data[: history.SAMPLE_PROMPT].tolist()
        return self.gpt.generate(
            [prompt], self.params.sample_tokens, 0.8, top_k=50, seed=self.params.seed
        )[0]

    def replicas(self) -> dict[str, Tensor]:
        """Tensors of which every rank has the same: the weights, and the momenta of Muon."""
        state = flat_state(self.optimizer, self.named)
        momenta = {n: t for n, t in state.items() if n.endswith(".momentum_buffer")}
        return {**self.named, **momenta}

    def save(self, step: int) -> None:
        """Start to write the checkpoint after ``step`` complete steps, on rank 0."""
        if self.world.first:
            self.writer.wait()  # completes the link before
            due = step % self.params.checkpoint_every == 0 or step == self.params.steps
            records = self.run.history.records
            self.chain.extend(step, self.run.samples(step), records, stopped=not due)
            self.writer.save(
                model=self.gpt.state_dict(),
                optimizer=flat_state(self.optimizer, self.named),
                state={**self.state(step), "val_loss": self.measured, "val_windows": WINDOWS},
            )

    def state(self, step: int) -> dict[str, Any]:
        """`state.json` of a checkpoint: what it is, and nothing of when or by whom it was made.

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
            "skipped": [r["step"] for r in run.history.records if "skipped" in r],
            "arithmetic": self.arithmetic(),
            "chain": self.chain.as_json(),
            "versions": numerics.versions(),
            **({"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}),
        }

    def conditions(self) -> dict[str, Any]:
        """All that decides the bits of the next steps, for the chain."""
        return {
            "identity": self.run.identity,
            "shards": shards_hash(self.run.train_data.manifest.shards),
            "arithmetic": self.arithmetic(),
            "environment": numerics.environment(self.world.device, compiled=self.compiled),
        }

    def arithmetic(self) -> dict[str, Any]:
        """What the last bits depend on in addition to parameters and samples."""
        return {
            "world_size": self.world.size,
            "micro_batch": self.split.micro_batch,
            "device": self.world.device.type,
            "threads": torch.get_num_threads(),
            "loss_chunk": self.gpt.loss_chunk,
            "attention": self.attention,
            "compile": self.compiled,
            "overlap": self.compiled and self.run.machine.overlap,
        }
