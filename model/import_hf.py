"""Makes a checkpoint of a model in the Hugging Face layout.

    python -m model.import_hf DIR --out DIR

Instead of a folder a name on the hub can be given, such as `openai-community/gpt2`; that needs a
network and the package `huggingface_hub`.
"""

from __future__ import annotations

from pathlib import Path

from model import checkpoint
from model.command import Parser, run
from model.errors import FormatError
from model.gpt import GPT


def main() -> None:
    """Reads the flags, writes the checkpoint."""
    parser = Parser(
        prog="python -m model.import_hf",
        description="Make a checkpoint of a model in the Hugging Face GPT-2 layout (safetensors).",
    )
    parser.add_argument("source", metavar="DIR", help="a folder, or a name on the hub")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()

    if (args.out / checkpoint.STATE).exists():
        raise FormatError(f"--out {args.out} is a checkpoint already: give another folder")
    folder = Path(args.source)
    gpt = GPT.from_hf(folder if folder.is_dir() else _fetch(args.source))
    checkpoint.write(args.out, gpt.config, gpt.state_dict(), {"imported_from": args.source})
    print(f"wrote {args.out}: sample from it with python -m model.generate --checkpoint {args.out}")


def _fetch(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FormatError(
            f"{name} is no folder (a name on the hub needs huggingface_hub)"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors*"]))
    except (
        Exception
    ) as error:  # the hub's errors have no common base: no network, no such name, ...
        raise FormatError(f"{name} is no folder, and not fetched from the hub: {error}") from error


if __name__ == "__main__":
    run(main)
