"""Text to token shards: sources, download, tokenizer, shard format, manifest, verify."""

from pipeline.manifest import Manifest
from pipeline.shards import TokenStream

__all__ = ["Manifest", "TokenStream"]
