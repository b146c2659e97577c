"""Export a checkpoint to the layout of another program.

    python -m model.export --checkpoint DIR --out DIR                 # transformers, lm_eval
    python -m model.export --checkpoint DIR --out DIR --format llmc   # llm.c

DIR of `--out` is a new folder, or one of an earlier export in the same format.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.command import Parser, folder_path, run
from model.config import EOT

if TYPE_CHECKING:
    from model.gpt import GPT


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags; write the files of the layout."""
    from pipeline.runtime import command  # only commands know of DVC

    command.die_with_parent()  # before torch is imported, which takes seconds
    from model import hf, llmc, output, tokenizer_files
    from model.gpt import GPT

    parser = Parser(
        prog="python -m model.export",
        description="Export a checkpoint for transformers and lm_eval, or for llm.c.",
    )
    parser.add_argument("--checkpoint", type=folder_path, required=True, metavar="DIR")
    parser.add_argument(
        "--out", type=folder_path, required=True, metavar="DIR", help="a new folder"
    )
    parser.add_argument("--format", choices=("hf", "llmc"), default="hf", help="default: hf")
    args = parser.parse_args(argv)

    if args.format == "hf":
        names: tuple[str, ...] = (*tokenizer_files.FILES, *hf.FILES)
        output.check(args.out, args.checkpoint, names, hf.wrote)
        gpt = GPT.from_checkpoint(args.checkpoint)
        with output.new_files(args.out, names) as part:
            _write_hf(part, gpt)
        print(f"wrote {args.out}: load it with transformers.GPT2LMHeadModel.from_pretrained")
    else:
        names = tuple(llmc.FILES)
        output.check(args.out, args.checkpoint, names, lambda _: True)
        gpt = GPT.from_checkpoint(args.checkpoint)
        with output.new_files(args.out, names) as part:
            llmc.write(part, gpt.config, gpt.state_dict())
        print(f"wrote {args.out}: load {' or '.join(names)} with train_gpt2cu -e")


def _write_hf(folder: Path, gpt: GPT) -> None:
    from model import tokenizer_files
    from pipeline.format import tokenizer  # only commands know text

    if gpt.config.vocab_size == EOT + 1:
        tokenizer_files.write_tokenizer(folder, tokenizer.ranks(), gpt.config.block_size)
    gpt.to_hf(folder)


if __name__ == "__main__":
    run(main)
