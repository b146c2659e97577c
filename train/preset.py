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

from pipeline.params import (
    CurateParams,
    SourceParams,
    Sources,
    TokenizeParams,
    VerifyParams,
    validate_sources,
)
from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import (
    PARAMS,
    Section,
    check_sections,
    nearest,
    read_yaml,
    validate,
)
from pipeline.store import atomic
from train.data.phases import check_names
from train.params import EvaluateParams, ModelParams, TrainParams

SECTIONS: dict[str, type[Section]] = {
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

    sources: Sources
    curate: CurateParams
    tokenize: TokenizeParams
    verify: VerifyParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams


def shipped_files(folder: str) -> dict[str, Path]:
    """Return the YAML files of a folder in `train`, by name."""
    found = Path(str(resources.files("train"))) / folder
    return {path.stem: path for path in sorted(found.glob("*.yaml"))}


def preset_files() -> dict[str, Path]:
    """Return the preset files by name."""
    return shipped_files("presets")


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
    apply(params, overlay)
    validated(params, str(PARAMS))
    buffer = io.StringIO()
    yaml.dump(params, buffer)
    return buffer.getvalue()


def load(name: str | None = None) -> Parameters:
    """Load `params.yaml`, with a preset merged in memory if one is named.

    Raises:
        UserError: The preset is unknown, or a section is missing or invalid.
    """
    params = read_yaml(PARAMS)
    apply(params, read_preset(name) if name else {})
    return validated(params, f"{PARAMS} with preset {name}" if name else str(PARAMS))


def apply(
    params: dict[str, Any], overlay: dict[str, dict[str, Any]], where: str = "the preset"
) -> None:
    """Set the values of an overlay. One with its own sources replaces all and their mixture.

    Args:
        where: Names the overlay in messages.

    Raises:
        UserError: A section is missing or unknown, or the overlay changes an unknown source.
    """
    _check_sections(params)
    check_sections(overlay, where)
    sources = overlay.get("sources", {})
    if _replaces(sources):
        _replace_sources(params["sources"], sources)
        if params["train"].get("mixture") is not None:
            params["train"]["mixture"] = None
    else:
        for name, keys in sources.items():
            _update(_existing(params["sources"], name, keys, where), keys)
    for section, values in overlay.items():
        if section != "sources":
            _update(params[section], values)


def _replaces(sources: dict[str, dict[str, Any]]) -> bool:
    """Whether the sources of an overlay are sources of its own, rather than changes of others."""
    return any("kind" in keys for keys in sources.values())


def _replace_sources(sources: dict[str, Any], own: dict[str, dict[str, Any]]) -> None:
    """Replace all sources; one of the same name keeps its comments, and gets all values."""
    for name in [name for name in sources if name not in own]:
        del sources[name]
    for name, keys in own.items():
        if not isinstance(sources.get(name), dict):
            sources[name] = {}
        fields = SourceParams.model_fields.items()
        defaults = {k: field.get_default() for k, field in fields if k in sources[name]}
        for key in [key for key in sources[name] if key not in {**defaults, **keys}]:
            del sources[name][key]
        _update(sources[name], {**defaults, **keys})


def _existing(
    sources: dict[str, Any], name: str, keys: dict[str, Any], where: str
) -> dict[str, Any]:
    changed = f"{where} changes {', '.join(keys)} of sources.{name}"
    if name not in sources:
        raise UserError(f"{changed}, but there is none; name a source {name}, or set its kind")
    if not isinstance(sources[name], dict):
        raise UserError(f"{PARAMS}: sources.{name}: not a source; write {name}: {{kind: sample}}")
    found: dict[str, Any] = sources[name]
    return found


def _update(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        # Keep the spelling of an equal value: merging a preset twice changes nothing.
        if key not in values or values[key] != value:
            values[key] = value


def validated(params: dict[str, Any], where: str) -> Parameters:
    """Validate all sections, and that the mixture is one of the sources.

    Args:
        where: Names the parameters in messages.

    Raises:
        UserError: Names the first key that is unknown or has an invalid value.
    """
    sources = validate_sources(params["sources"], f"{where}: sources")
    found: dict[str, Any] = {
        section: validate(cls, dict(params[section]), f"{where}: {section}")
        for section, cls in SECTIONS.items()
    }
    check_names(found["train"].mixture, list(sources), where)
    return Parameters(sources=sources, **found)


def _check_sections(params: dict[str, Any]) -> None:
    check_sections(params, str(PARAMS))
    for section in ("sources", *SECTIONS):
        if not isinstance(params.get(section), dict):
            state = "holds no `key: value` lines" if section in params else "is missing"
            raise UserError(f"{PARAMS}: section {section} {state}; run `git checkout {PARAMS}`")


def flags(overlay: dict[str, dict[str, Any]]) -> str:
    """Format an overlay as flags for `dvc exp run`."""
    sources = overlay.get("sources", {})
    values: dict[str, Any] = {}
    if _replaces(sources):
        values = {"sources": sources, "train.mixture": None}
    else:
        for name, keys in sources.items():
            values |= {f"sources.{name}.{key}": value for key, value in keys.items()}
    for section in SECTIONS:
        values |= {f"{section}.{key}": value for key, value in overlay.get(section, {}).items()}
    found = []
    for path, value in values.items():
        if path in ("sources", "train.mixture") and value:
            found.append(f"{path}=null")  # or DVC would merge the new value into the old one
        found.append(f"{path}={value if isinstance(value, str) else _as_flag(value)}")
    return " ".join(f"-S {shlex.quote(flag)}" for flag in found)


def _as_flag(value: Any) -> str:
    """Format a value as `-S` takes it: as JSON, but with bare keys."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_as_flag(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_as_flag, value)) + "]"
    return json.dumps(value)


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
    read_yaml(PARAMS)  # raises UserError if the file is missing or not YAML
    merged = merge(PARAMS.read_text(encoding="utf-8"), overlay)
    if args.flags:
        print(flags(overlay))
        return
    atomic.write_bytes(PARAMS, merged.encode())
    print(f"{PARAMS}: preset {args.name} merged; `dvc params diff` shows the changes")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
