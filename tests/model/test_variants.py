"""Tests for `model.variants`: rotary positions, QK-norm, ReLU squared, zero initialisation.

`test_layers.py` compares their explicit and fused implementations.
"""

import dataclasses
import json

import pytest
import torch

from model import GPT, GPTConfig, checkpoint, export, import_hf
from model.attention import KVCache
from model.variants import RMSNorm, rotate, rotation_of

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=300)
ROTARY = dataclasses.replace(CONFIG, positions="rotary", qk_norm=True, activation="relu_squared")


@pytest.fixture(scope="module")
def gpt():
    gpt = GPT(ROTARY, seed=4)
    with torch.no_grad():
        for p in gpt.parameters():
            p[:300].mul_(4)  # initial weights give nearly uniform attention
    return gpt


def test_rotation_multiplies_each_pair_by_a_complex_number():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 900]])
    theta = torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64)  # 10000^(-2 i / 8)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(
        1j * positions[:, :, None, None] * theta
    )
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(rotate(x, rotation_of(positions, 8)), expected, atol=1e-4, rtol=0)


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 64)

    def score(m, n):
        rotated = (rotate(x, rotation_of(torch.tensor([at]), 64)) for x, at in ((q, m), (k, n)))
        return torch.mul(*rotated).sum()

    torch.testing.assert_close(score(3, 1), score(703, 701), atol=1e-3, rtol=0)
    assert (score(3, 1) - score(3, 2)).abs() > 1e-2


def test_qk_norm_bounds_the_scores():
    x = RMSNorm()(1000 * torch.randn(2, 5, 3, 16))
    torch.testing.assert_close(x.norm(dim=-1), torch.full((2, 5, 3), 4.0), atol=1e-3, rtol=0)


def test_rotary_positions_are_those_of_the_row_in_generation_and_documents(gpt):
    tokens = torch.randint(300, (3, 32))
    expected = gpt(tokens)
    cache = KVCache(ROTARY, 3, torch.device("cpu"))
    pieces, done = [], 0
    for n in (7, 1, 1, 12, 1, 10):
        pieces.append(gpt.head(gpt.hidden(tokens[:, done : done + n], cache=cache)))
        cache.lengths = [length + n for length in cache.lengths]
        done += n
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=0)
    # rows of different lengths, beyond the block size
    rows = [[1, 2, 3], list(range(30))]
    assert gpt.generate(rows, 40, 0) == [gpt.generate([row], 40, 0)[0] for row in rows]
    documents = torch.arange(32).expand(3, 32) // 20
    packed = gpt(tokens, documents=documents)
    torch.testing.assert_close(packed[:, 20:], gpt(tokens[:, 20:]), atol=1e-4, rtol=0)
    assert (packed - expected)[:, 21:].abs().max() > 1e-2


def test_order_of_tokens_matters_with_rotary_positions(gpt):
    """Without positions, the last logits of a single block would not depend on the order."""
    tokens = torch.randint(300, (1, 32))
    swapped = tokens[:, [1, 0, *range(2, 32)]]
    assert (gpt(tokens) - gpt(swapped))[:, -1].abs().max() > 1e-3


def test_zero_init_changes_the_residual_maps_only():
    plain, zero = GPT(CONFIG, seed=5), GPT(dataclasses.replace(CONFIG, zero_init=True), seed=5)
    for (name, p), q in zip(plain.named_parameters(), zero.parameters(), strict=True):
        if name.endswith("c_proj.weight"):
            assert not q.any(), name
        else:
            assert torch.equal(p, q), name
    tokens = torch.randint(300, (1, 32))
    x = zero.wte(tokens) + zero.wpe(torch.arange(32))
    assert torch.equal(zero.hidden(tokens), zero.ln_f(x))


@pytest.mark.parametrize(
    ("option", "refused"),
    [
        ({"positions": "rotary"}, ("hf", "llmc", "gguf")),
        ({"qk_norm": True}, ("hf", "llmc", "gguf")),
        ({"activation": "relu_squared"}, ("llmc", "gguf")),
        ({"zero_init": True}, ()),
    ],
    ids=str,
)
def test_layouts_of_gpt2_refuse_what_they_cannot_hold(call, tmp_path, option, refused):
    config = dataclasses.replace(CONFIG, **option)
    checkpoint.write(tmp_path / "saved", config, GPT(config).state_dict(), {})
    for layout in {"hf", "llmc", *refused}:
        out = tmp_path / layout
        flags = ["--checkpoint", tmp_path / "saved", "--out", out, "--format", layout]
        status, _, err = call(export, *flags)
        if layout in refused:
            assert status == 2
            assert err.count("\n") == 1
            assert f"model.{next(iter(option))} " in err
            assert not out.exists()
        else:
            assert status == 0, err
            assert out.is_dir()


def test_relu_squared_is_a_gpt2_of_transformers(call, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIG, activation="relu_squared")
    gpt = GPT(config, seed=6)
    gpt.to_hf(tmp_path / "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(300, (2, 32))
    torch.testing.assert_close(gpt(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)
    assert call(import_hf, tmp_path / "hf", "--out", tmp_path / "back")[0] == 0
    again = GPT.from_checkpoint(tmp_path / "back")
    assert again.config == config
    assert torch.equal(again(tokens), gpt(tokens))
    path = tmp_path / "hf/config.json"
    for activation in ("relu", ["relu2"], None):
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "activation_function": activation})
        )
        status, _, err = call(import_hf, tmp_path / "hf", "--out", tmp_path / "other")
        assert (status, err.count("\n")) == (2, 1)
        assert "activation_function" in err
