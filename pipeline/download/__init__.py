"""Bring the source's text here, as parquet.

`stage` picks the source and publishes; `hub` and `hub_configs` read a dataset repository,
`local_files` local paths and URLs, `sample` the text that a package ships. `ingest` fetches one
file: by `http` into a `partial_file`, then, where it is no parquet, through `to_parquet`;
`row_groups` cuts groups that are too large.
"""
