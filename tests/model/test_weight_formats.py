"""Tests for checkpoints, the Hugging Face layout, the files of llm.c, and the tokenizer files.

Weights that others wrote are in test_foreign_weights.py.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig, checkpoint
from model.errors import FormatError
from model.tokenizer_files import bytes_to_unicode, recover_merges, write_tokenizer
from pipeline.format import tokenizer

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=300, loss_chunk=9)


def one_line(error):
    return "\n" not in str(error.value)


@pytest.fixture
def saved(tmp_path):
    gpt = GPT(CONFIG, seed=1)
    checkpoint.write(tmp_path, CONFIG, gpt.state_dict(), {"step": 3})
    return tmp_path


def edit(folder, change, metadata=None):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata)


# -- checkpoints ---------------------------------------------------------------------------------


def test_checkpoint_round_trip(saved):
    gpt = GPT.from_checkpoint(saved)
    assert gpt.config == CONFIG
    for p, q in zip(gpt.parameters(), GPT(CONFIG, seed=1).parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.requires_grad
    tokens = torch.randint(300, (2, 9))
    gpt(tokens, tokens).backward()  # can be trained further


def test_a_loaded_model_does_not_depend_on_its_file(saved):
    """Its parameters are no views of the mapped file, which could change or be cut short."""
    gpt = GPT.from_checkpoint(saved)
    path = saved / "model.safetensors"
    with path.open("r+b") as file:  # in place, as no command here does
        file.write(bytes(path.stat().st_size))
    for p, q in zip(gpt.parameters(), GPT(CONFIG, seed=1).parameters(), strict=True):
        assert torch.equal(p, q)


def test_checkpoint_layout(saved):
    """The names of `state_dict`, the tied table once, and the config."""
    tensors = load_file(saved / "model.safetensors")
    assert set(tensors) == set(GPT(CONFIG).state_dict())
    assert "lm_head.weight" not in tensors
    assert tensors["wte.weight"].shape == (384, 16)
    assert json.loads((saved / "state.json").read_text())["model"] == CONFIG.to_dict()


def test_hard_linked_files_are_replaced_not_modified(saved, tmp_path):
    """DVC hard-links outs to its cache: writing into a file would change the cache."""
    for name in ("model.safetensors", "state.json"):
        (tmp_path / f"cached {name}").hardlink_to(saved / name)
    before = (tmp_path / "cached model.safetensors").read_bytes()
    checkpoint.write(saved, CONFIG, GPT(CONFIG, seed=9).state_dict(), {})
    assert (tmp_path / "cached model.safetensors").read_bytes() == before
    assert "step" in (tmp_path / "cached state.json").read_text()
    assert not list(saved.glob("*.part"))
    assert not list(saved.glob(".*"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("h.1.attn.c_proj.bias"), "h.1.attn.c_proj.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.update({"wpe.weight": torch.zeros(8, 16)}), r"wpe.weight.*\(8, 16\)"),
    ],
)
def test_wrong_tensors_of_a_checkpoint_are_named(saved, change, named):
    edit(saved, change)
    with pytest.raises(FormatError, match=named) as caught:
        GPT.from_checkpoint(saved)
    assert one_line(caught)


def test_missing_and_damaged_files_of_a_checkpoint_are_named(saved, tmp_path):
    with pytest.raises(FormatError, match=r"state\.json"):
        GPT.from_checkpoint(tmp_path / "nowhere")
    weights = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        GPT.from_checkpoint(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        GPT.from_checkpoint(saved)
    for text, named in [
        ("{", ""),
        ("[]", ""),
        ("{}", "'model'"),
        ('{"model": {"n_layer": 2}}', "'n_head'"),
        ('{"model": {"n_layre": 2}}', "'n_layer'"),
    ]:
        (saved / "state.json").write_text(text)
        with pytest.raises(FormatError, match=rf"state\.json.*{named}") as caught:
            GPT.from_checkpoint(saved)
        assert one_line(caught)


# -- the Hugging Face layout ---------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path):
    GPT(CONFIG, seed=2).to_hf(tmp_path)
    return tmp_path


def test_exported_weights_have_the_shapes_of_the_layout(exported):
    tensors = load_file(exported / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)  # [in, out]
    assert tensors["transformer.h.0.mlp.c_proj.weight"].shape == (64, 16)
    assert tensors["transformer.wte.weight"].shape == (300, 16)  # no padding
    assert "lm_head.weight" not in tensors


def test_float16_weights_become_float32(exported):
    edit(exported, lambda t: t.update({k: v.half() for k, v in t.items()}))
    assert {p.dtype for p in GPT.from_hf(exported).parameters()} == {torch.float32}


# -- tokenizer files -----------------------------------------------------------------------------


def test_bytes_map_to_the_characters_of_gpt2():
    characters = bytes_to_unicode()
    assert len(set(characters)) == 256
    assert tuple(characters[ord(c)] for c in "a \n") == ("a", "Ġ", "Ċ")


def test_merges_are_recovered_in_order():
    merges = [(b"a", b"b"), (b"c", b"d"), (b"ab", b"cd"), (b"ab", b"a")]
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    assert recover_merges(ranks) == merges


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, tokenizer.ranks(), 1024)
    return folder


def test_older_tokenizer_files_have_gpt2_vocabulary_and_merges(tokenizer_folder):
    merges = (tokenizer_folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[:3] == ["#version: 0.2", "Ġ t", "Ġ a"]
    assert len(merges) == 50_001
    vocabulary = json.loads((tokenizer_folder / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocabulary) == 50257
    assert vocabulary["<|endoftext|>"] == tokenizer.EOT


TEXTS = [
    *("", " ", "Hello world", "  two  spaces\n\n\tand tabs ", "a \n\n b\r\n  ", "x" * 300),
    *("naïve 東京 🙂 don't I'LL 12345", "👩\u200d💻 نمی\u200cخواهم \u202e", "e\u0301 ½ ² Ⅳ ١٢"),
    *(
        "\x00\x1b[31m",
        "\ufeffBOM",
        "\u00a0\u3000\u2028",
        "'s 'S ''ll 're ' ve",
        "snake_case(x) // 3.14e-10",
    ),
    "clean up , not this . Or n't this ? I 'm",
]


def test_tokenizer_json_gives_the_tokens_and_texts_of_tiktoken(tokenizer_folder):
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert fast.get_vocab_size() == 50257

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=60))
    def check(text):
        assert fast.encode(text).ids == tokenizer.encode(text)

    check()
    for text in TEXTS:
        assert fast.encode(text).ids == tokenizer.encode(text)
        assert fast.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    special = fast.encode("a<|endoftext|> b").ids
    assert special == [*tokenizer.encode("a"), tokenizer.EOT, *tokenizer.encode(" b")]


def test_transformers_reads_the_tokenizer(tokenizer_folder):
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers to read the files"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(
        tokenizer_folder, config=transformers.GPT2Config()
    )
    assert theirs.is_fast
    assert len(theirs) == 50257
    assert theirs.eos_token_id == 50256
    for text in TEXTS:
        assert theirs.encode(text) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
