"""GPT-2 from first principles.

Read in this order: `config.py` (the sizes), `layers.py` (linear, LayerNorm, GELU, embedding),
`attention.py`, `gpt.py` (the whole model), `loss.py` (cross-entropy), `init.py` (initial weights),
`generation.py` (sampling). The rest is formats and commands: `size.py`, `checkpoint.py`, `hf.py`,
`tokenizer_files.py`, and `generate.py`, `export.py`, `import_hf.py` on the command line. What was
measured stands in `docs/model.md`.

A first reading takes about 20 minutes: leave `config.py` and `generation.py` for later, in
`attention.py` all from "documents" on, in `gpt.py` all from "text" on.

In every shape comment: B batch, T time (tokens of a sequence), S time so far (with a cache), C
channels (`n_embd`), H heads, D = C / H width of a head, V vocabulary, P vocabulary padded, L
layers; in the loss N = B T tokens, R tokens of a chunk.

Importing this package loads no torch: ``GPT`` is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

from model.config import GPTConfig

if TYPE_CHECKING:
    from model.gpt import GPT

__all__ = ["GPT", "GPTConfig"]


def __getattr__(name: str) -> Any:
    """Import ``GPT`` on first use (PEP 562)."""
    if name == "GPT":
        from model.gpt import GPT

        return GPT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
