"""Turn text into token shards.

`stage` plans the chunks, builds those that the store lacks, merges and publishes. For text
(`from_text`), `chunk_plan` cuts parquet files into chunks, and `encode_chunk` turns each into a
piece, batch by batch (`encode_batch`), with the `engines` that `unicode_guard` allows;
`ship_chunks` does so without a shared file system. For token files (`from_tokens`), `index_chunk`
finds the documents. `chunk_record` describes a piece, and `token_stats` measures a shard.
"""
