"""`python -m train.study`: variants by seeds, run as DVC experiments, and what can be claimed.

`study_file` reads `train/studies/NAME.yaml`, `definition` resolves it to runs, `workspace` makes one
an experiment in a clone of its own, `runner` runs what is missing, `results` keeps what is finished,
`statistics` compares, `findings` and `page` report.
"""
