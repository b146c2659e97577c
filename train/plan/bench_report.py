"""Report of `python -m train.bench`: its measurements, next to the plan, and what to try."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
from dataclasses import dataclass, replace

import torch

from model.size import parameter_count
from pipeline.runtime.machine import Machine
from train.distributed.world import World
from train.plan.accelerators import identify
from train.plan.estimate import Options, Plan, make_plan
from train.plan.fit import choose
from train.preset import Parameters

SHOWN_KERNELS = 12
NAME_WIDTH = 62  # columns of a kernel's name

# Queried from nvidia-smi while the GPU is busy.
CLOCKS = ("clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


@dataclass(frozen=True)
class Kernel:
    """One kernel of the profile: its calls and device seconds per step (CPU without a GPU)."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measurements of rank 0, in seconds, bytes, FLOP/s and fractions; the keys of `--json`."""

    device: str  # name of the device
    world: int  # number of processes
    compiled: bool  # whether the model is compiled
    micro_batch: int  # sequences per micro-batch
    micro_steps: int  # micro-steps per step
    loss_chunk: int | None  # tokens per chunk of the loss; None: the model's default
    made_up: bool  # whether the tokens are random, for lack of shards
    start: float  # time to build the model, compile it and run the warm-up steps
    steps: list[float]  # time of each step
    tokens: int  # tokens per step, over all processes
    data_wait: float  # fraction of the time that the loop waited for data
    mfu: float | None  # MFU of a step; None if the peak is unknown
    peak: float | None  # FLOP/s of all devices together; None if unknown
    memory: int  # peak memory: allocated on a GPU, resident on a CPU
    reserved: int | None  # memory that PyTorch reserved on the GPU; None on a CPU
    total: int | None  # memory of the GPU; None on a CPU
    parts: dict[str, float]  # time of each part of a step, measured alone
    reduced: int  # bytes of the gradients in the all-reduce; 0 for one process
    kernels: list[Kernel]  # kernels of one step, the longest first
    clocks: dict[str, float]  # median of each value of `CLOCKS` that nvidia-smi reports

    @property
    def step(self) -> float:
        """Median step time."""
        return statistics.median(self.steps)

    @property
    def spread(self) -> float:
        """Range between the 10th and 90th percentile of the step time, relative to the median."""
        ordered, tenth = sorted(self.steps), len(self.steps) // 10
        return (ordered[-1 - tenth] - ordered[tenth]) / self.step

    @property
    def bus(self) -> float:
        """Bus bandwidth of the all-reduce, bytes per second, as nccl-tests defines it."""
        return 2 * (self.world - 1) / self.world * self.reduced / self.parts["all-reduce"]

    @property
    def idle(self) -> float:
        """Fraction of a step in which the device of rank 0 is idle."""
        return max(0.0, 1 - sum(kernel.seconds for kernel in self.kernels) / self.step)


class GpuMonitor:
    """Poll nvidia-smi twice per second for rank 0's GPU; do nothing without a GPU."""

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

    def __enter__(self) -> GpuMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> dict[str, float]:
        """Stop polling and return the medians (`median_clocks`)."""
        if self._process is None:
            return {}
        self._process.terminate()
        return median_clocks(self._process.communicate()[0].splitlines())


def median_clocks(lines: list[str]) -> dict[str, float]:
    """Return the median of each of `CLOCKS`; incomplete lines and unknown values are ignored."""
    found = {}
    rows = [fields for line in lines if len(fields := line.split(",")) == len(CLOCKS)]
    for column, name in enumerate(CLOCKS):
        values = []
        for fields in rows:
            with contextlib.suppress(ValueError):  # "[N/A]"
                values.append(float(fields[column]))
        if values:
            found[name] = statistics.median(values)
    return found


def constant_batch(params: Parameters, tokens: int) -> Parameters:
    """Return the parameters with a batch of ``tokens`` tokens from the first step on."""
    update = {"batch_tokens": tokens, "batch_doublings": 0, "batch_ramp_steps": 0}
    return replace(params, train=params.train.model_copy(update=update))


def plan_for(measured: Measurement, params: Parameters, machine: Machine) -> Plan | None:
    """Return the plan for the hardware that was measured; None if `train.plan` does not know it."""
    name = identify(measured.device, measured.total) if measured.total is not None else "cpu"
    if name is None:
        return None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", measured.world))
    nodes = measured.world // local
    options = Options(
        hardware=name,
        nodes=nodes,
        gpus=local,
        # On a CPU, the peak that the ranks measured while all of them were busy.
        peak=measured.peak / nodes if measured.total is None and measured.peak else None,
        micro_batch=measured.micro_batch,
        checkpoint_activations=machine.checkpoint_activations,
        overlap=machine.overlap,
        loss_chunk=measured.loss_chunk,
    )
    return make_plan(constant_batch(params, measured.tokens), options)


@dataclass(frozen=True)
class Fit:
    """The micro-batch and loss chunk that fit this GPU best, and the part of a step they save."""

    micro_batch: int
    loss_chunk: int | None
    gain: float | None  # planned, of the measured settings' step; None if the hardware is unknown

    @property
    def settings(self) -> str:
        """The environment variables that set both."""
        chunk = f" GPT2_LOSS_CHUNK={self.loss_chunk}" if self.loss_chunk else ""
        return f"GPT2_MICRO_BATCH={self.micro_batch}{chunk}"


def best_fit(measured: Measurement, params: Parameters, machine: Machine) -> Fit | None:
    """Return what training takes by itself; None on a CPU, or if another batch was measured."""
    if measured.total is None or measured.tokens != params.train.batch_tokens:
        return None
    unset = machine.model_copy(update={"micro_batch": None, "loss_chunk": None})
    split, chunk = choose(params.model, params.train, unset, measured.world, measured.total)
    wanted = replace(measured, micro_batch=split.micro_batch, loss_chunk=chunk)
    plans = [plan_for(m, params, machine) for m in (measured, wanted)]
    times = [plan.step.total for plan in plans if plan]
    return Fit(split.micro_batch, chunk, 1 - times[1] / times[0] if times else None)


def report(measured: Measurement, params: Parameters, machine: Machine) -> str:
    """Return the report as text: measurements, comparison with the plan, and what to try."""
    m, train = measured, params.train
    config = params.model.config()
    low, high = min(m.steps), max(m.steps)
    batches = train.batches(config.block_size)
    tokens = batches(train.steps)[0] * config.block_size
    hours = tokens / m.tokens * m.step / 3600
    rate = m.tokens / m.step
    rows = [
        ("startup", f"{m.start:.1f} s", "model, compilation, warm-up steps"),
        ("step", _ms(m.step), f"median of {len(m.steps)}; {_ms(low)} to {_ms(high)}"),
        ("tokens/s", f"{rate:,.0f}", f"{rate / m.world:,.0f} per process"),
        ("MFU", "-" if m.mfu is None else f"{m.mfu:.1%}", _peak(m)),
        ("all steps", f"{hours:.2f} h", f"{tokens:,} tokens at this speed, without evaluation"),
        ("data wait", f"{m.data_wait:.2%}", "random tokens" if m.made_up else "data/tokens"),
        ("memory", f"{m.memory / 2**30:.2f} GiB", _memory(m)),
    ]
    fit = best_fit(m, params, machine)
    if fit is not None:
        gain = "" if fit.gain is None else f"; planned to save {fit.gain:.1%} of a step"
        rows.append(("best that fits", str(fit.micro_batch), f"sequences: {fit.settings}{gain}"))
    parts = [
        (name, _ms(seconds), f"{seconds / m.step:.1%}")
        for name, seconds in m.parts.items()
        if seconds
    ]
    if m.reduced:
        bus = f"{m.reduced / 1e6:,.0f} MB, {m.bus / 1e9:.2f} GB/s bus bandwidth"
        parts = [(n, t, f"{x}; {bus}" if n == "all-reduce" else x) for n, t, x in parts]
    rest = m.step - sum(m.parts.values())
    parts.append(("rest", _ms(rest), "negative if parts overlap or wait for each other"))
    kernels = [
        f"  {_ms(k.seconds):>12} {k.seconds / m.step:6.1%} {k.calls:6d} x  {k.name[:NAME_WIDTH]}"
        for k in m.kernels[:SHOWN_KERNELS]
    ]
    plan = plan_for(m, params, machine)
    compiled = "on" if m.compiled else "off"
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return "\n".join(
        [
            f"GPT-2, {parameter_count(config):,} parameters, {m.world} x {m.device}, "
            f"{train.dtype}, compile {compiled}; torch {torch.__version__}{cuda}",
            f"{m.tokens:,} tokens per step: per process, {m.micro_steps} micro-steps of "
            f"{m.micro_batch} x {config.block_size}",
            "",
            *_table(rows),
            "",
            "parts of a step, measured alone",
            *_table(parts),
            "",
            f"kernels of one step on rank 0: the longest of {len(m.kernels)}",
            *kernels,
            "",
            *(_comparison(m, plan) if plan else ["train.plan does not know this hardware"]),
            "",
            *(f"try: {line}" for line in advice(m, plan, machine, fit)),
        ]
    )


def _comparison(m: Measurement, plan: Plan) -> list[str]:
    """Return a table of measured and planned figures."""
    update = sum(m.parts[name] for name in ("clipping", "optimizer", "zeroing"))
    pairs = [
        ("step", m.step, plan.step.total),
        ("forward and backward", m.parts["forward and backward"], plan.step.compute),
        ("all-reduce", m.parts["all-reduce"], plan.step.all_reduce),
        ("optimizer, clipping", update, plan.step.optimizer),
    ]
    rows = [(n, _ms(a), f"planned {_ms(b)}: {a / b:.2f} times") for n, a, b in pairs if a and b]
    memory = plan.memory.total - plan.memory.reserve
    gib = f"planned {memory / 2**30:.2f} GiB: {m.memory / memory:.2f} times"
    rows.append(("memory", f"{m.memory / 2**30:.2f} GiB", gib))
    if m.mfu is not None:
        rows.append(("MFU", f"{m.mfu:.1%}", f"planned {plan.step_mfu:.1%}"))
        products = max(0.0, m.parts["forward and backward"] - plan.step.traffic)
        if products:  # at the default micro-batch and loss chunk
            note = "forward and backward only"
            rows.append(("for train.plan --mfu", f"{m.mfu * m.step / products:.3f}", note))
    title = f"compared with python -m train.plan --hardware {plan.options.hardware}"
    return [title, *_table(rows)]


def advice(
    m: Measurement, plan: Plan | None, machine: Machine, fit: Fit | None = None
) -> list[str]:
    """Return what to try, the most promising first."""
    gpu, found = m.total is not None, []
    if gpu and not m.compiled:
        found.append("compile: true in machine.yaml; it is off")
    if gpu and m.idle > 0.1:
        found.append(
            f"the GPU is idle for {m.idle:.0%} of a step: give each process two cores on the "
            "socket of its GPU (torchrun --numa-binding=node), and check for other programs (top)"
        )
    clock, fastest = (m.clocks.get(name) for name in CLOCKS[:2])
    if clock and fastest and clock < 0.85 * fastest:
        found.append(
            f"the GPU runs at {clock:.0f} of {fastest:.0f} MHz ({_power(m)}): see nvidia-smi -q -d "
            "PERFORMANCE for the reason: power limit, temperature, or locked clocks"
        )
    if fit is not None and fit.gain is not None and fit.gain > 0.01:
        found.append(
            f"{fit.settings} (machine.yaml: micro_batch, loss_chunk; null chooses them): planned "
            f"to save {fit.gain:.1%} of a step"
        )
    if m.data_wait > 0.01:
        found.append(f"a faster disk for data/tokens: {m.data_wait:.1%} of the time is data wait")
    if m.reduced and m.parts["all-reduce"] > 0.1 * m.step:
        overlap = "" if machine.overlap else "; overlap: true in machine.yaml hides part of it"
        found.append(
            f"all-reduce takes {m.parts['all-reduce'] / m.step:.0%} of a step at "
            f"{m.bus / 1e9:.1f} GB/s"
            + (": nvidia-smi topo -m shows NV (not SYS or PHB) for GPUs that share NVLink" * gpu)
            + overlap
        )
    if m.spread > 0.1:
        found.append(f"stop other programs on this machine: step times vary by {m.spread:.0%}")
    if plan is not None and m.step > 1.2 * plan.step.total and not found:
        found.append(
            f"{m.step / plan.step.total:.1f} times the planned step time, for no visible reason: "
            "compare the kernels with docs/gpu.md, and run python -m pytest -m gpu"
        )
    return found or ["nothing: no setting stands out"]


def _power(m: Measurement) -> str:
    """Return the GPU's power and temperature, as far as nvidia-smi reports them."""
    units = {"power.draw": "W drawn", "power.limit": "W limit", "temperature.gpu": "°C"}
    return ", ".join(f"{m.clocks[n]:.0f} {unit}" for n, unit in units.items() if n in m.clocks)


def _peak(m: Measurement) -> str:
    return "unknown peak" if m.peak is None else f"of {m.peak / 1e12:,.1f} TFLOP/s together"


def _memory(m: Measurement) -> str:
    if m.total is None or m.reserved is None:
        return "peak, resident, on rank 0"
    return f"peak; {m.reserved / 2**30:.2f} of {m.total / 2**30:.2f} GiB reserved by PyTorch"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    return [f"  {name:<22} {value:>14}  {note}".rstrip() for name, value, note in rows]
