"""The manifests: `data/raw/manifest.json` (source files), `data/tokens/manifest.json` (shards).

A manifest is written last, so a folder with a manifest is complete. It holds no clock time, host
name or absolute path: the same inputs give the same bytes anywhere. Readers ignore unknown keys and
refuse an unknown major ``schema_version``.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.runtime.errors import UserError

NAME = "manifest.json"
SCHEMA_VERSION = "1.0"

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


RelativePath = Annotated[str, AfterValidator(check_relative)]


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
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; run `dvc repro` to create it") from None
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in detail["loc"])
            reason = f"{where}: {detail['msg']}"
        except OSError as error:
            reason = str(error.strerror)
        except ValueError as error:
            reason = f"not JSON ({error})"
        raise UserError(f"{path}: {reason}; run `dvc repro` to rebuild it")


class SourceFile(_Record):
    """A file of `data/raw`: parquet, or a token file of source kind `tokens`."""

    path: RelativePath
    bytes: int
    rows: int
    """Rows of a parquet file; 0 for a token file."""
    sha256: str
    origin: str | None = None
    """The sha256 of the original file, if this one was converted or rewritten from it."""
    tokens: int | None = None
    """Tokens of a token file; None for parquet."""
    skipped: dict[str, int] = Field(default={}, exclude_if=lambda skipped: not skipped)
    """Lines or rows of the original that are not in the converted file, by reason."""


class Source(_Record):
    """The origin of the files."""

    kind: str
    repo: str
    revision: str
    """Pins the bytes: a commit, a package version, or a hash over the files' hashes."""
    config: str | None = None
    """The configuration of a Hugging Face dataset repository."""


class RawManifest(_Manifest):
    """`data/raw/manifest.json`."""

    source: Source
    text_column: str = "text"
    files: list[SourceFile]


class Part(_Record):
    """Consecutive documents of a shard that come from one chunk."""

    chunk_key: str
    path: RelativePath
    """The source file."""
    rows: tuple[int, int]
    """The chunk's rows [start, stop) in the source file; for a token file its tokens."""
    tokens: int
    docs: int


class ChunkRecord(_Record):
    """The commit record of a chunk; records are listed in source order."""

    name: RelativePath
    chunk_key: str
    sha256: str


class Shard(_Record):
    """A token file and its document index."""

    name: RelativePath
    split: Split
    tokens: int
    docs: int
    text_bytes: int
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
    n_vocab: int
    eot: int


class Totals(_Record):
    """Sums over the shards of a split."""

    shards: int
    docs: int
    tokens: int
    text_bytes: int


class Manifest(_Manifest):
    """`data/tokens/manifest.json`."""

    dataset_key: str
    """A hash of the content of both splits: see `pipeline.tokenize.chunk_record`."""
    format: str
    dtype: str
    tokenizer: Tokenizer
    params: dict[str, int | str]
    source: RawManifest
    chunks: list[ChunkRecord] = []
    shards: list[Shard]
    totals: dict[Split, Totals]
    skipped: dict[str, int]
    """Number of skipped documents by reason."""
