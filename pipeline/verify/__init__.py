"""Prove that every byte is what the manifests say.

`stage` runs it, `checks` holds the checks of one file each, `data_report` describes the data, and
`show` decodes some documents.
"""
