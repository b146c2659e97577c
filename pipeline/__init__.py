"""Text to token shards: sources, download, tokenizer, shard format, manifest, verify."""

from pipeline.format.manifest import Manifest
from pipeline.format.shards import TokenStream

__all__ = ["Manifest", "TokenStream"]
