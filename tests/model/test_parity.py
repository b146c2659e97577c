"""The same numbers as `transformers.GPT2LMHeadModel`, from the same weights."""

import copy

import pytest
import torch

from model import GPT

transformers = pytest.importorskip("transformers", reason="parity needs transformers installed")


def make(n_layer, n_head, n_embd, block_size, vocab_size):
    """Their model with random weights, none of them a constant."""
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
    return theirs


SIZES = {
    "tiny": (2, 4, 32, 64, 300),
    "124M": (12, 12, 768, 1024, 50257),
}


@pytest.fixture(scope="module", params=["tiny", pytest.param("124M", marks=pytest.mark.slow)])
def pair(request, tmp_path_factory):
    """Their model, ours from its folder, the folder."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make(*SIZES[request.param])
    theirs.save_pretrained(folder)
    return theirs, GPT.from_hf(folder), folder


def batch(gpt, T):
    generator = torch.Generator().manual_seed(1)
    shape = (2, min(T, gpt.config.block_size))
    return torch.randint(gpt.config.vocab_size, (2, *shape), generator=generator).unbind()


@pytest.mark.parametrize("implementation", ["fused", "explicit"])
def test_logits_loss_and_gradients(pair, implementation):
    theirs, gpt, folder = pair
    if implementation == "explicit":
        gpt = GPT.from_hf(folder, implementation="explicit")
    tokens, targets = batch(gpt, 128)
    theirs.zero_grad()
    gpt.zero_grad()

    logits = theirs(tokens).logits
    ours = gpt(tokens)
    assert ours.shape == (*tokens.shape, gpt.config.vocab_size)
    far = (ours - logits).abs().max()
    assert far < 1e-5

    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = gpt(tokens, targets)
    assert abs(loss - expected) < 1e-6

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
    print(f"logits {far:.1e}, loss {abs(loss - expected):.1e}, gradients {max(distances):.1e}")


def test_fifty_greedy_tokens(pair):
    theirs, gpt, _ = pair
    tokens, _ = batch(gpt, 8)
    expected = theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=50,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(gpt.generate(tokens, 50, temperature=0, stop=None), expected)


def test_round_trip_is_bit_exact(pair, tmp_path):
    theirs, gpt, _ = pair
    gpt.to_hf(tmp_path)
    again = GPT.from_hf(tmp_path)
    for (name, p), q in zip(gpt.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert again.config == gpt.config
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = theirs.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id


def test_their_config_reads_as_ours(pair, tmp_path):
    """What we write says the same model as what they write."""
    theirs, gpt, _ = pair
    gpt.to_hf(tmp_path)
    ours = transformers.GPT2Config.from_pretrained(tmp_path)
    expected = copy.deepcopy(theirs.config)
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "activation_function"):
        assert getattr(ours, key) == getattr(expected, key), key
    assert ours.tie_word_embeddings
    assert ours.layer_norm_epsilon == 1e-5
