"""Tests for the GGUF files of `model.export`, read by the `gguf` package and by llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model import GPT, GPTConfig, checkpoint, export
from model.config import EOT
from model.gguf import FILE
from pipeline.format import tokenizer

pytestmark = pytest.mark.slow  # the package reads 150,000 strings one by one

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=64)
NAMES = {  # of llama.cpp, by ours
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm",
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
PROMPTS = (
    *("The state of the Union", "My fellow citizens,", "In the year 1812", "We must", "Peace"),
    *("The Congress", "our navy, our army", "$5,000,000 of revenue", "Héllo — naïve", "  two"),
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Path]:
    pytest.importorskip("gguf")
    tmp_path = tmp_path_factory.mktemp("gguf")
    gpt = GPT(CONFIG, seed=3)
    checkpoint.write(tmp_path / "checkpoint", CONFIG, gpt.state_dict(), {})
    flags = ["--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out")]
    export.main([*flags, "--format", "gguf"])
    return gpt, tmp_path / "out" / FILE


def test_file_has_the_weights_sizes_and_tokens(exported: tuple[GPT, Path]) -> None:
    import gguf

    gpt, path = exported
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, parameter in gpt.state_dict().items():
        part, _, kind = name.rpartition(".")
        block = f"blk.{part.split('.')[1]}." if part.startswith("h.") else ""
        theirs = f"{block}{NAMES[part.split('.', 2)[2] if block else part]}.{kind}"
        ours = parameter[: CONFIG.vocab_size] if name == "wte.weight" else parameter
        np.testing.assert_array_equal(found.pop(theirs), ours.numpy())
    assert not found

    def value(key: str, *index: int):
        return reader.fields[key].contents(*index)

    assert value("general.architecture") == "gpt2"
    assert value("gpt2.context_length") == 64
    assert value("gpt2.attention.head_count") == 2
    assert value("tokenizer.ggml.bos_token_id") == value("tokenizer.ggml.eos_token_id") == EOT
    assert tokenizer.decode([262]) == " the"
    assert value("tokenizer.ggml.tokens", 262) == "Ġthe"
    assert value("tokenizer.ggml.tokens", EOT) == "<|endoftext|>"
    assert value("tokenizer.ggml.merges", 49999) == "Ġg azed"  # the last line of merges.txt


def test_llama_cpp_continues_prompts_with_the_same_tokens(exported: tuple[GPT, Path]) -> None:
    """Runs where llama-cpp-python is installed: docs/export.md."""
    llama_cpp = pytest.importorskip("llama_cpp")
    gpt, path = exported
    other = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
    for prompt in PROMPTS:
        tokens = [EOT, *tokenizer.encode(prompt)]
        assert other.tokenize(prompt.encode(), add_bos=True) == tokens
        expected = gpt.generate([tokens], 20, 0.0)[0][len(tokens) :]
        other.reset()
        got = [token for token, _ in zip(other.generate(tokens, temp=0.0), range(20), strict=False)]
        assert got == expected
