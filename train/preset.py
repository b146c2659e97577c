"""`python -m train.preset NAME`: merge a preset into `params.yaml`, or print it for `dvc exp run`.

A preset is an overlay file, `train/presets/<name>.yaml`, whose first line describes it. No stage
reads presets: `params.yaml` alone decides a result.
"""

import io
import json
import shlex
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.params import CurateParams, SourceParams, TokenizeParams, VerifyParams
from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import PARAMS, Section, nearest, read_yaml, validate
from pipeline.store import atomic
from train.params import EvaluateParams, ModelParams, TrainParams

SECTIONS: dict[str, type[Section]] = {
    "source": SourceParams,
    "curate": CurateParams,
    "tokenize": TokenizeParams,
    "verify": VerifyParams,
    "model": ModelParams,
    "train": TrainParams,
    "evaluate": EvaluateParams,
}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Validated sections of `params.yaml`."""

    source: SourceParams
    curate: CurateParams
    tokenize: TokenizeParams
    verify: VerifyParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams


def preset_files() -> dict[str, Path]:
    """Return the preset files by name."""
    folder = Path(str(resources.files("train"))) / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_preset(name: str) -> dict[str, dict[str, Any]]:
    """Read the overlay of a preset: section -> key -> value.

    Raises:
        UserError: The name is unknown.
    """
    files = preset_files()
    if name not in files:
        raise UserError(f"preset {name}: unknown; {nearest(name, list(files))}")
    return read_yaml(files[name])


def merge(text: str, overlay: dict[str, dict[str, Any]]) -> str:
    """Merge an overlay into the text of `params.yaml`; its comments stay.

    Raises:
        UserError: A section is missing or unknown, or the result is invalid.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 100
    # Write null out; ruamel's default leaves the value empty.
    yaml.representer.add_representer(
        type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    params = yaml.load(text)
    _check_sections(params)
    for section, values in overlay.items():
        if section not in SECTIONS:
            raise UserError(f"{section}: unknown section; {nearest(section, list(SECTIONS))}")
        for key, value in values.items():
            # Keep the spelling of an equal value: merging a preset twice changes nothing.
            if key not in params[section] or params[section][key] != value:
                params[section][key] = value
    for section, cls in SECTIONS.items():
        validate(cls, dict(params[section]), f"{PARAMS}: {section}")
    buffer = io.StringIO()
    yaml.dump(params, buffer)
    return buffer.getvalue()


def load(name: str | None = None) -> Parameters:
    """Load `params.yaml`, with a preset merged in memory if one is named.

    Raises:
        UserError: The preset is unknown, or a section is missing or invalid.
    """
    overlay = read_preset(name) if name else {}
    params = read_yaml(PARAMS)
    _check_sections(params)
    where = f"{PARAMS} with preset {name}" if name else str(PARAMS)
    found: dict[str, Any] = {
        section: validate(
            cls, {**params[section], **overlay.get(section, {})}, f"{where}: {section}"
        )
        for section, cls in SECTIONS.items()
    }
    return Parameters(**found)


def _check_sections(params: dict[str, Any]) -> None:
    for section in SECTIONS:
        if not isinstance(params.get(section), dict):
            state = "holds no `key: value` lines" if section in params else "is missing"
            raise UserError(f"{PARAMS}: section {section} {state}; run `git checkout {PARAMS}`")


def flags(overlay: dict[str, dict[str, Any]]) -> str:
    """Format an overlay as flags for `dvc exp run`."""

    def as_text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return " ".join(
        f"-S {shlex.quote(f'{section}.{key}={as_text(value)}')}"
        for section, values in overlay.items()
        for key, value in values.items()
    )


def main(argv: list[str] | None = None) -> None:
    """Merge a preset, print it as flags, or list all presets."""
    parser = command.Parser(
        prog="python -m train.preset",
        description="Merge a preset into params.yaml, keeping its comments. Default: list presets.",
    )
    parser.add_argument("name", nargs="?", help="name of the preset")
    parser.add_argument(
        "--flags", action="store_true", help="print -S flags for `dvc exp run`; change nothing"
    )
    args = parser.parse_args(argv)
    if args.name is None:
        for name, path in preset_files().items():
            print(f"{name:16} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
        return
    overlay = read_preset(args.name)
    if args.flags:
        print(flags(overlay))
        return
    read_yaml(PARAMS)  # raises UserError if the file is missing or not YAML
    atomic.write_bytes(PARAMS, merge(PARAMS.read_text(encoding="utf-8"), overlay).encode())
    print(f"{PARAMS}: preset {args.name} merged; `dvc params diff` shows the changes")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
