"""Sums in one order, however the terms are divided among processes.

Floating-point addition is not associative, so a sum over processes usually rounds differently for
each number of them. Here the terms, the *leaves* 0 ... n - 1, are added along one binary tree:

    level 2   [       0-3       ]   [       4-7       ]
    level 1   [  0-1  ] [  2-3  ]   [  4-5  ] [  6-7  ]   [  8-9  ]
    level 0    0     1   2     3     4     5   6     7     8     9   10

    node (start, level) = node (start, level - 1) + node (start + 2^(level - 1), level - 1),
    where start is a multiple of 2^level; what is left at the end is folded from the right:
    here (0-3 + 4-7) + (8-9 + 10)

A node is the same bits wherever it is computed. A process that has the leaves [first, stop) adds
them up to the largest nodes within its range, at most two per level, in a binary counter: the tree
needs no more memory than that. Then each process finishes the tree for its slice of the numbers:

    all to all    my nodes, one slice to each process; n / W a power of two: one node each
    add           the nodes of all processes, my slice
    all gather    the sums, one slice from each process

With one node per process this is the traffic of a ring all-reduce. The collectives only move bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from train.distributed.world import World

T = TypeVar("T")

BUCKET = 2**22
"""Numbers of each node that are sent at a time: 16 MiB of float32."""


class Node(NamedTuple, Generic[T]):
    """Sum of the leaves [start, start + 2^level)."""

    start: int
    level: int
    value: T


@dataclass
class Counter(Generic[T]):
    """Adds leaves or nodes of the tree, pushed in order.

    Attributes:
        add: Adds its second argument to its first, in place or not.
        nodes: The largest nodes of what was pushed, in order.
    """

    add: Callable[[T, T], T]
    nodes: list[Node[T]] = field(default_factory=list)

    def push(self, start: int, value: T, level: int = 0) -> None:
        """Add a node, and merge it with its left sibling, if that is there, and so on."""
        while self.nodes and self._are_siblings(self.nodes[-1], start, level):
            left = self.nodes.pop()
            start, value, level = left.start, self.add(left.value, value), level + 1
        self.nodes.append(Node(start, level, value))

    def total(self) -> T:
        """Fold the nodes from the right; the leaves must have begun at 0."""
        *rest, last = self.nodes
        total = last.value
        for node in reversed(rest):
            total = self.add(node.value, total)
        self.nodes = []
        return total

    @staticmethod
    def _are_siblings(left: Node[T], start: int, level: int) -> bool:
        is_left = left.start % (2 << level) == 0
        return left.level == level and is_left and left.start + (1 << level) == start


def nodes_of(leaves: range) -> list[tuple[int, int]]:
    """Start and level of the nodes that a process with these leaves ends up with."""
    counter: Counter[None] = Counter(lambda left, right: None)
    for leaf in leaves:
        counter.push(leaf, None)
    return [(node.start, node.level) for node in counter.nodes]


def most_nodes(leaves: range) -> int:
    """Most nodes in memory at a time while a process adds up these leaves; at least 1."""
    counter: Counter[None] = Counter(lambda left, right: None)
    most = 1
    for leaf in leaves:
        most = max(most, len(counter.nodes) + 1)
        counter.push(leaf, None)
    return most


def sum_over_ranks(nodes: Sequence[Node[Tensor]], shares: Sequence[range], world: World) -> Tensor:
    """Finish the tree over the nodes of all ranks. A collective.

    Args:
        nodes: Of this rank: 1-d tensors of one length, a multiple of the number of ranks, which
            are overwritten.
        shares: The leaves of each rank, in order; none is empty.

    Returns:
        The sum of all leaves: the same bits on each rank, for any shares.
    """
    total = nodes[0].value
    if world.size == 1:
        return Counter(Tensor.add_, list(nodes)).total()
    per_rank = [nodes_of(leaves) for leaves in shares]
    for columns in _buckets(len(total), world.size):
        width = (columns.stop - columns.start) // world.size
        parts = [node.value[columns].view(world.size, width) for node in nodes]
        sent = torch.stack(parts, dim=1) if len(parts) > 1 else parts[0]  # (ranks, nodes, width)
        received = sent.new_empty(sum(map(len, per_rank)), width)
        world.all_to_all(
            received.view(-1),
            sent.view(-1),
            [len(other) * width for other in per_rank],
            [len(nodes) * width] * world.size,
        )
        counter: Counter[Tensor] = Counter(Tensor.add_)
        positions = (position for other in per_rank for position in other)
        for (start, level), row in zip(positions, received, strict=True):
            counter.push(start, row, level)
        sums = total[columns].view(world.size, width)
        sums[world.rank] = counter.total()
        world.all_gather(sums)
    return total


def _buckets(length: int, ranks: int) -> Iterator[slice]:
    """Cut a vector into parts of about `BUCKET` numbers, each a multiple of the ranks."""
    size = BUCKET // ranks * ranks
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
