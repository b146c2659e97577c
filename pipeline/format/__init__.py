"""File formats: the layout of files on disk, and code that reads and writes them.

- `shards`: token shards in llm.c's layout with their document index, and `TokenStream`, which reads
  a split across its shards.
- `manifest`: the `manifest.json` of `data/raw` and of `data/tokens`.
- `parquet`: FineWeb's schema, and text columns read in bounded memory.
- `tokenizer`: GPT-2's byte-pair encoding, built from `gpt2.tiktoken` in this folder.
- `foreign_tokens`: token files published by llm.c, modded-nanogpt, nanoGPT and build-nanogpt.
"""
