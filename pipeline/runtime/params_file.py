"""Reading `params.yaml`: one frozen, validated section per stage."""

import difflib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from ruamel.yaml import YAML

from pipeline.runtime.errors import StageFailed, UserError, printable
from pipeline.runtime.yaml_size import check_size
from pipeline.store import atomic

PARAMS = Path("params.yaml")
SECTIONS = ("sources", "curate", "tokenize", "verify", "model", "train", "evaluate")
_MAX_VALUE_CHARS = 80  # of a value in a message
_MAX_CHARS = 200  # of a key or a parser's message
_MAX_ENTRY = 4000  # of a section to write
_MAX_FILE_BYTES = 1 << 20  # paths of such a size take some seconds to parse

S = TypeVar("S", bound="Section")

_loaded: dict[Path, dict[str, Any]] = {}  # values of each section that this process has read


class Section(BaseModel):
    """A section of `params.yaml`: frozen; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # no "12" for 12, no true for 1
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @field_validator("*")
    @classmethod
    def _check_int64(cls, value: Any) -> Any:
        if type(value) is int and not -(1 << 63) <= value < 1 << 63:
            raise ValueError("not a number of 64 bits")
        return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; empty if the file is.

    Raises:
        UserError: The file is missing, is not YAML, or holds no mapping.
    """
    try:
        atomic.check_regular(path)
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run this in the project's folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it a file") from None
    if len(data) > _MAX_FILE_BYTES:
        raise UserError(f"{path}: larger than {_MAX_FILE_BYTES >> 20} MiB; write less into it")
    try:
        text = data.decode()
        check_size(YAML(typ="safe", pure=True).parse(text))
        value = YAML(typ="safe", pure=True).load(text)
    except Exception as error:  # the parser raises many types
        reason = printable(" ".join(str(error).split()) or type(error).__name__)[:_MAX_CHARS]
        raise UserError(f"{path}: not readable as YAML: {reason}; correct it there") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{path}: not a mapping; write `key: value` lines")
    return value


def nearest(key: str, known: list[str] | tuple[str, ...]) -> str:
    """Return a hint for an unknown ``key``: the most similar known key, or all known keys."""
    match = difflib.get_close_matches(key, known, n=1)
    if match:
        return f"did you mean {match[0]}?"
    more = f", and {len(known) - 20} more" if len(known) > 20 else ""
    return f"known: {', '.join(sorted(known)[:20])}{more}"


def validate(cls: type[S], values: dict[str, Any], where: str) -> S:
    """Validate ``values`` as a section; ``where`` is its name in messages: `params.yaml: train`.

    Raises:
        UserError: Names the first key that is unknown or has an invalid value.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UserError(first_error(error, where, cls)) from None


def first_error(error: ValidationError, where: str, cls: type[BaseModel]) -> str:
    """Return a pydantic error's first problem: one line that names the key and how to fix it."""
    details = error.errors(include_url=False)
    # A misspelt key is both unknown and missing; the former comes with a suggestion.
    detail = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    # A location such as ("prompts", 3) is reported as train.prompts.3; a model validator has none.
    key = printable(".".join([where, *(str(part) for part in detail["loc"])]))[:_MAX_CHARS]
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(str(detail['loc'][-1]), list(cls.model_fields))}"
    if detail["type"] == "missing":
        return f"{key}: missing; add it"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in ("value_error", "assertion_error"):
        return f"{key}: {message}"
    given = repr(detail["input"])
    if len(given) > _MAX_VALUE_CHARS:
        given = given[:_MAX_VALUE_CHARS] + "…"
    return f"{key}: {message[0].lower()}{message[1:]} (got {given})"


def check_sections(sections: dict[str, Any], where: str) -> None:
    """Refuse a section that is unknown, or named as in an earlier version.

    Raises:
        UserError: Names the section; of an earlier version also what to write instead.
    """
    if "source" in sections:
        entry = json.dumps(sections["source"], default=str)
        raise UserError(
            f"{where}: source: sources have names now; write this line instead of the section: "
            f"sources: {{main: {printable(entry)[:_MAX_ENTRY]}}}"
        )
    for section in sections:
        if section not in SECTIONS:
            shown = printable(section)[:_MAX_CHARS]
            raise UserError(f"{where}: {shown}: unknown section; {nearest(section, SECTIONS)}")


def load_values(name: str, path: Path = PARAMS) -> dict[str, Any]:
    """Read section ``name`` of the parameters file, not validated.

    Raises:
        UserError: A missing file or section, or an unknown section.
    """
    params = read_yaml(path)
    _loaded.setdefault(path.absolute(), {})[name] = params.get(name)
    check_sections(params, str(path))
    values = params.get(name)
    if not isinstance(values, dict):
        state = "is not a mapping" if name in params else "is missing"
        raise UserError(f"{path}: section {name} {state}; `git checkout {path}` restores it")
    return values


def load_section(name: str, cls: type[S], path: Path = PARAMS) -> S:
    """Read section ``name`` of the parameters file.

    Raises:
        UserError: A missing file or section, an unknown key, or an invalid value.
    """
    return validate(cls, load_values(name, path), f"{path}: {name}")


def check_unchanged() -> None:
    """Refuse to end a stage during which one of its sections was changed in the file.

    DVC reads the parameters that it records when a stage has ended, not when it started.

    Raises:
        StageFailed: Names the file and the section.
    """
    for path, sections in _loaded.items():
        now = read_yaml(path)
        for name, values in sections.items():
            if now.get(name) != values:
                raise StageFailed(
                    f"{path.name}: {name}: changed while this stage ran, and DVC would record the "
                    "new values as those of this result; run dvc repro again"
                )
