"""Sampling order over several sources: which tokens is sample i of a run with `train.mixture`.

    sample i     ->  source, n        `Mixture`: by the weights
    source, n    ->  window           the source's own `DataOrder`, keyed by seed, epoch and name
    window       ->  first token      where the source's tokens begin, plus window * block_size

A source whose windows are used up begins its next epoch, with a new permutation. Its permutation
does not depend on the other sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline import TokenStream
from pipeline.runtime.errors import UserError
from train.data.mixture import Mixture
from train.data.order import DataOrder, Int64Array
from train.data.phases import check_names, phases_of
from train.params import TrainParams


class Located(NamedTuple):
    """Samples: index of the source, window of the source, and the source's epoch; (n,) int64."""

    sources: Int64Array
    windows: Int64Array
    epochs: Int64Array


class Share(NamedTuple):
    """What a source has of the samples of a run."""

    share: float
    tokens: int
    epochs: float


class MixedOrder:
    """Maps each sample of a run to the first token of a window, as `DataOrder` does.

    Args:
        mixture: Over the sources.
        tokens: Per source its tokens in the train split, where they come in this order.
        block_size: T, inputs per window.
        params: Seed and kind of the order.

    Attributes:
        names: Of the sources.
        orders: Of the sources; None for one without a window, which then has no weight.
    """

    def __init__(
        self, mixture: Mixture, tokens: Mapping[str, int], block_size: int, params: TrainParams
    ) -> None:
        self.mixture, self.block_size, self.names = mixture, block_size, list(tokens)
        self._begins = np.cumsum([0, *tokens.values()])[:-1]
        self.orders = [
            DataOrder(
                n_tokens=n, block_size=block_size, seed=params.seed, order=params.order, name=name
            )
            if n > block_size
            else None
            for name, n in tokens.items()
        ]

    @property
    def windows(self) -> list[int]:
        """Windows of each source: its samples per epoch."""
        return [order.n_windows if order else 0 for order in self.orders]

    def starts(self, start: int, count: int) -> Int64Array:
        """Return the first tokens of the samples [start, start + count): (count,) int64."""
        found = self.locate(start, count)
        starts: Int64Array = self._begins[found.sources] + found.windows * self.block_size
        return starts

    def shares(self, samples: int) -> dict[str, Share]:
        """Return what each source has of the first samples of the run."""
        counts = self.mixture.counts(samples)
        return {
            name: Share(n / max(1, samples), n * self.block_size, n / max(1, windows))
            for name, n, windows in zip(self.names, counts, self.windows, strict=True)
        }

    def locate(self, start: int, count: int) -> Located:
        """Return where the samples [start, start + count) are."""
        sources, numbers = self.mixture.samples(start, count)
        windows, epochs = np.empty_like(numbers), np.empty_like(numbers)
        for source in np.unique(sources).tolist():
            order, chosen = self.orders[source], sources == source
            assert order is not None, "sampling_order() refuses it"
            own = numbers[chosen]
            first = int(own[0])  # a source's samples come in order
            windows[chosen] = order.samples(first, len(own))
            epochs[chosen] = own // order.n_windows
        return Located(sources, windows, epochs)


def mixture_of(params: TrainParams, names: Sequence[str], block_size: int) -> Mixture:
    """Return the mixture of some parameters, which have one, over sources.

    Raises:
        UserError: The weights are not of these sources.
    """
    check_names(params.mixture, names)
    phases = [(until, [w[name] for name in names]) for until, w in phases_of(params.mixture)]
    samples, _ = params.batches(block_size)(params.steps)
    return Mixture(phases, samples, params.seed)


def sampling_order(
    params: TrainParams, stream: TokenStream, block_size: int
) -> DataOrder | MixedOrder:
    """Return the order of the train split: of one stream, or of the sources in `train.mixture`.

    Raises:
        UserError: The weights are not of these sources, or a source with a weight has no window.
    """
    if params.mixture is None:
        return DataOrder(
            n_tokens=len(stream), block_size=block_size, seed=params.seed, order=params.order
        )
    tokens = dict.fromkeys(stream.manifest.source.sources, 0)
    for shard in stream.shards:
        tokens[shard.source] += shard.tokens
    order = MixedOrder(mixture_of(params, [*tokens], block_size), tokens, block_size, params)
    for name, of_source in zip(order.names, order.orders, strict=True):
        if of_source is None and any(weights[name] for _, weights in phases_of(params.mixture)):
            raise UserError(
                f"params.yaml: train.mixture: source {name} has only {tokens[name]} training "
                f"tokens, fewer than a window of model.block_size + 1 = {block_size + 1}; set its "
                "weight to 0, or take more of it"
            )
    return order
