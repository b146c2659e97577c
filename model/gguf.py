"""Write the GGUF format of llama.cpp: one file with weights, sizes and tokenizer.

Names and keys are those of llama.cpp's own converter (`conversion/gpt2.py`). Its layout of linear
maps is ours, [out, in], so values and shapes stay; only the table loses its padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from model.config import EOT, GPTConfig, require_gpt2
from model.errors import ConfigError
from model.files import write_atomically
from model.size import parameter_count
from model.tokenizer_files import spelled

FILE = "model-f32.gguf"


def write(
    folder: Path, config: GPTConfig, parameters: dict[str, Tensor], ranks: Mapping[bytes, int]
) -> None:
    """Write a `state_dict()` as float32, with GPT-2's tokenizer.

    The file has llama.cpp put `<|endoftext|>` before each prompt, as `model.generate` does.

    Raises:
        ConfigError: The package `gguf` is not installed, the model is no GPT-2, or its vocabulary
            is another.
    """
    require_gpt2(config, "llama.cpp")
    if config.vocab_size != EOT + 1:
        raise ConfigError(
            f"--format gguf: the vocabulary has {config.vocab_size} tokens; export a model with "
            f"GPT-2's {EOT + 1}"
        )
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("--format gguf: needs the package gguf; pip install gguf") from error
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    vocabulary, merges = spelled(ranks)

    def write(part: Path) -> None:
        writer = gguf.GGUFWriter(part, "gpt2")
        writer.add_name(f"GPT-2 with {parameter_count(config):,} parameters")
        writer.add_block_count(config.n_layer)
        writer.add_context_length(config.block_size)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(1e-5)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(list(vocabulary))
        writer.add_token_types([gguf.TokenType.NORMAL] * EOT + [gguf.TokenType.CONTROL])
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_bos_token_id(EOT)
        writer.add_eos_token_id(EOT)
        writer.add_add_bos_token(True)
        for name, tensor in parameters.items():
            known = names.get_name(f"transformer.{name}", try_suffixes=(".weight", ".bias"))
            assert known is not None, name
            rows = config.vocab_size if name == "wte.weight" else len(tensor)
            writer.add_tensor(known, tensor.detach().cpu()[:rows].contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(folder / FILE, write)
