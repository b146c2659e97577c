"""Turn text into token shards.

`stage` plans, runs and publishes. Text: `chunk_plan` cuts the files into chunks, `encode_chunk`
makes one shard of each, batch by batch (`encode_batch`), with the `engines` that `unicode_guard`
allows; `ship_chunks` does it without a shared file system. Token files: `index_chunk`.
`token_stats` measures what was made.
"""
