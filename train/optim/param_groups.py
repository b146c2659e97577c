"""Parameter groups, the optimizer over them, and its state as a flat dictionary.

Weight decay applies to matrices (two or more dimensions), not to vectors (biases, LayerNorm gains),
and to embeddings if `train.embeddings_decay` is set: the recipes of GPT-2 and GPT-3 decay them,
others do not. AdamW decays the weight itself and adds nothing to the gradient (Loshchilov and
Hutter 2019). With `train.optimizer: muon`, Muon updates the group "matrices" (muon.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from train.optim.muon import MuonAdamW

Optimizer = torch.optim.AdamW | MuonAdamW
Kind = Literal["adamw", "muon"]

EMBEDDINGS = ("wte.", "wpe.")


@dataclass(frozen=True)
class Group:
    """Parameters that share one weight decay."""

    name: str
    decays: bool
    parameters: tuple[tuple[str, Tensor], ...]

    @property
    def size(self) -> int:
        """Number of scalars in the group."""
        return sum(parameter.numel() for _, parameter in self.parameters)


def decay_groups(named: Iterable[tuple[str, Tensor]], *, embeddings_decay: bool) -> list[Group]:
    """Put each parameter into one of the groups "matrices", "embeddings" and "vectors".

    Names that start with ``wte.`` or ``wpe.`` are embeddings. Empty groups are left out.
    """
    named = list(named)
    kinds: dict[str, list[tuple[str, Tensor]]] = {"matrices": [], "embeddings": [], "vectors": []}
    for name, parameter in named:
        if name.startswith(EMBEDDINGS):
            kinds["embeddings"].append((name, parameter))
        else:
            kinds["matrices" if parameter.dim() >= 2 else "vectors"].append((name, parameter))
    decays = {"matrices": True, "embeddings": embeddings_decay, "vectors": False}
    groups = [
        Group(kind, decays[kind], tuple(members)) for kind, members in kinds.items() if members
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
) -> Optimizer:
    """Make an AdamW over all groups, or Muon over the matrices and AdamW over the others."""
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
    return MuonAdamW(hidden, rest, learning_rate=learning_rate, weight_decay=weight_decay)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


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
