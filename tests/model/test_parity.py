"""Tests for parity with `transformers.GPT2LMHeadModel`, from the same weights."""

import pytest
import torch

from model import GPT

transformers = pytest.importorskip("transformers", reason="parity needs transformers installed")


def make(folder, n_layer, n_head, n_embd, block_size, vocab_size):
    """Return their model with random weights, none of them constant; also saved in `folder`."""
    config = transformers.GPT2Config(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_positions=block_size,
        vocab_size=vocab_size,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    theirs.save_pretrained(folder)
    return theirs


TINY = 2, 4, 32, 64, 300
FULL = 12, 12, 768, 1024, 50257


def batch(gpt, T):
    generator = torch.Generator().manual_seed(1)
    shape = (2, min(T, gpt.config.block_size))
    return torch.randint(gpt.config.vocab_size, (2, *shape), generator=generator).unbind()


@pytest.mark.parametrize(
    ("size", "implementation"),
    [
        (TINY, "fused"),
        (TINY, "explicit"),
        pytest.param(FULL, "fused", marks=pytest.mark.slow),
        pytest.param(FULL, "explicit", marks=pytest.mark.soak),
    ],
)
def test_logits_loss_and_gradients_are_equal(tmp_path, size, implementation):
    theirs = make(tmp_path, *size)
    gpt = GPT.from_hf(tmp_path, implementation=implementation)
    tokens, targets = batch(gpt, 128)

    logits = theirs(tokens).logits
    ours = gpt(tokens)
    assert ours.shape == (*tokens.shape, gpt.config.vocab_size)
    difference = (ours - logits).abs().max()
    assert difference < 1e-5

    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = gpt(tokens, targets)
    assert abs(loss - expected) < 3e-6  # three float32 steps at a loss of 11

    expected.backward()
    loss.backward()
    distances = []
    for name, p in theirs.transformer.named_parameters():
        grad = gpt.get_parameter(name).grad
        assert grad is not None
        if name == "wte.weight":
            grad = grad[: gpt.config.vocab_size]
        elif grad.shape != p.shape or (".c_" in name and grad.ndim == 2):
            grad = grad.T
        distances.append(float((grad - p.grad).norm() / p.grad.norm()))
        assert distances[-1] < 1e-5, name
    assert len(distances) == len(list(gpt.parameters()))
    print(
        f"logits {difference:.1e}, loss {abs(loss - expected):.1e}, gradients {max(distances):.1e}"
    )


SIZES = pytest.mark.parametrize("size", [TINY, pytest.param(FULL, marks=pytest.mark.soak)])


@SIZES
def test_fifty_greedy_tokens_are_equal(tmp_path, size):
    theirs, gpt = make(tmp_path, *size), GPT.from_hf(tmp_path)
    tokens, _ = batch(gpt, 8)
    expected = theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=50,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(gpt.generate(tokens, 50, temperature=0, stop=None), expected)


@SIZES
def test_export_is_bit_exact_and_has_their_config(tmp_path, size):
    theirs, gpt = make(tmp_path / "theirs", *size), GPT.from_hf(tmp_path / "theirs")
    gpt.to_hf(tmp_path / "ours")
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = theirs.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ours = loaded.config
    assert loaded.generation_config.eos_token_id == ours.eos_token_id
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "activation_function"):
        assert getattr(ours, key) == getattr(theirs.config, key), key
    assert ours.tie_word_embeddings
    assert ours.layer_norm_epsilon == 1e-5
