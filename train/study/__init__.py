"""`python -m train.study`: variants by seeds, run as DVC experiments, and what can be claimed.

`study_file` reads `train/studies/NAME.yaml`, `definition` resolves it to runs, `runner` runs what
is missing, each in a `workspace`, `results` keeps what is finished, `statistics` compares,
`findings` and `page` report.
"""
