"""The manifests of `data/raw` (source files), `data/selection` (rows kept), `data/tokens` (shards).

A manifest is written last, so a folder with a manifest is complete. It holds no clock time, host
name or absolute path: the same inputs give the same bytes anywhere. Readers ignore unknown keys and
refuse an unknown major ``schema_version``. Each holds its own hash.
"""

import re
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from pipeline.runtime.errors import UserError, printable
from pipeline.store import atomic
from pipeline.store.store import mark_damaged

NAME = "manifest.json"
SCHEMA_VERSION = "2.0"  # 2: sources have names
_MAX_REASON = 200  # characters
SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


def check_relative(path: str) -> str:
    """Return ``path`` unchanged.

    Raises:
        ValueError: The path is absolute or could leave the folder it is relative to.
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in path or "\0" in path:
        raise ValueError(f"path {path!r} leaves the folder")
    return path


def _check_printable(path: str) -> str:
    if path != printable(path):
        raise ValueError("a path with control characters")
    return path


def check_source_name(name: str) -> str:
    """Return ``name`` unchanged; it is a part of paths and of keys.

    Raises:
        ValueError: It is not a name for a source.
    """
    if not SOURCE_NAME.fullmatch(name):
        raise ValueError(
            f"{printable(name)[:40]}: not a name; use 1 to 32 of a-z, 0-9, _ and -, and begin with "
            "a letter or digit"
        )
    return name


SourceName = Annotated[str, AfterValidator(check_source_name)]
RelativePath = Annotated[str, AfterValidator(check_relative), AfterValidator(_check_printable)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


def _check_major_version(version: str) -> str:
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ValueError(f"schema_version {version} is not supported (this is {SCHEMA_VERSION})")
    return version


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


M = TypeVar("M", bound="_Manifest")


class _Manifest(_Record):
    schema_version: Annotated[str, AfterValidator(_check_major_version)] = SCHEMA_VERSION

    @classmethod
    def load(cls: type[M], folder: Path | str) -> M:
        """Read the manifest of ``folder``.

        Raises:
            UserError: The manifest is missing or invalid.
        """
        path = Path(folder) / NAME
        try:
            value = atomic.parse_json(atomic.read_bytes(path))
            manifest = cls.model_validate(value)
            if atomic.SEAL in value:
                atomic.unsealed(value)
            return manifest
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; run `dvc repro` to create it") from None
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in detail["loc"])
            reason = f"{where}: {detail['msg']}"
        except OSError as error:
            reason = str(error.strerror)
        except ValueError as error:  # of JSON, or of its hash
            reason = str(error)
        mark_damaged(path)  # or `dvc repro` would find nothing to do
        reason = printable(reason)[:_MAX_REASON]
        raise UserError(f"{path}: {reason}; remove it, then run `dvc repro` to rebuild it")


class SourceFile(_Record):
    """A file of `data/raw`: parquet, or a token file of source kind `tokens`."""

    source: SourceName
    """The name of its source in `params.yaml`."""
    path: RelativePath
    bytes: Count
    rows: Count
    """Rows of a parquet file; 0 for a token file."""
    sha256: str
    origin: str | None = None
    """The sha256 of the original file, if this one was converted or rewritten from it."""
    tokens: Count | None = None
    """Tokens of a token file; None for parquet."""
    skipped: dict[str, Count] = Field(default={}, exclude_if=lambda skipped: not skipped)
    """Lines or rows of the original that are not in the converted file, by reason."""


class Source(_Record):
    """The origin of the files of a source."""

    kind: str
    repo: str
    revision: str
    """Pins the bytes: a commit, a package version, or a hash over the files' hashes."""
    config: str | None = None
    """The configuration of a Hugging Face dataset repository."""
    text_column: str = "text"

    @property
    def has_text(self) -> bool:
        """Whether its files are parquet rather than token files."""
        return self.kind != "tokens"


class RawManifest(_Manifest):
    """`data/raw/manifest.json`."""

    sources: dict[SourceName, Source]
    """By name, sorted."""
    files: list[SourceFile]
    """Source by source, in the order of the names."""

    @model_validator(mode="after")
    def _files_are_grouped(self) -> "RawManifest":
        found = [name for name, _ in groupby(file.source for file in self.files)]
        names = sorted(self.sources)
        if [*self.sources] != names or found != [name for name in names if name in found]:
            raise ValueError("its files are not in the order of its sources")
        return self

    @property
    def has_text(self) -> bool:
        """Whether any source has text."""
        return any(source.has_text for source in self.sources.values())

    def column(self, file: SourceFile) -> str:
        """Return the column with the text of a file."""
        return self.sources[file.source].text_column

    def numbers(self) -> dict[str, int]:
        """Return the number of each file, by path, among the files of its source."""
        counts = dict.fromkeys(self.sources, 0)
        found = {}
        for file in self.files:
            found[file.path] = counts[file.source]
            counts[file.source] += 1
        return found


class SelectedFile(_Record):
    """A source file in `data/selection`."""

    source: SourceName
    path: RelativePath
    sha256: str
    rows: Count
    kept: Count
    bits: RelativePath | None = None
    """The name of the bitmap; None if all rows are kept, and then there is no ledger."""
    bits_sha256: str | None = None
    ledger: RelativePath | None = None
    ledger_sha256: str | None = None


class DroppedExample(_Record):
    """A dropped row, to read: the beginning of its text, and that of its twin."""

    path: RelativePath
    row: Count
    value: float | None = None
    reason: str | None = None
    text: str
    twin_path: RelativePath | None = None
    twin_row: Count | None = None
    twin_text: str | None = None


class SelectionManifest(_Manifest):
    """`data/selection/manifest.json`."""

    selection_key: str
    """A hash of the dropped rows, numbered over all sources."""
    params: dict[str, Any]
    """Section `curate`; empty if no rule applies."""
    files: list[SelectedFile]
    dropped: dict[str, Count] = {}
    """Rows dropped by each rule that was applied."""
    found: dict[str, Any] = {}
    """What was counted and not dropped, such as copies of validation documents in training."""
    unclean_tasks: dict[str, Count | None] = {}
    """Per task of an evaluation (hellaswag_val.jsonl/17: its file, the line from 0) the kept rows
    that share words with it; None: too short to tell. All other tasks of the files are clean."""
    task_files: dict[str, str] = {}
    """The files of `decontaminate`, and the sha256 of each."""
    examples: dict[str, list[DroppedExample]] = {}
    """A few rows that each rule dropped."""
    pieces: list[tuple[str, str]] = []
    """Kind and key of the pieces of the store that hold the bitmaps and ledgers."""


class Part(_Record):
    """Consecutive documents of a shard that come from one chunk."""

    chunk_key: str
    path: RelativePath
    """The source file."""
    rows: tuple[Count, Count]
    """The chunk's rows [start, stop) in the source file; for a token file its tokens."""
    tokens: Count
    docs: Count


class ChunkRecord(_Record):
    """The commit record of a chunk; records are listed in source order."""

    source: SourceName
    name: RelativePath
    chunk_key: str
    sha256: str


class Shard(_Record):
    """A token file and its document index; its documents are of one source."""

    name: RelativePath
    source: SourceName
    split: Split
    tokens: Count
    docs: Count
    text_bytes: Count
    sha256: str
    docs_sha256: str
    parts: list[Part]

    @property
    def docs_name(self) -> str:
        """The file name of the document index."""
        return str(PurePosixPath(self.name).with_suffix(".docs.npy"))


class Tokenizer(_Record):
    """The tokenizer that produced the tokens."""

    name: str
    ranks_sha256: str
    n_vocab: Count
    eot: Count


class Totals(_Record):
    """Sums over the shards of a split."""

    shards: Count
    docs: Count
    tokens: Count
    text_bytes: Count


class Manifest(_Manifest):
    """`data/tokens/manifest.json`."""

    dataset_key: str
    """A hash of the content of both splits: see `pipeline.tokenize.chunk_record`."""
    format: str
    dtype: str
    tokenizer: Tokenizer
    params: dict[str, int | str]
    source: RawManifest
    selection_key: str | None = Field(default=None, exclude_if=lambda key: key is None)
    """That of `data/selection`; None if all rows are kept."""
    chunks: list[ChunkRecord] = []
    shards: list[Shard]
    totals: dict[Split, Totals]
    skipped: dict[str, Count]
    """Number of skipped documents by reason."""

    @model_validator(mode="after")
    def _shards_are_of_sources(self) -> "Manifest":
        order = [*self.source.sources]
        entries: list[ChunkRecord | Shard] = [*self.chunks, *self.shards]
        if any(entry.source not in order for entry in entries):
            raise ValueError("a chunk or shard of a source that is not among its sources")
        for split in SPLITS:
            places = [order.index(shard.source) for shard in self.shards if shard.split == split]
            if places != sorted(places):
                raise ValueError("its shards are not in the order of its sources")
        return self
