"""The files on disk: their layout, and how to read and write them.

`shards` (llm.c's token files and their document index), `manifest`, `parquet` (FineWeb's columns),
`tokenizer` (GPT-2's ranks, which lie beside it), `foreign_tokens` (other projects' token files).
"""
