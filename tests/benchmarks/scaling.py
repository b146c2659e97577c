"""The tables of docs/scaling.md, computed by `train.plan`: `python -m tests.benchmarks.scaling`.

The preset `fineweb-10b` with other models, batch sizes and numbers of A100-80 GPUs. Memory is that
of micro-batches of one sequence, time that of the micro-batch that training chooses.
"""

from __future__ import annotations

from dataclasses import replace

from train.params import ModelParams
from train.plan.estimate import Options, Plan, make_plan
from train.preset import Parameters, load

MODELS = {
    "gpt2": ModelParams(size="gpt2"),
    "gpt2-medium": ModelParams(size="gpt2-medium"),
    "gpt2-large": ModelParams(size="gpt2-large"),
    "gpt2-xl": ModelParams(size="gpt2-xl"),
    "13B": ModelParams(n_layer=40, n_head=40, n_embd=5120),
}
CLUSTERS = [(1, 2**19), (8, 2**19), (8, 2**22), (64, 2**19), (64, 2**22)]
ETHERNET = 100.0  # Gbit/s per node; the default of the plan is eight cards of 200


def plan(
    model: str, nodes: int, batch: int, network: float | None = None, micro_batch: int | None = None
) -> Plan:
    """Return the plan of a model on ``nodes`` nodes of eight GPUs."""
    params: Parameters = load("fineweb-10b")
    train = params.train.model_copy(update={"batch_tokens": batch})
    params = replace(params, model=MODELS[model], train=train)
    return make_plan(params, Options(nodes=nodes, network=network, micro_batch=micro_batch))


def memory() -> None:
    """Print the memory per GPU that does not depend on the batch, with DDP and FSDP2."""
    print("| | parameters | DDP | FSDP2 over 8 | over 512 | checkpoint | activations/sequence |")
    print("|---|---|---|---|---|---|---|")
    for name in MODELS:
        found = plan(name, 1, 2**19, micro_batch=1)
        m = found.memory
        state = m.weights + m.gradients + m.optimizer + m.copies
        print(
            f"| {name} | {found.parameters / 1e6:,.0f}M | {state / 1e9:.1f} GB | "
            f"{state / 8e9:.1f} | {state / 512e9:.2f} | {found.checkpoint_bytes / 1e9:.1f} | "
            f"{m.activations / 1e9:.1f} |"
        )


def steps() -> None:
    """Print the time of a step in arithmetic and in all-reduce, without overlap."""
    print("| GPUs | tokens per step | sequences per GPU | model | compute | all-reduce | busy |")
    print("|---|---|---|---|---|---|---|")
    for nodes, batch in CLUSTERS:
        for name in ("gpt2", "gpt2-xl"):
            for network in (None, ETHERNET) if nodes > 1 else (None,):
                step = plan(name, nodes, batch, network).step
                link = "100 Gbit/s" if network else "InfiniBand" if nodes > 1 else "NVLink"
                print(
                    f"| {8 * nodes} | {batch / 2**20:g}M | {batch // 1024 // nodes // 8} | {name} "
                    f"| {1e3 * step.compute:,.0f} ms | {1e3 * step.all_reduce:,.0f} ms by {link} "
                    f"| {step.compute / step.total:.0%} |"
                )


def hours() -> None:
    """Print the hours for 10^12 tokens."""
    for name, nodes, batch in (("gpt2", 1, 2**19), ("gpt2-xl", 1, 2**19), ("gpt2-xl", 64, 2**22)):
        found = plan(name, nodes, batch)
        rate = batch / found.step.total
        print(f"{name} on {8 * nodes}: {rate:,.0f} tokens/s, 10^12 in {1e12 / rate / 3600:,.0f} h")


def main() -> None:
    """Print the tables."""
    memory()
    print()
    steps()
    print()
    hours()


if __name__ == "__main__":
    main()
