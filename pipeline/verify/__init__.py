"""Check every byte of the data against the manifests.

`stage` runs the tasks, `checks` holds the checks of one file each, `data_report` collects
statistics, and `show` decodes some documents.
"""
