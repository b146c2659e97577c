"""Stage `download`: fetch the source's files, convert them to parquet, publish them in `data/raw`.

- `stage`: the stage itself: selects files, fetches them by Ray tasks, writes the manifest.
- `hub`: source kind `hub`: the commit and files of a Hugging Face dataset repository.
- `hub_configs`: the files of a repository's configuration, from its card and its file listing.
- `source_paths`: source kinds `files` and `tokens`: fsspec URLs, and local paths by `local_paths`.
- `left_out`: `exclude`, and what a source holds that is not read.
- `raw_names`: check of the names in `data/raw`.
- `sample`: source kind `sample`: text shipped by a package.
- `ingest`: one file from the source into the store: fetched, checked, converted if necessary.
- `http`: a download over HTTP that resumes, retries and verifies the file's hash.
- `partial_file`: the bytes of an unfinished download.
- `to_parquet`: text formats converted to parquet by `readers`; unusable rows are counted.
- `row_groups`: parquet files with large row groups, rewritten with small ones.
- `restore`: missing files of `data/raw`, taken from the store or fetched again.
"""
