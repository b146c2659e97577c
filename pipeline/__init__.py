"""The data pipeline: text to token shards. Names for training: `Manifest` and `TokenStream`."""

from pipeline.format.manifest import Manifest
from pipeline.format.shards import TokenStream

__all__ = ["Manifest", "TokenStream"]
