"""`python -m train.preset NAME`: merge a preset into `params.yaml`, or print it for `dvc exp run`.

A preset is a small overlay file, `train/presets/<name>.yaml`, whose first line says what it is for.
`params.yaml` stays the whole truth: nothing reads a preset but this command.
"""

import argparse
import io
import json
import shlex
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.params import SourceParams, TokenizeParams, VerifyParams
from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import PARAMS, Section, nearest, read_yaml, validate
from pipeline.store import atomic
from train.params import EvaluateParams, ModelParams, TrainParams

SECTIONS: dict[str, type[Section]] = {
    "source": SourceParams,
    "tokenize": TokenizeParams,
    "verify": VerifyParams,
    "model": ModelParams,
    "train": TrainParams,
    "evaluate": EvaluateParams,
}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """All sections of `params.yaml`, valid."""

    source: SourceParams
    tokenize: TokenizeParams
    verify: VerifyParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams


def preset_files() -> dict[str, Path]:
    """The presets, by name."""
    folder = Path(str(resources.files("train"))) / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_preset(name: str) -> dict[str, dict[str, Any]]:
    """The overlay of a preset: section -> key -> value.

    Raises:
        UserError: there is no preset of that name.
    """
    files = preset_files()
    if name not in files:
        raise UserError(f"preset {name}: unknown; {nearest(name, list(files))}")
    return read_yaml(files[name])


def merge(text: str, overlay: dict[str, dict[str, Any]]) -> str:
    """Lay ``overlay`` over the parameters in ``text``, whose comments stay.

    Raises:
        UserError: the result would be refused by a stage.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 100
    # A null stays written out, not left empty.
    yaml.representer.add_representer(
        type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    params = yaml.load(text)
    if lacking := [section for section in SECTIONS if section not in params]:
        raise UserError(f"{PARAMS}: section {lacking[0]} is missing; `git checkout {PARAMS}`")
    for section, values in overlay.items():
        if section not in SECTIONS:
            raise UserError(f"{section}: unknown section; {nearest(section, list(SECTIONS))}")
        for key, value in values.items():
            # An equal value stays as it is written: a preset applied twice changes nothing.
            if key not in params[section] or params[section][key] != value:
                params[section][key] = value
    for section, cls in SECTIONS.items():
        validate(cls, dict(params[section]), section)
    buffer = io.StringIO()
    yaml.dump(params, buffer)
    return buffer.getvalue()


def load(name: str | None = None) -> Parameters:
    """The parameters of `params.yaml`, with a preset laid over them where one is named.

    Raises:
        UserError: There is no such preset, or a section is missing or would be refused.
    """
    overlay = read_preset(name) if name else {}
    params = read_yaml(PARAMS)
    if lacking := [section for section in SECTIONS if section not in params]:
        raise UserError(f"{PARAMS}: section {lacking[0]} is missing; `git checkout {PARAMS}`")
    for section in SECTIONS:
        if not isinstance(params[section], dict):
            raise UserError(f"{PARAMS}: {section}: not a section of keys; `git checkout {PARAMS}`")
    where = f"{PARAMS} with preset {name}" if name else str(PARAMS)
    found: dict[str, Any] = {
        section: validate(
            cls, {**params[section], **overlay.get(section, {})}, f"{where}: {section}"
        )
        for section, cls in SECTIONS.items()
    }
    return Parameters(**found)


def flags(overlay: dict[str, dict[str, Any]]) -> str:
    """The overlay as flags of `dvc exp run`."""

    def shown(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return " ".join(
        f"-S {shlex.quote(f'{section}.{key}={shown(value)}')}"
        for section, values in overlay.items()
        for key, value in values.items()
    )


def main(argv: list[str] | None = None) -> None:
    """Apply a preset, print it as flags, or list what there is."""
    parser = argparse.ArgumentParser(
        prog="python -m train.preset",
        description="Merge a preset into params.yaml (comments stay); without a name, list all.",
    )
    parser.add_argument("name", nargs="?", help="the preset")
    parser.add_argument(
        "--flags", action="store_true", help="print -S flags for `dvc exp run`, change nothing"
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
    read_yaml(PARAMS)  # names what is wrong with the file, if anything
    atomic.write_bytes(PARAMS, merge(PARAMS.read_text(encoding="utf-8"), overlay).encode())
    print(f"{PARAMS}: preset {args.name} applied; `dvc params diff` shows what changed")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
