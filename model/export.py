"""Export a checkpoint to the Hugging Face layout.

python -m model.export --checkpoint DIR --out DIR
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model.command import Parser, run
from model.config import EOT
from model.gpt import GPT
from model.tokenizer_files import write_tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags; write the model and the tokenizer files."""
    parser = Parser(
        prog="python -m model.export",
        description="Export a checkpoint for transformers.GPT2LMHeadModel and lm_eval.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)

    from pipeline.format import tokenizer  # only commands know text

    gpt = GPT.from_checkpoint(args.checkpoint)
    gpt.to_hf(args.out)
    if gpt.config.vocab_size == EOT + 1:
        write_tokenizer(args.out, tokenizer.ranks(), gpt.config.block_size)
    print(f"wrote {args.out}: load it with transformers.GPT2LMHeadModel.from_pretrained")


if __name__ == "__main__":
    run(main)
