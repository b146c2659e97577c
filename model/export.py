"""Export a checkpoint to the layout of another program.

    python -m model.export --checkpoint DIR --out DIR                 # transformers, lm_eval
    python -m model.export --checkpoint DIR --out DIR --format llmc   # llm.c
    python -m model.export --checkpoint DIR --out DIR --format gguf   # llama.cpp

DIR of `--out` is a new folder, or one of an earlier export in the same format. In the first format
it is a complete repository of the Hugging Face hub; `--push` uploads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model.command import Parser, folder_path, repository, run
from model.config import EOT


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags; write the files of the layout."""
    from pipeline.runtime import command  # only commands know of DVC

    command.die_with_parent()  # before torch is imported, which takes seconds
    from model import gguf, llmc, output
    from model.gpt import GPT
    from pipeline.format import tokenizer  # only commands know text

    parser = Parser(
        prog="python -m model.export",
        description="Export a checkpoint for transformers, llm.c or llama.cpp.",
    )
    parser.add_argument("--checkpoint", type=folder_path, required=True, metavar="DIR")
    parser.add_argument(
        "--out", type=folder_path, required=True, metavar="DIR", help="a new folder"
    )
    parser.add_argument(
        "--format", choices=("hf", "llmc", "gguf"), default="hf", help="default: hf"
    )
    parser.add_argument(
        "--project", type=folder_path, metavar="DIR",
        help="hf: the project that trained the model; its figures go into the model card",
    )  # fmt: skip
    parser.add_argument(
        "--licence", default="", metavar="ID",
        help="hf: the licence of the model, for its card, as the hub names it: mit, apache-2.0",
    )  # fmt: skip
    parser.add_argument(
        "--push", type=repository, metavar="OWNER/NAME",
        help="hf: upload the files to this model repository of the Hugging Face hub",
    )  # fmt: skip
    args = parser.parse_args(argv)

    if args.format == "hf":
        _export_hf(args.checkpoint, args.out, args.project, args.licence, args.push)
        return
    if args.project or args.licence or args.push:
        parser.error("--project, --licence and --push: only for --format hf, leave them out")
    names = tuple(llmc.FILES) if args.format == "llmc" else (gguf.FILE,)
    output.check(args.out, args.checkpoint, names, lambda _: True)
    gpt = GPT.from_checkpoint(args.checkpoint)
    with output.new_files(args.out, names) as part:
        if args.format == "llmc":
            llmc.write(part, gpt.config, gpt.state_dict())
        else:
            gguf.write(part, gpt.config, gpt.state_dict(), tokenizer.ranks())
    program = "train_gpt2cu -e" if args.format == "llmc" else "llama-cli -m"
    print(f"wrote {args.out}: load {' or '.join(names)} with {program}")


def _export_hf(
    source: Path, out: Path, project: Path | None, licence: str, repo: str | None
) -> None:
    from model import card, hf, hub, output, tokenizer_files
    from model.files import write_text
    from model.gpt import GPT
    from pipeline.format import tokenizer  # only commands know text

    names = (*tokenizer_files.FILES, card.FILE, *hf.FILES)
    output.check(out, source, names, hf.wrote)
    records = card.read(source, project)
    gpt = GPT.from_checkpoint(source)
    text = card.text(gpt.config, records, repo or ".", licence)
    with output.new_files(out, names) as part:
        if gpt.config.vocab_size == EOT + 1:
            tokenizer_files.write_tokenizer(part, tokenizer.ranks(), gpt.config.block_size)
        write_text(part / card.FILE, text)
        hf.write(part, gpt.config, gpt.state_dict(), card.identity(records))
    print(f"wrote {out}: load it with transformers.GPT2LMHeadModel.from_pretrained")
    if repo:
        print(f"uploaded it: {hub.upload(out, names, repo)}")


if __name__ == "__main__":
    run(main)
