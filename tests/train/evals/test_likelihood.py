"""Of train.likelihood: each continuation's score is its own, whoever computes it beside what."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import GPT, GPTConfig
from pipeline.format.tokenizer import decode, encode
from train.evals.likelihood import Row, Score, batches, scores

BLOCK = 16
ROWS = [
    Row((5,), (6,)),
    Row((5, 7, 9), (6, 8)),
    Row((1, 2, 3, 4), (5, 6, 7)),  # as long as the one before the last
    Row(tuple(range(40)), (50, 51)),  # the context loses its beginning
    Row((3,), tuple(range(100, 130))),  # the continuation, too
    Row((5, 5, 5, 5), (6, 6, 6)),
    Row((5, 7, 9), (6,)),
]


@pytest.fixture(scope="module")
def gpt() -> GPT:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=BLOCK, vocab_size=256)
    gpt = GPT(config, seed=3)
    with torch.no_grad():
        gpt.wte.weight.mul_(20)  # so that tokens differ in likelihood
    return gpt


def by_hand(gpt: GPT, row: Row) -> tuple[float, int, list[int]]:
    """Row by row, token by token: the sum, how many, and the likeliest tokens."""
    tokens = [*row.context, *row.continuation]
    n = min(len(row.continuation), BLOCK)
    seen = torch.tensor([tokens[-(BLOCK + 1) :][:-1]])
    with torch.no_grad():
        log_p = gpt(seen)[0].double().log_softmax(-1)[-n:]
    total = sum(float(p[token]) for p, token in zip(log_p, tokens[-n:], strict=True))
    return total, n, log_p.argmax(-1).tolist()


@pytest.mark.parametrize("size", [1, 2, 16, None])
def test_a_score_is_that_of_the_row_alone(gpt: GPT, size: int | None) -> None:
    found = scores(gpt, ROWS, size=size)
    for row, score in zip(ROWS, found, strict=True):
        total, n, _ = by_hand(gpt, row)
        assert score.tokens == n
        assert score.log_likelihood == pytest.approx(total, abs=1e-4)


def test_greedy_is_each_token_the_likeliest(gpt: GPT) -> None:
    first = by_hand(gpt, Row((5, 7), (0,)))[2][0]
    second = by_hand(gpt, Row((5, 7, first), (0,)))[2][0]
    right, wrong = Row((5, 7), (first, second)), Row((5, 7), (first, second + 1))
    assert [score.greedy for score in scores(gpt, [right, wrong])] == [True, False]


@given(
    lengths=st.lists(st.integers(1, 9), max_size=60),
    size=st.one_of(st.none(), st.integers(1, 7)),
    world=st.integers(1, 4),
)
def test_batches_hold_each_row_once_and_rows_of_one_length(
    lengths: list[int], size: int | None, world: int
) -> None:
    plan = list(batches(lengths, size))
    shared = [row for rank in range(world) for batch in plan[rank::world] for row in batch]
    assert sorted(shared) == list(range(len(lengths)))
    for batch in plan:
        assert len({lengths[row] for row in batch}) == 1
        assert size is None or len(batch) <= size


def test_a_rank_computes_its_batches_and_has_all_scores(gpt: GPT) -> None:
    class Half:
        """A world of two, of which the other rank adds what it would have computed."""

        size = 2

        def __init__(self, rank: int, other: torch.Tensor | None) -> None:
            self.rank, self.other = rank, other
            self.mine: torch.Tensor | None = None

        def sum(self, table: torch.Tensor) -> torch.Tensor:
            self.mine = table.clone()
            return table if self.other is None else table.add_(self.other)

    second, checked = Half(1, None), {0: 0, 1: 0}

    def check(rank: int) -> None:
        checked[rank] += 1

    scores(gpt, ROWS, second, 2, check=partial(check, 1))  # type: ignore[arg-type]
    first = Half(0, second.mine)
    found = scores(gpt, ROWS, first, 2, check=partial(check, 0))  # type: ignore[arg-type]
    assert found == scores(gpt, ROWS, size=2)
    assert checked[0] == checked[1] > 0  # it may be a collective, also where batches are odd
    assert second.mine is not None
    assert 0 < (second.mine[:, 1] > 0).sum() < len(ROWS)


def test_text_is_cut_where_the_harness_cuts_it() -> None:
    row = Row.of("The sky is ", "blue")
    assert decode(row.context) == "The sky is"
    assert decode(row.continuation) == " blue"
    # The border runs through a token of both together: the context's tokens stay its own.
    row = Row.of("under", "stand it")
    assert row.context == tuple(encode("under"))
    assert row.continuation == tuple(encode("understand it"))[len(row.context) :]


def test_nothing_to_score_is_no_error(gpt: GPT) -> None:
    assert scores(gpt, []) == []
    assert isinstance(scores(gpt, ROWS[:1])[0], Score)
