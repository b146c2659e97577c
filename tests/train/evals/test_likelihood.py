"""Tests for `train.evals.likelihood`: scores do not depend on batches or ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import GPT, GPTConfig
from pipeline.format.tokenizer import decode, encode
from train.evals.likelihood import Request, batches, score_requests

BLOCK = 16
REQUESTS = [
    Request((5,), (6,)),
    Request((5, 7, 9), (6, 8)),
    Request((1, 2, 3, 4), (5, 6, 7)),  # of the same length as a later one
    Request(tuple(range(40)), (50, 51)),  # the context is truncated
    Request((3,), tuple(range(100, 130))),  # and so is this continuation
    Request((5, 5, 5, 5), (6, 6, 6)),
    Request((5, 7, 9), (6,)),
]


@pytest.fixture(scope="module")
def gpt() -> GPT:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=BLOCK, vocab_size=256)
    gpt = GPT(config, seed=3)
    with torch.no_grad():
        gpt.wte.weight.mul_(20)  # makes likelihoods differ
    return gpt


def score_alone(gpt: GPT, request: Request) -> tuple[float, int, list[int]]:
    """Score one request token by token: log-likelihood, tokens, and most likely tokens."""
    tokens = [*request.context, *request.continuation]
    n = min(len(request.continuation), BLOCK)
    inputs = torch.tensor([tokens[-(BLOCK + 1) :][:-1]])
    with torch.no_grad():
        log_p = gpt(inputs)[0].double().log_softmax(-1)[-n:]
    total = sum(float(p[token]) for p, token in zip(log_p, tokens[-n:], strict=True))
    return total, n, log_p.argmax(-1).tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 16, None])
def test_a_score_equals_that_of_the_request_alone(gpt: GPT, batch_size: int | None) -> None:
    scores = score_requests(gpt, REQUESTS, batch_size=batch_size)
    for request, score in zip(REQUESTS, scores, strict=True):
        total, n, _ = score_alone(gpt, request)
        assert score.tokens == n
        assert score.log_likelihood == pytest.approx(total, abs=1e-4)


def test_a_continuation_longer_than_the_context_is_reported(
    gpt: GPT, capsys: pytest.CaptureFixture[str]
) -> None:
    score_requests(gpt, REQUESTS)
    assert capsys.readouterr().err.startswith(f"warning: 1 of {len(REQUESTS)} ")
    score_requests(gpt, [r for r in REQUESTS if len(r.continuation) <= BLOCK])
    assert capsys.readouterr().err == ""


def test_greedy_means_every_token_is_the_most_likely(gpt: GPT) -> None:
    first = score_alone(gpt, Request((5, 7), (0,)))[2][0]
    second = score_alone(gpt, Request((5, 7, first), (0,)))[2][0]
    right, wrong = Request((5, 7), (first, second)), Request((5, 7), (first, second + 1))
    assert [score.greedy for score in score_requests(gpt, [right, wrong])] == [True, False]


@given(
    lengths=st.lists(st.integers(1, 9), max_size=60),
    batch_size=st.one_of(st.none(), st.integers(1, 7)),
    world=st.integers(1, 4),
)
def test_batches_hold_each_request_once_and_only_equal_lengths(
    lengths: list[int], batch_size: int | None, world: int
) -> None:
    plan = list(batches(lengths, batch_size))
    shared = [i for rank in range(world) for batch in plan[rank::world] for i in batch]
    assert sorted(shared) == list(range(len(lengths)))
    for batch in plan:
        assert len({lengths[i] for i in batch}) == 1
        assert batch_size is None or len(batch) <= batch_size


def test_ranks_share_the_batches_and_return_all_scores(gpt: GPT) -> None:
    class Half:
        """A world of two ranks; `sum` adds the table of the other rank, if given."""

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

    score_requests(gpt, REQUESTS, second, 2, check=partial(check, 1))  # type: ignore[arg-type]
    first = Half(0, second.mine)
    scores = score_requests(gpt, REQUESTS, first, 2, check=partial(check, 0))  # type: ignore[arg-type]
    assert scores == score_requests(gpt, REQUESTS, batch_size=2)
    assert checked[0] == checked[1] > 0  # it may be a collective, even with an odd batch count
    assert second.mine is not None
    assert 0 < (second.mine[:, 1] > 0).sum() < len(REQUESTS)


def test_text_is_split_as_in_the_harness() -> None:
    request = Request.from_text("The sky is ", "blue")
    assert decode(request.context) == "The sky is"
    assert decode(request.continuation) == " blue"
    # "understand" is one token: the continuation starts after as many tokens as the context has
    request = Request.from_text("under", "stand it")
    assert request.context == tuple(encode("under"))
    assert request.continuation == tuple(encode("understand it"))[len(request.context) :]


def test_no_requests_give_no_scores(gpt: GPT) -> None:
    assert score_requests(gpt, []) == []
