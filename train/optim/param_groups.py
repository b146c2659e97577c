"""Parameter groups, the optimizer over them, and its state as a flat dictionary.

Weight decay applies to matrices (two or more dimensions), not to vectors (biases, LayerNorm gains),
and to embeddings if `train.embeddings_decay` is set: the recipes of GPT-2 and GPT-3 decay them,
others do not. AdamW decays the weight itself and adds nothing to the gradient (Loshchilov and
Hutter 2019). With `train.optimizer: muon`, Muon updates the group "matrices" (muon.py).

Embeddings and vectors may have learning rates of their own, as ratios to that of the matrices
(modded-nanogpt and nanochat train the embeddings at much higher rates than the blocks).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from train.distributed.world import World
from train.optim.muon import MuonAdamW

Optimizer = torch.optim.AdamW | MuonAdamW
Kind = Literal["adamw", "muon"]

EMBEDDINGS = ("wte.", "wpe.")


@dataclass(frozen=True)
class Group:
    """Parameters that share one weight decay and one learning rate."""

    name: str
    decays: bool
    parameters: tuple[tuple[str, Tensor], ...]
    lr_ratio: float = 1.0

    @property
    def size(self) -> int:
        """Number of scalars in the group."""
        return sum(parameter.numel() for _, parameter in self.parameters)


def decay_groups(
    named: Iterable[tuple[str, Tensor]],
    *,
    embeddings_decay: bool,
    lr_ratios: Mapping[str, float] | None = None,
) -> list[Group]:
    """Put each parameter into one of the groups "matrices", "embeddings" and "vectors".

    Names that start with ``wte.`` or ``wpe.`` are embeddings. Empty groups are left out.

    Args:
        lr_ratios: Learning rate by name of the group, relative to the optimizer's; default 1.
    """
    lr_ratios = lr_ratios or {}
    named = list(named)
    kinds: dict[str, list[tuple[str, Tensor]]] = {"matrices": [], "embeddings": [], "vectors": []}
    for name, parameter in named:
        if name.startswith(EMBEDDINGS):
            kinds["embeddings"].append((name, parameter))
        else:
            kinds["matrices" if parameter.dim() >= 2 else "vectors"].append((name, parameter))
    decays = {"matrices": True, "embeddings": embeddings_decay, "vectors": False}
    groups = [
        Group(kind, decays[kind], tuple(members), lr_ratios.get(kind, 1.0))
        for kind, members in kinds.items()
        if members
    ]
    seen = [id(parameter) for group in groups for _, parameter in group.parameters]
    assert len(seen) == len(set(seen)) == len(named), "a parameter in no group or in two (tied?)"
    return groups


def groups_table(groups: Iterable[Group], weight_decay: float, kind: Kind = "adamw") -> str:
    """Format the groups for the log: name, tensors, parameters, weight decay, optimizer."""
    return "\n".join(
        f"  {group.name:<10} {len(group.parameters):>5} tensors {group.size:>14,} parameters"
        f"   weight decay {weight_decay if group.decays else 0.0:g}"
        f"   {'Muon' if _uses_muon(group, kind) else 'AdamW'}"
        + (f"   learning rate x {group.lr_ratio:g}" if group.lr_ratio != 1.0 else "")
        for group in groups
    )


def _uses_muon(group: Group, kind: Kind) -> bool:
    return kind == "muon" and group.name == "matrices"


def adamw(
    groups: Iterable[Group],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.AdamW:
    """Make an AdamW over the groups, with PyTorch's fused kernel (CUDA and CPU)."""
    return torch.optim.AdamW(
        [
            {
                "params": [parameter for _, parameter in group.parameters],
                "weight_decay": weight_decay if group.decays else 0.0,
                "lr_ratio": group.lr_ratio,
            }
            for group in groups
        ],
        lr=learning_rate,
        betas=betas,
        eps=eps,
        fused=True,
    )


def make_optimizer(
    groups: Sequence[Group],
    kind: Kind,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    world: World | None = None,
) -> Optimizer:
    """Make an AdamW over all groups, or Muon over the matrices and AdamW over the others.

    The ranks of `world` share the work of Muon.
    """
    hidden = [pair for group in groups if _uses_muon(group, kind) for pair in group.parameters]
    rest = adamw(
        [group for group in groups if not _uses_muon(group, kind)],
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
    )
    if not hidden:
        return rest
    return MuonAdamW(
        hidden, rest, learning_rate=learning_rate, weight_decay=weight_decay, world=world
    )


def set_rates(optimizer: Optimizer, learning_rate: float, decay: float = 1.0) -> None:
    """Set the learning rate of every group, and the fraction of its weight decay that applies."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
        full = group.setdefault("full_weight_decay", group["weight_decay"])
        group["weight_decay"] = full * decay


@torch.no_grad()
def step_with_cautious_decay(optimizer: Optimizer) -> None:
    """Update all parameters, and decay only where the update and the weight have the same sign.

    There decay and update pull the same way; elsewhere decay would undo what the loss asks for
    (Chen et al. 2025, "Cautious weight decay", algorithm 1). The update is what the optimizer has
    changed without decay, so any optimizer will do; it costs a copy of the weights that decay.
    """
    decaying = [group for group in optimizer.param_groups if group["weight_decay"]]
    before = [[p.clone() for p in group["params"]] for group in decaying]
    decays = [group["weight_decay"] for group in decaying]
    for group in decaying:
        group["weight_decay"] = 0.0
    optimizer.step()
    for group, old, decay in zip(decaying, before, decays, strict=True):
        group["weight_decay"] = decay
        for parameter, weight in zip(group["params"], old, strict=True):
            agrees = (weight - parameter) * weight >= 0
            parameter.sub_(weight.mul_(agrees), alpha=group["lr"] * decay)


def flat_state(optimizer: Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the optimizer's state by name: ``<parameter>.exp_avg`` and so on.

    Returns:
        The tensors themselves, on their device; empty before the first step.
    """
    if isinstance(optimizer, MuonAdamW) and not optimizer.adamw.state:
        return {}  # the momenta of Muon exist from the start, as zeros
    return {
        f"{name}.{key}": value.detach()
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_flat_state(
    optimizer: Optimizer, named: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Load a state made by ``flat_state`` into an optimizer over the same parameters.

    Raises:
        KeyError: The state of a parameter is missing.
        ValueError: A tensor has another shape than its parameter, or belongs to none.
    """
    unused = set(state)
    momenta = optimizer.momenta if isinstance(optimizer, MuonAdamW) else {}
    adamw = optimizer.adamw if isinstance(optimizer, MuonAdamW) else optimizer
    for name, parameter in named.items():
        keys = ("momentum_buffer",) if parameter in momenta else ("step", "exp_avg", "exp_avg_sq")
        loaded = {}
        for key in keys:
            value = state[f"{name}.{key}"]
            if key != "step" and value.shape != parameter.shape:
                raise ValueError(
                    f"{name}.{key} has shape {tuple(value.shape)}, "
                    f"the parameter {tuple(parameter.shape)}"
                )
            # The fused kernels need the step counter on the parameter's device, as float32.
            loaded[key] = value.to(parameter.device, torch.float32, copy=True)
            unused.discard(f"{name}.{key}")
        if parameter in momenta:
            momenta[parameter].copy_(loaded["momentum_buffer"])
        else:
            adamw.state[parameter] = loaded
    if unused:
        raise ValueError(f"optimizer state of no parameter of this model: {sorted(unused)[:3]}")
