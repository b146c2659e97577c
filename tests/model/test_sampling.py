"""Tests for `model.generation`: KV cache, context window, sampling options."""

import math
import time

import pytest
import torch

from model import GPT, GPTConfig
from model.attention import KVCache
from model.config import COLDEST, HOTTEST
from model.errors import ConfigError, FormatError
from model.generation import sample, stream

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=300)


@pytest.fixture(scope="module")
def gpt():
    gpt = GPT(CONFIG, seed=4)
    with torch.no_grad():
        for p in gpt.parameters():
            p[:300].mul_(4)  # makes probabilities differ
        gpt.wte.weight[300:] = 50.0  # any use of padded rows would show
    return gpt


def uncached(gpt, prompt, n):
    """Generate greedily without a cache: the full window again for every token."""
    row, window = list(prompt), list(prompt[-gpt.config.block_size :])
    for _ in range(n):
        if len(window) > gpt.config.block_size:
            window = window[-(gpt.config.block_size // 2) :]
        with torch.no_grad():
            new = int(gpt(torch.tensor([window]))[0, -1].argmax())
        row.append(new)
        window.append(new)
    return row


def test_cached_logits_equal_uncached(gpt):
    tokens = torch.randint(300, (3, 32))
    cache = KVCache(CONFIG, 3, torch.device("cpu"))
    pieces, done = [], 0
    for n in (7, 1, 1, 12, 1, 10):  # a prompt, single tokens, several at once
        pieces.append(gpt.head(gpt.hidden(tokens[:, done : done + n], cache=cache)))
        cache.lengths = [length + n for length in cache.lengths]
        done += n
    torch.testing.assert_close(torch.cat(pieces, 1), gpt(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [4, 32, 45])
def test_greedy_tokens_equal_uncached_beyond_the_block_size(gpt, length):
    prompt = torch.randint(300, (length,)).tolist()
    assert gpt.generate([prompt], 100, temperature=0) == [uncached(gpt, prompt, 100)]


def test_rows_do_not_depend_on_each_other(gpt):
    prompts = [torch.randint(300, (n,)).tolist() for n in (3, 20, 1, 31)]
    together = gpt.generate(prompts, 70, temperature=0)
    assert together == [uncached(gpt, prompt, 70) for prompt in prompts]
    # a sampled row depends on the seed and its index in the batch, not on other rows
    sampled = gpt.generate(prompts, 40, seed=3)
    assert gpt.generate([prompts[0], [1, 2]], 40, seed=3)[0] == sampled[0]


def test_block_size_one():
    gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=1, vocab_size=50))
    assert len(gpt.generate([[1, 2, 3]], 5, temperature=0)[0]) == 8


def test_the_seed_decides_the_sample(gpt):
    tokens = torch.randint(300, (2, 5))
    torch.manual_seed(0)
    first = gpt.generate(tokens, 30, seed=7)
    assert (first.shape, first.dtype) == ((2, 35), torch.int64)
    assert torch.equal(first[:, :5], tokens)
    torch.manual_seed(1)  # the global generator is not used
    assert torch.equal(gpt.generate(tokens, 30, seed=7), first)
    assert not torch.equal(gpt.generate(tokens, 30, seed=8), first)
    same = tokens[:1].expand(2, 5)
    rows = gpt.generate(same, 30, seed=7)
    assert not torch.equal(rows[0], rows[1])


def test_padded_tokens_are_never_sampled(gpt):
    tokens = torch.randint(300, (4, 5))
    assert gpt(tokens).shape == (4, 5, 300)
    for temperature in (0.0, 1.0, 100.0):
        assert gpt.generate(tokens, 60, temperature=temperature, seed=1).max() < 300


def test_stop_ends_its_row_only(gpt):
    prompt = [5, 17, 250, 3]
    free = gpt.generate([prompt, [9, 9]], 20, seed=2, stop=None)
    # stop at a token that row 0 first samples at its fourth step or later
    stop = next(t for i, t in enumerate(free[0][4:]) if i >= 3 and t not in free[0][4 : 4 + i])
    end = free[0].index(stop, 4) + 1
    rows = gpt.generate([prompt, [9, 9]], 20, seed=2, stop=stop)
    assert rows[0] == free[0][:end]
    other = free[1].index(stop, 2) + 1 if stop in free[1][2:] else None
    assert rows[1] == free[1][:other]
    steps = list(stream(gpt, [prompt], 20, seed=2, stop=stop))
    assert [token for (token,) in steps] == free[0][4:end]
    filled = gpt.generate(torch.tensor([prompt, prompt[::-1]]), 20, seed=2, stop=stop)
    assert filled[0, end:].eq(stop).all()


def test_a_row_stops_at_endoftext_by_default():
    gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    with torch.no_grad():  # a model that always predicts the end
        gpt.ln_f.bias.fill_(1.0)
        gpt.wte.weight[50256] = 100.0
    assert gpt.generate([[1], [2, 3]], 5, temperature=0) == [[1, 50256], [2, 3, 50256]]
    assert gpt.generate([[1]], 3, temperature=0, stop=None) == [[1, 50256, 50256, 50256]]


def test_sample_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        options = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
        drawn = [sample(logits, generator=generator, **options) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 4000

    def close(got, expected):
        return (got - torch.tensor(expected)).abs().max() < 0.035

    assert close(frequencies(), [0.5, 0.3, 0.15, 0.05])
    assert close(frequencies(top_k=2), [0.625, 0.375, 0, 0])
    assert close(frequencies(top_k=9), [0.5, 0.3, 0.15, 0.05])
    assert close(frequencies(top_p=0.7), [0.625, 0.375, 0, 0])  # the second token reaches 0.7
    assert close(frequencies(top_p=0.1), [1, 0, 0, 0])
    assert close(frequencies(top_k=3, top_p=0.5), [1, 0, 0, 0])
    assert close(frequencies(temperature=0.5), [0.685, 0.247, 0.0616, 0.007])
    assert frequencies(top_p=1e-320)[0] == 1
    assert frequencies(temperature=COLDEST)[0] == 1
    assert close(frequencies(temperature=HOTTEST), [0.25] * 4)
    assert frequencies(temperature=0)[0] == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        *(({"temperature": t}, "temperature") for t in (math.nan, math.inf, 1e-320, 1e308)),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_invalid_options_are_named(gpt, options, named):
    with pytest.raises(ConfigError, match=named):
        gpt.generate([[1]], **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[300]], [[-1]]])
def test_invalid_prompts_are_refused(gpt, prompts):
    with pytest.raises(ConfigError):
        gpt.generate(prompts, 3)


def test_logits_that_overflow_are_refused():
    gpt = GPT(CONFIG)
    with torch.no_grad():
        gpt.wte.weight.fill_(3e38)
    for temperature in (0.0, 1.0):
        with pytest.raises(FormatError, match="weights"):
            gpt.generate([[1]], 3, temperature=temperature)


def test_generation_keeps_the_grad_mode_and_runs_under_autocast(gpt):
    with torch.autocast("cpu", torch.bfloat16):
        assert len(list(stream(gpt, [[1, 2]], 40))) == 40
    next(stream(gpt, [[1, 2]], 3))
    assert torch.is_grad_enabled()


@pytest.mark.soak
def test_the_cache_speeds_up_the_124m_model_five_times():
    """512 new tokens; without the cache, still only the last logits are computed."""
    gpt = GPT.initialised(GPTConfig.named("gpt2"))
    start = time.process_time()  # one thread, CPU time: independent of other processes
    gpt.generate(torch.randint(50257, (1, 8)), 512, temperature=0, stop=None)
    cached = time.process_time() - start
    # estimated from 8 of the 512 window lengths
    lengths = range(40, 520, 64)
    start = time.process_time()
    with torch.no_grad():
        for n in lengths:
            gpt.head(gpt.hidden(torch.randint(50257, (1, n)))[:, -1])
    uncached = (time.process_time() - start) / len(lengths) * 512
    print(f"cached {cached:.1f} s, uncached {uncached:.1f} s")
    assert uncached > 5 * cached
