"""Import a model in the Hugging Face layout as a checkpoint.

    python -m model.import_hf DIR --out DIR

DIR may also be a name on the Hub, such as `openai-community/gpt2`; this needs network access and
the package `huggingface_hub`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model import checkpoint, hub, output
from model.command import Parser, folder_path, run
from model.errors import FormatError
from model.files import read_json
from model.gpt import GPT

IMPORTED_FROM = "imported_from"
"""Key of `state.json` that a checkpoint of training does not have."""


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags; write the checkpoint."""
    parser = Parser(
        prog="python -m model.import_hf",
        description="Import a model in the Hugging Face GPT-2 layout as a checkpoint.",
    )
    parser.add_argument(
        "source", type=folder_path, metavar="DIR", help="a folder, or a name on the Hub"
    )
    parser.add_argument(
        "--out", type=folder_path, required=True, metavar="DIR", help="a new folder"
    )
    args = parser.parse_args(argv)

    folder = args.source if args.source.is_dir() else None
    output.check(args.out, folder, checkpoint.FILES, _is_imported, replace=False)
    gpt = GPT.from_hf(folder or hub.download(str(args.source)))
    with output.new_files(args.out, checkpoint.FILES) as part:
        checkpoint.write(part, gpt.config, gpt.state_dict(), {IMPORTED_FROM: str(args.source)})
    print(f"wrote {args.out}: sample from it with python -m model.generate --checkpoint {args.out}")


def _is_imported(folder: Path) -> bool:
    try:
        return IMPORTED_FROM in read_json(folder / checkpoint.STATE, "")
    except FormatError:
        return False


if __name__ == "__main__":
    run(main)
