"""The optimizer, with its parameter groups decided by one rule, and shown.

Matrices (two dimensions and more) decay, vectors (biases, LayerNorm gains) do not, and embeddings
do or do not by parameter: GPT-2's and GPT-3's recipes decay them, others leave them out. AdamW is
Loshchilov and Hutter 2019: decay is taken from the weight, not added to the gradient. With Muon
(muon.py) the group "matrices" is Muon's, and AdamW has the rest.
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
        """Numbers in the group."""
        return sum(parameter.numel() for _, parameter in self.parameters)


def decay_groups(named: Iterable[tuple[str, Tensor]], *, embeddings_decay: bool) -> list[Group]:
    """Sorts parameters into "matrices", "embeddings" and "vectors", each into exactly one.

    Args:
        named: Names and parameters; names that begin with ``wte.`` or ``wpe.`` are embeddings.
        embeddings_decay: Whether the embeddings decay.

    Returns:
        The groups that are not empty, parameters in the order given.
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


def table(groups: Iterable[Group], weight_decay: float, kind: Kind = "adamw") -> str:
    """The groups as lines for the log: name, tensors, numbers, decay, rule."""
    return "\n".join(
        f"  {group.name:<10} {len(group.parameters):>5} tensors {group.size:>14,} parameters"
        f"   weight decay {weight_decay if group.decays else 0.0:g}"
        f"   {'Muon' if _is_muons(group, kind) else 'AdamW'}"
        for group in groups
    )


def _is_muons(group: Group, kind: Kind) -> bool:
    return kind == "muon" and group.name == "matrices"


def adamw(
    groups: Iterable[Group],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.AdamW:
    """AdamW over the groups, in one fused kernel (PyTorch has it on CUDA and on the CPU)."""
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
    """AdamW over all groups, or Muon over the matrices and AdamW over the rest."""
    hidden = [group for group in groups if _is_muons(group, kind)]
    rest = adamw(
        [group for group in groups if not _is_muons(group, kind)],
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
    )
    if not hidden:
        return rest
    matrices = [pair for group in hidden for pair in group.parameters]
    return MuonAdamW(matrices, rest, learning_rate=learning_rate, weight_decay=weight_decay)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Gives every group the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def flat_state(optimizer: Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state under names that speak: ``<parameter>.exp_avg`` and so on.

    Returns:
        The tensors themselves, where they are; none before the first step.
    """
    if isinstance(optimizer, MuonAdamW) and not optimizer.adamw.state:
        return {}  # its momenta are there from the beginning, as zeros
    return {
        f"{name}.{key}": value.detach()
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_flat_state(
    optimizer: Optimizer, named: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Puts a state made by ``flat_state`` into an optimizer over the same parameters.

    Raises:
        KeyError: A parameter lacks its state.
        ValueError: A state is of another shape, or belongs to no parameter.
    """
    left = set(state)
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
            # The fused kernels want the step counter beside the parameter, as float32.
            loaded[key] = value.to(parameter.device, torch.float32, copy=True)
            left.discard(f"{name}.{key}")
        if parameter in momenta:
            momenta[parameter].copy_(loaded["momentum_buffer"])
        else:
            adamw.state[parameter] = loaded
    if left:
        raise ValueError(f"optimizer state of no parameter of this model: {sorted(left)[:3]}")
