"""What `train.bench` has measured: as a page, beside the plan, and what to try."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import subprocess
from dataclasses import dataclass, replace

import torch

from model.size import parameter_count
from pipeline.runtime.machine import Machine
from train.data.split import divisors
from train.distributed.world import World
from train.monitor.peak_flops import gpu_peak
from train.plan.accelerators import NAMES, accelerator
from train.plan.estimate import Options, Plan, make_plan
from train.preset import Parameters

KERNELS = 12  # lines of the table
NAME = 62  # columns of a kernel's name

# What nvidia-smi tells of a GPU that is at work.
CLOCKS = ("clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


@dataclass(frozen=True)
class Kernel:
    """One line of the profile: seconds of the device in a step; of the CPU where there is none."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured, seen from rank 0: seconds, bytes, FLOP/s, parts of one.

    Attributes:
        device: Its name.
        world: Processes.
        compiled: Whether the model is.
        micro_batch: Sequences at a time.
        micro_steps: Of a step.
        made_up: Whether the tokens are no text's.
        start: Model, compiling and rehearsal.
        steps: Of each step.
        tokens: Of a step, over all processes.
        data_wait: Part of the time that the loop waited for data.
        mfu: None where the peak is not known.
        peak: Of all devices together.
        memory: Most that was held: of a GPU allocated, else resident.
        reserved: By PyTorch, of a GPU.
        total: That the GPU has.
        parts: Of a step, each by itself.
        reduced: Bytes of the gradients that are summed; 0 for one process.
        kernels: Of a step, the longest first.
        clocks: Medians of `CLOCKS` while it was at work; those that nvidia-smi knows.
    """

    device: str
    world: int
    compiled: bool
    micro_batch: int
    micro_steps: int
    made_up: bool
    start: float
    steps: list[float]
    tokens: int
    data_wait: float
    mfu: float | None
    peak: float | None
    memory: int
    reserved: int | None
    total: int | None
    parts: dict[str, float]
    reduced: int
    kernels: list[Kernel]
    clocks: dict[str, float]

    @property
    def step(self) -> float:
        """The median."""
        return statistics.median(self.steps)

    @property
    def spread(self) -> float:
        """From the fastest tenth to the slowest, as a part of the median."""
        ordered, tenth = sorted(self.steps), len(self.steps) // 10
        return (ordered[-1 - tenth] - ordered[tenth]) / self.step

    @property
    def bus(self) -> float:
        """Bus bandwidth of the all-reduce, bytes a second, as nccl-tests defines it."""
        return 2 * (self.world - 1) / self.world * self.reduced / self.parts["all-reduce"]

    @property
    def idle(self) -> float:
        """Part of a step in which the device of rank 0 does nothing."""
        return max(0.0, 1 - sum(kernel.seconds for kernel in self.kernels) / self.step)


class Watch:
    """Has nvidia-smi tell twice a second how rank 0's GPU fares; nothing where there is none."""

    def __init__(self, world: World) -> None:
        self._process: subprocess.Popen[str] | None = None
        if not (world.first and world.device.type == "cuda"):
            return
        uuid = f"GPU-{torch.cuda.get_device_properties(world.device).uuid}"
        query = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(CLOCKS)}", "--loop-ms=500"]
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [*query, "--format=csv,noheader,nounits"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def state(self) -> dict[str, float]:
        """The medians until now."""
        if self._process is None:
            return {}
        self._process.terminate()
        lines = self._process.communicate()[0].splitlines()
        return medians(lines)


def medians(lines: list[str]) -> dict[str, float]:
    """Of what nvidia-smi printed, a line each time; what it does not know is left out."""
    found = {}
    whole = [fields for line in lines if len(fields := line.split(",")) == len(CLOCKS)]
    for place, name in enumerate(CLOCKS):
        values = []
        for fields in whole:
            with contextlib.suppress(ValueError):  # "[N/A]"
                values.append(float(fields[place]))
        if values:
            found[name] = statistics.median(values)
    return found


def whole_batch(params: Parameters, tokens: int) -> Parameters:
    """The same, but for the batch: of so many tokens from the start."""
    update = {"batch_tokens": tokens, "batch_doublings": 0, "batch_ramp_steps": 0}
    return replace(params, train=params.train.model_copy(update=update))


def plan_of(measured: Measured, params: Parameters, machine: Machine) -> Plan | None:
    """What `train.plan` expects of this hardware; None where it does not know it."""
    for name in NAMES:
        known = accelerator(name)
        if measured.total is None:
            fits = known.cuda is None
        else:  # two cards of one name differ in their memory
            fits = known.cuda is not None and known.cuda in measured.device
            fits = fits and 0.9 < known.memory / measured.total < 1.1
            # ... or in their form, and so their speed: an H100 PCIe is no H100 SXM
            dtype = params.train.dtype
            fits = fits and gpu_peak(measured.device, dtype) == known.peak(dtype)
        if fits:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", measured.world))
            nodes = measured.world // local
            options = Options(
                hardware=name,
                nodes=nodes,
                gpus=local,
                # A CPU's is what its ranks measured while all of them worked.
                peak=measured.peak / nodes if measured.total is None and measured.peak else None,
                micro_batch=measured.micro_batch,
                checkpoint_activations=machine.checkpoint_activations,
                overlap=machine.overlap,
                loss_chunk=machine.loss_chunk,
            )
            return make_plan(whole_batch(params, measured.tokens), options)
    return None


def report(measured: Measured, params: Parameters, machine: Machine) -> str:
    """The page: what was measured, what was planned, and what to try."""
    m, train = measured, params.train
    config = params.model.config()
    batch = f"{m.tokens:,} tokens a step, {m.micro_steps} times {m.micro_batch} x "
    low, high = min(m.steps), max(m.steps)
    batches = train.batches(config.block_size)
    tokens = batches(train.steps)[0] * config.block_size
    hours = tokens / m.tokens * m.step / 3600
    rows = [
        ("start", f"{m.start:.1f} s", "model, compiling, rehearsal"),
        ("step", _ms(m.step), f"median of {len(m.steps)}; {_ms(low)} to {_ms(high)}"),
        ("tokens/s", f"{m.tokens / m.step:,.0f}", f"{m.tokens / m.step / m.world:,.0f} a process"),
        ("MFU", "-" if m.mfu is None else f"{m.mfu:.1%}", _peak(m)),
        ("the whole run", f"{hours:.2f} h", f"{tokens:,} tokens at this speed, nothing else"),
        ("data wait", f"{m.data_wait:.2%}", "made-up tokens" if m.made_up else "shards"),
        ("memory", f"{m.memory / 2**30:.2f} GiB", _memory(m)),
    ]
    parts = [
        (name, _ms(seconds), f"{seconds / m.step:.1%}")
        for name, seconds in m.parts.items()
        if seconds
    ]
    if m.reduced:
        bus = f"{m.reduced / 1e6:,.0f} MB, {m.bus / 1e9:.2f} GB/s bus bandwidth"
        parts = [(n, t, f"{x}; {bus}" if n == "all-reduce" else x) for n, t, x in parts]
    rest = m.step - sum(m.parts.values())
    parts.append(("all else", _ms(rest), "below 0: parts overlap, or wait for each other"))
    kernels = [
        f"  {_ms(k.seconds):>12} {k.seconds / m.step:6.1%} {k.calls:6d} x  {k.name[:NAME]}"
        for k in m.kernels[:KERNELS]
    ]
    plan = plan_of(m, params, machine)
    return "\n".join(
        [
            f"GPT-2, {parameter_count(config):,} parameters, {m.world} x {m.device}, "
            f"{train.dtype}, compile {'on' if m.compiled else 'off'}; {software()}",
            f"{batch}{config.block_size} a process",
            "",
            *_table(rows),
            "",
            "parts of a step, each by itself",
            *_table(parts),
            "",
            f"kernels of one step of rank 0, of {len(m.kernels)}",
            *kernels,
            "",
            *(_beside(m, plan) if plan else ["train.plan does not know this hardware"]),
            "",
            *(f"try: {line}" for line in advice(m, plan, machine, batches.smallest)),
        ]
    )


def software() -> str:
    """Versions that speed depends on."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__}"
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}"


def _beside(m: Measured, plan: Plan) -> list[str]:
    """The plan's figures with those measured."""
    other = ("clipping", "optimizer", "zeroing")
    pairs = [
        ("step", m.step, plan.step.total),
        ("forward and backward", m.parts["forward and backward"], plan.step.compute),
        ("all-reduce", m.parts["all-reduce"], plan.step.all_reduce),
        ("optimizer, clipping", sum(m.parts[name] for name in other), plan.step.optimizer),
    ]
    rows = [(n, _ms(a), f"planned {_ms(b)}: {a / b:.2f} times") for n, a, b in pairs if a and b]
    memory = plan.memory.total - plan.memory.reserve
    gib = f"planned {memory / 2**30:.2f} GiB: {m.memory / memory:.2f} times"
    rows.append(("memory", f"{m.memory / 2**30:.2f} GiB", gib))
    if m.mfu is not None:
        rows.append(("MFU", f"{m.mfu:.1%}", f"planned {plan.step_mfu:.1%}"))
        alone = m.mfu * m.step / m.parts["forward and backward"]
        rows.append(("for train.plan --mfu", f"{alone:.3f}", "of forward and backward alone"))
    return [f"beside python -m train.plan --hardware {plan.options.hardware}", *_table(rows)]


def advice(m: Measured, plan: Plan | None, machine: Machine, smallest: int) -> list[str]:
    """What to try, what promises most first.

    Args:
        m: What was measured.
        plan: Of the same; None where there is none.
        machine: Its settings.
        smallest: Sequences of the training's smallest batch, which a micro-batch has to divide.
    """
    gpu, found = m.total is not None, []
    if gpu and not m.compiled:
        found.append("compile: true in machine.yaml; it is off")
    if gpu and m.idle > 0.1:
        found.append(
            f"the GPU has nothing to do for {m.idle:.0%} of a step: give each process two cores of "
            "its GPU's socket (torchrun --numa-binding=node), and see what else runs here (top)"
        )
    clock, fastest = (m.clocks.get(name) for name in CLOCKS[:2])
    if clock and fastest and clock < 0.85 * fastest:
        found.append(
            f"the GPU runs at {clock:.0f} of {fastest:.0f} MHz ({_state(m)}): see nvidia-smi -q -d "
            "PERFORMANCE for the reason: power limit, heat, or clocks that were locked"
        )
    share = math.gcd(m.micro_steps * m.micro_batch, smallest // m.world)
    larger = [n for n in divisors(share) if n > m.micro_batch]
    if m.total is not None and m.memory < 0.6 * m.total and larger:
        used = f"{m.memory / 2**30:.0f} of {m.total / 2**30:.0f} GiB are used"
        found.append(f"GPT2_MICRO_BATCH={larger[0]} (machine.yaml: micro_batch): {used}")
    if m.total is not None and m.memory < 0.6 * m.total and machine.loss_chunk is None:
        found.append("GPT2_LOSS_CHUNK=8192 (machine.yaml: loss_chunk), where there is memory left")
    if m.data_wait > 0.01:
        found.append(f"a faster disk for data/tokens: {m.data_wait:.1%} of the time is waiting")
    if m.reduced and m.parts["all-reduce"] > 0.1 * m.step:
        hide = "" if machine.overlap else "; overlap: true in machine.yaml hides a part of it"
        found.append(
            f"all-reduce takes {m.parts['all-reduce'] / m.step:.0%} of a step at "
            f"{m.bus / 1e9:.1f} GB/s"
            + (": nvidia-smi topo -m shows NV, not SYS or PHB, where GPUs share NVLink" * gpu)
            + hide
        )
    if m.spread > 0.1:
        found.append(f"something else runs here: steps differ by {m.spread:.0%}")
    if plan is not None and m.step > 1.2 * plan.step.total and not found:
        found.append(
            f"{m.step / plan.step.total:.1f} times the plan, and nothing stands out: compare the "
            "kernels with docs/gpu.md; python -m pytest -m gpu tells what this machine gets wrong"
        )
    return found or ["nothing: no setting stands out"]


def _state(m: Measured) -> str:
    """Power and heat of the GPU, as far as they are known."""
    units = {"power.draw": "W drawn", "power.limit": "W allowed", "temperature.gpu": "°C"}
    return ", ".join(f"{m.clocks[n]:.0f} {unit}" for n, unit in units.items() if n in m.clocks)


def _peak(m: Measured) -> str:
    return "peak not known" if m.peak is None else f"of {m.peak / 1e12:,.1f} TFLOP/s together"


def _memory(m: Measured) -> str:
    if m.total is None or m.reserved is None:
        return "resident, of rank 0"
    return f"at most; {m.reserved / 2**30:.2f} of {m.total / 2**30:.2f} GiB reserved by PyTorch"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    return [f"  {name:<22} {value:>14}  {note}".rstrip() for name, value, note in rows]
