"""Muon: momentum, made orthogonal, for the matrices inside the transformer; AdamW for the rest.

A step of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a
matrix by the nearest orthogonal one, about: all its directions are walked equally far. That is
meant for maps between hidden states; embeddings and vectors are left to AdamW. The step is scaled
by 0.2 sqrt(max(rows, columns)), which gives it the size of a step of AdamW, so that both take the
same learning rate and decay (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).

`c_attn` holds three maps, of queries, keys and values, in one parameter; each is made orthogonal by
itself. Each rank computes all of it: no rank waits for another, and the ranks stay equal as long
as they are of one kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

MOMENTUM = 0.95
QKV = ".attn.c_attn.weight"  # (3 C, C): queries, keys, values


class MuonAdamW:
    """Both optimizers behind the face of one.

    Attributes:
        adamw: Over the parameters that are not Muon's.
        muon: Over Muon's, `c_attn` in thirds that share its memory.
        momenta: Muon's state: parameter -> momentum, of its shape.

    Args:
        hidden: Names and matrices (out, in) for Muon.
        adamw: Over all other parameters.
        learning_rate: Of Muon.
        weight_decay: Of Muon, decoupled.
    """

    def __init__(
        self,
        hidden: Iterable[tuple[str, Tensor]],
        adamw: torch.optim.AdamW,
        *,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        self.adamw = adamw
        self.momenta: dict[Tensor, Tensor] = {}
        self._parts: list[tuple[Tensor, list[Parameter]]] = []
        momenta: list[Tensor] = []
        for name, matrix in hidden:
            pieces = 3 if name.endswith(QKV) else 1
            self.momenta[matrix] = torch.zeros_like(matrix)
            momenta += self.momenta[matrix].chunk(pieces)
            self._parts.append((matrix, [Parameter(p) for p in matrix.detach().chunk(pieces)]))
        parts = [part for _, both in self._parts for part in both]
        self.muon = torch.optim.Muon(
            parts,
            lr=learning_rate,
            weight_decay=weight_decay,
            momentum=MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        for part, momentum in zip(parts, momenta, strict=True):
            self.muon.state[part]["momentum_buffer"] = momentum

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return [*self.adamw.param_groups, *self.muon.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """State of each parameter; of Muon's, the momentum as a whole."""
        return {
            **self.adamw.state,
            **{matrix: {"momentum_buffer": m} for matrix, m in self.momenta.items()},
        }

    def step(self) -> None:
        """One step of both, from the gradients of the parameters."""
        for matrix, parts in self._parts:
            assert matrix.grad is not None
            for part, grad in zip(parts, matrix.grad.chunk(len(parts)), strict=True):
                part.grad = grad  # the same memory
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients, or forgets them."""
        self.adamw.zero_grad(set_to_none)
        for matrix, parts in self._parts:
            if set_to_none:
                matrix.grad = None
            elif matrix.grad is not None:
                matrix.grad.zero_()
            for part in parts:
                part.grad = None
