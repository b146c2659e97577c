"""Generation: the cache, the window, the options, and what may never be sampled."""

import time

import pytest
import torch

from model import GPT, GPTConfig
from model.attention import KVCache
from model.errors import ConfigError
from model.generation import choose, stream

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=300)


@pytest.fixture(scope="module")
def gpt():
    gpt = GPT(CONFIG, seed=4)
    with torch.no_grad():
        for p in gpt.parameters():
            p[:300].mul_(4)  # so that likely and unlikely tokens differ
        gpt.wte.weight[300:] = 50.0  # padded rows: any use of them would show
    return gpt


def uncached(gpt, prompt, n):
    """Greedy tokens the slow way: the whole window again for every token."""
    row, window = list(prompt), list(prompt)
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


def test_greedy_equals_uncached_also_past_the_block_size(gpt):
    prompt = [5, 17, 250, 3]
    assert gpt.generate([prompt], 100, temperature=0) == [uncached(gpt, prompt, 100)]


def test_prompt_longer_than_the_block_size(gpt):
    prompt = torch.randint(300, (45,)).tolist()
    assert gpt.generate([prompt], 40, temperature=0) == [uncached(gpt, prompt, 40)]


def test_rows_of_different_length_do_not_touch_each_other(gpt):
    prompts = [torch.randint(300, (n,)).tolist() for n in (3, 20, 1, 31)]
    together = gpt.generate(prompts, 70, temperature=0)
    assert together == [uncached(gpt, prompt, 70) for prompt in prompts]
    # sampled, a row depends on its place in the batch and the seed, not on its neighbours
    sampled = gpt.generate(prompts, 40, seed=3)
    assert gpt.generate([prompts[0], [1, 2]], 40, seed=3)[0] == sampled[0]


def test_block_size_of_one():
    gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=1, vocab_size=50))
    assert len(gpt.generate([[1, 2, 3]], 5, temperature=0)[0]) == 8


def test_shapes_and_types(gpt):
    tokens = torch.randint(300, (2, 5))
    out = gpt.generate(tokens, max_new_tokens=6, temperature=0.9, top_k=20, top_p=0.9, seed=0)
    assert out.shape == (2, 11)
    assert out.dtype == torch.int64
    assert torch.equal(out[:, :5], tokens)
    assert torch.equal(gpt.generate(tokens, 0), tokens)
    assert gpt.generate([[1], [2, 3]], 0) == [[1], [2, 3]]


def test_seed_repeats_and_differs(gpt):
    tokens = torch.randint(300, (2, 5))
    torch.manual_seed(0)
    first = gpt.generate(tokens, 30, seed=7)
    torch.manual_seed(1)  # the global generator has no say
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


def test_stop_ends_a_row_and_the_others_go_on(gpt):
    prompt = [5, 17, 250, 3]
    free = gpt.generate([prompt, [9, 9]], 20, seed=2, stop=None)
    # the token that row 0 makes first at its fourth step or later ends it there
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


def test_a_row_stops_at_endoftext_unless_told_otherwise():
    gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    with torch.no_grad():  # a model that ends every document at once
        gpt.ln_f.bias.fill_(1.0)
        gpt.wte.weight[50256] = 100.0
    assert gpt.generate([[1], [2, 3]], 5, temperature=0) == [[1, 50256], [2, 3, 50256]]
    assert gpt.generate([[1]], 3, temperature=0, stop=None) == [[1, 50256, 50256, 50256]]


def test_choose_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(**options):
        options = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
        drawn = [choose(logits, generator=generator, **options) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 4000

    def close(got, expected):
        return (got - torch.tensor(expected)).abs().max() < 0.035

    assert close(shares(), [0.5, 0.3, 0.15, 0.05])
    assert close(shares(top_k=2), [0.625, 0.375, 0, 0])
    assert close(shares(top_k=9), [0.5, 0.3, 0.15, 0.05])
    assert close(shares(top_p=0.7), [0.625, 0.375, 0, 0])  # the second crosses 0.7
    assert close(shares(top_p=0.1), [1, 0, 0, 0])
    assert close(shares(top_k=3, top_p=0.5), [1, 0, 0, 0])
    assert close(shares(temperature=0.5), [0.685, 0.247, 0.0616, 0.007])
    assert shares(temperature=1e-30)[0] == 1
    assert shares(temperature=0)[0] == 1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_wrong_options_are_refused(gpt, options, word):
    with pytest.raises(ConfigError, match=word):
        gpt.generate([[1]], **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[300]], [[-1]]])
def test_wrong_prompts_are_refused(gpt, prompts):
    with pytest.raises(ConfigError):
        gpt.generate(prompts, 3)


def test_generating_leaves_no_gradients_and_keeps_the_grad_mode(gpt):
    steps = stream(gpt, [[1, 2]], 3)
    next(steps)
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in gpt.parameters())


def test_autocast_generation(gpt):
    with torch.autocast("cpu", torch.bfloat16):
        assert gpt.generate(torch.randint(300, (2, 5)), 40, seed=0).shape == (2, 45)


@pytest.mark.slow
def test_cache_speeds_up_the_124m_model():
    """At least 5 times over 512 new tokens; the uncached way computes only the last logits."""
    gpt = GPT.initialised(GPTConfig.named("gpt2"))
    start = time.process_time()  # one thread: what other processes do has no say
    gpt.generate(torch.randint(50257, (1, 8)), 512, temperature=0, stop=None)
    cached = time.process_time() - start
    # a sample of window lengths stands for all 512
    lengths = range(40, 520, 64)
    start = time.process_time()
    with torch.no_grad():
        for n in lengths:
            gpt.head(gpt.hidden(torch.randint(50257, (1, n)))[:, -1])
    uncached = (time.process_time() - start) / len(lengths) * 512
    print(f"cached {cached:.1f} s, uncached {uncached:.1f} s")
    assert uncached > 5 * cached
