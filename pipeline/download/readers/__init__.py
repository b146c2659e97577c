"""Readers of the text formats.

- `decompress`: the bytes of a compressed file, checked to the end.
- `text_stream`: text of any encoding as a stream of UTF-8.
- `rows`: what a reader yields.
- `read_json`, `read_csv`, `read_txt`, `read_arrow`: the rows of a file.
"""
