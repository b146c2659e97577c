"""Sample text: `python -m model.generate --checkpoint DIR --prompt "..."`.

DIR is a training checkpoint or a folder in the Hugging Face layout. Text is printed token by token.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from model import checkpoint
from model.command import Parser, folder_path, run
from model.config import EOT
from model.errors import ConfigError, FormatError
from model.generation import stream
from model.gpt import GPT
from model.tokenizer_files import END_OF_TEXT


def load(folder: Path) -> GPT:
    """Load a training checkpoint or a folder in the Hugging Face layout.

    Raises:
        FormatError: The folder is neither.
    """
    if not folder.is_dir():
        raise FormatError(f"--checkpoint {folder} is not a folder: give one with a trained model")
    if (folder / checkpoint.STATE).exists():
        return GPT.from_checkpoint(folder)
    if (folder / "config.json").exists():
        return GPT.from_hf(folder)
    raise FormatError(
        f"--checkpoint {folder} has neither {checkpoint.STATE} nor config.json: "
        "give a folder with a trained model"
    )


def decode_stream(
    tokens: Iterable[int], decode_bytes: Callable[[Sequence[int]], bytes]
) -> Iterator[str]:
    """Decode tokens one by one; the bytes of an incomplete character wait for the next token."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, load the model, and stream to standard output."""
    parser = Parser(
        prog="python -m model.generate", description="Sample text from a trained GPT-2."
    )
    parser.add_argument("--checkpoint", type=folder_path, required=True, metavar="DIR")
    parser.add_argument("--prompt", default="", help="text to continue; default: start a document")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, help="makes the text reproducible")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help=f"{END_OF_TEXT} in the prompt starts a new document; default: it is ordinary text",
    )
    args = parser.parse_args(argv)

    from pipeline.format import tokenizer  # only commands know text

    device = _device(args.device)
    gpt = load(args.checkpoint)
    if gpt.config.vocab_size != EOT + 1:
        raise ConfigError(
            f"--checkpoint {args.checkpoint} has {gpt.config.vocab_size} tokens, GPT-2's tokenizer "
            f"{EOT + 1}: use GPT.generate from Python"
        )
    gpt.to(device)
    documents = [args.prompt]
    if args.special_tokens:
        documents = args.prompt.removeprefix(END_OF_TEXT).split(END_OF_TEXT)
    # as documents start in training
    prompt = [token for text in documents for token in (EOT, *tokenizer.encode(text))]
    steps = stream(
        gpt, [prompt], args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed
    )
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for terminals without Unicode
    print(args.prompt, end="", flush=True)
    new = (token for (token,) in steps if token is not None and token != EOT)
    for piece in decode_stream(new, tokenizer.decode_bytes):
        print(piece, end="", flush=True)
    print()


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # on "meta" there are no values
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--device {name} is not available: {reason}") from error
    return device


if __name__ == "__main__":
    run(main)
