"""GPT-2 (Radford et al. 2019) from first principles, in PyTorch.

Reading order:

    config.py      sizes and options
    layers.py      linear, LayerNorm, GELU, embedding
    attention.py   causal self-attention, document masks, KV cache
    gpt.py         the model; starts with a list of its features
    loss.py        cross-entropy that never holds all logits
    init.py        initial weights
    generation.py  sampling
    variants.py    options that GPT-2 does not have, all off by default

The other modules are formats (`checkpoint.py`, `hf.py`, `llmc.py`, `tokenizer_files.py`), how they
are read and written (`files.py`, `output.py`), parameter and FLOP counts (`size.py`) and commands
(`generate.py`, `export.py`, `import_hf.py`). Measurements are in `docs/model.md`.

A first reading takes about 20 minutes if you skip `config.py`, `generation.py`, `variants.py`,
`attention.py` from "documents" on and `gpt.py` from "text" on.

Letters in shape comments:

    B  batch                      C  channels (`n_embd`)         V  vocabulary
    T  tokens per sequence        H  heads                       P  vocabulary, padded
    S  tokens so far (KV cache)   D  channels per head (C / H)   L  layers
    N  tokens per batch (B T)     R  tokens per loss chunk

Importing this package does not import torch: `GPT` is imported on first use.
"""

from typing import TYPE_CHECKING, Any

from model.config import GPTConfig

if TYPE_CHECKING:
    from model.gpt import GPT

__all__ = ["GPT", "GPTConfig"]


def __getattr__(name: str) -> Any:
    """Import `GPT` on first use (PEP 562)."""
    if name == "GPT":
        from model.gpt import GPT

        return GPT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
