"""The two manifests: what was fetched (`data/raw`) and what it became (`data/tokens`).

They are written last, so a folder with a manifest is whole. They hold no clock time, no host name
and no absolute path: the same inputs give the same bytes anywhere. Readers ignore unknown keys and
refuse an unknown major ``schema_version``.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from pipeline.runtime.errors import UserError

NAME = "manifest.json"
SCHEMA_VERSION = "1.0"

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


def stay_inside(path: str) -> str:
    """The path itself; ValueError where it could leave the folder that it is relative to."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in path or "\0" in path:
        raise ValueError(f"path {path!r} leaves the folder")
    return path


RelativePath = Annotated[str, AfterValidator(stay_inside)]


def _known_major(version: str) -> str:
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ValueError(f"schema_version {version} is not known here (this is {SCHEMA_VERSION})")
    return version


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


M = TypeVar("M", bound="_Manifest")


class _Manifest(_Record):
    schema_version: Annotated[str, AfterValidator(_known_major)] = SCHEMA_VERSION

    @classmethod
    def load(cls: type[M], folder: Path | str) -> M:
        """The manifest of ``folder``.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        path = Path(folder) / NAME
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; `dvc repro` makes it") from None
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in detail["loc"])
            raise UserError(f"{path}: {where}: {detail['msg']}; `dvc repro` mends it") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; `dvc repro` makes it anew") from None
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); `dvc repro` mends it") from None


class SourceFile(_Record):
    """A file of `data/raw`: parquet, or tokens where they come as tokens."""

    path: RelativePath
    bytes: int
    rows: int
    sha256: str
    origin: str | None = None
    """The sha256 of the file that this one was made from, where it was not taken as it was."""
    tokens: int | None = None
    """Of a token file, which has no rows."""


class Source(_Record):
    """Where the files come from."""

    kind: str
    repo: str
    revision: str
    """What pins the bytes: a commit, a package's version, or a hash over the files' hashes."""
    config: str | None = None
    """The configuration of a repository of the hub."""


class RawManifest(_Manifest):
    """`data/raw/manifest.json`."""

    source: Source
    text_column: str = "text"
    files: list[SourceFile]


class Part(_Record):
    """A run of whole documents of a shard that comes from one chunk."""

    chunk_key: str
    path: RelativePath
    """The source file."""
    rows: tuple[int, int]
    """The chunk's first row in the source file, and the row after its last; of a token file:
    its first token there, and the token after its last."""
    tokens: int
    docs: int


class ChunkRecord(_Record):
    """The commit record of a chunk, in the order of the source."""

    name: RelativePath
    chunk_key: str
    sha256: str


class Shard(_Record):
    """One token file and its sidecar of documents."""

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
        """The name of the sidecar of documents."""
        return str(PurePosixPath(self.name).with_suffix(".docs.npy"))


class Tokenizer(_Record):
    """What turned text into tokens."""

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
    """A hash of the content of both splits: see `pipeline.tokenize.encode_chunk`."""
    format: str
    dtype: str
    tokenizer: Tokenizer
    params: dict[str, int]
    source: RawManifest
    chunks: list[ChunkRecord] = []
    shards: list[Shard]
    totals: dict[Split, Totals]
    skipped: dict[str, int]
    """Documents left out, by reason."""
