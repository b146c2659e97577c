"""Muon for the matrices of the transformer blocks, AdamW for all other parameters.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) updates a matrix with its momentum,
approximately orthogonalized, so that the step is equally long in all directions. It is made for
maps between hidden states; AdamW updates embeddings and vectors. The step is scaled by
0.2 sqrt(max(rows, columns)) to match the RMS of an AdamW step, so both use the same learning rate
and weight decay (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).

`c_attn` holds the maps of queries, keys and values in one parameter; each is orthogonalized
separately. Every rank computes the whole update: ranks exchange nothing, and their weights stay
equal as long as their hardware is the same.
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
    """Muon and AdamW behind the interface of one optimizer.

    Attributes:
        adamw: AdamW, for the parameters that Muon does not update.
        muon: Muon, over views: `c_attn` in thirds, all other matrices as they are.
        momenta: State of Muon: parameter -> momentum, of the same shape.

    Args:
        hidden: Names and matrices (out, in) for Muon.
        adamw: AdamW over all other parameters.
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
        self._views: list[tuple[Tensor, list[Parameter]]] = []
        momenta: list[Tensor] = []
        for name, matrix in hidden:
            n = 3 if name.endswith(QKV) else 1
            self.momenta[matrix] = torch.zeros_like(matrix)
            momenta += self.momenta[matrix].chunk(n)
            self._views.append((matrix, [Parameter(v) for v in matrix.detach().chunk(n)]))
        views = [view for _, matrix_views in self._views for view in matrix_views]
        self.muon = torch.optim.Muon(
            views,
            lr=learning_rate,
            weight_decay=weight_decay,
            momentum=MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        for view, momentum in zip(views, momenta, strict=True):
            self.muon.state[view]["momentum_buffer"] = momentum

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of both optimizers."""
        return [*self.adamw.param_groups, *self.muon.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """State of each parameter; a matrix of Muon has one momentum of its shape."""
        return {
            **self.adamw.state,
            **{matrix: {"momentum_buffer": m} for matrix, m in self.momenta.items()},
        }

    def step(self) -> None:
        """Update all parameters from their gradients."""
        for matrix, views in self._views:
            assert matrix.grad is not None
            for view, grad in zip(views, matrix.grad.chunk(len(views)), strict=True):
                view.grad = grad  # the same memory
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, or to zeros in place."""
        self.adamw.zero_grad(set_to_none)
        for matrix, views in self._views:
            if set_to_none:
                matrix.grad = None
            elif matrix.grad is not None:
                matrix.grad.zero_()
            for view in views:
                view.grad = None
